// Sums over a row, 128 bytes of float32 (or float64) at a time: for rows so short that the
// compiler's own preparation of a loop costs more than the loop.

#pragma once

#include <cstring>

#include "numbers.h"

namespace {

template <class F>
using Vector __attribute__((vector_size(64))) = F;

// The number at `i` of a row, read as it is computed with.
template <class F>
struct One {
    Size i;
    template <class T>
    F read(const T* row) const { return load(row[i]); }
};

// Half of the numbers in 128 bytes of F from `i` on: of bfloat16, every other one, because those
// need no more than a shift or a mask; else the first or the last.
template <class F, int half>
struct Half {
    Size i;
    template <class T>
    Vector<F> read(const T* row) const {
        Vector<F> x;
        if constexpr (std::is_same_v<T, BFloat16>) {
            Vector<std::uint32_t> pairs;
            std::memcpy(&pairs, row + i, sizeof pairs);
            pairs = half ? pairs & 0xffff0000u : pairs << 16;
            std::memcpy(&x, &pairs, sizeof x);
        } else {
            std::memcpy(&x, row + i + half * (64 / sizeof(F)), sizeof x);
        }
        return x;
    }
};

// Σ term(at) over a row, as several sums side by side: a single one would wait for each addition.
template <class F, class Term>
inline F sum_of(Size count, Term term) {
    constexpr Size kLanes = 64 / sizeof(F);
    Vector<F> a{}, b{}, c{}, d{};
    Size i = 0;
    for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
        a += term(Half<F, 0>{i});
        b += term(Half<F, 1>{i});
        c += term(Half<F, 0>{i + 2 * kLanes});
        d += term(Half<F, 1>{i + 2 * kLanes});
    }
    if (i + 2 * kLanes <= count) {
        a += term(Half<F, 0>{i});
        b += term(Half<F, 1>{i});
        i += 2 * kLanes;
    }
    const Vector<F> lanes = (a + b) + (c + d);
    F sum = 0;
#pragma omp simd reduction(+ : sum)
    for (Size j = 0; j < kLanes; ++j) sum += lanes[j];
    for (; i < count; ++i) sum += term(One<F>{i});
    return sum;
}

// Mean, 0 unless centred, and 1 / σ of a row.
template <bool centred, class T>
void statistics_of(const T* x, Wide<T> eps, Wide<T>* statistics, Size cols) {
    using F = Wide<T>;
    F mean = 0;
    if constexpr (centred) mean = sum_of<F>(cols, [=](auto at) { return at.read(x); }) / F(cols);
    const F squares = sum_of<F>(cols, [=](auto at) {
        const auto d = at.read(x) - mean;
        return d * d;
    });
    statistics[0] = mean;
    statistics[1] = F(1) / std::sqrt(squares / F(cols) + eps);
}

}  // namespace
