// Rotary position embedding.

#pragma once

#include "numbers.h"

namespace {

// (a, b) → (a cos − b sin, b cos + a sin) for the pairs of each head's first dimensions; the others
// are copied. Strides are those of x; `out` is contiguous, and may be x where x is too.
template <bool interleaved, class T>
void rotate(const T* x, Size token_stride, Size head_stride, const T* cos, const T* sin,
            Wide<T> sign, T* out, Size tokens, Size heads, Size dim, Size pairs) {
    using F = Wide<T>;
#pragma omp parallel for schedule(static) if (tokens * heads * dim > kWorthSharing)
    for (Size t = 0; t < tokens; ++t) {
        const T *c = cos + t * pairs, *s = sin + t * pairs;
        for (Size h = 0; h < heads; ++h) {
            const T* a = x + t * token_stride + h * head_stride;
            T* y = out + (t * heads + h) * dim;
#pragma omp simd
            for (Size i = 0; i < pairs; ++i) {
                const Size first = interleaved ? 2 * i : i, second = interleaved ? first + 1 : i + pairs;
                const F x1 = load(a[first]), x2 = load(a[second]);
                const F ci = load(c[i]), si = sign * load(s[i]);
                y[first] = store<T>(x1 * ci - x2 * si);
                y[second] = store<T>(x2 * ci + x1 * si);
            }
            if (y != a)
                for (Size i = 2 * pairs; i < dim; ++i) y[i] = a[i];
        }
    }
}

}  // namespace

#define EXPORT_ROTARY(name, T)                                                                     \
    extern "C" void rotate_##name(const T* x, Size token_stride, Size head_stride, const T* cos,   \
                                  const T* sin, double sign, Size interleaved, T* out,             \
                                  Size tokens, Size heads, Size dim, Size pairs) {                 \
        with_flags(                                                                                \
            [=]<bool adjacent>() {                                                                 \
                rotate<adjacent>(x, token_stride, head_stride, cos, sin, Wide<T>(sign), out,       \
                                 tokens, heads, dim, pairs);                                       \
            },                                                                                     \
            interleaved != 0);                                                                     \
    }

FOR_EACH_DTYPE(EXPORT_ROTARY)
