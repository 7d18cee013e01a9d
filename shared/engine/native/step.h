// The pieces of a step, cut into runs; queries laid out for them; partial outputs merged.
//
//   pieces  int64 [n, 6]   first, stride, keys, row_first, rows, own. Layer l's keys begin at record first + l * stride.
//                          own = -1: every row sees every key; else row i sees keys 0..own + i
//   rows    int64 [P]      query row of each stacked row; stacked rows are grouped by piece

#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <optional>
#include <vector>

#include "attention.h"

namespace drystone {

// Calls work(begin, end) over [0, count) on torch's threads, at least `grain` at a time.
template <typename F>
void spread_out(int64_t count, int64_t grain, const F& work) {
  if (count > 0) at::parallel_for(0, count, grain, work);
}

struct Piece {
  int64_t first, stride, keys, row_first, rows, own;
};

enum Turn : int64_t { kNone = 0, kHalf = 1, kInterleaved = 2 };

// How stacked queries are turned: float cosines and sines [turned][width] of the first `turned` stacked rows.
struct Turns {
  const float *cosine, *sine;
  int64_t turned, width, kind;
};

// q[0..width) turned by (cosine, sine) [width] in float, in place; the rest of the head passes through.
inline void turn(float* q, const float* cosine, const float* sine, int64_t width, int64_t kind) {
  if (kind == kHalf) {
    const int64_t half = width / 2;
    float* other = q + half;
    int64_t d = 0;
    for (; d + kLanes <= half; d += kLanes) {
      const Floats a = load<Floats>(q + d), b = load<Floats>(other + d);
      store(q + d, a * load<Floats>(cosine + d) - b * load<Floats>(sine + d));
      store(other + d, b * load<Floats>(cosine + half + d) + a * load<Floats>(sine + half + d));
    }
    for (; d < half; ++d) {
      const float a = q[d], b = other[d];
      q[d] = a * cosine[d] - b * sine[d];
      other[d] = b * cosine[half + d] + a * sine[half + d];
    }
  } else if (kind == kInterleaved) {
    for (int64_t d = 0; d < width; d += 2) {
      const float a = q[d], b = q[d + 1];
      q[d] = a * cosine[d] - b * sine[d];
      q[d + 1] = b * cosine[d + 1] + a * sine[d + 1];
    }
  }
}

// A step's work for one layer after another. Holds scratch for one layer's partials.
template <typename T>
class Step {
 public:
  Step(const Piece* pieces, int64_t count, const int64_t* rows, int64_t stacked, int64_t query_rows, const Heads& heads,
       const Turns& turns)
      : pieces_(pieces), rows_(rows), stacked_(stacked), query_rows_(query_rows), heads_(heads), turns_(turns),
        starts_(query_rows + 1, 0), queries_(stacked * heads.all() * heads.dim) {
    cut(count);
    index();
    outs_.emplace(partials_ * heads.all() * heads.dim);
    lses_.emplace(partials_ * heads.all());
  }

  // out [rows, heads, dim] = attention of `q` (Q: float or T), [rows] of q_step elements.
  template <typename Q>
  void attend_layer(const T* records, int64_t record, int64_t layer, const Q* q, int64_t q_step, float scale, T* out) {
    lay(q, q_step);
    run(records, record, layer, scale);
    merge(out);
  }

 private:
  struct Job {
    int64_t piece, begin, keys, partial;
  };

  // Cuts pieces into runs: one a piece on one thread; on more, so many that threads end together.
  void cut(int64_t count) {
    int64_t cost = 0;
    for (int64_t p = 0; p < count; ++p) cost += cost_of(pieces_[p]);
    const int64_t threads = at::get_num_threads();
    const int64_t share = threads > 1 ? std::max<int64_t>(cost / (4 * threads), 1) : cost + 1;
    for (int64_t p = 0; p < count; ++p) {
      const Piece& piece = pieces_[p];
      const int64_t tiles = (piece.keys + kTileKeys - 1) / kTileKeys;
      const int64_t wanted = std::clamp<int64_t>(cost_of(piece) / share, 1, std::max<int64_t>(tiles, 1));
      for (int64_t part = 0; part < wanted; ++part) {
        const int64_t begin = tiles * part / wanted * kTileKeys;
        const int64_t end = std::min(tiles * (part + 1) / wanted * kTileKeys, piece.keys);
        jobs_.push_back({p, begin, end - begin, partials_});
        partials_ += piece.rows;
      }
    }
  }

  static int64_t cost_of(const Piece& piece) { return piece.keys * (piece.rows + 4); }

  // The partials of each query row, by row.
  void index() {
    for (const Job& job : jobs_) {
      const Piece& piece = pieces_[job.piece];
      for (int64_t i = 0; i < piece.rows; ++i) ++starts_[rows_[piece.row_first + i] + 1];
    }
    for (int64_t r = 0; r < query_rows_; ++r) starts_[r + 1] += starts_[r];
    of_row_.resize(partials_);
    std::vector<int64_t> next(starts_.begin(), starts_.end() - 1);
    for (const Job& job : jobs_) {
      const Piece& piece = pieces_[job.piece];
      for (int64_t i = 0; i < piece.rows; ++i) of_row_[next[rows_[piece.row_first + i]]++] = job.partial + i;
    }
  }

  template <typename Q>
  void lay(const Q* q, int64_t q_step) {
    const int64_t group = heads_.group, dim = heads_.dim;
    spread_out(stacked_, 16, [&](int64_t begin, int64_t end) {
      Buffer<float> one(dim);
      for (int64_t p = begin; p < end; ++p) {
        for (int64_t h = 0; h < heads_.all(); ++h) {
          const Q* from = q + rows_[p] * q_step + h * dim;
          for (int64_t d = 0; d < dim; d += kLanes) store(one + d, widen(from + d));
          if (p < turns_.turned) {
            turn(one, turns_.cosine + p * turns_.width, turns_.sine + p * turns_.width, turns_.width, turns_.kind);
          }
          T* to = queries_ + ((h / group * stacked_ + p) * group + h % group) * dim;
          for (int64_t d = 0; d < dim; d += kLanes) narrow(load<Floats>(one + d), to + d);
        }
      }
    });
  }

  void run(const T* records, int64_t record, int64_t layer, float scale) {
    const int64_t group = heads_.group, dim = heads_.dim, count = static_cast<int64_t>(jobs_.size());
    std::atomic<int64_t> taken{0};
    spread_out(at::get_num_threads(), 1, [&](int64_t, int64_t) {
      for (int64_t at = taken++; at < count; at = taken++) {
        const Job& job = jobs_[at];
        const Piece& piece = pieces_[job.piece];
        Run<T> run;
        run.keys = records + (piece.first + layer * piece.stride + job.begin) * record;
        run.stride = record;
        run.count = job.keys;
        run.rows = piece.rows;
        run.causal = piece.own >= 0;
        run.own = piece.own - job.begin;
        run.queries = queries_ + piece.row_first * group * dim;
        run.kv_step = stacked_ * group;
        run.outs = *outs_ + job.partial * group * dim;
        run.lses = *lses_ + job.partial * group;
        run.out_step = partials_ * group;
        attend(run, heads_, scale);
      }
    });
  }

  void merge(T* out) const {
    const int64_t group = heads_.group, dim = heads_.dim, all = heads_.all();
    spread_out(query_rows_ * all, 64, [&](int64_t begin, int64_t end) {
      Buffer<float> sums(dim);
      for (int64_t at = begin; at < end; ++at) {
        const int64_t r = at / all, h = at % all;
        const auto place = [&](int64_t i) { return (h / group * partials_ + of_row_[i]) * group + h % group; };
        float largest = kLowest, total = 0.f;
        for (int64_t i = starts_[r]; i < starts_[r + 1]; ++i) largest = std::max(largest, (*lses_)[place(i)]);
        float* sum = sums;
        std::fill_n(sum, dim, 0.f);
        for (int64_t i = starts_[r]; i < starts_[r + 1]; ++i) {
          const float weight = exp2_of(spread((*lses_)[place(i)] - largest))[0];
          const float* part = *outs_ + place(i) * dim;
          total += weight;
          for (int64_t d = 0; d < dim; d += kLanes) store(sum + d, load<Floats>(part + d) * weight + load<Floats>(sum + d));
        }
        for (int64_t d = 0; d < dim; d += kLanes) narrow(load<Floats>(sum + d) / total, out + at * dim + d);
      }
    });
  }

  const Piece* pieces_;
  const int64_t* rows_;
  int64_t stacked_, query_rows_;
  Heads heads_;
  Turns turns_;
  std::vector<Job> jobs_;
  int64_t partials_ = 0;
  std::vector<int64_t> starts_, of_row_;
  Buffer<T> queries_;
  std::optional<Buffer<float>> outs_, lses_;
};

}  // namespace drystone
