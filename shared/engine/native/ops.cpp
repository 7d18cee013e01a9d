// The operators that torch sees, and their checks: tensors become pointers here and nowhere else.
//
//   step_attention   one layer's attention of a step, for any model that reaches the seam
//   decoder_step     a run of layers of a step of a model whose structure was proved (shared/engine/native/decoder.py):
//                    all of them in one call, or in several, with the rows' state between them in `hidden`
//
// Held equal to the torch path by tests/kernels/native. Compiled for the machine it runs on.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "decoder.h"

#ifndef DRYSTONE_LIBRARY
#define DRYSTONE_LIBRARY drystone
#endif

namespace drystone {
namespace {

template <typename T>
T* data(const at::Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}
template <typename T>
const T* read(const at::Tensor& tensor) {
  return tensor.numel() ? static_cast<const T*>(tensor.const_data_ptr()) : nullptr;
}
void whole(const at::Tensor& tensor, at::ScalarType type, const char* name) {
  TORCH_CHECK(tensor.is_contiguous() && tensor.scalar_type() == type, name, " must be contiguous ", type);
}

void within(const at::Tensor& indexes, int64_t end, const char* name) {
  for (int64_t i = 0; i < indexes.numel(); ++i) {
    const int64_t at = read<int64_t>(indexes)[i];
    TORCH_CHECK(at >= 0 && at < end, name, ": ", at, " is not below ", end);
  }
}

// What both operators take of a plan: see step.h.
struct Plan {
  const at::Tensor &slots, &pieces, &rows, &cosine, &sine;
  int64_t kind;

  void check(int64_t query_rows) const {
    for (const at::Tensor* table : {&slots, &pieces, &rows}) whole(*table, at::kLong, "plan tables");
    whole(cosine, at::kFloat, "cosines");
    whole(sine, at::kFloat, "sines");
    TORCH_CHECK(slots.size(0) == query_rows && pieces.size(1) == 6 && cosine.sizes() == sine.sizes(), "plan shapes");
  }

  // Every record that a layer reads or writes lies in `records`.
  void check_records(int64_t records, int64_t layer, int64_t slot_step) const {
    for (int64_t i = 0; i < slots.size(0); ++i) {
      const int64_t at = read<int64_t>(slots)[i] + layer * slot_step;
      TORCH_CHECK(at >= 0 && at < records, "slot ", at, " of ", records);
    }
    const Piece* list = reinterpret_cast<const Piece*>(read<int64_t>(pieces));
    int64_t stacked = 0;
    for (int64_t p = 0; p < pieces.size(0); ++p) {
      const int64_t begin = list[p].first + layer * list[p].stride;
      TORCH_CHECK(begin >= 0 && list[p].keys >= 0 && begin + list[p].keys <= records, "piece ", p, " of ", records);
      TORCH_CHECK(list[p].row_first == stacked && list[p].rows > 0, "pieces must tile the stacked rows");
      stacked += list[p].rows;
    }
    TORCH_CHECK(stacked == rows.size(0) && (cosine.numel() == 0 || cosine.size(0) <= stacked), "stacked rows");
    within(rows, slots.size(0), "rows");
  }

  template <typename T>
  Step<T> step(const Heads& heads) const {
    const Turns turns{read<float>(cosine), read<float>(sine), cosine.numel() ? cosine.size(0) : 0,
                      cosine.numel() ? cosine.size(1) : 0, kind};
    return Step<T>(reinterpret_cast<const Piece*>(read<int64_t>(pieces)), pieces.size(0), read<int64_t>(rows),
                   rows.size(0), slots.size(0), heads, turns);
  }
};

template <typename F>
void by_type(at::ScalarType type, const F& work) {
  if (type == at::kFloat) return work(float{});
  TORCH_CHECK(type == at::kBFloat16, "no kernel for ", type);
  return work(bf16{});
}

at::Tensor step_attention(at::Tensor records, int64_t layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& slots, int64_t slot_step, const at::Tensor& pieces, const at::Tensor& rows,
                          const at::Tensor& cosine, const at::Tensor& sine, int64_t kind, double scale) {
  for (const at::Tensor* x : {&q, &k, &v}) whole(*x, records.scalar_type(), "q, k, v");
  const Heads heads{k.size(1), q.size(1) / k.size(1), q.size(2)};
  TORCH_CHECK(heads.dim % kLanes == 0 && heads.dim <= 256, "head_dim ", heads.dim, " has no kernel");
  const Plan plan{slots, pieces, rows, cosine, sine, kind};
  plan.check(q.size(0));
  plan.check_records(records.size(0), layer, slot_step);
  TORCH_CHECK(records.is_contiguous() && records.size(1) == 2 * heads.kv * heads.dim && scale > 0, "records and scale");
  at::Tensor out = at::empty_like(q);
  by_type(records.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const int64_t width = heads.kv * heads.dim;
    for (int64_t r = 0; r < q.size(0); ++r) {
      T* own = data<T>(records) + (read<int64_t>(slots)[r] + layer * slot_step) * 2 * width;
      std::memcpy(own, read<T>(k) + r * width, width * sizeof(T));
      std::memcpy(own + width, read<T>(v) + r * width, width * sizeof(T));
    }
    Step<T> step = plan.step<T>(heads);
    step.attend_layer(read<T>(records), 2 * width, layer, read<T>(q), heads.all() * heads.dim,
                      static_cast<float>(scale), data<T>(out));
  });
  return out;
}

at::Tensor decoder_step(at::Tensor records, at::Tensor hidden, const at::Tensor& ids, const at::Tensor& keep,
                        const at::Tensor& positions_cos, const at::Tensor& positions_sin, const at::Tensor& slots,
                        int64_t slot_step, const at::Tensor& pieces, const at::Tensor& rows, const at::Tensor& cosine,
                        const at::Tensor& sine, int64_t kind, at::TensorList weights, int64_t first, int64_t last,
                        const at::Tensor& embeddings, const at::Tensor& norm, const at::Tensor& head, int64_t kv_heads,
                        int64_t head_dim, double epsilon, double scale) {
  const int64_t m = ids.size(0), layers = static_cast<int64_t>(weights.size()) / kLayerTensors;
  TORCH_CHECK(static_cast<int64_t>(weights.size()) == layers * kLayerTensors && layers > 0, "weights of a layer");
  TORCH_CHECK(first >= 0 && first < last && last <= layers, "layers ", first, " to ", last, " of ", layers);
  const Heads heads{kv_heads, weights[1].size(0) / head_dim / kv_heads, head_dim};
  const Sizes sizes{embeddings.size(1), weights[12].size(0), head.size(0), heads, static_cast<float>(epsilon),
                    static_cast<float>(scale)};
  const Plan plan{slots, pieces, rows, cosine, sine, kind};
  plan.check(m);
  for (int64_t layer : {int64_t{0}, layers - 1}) plan.check_records(records.size(0), layer, slot_step);
  TORCH_CHECK(records.is_contiguous() && records.size(1) == 2 * kv_heads * head_dim, "records");
  whole(ids, at::kLong, "ids");
  whole(keep, at::kLong, "keep");
  whole(positions_cos, at::kFloat, "cosines");
  whole(positions_sin, at::kFloat, "sines");
  TORCH_CHECK(positions_cos.size(0) == m && positions_sin.sizes() == positions_cos.sizes(), "a row of cosines for each id");
  within(ids, embeddings.size(0), "ids");
  within(keep, m, "keep");
  TORCH_CHECK(scale > 0 && kind >= kNone && kind <= kInterleaved, "scale and kind");
  const bool ends = last == layers;
  if (first > 0 || !ends) {
    whole(hidden, at::kFloat, "hidden");
    TORCH_CHECK(hidden.dim() == 2 && hidden.size(0) == m && hidden.size(1) == sizes.hidden, "hidden rows");
  }
  at::Tensor out = at::empty({ends ? keep.size(0) : 0, sizes.vocabulary}, at::kFloat);
  by_type(records.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Step<T> step = plan.step<T>(heads);
    Pass<T> pass(sizes, m, keep.size(0));
    if (first == 0) {
      pass.embed(read<T>(embeddings), read<int64_t>(ids));
    } else {
      pass.resume(read<float>(hidden));
    }
    for (int64_t l = first; l < last; ++l) {
      const T* of[kLayerTensors];
      for (int i = 0; i < kLayerTensors; ++i) of[i] = read<T>(weights[l * kLayerTensors + i]);
      Layer<T> layer;
      static_assert(sizeof(layer) == sizeof(of));
      std::memcpy(&layer, of, sizeof(of));
      pass.enter(layer, read<float>(positions_cos), read<float>(positions_sin), positions_cos.size(1), data<T>(records),
                 read<int64_t>(slots), l * slot_step);
      // Nothing is read of the last layer's output when no row is kept: its KV was all that was asked for.
      if (l + 1 == layers && keep.size(0) == 0) break;
      pass.attend(step, read<T>(records), l);
      if (l + 1 == layers) pass.keep(read<int64_t>(keep), keep.size(0));
      pass.leave(layer);
    }
    if (!ends) return pass.pause(data<float>(hidden));
    if (keep.size(0)) pass.logits(read<T>(norm), read<T>(head), data<float>(out));
  });
  return out;
}

}  // namespace
}  // namespace drystone

TORCH_LIBRARY(DRYSTONE_LIBRARY, m) {
  m.def(
      "step_attention(Tensor(a!) records, int layer, Tensor q, Tensor k, Tensor v, Tensor slots, int slot_step, "
      "Tensor pieces, Tensor rows, Tensor cosine, Tensor sine, int kind, float scale) -> Tensor");
  m.impl("step_attention", c10::DispatchKey::CPU, TORCH_FN(drystone::step_attention));
  m.def(
      "decoder_step(Tensor(a!) records, Tensor(b!) hidden, Tensor ids, Tensor keep, Tensor positions_cos, "
      "Tensor positions_sin, Tensor slots, int slot_step, Tensor pieces, Tensor rows, Tensor cosine, Tensor sine, "
      "int kind, Tensor[] weights, int first, int last, Tensor embeddings, Tensor norm, Tensor head, int kv_heads, "
      "int head_dim, float epsilon, float scale) -> Tensor");
  m.impl("decoder_step", c10::DispatchKey::CPU, TORCH_FN(drystone::decoder_step));
}
