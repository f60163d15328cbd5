// Dot products of tokens with rows of a weight, in float32.
//
// Each is a sum of the same operations in the same order, whichever function computes it: so a token
// has the same result alone and among others.

#pragma once

#include "numbers.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr Size kOutputs = 32;  // rows of a weight that one thread multiplies with at a time

#ifdef __AVX512F__

// The sums of 16 vectors, as one vector. All 16 are added up in the same order.
inline __m512 sums(const __m512* v) {
    __m512 a[8], b[4], c[2];
    for (int i = 0; i < 8; ++i)
        a[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]),
                             _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 4; ++i) {
        const __m512d x = _mm512_castps_pd(a[2 * i]), y = _mm512_castps_pd(a[2 * i + 1]);
        b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    for (int i = 0; i < 2; ++i)
        c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88),
                         _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
}

template <class T>
struct Lanes;

template <>
struct Lanes<float> {
    using Vector = __m512;
    static constexpr Size kStep = 16;
    static Vector read(const float* p) { return _mm512_loadu_ps(p); }
    static Vector read(const float* p, Size n) {
        return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
    }
    static __m512 add(__m512 sum, Vector a, Vector b) { return _mm512_fmadd_ps(a, b, sum); }
};

#ifdef __AVX512BF16__
template <>
struct Lanes<BFloat16> {
    using Vector = __m512bh;
    static constexpr Size kStep = 32;
    static Vector read(const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static Vector read(const BFloat16* p, Size n) {
        return (__m512bh)_mm512_maskz_loadu_epi16(__mmask32((1u << n) - 1), p);
    }
    static __m512 add(__m512 sum, Vector a, Vector b) { return _mm512_dpbf16_ps(sum, a, b); }
};
#else
template <>
struct Lanes<BFloat16> {
    using Vector = __m512;
    static constexpr Size kStep = 16;
    static Vector wide(__m256i x) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
    }
    static Vector read(const BFloat16* p) { return wide(_mm256_loadu_si256((const __m256i*)p)); }
    static Vector read(const BFloat16* p, Size n) {
        alignas(32) std::uint16_t some[16] = {};
        for (Size i = 0; i < n; ++i) some[i] = std::uint16_t(p[i]);
        return wide(_mm256_load_si256((const __m256i*)some));
    }
    static __m512 add(__m512 sum, Vector a, Vector b) { return _mm512_fmadd_ps(a, b, sum); }
};
#endif

// out[m, o] = x[m] · w[o] for M tokens and O rows of a weight, 16 products at most. `ahead`, unless
// null: the rows that come next, to be prefetched, which the processor does not predict.
template <int M, int O, class T>
inline void dots(const T* x, Size x_stride, const T* w, Size w_stride, Size n, float* out,
                 Size out_stride, const T* ahead = nullptr) {
    using L = Lanes<T>;
    static_assert(M * O <= 16);
    __m512 acc[16];
    for (auto& a : acc) a = _mm512_setzero_ps();
    Size i = 0;
    for (; i + L::kStep <= n; i += L::kStep) {
        typename L::Vector b[O];
#pragma GCC unroll 16
        for (int o = 0; o < O; ++o) b[o] = L::read(w + o * w_stride + i);
        if (ahead)
#pragma GCC unroll 16
            for (int o = 0; o < O; ++o) __builtin_prefetch(ahead + o * w_stride + i, 0, 2);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const auto a = L::read(x + m * x_stride + i);
#pragma GCC unroll 16
            for (int o = 0; o < O; ++o) acc[m * O + o] = L::add(acc[m * O + o], a, b[o]);
        }
    }
    if (i < n) {
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const auto a = L::read(x + m * x_stride + i, n - i);
#pragma GCC unroll 16
            for (int o = 0; o < O; ++o)
                acc[m * O + o] = L::add(acc[m * O + o], a, L::read(w + o * w_stride + i, n - i));
        }
    }
    alignas(64) float totals[16];
    _mm512_store_ps(totals, sums(acc));
    for (int m = 0; m < M; ++m)
        for (int o = 0; o < O; ++o) out[m * out_stride + o] = totals[m * O + o];
}

// out[o] = x · w[o] for 16 rows of a weight, one row after another: memory that is read in its order
// comes faster than 16 rows side by side. Each sum is that of `dots`.
template <class T>
inline void dots_in_turn(const T* x, const T* w, Size n, float* out) {
    using L = Lanes<T>;
    __m512 acc[16];
    for (int o = 0; o < 16; ++o) {
        const T* row = w + o * n;
        __m512 sum = _mm512_setzero_ps();
        Size i = 0;
        for (; i + L::kStep <= n; i += L::kStep) sum = L::add(sum, L::read(x + i), L::read(row + i));
        if (i < n) sum = L::add(sum, L::read(x + i, n - i), L::read(row + i, n - i));
        acc[o] = sum;
    }
    _mm512_storeu_ps(out, sums(acc));
}

#else

template <int M, int O, class T>
inline void dots(const T* x, Size x_stride, const T* w, Size w_stride, Size n, float* out,
                 Size out_stride, const T* = nullptr) {
    constexpr Size kLanes = 8;
    for (int m = 0; m < M; ++m) {
        for (int o = 0; o < O; ++o) {
            const T *a = x + m * x_stride, *b = w + o * w_stride;
            float acc[kLanes] = {};
            Size i = 0;
            for (; i + kLanes <= n; i += kLanes)
                for (Size l = 0; l < kLanes; ++l)
                    acc[l] = plus_product(acc[l], load(a[i + l]), load(b[i + l]));
            for (Size l = 0; i < n; ++i, ++l) acc[l] = plus_product(acc[l], load(a[i]), load(b[i]));
            for (Size half = kLanes / 2; half; half /= 2)
                for (Size l = 0; l < half; ++l) acc[l] += acc[l + half];
            out[m * out_stride + o] = acc[0];
        }
    }
}

template <class T>
inline void dots_in_turn(const T* x, const T* w, Size n, float* out) {
    for (int o = 0; o < 16; ++o) dots<1, 1>(x, 0, w + o * n, 0, n, out + o, 0);
}

#endif

// out[o] = x · w[o] for `count` rows of a weight; `next`, unless null, is read after them.
template <class T>
inline void dots_of_one(const T* x, const T* w, Size stride, Size count, Size n, float* out,
                        const T* next) {
    Size o = 0;
    for (; o + 16 <= count; o += 16)
        dots<1, 16>(x, 0, w + o * stride, stride, n, out + o, 0,
                    o + 16 < count ? w + (o + 16) * stride : next);
    for (; o + 8 <= count; o += 8)
        dots<1, 8>(x, 0, w + o * stride, stride, n, out + o, 0,
                   o + 8 < count ? w + (o + 8) * stride : next);
    for (; o < count; ++o) dots<1, 1>(x, 0, w + o * stride, stride, n, out + o, 0);
}

// out[t, o] = x[t] · w[o], `count` rows of a weight for `tokens` tokens.
template <class T>
void tile(const T* x, Size tokens, const T* w, Size count, Size n, float* out) {
    const Size whole = tokens / 4 * 4;
    for (Size o = 0; o < count; o += 4) {
        const Size few = count - o;
        for (Size t = 0; t < whole; t += 4) {
            if (few >= 4 && t == 0)
                dots<4, 4>(x, n, w + o * n, n, n, out + o, kOutputs, w + (o + 4) * n);
            else if (few >= 4)
                dots<4, 4>(x + t * n, n, w + o * n, n, n, out + t * kOutputs + o, kOutputs);
            else
                for (Size i = 0; i < few; ++i)
                    dots<4, 1>(x + t * n, n, w + (o + i) * n, n, n, out + t * kOutputs + o + i,
                               kOutputs);
        }
    }
    if (tokens == 1) {
        Size o = 0;
        for (; o + 16 <= count; o += 16) dots_in_turn(x, w + o * n, n, out + o);
        const T* none = nullptr;
        dots_of_one(x, w + o * n, n, count - o, n, out + o, none);
        return;
    }
    for (Size t = whole; t < tokens; ++t)
        dots_of_one(x + t * n, w, n, count, n, out + t * kOutputs, w + count * n);
}

}  // namespace
