// One layer of a decode step on the CPU in one call: write the rows' own KV, rotate queries, attend to
// every piece, merge. Python would make some thirty calls per layer for the same.
//
// Held equal to the torch path by tests/kernels/test_native_attention.py. Compiled for the machine it runs on.
//
//   records [slots, 2 * kv_heads * D]     K heads, then V heads; a piece's layer l begins at first + l * stride
//   pieces  int64 [n, 6]                  first, stride, keys, row_first, rows, own
//                                         own = -1: every row sees every key; else row i sees keys 0..own + i
//   rows    int64 [P]                     query row of each stacked row; stacked rows are grouped by piece
//   table   int64 [R, M]                  the stacked rows of each query row, padded with P

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

constexpr int kTile = 32;   // keys whose scores are held at once
constexpr int kBlock = 4;   // queries that share one load of a key
constexpr float kLowest = -1e30f;

inline float widen(float x) { return x; }
inline float widen(at::BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.x) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}
inline void narrow(float x, float* out) { *out = x; }
inline void narrow(float x, at::BFloat16* out) { *out = at::BFloat16(x); }

// e^x for x <= 0, to 2 ulp, in a form that compilers vectorise (Cephes expf: range reduction by ln 2, then a polynomial).
inline float exp_nonpositive(float x) {
  x = std::max(x, -87.f);
  const float n = std::nearbyintf(x * 1.44269504088896341f);
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return p * power;
}

struct Piece {
  int64_t first, stride, keys, row_first, rows, own;
};

// Attention of `nq` queries (row-major [row, group]) over one piece and one KV head.
template <typename scalar, int D>
void attend_piece(const scalar* keys, const scalar* values, int64_t stride, const Piece& piece, int64_t group,
                  const float* queries, int64_t row_step, float scale, float* outs, float* lses, int64_t heads) {
  const int64_t nq = piece.rows * group;
  std::vector<float> largest(nq, kLowest), total(nq, 0.f), sums(nq * D, 0.f);
  alignas(64) float k_tile[kTile][D];
  alignas(64) float v_tile[kTile][D];
  alignas(64) float scores[kBlock][kTile];
  for (int64_t begin = 0; begin < piece.keys; begin += kTile) {
    const int count = static_cast<int>(std::min<int64_t>(kTile, piece.keys - begin));
    for (int t = 0; t < count; ++t) {
      const scalar* k = keys + (begin + t) * stride;
      const scalar* v = values + (begin + t) * stride;
#pragma omp simd
      for (int d = 0; d < D; ++d) {
        k_tile[t][d] = widen(k[d]);
        v_tile[t][d] = widen(v[d]);
      }
    }
    for (int64_t block = 0; block < nq; block += kBlock) {
      const int width = static_cast<int>(std::min<int64_t>(kBlock, nq - block));
      const float* q[kBlock];
      int seen[kBlock];
      for (int i = 0; i < width; ++i) {
        const int64_t row = (block + i) / group;
        q[i] = queries + row * row_step + (block + i) % group * D;
        seen[i] = piece.own < 0 ? count : static_cast<int>(std::clamp<int64_t>(piece.own + row + 1 - begin, 0, count));
      }
      for (int i = 0; i < width; ++i) {
        alignas(64) float held[D];
        std::copy(q[i], q[i] + D, held);
        for (int t = 0; t < count; ++t) {
          float dot = 0.f;
#pragma omp simd reduction(+ : dot)
          for (int d = 0; d < D; ++d) dot += held[d] * k_tile[t][d];
          scores[i][t] = dot * scale;
        }
      }
      for (int i = 0; i < width; ++i) {
        if (!seen[i]) continue;
        const int64_t at = block + i;
        float most = largest[at];
        for (int t = 0; t < seen[i]; ++t) most = std::max(most, scores[i][t]);
        const float shrink = exp_nonpositive(largest[at] - most);
        float sum = 0.f;
#pragma omp simd reduction(+ : sum)
        for (int t = 0; t < seen[i]; ++t) {
          scores[i][t] = exp_nonpositive(scores[i][t] - most);
          sum += scores[i][t];
        }
        total[at] = total[at] * shrink + sum;
        largest[at] = most;
        alignas(64) float held[D];
        float* out = sums.data() + at * D;
#pragma omp simd
        for (int d = 0; d < D; ++d) held[d] = out[d] * shrink;
        for (int t = 0; t < seen[i]; ++t) {
          const float weight = scores[i][t];
#pragma omp simd
          for (int d = 0; d < D; ++d) held[d] += weight * v_tile[t][d];
        }
#pragma omp simd
        for (int d = 0; d < D; ++d) out[d] = held[d];
      }
    }
  }
  for (int64_t at = 0; at < nq; ++at) {
    const int64_t row = at / group, head = at % group;
    float* out = outs + row * row_step + head * D;
    const float inverse = total[at] > 0.f ? 1.f / total[at] : 0.f;
    for (int d = 0; d < D; ++d) out[d] = sums[at * D + d] * inverse;
    lses[row * heads + head] = total[at] > 0.f ? largest[at] + std::log(total[at]) : kLowest;
  }
}

enum Kind { kNone = 0, kHalf = 1, kInterleaved = 2 };

// Copies a query into its stacked row, turned by (cos, sin) [rotary] in float32; rounds as the torch path does.
template <typename scalar>
void turn(const scalar* q, float* out, int64_t dim, const float* cosine, const float* sine, int64_t rotary, int64_t kind) {
  for (int64_t d = 0; d < dim; ++d) out[d] = widen(q[d]);
  if (cosine == nullptr || kind == kNone) return;
  std::vector<float> turned(rotary);
  for (int64_t d = 0; d < rotary; ++d) {
    float quarter;
    if (kind == kHalf) quarter = d < rotary / 2 ? -out[d + rotary / 2] : out[d - rotary / 2];
    else quarter = d % 2 == 0 ? -out[d + 1] : out[d - 1];
    turned[d] = out[d] * cosine[d] + quarter * sine[d];
  }
  std::copy(turned.begin(), turned.end(), out);
}

template <typename scalar, int D>
at::Tensor run(at::Tensor records, int64_t layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
               const at::Tensor& slots, int64_t tail_stride, const at::Tensor& pieces, const at::Tensor& rows,
               const at::Tensor& cosine, const at::Tensor& sine, int64_t kind, const at::Tensor& table, double scale) {
  const int64_t count = q.size(0), heads = q.size(1), kv_heads = k.size(1), group = heads / kv_heads;
  const int64_t stride = records.size(1), stacked = rows.size(0), turned = cosine.size(0);
  scalar* base = records.data_ptr<scalar>();
  const scalar* qs = q.const_data_ptr<scalar>();
  for (int64_t r = 0; r < count; ++r) {
    scalar* own = base + (slots.const_data_ptr<int64_t>()[r] + layer * tail_stride) * stride;
    std::memcpy(own, k.const_data_ptr<scalar>() + r * kv_heads * D, kv_heads * D * sizeof(scalar));
    std::memcpy(own + kv_heads * D, v.const_data_ptr<scalar>() + r * kv_heads * D, kv_heads * D * sizeof(scalar));
  }
  std::vector<float> queries(stacked * heads * D), outs(stacked * heads * D), lses(stacked * heads);
  const int64_t* row_of = rows.const_data_ptr<int64_t>();
  const float* cos_data = cosine.const_data_ptr<float>();
  const float* sin_data = sine.const_data_ptr<float>();
  const int64_t rotary = turned ? cosine.size(1) : 0;
  at::parallel_for(0, stacked, 64, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t h = 0; h < heads; ++h) {
        turn(qs + (row_of[p] * heads + h) * D, queries.data() + (p * heads + h) * D, D,
             p < turned ? cos_data + p * rotary : nullptr, sin_data + p * rotary, rotary, kind);
      }
    }
  });
  const Piece* list = reinterpret_cast<const Piece*>(pieces.const_data_ptr<int64_t>());
  at::parallel_for(0, pieces.size(0) * kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const Piece& piece = list[job / kv_heads];
      const int64_t head = job % kv_heads, at = piece.row_first * heads + head * group;
      const scalar* keys = base + (piece.first + layer * piece.stride) * stride + head * D;
      attend_piece<scalar, D>(keys, keys + kv_heads * D, stride, piece, group, queries.data() + at * D, heads * D,
                              static_cast<float>(scale), outs.data() + at * D, lses.data() + at, heads);
    }
  });
  at::Tensor merged = at::empty_like(q);
  scalar* out = merged.data_ptr<scalar>();
  const int64_t most = table.size(1);
  const int64_t* of_row = table.const_data_ptr<int64_t>();
  at::parallel_for(0, count * heads, 64, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t r = job / heads, h = job % heads;
      float largest = kLowest, total = 0.f, sum[D] = {};
      for (int64_t i = 0; i < most && of_row[r * most + i] < stacked; ++i) {
        largest = std::max(largest, lses[of_row[r * most + i] * heads + h]);
      }
      for (int64_t i = 0; i < most && of_row[r * most + i] < stacked; ++i) {
        const int64_t p = of_row[r * most + i];
        const float weight = exp_nonpositive(lses[p * heads + h] - largest);
        const float* part = outs.data() + (p * heads + h) * D;
        total += weight;
#pragma omp simd
        for (int d = 0; d < D; ++d) sum[d] += weight * part[d];
      }
      for (int d = 0; d < D; ++d) narrow(sum[d] / total, out + (r * heads + h) * D + d);
    }
  });
  return merged;
}

at::Tensor step_attention(at::Tensor records, int64_t layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& slots, int64_t tail_stride, const at::Tensor& pieces, const at::Tensor& rows,
                          const at::Tensor& cosine, const at::Tensor& sine, int64_t kind, const at::Tensor& table,
                          double scale) {
  TORCH_CHECK(q.is_contiguous() && k.is_contiguous() && v.is_contiguous(), "q, k, v must be contiguous");
  auto by_dim = [&](auto zero) {
    using scalar = decltype(zero);
    switch (q.size(2)) {
#define DRYSTONE_DIM(D) \
  case D:               \
    return run<scalar, D>(records, layer, q, k, v, slots, tail_stride, pieces, rows, cosine, sine, kind, table, scale)
      DRYSTONE_DIM(16);
      DRYSTONE_DIM(32);
      DRYSTONE_DIM(64);
      DRYSTONE_DIM(80);
      DRYSTONE_DIM(96);
      DRYSTONE_DIM(128);
      DRYSTONE_DIM(256);
#undef DRYSTONE_DIM
      default:
        TORCH_CHECK(false, "head_dim ", q.size(2), " has no kernel");
    }
  };
  if (records.scalar_type() == at::kFloat) return by_dim(float{});
  TORCH_CHECK(records.scalar_type() == at::kBFloat16, "no kernel for this dtype");
  return by_dim(at::BFloat16{});
}

}  // namespace

TORCH_LIBRARY(drystone, m) {
  m.def(
      "step_attention(Tensor(a!) records, int layer, Tensor q, Tensor k, Tensor v, Tensor slots, int tail_stride, "
      "Tensor pieces, Tensor rows, Tensor cosine, Tensor sine, int kind, Tensor table, float scale) -> Tensor");
  m.impl("step_attention", c10::DispatchKey::CPU, TORCH_FN(step_attention));
}
