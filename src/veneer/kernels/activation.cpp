// An activation, alone or as a gate, forward and backward, each in one pass over memory. Which one is
// said by the macro ACTIVATION: each is a library of its own, compiled when a model needs it.

#include "curves.h"

namespace {

// A matrix whose rows may lie apart, as the columns of a wider one.
template <class T>
struct Rows {
    T* first;
    Size stride;
    T* operator[](Size row) const { return first + row * stride; }
};

// y = act(gate) · up, or act(gate).
template <class A, bool gated, class T>
void activate(Rows<const T> gate, Rows<const T> up, T* y, Size rows, Size cols) {
#pragma omp parallel for schedule(static) if (rows * cols > kWorthSharing)
    for (Size row = 0; row < rows; ++row) {
        const T *g = gate[row], *u = gated ? up[row] : nullptr;
        T* out = y + row * cols;
#pragma omp simd
        for (Size i = 0; i < cols; ++i) {
            const auto value = A::at(load(g[i])).y;
            out[i] = store<T>(gated ? value * load(u[i]) : value);
        }
    }
}

template <class A, bool gated, class T>
void activate_backward(Rows<const T> dy, Rows<const T> gate, Rows<const T> up, Rows<T> d_gate,
                       Rows<T> d_up, T* y, Size rows, Size cols) {
    using F = Wide<T>;
#pragma omp parallel for schedule(static) if (rows * cols > kWorthSharing)
    for (Size row = 0; row < rows; ++row) {
        const T *d = dy[row], *g = gate[row], *u = gated ? up[row] : nullptr;
        T *dg = d_gate[row], *du = gated ? d_up[row] : nullptr, *out = y + row * cols;
#pragma omp simd
        for (Size i = 0; i < cols; ++i) {
            const Curve<F> at = A::at(load(g[i]));
            const F by = load(d[i]), factor = gated ? load(u[i]) : F(1);
            dg[i] = store<T>(by * factor * at.slope);
            if constexpr (gated) du[i] = store<T>(by * at.y);
            out[i] = store<T>(at.y * factor);
        }
    }
}

// activate_backward of a gate, and gain_backward of both its inputs. Both biases have to be there:
// loads that are left out for a null pointer made the loop ten times slower.
template <class A, class T>
void activate_gain_backward(Rows<const T> dy, Rows<const T> gate, Rows<const T> up,
                            const Wide<T>* gate_gain, const Wide<T>* up_gain, const T* gate_bias,
                            const T* up_bias, Rows<T> d_gate, Rows<T> d_up, T* y,
                            Wide<T>* gate_sums, Wide<T>* up_sums, Size rows, Size cols, Size block) {
    using F = Wide<T>;
#pragma omp parallel for schedule(static) if (rows * cols > kWorthSharing)
    for (Size first = 0; first < rows; first += block) {
        const Size last = first + block < rows ? first + block : rows;
        F *gate_sum = gate_sums + first / block * cols, *up_sum = up_sums + first / block * cols;
        for (Size i = 0; i < cols; ++i) gate_sum[i] = up_sum[i] = 0;
        for (Size row = first; row < last; ++row) {
            const T *d = dy[row], *g = gate[row], *u = up[row];
            T *out_gate = d_gate[row], *out_up = d_up[row], *out = y + row * cols;
#pragma omp simd
            for (Size i = 0; i < cols; ++i) {
                const F z_gate = load(g[i]), z_up = load(u[i]), by = load(d[i]);
                const Curve<F> at = A::at(z_gate);
                const F dg = by * z_up * at.slope, du = by * at.y;
                gate_sum[i] += dg * (z_gate - load(gate_bias[i]));
                up_sum[i] += du * (z_up - load(up_bias[i]));
                out_gate[i] = store<T>(gate_gain[i] * dg);
                out_up[i] = store<T>(up_gain[i] * du);
                out[i] = store<T>(at.y * z_up);
            }
        }
    }
}

}  // namespace

#define EXPORTED(name, T)                                                                          \
    extern "C" void activate_##name(const T* gate, Size gate_stride, const T* up, Size up_stride,  \
                                    T* y, Size rows, Size cols) {                                  \
        const Rows<const T> g{gate, gate_stride}, u{up, up_stride};                                \
        up ? activate<ACTIVATION, true>(g, u, y, rows, cols)                                       \
           : activate<ACTIVATION, false>(g, u, y, rows, cols);                                     \
    }                                                                                              \
    extern "C" void activate_backward_##name(                                                      \
        const T* dy, Size dy_stride, const T* gate, Size gate_stride, const T* up, Size up_stride, \
        T* d_gate, Size d_gate_stride, T* d_up, Size d_up_stride, T* y, Size rows, Size cols) {    \
        const Rows<const T> d{dy, dy_stride}, g{gate, gate_stride}, u{up, up_stride};              \
        const Rows<T> dg{d_gate, d_gate_stride}, du{d_up, d_up_stride};                            \
        up ? activate_backward<ACTIVATION, true>(d, g, u, dg, du, y, rows, cols)                   \
           : activate_backward<ACTIVATION, false>(d, g, u, dg, du, y, rows, cols);                 \
    }                                                                                              \
    extern "C" void activate_gain_backward_##name(                                                 \
        const T* dy, Size dy_stride, const T* gate, Size gate_stride, const T* up, Size up_stride, \
        const Wide<T>* gate_gain, const Wide<T>* up_gain, const T* gate_bias, const T* up_bias,    \
        T* d_gate, Size d_gate_stride, T* d_up, Size d_up_stride, T* y, Wide<T>* gate_sums,        \
        Wide<T>* up_sums, Size rows, Size cols, Size block) {                                      \
        activate_gain_backward<ACTIVATION, T>(                                                     \
            {dy, dy_stride}, {gate, gate_stride}, {up, up_stride}, gate_gain, up_gain, gate_bias,  \
            up_bias, {d_gate, d_gate_stride}, {d_up, d_up_stride}, y, gate_sums, up_sums, rows,    \
            cols, block);                                                                          \
    }

FOR_EACH_DTYPE(EXPORTED)
