// A step of many rows at once through the layers of a model such as LLaMA, on a CPU.
//
// Each token belongs to a row, which has its own cache of keys and values, and its own adapter or
// none. Every number of a token is computed by the same operations in the same order, whatever else
// is in the step and however many threads compute it: an answer is the same to the bit alone and
// among others, and whether its prompt is read at once or in chunks.
//
// One parallel region holds the whole step. Weights are read once for all tokens, an adapter once
// for each of its tokens.

#include <algorithm>
#include <limits>

#include "dots.h"
#include "weights.h"

namespace {

constexpr Size kTokens = 64;  // tokens whose outputs one thread holds at a time
constexpr Size kKeys = 16;    // keys that are interleaved in the cache: dimension by dimension

// The low-rank update of one linear layer for one token: A (rank, in), B (rank, out), and gain (out)
// or null for 1.
struct Update {
    const void *A, *B;
    const float* gain;
    Size rank;
};

// The linear layers of a decoder layer, in this order.
enum Index { kQ, kK, kV, kO, kGate, kUp, kDown, kLinears };

struct Layer {
    const void *first_norm, *second_norm;
    Linear linears[kLinears];
    double scale, first_eps, second_eps;
    Size window;  // 0: all keys
};

struct Shape {
    Size layers, dim, inner, heads, shared_heads, head_dim, widest;
};

// The cache of a row: keys (layers, heads, capacity / 16, head_dim, 16), values (layers, heads,
// capacity, head_dim).
struct KVCache {
    void *keys, *values;
    Size capacity;  // in tokens
};

struct Batch {
    Size tokens;
    const KVCache* caches;          // (tokens,): of the token's row
    const Size* positions;          // (tokens,)
    const Update* const* updates;   // (tokens,): (layers, kLinears), or null for the base alone
    Size ranks;  // the largest sum of ranks over linear layers that share an input
};

// Buffers for intermediate results, of each token or each thread.
struct Workspace {
    void *normed, *q, *k, *v, *attended, *gate, *up;  // (tokens, ...)
    float* h;                                          // (tokens, ranks)
    float* scores;                                     // (threads, heads / shared_heads, capacity)
    void* rows;                                        // (threads, kOutputs, widest)
    Size capacity;
};

template <class T>
struct Step {
    const Shape& shape;
    const Batch& batch;
    const Workspace& workspace;
    const Layer* layers;
    int thread;

    const Update* update_of(Size token, Size layer, int index) const {
        const Update* updates = batch.updates[token];
        return updates ? updates + layer * kLinears + index : nullptr;
    }

    // Where a token's A x of one linear layer is written, behind those that share x from `first` on.
    float* h_of(Size token, Size layer, int first, int index) const {
        float* h = workspace.h + token * batch.ranks;
        for (int before = first; before < index; ++before)
            h += update_of(token, layer, before)->rank;
        return h;
    }

    // h = A x of `count` linear layers that share x, side by side.
    void shrink(const T* x, Size layer, int first, int count) const {
        if (!batch.ranks) return;
#pragma omp for schedule(static)
        for (Size task = 0; task < batch.tokens * count; ++task) {
            const Size t = task / count;
            const int index = first + int(task % count);
            const Update* update = update_of(t, layer, index);
            if (!update || !update->rank) continue;
            float* h = h_of(t, layer, first, index);
            const Size n = layers[layer].linears[index].in;
            const Size next = task + 1;
            const Update* following = next < batch.tokens * count
                                      ? update_of(next / count, layer, first + int(next % count))
                                      : nullptr;
            dots_of_one(x + t * n, static_cast<const T*>(update->A), n, update->rank, n, h,
                        following ? static_cast<const T*>(following->A) : nullptr);
        }
    }

    // y = gain ∘ (W x + B h) + b of `count` linear layers that share x; unless `residual`
    // is null, y is added to it.
    void expand(const T* x, Size layer, int first, int count, T* const* ys, T* residual) const {
        const Linear* linears = layers[layer].linears;
        const auto chunks_of = [&](int index) {
            return (linears[index].out + kOutputs - 1) / kOutputs;
        };
        Size tasks = 0;
        for (int i = 0; i < count; ++i) tasks += chunks_of(first + i);
        T* dequantized = static_cast<T*>(workspace.rows) + thread * kOutputs * shape.widest;
        alignas(64) float sums[kTokens * kOutputs];
#pragma omp for schedule(static)
        for (Size task = 0; task < tasks; ++task) {
            int index = first;
            Size chunk = task;
            for (; chunk >= chunks_of(index); ++index) chunk -= chunks_of(index);
            const Linear& linear = linears[index];
            const Size o = chunk * kOutputs, n = linear.in;
            const Size count_o = std::min(kOutputs, linear.out - o);
            const T* w = weight_rows<T>(linear, o, count_o, dequantized);
            T* y = residual ? residual : ys[index - first];
            for (Size t = 0; t < batch.tokens; t += kTokens) {
                const Size some = std::min(kTokens, batch.tokens - t);
                tile(x + t * n, some, w, count_o, n, sums);
                for (Size i = 0; i < some; ++i)
                    finish(t + i, layer, first, index, o, count_o, sums + i * kOutputs,
                           y + (t + i) * linear.out + o, residual != nullptr);
            }
        }
    }

    void finish(Size t, Size layer, int first, int index, Size o, Size count, float* sum, T* y,
                bool adds) const {
        const Linear& linear = layers[layer].linears[index];
        if (const Update* update = update_of(t, layer, index)) {
            const float* h = h_of(t, layer, first, index);
            for (Size r = 0; r < update->rank; ++r) {
                const T* b = static_cast<const T*>(update->B) + r * linear.out + o;
                const float by = h[r];
                __builtin_prefetch(b + kOutputs);  // for the outputs that this thread computes next
#pragma omp simd
                for (Size i = 0; i < count; ++i) sum[i] += by * load(b[i]);
            }
            if (update->gain)
                for (Size i = 0; i < count; ++i) sum[i] *= update->gain[o + i];
        }
        if (const T* bias = static_cast<const T*>(linear.bias))
            for (Size i = 0; i < count; ++i) sum[i] += load(bias[o + i]);
        if (adds)
            for (Size i = 0; i < count; ++i) y[i] = store<T>(load(y[i]) + load(store<T>(sum[i])));
        else
            for (Size i = 0; i < count; ++i) y[i] = store<T>(sum[i]);
    }

    void norm(const T* x, const void* weight, double eps) const {
        const T* w = static_cast<const T*>(weight);
        T* y = static_cast<T*>(workspace.normed);
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

    void rotate(T* a, const T* cos, const T* sin) const {
        const Size half = shape.head_dim / 2;
#pragma omp simd
        for (Size i = 0; i < half; ++i) {
            const float x1 = load(a[i]), x2 = load(a[i + half]);
            a[i] = store<T>(x1 * load(cos[i]) - x2 * load(sin[i]));
            a[i + half] = store<T>(x2 * load(cos[i]) + x1 * load(sin[i]));
        }
    }

    // Rotate queries and keys by their positions, and write keys and values into the rows' caches.
    void write_cache(Size layer, const T* cos, const T* sin) const {
        const Size dim = shape.head_dim, heads = shape.heads, shared = shape.shared_heads;
#pragma omp for schedule(static)
        for (Size t = 0; t < batch.tokens; ++t) {
            const Size p = batch.positions[t];
            T* q = static_cast<T*>(workspace.q) + t * heads * dim;
            T* k = static_cast<T*>(workspace.k) + t * shared * dim;
            const T* v = static_cast<const T*>(workspace.v) + t * shared * dim;
            for (Size h = 0; h < heads; ++h) rotate(q + h * dim, cos + p * dim, sin + p * dim);
            const KVCache& cache = batch.caches[t];
            for (Size h = 0; h < shared; ++h) {
                rotate(k + h * dim, cos + p * dim, sin + p * dim);
                const Size first = (layer * shared + h) * cache.capacity * dim;
                T* keys = static_cast<T*>(cache.keys) + first + p / kKeys * kKeys * dim + p % kKeys;
                for (Size i = 0; i < dim; ++i) keys[i * kKeys] = k[h * dim + i];
                std::copy_n(v + h * dim, dim, static_cast<T*>(cache.values) + first + p * dim);
            }
        }
    }

    // Each token's queries over the keys up to its own.
    void attend(Size layer) const {
        const Size shared = shape.shared_heads;
        float* scores = workspace.scores + thread * (shape.heads / shared) * workspace.capacity;
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
        const Size dim = shape.head_dim, p = batch.positions[t], capacity = workspace.capacity;
        const KVCache& cache = batch.caches[t];
        const double scale = layers[layer].scale;
        const Size window = layers[layer].window;
        const Size first = window && p >= window ? p - window + 1 : 0;
        const Size offset = (layer * shape.shared_heads + head) * cache.capacity * dim;
        const T* keys = static_cast<const T*>(cache.keys) + offset;
        const T* values = static_cast<const T*>(cache.values) + offset;
        const Size at = (t * shape.heads + head * group + g0) * dim;
        const T* q = static_cast<const T*>(workspace.q) + at;
        T* out = static_cast<T*>(workspace.attended) + at;

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
                    const bool visible = key + l >= first && key + l <= p;
                    const float s = acc[g][l] * float(scale);
                    scores[g * capacity + key + l] = s;
                    if (visible && s > highest[g]) highest[g] = s;
                }
        }
        for (int g = 0; g < G; ++g) {
            float* e = scores + g * capacity;
            alignas(64) float lanes[kKeys] = {};
            for (Size key = begin; key <= p; key += kKeys)
#pragma omp simd
                for (Size l = 0; l < kKeys; ++l) {
                    const bool visible = key + l >= first && key + l <= p;
                    const float chance = exponential(e[key + l] - highest[g]);
                    e[key + l] = visible ? chance : 0.0f;
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
                        const float by = scores[g * capacity + key];
#pragma omp simd
                        for (Size l = 0; l < kWide; ++l) acc[g][l] += by * load(values[key * dim + d + l]);
                    }
            } else {
                for (Size key = first; key <= p; ++key)
                    for (int g = 0; g < G; ++g)
                        for (Size l = 0; l < wide; ++l)
                            acc[g][l] += scores[g * capacity + key] * load(values[key * dim + d + l]);
            }
            for (int g = 0; g < G; ++g)
                for (Size l = 0; l < wide; ++l) out[g * dim + d + l] = store<T>(acc[g][l] * highest[g]);
        }
    }

    // gate = silu(gate) · up
    void activate() const {
        T* gate = static_cast<T*>(workspace.gate);
        const T* up = static_cast<const T*>(workspace.up);
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
        T *normed = static_cast<T*>(workspace.normed), *attended = static_cast<T*>(workspace.attended);
        T* gate = static_cast<T*>(workspace.gate);
        T* const qkv[] = {static_cast<T*>(workspace.q), static_cast<T*>(workspace.k), static_cast<T*>(workspace.v)};
        T* const gate_up[] = {gate, static_cast<T*>(workspace.up)};
        for (Size layer = 0; layer < shape.layers; ++layer) {
            const Layer& weights = layers[layer];
            norm(x, weights.first_norm, weights.first_eps);
            shrink(normed, layer, kQ, 3);
            expand(normed, layer, kQ, 3, qkv, nullptr);
            write_cache(layer, cos, sin);
            attend(layer);
            shrink(attended, layer, kO, 1);
            expand(attended, layer, kO, 1, nullptr, x);
            norm(x, weights.second_norm, weights.second_eps);
            shrink(normed, layer, kGate, 2);
            expand(normed, layer, kGate, 2, gate_up, nullptr);
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
void step(const Layer* layers, const Shape* shape, const Batch* batch, const Workspace* workspace, T* x,
          const T* cos, const T* sin, Size threads) {
#pragma omp parallel num_threads(int(threads))
    {
        const Step<T> step{*shape, *batch, *workspace, layers, thread_number()};
        step.run(x, cos, sin);
    }
}

// y = W x (tokens, out), in float32.
template <class T>
void product(const T* x, const T* w, float* y, Size tokens, Size out, Size in, Size threads) {
#pragma omp parallel for schedule(static) num_threads(int(threads))
    for (Size o = 0; o < out; o += kOutputs) {
        alignas(64) float sums[kTokens * kOutputs];
        const Size count = std::min(kOutputs, out - o);
        for (Size t = 0; t < tokens; t += kTokens) {
            const Size some = std::min(kTokens, tokens - t);
            tile(x + t * in, some, w + o * in, count, in, sums);
            for (Size i = 0; i < some; ++i)
                std::copy_n(sums + i * kOutputs, count, y + (t + i) * out + o);
        }
    }
}

}  // namespace

#define EXPORTED(name, T)                                                                          \
    extern "C" void step_##name(const Layer* layers, const Shape* shape, const Batch* batch,       \
                                const Workspace* workspace, T* x, const T* cos, const T* sin,                \
                                Size threads) {                                                    \
        step(layers, shape, batch, workspace, x, cos, sin, threads);                                    \
    }                                                                                              \
    extern "C" void product_##name(const T* x, const T* w, float* y, Size tokens, Size out,        \
                                   Size in, Size threads) {                                        \
        product(x, w, y, tokens, out, in, threads);                                                \
    }

EXPORTED(bfloat16, BFloat16)
EXPORTED(float32, float)
