// Attention of stacked queries over one run of keys, in tiles of 64 keys (FlashAttention's online softmax,
// arXiv 2205.14135), with scores in base 2.
//
// A tile's keys are transposed once so that sixteen keys fill a vector; its values are paired once for the bfloat16 dot
// product. All queries of a KV head (its group of heads, times the rows stacked on the run) then reuse the packed tile
// in blocks whose sums stay in registers. KV heads are the inner loop of tiles: a tile's records are in the cache for
// all of them.

#pragma once

#include <algorithm>
#include <cmath>

#include "buffer.h"
#include "simd.h"

namespace drystone {

constexpr int kVectors = 4;                   // vectors of a tile: sums that one load of a query feeds
constexpr int kTileKeys = kVectors * kLanes;  // 64
constexpr int64_t kTouchBytes = 256 << 10;     // what is brought into the cache at once: a part of its second level
constexpr float kLowest = -1e30f;             // the largest score of a query that saw no key

// Heads of one layer. Elements of a query, an output, a key or a value: `dim`, a multiple of 16.
struct Heads {
  int64_t kv, group, dim;
  int64_t all() const { return kv * group; }
};

// A run of keys of one layer, read for all its queries.
//   keys          first record; K heads, then V heads; `stride` elements from one record to the next
//   queries       [kv][kv_step] rows of `dim` elements, of which this run's `rows * group` come first
//   causal, own   not causal: every row sees every key; else row i sees keys 0..own + i (own may be negative)
//   outs, lses    float [kv][out_step] rows of `dim`, and of 1
template <typename T>
struct Run {
  const T* keys;
  int64_t stride, count, rows, own;
  bool causal;
  const T* queries;
  int64_t kv_step;
  float *outs, *lses;
  int64_t out_step;
};

// sum[q][v] += a[q][u] * b[u][v] over `units` words; b's rows are b_step words apart.
template <typename T, int Q, int V>
inline void outer(const T* a, int64_t a_step, const int32_t* b, int64_t b_step, int64_t units, Floats (&sum)[Q][V]) {
  for (int64_t u = 0; u < units; ++u) {
    Words row[V];
    for (int v = 0; v < V; ++v) row[v] = load<Words>(b + u * b_step + v * kLanes);
    for (int q = 0; q < Q; ++q) {
      const Words one = spread_word(load<int32_t>(a + q * a_step + u * kPair<T>));
      for (int v = 0; v < V; ++v) sum[q][v] = madd<T>(sum[q][v], one, row[v]);
    }
  }
}

// Keys of a tile as [words of a head][keys], zero where there is no key.
template <typename T>
inline void pack_keys(const T* keys, int64_t stride, int count, int vectors, int64_t dim, int32_t* packed) {
  const int64_t words = dim / kPair<T>;
  for (int v = 0; v < vectors; ++v) {
    for (int64_t u = 0; u < words; u += kLanes) {
      Words r[kLanes];
      const bool whole = words - u >= kLanes;
      for (int i = 0; i < kLanes; ++i) {
        r[i] = Words{};
        if (v * kLanes + i >= count) continue;
        const T* from = keys + (v * kLanes + i) * stride + u * kPair<T>;
        if (whole) r[i] = load<Words>(from);
        else std::memcpy(&r[i], from, sizeof(Words) / 2);
      }
      transpose(r);
      const int kept = whole ? kLanes : kLanes / 2;
      for (int i = 0; i < kept; ++i) store(packed + ((u + i) * vectors + v) * kLanes, r[i]);
    }
  }
}

// Values of a tile as [pairs of keys][elements], a pair in a word.
inline void pack_values(const bf16* values, int64_t stride, int count, int64_t dim, int32_t* packed) {
  for (int t = 0; t < count; t += 2) {
    const bf16* a = values + t * stride;
    const bf16* b = a + stride;
    const bool both = t + 1 < count;
    for (int64_t d = 0; d < dim; d += kLanes) {
      Words word = __builtin_convertvector(load<Halves>(a + d), Words);
      if (both) word |= __builtin_convertvector(load<Halves>(b + d), Words) << 16;
      store(packed + t / 2 * dim + d, word);
    }
  }
}

// What a run keeps of its queries from tile to tile, [kv][rows * group].
struct Softmax {
  float* largest;
  Floats* total;
};

// Weights of Q queries for a tile's keys, from scores in base 2; what came before shrinks by `shrink`.
template <typename T, int Q, int V>
inline void weigh(const T* q, int64_t dim, const int32_t* keys, float scale, const int* seen, float* largest,
                  Floats* total, T* weights, float* shrink) {
  static_assert(Q <= kLanes);
  Floats sum[Q][V] = {};
  outer<T, Q, V>(q, dim, keys, V * kLanes, dim / kPair<T>, sum);
  const Words lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  alignas(64) float drop[kLanes] = {};
  for (int i = 0; i < Q; ++i) {
    if (seen[i] < V * kLanes) {
      for (int v = 0; v < V; ++v) sum[i][v] = lane + v * kLanes < seen[i] ? sum[i][v] : spread(kLowest);
    }
    Floats most = sum[i][0];
    for (int v = 1; v < V; ++v) most = larger(most, sum[i][v]);
    const float now = std::max(largest[i], largest_of(most) * scale);
    drop[i] = largest[i] - now;
    largest[i] = now;
  }
  store(drop, exp2_of(load<Floats>(drop)));
  for (int i = 0; i < Q; ++i) {
    shrink[i] = drop[i];
    Floats all = total[i] * drop[i];
    for (int v = 0; v < V; ++v) {
      Floats weight = exp2_of(sum[i][v] * scale - largest[i]);
      if (seen[i] < V * kLanes) weight = lane + v * kLanes < seen[i] ? weight : Floats{};
      all += weight;
      narrow(weight, weights + i * kTileKeys + v * kLanes);
    }
    total[i] = all;
  }
}

template <typename T, int Q, int V>
inline void add_values(const T* weights, const int32_t* values, int64_t step, int64_t units, const float* shrink,
                       float* out, int64_t dim) {
  Floats sum[Q][V] = {};
  outer<T, Q, V>(weights, kTileKeys, values, step, units, sum);
  for (int i = 0; i < Q; ++i) {
    for (int v = 0; v < V; ++v) {
      float* at = out + i * dim + v * kLanes;
      store(at, load<Floats>(at) * shrink[i] + sum[i][v]);
    }
  }
}

// Q queries against one packed tile.
template <typename T, int Q>
inline void attend_block(const T* q, int64_t dim, const int32_t* keys, int vectors, const int32_t* values,
                         int64_t value_step, int count, float scale, const int* seen, float* largest, Floats* total,
                         float* out) {
  alignas(64) T weights[Q * kTileKeys];
  float shrink[Q];
  switch (vectors) {
    case 1: weigh<T, Q, 1>(q, dim, keys, scale, seen, largest, total, weights, shrink); break;
    case 2: weigh<T, Q, 2>(q, dim, keys, scale, seen, largest, total, weights, shrink); break;
    case 3: weigh<T, Q, 3>(q, dim, keys, scale, seen, largest, total, weights, shrink); break;
    default: weigh<T, Q, 4>(q, dim, keys, scale, seen, largest, total, weights, shrink); break;
  }
  const int64_t units = (count + kPair<T> - 1) / kPair<T>;
  int64_t d = 0;
  for (; d + 4 * kLanes <= dim; d += 4 * kLanes) {
    add_values<T, Q, 4>(weights, values + d, value_step, units, shrink, out + d, dim);
  }
  for (; d + 2 * kLanes <= dim; d += 2 * kLanes) {
    add_values<T, Q, 2>(weights, values + d, value_step, units, shrink, out + d, dim);
  }
  for (; d < dim; d += kLanes) add_values<T, Q, 1>(weights, values + d, value_step, units, shrink, out + d, dim);
}

template <typename T, int Q, typename... Rest>
inline void attend_rows(int64_t queries, Rest... rest) {
  if (queries == Q) return attend_block<T, Q>(rest...);
  if constexpr (Q > 1) attend_rows<T, Q - 1>(queries, rest...);
}

// Reads memory into the cache by several sequential streams at once, ahead of work that reads it in another order:
// the hardware prefetcher follows each stream. Software prefetches, of the next tile or run, were slower.
inline void touch(const void* from, int64_t bytes) {
  constexpr int kStreamsAtOnce = 8, kLine = 64;
  const int64_t lines = bytes / kLine / kStreamsAtOnce;
  for (int64_t i = 0; i < lines; ++i) {
    for (int s = 0; s < kStreamsAtOnce; ++s) {
      static_cast<void>(*(static_cast<const volatile char*>(from) + (s * lines + i) * kLine));
    }
  }
}

// Fills the run's outs and lses (base 2); kLowest for queries that see nothing.
template <typename T>
void attend(const Run<T>& run, const Heads& heads, float scale) {
  const int64_t dim = heads.dim, queries = run.rows * heads.group, words = dim / kPair<T>;
  const float base2 = scale * 1.44269504088896341f;
  Buffer<int32_t> keys(words * kTileKeys), values(kTileKeys / kPair<T> * dim);
  Buffer<float> largest(heads.kv * queries);
  Buffer<Floats> total(heads.kv * queries);
  std::fill_n(largest.get(), heads.kv * queries, kLowest);
  std::fill_n(total.get(), heads.kv * queries, Floats{});
  for (int64_t h = 0; h < heads.kv; ++h) std::fill_n(run.outs + h * run.out_step * dim, queries * dim, 0.f);
  const int64_t touched = std::max<int64_t>(kTouchBytes / (run.stride * sizeof(T)) / kTileKeys, 1) * kTileKeys;
  const int64_t blocks = (queries + kTileRows - 1) / kTileRows;
  for (int64_t begin = 0; begin < run.count; begin += kTileKeys) {
    const int count = static_cast<int>(std::min<int64_t>(kTileKeys, run.count - begin));
    const int vectors = (count + kLanes - 1) / kLanes;
    if (begin % touched == 0) {
      touch(run.keys + begin * run.stride, std::min(touched, run.count - begin) * run.stride * int64_t{sizeof(T)});
    }
    for (int64_t h = 0; h < heads.kv; ++h) {
      const T* k = run.keys + begin * run.stride + h * dim;
      const T* v = k + heads.kv * dim;
      pack_keys(k, run.stride, count, vectors, dim, keys.get());
      const int32_t* tile = values;
      int64_t step = dim;
      if constexpr (sizeof(T) == 2) {
        pack_values(v, run.stride, count, dim, values.get());
      } else {
        tile = reinterpret_cast<const int32_t*>(v);
        step = run.stride;
      }
      for (int64_t b = 0, at = 0; b < blocks; ++b) {
        const int64_t width = (queries - at + blocks - b - 1) / (blocks - b);
        int seen[kTileRows], most = 0;
        for (int64_t i = 0; i < width; ++i) {
          const int64_t limit = !run.causal ? count : run.own + (at + i) / heads.group + 1 - begin;
          seen[i] = static_cast<int>(std::clamp<int64_t>(limit, 0, count));
          most = std::max(most, seen[i]);
        }
        if (most > 0) {
          const int64_t q = h * queries + at;
          attend_rows<T, kTileRows>(width, run.queries + (h * run.kv_step + at) * dim, dim,
                                    static_cast<const int32_t*>(keys.get()), vectors, tile, step, count, base2,
                                    static_cast<const int*>(seen), largest + q, total + q,
                                    run.outs + (h * run.out_step + at) * dim);
        }
        at += width;
      }
    }
  }
  for (int64_t h = 0; h < heads.kv; ++h) {
    for (int64_t i = 0; i < queries; ++i) {
      const float all = sum_of(total[h * queries + i]);
      const float inverse = all > 0.f ? 1.f / all : 0.f;
      float* out = run.outs + (h * run.out_step + i) * dim;
      for (int64_t d = 0; d < dim; d += kLanes) store(out + d, load<Floats>(out + d) * inverse);
      run.lses[h * run.out_step + i] = all > 0.f ? largest[h * queries + i] + std::log2(all) : kLowest;
    }
  }
}

}  // namespace drystone
