// RMSNorm and LayerNorm, forward and backward, each in one pass over memory.

#pragma once

#include "lanes.h"

namespace {

// Rows whose sums are taken before any is used, so that none waits for another's; long ones would
// not stay in the cache for it.
constexpr Size kRows = 4;
inline Size rows_together(Size cols) { return cols > 512 ? 1 : kRows; }

// y = (offset + w) · x̂ + b with x̂ = (x − mean) / σ, and each row's mean and 1 / σ.
template <bool centred, bool biased, bool rounds, class T>
void norm(const T* x, const T* w, const T* b, Wide<T> offset, Wide<T> eps, T* y, Wide<T>* statistics,
          Size rows, Size cols) {
    using F = Wide<T>;
    const Size step = rows_together(cols);
#pragma omp parallel for schedule(static) if (rows * cols > kWorthSharing)
    for (Size first = 0; first < rows; first += step) {
        const Size last = first + step < rows ? first + step : rows;
        for (Size row = first; row < last; ++row)
            statistics_of<centred>(x + row * cols, eps, statistics + 2 * row, cols);
        for (Size row = first; row < last; ++row) {
            const T* a = x + row * cols;
            T* out = y + row * cols;
            const F mean = statistics[2 * row], r = statistics[2 * row + 1];
#pragma omp simd
            for (Size i = 0; i < cols; ++i) {
                F hat = (load(a[i]) - mean) * r;
                if constexpr (rounds) hat = load(store<T>(hat));
                out[i] = store<T>((offset + load(w[i])) * hat + (biased ? load(b[i]) : F(0)));
            }
        }
    }
}

// Σ g · (x − mean), and Σ g where the norm is centred, of a row with g = dy · (offset + w).
template <bool centred, class T>
void gradient_sums(const T* dy, const T* x, const T* w, Wide<T> offset, Wide<T> mean, Wide<T>* sums,
                   Size cols) {
    using F = Wide<T>;
    const auto g = [=](auto at) { return at.read(dy) * (offset + at.read(w)); };
    sums[0] = sum_of<F>(cols, [=](auto at) { return g(at) * (at.read(x) - mean); });
    sums[1] = centred ? sum_of<F>(cols, g) : F(0);
}

// dx = residual + (g − x̂ · mean(g · x̂) − mean(g)) / σ; the last mean only where the norm is centred.
template <bool centred, bool adds, class T>
void norm_backward(const T* dy, const T* x, const T* w, const Wide<T>* statistics, const T* residual,
                   Wide<T> offset, T* dx, Size rows, Size cols) {
    using F = Wide<T>;
    const Size step = rows_together(cols);
#pragma omp parallel for schedule(static) if (rows * cols > kWorthSharing)
    for (Size first = 0; first < rows; first += step) {
        const Size last = first + step < rows ? first + step : rows;
        F sums[2 * kRows];
        for (Size row = first; row < last; ++row)
            gradient_sums<centred>(dy + row * cols, x + row * cols, w, offset, statistics[2 * row],
                                   sums + 2 * (row - first), cols);
        for (Size row = first; row < last; ++row) {
            const T *d = dy + row * cols, *a = x + row * cols, *res = residual + row * cols;
            T* out = dx + row * cols;
            const F mean = statistics[2 * row], r = statistics[2 * row + 1];
            const F along = sums[2 * (row - first)] * r * r / F(cols);
            const F mean_g = sums[2 * (row - first) + 1] / F(cols);
#pragma omp simd
            for (Size i = 0; i < cols; ++i) {
                const F g = load(d[i]) * (offset + load(w[i])) - mean_g;
                const F own = r * (g - (load(a[i]) - mean) * along);
                out[i] = store<T>(adds ? load(res[i]) + own : own);
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
            [=]<bool c, bool biased, bool r>() {                                                   \
                norm<c, biased, r>(x, w, b, Wide<T>(offset), Wide<T>(eps), y, statistics, rows,    \
                                   cols);                                                          \
            },                                                                                     \
            centred != 0, b != nullptr, rounds != 0);                                              \
    }                                                                                              \
    extern "C" void norm_backward_##name(const T* dy, const T* x, const T* w,                      \
                                         const Wide<T>* statistics, const T* residual,             \
                                         double offset, Size centred, T* dx, Size rows,            \
                                         Size cols) {                                              \
        with_flags(                                                                                \
            [=]<bool c, bool adds>() {                                                             \
                norm_backward<c, adds>(dy, x, w, statistics, residual, Wide<T>(offset), dx, rows,  \
                                       cols);                                                      \
            },                                                                                     \
            centred != 0, residual != nullptr);                                                    \
    }

FOR_EACH_DTYPE(EXPORT_NORM)
