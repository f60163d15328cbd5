// The cross-entropy of logits that a model scales or caps, and its gradient, a row at a time.

#pragma once

#include "numbers.h"

namespace {

// A logit y = scale · z, or cap · tanh(scale · z / cap), and dy/dz.
template <class F>
struct Scaled {
    F scale;
    F logit(F z) const { return scale * z; }
    F slope(F) const { return scale; }
};

template <class F>
struct Capped {
    F scale, cap, inner = scale / cap, inverse = F(1) / cap;
    F logit(F z) const { return cap * hyperbolic_tangent(inner * z); }
    F slope(F y) const { return scale * (F(1) - (y * inverse) * (y * inverse)); }
};

// loss = log Σ exp(y) − y[target], y the logits made of z. Its gradient with respect to z,
// (softmax(y) − onehot(target)) · dy/dz, goes to `gradient`, which may be `z` itself, or is null.
template <class T, class Of>
void cross_entropy(Of of, const T* z, const Size* targets, Wide<T>* losses, T* gradient, Size rows,
                   Size vocab) {
    using F = Wide<T>;
#pragma omp parallel for schedule(static)
    for (Size row = 0; row < rows; ++row) {
        const T* a = z + row * vocab;
        F highest = load(a[0]);
#pragma omp simd reduction(max : highest)
        for (Size i = 0; i < vocab; ++i) highest = load(a[i]) > highest ? load(a[i]) : highest;
        highest = of.logit(highest);  // logits rise with z
        F sum = 0;
#pragma omp simd reduction(+ : sum)
        for (Size i = 0; i < vocab; ++i) sum += exponential(of.logit(load(a[i])) - highest);
        const Size target = targets[row];
        const F log_sum = highest + std::log(sum), hit = of.logit(load(a[target]));
        losses[row] = log_sum - hit;
        if (!gradient) continue;
        T* d = gradient + row * vocab;
#pragma omp simd
        for (Size i = 0; i < vocab; ++i) {
            const F y = of.logit(load(a[i]));
            d[i] = store<T>(exponential(y - log_sum) * of.slope(y));
        }
        d[target] = store<T>((std::exp(hit - log_sum) - F(1)) * of.slope(hit));
    }
}

// cap 0: no cap.
template <class T>
void cross_entropy(const T* z, const Size* targets, Wide<T>* losses, T* gradient, double scale,
                   double cap, Size rows, Size vocab) {
    using F = Wide<T>;
    if (cap)
        cross_entropy(Capped<F>{F(scale), F(cap)}, z, targets, losses, gradient, rows, vocab);
    else
        cross_entropy(Scaled<F>{F(scale)}, z, targets, losses, gradient, rows, vocab);
}

}  // namespace
