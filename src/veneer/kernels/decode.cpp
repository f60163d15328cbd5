// A step of many rows at once through the decoder layers of a model, on a CPU.
//
// Each token belongs to a row, which has its own cache of keys and values, and its own adapter or
// none. Every number of a token is computed by the same operations in the same order, whatever else
// is in the step and however many threads compute it: an answer is the same to the bit alone and
// among others, and whether its prompt is read at once or in chunks.
//
// One parallel region holds the whole step. Weights are read once for all tokens, an adapter once
// for each of its tokens.

#include <algorithm>
#include <memory>

#include "curves.h"
#include "decode_attention.h"
#include "dots.h"

namespace {

constexpr Size kTokens = 64;  // tokens whose outputs one thread holds at a time

// Where a token's outputs go: row t begins at first + t · stride. If `adds`, multiplier · y is added
// to what is there.
template <class T>
struct Target {
    T* first;
    Size stride;
    bool adds = false;
    float multiplier = 1.0f;
};

// Call work(activation) with the activation of this number, in the order of activation.py.
template <class Work>
void with_activation(Size number, Work work) {
    switch (number) {
        case 0: return work(Silu{});
        case 1: return work(Gelu{});
        case 2: return work(GeluTanh{});
        case 3: return work(Relu{});
        case 4: return work(ReluSquared{});
        default: return work(QuickGelu{});
    }
}

template <class T>
struct Step {
    const Shape& shape;
    const Batch& batch;
    const Workspace& workspace;
    const Layer* layers;
    T* x;  // (tokens, dim)
    int thread, threads;

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

    // y = gain ∘ (W x + B h) + b of `count` linear layers that share x, side by side in the target.
    void expand(const T* x, Size layer, int first, int count, const Target<T>& target) const {
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
            Size chunk = task, column = 0;
            for (; chunk >= chunks_of(index); ++index) {
                chunk -= chunks_of(index);
                column += linears[index].out;
            }
            const Linear& linear = linears[index];
            const Size o = chunk * kOutputs, n = linear.in;
            const Size count_o = std::min(kOutputs, linear.out - o);
            const T* w = weight_rows<T>(linear, o, count_o, dequantized);
            T* y = target.first + column + o;
            for (Size t = 0; t < batch.tokens; t += kTokens) {
                const Size some = std::min(kTokens, batch.tokens - t);
                tile(x + t * n, some, w, count_o, n, sums);
                for (Size i = 0; i < some; ++i)
                    finish(t + i, layer, first, index, o, count_o, sums + i * kOutputs,
                           y + (t + i) * target.stride, target);
            }
        }
    }

    void finish(Size t, Size layer, int first, int index, Size o, Size count, float* sum, T* y,
                const Target<T>& target) const {
        const Linear& linear = layers[layer].linears[index];
        const Update* update = update_of(t, layer, index);
        if (update) {
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
        if (update && update->bias)
            for (Size i = 0; i < count; ++i) sum[i] += update->bias[o + i];
        const float by = target.multiplier;
        if (target.adds)
            for (Size i = 0; i < count; ++i)
                y[i] = store<T>(load(y[i]) + by * load(store<T>(sum[i])));
        else
            for (Size i = 0; i < count; ++i) y[i] = store<T>(sum[i]);
    }

    // Write what linear layers of norm(x) give, x being normed already.
    void project(const Norm& norm, Size layer, int first, Size count, void* y, Size columns) const {
        const T* input = norm.dim ? static_cast<const T*>(workspace.normed) : x;
        shrink(input, layer, first, int(count));
        expand(input, layer, first, int(count), {static_cast<T*>(y), columns});
    }

    // Add a half's output to x, and norm x for whoever reads it next. A norm `after` the output takes
    // a detour through the memory of normed x.
    void add(const void* inner, Size layer, int index, const Norm& after, const Norm* next) const {
        const T* input = static_cast<const T*>(inner);
        const float multiplier = float(layers[layer].multiplier);
        const Size dim = shape.dim;
        T* normed = static_cast<T*>(workspace.normed);
        shrink(input, layer, index, 1);
        if (!after.dim) {
            expand(input, layer, index, 1, {x, dim, true, multiplier});
        } else {
            expand(input, layer, index, 1, {normed, dim});
#pragma omp for schedule(static)
            for (Size t = 0; t < batch.tokens; ++t) {
                T *y = normed + t * dim, *to = x + t * dim;
                apply(after, y, y);
#pragma omp simd
                for (Size i = 0; i < dim; ++i) to[i] = store<T>(load(to[i]) + multiplier * load(y[i]));
                if (next && next->dim) apply(*next, to, y);
            }
            return;
        }
        if (next) norm(*next);
    }

    void norm(const Norm& norm) const {
        if (!norm.dim) return;
        T* normed = static_cast<T*>(workspace.normed);
#pragma omp for schedule(static)
        for (Size t = 0; t < batch.tokens; ++t) apply(norm, x + t * shape.dim, normed + t * shape.dim);
    }

    // Norm and rotate queries and keys, and write keys and values into the rows' caches.
    void write_caches(Size layer) const {
#pragma omp for schedule(static)
        for (Size t = 0; t < batch.tokens; ++t)
            write_cache(shape, layers[layer], layer, batch.caches[t], batch.positions[t],
                        static_cast<T*>(workspace.qkv) + t * shape.columns());
    }

    // Each token's queries over the keys up to its own.
    void attend_all(Size layer) const {
        const Size group = shape.group(), heads = batch.tokens * shape.key_heads;
        Size parts = 1;  // of a group, where there are fewer groups than threads
        while (heads * parts < threads && group % (2 * parts) == 0) parts *= 2;
        const Size some = group / parts;
#pragma omp for schedule(static)
        for (Size task = 0; task < heads * parts; ++task) {
            const Size t = task / (shape.key_heads * parts);
            const Size head = task / parts % shape.key_heads, begin = task % parts * some;
            switch (some) {
                case 1: attend_some<1>(t, head, begin, layer); break;
                case 2: attend_some<2>(t, head, begin, layer); break;
                case 3: attend_some<3>(t, head, begin, layer); break;
                case 4: attend_some<4>(t, head, begin, layer); break;
                case 8: attend_some<8>(t, head, begin, layer); break;
                default: {
                    Size g = begin;
                    for (; g + 4 <= begin + some; g += 4) attend_some<4>(t, head, g, layer);
                    for (; g < begin + some; ++g) attend_some<1>(t, head, g, layer);
                }
            }
        }
    }

    // G queries of a key head's group, from number g on.
    template <int G>
    void attend_some(Size t, Size head, Size g, Size layer) const {
        const Size dim = shape.head_dim, value_dim = shape.value_dim, group = shape.group();
        const KVCache& cache = batch.caches[t];
        const Size before = (layer * shape.key_heads + head) * cache.capacity;
        const Size query = head * group + g;
        const Columns columns = columns_of(shape, layers[layer], head);
        const float* sinks = layers[layer].sinks;
        const Attending<T> attending{
            static_cast<const T*>(workspace.qkv) + t * shape.columns() + columns.q + g * dim,
            static_cast<const T*>(cache.keys) + before * dim,
            static_cast<const T*>(cache.values) + before * value_dim,
            static_cast<T*>(workspace.attended) + (t * shape.heads + query) * value_dim,
            workspace.scores + thread * group * workspace.capacity,
            sinks ? sinks + query : nullptr,
            batch.positions[t],
            workspace.capacity,
            dim,
            value_dim};
        attend<G>(layers[layer], attending);
    }

    // act(gate) · up, or act(up).
    void activate(Size layer) const {
        const bool gated = shape.is_gated();
        const Size inner = shape.inner, columns = shape.inner_columns, block = 256;
        const Size blocks = (inner + block - 1) / block;
        const Size gate = gated && !layers[layer].gate_first ? inner : 0;
        with_activation(layers[layer].activation, [&]<class A>(A) {
#pragma omp for schedule(static)
            for (Size task = 0; task < batch.tokens * blocks; ++task) {
                const Size t = task / blocks, first = task % blocks * block;
                const Size count = std::min(block, inner - first);
                const T* row = static_cast<const T*>(workspace.gate_up) + t * columns + first;
                const T *g = row + gate, *u = row + inner - gate;
                T* y = static_cast<T*>(workspace.activated) + t * inner + first;
                if (gated) {
#pragma omp simd
                    for (Size i = 0; i < count; ++i) y[i] = store<T>(A::at(load(g[i])).y * load(u[i]));
                } else {
#pragma omp simd
                    for (Size i = 0; i < count; ++i) y[i] = store<T>(A::at(load(g[i])).y);
                }
            }
        });
    }

    void run() const {
        norm(layers[0].norms[kBeforeAttention]);
        for (Size layer = 0; layer < shape.layers; ++layer) {
            const Layer& own = layers[layer];
            const Norm &second = own.norms[kBeforeFeedForward], &after = own.norms[kAfterAttention];
            const auto project_inner = [&] {
                project(second, layer, kInnerInputs, own.inner_inputs, workspace.gate_up,
                        shape.inner_columns);
            };
            project(own.norms[kBeforeAttention], layer, kAttentionInputs, own.attention_inputs,
                    workspace.qkv, shape.columns());
            write_caches(layer);
            attend_all(layer);
            if (own.parallel) {
                norm(second);
                project_inner();
                add(workspace.attended, layer, kOutput, after, nullptr);
            } else {
                add(workspace.attended, layer, kOutput, after, &second);
                project_inner();
            }
            activate(layer);
            const bool last = layer + 1 == shape.layers;
            add(workspace.activated, layer, kDown, own.norms[kAfterFeedForward],
                last ? nullptr : &layers[layer + 1].norms[kBeforeAttention]);
        }
    }
};

#ifdef _OPENMP
extern "C" int omp_get_thread_num();
extern "C" int omp_get_num_threads();
inline int thread_number() { return omp_get_thread_num(); }
inline int thread_count() { return omp_get_num_threads(); }
#else
inline int thread_number() { return 0; }
inline int thread_count() { return 1; }
#endif

// x (tokens, dim): embeddings, and after it what the last layer gives.
template <class T>
void step(const Layer* layers, const Shape* shape, const Batch* batch, const Workspace* workspace, T* x,
          Size threads) {
#pragma omp parallel num_threads(int(threads))
    {
        const Step<T> step{*shape, *batch, *workspace, layers, x, thread_number(), thread_count()};
        step.run();
    }
}

// y = W x + b (tokens, out), in float32.
template <class T>
void product(const T* x, const Linear& linear, float* y, Size tokens, Size threads) {
    const Size in = linear.in, out = linear.out;
    const T* bias = static_cast<const T*>(linear.bias);
#pragma omp parallel num_threads(int(threads))
    {
        const std::unique_ptr<T[]> rows(new T[std::size_t(linear.kind == kNumbers ? 1 : kOutputs * in)]);
        alignas(64) float sums[kTokens * kOutputs];
#pragma omp for schedule(static)
        for (Size o = 0; o < out; o += kOutputs) {
            const Size count = std::min(kOutputs, out - o);
            const T* w = weight_rows<T>(linear, o, count, rows.get());
            for (Size t = 0; t < tokens; t += kTokens) {
                const Size some = std::min(kTokens, tokens - t);
                tile(x + t * in, some, w, count, in, sums);
                for (Size i = 0; i < some; ++i) {
                    float* to = y + (t + i) * out + o;
                    std::copy_n(sums + i * kOutputs, count, to);
                    if (bias)
                        for (Size j = 0; j < count; ++j) to[j] += load(bias[o + j]);
                }
            }
        }
    }
}

}  // namespace

#define EXPORTED(name, T)                                                                          \
    extern "C" void step_##name(const Layer* layers, const Shape* shape, const Batch* batch,       \
                                const Workspace* workspace, T* x, Size threads) {                  \
        step(layers, shape, batch, workspace, x, threads);                                         \
    }                                                                                              \
    extern "C" void product_##name(const T* x, const Linear* linear, float* y, Size tokens,        \
                                   Size threads) {                                                 \
        product(x, *linear, y, tokens, threads);                                                   \
    }

EXPORTED(bfloat16, BFloat16)
EXPORTED(float32, float)
