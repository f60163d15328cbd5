// A step of many answers at once through the layers of a model such as LLaMA, on a CPU.
//
// Each token is of some row, which has a place of its own in memory for keys and values, and an
// adapter of its own or none. Every number of a token is made of the same operations in the same
// order whatever else is computed in the same step, and by however many threads: an answer is the
// same, to the bit, alone and among others, read at once and in pieces.
//
// One parallel region holds the whole step. Weights are read once for all tokens, adapters once for
// each token that they act on.

#include <algorithm>
#include <limits>

#include "numbers.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr Size kOutputs = 32;  // of a weight, computed by one thread at a time
constexpr Size kTokens = 64;   // whose outputs are held at a time
constexpr Size kKeys = 16;     // whose numbers lie side by side in the cache
constexpr Size kMostShared = 8;  // heads that share keys

// ---- dot products ----

#ifdef __AVX512F__

// The sums of 16 vectors, as one. The tree is the same for each.
inline __m512 sums(const __m512* v) {
    __m512 a[8], b[4], c[2];
    for (int i = 0; i < 8; ++i)
        a[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]),
                             _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 4; ++i) {
        const __m512d x = _mm512_castps_pd(a[2 * i]), y = _mm512_castps_pd(a[2 * i + 1]);
        b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    for (int i = 0; i < 2; ++i)
        c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88),
                         _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
}

template <class T>
struct Lanes;

template <>
struct Lanes<float> {
    using Vector = __m512;
    static constexpr Size kStep = 16;
    static Vector read(const float* p) { return _mm512_loadu_ps(p); }
    static Vector read(const float* p, Size n) {
        return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
    }
    static __m512 add(__m512 sum, Vector a, Vector b) { return _mm512_fmadd_ps(a, b, sum); }
};

#ifdef __AVX512BF16__
template <>
struct Lanes<BFloat16> {
    using Vector = __m512bh;
    static constexpr Size kStep = 32;
    static Vector read(const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static Vector read(const BFloat16* p, Size n) {
        return (__m512bh)_mm512_maskz_loadu_epi16(__mmask32((1u << n) - 1), p);
    }
    static __m512 add(__m512 sum, Vector a, Vector b) { return _mm512_dpbf16_ps(sum, a, b); }
};
#else
template <>
struct Lanes<BFloat16> {
    using Vector = __m512;
    static constexpr Size kStep = 16;
    static Vector wide(__m256i x) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
    }
    static Vector read(const BFloat16* p) { return wide(_mm256_loadu_si256((const __m256i*)p)); }
    static Vector read(const BFloat16* p, Size n) {
        alignas(32) std::uint16_t some[16] = {};
        for (Size i = 0; i < n; ++i) some[i] = std::uint16_t(p[i]);
        return wide(_mm256_load_si256((const __m256i*)some));
    }
    static __m512 add(__m512 sum, Vector a, Vector b) { return _mm512_fmadd_ps(a, b, sum); }
};
#endif

// out[m, o] = x[m] · w[o] for M tokens and O rows of a weight, 16 products at most. Ahead: where the
// rows begin that come next, to be fetched, for the processor does not guess it; or null.
template <int M, int O, class T>
inline void dots(const T* x, Size x_stride, const T* w, Size w_stride, Size n, float* out,
                 Size out_stride, const T* ahead = nullptr) {
    using L = Lanes<T>;
    static_assert(M * O <= 16);
    __m512 acc[16];
    for (auto& a : acc) a = _mm512_setzero_ps();
    Size i = 0;
    for (; i + L::kStep <= n; i += L::kStep) {
        typename L::Vector b[O];
#pragma GCC unroll 16
        for (int o = 0; o < O; ++o) b[o] = L::read(w + o * w_stride + i);
        if (ahead)
#pragma GCC unroll 16
            for (int o = 0; o < O; ++o) __builtin_prefetch(ahead + o * w_stride + i, 0, 2);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const auto a = L::read(x + m * x_stride + i);
#pragma GCC unroll 16
            for (int o = 0; o < O; ++o) acc[m * O + o] = L::add(acc[m * O + o], a, b[o]);
        }
    }
    if (i < n) {
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const auto a = L::read(x + m * x_stride + i, n - i);
#pragma GCC unroll 16
            for (int o = 0; o < O; ++o)
                acc[m * O + o] = L::add(acc[m * O + o], a, L::read(w + o * w_stride + i, n - i));
        }
    }
    alignas(64) float found[16];
    _mm512_store_ps(found, sums(acc));
    for (int m = 0; m < M; ++m)
        for (int o = 0; o < O; ++o) out[m * out_stride + o] = found[m * O + o];
}

#else

template <int M, int O, class T>
inline void dots(const T* x, Size x_stride, const T* w, Size w_stride, Size n, float* out,
                 Size out_stride, const T* = nullptr) {
    constexpr Size kLanes = 8;
    for (int m = 0; m < M; ++m) {
        for (int o = 0; o < O; ++o) {
            const T *a = x + m * x_stride, *b = w + o * w_stride;
            float acc[kLanes] = {};
            Size i = 0;
            for (; i + kLanes <= n; i += kLanes)
                for (Size l = 0; l < kLanes; ++l) acc[l] += load(a[i + l]) * load(b[i + l]);
            for (Size l = 0; i < n; ++i, ++l) acc[l] += load(a[i]) * load(b[i]);
            for (Size half = kLanes / 2; half; half /= 2)
                for (Size l = 0; l < half; ++l) acc[l] += acc[l + half];
            out[m * out_stride + o] = acc[0];
        }
    }
}

#endif

// out[o] = x · w[o] for `count` rows of a weight, after which those at `next` are read.
template <class T>
inline void dots_of_one(const T* x, const T* w, Size stride, Size count, Size n, float* out,
                        const T* next) {
    Size o = 0;
    for (; o + 16 <= count; o += 16)
        dots<1, 16>(x, 0, w + o * stride, stride, n, out + o, 0,
                    o + 16 < count ? w + (o + 16) * stride : next);
    for (; o + 8 <= count; o += 8)
        dots<1, 8>(x, 0, w + o * stride, stride, n, out + o, 0,
                   o + 8 < count ? w + (o + 8) * stride : next);
    for (; o < count; ++o) dots<1, 1>(x, 0, w + o * stride, stride, n, out + o, 0);
}

// out[t, o] = x[t] · w[o], `count` rows of a weight for `tokens` tokens.
template <class T>
void tile(const T* x, Size tokens, const T* w, Size count, Size n, float* out) {
    const Size whole = tokens / 4 * 4;
    for (Size o = 0; o < count; o += 4) {
        const Size few = count - o;
        for (Size t = 0; t < whole; t += 4) {
            if (few >= 4 && t == 0)
                dots<4, 4>(x, n, w + o * n, n, n, out + o, kOutputs, w + (o + 4) * n);
            else if (few >= 4)
                dots<4, 4>(x + t * n, n, w + o * n, n, n, out + t * kOutputs + o, kOutputs);
            else
                for (Size i = 0; i < few; ++i)
                    dots<4, 1>(x + t * n, n, w + (o + i) * n, n, n, out + t * kOutputs + o + i,
                               kOutputs);
        }
    }
    for (Size t = whole; t < tokens; ++t) dots_of_one(x + t * n, w, n, count, n, out + t * kOutputs, w + count * n);
}

// ---- weights ----

// A weight (out, in): numbers, or 4-bit codes with 16 values and a scale for each 64 of them, or
// 8-bit codes with a scale for each row.
enum Kind : Size { kNumbers, kFourBits, kEightBits };

struct Linear {
    const void *weight, *bias;
    const float *scales, *values;
    Size out, in, kind;
};

// Rows `first` on, `count` of them, as numbers, made in `room` where they are codes.
template <class T>
const T* rows_of(const Linear& linear, Size first, Size count, T* room) {
    const Size n = linear.in;
    if (linear.kind == kNumbers) return static_cast<const T*>(linear.weight) + first * n;
    if (linear.kind == kEightBits) {
        const auto* codes = static_cast<const std::int8_t*>(linear.weight) + first * n;
        for (Size row = 0; row < count; ++row) {
            const float scale = linear.scales[first + row];
#pragma omp simd
            for (Size i = 0; i < n; ++i)
                room[row * n + i] =
                    store<T>(float(codes[row * n + i]) * scale * 7.874015718698502e-3f);
        }
        return room;
    }
    const auto* codes = static_cast<const std::uint8_t*>(linear.weight) + first * n / 2;
    const float* scales = linear.scales + first * n / 64;
    for (Size block = 0; block < count * n / 64; ++block) {
        const float scale = scales[block];
        const std::uint8_t* c = codes + block * 32;
        T* out = room + block * 64;
#ifdef __AVX512F__
        const __m512 table = _mm512_loadu_ps(linear.values), s = _mm512_set1_ps(scale);
        alignas(64) float high[32], low[32];
        for (Size i = 0; i < 32; i += 16) {
            const __m512i q = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(c + i)));
            _mm512_store_ps(high + i, _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(q, 4), table), s));
            _mm512_store_ps(low + i, _mm512_mul_ps(_mm512_permutexvar_ps(q, table), s));
        }
#pragma omp simd
        for (Size i = 0; i < 32; ++i) {
            out[2 * i] = store<T>(high[i]);
            out[2 * i + 1] = store<T>(low[i]);
        }
#else
        for (Size i = 0; i < 32; ++i) {
            out[2 * i] = store<T>(linear.values[c[i] >> 4] * scale);
            out[2 * i + 1] = store<T>(linear.values[c[i] & 15] * scale);
        }
#endif
    }
    return room;
}

// ---- adapters ----

// What acts on one layer for one token: A (rank, in), B (rank, out) and gain (out) or null.
struct Acting {
    const void *A, *B;
    const float* gain;
    Size rank;
};

// The layers' weights, in this order for each.
enum Part { kQ, kK, kV, kO, kGate, kUp, kDown, kParts };

struct Layer {
    const void *first_norm, *second_norm;
    Linear parts[kParts];
    double scale, first_eps, second_eps;
    Size window;  // 0: all keys
};

struct Shape {
    Size layers, dim, inner, heads, shared_heads, head_dim, widest;
};

// The memory of a row: keys (layers, heads, places / 16, head_dim, 16), values (layers, heads,
// places, head_dim).
struct Memory {
    void *keys, *values;
    Size places;
};

struct Batch {
    Size tokens;
    const Memory* memories;             // (tokens,): of the token's row
    const Size* positions;              // (tokens,)
    const Acting* const* acting;        // (tokens,): (layers, parts), or null for the base
    Size ranks;                         // the most that act on one group of parts
};

// Room for what is made on the way, for each token or each thread.
struct Room {
    void *normed, *q, *k, *v, *attended, *gate, *up;  // (tokens, ...)
    float* h;                                          // (tokens, ranks)
    float* scores;                                     // (threads, shared, places)
    void* rows;                                        // (threads, kOutputs, widest)
    Size places;
};

template <class T>
struct Step {
    const Shape& shape;
    const Batch& batch;
    const Room& room;
    const Layer* layers;
    int thread;

    const Acting* acting(Size token, Size layer, int part) const {
        const Acting* all = batch.acting[token];
        return all ? all + layer * kParts + part : nullptr;
    }

    // h = A x of `count` parts that share x, one behind the other.
    void shrink(const T* x, Size layer, int first, int count) const {
        if (!batch.ranks) return;
#pragma omp for schedule(static)
        for (Size task = 0; task < batch.tokens * count; ++task) {
            const Size t = task / count;
            const int part = first + int(task % count);
            const Acting* one = acting(t, layer, part);
            if (!one || !one->rank) continue;
            float* h = room.h + t * batch.ranks;
            for (int before = first; before < part; ++before)
                h += acting(t, layer, before)->rank;
            const Size n = layers[layer].parts[part].in;
            const Size next = task + 1;
            const Acting* other = next < batch.tokens * count
                                      ? acting(next / count, layer, first + int(next % count))
                                      : nullptr;
            dots_of_one(x + t * n, static_cast<const T*>(one->A), n, one->rank, n, h,
                        other ? static_cast<const T*>(other->A) : nullptr);
        }
    }

    // y = gain ∘ (W x + B h) + b of `count` parts that share x, added to `residual` if there is one.
    void expand(const T* x, Size layer, int first, int count, T* const* ys, T* residual) const {
        Size tasks = 0;
        for (int i = 0; i < count; ++i)
            tasks += (layers[layer].parts[first + i].out + kOutputs - 1) / kOutputs;
        T* own_rows = static_cast<T*>(room.rows) + thread * kOutputs * shape.widest;
        alignas(64) float found[kTokens * kOutputs];
#pragma omp for schedule(static)
        for (Size task = 0; task < tasks; ++task) {
            int part = first;
            Size chunk = task;
            for (Size own; chunk >= (own = (layers[layer].parts[part].out + kOutputs - 1) / kOutputs);
                 ++part)
                chunk -= own;
            const Linear& linear = layers[layer].parts[part];
            const Size o = chunk * kOutputs, n = linear.in;
            const Size count_o = std::min(kOutputs, linear.out - o);
            const T* w = rows_of<T>(linear, o, count_o, own_rows);
            T* y = residual ? residual : ys[part - first];
            for (Size t = 0; t < batch.tokens; t += kTokens) {
                const Size some = std::min(kTokens, batch.tokens - t);
                tile(x + t * n, some, w, count_o, n, found);
                for (Size i = 0; i < some; ++i)
                    finish(t + i, layer, first, part, o, count_o, found + i * kOutputs,
                           y + (t + i) * linear.out + o, residual != nullptr);
            }
        }
    }

    void finish(Size t, Size layer, int first, int part, Size o, Size count, float* sum, T* y,
                bool onto) const {
        const Linear& linear = layers[layer].parts[part];
        if (const Acting* one = acting(t, layer, part)) {
            const float* h = room.h + t * batch.ranks;
            for (int before = first; before < part; ++before) h += acting(t, layer, before)->rank;
            for (Size r = 0; r < one->rank; ++r) {
                const T* b = static_cast<const T*>(one->B) + r * linear.out + o;
                const float by = h[r];
                __builtin_prefetch(b + kOutputs);  // for the outputs that this thread computes next
#pragma omp simd
                for (Size i = 0; i < count; ++i) sum[i] += by * load(b[i]);
            }
            if (one->gain)
                for (Size i = 0; i < count; ++i) sum[i] *= one->gain[o + i];
        }
        if (const T* bias = static_cast<const T*>(linear.bias))
            for (Size i = 0; i < count; ++i) sum[i] += load(bias[o + i]);
        if (onto)
            for (Size i = 0; i < count; ++i) y[i] = store<T>(load(y[i]) + load(store<T>(sum[i])));
        else
            for (Size i = 0; i < count; ++i) y[i] = store<T>(sum[i]);
    }

    void norm(const T* x, const void* weight, double eps) const {
        const T* w = static_cast<const T*>(weight);
        T* y = static_cast<T*>(room.normed);
        const Size n = shape.dim;
#pragma omp for schedule(static)
        for (Size t = 0; t < batch.tokens; ++t) {
            const T* a = x + t * n;
            float square = 0;
            dots<1, 1>(a, 0, a, 0, n, &square, 0);
            const float by = 1.0f / std::sqrt(square / float(n) + float(eps));
#pragma omp simd
            for (Size i = 0; i < n; ++i)
                y[t * n + i] = store<T>(load(w[i]) * load(store<T>(load(a[i]) * by)));
        }
    }

    void turn(T* a, const T* cos, const T* sin) const {
        const Size half = shape.head_dim / 2;
#pragma omp simd
        for (Size i = 0; i < half; ++i) {
            const float x1 = load(a[i]), x2 = load(a[i + half]);
            a[i] = store<T>(x1 * load(cos[i]) - x2 * load(sin[i]));
            a[i + half] = store<T>(x2 * load(cos[i]) + x1 * load(sin[i]));
        }
    }

    // Turn queries and keys by their positions, and put keys and values into the rows' memories.
    void remember(Size layer, const T* cos, const T* sin) const {
        const Size dim = shape.head_dim, heads = shape.heads, shared = shape.shared_heads;
#pragma omp for schedule(static)
        for (Size t = 0; t < batch.tokens; ++t) {
            const Size p = batch.positions[t];
            T* q = static_cast<T*>(room.q) + t * heads * dim;
            T* k = static_cast<T*>(room.k) + t * shared * dim;
            const T* v = static_cast<const T*>(room.v) + t * shared * dim;
            for (Size h = 0; h < heads; ++h) turn(q + h * dim, cos + p * dim, sin + p * dim);
            const Memory& memory = batch.memories[t];
            for (Size h = 0; h < shared; ++h) {
                turn(k + h * dim, cos + p * dim, sin + p * dim);
                const Size first = (layer * shared + h) * memory.places * dim;
                T* keys = static_cast<T*>(memory.keys) + first + p / kKeys * kKeys * dim + p % kKeys;
                for (Size i = 0; i < dim; ++i) keys[i * kKeys] = k[h * dim + i];
                std::copy_n(v + h * dim, dim, static_cast<T*>(memory.values) + first + p * dim);
            }
        }
    }

    // Each token's queries over the keys up to its own.
    void attend(Size layer) const {
        const Size shared = shape.shared_heads;
        float* scores = room.scores + thread * (shape.heads / shared) * room.places;
#pragma omp for schedule(static)
        for (Size task = 0; task < batch.tokens * shared; ++task)
            switch (shape.heads / shared) {
                case 1: attend_with<1>(task / shared, task % shared, 1, layer, scores); break;
                case 2: attend_with<2>(task / shared, task % shared, 2, layer, scores); break;
                case 3: attend_with<3>(task / shared, task % shared, 3, layer, scores); break;
                case 4: attend_with<4>(task / shared, task % shared, 4, layer, scores); break;
                case 8: attend_with<8>(task / shared, task % shared, 8, layer, scores); break;
                default:
                    for (Size g = 0; g < shape.heads / shared; ++g)
                        attend_with<1>(task / shared, task % shared, shape.heads / shared, layer,
                                       scores, g);
            }
    }

    template <int G>
    void attend_with(Size t, Size head, Size group, Size layer, float* scores, Size g0 = 0) const {
        const Size dim = shape.head_dim, p = batch.positions[t], places = room.places;
        const Memory& memory = batch.memories[t];
        const Layer& own = layers[layer];
        const Size first = own.window && p >= own.window ? p - own.window + 1 : 0;
        const Size offset = (layer * shape.shared_heads + head) * memory.places * dim;
        const T* keys = static_cast<const T*>(memory.keys) + offset;
        const T* values = static_cast<const T*>(memory.values) + offset;
        const Size at = (t * shape.heads + head * group + g0) * dim;
        const T* q = static_cast<const T*>(room.q) + at;
        T* out = static_cast<T*>(room.attended) + at;

        const Size begin = first / kKeys * kKeys;
        float highest[G];
        for (auto& h : highest) h = -std::numeric_limits<float>::infinity();
        for (Size key = begin; key <= p; key += kKeys) {
            alignas(64) float acc[G][kKeys] = {};
            const T* block = keys + key * dim;
            for (Size i = 0; i < dim; ++i)
#pragma GCC unroll 8
                for (int g = 0; g < G; ++g) {
                    const float by = load(q[g * dim + i]);
#pragma omp simd
                    for (Size l = 0; l < kKeys; ++l) acc[g][l] += by * load(block[i * kKeys + l]);
                }
            for (int g = 0; g < G; ++g)
                for (Size l = 0; l < kKeys; ++l) {
                    const bool seen = key + l >= first && key + l <= p;
                    const float s = acc[g][l] * float(own.scale);
                    scores[g * places + key + l] = s;
                    if (seen && s > highest[g]) highest[g] = s;
                }
        }
        for (int g = 0; g < G; ++g) {
            float* e = scores + g * places;
            alignas(64) float lanes[kKeys] = {};
            for (Size key = begin; key <= p; key += kKeys)
#pragma omp simd
                for (Size l = 0; l < kKeys; ++l) {
                    const bool seen = key + l >= first && key + l <= p;
                    const float chance = exponential(e[key + l] - highest[g]);
                    e[key + l] = seen ? chance : 0.0f;
                    lanes[l] += e[key + l];
                }
            float total = 0;
            for (Size l = 0; l < kKeys; ++l) total += lanes[l];
            highest[g] = 1.0f / total;
        }
        constexpr Size kWide = 16;
        for (Size d = 0; d < dim; d += kWide) {
            const Size wide = std::min(kWide, dim - d);
            alignas(64) float acc[G][kWide] = {};
            if (wide == kWide) {
                for (Size key = first; key <= p; ++key)
#pragma GCC unroll 8
                    for (int g = 0; g < G; ++g) {
                        const float by = scores[g * places + key];
#pragma omp simd
                        for (Size l = 0; l < kWide; ++l) acc[g][l] += by * load(values[key * dim + d + l]);
                    }
            } else {
                for (Size key = first; key <= p; ++key)
                    for (int g = 0; g < G; ++g)
                        for (Size l = 0; l < wide; ++l)
                            acc[g][l] += scores[g * places + key] * load(values[key * dim + d + l]);
            }
            for (int g = 0; g < G; ++g)
                for (Size l = 0; l < wide; ++l) out[g * dim + d + l] = store<T>(acc[g][l] * highest[g]);
        }
    }

    // gate = silu(gate) · up
    void activate() const {
        T* gate = static_cast<T*>(room.gate);
        const T* up = static_cast<const T*>(room.up);
        const Size block = 256, all = batch.tokens * shape.inner;
#pragma omp for schedule(static)
        for (Size first = 0; first < all; first += block) {
            const Size last = std::min(all, first + block);
#pragma omp simd
            for (Size i = first; i < last; ++i) {
                const float g = load(gate[i]);
                gate[i] = store<T>(g / (1.0f + exponential(-g)) * load(up[i]));
            }
        }
    }

    void run(T* x, const T* cos, const T* sin) const {
        T *normed = static_cast<T*>(room.normed), *attended = static_cast<T*>(room.attended);
        T* gate = static_cast<T*>(room.gate);
        T* const qkv[] = {static_cast<T*>(room.q), static_cast<T*>(room.k), static_cast<T*>(room.v)};
        T* const both[] = {gate, static_cast<T*>(room.up)};
        for (Size layer = 0; layer < shape.layers; ++layer) {
            const Layer& own = layers[layer];
            norm(x, own.first_norm, own.first_eps);
            shrink(normed, layer, kQ, 3);
            expand(normed, layer, kQ, 3, qkv, nullptr);
            remember(layer, cos, sin);
            attend(layer);
            shrink(attended, layer, kO, 1);
            expand(attended, layer, kO, 1, nullptr, x);
            norm(x, own.second_norm, own.second_eps);
            shrink(normed, layer, kGate, 2);
            expand(normed, layer, kGate, 2, both, nullptr);
            activate();
            shrink(gate, layer, kDown, 1);
            expand(gate, layer, kDown, 1, nullptr, x);
        }
    }
};

#ifdef _OPENMP
extern "C" int omp_get_thread_num();
inline int thread_number() { return omp_get_thread_num(); }
#else
inline int thread_number() { return 0; }
#endif

// x (tokens, dim): embeddings, and after it what the last layer gives. cos, sin (positions,
// head_dim).
template <class T>
void step(const Layer* layers, const Shape* shape, const Batch* batch, const Room* room, T* x,
          const T* cos, const T* sin, Size threads) {
#pragma omp parallel num_threads(int(threads))
    {
        const Step<T> own{*shape, *batch, *room, layers, thread_number()};
        own.run(x, cos, sin);
    }
}

// y = W x (tokens, out), in float32.
template <class T>
void product(const T* x, const T* w, float* y, Size tokens, Size out, Size in, Size threads) {
#pragma omp parallel for schedule(static) num_threads(int(threads))
    for (Size o = 0; o < out; o += kOutputs) {
        alignas(64) float found[kTokens * kOutputs];
        const Size count = std::min(kOutputs, out - o);
        for (Size t = 0; t < tokens; t += kTokens) {
            const Size some = std::min(kTokens, tokens - t);
            tile(x + t * in, some, w + o * in, count, in, found);
            for (Size i = 0; i < some; ++i)
                std::copy_n(found + i * kOutputs, count, y + (t + i) * out + o);
        }
    }
}

}  // namespace

#define EXPORTED(name, T)                                                                          \
    extern "C" void step_##name(const Layer* layers, const Shape* shape, const Batch* batch,       \
                                const Room* room, T* x, const T* cos, const T* sin,                \
                                Size threads) {                                                    \
        step(layers, shape, batch, room, x, cos, sin, threads);                                    \
    }                                                                                              \
    extern "C" void product_##name(const T* x, const T* w, float* y, Size tokens, Size out,        \
                                   Size in, Size threads) {                                        \
        product(x, w, y, tokens, out, in, threads);                                                \
    }

EXPORTED(bfloat16, BFloat16)
EXPORTED(float32, float)
