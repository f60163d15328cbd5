// The elementwise operations of a training step, each in one pass over memory.
//
// Compiled for this very processor when first needed (native.py) and called through ctypes; tests
// compare each with the formula in torch beside its caller. Rows are divided among OpenMP's threads,
// one thread for each row, so that results do not depend on the number of threads. Numbers are
// stored as bfloat16, float32 or float64 and computed in float32 (or float64).

#include "attention.h"
#include "cross_entropy.h"
#include "dropout.h"
#include "low_rank.h"
#include "norm.h"
#include "numbers.h"
#include "rotary.h"
#include "segments.h"

namespace {

// out = Σ a · b over each row.
template <class T>
void row_dots(const T* a, const T* b, Wide<T>* out, Size rows, Size cols) {
    using F = Wide<T>;
#pragma omp parallel for schedule(static) if (rows * cols > kWorthSharing)
    for (Size row = 0; row < rows; ++row) {
        const T *x = a + row * cols, *y = b + row * cols;
        F dot = 0;
#pragma omp simd reduction(+ : dot)
        for (Size i = 0; i < cols; ++i) dot += load(x[i]) * load(y[i]);
        out[row] = dot;
    }
}

// out = Σ w · row over the k rows at the places of each row of `out`.
template <class T>
void weighted_sums(const T* rows, const Size* places, const Wide<T>* weights, T* out, Size count,
                   Size k, Size cols) {
    using F = Wide<T>;
    constexpr Size kColumns = 512;
#pragma omp parallel for schedule(static) if (count * k * cols > kWorthSharing)
    for (Size n = 0; n < count; ++n) {
        for (Size first = 0; first < cols; first += kColumns) {
            const Size width = cols - first < kColumns ? cols - first : kColumns;
            F sums[kColumns];
            for (Size i = 0; i < width; ++i) sums[i] = 0;
            for (Size j = 0; j < k; ++j) {
                const T* row = rows + places[n * k + j] * cols + first;
                const F weight = weights[n * k + j];
#pragma omp simd
                for (Size i = 0; i < width; ++i) sums[i] += weight * load(row[i]);
            }
            T* y = out + n * cols + first;
#pragma omp simd
            for (Size i = 0; i < width; ++i) y[i] = store<T>(sums[i]);
        }
    }
}

// The length of each row w + s b A, or 1 for 0, from ‖w‖², w Aᵀ and A Aᵀ.
template <class T>
void updated_norms(const Wide<T>* squares, const T* products, const Wide<T>* gram,
                   const Wide<T>* factor, double scaling, Wide<T>* norms, Size rows, Size rank) {
    using F = Wide<T>;
    const F s = F(scaling);
#pragma omp parallel for schedule(static) if (rows * rank * rank > kWorthSharing)
    for (Size row = 0; row < rows; ++row) {
        const T* p = products + row * rank;
        const F* b = factor + row * rank;
        F sum = 0;
        for (Size i = 0; i < rank; ++i) {
            F dot = 0;
#pragma omp simd reduction(+ : dot)
            for (Size j = 0; j < rank; ++j) dot += gram[i * rank + j] * b[j];
            sum += b[i] * (F(2) * load(p[i]) + s * dot);
        }
        const F square = squares[row] + s * sum;
        norms[row] = square > 0 ? std::sqrt(square) : F(1);
    }
}

// z = gain · (z − bias) + bias, column by column, exactly z where the gain is 1.
template <class T>
void apply_gain(T* z, const Wide<T>* gain, const T* bias, Size rows, Size cols) {
#pragma omp parallel for schedule(static) if (rows * cols > kWorthSharing)
    for (Size row = 0; row < rows; ++row) {
        T* y = z + row * cols;
        if (bias) {
#pragma omp simd
            for (Size i = 0; i < cols; ++i) y[i] = store<T>(gain[i] * load(y[i]) + load(bias[i]) * (1 - gain[i]));
        } else {
#pragma omp simd
            for (Size i = 0; i < cols; ++i) y[i] = store<T>(gain[i] * load(y[i]));
        }
    }
}

// dz = gain · dy, which may be written over dy, and Σ dy · (y − bias) over each block of rows, as a
// row of `sums`. The blocks do not depend on the number of threads, so neither does their sum.
template <class T>
void gain_backward(const T* dy, const T* y, const Wide<T>* gain, const T* bias, T* dz,
                   Wide<T>* sums, Size rows, Size cols, Size block) {
    using F = Wide<T>;
#pragma omp parallel for schedule(static) if (rows * cols > kWorthSharing)
    for (Size first = 0; first < rows; first += block) {
        const Size last = first + block < rows ? first + block : rows;
        F* sum = sums + first / block * cols;
        for (Size i = 0; i < cols; ++i) sum[i] = 0;
        for (Size row = first; row < last; ++row) {
            const T *d = dy + row * cols, *z = y + row * cols;
            T* out = dz + row * cols;
#pragma omp simd
            for (Size i = 0; i < cols; ++i) {
                const F one = load(d[i]);
                sum[i] += one * (load(z[i]) - (bias ? load(bias[i]) : F(0)));
                out[i] = store<T>(gain[i] * one);
            }
        }
    }
}

// Blocks of numbers as 4-bit codes: the largest magnitude of each block, and for each number, divided
// by it, how many of the `bounds` lie below. Two codes in a byte, the first in the high half. A last
// block that is not full and a last byte that is half empty are written as bitsandbytes does.
template <class T>
void quantize_4bit(const T* x, const float* bounds, float* absmax, std::uint8_t* codes, Size numbers,
                   Size block) {
    constexpr float kLeast = 1e-38f;
    constexpr Size kBounds = 15, kMost = 4096;
    const Size blocks = (numbers + block - 1) / block;
#pragma omp parallel for schedule(static) if (numbers > kWorthSharing)
    for (Size b = 0; b < blocks; ++b) {
        const Size first = b * block, rest = numbers - first, n = rest < block ? rest : block;
        const T* a = x + first;
        float highest = 0;
#pragma omp simd reduction(max : highest)
        for (Size i = 0; i < n; ++i) {
            const float magnitude = std::fabs(float(load(a[i])));
            highest = magnitude > highest ? magnitude : highest;
        }
        const float divisor = highest < kLeast ? kLeast : highest, inverse = 1.0f / divisor;
        absmax[b] = n < block ? divisor : highest;
        std::int32_t levels[kMost + 1];
        levels[n] = 7;  // the code of zero, for the half that may be empty
#pragma omp simd
        for (Size i = 0; i < n; ++i) {
            const float value = float(load(a[i]));
            const float scaled = n < block ? value / divisor : value * inverse;
            std::int32_t code = 0;
            for (Size j = 0; j < kBounds; ++j) code += scaled > bounds[j];
            levels[i] = code;
        }
        for (Size i = 0; i < n; i += 2)
            codes[(first + i) / 2] = std::uint8_t(levels[i] << 4 | levels[i + 1]);
    }
}

// w = code · absmax / 127 with each row's absmax, in float32 until it is stored.
template <class T>
void dequantize_int8(const std::int8_t* codes, const float* absmax, T* w, Size rows, Size cols) {
#pragma omp parallel for schedule(static) if (rows * cols > kWorthSharing)
    for (Size row = 0; row < rows; ++row) {
        const std::int8_t* a = codes + row * cols;
        T* y = w + row * cols;
        const float scale = absmax[row];
#pragma omp simd
        for (Size i = 0; i < cols; ++i) y[i] = store<T>(float(a[i]) * scale * 7.874015718698502e-3f);
    }
}

}  // namespace

#define EXPORTED(name, T)                                                                          \
    extern "C" void cross_entropy_##name(const T* z, const Size* targets, Wide<T>* losses,         \
                                         T* gradient, double scale, double cap, Size rows,         \
                                         Size vocab) {                                             \
        cross_entropy(z, targets, losses, gradient, scale, cap, rows, vocab);                      \
    }                                                                                              \
    extern "C" void row_dots_##name(const T* a, const T* b, Wide<T>* out, Size rows, Size cols) {  \
        row_dots(a, b, out, rows, cols);                                                           \
    }                                                                                              \
    extern "C" void weighted_sums_##name(const T* rows, const Size* places,                        \
                                         const Wide<T>* weights, T* out, Size count, Size k,       \
                                         Size cols) {                                              \
        weighted_sums(rows, places, weights, out, count, k, cols);                                 \
    }                                                                                              \
    extern "C" void updated_norms_##name(                                                          \
        const Wide<T>* squares, const T* products, const Wide<T>* gram, const Wide<T>* factor,     \
        double scaling, Wide<T>* norms, Size rows, Size rank) {                                    \
        updated_norms<T>(squares, products, gram, factor, scaling, norms, rows, rank);             \
    }                                                                                              \
    extern "C" void apply_gain_##name(T* z, const Wide<T>* gain, const T* bias, Size rows,         \
                                      Size cols) {                                                 \
        apply_gain(z, gain, bias, rows, cols);                                                     \
    }                                                                                              \
    extern "C" void gain_backward_##name(const T* dy, const T* y, const Wide<T>* gain,             \
                                         const T* bias, T* dz, Wide<T>* sums, Size rows,           \
                                         Size cols, Size block) {                                  \
        gain_backward(dy, y, gain, bias, dz, sums, rows, cols, block);                             \
    }                                                                                              \
    extern "C" void quantize_4bit_##name(const T* x, const float* bounds, float* absmax,           \
                                         std::uint8_t* codes, Size numbers, Size block) {          \
        quantize_4bit(x, bounds, absmax, codes, numbers, block);                                   \
    }                                                                                              \
    extern "C" void dequantize_int8_##name(const std::int8_t* codes, const float* absmax, T* w,    \
                                           Size rows, Size cols) {                                 \
        dequantize_int8(codes, absmax, w, rows, cols);                                             \
    }

FOR_EACH_DTYPE(EXPORTED)
FOR_EACH_DTYPE(EXPORTED_ATTENTION)
FOR_EACH_DTYPE(EXPORTED_LOW_RANK)
FOR_EACH_DTYPE(EXPORTED_SEGMENTS)
