// Numbers as they are stored (bfloat16, float32, float64) and as they are computed with.

#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

using Size = std::int64_t;

#define FOR_EACH_DTYPE(DEFINE) DEFINE(bfloat16, BFloat16) DEFINE(float32, float) DEFINE(float64, double)

namespace {

constexpr Size kWorthSharing = 1 << 14;  // elements below which waking a thread costs more

enum class BFloat16 : std::uint16_t {};  // an enum, for the compiler vectorises no structs

template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline float load(BFloat16 x) { return std::bit_cast<float>(std::uint32_t(x) << 16); }
inline float load(float x) { return x; }
inline double load(double x) { return x; }

template <class T>
inline T store(Wide<T> x) {
    if constexpr (std::is_same_v<T, BFloat16>) {
        const auto bits = std::bit_cast<std::uint32_t>(x);
        const std::uint32_t even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        return BFloat16(x != x ? 0x7fc0u : even);  // rounding must not turn NaN into 0
    } else {
        return x;
    }
}

// sum + a · b, rounded once where the processor can. A compiler that may choose (GCC does by what
// surrounds a sum, when it tunes for AMD's) rounds the same sum otherwise in another function.
inline float plus_product(float sum, float a, float b) {
#if defined(__FMA__) || defined(__aarch64__) || defined(__FP_FAST_FMAF)
    return __builtin_fmaf(a, b, sum);
#else
    return sum + a * b;
#endif
}

// exp by 2^n · polynomial (Cephes' coefficients), to 2 units in the last place; vectorises. The
// bounds keep it, and a number divided by it, out of the denormals, which are a hundred times slower.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 80.0f ? 80.0f : x;
    const float n = std::floor(x * 1.44269504f + 0.5f);
    const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const float y = p * r * r + r + 1.0f;
    return y * std::bit_cast<float>((std::int32_t(n) + 127) << 23);
}
inline double exponential(double x) { return std::exp(x); }

// tanh by a rational function (Eigen's coefficients), to 4 units in the last place also near 0,
// where 1 − 2 / (exp(2x) + 1) has lost them; vectorises. At the bounds it is ±1.
inline float hyperbolic_tangent(float x) {
    x = x < -7.90531110763549805f ? -7.90531110763549805f : x;
    x = x > 7.90531110763549805f ? 7.90531110763549805f : x;
    const float s = x * x;
    float p = -2.76076847742355e-16f;
    p = p * s + 2.00018790482477e-13f;
    p = p * s - 8.60467152213735e-11f;
    p = p * s + 5.12229709037114e-08f;
    p = p * s + 1.48572235717979e-05f;
    p = p * s + 6.37261928935436e-04f;
    p = p * s + 4.89352455891786e-03f;
    float q = 1.19825839466702e-06f;
    q = q * s + 1.18534705686654e-04f;
    q = q * s + 2.26843463243900e-03f;
    q = q * s + 4.89352518554385e-03f;
    return x * p / q;
}
inline double hyperbolic_tangent(double x) { return std::tanh(x); }

// Call work<flags...>(): a function compiled for each combination, without branches on them inside.
template <bool... known, class Work>
inline void with_flags(Work work) {
    work.template operator()<known...>();
}
template <bool... known, class Work, class... Rest>
inline void with_flags(Work work, bool flag, Rest... rest) {
    flag ? with_flags<known..., true>(work, rest...) : with_flags<known..., false>(work, rest...);
}

}  // namespace
