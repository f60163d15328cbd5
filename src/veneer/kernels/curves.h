// Activations and their slopes, which vectorise.

#pragma once

#include "numbers.h"

namespace {

template <class F>
struct Curve {
    F y, slope;
};

// x · s(v) with the logistic function s, and its slope, where v has the slope v_slope.
template <class F>
inline Curve<F> times_sigmoid(F x, F v, F v_slope) {
    F e = exponential(-v);
    if constexpr (std::is_same_v<F, double>) e = e > 1e300 ? 1e300 : e;  // y · e is no NaN
    const F s = F(1) / (F(1) + e), y = x * s;
    return {y, s * (F(1) + v_slope * (y * e))};  // e · s is 1 − s
}

struct Silu {
    template <class F>
    static Curve<F> at(F x) {
        const F s = F(1) / (F(1) + exponential(-x)), y = x * s;
        return {y, s + (x - y) * s};
    }
};

struct QuickGelu {
    template <class F>
    static Curve<F> at(F x) { return times_sigmoid(x, F(1.702) * x, F(1.702)); }
};

// x/2 · (1 + tanh u) = x · s(2u) with u = √(2/π) (x + 0.044715 x³). Beyond ±10 s is 0 or 1.
struct GeluTanh {
    template <class F>
    static Curve<F> at(F x) {
        constexpr F k = F(1.5957691216057308), cubic = F(0.044715);
        F c = x < F(-10) ? F(-10) : x;
        c = c > F(10) ? F(10) : c;
        return times_sigmoid(x, k * c * (F(1) + cubic * c * c), k * (F(1) + F(3) * cubic * c * c));
    }
};

// ½ erfc(|x| / √2), given exp(−x²/2). A polynomial in 1 / (1 + 0.27 |x|), which was fitted to a
// relative error of 2.4e-8 where the result is no denormal; vectorises.
inline float normal_tail(float x, float density) {
    const float t = 1.0f / (1.0f + 0.27f * std::fabs(x));
    float p = 0.0288269483f;
    p = p * t - 0.125809535f;
    p = p * t + 0.168331906f;
    p = p * t - 0.0674727112f;
    p = p * t + 0.106565855f;
    p = p * t + 0.0726152509f;
    p = p * t + 0.101657353f;
    p = p * t + 0.107565723f;
    p = p * t + 0.10771922f;
    return p * t * density;
}
inline double normal_tail(double x, double) {
    return 0.5 * std::erfc(std::fabs(x) * 0.7071067811865476);
}

// x · Φ(x) with the normal distribution's Φ.
struct Gelu {
    template <class F>
    static Curve<F> at(F x) {
        const F density = exponential(F(-0.5) * x * x), tail = normal_tail(x, density);
        const F below = x < F(0) ? tail : F(1) - tail;
        return {x * below, below + x * density * F(0.3989422804014327)};
    }
};

struct Relu {
    template <class F>
    static Curve<F> at(F x) { return {x < F(0) ? F(0) : x, x > F(0) ? F(1) : F(0)}; }
};

struct ReluSquared {
    template <class F>
    static Curve<F> at(F x) {
        const F y = x < F(0) ? F(0) : x;
        return {y * y, y + y};
    }
};

}  // namespace
