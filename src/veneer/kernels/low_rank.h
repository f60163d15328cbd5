// Products with few rows of factors, F (rank, columns): of so few that a matrix product would spend
// its time on preparing itself. Sums are made in float32 or wider and rounded once.

#pragma once

#include <vector>

#include "lanes.h"

namespace {

constexpr Size kRanks = 4;      // rows of F at a time: their sums stay in registers
constexpr Size kLowRankColumns = 512;

// h = x · row for `ranks` rows of F.
template <Size ranks, class T>
inline void project_row(const T* x, const T* factors, T* h, Size cols) {
    using F = Wide<T>;
    constexpr Size kStep = 128 / sizeof(F);
    Vector<F> sums[ranks] = {};
    Size i = 0;
    for (; i + kStep <= cols; i += kStep) {
        const Vector<F> even = Half<F, 0>{i}.read(x), odd = Half<F, 1>{i}.read(x);
        for (Size r = 0; r < ranks; ++r) {
            const T* row = factors + r * cols;
            sums[r] += even * Half<F, 0>{i}.read(row);
            sums[r] += odd * Half<F, 1>{i}.read(row);
        }
    }
    for (Size r = 0; r < ranks; ++r) {
        F sum = 0;
        for (Size j = 0; j < Size(64 / sizeof(F)); ++j) sum += sums[r][j];
        for (Size rest = i; rest < cols; ++rest) sum += load(x[rest]) * load(factors[r * cols + rest]);
        h[r] = store<T>(sum);
    }
}

// h = x Fᵀ for one row.
template <class T>
inline void project_all(const T* x, const T* factors, T* h, Size rank, Size cols) {
    Size r = 0;
    for (; r + kRanks <= rank; r += kRanks) project_row<kRanks>(x, factors + r * cols, h + r, cols);
    for (; r < rank; ++r) project_row<1>(x, factors + r * cols, h + r, cols);
}

// h = x Fᵀ: x (rows, cols), h (rows, rank).
template <class T>
void low_rank_project(const T* x, const T* factors, T* h, Size rows, Size rank, Size cols) {
#pragma omp parallel for schedule(static) if (rows * rank * cols > kWorthSharing)
    for (Size n = 0; n < rows; ++n) project_all(x + n * cols, factors, h + n * rank, rank, cols);
}

// y += h F for one row.
template <class T>
inline void add_row(const T* h, const T* factors, T* y, Size rank, Size cols) {
    using F = Wide<T>;
    for (Size first = 0; first < cols; first += kLowRankColumns) {
        const Size width = cols - first < kLowRankColumns ? cols - first : kLowRankColumns;
        T* out = y + first;
        F sums[kLowRankColumns];
#pragma omp simd
        for (Size i = 0; i < width; ++i) sums[i] = load(out[i]);
        for (Size r = 0; r < rank; ++r) {
            const F scale = load(h[r]);
            const T* row = factors + r * cols + first;
#pragma omp simd
            for (Size i = 0; i < width; ++i) sums[i] += scale * load(row[i]);
        }
#pragma omp simd
        for (Size i = 0; i < width; ++i) out[i] = store<T>(sums[i]);
    }
}

// y += h F: h (rows, rank), y (rows, cols).
template <class T>
void low_rank_add(const T* h, const T* factors, T* y, Size rows, Size rank, Size cols) {
#pragma omp parallel for schedule(static) if (rows * rank * cols > kWorthSharing)
    for (Size n = 0; n < rows; ++n) add_row(h + n * rank, factors, y + n * cols, rank, cols);
}

// y += (x Aᵀ) Bᵀ, where each row has an A (rank, in) and a Bᵀ (rank, out) of its own.
template <class T>
void low_rank_rows(const T* x, T* y, const T* const* As, const T* const* Bts, const Size* ranks,
                   Size rows, Size in, Size out) {
#pragma omp parallel for schedule(static) if (rows * (in + out) > kWorthSharing)
    for (Size n = 0; n < rows; ++n) {
        std::vector<T> h(static_cast<std::size_t>(ranks[n]));
        project_all(x + n * in, As[n], h.data(), ranks[n], in);
        add_row(h.data(), Bts[n], y + n * out, ranks[n], out);
    }
}

// Some columns of `ranks` rows of F = hᵀ x.
template <Size ranks, class T>
inline void gradient_columns(const T* h, const Wide<T>* weights, const T* x, T* factors, Size rows,
                             Size rank, Size cols, Size width) {
    using F = Wide<T>;
    constexpr Size kWidth = 32;
    F sums[ranks][kWidth] = {};
    for (Size n = 0; n < rows; ++n) {
        const T* row = x + n * cols;
        F scales[ranks];
        for (Size r = 0; r < ranks; ++r) scales[r] = weights[n] * load(h[n * rank + r]);
        if (width == kWidth) {
            for (Size r = 0; r < ranks; ++r)
#pragma omp simd
                for (Size i = 0; i < kWidth; ++i) sums[r][i] += scales[r] * load(row[i]);
        } else {
            for (Size r = 0; r < ranks; ++r)
                for (Size i = 0; i < width; ++i) sums[r][i] += scales[r] * load(row[i]);
        }
    }
    for (Size r = 0; r < ranks; ++r)
        for (Size i = 0; i < width; ++i) factors[r * cols + i] = store<T>(sums[r][i]);
}

// F = (w h)ᵀ x: h (rows, rank), w (rows,), x (rows, cols), F (rank, cols).
template <class T>
void low_rank_gradient(const T* h, const Wide<T>* weights, const T* x, T* factors, Size rows,
                       Size rank, Size cols) {
    constexpr Size kWidth = 32;
#pragma omp parallel for schedule(static) if (rows * rank * cols > kWorthSharing)
    for (Size first = 0; first < cols; first += kWidth) {
        const Size width = cols - first < kWidth ? cols - first : kWidth;
        Size r = 0;
        for (; r + kRanks <= rank; r += kRanks)
            gradient_columns<kRanks>(h + r, weights, x + first, factors + r * cols + first, rows,
                                     rank, cols, width);
        for (; r < rank; ++r)
            gradient_columns<1>(h + r, weights, x + first, factors + r * cols + first, rows, rank,
                                cols, width);
    }
}

}  // namespace

#define EXPORTED_LOW_RANK(name, T)                                                                 \
    extern "C" void low_rank_project_##name(const T* x, const T* factors, T* h, Size rows,         \
                                            Size rank, Size cols) {                                \
        low_rank_project(x, factors, h, rows, rank, cols);                                         \
    }                                                                                              \
    extern "C" void low_rank_add_##name(const T* h, const T* factors, T* y, Size rows, Size rank,  \
                                        Size cols) {                                               \
        low_rank_add(h, factors, y, rows, rank, cols);                                             \
    }                                                                                              \
    extern "C" void low_rank_rows_##name(const T* x, T* y, const T* const* As,                     \
                                         const T* const* Bts, const Size* ranks, Size rows,        \
                                         Size in, Size out) {                                      \
        low_rank_rows(x, y, As, Bts, ranks, rows, in, out);                                        \
    }                                                                                              \
    extern "C" void low_rank_gradient_##name(const T* h, const Wide<T>* weights, const T* x,       \
                                             T* factors, Size rows, Size rank, Size cols) {        \
        low_rank_gradient(h, weights, x, factors, rows, rank, cols);                               \
    }
