// What a compiled step reads and writes: the structures that decode.py fills, field by field.

#pragma once

#include "lanes.h"
#include "weights.h"

namespace {

constexpr Size kKeys = 16;  // keys that are interleaved in the cache: dimension by dimension

// The linear layers of a decoder layer. q, k and v come from three, or from one that counts as the
// first; so do gate and up. Both lie in the order of their linear layers, side by side.
enum Index { kAttentionInputs = 0, kOutput = 3, kInnerInputs = 4, kDown = 6, kLinears = 7 };

// The norms of a decoder layer. Those of q and k are over each head, or over all of a token's.
enum NormIndex {
    kBeforeAttention, kOfQ, kOfK, kAfterAttention, kBeforeFeedForward, kAfterFeedForward, kNorms
};

// The low-rank update of one linear layer for one token: A (rank, in), B (rank, out), gain (out) or
// null for 1, and what is added to the layer's bias, (out), or null.
struct Update {
    const void *A, *B;
    const float *gain, *bias;
    Size rank;
};

// y = (offset + w) · x̂ + b over `dim` numbers, as norm.h has it; b may be null. dim 0: no norm.
struct Norm {
    const void *weight, *bias;
    double offset, eps;
    Size dim, centred, rounds;
};

// y = x + multiplier · after(output(attention(q, k, v))), then y + multiplier · after(down(act(gate)
// · up)); if `parallel`, gate and up are of x too.
struct Layer {
    Norm norms[kNorms];
    Linear linears[kLinears];
    const void *cos, *sin;    // (positions, pairs)
    const void* q_factors;    // (positions,): what q is multiplied with, or null for 1
    const float* sinks;       // (heads,): logits in the softmax's sum, or null
    double scale, softcap, multiplier;  // softcap 0: none
    Size window;              // 0: all keys
    Size pairs, adjacent;     // dimensions that turn together: 2i and 2i + 1 if adjacent
    Size by_key_head;         // q, k and v of each key head lie side by side
    Size attention_inputs, inner_inputs;  // linear layers
    Size gate_first, activation, parallel;
};

// columns: of q, k and v together; inner_columns: of gate and up, or of up where there is no gate.
// widest: the longest row of any weight.
struct Shape {
    Size layers, dim, inner, inner_columns, heads, key_heads, head_dim, value_dim, widest;

    Size columns() const { return heads * head_dim + key_heads * (head_dim + value_dim); }
    Size group() const { return heads / key_heads; }
    bool is_gated() const { return inner_columns > inner; }
};

// The cache of a row: keys (layers, key_heads, capacity / 16, head_dim, 16), values (layers,
// key_heads, capacity, value_dim).
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
    void *normed, *qkv, *attended, *gate_up, *activated;  // (tokens, ...)
    float* h;                                              // (tokens, ranks)
    float* scores;                                         // (threads, group, capacity)
    void* rows;                                            // (threads, kOutputs, widest)
    Size capacity;
};

// Where a head's q, k and v begin in a token's row of all of them.
struct Columns {
    Size q, k, v;
};
inline Columns columns_of(const Shape& shape, const Layer& layer, Size key_head) {
    const Size dim = shape.head_dim, group = shape.group();
    if (layer.by_key_head) {
        const Size first = key_head * (group + 2) * dim;
        return {first, first + group * dim, first + (group + 1) * dim};
    }
    const Size k = shape.heads * dim, v = k + shape.key_heads * dim;
    return {key_head * group * dim, k + key_head * dim, v + key_head * shape.value_dim};
}

// y may be x.
template <class T>
void apply(const Norm& norm, const T* x, T* y) {
    const T *w = static_cast<const T*>(norm.weight), *b = static_cast<const T*>(norm.bias);
    const float offset = float(norm.offset);
    with_flags(
        [&]<bool centred, bool biased, bool rounds>() {
            float statistics[2];
            statistics_of<centred>(x, float(norm.eps), statistics, norm.dim);
            const float mean = statistics[0], r = statistics[1];
            const Size n = norm.dim;
#pragma omp simd
            for (Size i = 0; i < n; ++i) {
                float hat = (load(x[i]) - mean) * r;
                if constexpr (rounds) hat = load(store<T>(hat));
                y[i] = store<T>((offset + load(w[i])) * hat + (biased ? load(b[i]) : 0.0f));
            }
        },
        norm.centred != 0, b != nullptr, norm.rounds != 0);
}

}  // namespace
