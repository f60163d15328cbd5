// Attention of one token over the cache of its row: rotation, the cache's new entry, and the sum.

#pragma once

#include <algorithm>
#include <limits>

#include "decode.h"

namespace {

template <bool adjacent, class T>
void rotate(T* a, const T* cos, const T* sin, Size pairs) {
#pragma omp simd
    for (Size i = 0; i < pairs; ++i) {
        const Size first = adjacent ? 2 * i : i, second = adjacent ? first + 1 : i + pairs;
        const float x1 = load(a[first]), x2 = load(a[second]);
        a[first] = store<T>(x1 * load(cos[i]) - x2 * load(sin[i]));
        a[second] = store<T>(x2 * load(cos[i]) + x1 * load(sin[i]));
    }
}

// Norm and rotate the queries and keys of one token in its row of q, k and v, and write its keys and
// values, of layer number `number`, into the cache.
template <class T>
void write_cache(const Shape& shape, const Layer& layer, Size number, const KVCache& cache,
                 Size position, T* row) {
    const Size dim = shape.head_dim, group = shape.group();
    const Size at = position * layer.pairs;
    const T *cos = static_cast<const T*>(layer.cos) + at, *sin = static_cast<const T*>(layer.sin) + at;
    const T* factors = static_cast<const T*>(layer.q_factors);
    const Norm &q_norm = layer.norms[kOfQ], &k_norm = layer.norms[kOfK];
    const Columns first = columns_of(shape, layer, 0);
    const bool q_whole = q_norm.dim > dim, k_whole = k_norm.dim > dim;
    if (q_whole) apply(q_norm, row + first.q, row + first.q);
    if (k_whole) apply(k_norm, row + first.k, row + first.k);
    const auto turn = [&](T* head, const Norm& norm, bool whole) {
        if (norm.dim && !whole) apply(norm, head, head);
        layer.adjacent ? rotate<true>(head, cos, sin, layer.pairs)
                       : rotate<false>(head, cos, sin, layer.pairs);
    };
    for (Size h = 0; h < shape.key_heads; ++h) {
        const Columns columns = columns_of(shape, layer, h);
        T *q = row + columns.q, *k = row + columns.k, *v = row + columns.v;
        for (Size g = 0; g < group; ++g) turn(q + g * dim, q_norm, q_whole);
        if (factors)
            for (Size i = 0; i < group * dim; ++i) q[i] = store<T>(load(q[i]) * load(factors[position]));
        turn(k, k_norm, k_whole);
        const Size before = (number * shape.key_heads + h) * cache.capacity;
        T* keys = static_cast<T*>(cache.keys) + before * dim + position / kKeys * kKeys * dim +
                  position % kKeys;
        for (Size i = 0; i < dim; ++i) keys[i * kKeys] = k[i];
        std::copy_n(v, shape.value_dim,
                    static_cast<T*>(cache.values) + (before + position) * shape.value_dim);
    }
}

// What one key head's queries of one token need: q (queries, head_dim), keys and values of the head,
// and where their outputs (queries, value_dim) and scores (queries, capacity) go.
template <class T>
struct Attending {
    const T *q, *keys, *values;
    T* out;
    float* scores;
    const float* sinks;
    Size position, capacity, dim, value_dim;
};

// G queries over the keys up to their own.
template <int G, class T>
void attend(const Layer& layer, const Attending<T>& a) {
    const Size p = a.position, dim = a.dim, value_dim = a.value_dim, capacity = a.capacity;
    const T *q = a.q, *keys = a.keys, *values = a.values;
    float* scores = a.scores;
    const Size first = layer.window && p >= layer.window ? p - layer.window + 1 : 0;
    const float scale = float(layer.scale), softcap = float(layer.softcap);
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
                for (Size l = 0; l < kKeys; ++l)
                    acc[g][l] = plus_product(acc[g][l], by, load(block[i * kKeys + l]));
            }
        for (int g = 0; g < G; ++g)
            for (Size l = 0; l < kKeys; ++l) {
                const bool visible = key + l >= first && key + l <= p;
                const float s = acc[g][l] * scale;
                scores[g * capacity + key + l] = s;
                if (visible && s > highest[g]) highest[g] = s;
            }
    }
    for (int g = 0; g < G; ++g) {
        float* e = scores + g * capacity;
        if (layer.softcap) {
#pragma omp simd
            for (Size key = begin; key <= p; ++key) e[key] = softcap * hyperbolic_tangent(e[key] / softcap);
            highest[g] = softcap * hyperbolic_tangent(highest[g] / softcap);
        }
        if (a.sinks) highest[g] = std::max(highest[g], a.sinks[g]);
        alignas(64) float lanes[kKeys] = {};
        for (Size key = begin; key <= p; key += kKeys)
#pragma omp simd
            for (Size l = 0; l < kKeys; ++l) {
                const bool visible = key + l >= first && key + l <= p;
                const float chance = exponential(e[key + l] - highest[g]);
                e[key + l] = visible ? chance : 0.0f;
                lanes[l] += e[key + l];
            }
        float total = a.sinks ? exponential(a.sinks[g] - highest[g]) : 0.0f;
        for (Size l = 0; l < kKeys; ++l) total += lanes[l];
        highest[g] = 1.0f / total;
    }
    constexpr Size kWide = 16;
    for (Size d = 0; d < value_dim; d += kWide) {
        const Size wide = std::min(kWide, value_dim - d);
        alignas(64) float acc[G][kWide] = {};
        if (wide == kWide) {
            for (Size key = first; key <= p; ++key)
#pragma GCC unroll 8
                for (int g = 0; g < G; ++g) {
                    const float by = scores[g * capacity + key];
#pragma omp simd
                    for (Size l = 0; l < kWide; ++l)
                        acc[g][l] = plus_product(acc[g][l], by, load(values[key * value_dim + d + l]));
                }
        } else {
            for (Size key = first; key <= p; ++key)
                for (int g = 0; g < G; ++g)
                    for (Size l = 0; l < wide; ++l)
                        acc[g][l] = plus_product(acc[g][l], scores[g * capacity + key],
                                                 load(values[key * value_dim + d + l]));
        }
        for (int g = 0; g < G; ++g)
            for (Size l = 0; l < wide; ++l)
                a.out[g * value_dim + d + l] = store<T>(acc[g][l] * highest[g]);
    }
}

}  // namespace
