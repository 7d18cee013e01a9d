// A whole step of a pre-norm decoder: embeddings, layers, final norm, logits of the rows that are kept.
//
// The residual stream and every sum are float; what is multiplied is rounded to the weights' type once.

#pragma once

#include <initializer_list>

#include "linear.h"
#include "step.h"

namespace drystone {

// Weights of one layer; null where the model has none.
template <typename T>
struct Layer {
  const T *norm, *q, *k, *v, *q_bias, *k_bias, *v_bias, *q_norm, *k_norm, *o, *o_bias;
  const T *mlp_norm, *gate, *up, *down, *gate_bias, *up_bias, *down_bias;
};
constexpr int kLayerTensors = 18;

struct Sizes {
  int64_t hidden, inner, vocabulary;
  Heads heads;
  float epsilon, scale;
  int64_t q_width() const { return heads.all() * heads.dim; }
  int64_t kv_width() const { return heads.kv * heads.dim; }
};

// out = x / rms(x) * weight, elements a multiple of 16 (Zhang & Sennrich, arXiv 1910.07467). In place for float.
template <typename T, typename Out>
inline void rms_norm(const float* x, const T* weight, int64_t width, float epsilon, Out* out) {
  Floats squares = {};
  for (int64_t d = 0; d < width; d += kLanes) {
    const Floats v = load<Floats>(x + d);
    squares = v * v + squares;
  }
  const float inverse = 1.f / std::sqrt(sum_of(squares) / static_cast<float>(width) + epsilon);
  for (int64_t d = 0; d < width; d += kLanes) narrow(load<Floats>(x + d) * inverse * widen(weight + d), out + d);
}

template <typename T>
inline void add_bias(float* x, const T* bias, int64_t width) {
  if (!bias) return;
  for (int64_t d = 0; d < width; d += kLanes) store(x + d, load<Floats>(x + d) + widen(bias + d));
}

// x sigmoid(x)
inline Floats silu(Floats x) {
  const Floats low = x < spread(-87.f) ? spread(-87.f) : x;
  return x / (1.f + exp2_of(low * -1.44269504088896341f));
}

// One of several matrices that multiply the same rows: y [m, n] = x [m, k] · w [n, k]ᵀ.
template <typename T>
struct Matrix {
  const T* w;
  int64_t n;
  float* y;
};

// All matrices in one parallel loop; rows of every y are y_step apart. Each thread takes a run of columns.
template <typename T>
void project(std::initializer_list<Matrix<T>> matrices, int64_t k, const T* x, int64_t m, int64_t y_step) {
  constexpr int64_t kColumns = kStreams * kSteps;
  const int64_t blocks = (m + kRows - 1) / kRows;
  int64_t all = 0;
  for (const Matrix<T>& matrix : matrices) all += (matrix.n + kColumns - 1) / kColumns;
  spread_out(all, 4, [&](int64_t begin, int64_t end) {
    int64_t first = 0;
    for (const Matrix<T>& matrix : matrices) {
      const int64_t from = std::max<int64_t>(begin - first, 0) * kColumns, to = std::min((end - first) * kColumns, matrix.n);
      first += (matrix.n + kColumns - 1) / kColumns;
      for (int64_t b = 0; b < blocks && from < to; ++b) {
        const int64_t row = m * b / blocks, rows = m * (b + 1) / blocks - row;
        linear(matrix.w, from, to, k, x + row * k, rows, matrix.y + row * y_step, y_step);
      }
    }
  });
}

// One pass of `m` rows through all layers.
//   slots    record of each row's own KV in layer 0; layer l lies l * slot_step further
//   cosine, sine   float [m, width]: the model's own rotary tables (its attention scaling included)
template <typename T>
class Pass {
 public:
  // `kept` rows go on to logits: more than m when a row is asked for twice.
  Pass(const Sizes& sizes, int64_t m, int64_t kept)
      : sizes_(sizes), m_(m), most_(std::max(m, kept)), row_(sizes.q_width() + 2 * sizes.kv_width()),
        x_(most_ * sizes.hidden), y_(most_ * sizes.hidden), h_(most_ * sizes.hidden), qkv_(m * row_),
        mixed_(m * sizes.q_width()), gate_(most_ * sizes.inner), up_(most_ * sizes.inner), act_(most_ * sizes.inner) {}

  void embed(const T* table, const int64_t* ids) {
    for (int64_t r = 0; r < m_; ++r) {
      const T* from = table + ids[r] * sizes_.hidden;
      for (int64_t d = 0; d < sizes_.hidden; d += kLanes) store(x_ + r * sizes_.hidden + d, widen(from + d));
    }
  }

  // The rows' state between two layers, float [m, hidden]: what `pause` wrote, another pass of the same rows resumes.
  void resume(const float* hidden) { std::copy_n(hidden, m_ * sizes_.hidden, x_.get()); }
  void pause(float* hidden) const { std::copy_n(x_.get(), m_ * sizes_.hidden, hidden); }

  // Queries, keys and values of the rows; keys and values go into their records.
  void enter(const Layer<T>& layer, const float* cosine, const float* sine, int64_t width, T* records, const int64_t* slots,
             int64_t offset) {
    const int64_t qw = sizes_.q_width(), kw = sizes_.kv_width(), hidden = sizes_.hidden;
    norm(layer.norm);
    project<T>({{layer.q, qw, qkv_}, {layer.k, kw, qkv_ + qw}, {layer.v, kw, qkv_ + qw + kw}}, hidden, h_, m_, row_);
    spread_out(m_, 8, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        float* q = qkv_ + r * row_;
        add_bias(q, layer.q_bias, qw);
        add_bias(q + qw, layer.k_bias, kw);
        add_bias(q + qw + kw, layer.v_bias, kw);
        for (int64_t h = 0; h < sizes_.heads.all() + sizes_.heads.kv; ++h) {
          const T* weight = h < sizes_.heads.all() ? layer.q_norm : layer.k_norm;
          float* head = q + h * sizes_.heads.dim;
          if (weight) rms_norm(head, weight, sizes_.heads.dim, sizes_.epsilon, head);
          turn(head, cosine + r * width, sine + r * width, width, kHalf);
        }
        T* own = records + (slots[r] + offset) * 2 * kw;
        for (int64_t d = 0; d < 2 * kw; d += kLanes) narrow(load<Floats>(q + qw + d), own + d);
      }
    });
  }

  void attend(Step<T>& step, const T* records, int64_t layer) {
    step.attend_layer(records, 2 * sizes_.kv_width(), layer, static_cast<const float*>(qkv_.get()), row_, sizes_.scale,
                      mixed_.get());
  }

  void leave(const Layer<T>& layer) {
    const int64_t hidden = sizes_.hidden, inner = sizes_.inner;
    project<T>({{layer.o, hidden, y_}}, sizes_.q_width(), mixed_, m_, hidden);
    add(layer.o_bias);
    norm(layer.mlp_norm);
    project<T>({{layer.gate, inner, gate_}, {layer.up, inner, up_}}, hidden, h_, m_, inner);
    spread_out(m_, 8, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        float *gate = gate_ + r * inner, *up = up_ + r * inner;
        add_bias(gate, layer.gate_bias, inner);
        add_bias(up, layer.up_bias, inner);
        for (int64_t d = 0; d < inner; d += kLanes) {
          narrow(silu(load<Floats>(gate + d)) * load<Floats>(up + d), act_ + r * inner + d);
        }
      }
    });
    project<T>({{layer.down, hidden, y_}}, inner, act_, m_, hidden);
    add(layer.down_bias);
  }

  // Goes on with the rows `keep` alone, in that order: of the last layer nothing else is read.
  void keep(const int64_t* keep, int64_t kept) {
    gather(x_, keep, kept, sizes_.hidden);
    gather(mixed_, keep, kept, sizes_.q_width());
    m_ = kept;
  }

  void logits(const T* weight, const T* head, float* out) {
    norm(weight);
    project<T>({{head, sizes_.vocabulary, out}}, sizes_.hidden, h_, m_, sizes_.vocabulary);
  }

 private:
  void norm(const T* weight) {
    const int64_t hidden = sizes_.hidden;
    spread_out(m_, 8, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) rms_norm(x_ + r * hidden, weight, hidden, sizes_.epsilon, h_ + r * hidden);
    });
  }

  template <typename E>
  void gather(Buffer<E>& rows, const int64_t* from, int64_t count, int64_t width) const {
    Buffer<E> kept(count * width);
    for (int64_t i = 0; i < count; ++i) std::copy_n(rows + from[i] * width, width, kept + i * width);
    rows = std::move(kept);
  }

  void add(const T* bias) {
    const int64_t hidden = sizes_.hidden;
    spread_out(m_, 8, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        float* y = y_ + r * hidden;
        add_bias(y, bias, hidden);
        float* x = x_ + r * hidden;
        for (int64_t d = 0; d < hidden; d += kLanes) store(x + d, load<Floats>(x + d) + load<Floats>(y + d));
      }
    });
  }

  Sizes sizes_;
  int64_t m_, most_, row_;
  Buffer<float> x_, y_;
  Buffer<T> h_;
  Buffer<float> qkv_;
  Buffer<T> mixed_;
  Buffer<float> gate_, up_;
  Buffer<T> act_;
};

}  // namespace drystone
