// The weights of a linear layer: numbers, or codes of 4 or 8 bits with their scales.

#pragma once

#include "numbers.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

// A weight (out, in): numbers, or 4-bit codes with 16 values and a scale for each 64 of them, or
// 8-bit codes with a scale for each row.
enum Kind : Size { kNumbers, kFourBits, kEightBits };

struct Linear {
    const void *weight, *bias;
    const float *scales, *values;
    Size out, in, kind;
};

// Return `count` rows from `first` on as numbers; codes are dequantized into `buffer`.
template <class T>
const T* weight_rows(const Linear& linear, Size first, Size count, T* buffer) {
    const Size n = linear.in;
    if (linear.kind == kNumbers) return static_cast<const T*>(linear.weight) + first * n;
    if (linear.kind == kEightBits) {
        const auto* codes = static_cast<const std::int8_t*>(linear.weight) + first * n;
        for (Size row = 0; row < count; ++row) {
            const float scale = linear.scales[first + row];
#pragma omp simd
            for (Size i = 0; i < n; ++i)
                buffer[row * n + i] =
                    store<T>(float(codes[row * n + i]) * scale * 7.874015718698502e-3f);
        }
        return buffer;
    }
    const auto* codes = static_cast<const std::uint8_t*>(linear.weight) + first * n / 2;
    const float* scales = linear.scales + first * n / 64;
    for (Size block = 0; block < count * n / 64; ++block) {
        const float scale = scales[block];
        const std::uint8_t* c = codes + block * 32;
        T* out = buffer + block * 64;
#ifdef __AVX512F__
        const __m512 table = _mm512_loadu_ps(linear.values), s = _mm512_set1_ps(scale);
        alignas(64) float high[32], low[32];
        for (Size i = 0; i < 32; i += 16) {
            const __m512i q = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(c + i)));
            const __m512i upper = _mm512_srli_epi32(q, 4);
            _mm512_store_ps(high + i, _mm512_mul_ps(_mm512_permutexvar_ps(upper, table), s));
            _mm512_store_ps(low + i, _mm512_mul_ps(_mm512_permutexvar_ps(q, table), s));
        }
#pragma omp simd
        for (Size i = 0; i < 32; ++i) {
            out[2 * i] = store<T>(high[i]);
            out[2 * i + 1] = store<T>(low[i]);
        }
#else
        for (Size i = 0; i < 32; ++i) {
            out[2 * i] = store<T>(linear.values[c[i] >> 4] * scale);
            out[2 * i + 1] = store<T>(linear.values[c[i] & 15] * scale);
        }
#endif
    }
    return buffer;
}

}  // namespace
