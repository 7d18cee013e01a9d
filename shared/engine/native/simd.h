// Sixteen float lanes, and 64-byte chunks of storage that are multiplied into them.
//
// Written in the compiler's own vector types: one source serves AVX-512, AVX2 and anything else. The one instruction
// that needs more is the bfloat16 dot product (AVX512_BF16); without it a chunk is widened to two float vectors.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AVX512BF16__) && !defined(DRYSTONE_PLAIN)
#define DRYSTONE_DOT_BF16 1
#endif

namespace drystone {

constexpr int kLanes = 16;
// Accumulators that stay in registers at once: 32 vector registers of 64 bytes with AVX-512, fewer elsewhere.
#if defined(__AVX512F__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 2;
#endif

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

// Storage type of bfloat16: the upper half of a float.
struct bf16 {
  uint16_t bits;
};

// Elements of T in 64 bytes, and in the 32-bit word that a dot product takes at once.
template <typename T>
constexpr int kChunk = 64 / sizeof(T);
template <typename T>
constexpr int kPair = 4 / sizeof(T);

template <typename V>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}
template <typename V>
inline void store(void* to, V v) {
  std::memcpy(to, &v, sizeof(V));
}
inline Floats spread(float x) { return x - Floats{}; }
inline Words spread_word(int32_t x) { return x - Words{}; }
inline Floats as_floats(Words x) { return reinterpret_cast<Floats>(x); }
inline Words as_words(Floats x) { return reinterpret_cast<Words>(x); }

inline Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

// sum += a * b, word by word: one product for float, two for bfloat16.
template <typename T>
inline Floats madd(Floats sum, Words a, Words b);
template <>
inline Floats madd<float>(Floats sum, Words a, Words b) {
  return as_floats(a) * as_floats(b) + sum;
}
template <>
inline Floats madd<bf16>(Floats sum, Words a, Words b) {
#if defined(DRYSTONE_DOT_BF16)
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  const Words upper = spread_word(static_cast<int32_t>(0xffff0000u));
  sum = as_floats(a << 16) * as_floats(b << 16) + sum;
  return as_floats(a & upper) * as_floats(b & upper) + sum;
#endif
}

// Sixteen elements as floats, and back; bfloat16 rounds to nearest, ties to even.
inline Floats widen(const float* from) { return load<Floats>(from); }
inline Floats widen(const bf16* from) { return as_floats(__builtin_convertvector(load<Halves>(from), Words) << 16); }
inline void narrow(Floats x, float* to) { store(to, x); }
inline Words rounded(Floats x) {
  const Words bits = as_words(x);
  const Words even = (bits >> 16) & 1;
  return x == x ? (bits + even + 0x7fff) : (bits | 0x400000);
}
inline void narrow(Floats x, bf16* to) {
#if defined(DRYSTONE_DOT_BF16)
  store(to, _mm512_cvtneps_pbh((__m512)x));
#else
  typedef uint32_t Unsigned __attribute__((vector_size(64)));
  store(to, __builtin_convertvector(reinterpret_cast<Unsigned>(rounded(x)) >> 16, Halves));
#endif
}
inline float widen_one(float x) { return x; }
inline float widen_one(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

inline float sum_of(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float total = 0.f;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
#endif
}
inline float largest_of(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float most = x[0];
  for (int i = 1; i < kLanes; ++i) most = x[i] > most ? x[i] : most;
  return most;
#endif
}

// 2^x for x <= 127, to about 2 ulp (Cephes exp2f); below -126 it stays at 2^-126.
inline Floats exp2_of(Floats x) {
  x = larger(x, spread(-126.f));
  const Floats shift = spread(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Floats n = x + shift;
  const Floats f = x - (n - shift);
  Floats p = spread(1.535336188319500e-4f);
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.f;
  return as_floats(as_words(p) + (as_words(n) << 23));
}

// Sixteen rows of sixteen words, turned in place.
inline void transpose(Words (&r)[16]) {
  Words t[16];
#define DRYSTONE_LOW4 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29
#define DRYSTONE_HIGH4 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31
#define DRYSTONE_LOW8 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define DRYSTONE_HIGH8 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define DRYSTONE_EVEN 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27
#define DRYSTONE_ODD 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = __builtin_shufflevector(r[i], r[i + 1], DRYSTONE_LOW4);
    t[i + 1] = __builtin_shufflevector(r[i], r[i + 1], DRYSTONE_HIGH4);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = __builtin_shufflevector(t[i], t[i + 2], DRYSTONE_LOW8);
    r[i + 1] = __builtin_shufflevector(t[i], t[i + 2], DRYSTONE_HIGH8);
    r[i + 2] = __builtin_shufflevector(t[i + 1], t[i + 3], DRYSTONE_LOW8);
    r[i + 3] = __builtin_shufflevector(t[i + 1], t[i + 3], DRYSTONE_HIGH8);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = __builtin_shufflevector(r[i], r[i + 4], DRYSTONE_EVEN);
    t[i + 4] = __builtin_shufflevector(r[i], r[i + 4], DRYSTONE_ODD);
    t[i + 8] = __builtin_shufflevector(r[i + 8], r[i + 12], DRYSTONE_EVEN);
    t[i + 12] = __builtin_shufflevector(r[i + 8], r[i + 12], DRYSTONE_ODD);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = __builtin_shufflevector(t[i], t[i + 8], DRYSTONE_EVEN);
    r[i + 8] = __builtin_shufflevector(t[i], t[i + 8], DRYSTONE_ODD);
    r[i + 4] = __builtin_shufflevector(t[i + 4], t[i + 12], DRYSTONE_EVEN);
    r[i + 12] = __builtin_shufflevector(t[i + 4], t[i + 12], DRYSTONE_ODD);
  }
}

}  // namespace drystone
