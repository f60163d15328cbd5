// RMSNorm and LayerNorm, forward and backward, each in one pass over memory.

#pragma once

#include "lanes.h"

namespace {

// Rows whose sums are taken before any is used, so that none waits for another's; long ones would
// not stay in the cache for it.
constexpr Size kRows = 4;
inline Size rows_together(Size cols) { return cols > 512 ? 1 : kRows; }

// y = (offset + w) · x̂ + b with x̂ = (x − mean) / σ, and each row's mean and 1 / σ.
template <bool weighted, bool biased, bool centred, bool rounds, class T>
void norm(const T* x, const T* w, const T* b, Wide<T> offset, Wide<T> eps, T* y, Wide<T>* statistics,
          Size rows, Size cols) {
    using F = Wide<T>;
    const Size step = rows_together(cols);
#pragma omp parallel for schedule(static) if (rows * cols > kWorthSharing)
    for (Size first = 0; first < rows; first += step) {
        const Size last = first + step < rows ? first + step : rows;
        for (Size row = first; row < last; ++row) {
            const T* a = x + row * cols;
            F mean = 0;
            if constexpr (centred) mean = sum_of<F>(cols, [=](auto at) { return at.read(a); }) / F(cols);
            const F squares = sum_of<F>(cols, [=](auto at) {
                const auto d = centred ? at.read(a) - mean : at.read(a);
                return d * d;
            });
            statistics[2 * row] = mean;
            statistics[2 * row + 1] = F(1) / std::sqrt(squares / F(cols) + eps);
        }
        for (Size row = first; row < last; ++row) {
            const T* a = x + row * cols;
            T* out = y + row * cols;
            const F mean = centred ? statistics[2 * row] : F(0), r = statistics[2 * row + 1];
#pragma omp simd
            for (Size i = 0; i < cols; ++i) {
                F value = (load(a[i]) - mean) * r;
                if constexpr (rounds) value = load(store<T>(value));
                if constexpr (weighted) value *= offset + load(w[i]);
                if constexpr (biased) value += load(b[i]);
                out[i] = store<T>(value);
            }
        }
    }
}

// dx = residual + (g − x̂ · mean(g · x̂) − mean(g)) / σ with g = dy · (offset + w); the last mean only
// where the norm is centred.
template <bool weighted, bool centred, bool adds, class T>
void norm_backward(const T* dy, const T* x, const T* w, const Wide<T>* statistics, const T* residual,
                   Wide<T> offset, T* dx, Size rows, Size cols) {
    using F = Wide<T>;
    const Size step = rows_together(cols);
#pragma omp parallel for schedule(static) if (rows * cols > kWorthSharing)
    for (Size first = 0; first < rows; first += step) {
        const Size last = first + step < rows ? first + step : rows;
        F along[kRows], mean_g[kRows];  // mean(g · x̂) / σ and mean(g)
        for (Size row = first; row < last; ++row) {
            const T *d = dy + row * cols, *a = x + row * cols;
            const F mean = statistics[2 * row], r = statistics[2 * row + 1];
            const auto g = [=](auto at) {
                if constexpr (weighted) return at.read(d) * (offset + at.read(w));
                else return at.read(d);
            };
            const F dot = sum_of<F>(cols, [=](auto at) {
                return g(at) * (centred ? at.read(a) - mean : at.read(a));
            });
            along[row - first] = dot * r * r / F(cols);
            mean_g[row - first] = centred ? sum_of<F>(cols, g) / F(cols) : F(0);
        }
        for (Size row = first; row < last; ++row) {
            const T *d = dy + row * cols, *a = x + row * cols, *res = residual + row * cols;
            T* out = dx + row * cols;
            const F mean = centred ? statistics[2 * row] : F(0), r = statistics[2 * row + 1];
            const F by = along[row - first], less = mean_g[row - first];
#pragma omp simd
            for (Size i = 0; i < cols; ++i) {
                F value = load(d[i]);
                if constexpr (weighted) value *= offset + load(w[i]);
                if constexpr (centred) value -= less;
                value = r * (value - (load(a[i]) - mean) * by);
                if constexpr (adds) value += load(res[i]);
                out[i] = store<T>(value);
            }
        }
    }
}

}  // namespace

#define EXPORT_NORM(name, T)                                                                       \
    extern "C" void norm_##name(const T* x, const T* w, const T* b, double offset, double eps,     \
                                Size centred, Size rounds, T* y, Wide<T>* statistics, Size rows,   \
                                Size cols) {                                                       \
        with_flags(                                                                                \
            [=]<bool weighted, bool biased, bool c, bool r>() {                                    \
                norm<weighted, biased, c, r>(x, w, b, Wide<T>(offset), Wide<T>(eps), y,            \
                                             statistics, rows, cols);                              \
            },                                                                                     \
            w != nullptr, b != nullptr, centred != 0, rounds != 0);                                \
    }                                                                                              \
    extern "C" void norm_backward_##name(const T* dy, const T* x, const T* w,                      \
                                         const Wide<T>* statistics, const T* residual,             \
                                         double offset, Size centred, T* dx, Size rows,            \
                                         Size cols) {                                              \
        with_flags(                                                                                \
            [=]<bool weighted, bool c, bool adds>() {                                              \
                norm_backward<weighted, c, adds>(dy, x, w, statistics, residual, Wide<T>(offset),  \
                                                 dx, rows, cols);                                  \
            },                                                                                     \
            w != nullptr, centred != 0, residual != nullptr);                                      \
    }

FOR_EACH_DTYPE(EXPORT_NORM)
