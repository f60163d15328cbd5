// The softmax of attention's scores and its gradient, for one block of queries: each in one pass.
//
// A row holds the scores q kᵀ of one query; rows are (heads, queries). The query at `first_query` +
// its index sees the last `window` keys up to its own position; the row's first key is `first_key`.
// log_sums and delta hold a number for each head's `length` positions. bfloat16 scores come in two
// halves, rounded and what rounding left; `rest` is null for the other dtypes.

#pragma once

#include <limits>
#include <memory>

#include "numbers.h"

namespace {

template <class T>
inline Wide<T> whole(const T* scores, const T* rest, Size i) {
    if constexpr (std::is_same_v<T, BFloat16>) return load(scores[i]) + load(rest[i]);
    return load(scores[i]);
}

struct Block {
    Size heads, queries, keys, length, first_query, first_key, window;

    bool worth_sharing() const { return heads * queries * keys > (1 << 14); }
    Size low(Size query) const {
        const Size low = first_query + query - window + 1 - first_key;
        return low < 0 ? 0 : low;
    }
    Size high(Size query) const {
        const Size high = first_query + query + 1 - first_key;
        return high > keys ? keys : high;
    }
};

// In place: scores → probabilities p, with log Σ exp of t = scale · scores, or softcap · tanh(scale ·
// scores / softcap).
template <bool capped, class T>
void attention_softmax(T* scores, const T* rest, Wide<T>* log_sums, Wide<T> scale, Wide<T> softcap,
                       Block block) {
    using F = Wide<T>;
    const F inner = capped ? scale / softcap : scale;
#pragma omp parallel if (block.worth_sharing())
    {
        const std::unique_ptr<F[]> row(new F[std::size_t(block.keys)]);
        F* e = row.get();
#pragma omp for schedule(static) collapse(2)
        for (Size head = 0; head < block.heads; ++head) {
            for (Size query = 0; query < block.queries; ++query) {
                const Size at = (head * block.queries + query) * block.keys;
                T* s = scores + at;
                const T* more = rest ? rest + at : nullptr;
                const Size low = block.low(query), high = block.high(query);
                F highest = -std::numeric_limits<F>::infinity(), sum = 0;
#pragma omp simd reduction(max : highest)
                for (Size i = low; i < high; ++i) {
                    F t = whole(s, more, i) * inner;
                    if constexpr (capped) t = softcap * hyperbolic_tangent(t);
                    e[i] = t;
                    highest = t > highest ? t : highest;
                }
#pragma omp simd reduction(+ : sum)
                for (Size i = low; i < high; ++i) {
                    e[i] = exponential(e[i] - highest);
                    sum += e[i];
                }
                const F share = F(1) / sum;
                for (Size i = 0; i < low; ++i) s[i] = store<T>(0);
#pragma omp simd
                for (Size i = low; i < high; ++i) s[i] = store<T>(e[i] * share);
                for (Size i = high; i < block.keys; ++i) s[i] = store<T>(0);
                log_sums[head * block.length + block.first_query + query] = highest + std::log(sum);
            }
        }
    }
}

// In place, over the rows' scores and dp = dy · v: scores → p = exp(t − log_sums), and
// dp → ds = scale · p · (dp − delta), times 1 − tanh² where scores are capped.
template <bool capped, class T>
void attention_gradient(T* scores, const T* rest, T* dp, const Wide<T>* log_sums,
                        const Wide<T>* delta, Wide<T> scale, Wide<T> softcap, Block block) {
    using F = Wide<T>;
    const F inner = capped ? scale / softcap : scale;
#pragma omp parallel for schedule(static) collapse(2) if (block.worth_sharing())
    for (Size head = 0; head < block.heads; ++head) {
        for (Size query = 0; query < block.queries; ++query) {
            const Size at = (head * block.queries + query) * block.keys;
            const Size position = head * block.length + block.first_query + query;
            T *s = scores + at, *d = dp + at;
            const T* more = rest ? rest + at : nullptr;
            const F log_sum = log_sums[position], mean = delta[position];
            const Size low = block.low(query), high = block.high(query);
            for (Size i = 0; i < low; ++i) s[i] = d[i] = store<T>(0);
#pragma omp simd
            for (Size i = low; i < high; ++i) {
                F t = whole(s, more, i) * inner, slope = scale;
                if constexpr (capped) {
                    const F bent = hyperbolic_tangent(t);
                    t = softcap * bent;
                    slope *= F(1) - bent * bent;
                }
                const F p = exponential(t - log_sum);
                s[i] = store<T>(p);
                d[i] = store<T>(p * (load(d[i]) - mean) * slope);
            }
            for (Size i = high; i < block.keys; ++i) s[i] = d[i] = store<T>(0);
        }
    }
}

}  // namespace

// A softcap of 0 is none.
#define EXPORTED_ATTENTION(name, T)                                                                \
    extern "C" void attention_softmax_##name(                                                      \
        T* scores, const T* rest, Wide<T>* log_sums, double scale, double softcap, Size heads,     \
        Size queries, Size keys, Size length, Size first_query, Size first_key, Size window) {     \
        const Block block{heads, queries, keys, length, first_query, first_key, window};           \
        const auto softmax = softcap ? attention_softmax<true, T> : attention_softmax<false, T>;   \
        softmax(scores, rest, log_sums, Wide<T>(scale), Wide<T>(softcap), block);                  \
    }                                                                                              \
    extern "C" void attention_gradient_##name(                                                     \
        T* scores, const T* rest, T* dp, const Wide<T>* log_sums, const Wide<T>* delta,            \
        double scale, double softcap, Size heads, Size queries, Size keys, Size length,            \
        Size first_query, Size first_key, Size window) {                                           \
        const Block block{heads, queries, keys, length, first_query, first_key, window};           \
        const auto gradient = softcap ? attention_gradient<true, T> : attention_gradient<false, T>; \
        gradient(scores, rest, dp, log_sums, delta, Wide<T>(scale), Wide<T>(softcap), block);      \
    }
