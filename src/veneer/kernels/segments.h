// Low-rank products of segments: rows of one matrix, each run of which has factors of its own. All
// segments and projections of a group are one call, whose threads share blocks of rows or columns.
// Each number is one thread's sum, in float32 or wider, in an order that depends on no other segment.

#pragma once

#include <algorithm>
#include <vector>

#include "steps.h"

namespace {

// What one adapter adds to one projection on its rows, as `segments.py` writes it down. Updates of a
// segment follow each other. Sizes are in numbers. h (rows, h_stride) begins at `h` of the buffer of
// all, and of it `rank` columns are the update's own; gradients begin at dA and dB of theirs.
template <class T>
struct Update {
    Size first, rows, rank, in, out, projection, h, h_stride, dA, dB;
    const T *A, *B;  // (rank, in), (out, rank)
};

// A matrix whose rows may lie apart.
struct Place {
    Size address, stride;
    template <class T>
    T* row(Size n) const { return reinterpret_cast<T*>(address) + n * stride; }
};

constexpr Size kTile = 4;              // rows, and ranks, of which sums stay in registers
#if defined(__AVX512F__)
constexpr Size kAcross = 4;            // vectors of columns whose sums do so
#else
constexpr Size kAcross = 1;
#endif
constexpr Size kRowBlock = 32;         // rows of a thread's piece of work
constexpr Size kColumnBlock = 64;      // columns that are transposed at a time
constexpr Size kDepthBlock = 128;      // tokens of a gradient's sum at a time, which stay in the L1

// h = x Fᵀ for `rows` rows of x and `ranks` rows of F.
template <Size rows, Size ranks, class T>
inline void dots_of(const T* x, Size x_stride, const T* factors, T* h, Size h_stride, Size cols) {
    using F = Wide<T>;
    using S = Steps<T>;
    Vector<F> sums[rows][ranks] = {};
    Size i = 0;
    for (; i + S::kColumns <= cols; i += S::kColumns)
        for (Size n = 0; n < rows; ++n)
            for (Size r = 0; r < ranks; ++r) S::dot(sums[n][r], x + n * x_stride + i, factors + r * cols + i);
    F dots[rows][ranks];
    added_up<F>(&sums[0][0], &dots[0][0], rows * ranks);
    for (Size n = 0; n < rows; ++n)
        for (Size r = 0; r < ranks; ++r) {
            F sum = dots[n][r];
            for (Size j = i; j < cols; ++j) sum += load(x[n * x_stride + j]) * load(factors[r * cols + j]);
            h[n * h_stride + r] = store<T>(sum);
        }
}

template <Size rows, class T>
inline void dots_of_all(const T* x, Size x_stride, const T* factors, T* h, Size h_stride, Size rank,
                        Size cols) {
    Size r = 0;
    for (; r + kTile <= rank; r += kTile)
        dots_of<rows, kTile>(x, x_stride, factors + r * cols, h + r, h_stride, cols);
    for (; r < rank; ++r) dots_of<rows, 1>(x, x_stride, factors + r * cols, h + r, h_stride, cols);
}

// Σ scale · line over `depth` steps, for `rows` rows of scales and `width` vectors of columns.
template <Size rows, Size width, class T>
inline void sums_of(const typename Steps<T>::Line* scales, Size scales_stride,
                    const typename Steps<T>::Line* lines, Size lines_stride, Size depth,
                    Vector<Wide<T>> (&sums)[rows][width]) {
    using S = Steps<T>;
    for (Size d = 0; d < depth; ++d)
        for (Size n = 0; n < rows; ++n) {
            const auto scale = S::spread(scales[n * scales_stride + d]);
            for (Size w = 0; w < width; ++w)
                S::add(sums[n][w], scale, lines + d * lines_stride + w * kLanes<T>);
        }
}

inline Size steps(Size count, Size deep) { return (count + deep - 1) / deep; }

// The columns from `first` on of `depth` rows of a matrix, as lines of `width` columns; what is
// beyond stays as it is.
template <class T>
void lines_of(const T* x, Size stride, Size depth, Size first, Size cols, Size width,
              typename Steps<T>::Line* lines) {
    using S = Steps<T>;
    const Size there = std::min(width, cols - first);
    for (Size d = 0; d < depth; d += S::kDeep, lines += width) {
        const T* row = x + d * stride + first;
        if (depth - d >= S::kDeep) {
#pragma omp simd
            for (Size i = 0; i < there; ++i) lines[i] = S::line(row + i, stride, S::kDeep);
        } else {
            for (Size i = 0; i < there; ++i) lines[i] = S::line(row + i, stride, 1);
        }
    }
}

// The same for the transpose of a matrix (cols, depth).
template <class T>
void lines_of_transposed(const T* x, Size depth, Size cols, Size width, typename Steps<T>::Line* lines) {
    using S = Steps<T>;
    for (Size first = 0; first < width; first += kColumnBlock)
        for (Size d = 0; d < depth; d += S::kDeep) {
            const T* value = x + d;
            auto* out = lines + d / S::kDeep * width;
            const Size end = std::min(first + kColumnBlock, width);
            for (Size i = first; i < end; ++i)
                out[i] = i < cols ? S::line(value + i * depth, 1, depth - d) : typename S::Line{};
        }
}

// Updates that follow each other and are added up in the same rows: those of a segment.
template <class T>
std::vector<Size> chains(const Update<T>* updates, Size count, bool added_up) {
    std::vector<Size> firsts;
    for (Size u = 0; u < count; ++u)
        if (!u || !added_up || updates[u].first != updates[u - 1].first) firsts.push_back(u);
    firsts.push_back(count);
    return firsts;
}

struct Work { Size chain, first, last; };

// h = x Aᵀ of each update, or dh = dz B; sources: where each projection reads.
template <class T>
void segments_down(const Update<T>* updates, Size count, Size by_A, const Place* sources, T* h) {
    std::vector<Work> work;
    std::vector<std::vector<T>> transposed(static_cast<std::size_t>(count));
    Size size = 0;
    for (Size u = 0; u < count; ++u) {
        const Update<T>& own = updates[u];
        for (Size n = 0; n < own.rows; n += kRowBlock)
            work.push_back({u, n, std::min(n + kRowBlock, own.rows)});
        size += own.rows * own.rank * (by_A ? own.in : own.out);
    }
#pragma omp parallel if (size > kWorthSharing)
    {
        if (!by_A) {
#pragma omp for schedule(dynamic)
            for (Size u = 0; u < count; ++u) {
                const Update<T>& own = updates[u];
                transposed[u].resize(std::size_t(own.rank * own.out));
                for (Size first = 0; first < own.out; first += kColumnBlock)
                    for (Size r = 0; r < own.rank; ++r)
                        for (Size i = first; i < std::min(first + kColumnBlock, own.out); ++i)
                            transposed[u][r * own.out + i] = own.B[i * own.rank + r];
            }
        }
#pragma omp for schedule(dynamic)
        for (Size piece = 0; piece < Size(work.size()); ++piece) {
            const Update<T>& own = updates[work[piece].chain];
            const Place& source = sources[own.projection];
            const T* factors = by_A ? own.A : transposed[work[piece].chain].data();
            const Size cols = by_A ? own.in : own.out;
            Size n = work[piece].first;
            for (; n + kTile <= work[piece].last; n += kTile)
                dots_of_all<kTile>(source.row<const T>(own.first + n), source.stride, factors,
                                   h + own.h + n * own.h_stride, own.h_stride, own.rank, cols);
            for (; n < work[piece].last; ++n)
                dots_of_all<1>(source.row<const T>(own.first + n), source.stride, factors,
                               h + own.h + n * own.h_stride, own.h_stride, own.rank, cols);
        }
    }
}

// Some rows and a tile of columns of y += Σ scale · line.
template <Size rows, Size width, class T>
inline void add_tile(const typename Steps<T>::Line* scales, Size depth,
                     const typename Steps<T>::Line* lines, Size lines_stride, T* y, Size y_stride,
                     Size cols) {
    using F = Wide<T>;
    constexpr Size kL = kLanes<T>;
    Vector<F> sums[rows][width] = {};
    sums_of<rows, width, T>(scales, depth, lines, lines_stride, depth, sums);
    for (Size n = 0; n < rows; ++n) {
        T* out = y + n * y_stride;
        F added[width * kL];
        std::memcpy(added, sums[n], sizeof added);
        if (cols >= width * kL) {
#pragma omp simd
            for (Size i = 0; i < width * kL; ++i) out[i] = store<T>(load(out[i]) + added[i]);
        } else {
            for (Size i = 0; i < cols; ++i) out[i] = store<T>(load(out[i]) + added[i]);
        }
    }
}

template <Size rows, class T>
inline void add_columns(const typename Steps<T>::Line* scales, Size depth,
                        const typename Steps<T>::Line* lines, Size lines_stride, T* y,
                        Size y_stride, Size cols) {
    constexpr Size kL = kLanes<T>;
    if (cols >= kAcross * kL) {
        add_tile<rows, kAcross>(scales, depth, lines, lines_stride, y, y_stride, cols);
        return;
    }
    for (Size first = 0; first < cols; first += kL)
        add_tile<rows, 1>(scales, depth, lines + first, lines_stride, y + first, y_stride, cols - first);
}

// y += h Bᵀ of each update, or dx += Σ dh A of each segment; targets: where each projection adds.
template <class T>
void segments_up(const Update<T>* updates, Size count, Size by_A, const T* h, const Place* targets) {
    using S = Steps<T>;
    constexpr Size kWidth = kAcross * kLanes<T>;
    const auto firsts = chains(updates, count, by_A);
    const Size chain_count = Size(firsts.size()) - 1;
    std::vector<Work> work;
    std::vector<Size> depths(static_cast<std::size_t>(chain_count)), strides(depths);
    std::vector<std::vector<typename S::Line>> lines(static_cast<std::size_t>(chain_count));
    Size size = 0;
    for (Size c = 0; c < chain_count; ++c) {
        const Update<T>& own = updates[firsts[c]];
        for (Size u = firsts[c]; u < firsts[c + 1]; ++u) depths[c] += steps(updates[u].rank, S::kDeep);
        const Size cols = by_A ? own.in : own.out;
        strides[c] = steps(cols, kLanes<T>) * kLanes<T>;
        for (Size n = 0; n < own.rows; n += kRowBlock)
            work.push_back({c, n, std::min(n + kRowBlock, own.rows)});
        size += own.rows * depths[c] * cols;
    }
#pragma omp parallel if (size > kWorthSharing)
    {
#pragma omp for schedule(dynamic)
        for (Size c = 0; c < chain_count; ++c) {
            lines[c].resize(std::size_t(depths[c] * strides[c]));
            auto* out = lines[c].data();
            for (Size u = firsts[c]; u < firsts[c + 1]; ++u) {
                const Update<T>& own = updates[u];
                if (by_A) lines_of(own.A, own.in, own.rank, 0, own.in, strides[c], out);
                else lines_of_transposed(own.B, own.rank, own.out, strides[c], out);
                out += steps(own.rank, S::kDeep) * strides[c];
            }
        }
        std::vector<typename S::Line> scales;
#pragma omp for schedule(dynamic)
        for (Size piece = 0; piece < Size(work.size()); ++piece) {
            // By names of their own: Clang 15 captures no structured bindings.
            const Size c = work[piece].chain, first = work[piece].first, last = work[piece].last;
            const Size depth = depths[c];
            scales.resize(std::size_t(kRowBlock * depth));
            for (Size n = first; n < last; ++n) {
                auto* out = scales.data() + (n - first) * depth;
                for (Size u = firsts[c]; u < firsts[c + 1]; ++u) {
                    const Update<T>& own = updates[u];
                    const T* row = h + own.h + n * own.h_stride;
                    for (Size r = 0; r < own.rank; r += S::kDeep) *out++ = S::line(row + r, 1, own.rank - r);
                }
            }
            const Update<T>& own = updates[firsts[c]];
            const Place& target = targets[own.projection];
            const Size cols = by_A ? own.in : own.out;
            const auto add = [&]<Size rows>(Size n) {
                T* y = target.row<T>(own.first + n);
                for (Size column = 0; column < cols; column += kWidth)
                    add_columns<rows>(scales.data() + (n - first) * depth, depth,
                                      lines[c].data() + column, strides[c], y + column,
                                      target.stride, std::min(kWidth, cols - column));
            };
            Size n = first;
            for (; n + kTile <= last; n += kTile) add.template operator()<kTile>(n);
            for (; n < last; ++n) add.template operator()<1>(n);
        }
    }
}

// dA = dhᵀ x of each update, or dB = factor · dzᵀ h, in `gradients`; sources: where each projection
// reads x or dz.
template <class T>
void segments_gradient(const Update<T>* updates, Size count, Size of_A, const T* h,
                       const Place* sources, const Wide<T>* factors, Wide<T>* gradients) {
    using S = Steps<T>;
    using F = Wide<T>;
    using Line = typename S::Line;
    constexpr Size kWidth = kAcross * kLanes<T>;
    std::vector<Work> work;
    std::vector<std::vector<Line>> scales(static_cast<std::size_t>(count));  // hᵀ (rank, steps)
    Size size = 0;
    for (Size u = 0; u < count; ++u) {
        const Update<T>& own = updates[u];
        const Size cols = of_A ? own.in : own.out;
        if ((of_A ? own.dA : own.dB) < 0) continue;
        for (Size i = 0; i < cols; i += kWidth) work.push_back({u, i, std::min(i + kWidth, cols)});
        size += own.rows * own.rank * cols;
    }
#pragma omp parallel if (size > kWorthSharing)
    {
#pragma omp for schedule(dynamic)
        for (Size u = 0; u < count; ++u) {
            const Update<T>& own = updates[u];
            const Size depth = steps(own.rows, S::kDeep);
            const T* start = h + own.h;
            scales[u].resize(std::size_t(steps(own.rank, kTile) * kTile * depth));
            for (Size n = 0; n < own.rows; n += S::kDeep)
                for (Size r = 0; r < own.rank; ++r)
                    scales[u][r * depth + n / S::kDeep] =
                        S::line(start + n * own.h_stride + r, own.h_stride, own.rows - n);
        }
        std::vector<Line> lines(static_cast<std::size_t>(kDepthBlock * kWidth));
        std::vector<F> sums;
#pragma omp for schedule(dynamic)
        for (Size piece = 0; piece < Size(work.size()); ++piece) {
            const auto [u, first, last] = work[piece];
            const Update<T>& own = updates[u];
            const Place& source = sources[own.projection];
            const Size depth = steps(own.rows, S::kDeep), tiles = steps(own.rank, kTile);
            sums.assign(std::size_t(tiles * kTile * kWidth), F(0));
            for (Size n = 0; n < own.rows; n += kDepthBlock) {
                const Size there = std::min(kDepthBlock, own.rows - n);
                lines_of(source.row<const T>(own.first + n), source.stride, there, first, last, kWidth,
                         lines.data());
                for (Size t = 0; t < tiles; ++t) {
                    F* tile = sums.data() + t * kTile * kWidth;
                    Vector<F> local[kTile][kAcross];
                    std::memcpy(local, tile, sizeof local);
                    sums_of<kTile, kAcross, T>(scales[u].data() + t * kTile * depth + n / S::kDeep, depth,
                                             lines.data(), kWidth, steps(there, S::kDeep), local);
                    std::memcpy(tile, local, sizeof local);
                }
            }
            F* out = gradients + (of_A ? own.dA : own.dB);
            for (Size r = 0; r < own.rank; ++r)
                for (Size i = first; i < last; ++i) {
                    const F value = sums[r * kWidth + i - first];
                    if (of_A) out[r * own.in + i] = value;
                    else out[i * own.rank + r] = factors[u] * value;
                }
        }
    }
}

}  // namespace

#define EXPORTED_SEGMENTS(name, T)                                                                 \
    extern "C" void segments_down_##name(const Update<T>* updates, Size count, Size by_A,          \
                                         const Place* sources, T* h) {                             \
        segments_down(updates, count, by_A, sources, h);                                           \
    }                                                                                              \
    extern "C" void segments_up_##name(const Update<T>* updates, Size count, Size by_A,            \
                                       const T* h, const Place* targets) {                         \
        segments_up(updates, count, by_A, h, targets);                                             \
    }                                                                                              \
    extern "C" void segments_gradient_##name(const Update<T>* updates, Size count, Size of_A,      \
                                             const T* h, const Place* sources,                     \
                                             const Wide<T>* factors, Wide<T>* gradients) {         \
        segments_gradient(updates, count, of_A, h, sources, factors, gradients);                   \
    }
