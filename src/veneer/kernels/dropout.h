// Dropout by a mask that is a function of a seed, a row and a column: it is made anew where it is
// needed, by any number of threads.

#pragma once

#include "numbers.h"

namespace {

typedef std::uint16_t __attribute__((may_alias)) Bits16;

// 64 random bits for a row: splitmix64 (Steele, Lea and Flood 2014).
inline std::uint64_t row_key(std::uint64_t seed, std::uint64_t row) {
    std::uint64_t z = seed + (row + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// 32 random bits for a pair of columns, with constants of hash-prospector's lowbias32.
inline std::uint32_t pair_bits(std::uint32_t pair, std::uint32_t low, std::uint32_t high) {
    std::uint32_t z = pair ^ low;
    z = (z ^ (z >> 16)) * 0x7feb352du;
    z ^= high;
    z = (z ^ (z >> 15)) * 0x846ca68bu;
    return z ^ (z >> 16);
}

// y = x, or y += x, where the 16 bits of an element are at least `dropped`; elsewhere y = 0, or y.
template <bool adds, class T>
void dropout(const T* x, T* y, std::uint64_t seed, std::uint32_t dropped, Size rows, Size cols) {
    constexpr Size kChunk = 1024;
#pragma omp parallel for schedule(static) if (rows * cols > kWorthSharing)
    for (Size row = 0; row < rows; ++row) {
        const std::uint64_t key = row_key(seed, std::uint64_t(row));
        const auto low = std::uint32_t(key), high = std::uint32_t(key >> 32);
        std::uint32_t pairs[kChunk / 2];
        for (Size first = 0; first < cols; first += kChunk) {
            const Size n = cols - first < kChunk ? cols - first : kChunk;
            const auto begin = std::uint32_t(first / 2);
#pragma omp simd
            for (std::uint32_t j = 0; j < std::uint32_t(n + 1) / 2; ++j)
                pairs[j] = pair_bits(begin + j, low, high);
            const Bits16* bits = reinterpret_cast<const Bits16*>(pairs);
            const T* a = x + row * cols + first;
            T* out = y + row * cols + first;
#pragma omp simd
            for (Size i = 0; i < n; ++i) {
                if constexpr (adds) {
                    const T sum = store<T>(load(out[i]) + load(a[i]));
                    out[i] = bits[i] < dropped ? out[i] : sum;
                } else {
                    out[i] = bits[i] < dropped ? T(0) : a[i];
                }
            }
        }
    }
}

}  // namespace

#define EXPORT_DROPOUT(name, T)                                                                    \
    extern "C" void dropout_##name(const T* x, T* y, Size seed, Size dropped, Size adds,           \
                                   Size rows, Size cols) {                                         \
        with_flags(                                                                                \
            [=]<bool a>() {                                                                        \
                dropout<a>(x, y, std::uint64_t(seed), std::uint32_t(dropped), rows, cols);         \
            },                                                                                     \
            adds != 0);                                                                            \
    }

FOR_EACH_DTYPE(EXPORT_DROPOUT)
