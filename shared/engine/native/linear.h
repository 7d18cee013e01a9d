// y = x Wᵀ straight on row-major weights, as they lie in the checkpoint's file: nothing is repacked.
//
// A tile multiplies kStreams weight rows by a few rows of x. The weight rows of a tile lie a quarter of the matrix
// apart, so that four sequential streams run through memory at once: the hardware prefetcher follows each, and one
// core reads twice as fast as from one stream. With four rows of x or more, arithmetic holds the streams up; then they
// are asked for ahead, into the second-level cache. With fewer rows that made it slower.

#pragma once

#include <algorithm>

#include "simd.h"

namespace drystone {

constexpr int kStreams = 4;
constexpr int kAheadRows = 4;
constexpr int kAheadBytes = 2048;

typedef float Four __attribute__((vector_size(16)));
typedef float Eight __attribute__((vector_size(32)));

// [sum a, sum b, sum c, sum d]
inline Four sums_of(Floats a, Floats b, Floats c, Floats d) {
  const Floats ab = __builtin_shufflevector(a, b, DRYSTONE_LOW4) + __builtin_shufflevector(a, b, DRYSTONE_HIGH4);
  const Floats cd = __builtin_shufflevector(c, d, DRYSTONE_LOW4) + __builtin_shufflevector(c, d, DRYSTONE_HIGH4);
  const Floats all = __builtin_shufflevector(ab, cd, DRYSTONE_LOW8) + __builtin_shufflevector(ab, cd, DRYSTONE_HIGH8);
  const Eight half = __builtin_shufflevector(all, all, 0, 1, 2, 3, 4, 5, 6, 7) +
                     __builtin_shufflevector(all, all, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
}

// Rows that are summed before their sums are laid out, so that stores are whole.
constexpr int kSteps = 4;

// sums[m] = x[m] · w[j * gap] for M rows of x and kStreams rows of w. `k` is a multiple of kChunk<T>.
template <typename T, int M>
inline void dot_tile(const T* w, int64_t gap, int64_t k, const T* x, Four* sums, bool ahead) {
  Floats sum[M][kStreams] = {};
  for (int64_t c = 0; c < k; c += kChunk<T>) {
    Words rows[kStreams];
    for (int j = 0; j < kStreams; ++j) {
      rows[j] = load<Words>(w + j * gap * k + c);
      if (ahead) __builtin_prefetch(reinterpret_cast<const char*>(w + j * gap * k + c) + kAheadBytes, 0, 2);
    }
    for (int m = 0; m < M; ++m) {
      const Words own = load<Words>(x + m * k + c);
      for (int j = 0; j < kStreams; ++j) sum[m][j] = madd<T>(sum[m][j], rows[j], own);
    }
  }
  for (int m = 0; m < M; ++m) sums[m] = sums_of(sum[m][0], sum[m][1], sum[m][2], sum[m][3]);
}

template <typename T, int M>
inline void dot_rows(int64_t rows, const T* w, int64_t gap, int64_t k, const T* x, Four* sums, bool ahead) {
  if (rows == M) return dot_tile<T, M>(w, gap, k, x, sums, ahead);
  if constexpr (M > 1) dot_rows<T, M - 1>(rows, w, gap, k, x, sums, ahead);
}

template <typename T>
inline void dot_row(const T* w, int64_t k, const T* x, float* y) {
  Floats sum = {};
  for (int64_t c = 0; c < k; c += kChunk<T>) sum = madd<T>(sum, load<Words>(w + c), load<Words>(x + c));
  *y = sum_of(sum);
}

// Rows of x whose sums are held at once.
constexpr int kRows = 96;

// Columns [begin, end) of y [m, n] = x [m, k] · w [n, k]ᵀ for m <= kRows; rows of y are y_step apart.
template <typename T>
void linear(const T* w, int64_t begin, int64_t end, int64_t k, const T* x, int64_t m, float* y, int64_t y_step) {
  const int64_t gap = (end - begin) / (kStreams * kSteps) * kSteps;
  const int64_t tiles = (m + kTileRows - 1) / kTileRows;
  Four sums[kSteps][kRows];
  for (int64_t i = begin; i < begin + gap; i += kSteps) {
    for (int step = 0; step < kSteps; ++step) {
      for (int64_t t = 0, row = 0; t < tiles; ++t) {
        const int64_t rows = (m - row + tiles - t - 1) / (tiles - t);
        dot_rows<T, kTileRows>(rows, w + (i + step) * k, gap, k, x + row * k, sums[step] + row,
                               t == 0 && m >= kAheadRows);
        row += rows;
      }
    }
    for (int64_t row = 0; row < m; ++row) {
      const Four a = sums[0][row], b = sums[1][row], c = sums[2][row], d = sums[3][row];
      const Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
      const Four hab = __builtin_shufflevector(a, b, 2, 6, 3, 7), hcd = __builtin_shufflevector(c, d, 2, 6, 3, 7);
      float* to = y + row * y_step + i;
      store(to, __builtin_shufflevector(ab, cd, 0, 1, 4, 5));
      store(to + gap, __builtin_shufflevector(ab, cd, 2, 3, 6, 7));
      store(to + 2 * gap, __builtin_shufflevector(hab, hcd, 0, 1, 4, 5));
      store(to + 3 * gap, __builtin_shufflevector(hab, hcd, 2, 3, 6, 7));
    }
  }
  for (int64_t i = begin + gap * kStreams; i < end; ++i) {
    for (int64_t row = 0; row < m; ++row) dot_row(w + i * k, k, x + row * k, y + row * y_step + i);
  }
}

}  // namespace drystone
