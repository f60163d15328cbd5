// Sums of products in float32 or wider, 64 bytes at a time: along two rows, or down a column, where
// processors that multiply bfloat16 take two of them in one step.

#pragma once

#include "dots.h"
#include "lanes.h"

namespace {

template <class T>
constexpr Size kLanes = Size(64 / sizeof(Wide<T>));

// 64 bytes of two rows multiplied and added up, and for sums down a column `kDeep` rows at a time.
template <class T>
struct Steps {
    using F = Wide<T>;
    using Line = F;  // what a column has at each step
    static constexpr Size kColumns = std::is_same_v<T, BFloat16> ? 32 : 64 / sizeof(T), kDeep = 1;

    static void dot(Vector<F>& sum, const T* a, const T* b) {
        sum += Half<F, 0>{0}.read(a) * Half<F, 0>{0}.read(b);
        if constexpr (std::is_same_v<T, BFloat16>) sum += Half<F, 1>{0}.read(a) * Half<F, 1>{0}.read(b);
    }
    static Line line(const T* value, Size, Size) { return load(*value); }
    static Vector<F> spread(Line x) { return Vector<F>{} + x; }
    static void add(Vector<F>& sum, Vector<F> scale, const Line* lines) {
        Vector<F> x;
        std::memcpy(&x, lines, sizeof x);
        sum += scale * x;
    }
};

#if defined(__AVX512BF16__)
template <>
struct Steps<BFloat16> {
    using F = float;
    using Line = std::uint32_t;  // two rows' numbers
    static constexpr Size kColumns = 32, kDeep = 2;

    static __m512bh pairs(const void* x) {
        __m512bh y;
        std::memcpy(&y, x, sizeof y);
        return y;
    }
    static void dot(Vector<F>& sum, const BFloat16* a, const BFloat16* b) {
        sum = Vector<F>(_mm512_dpbf16_ps(__m512(sum), pairs(a), pairs(b)));
    }
    static Line line(const BFloat16* value, Size stride, Size rows) {
        const Line low = Line(value[0]);
        return rows < 2 ? low : low | Line(value[stride]) << 16;
    }
    static Vector<F> spread(Line x) {
        return Vector<F>(_mm512_castsi512_ps(_mm512_set1_epi32(int(x))));
    }
    static void add(Vector<F>& sum, Vector<F> scale, const Line* lines) {
        const auto x = (__m512bh)_mm512_castps_si512(__m512(scale));
        sum = Vector<F>(_mm512_dpbf16_ps(__m512(sum), x, pairs(lines)));
    }
};
#endif

// The sum of each of `count` vectors.
template <class F>
inline void added_up(const Vector<F>* vectors, F* totals, Size count) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<F, float>) {
        if (count == 16) {
            __m512 all[16];
            std::memcpy(all, vectors, sizeof all);
            _mm512_storeu_ps(totals, sums(all));
            return;
        }
    }
#endif
    for (Size i = 0; i < count; ++i) {
        F total = 0;
#pragma omp simd reduction(+ : total)
        for (Size j = 0; j < Size(64 / sizeof(F)); ++j) total += vectors[i][j];
        totals[i] = total;
    }
}

}  // namespace
