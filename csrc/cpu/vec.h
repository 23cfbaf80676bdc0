// The vector type of one instruction set, on GCC vector extensions (gcc and clang).
//
// This header and all that build on it are compiled once per level (level_*.cpp), into a namespace of its own:
//   MIRAS_LEVEL   the namespace: avx512, avx2, portable
//   MIRAS_LANES   floats in a vector: 16, 8, 4
//   MIRAS_PAIRS   defined if products multiply bfloat16 numbers, two along k in the place of a float (operand.h)
// Nothing here may have a linkage shared between levels: functions are static or always inlined.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define MIRAS_INLINE static inline __attribute__((always_inline))
#define MIRAS_LAMBDA __attribute__((always_inline))
#if defined(__clang__)
#define MIRAS_UNROLL _Pragma("clang loop unroll(full)")
#else
#define MIRAS_UNROLL _Pragma("GCC unroll 16")
#endif

namespace miras::cpu::MIRAS_LEVEL {

using index_t = std::ptrdiff_t;

constexpr int kLanes = MIRAS_LANES;
#ifdef MIRAS_PAIRS
constexpr int kPair = 2;
using Element = uint16_t;
#else
constexpr int kPair = 1;
using Element = float;
#endif
constexpr bool kPairs = kPair == 2;
constexpr int kPad = 16;  // scratch rows are multiples of this many floats (64 bytes), at every level

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HVec __attribute__((vector_size(2 * kLanes)));  // bfloat16 bits
typedef float VecAtAnyAddress __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint16_t HVecAtAnyAddress __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

MIRAS_INLINE int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }
MIRAS_INLINE int minimum(int a, int b) { return a < b ? a : b; }

// Rows [first, last); a number of rows is the range from 0 on.
struct Range {
  int first, last;
  MIRAS_FN Range(int count) : first(0), last(count) {}
  MIRAS_FN Range(int first, int last) : first(first), last(last) {}
  MIRAS_FN int count() const { return last - first; }
};

MIRAS_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecAtAnyAddress*>(p); }
MIRAS_INLINE void store(float* p, Vec x) { *reinterpret_cast<VecAtAnyAddress*>(p) = x; }
MIRAS_INLINE Vec broadcast(float x) { return x - Vec{}; }
MIRAS_INLINE Vec zeros() { return Vec{}; }

// The larger of a and b, b if a is NaN; a where x has its sign bit, elsewhere b
#if defined(__x86_64__) && MIRAS_LANES == 8
MIRAS_INLINE Vec larger(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
MIRAS_INLINE Vec where_negative(Vec x, Vec a, Vec b) { return (Vec)_mm256_blendv_ps((__m256)b, (__m256)a, (__m256)x); }
#else
MIRAS_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }
MIRAS_INLINE Vec where_negative(Vec x, Vec a, Vec b) { return (IVec)x < 0 ? a : b; }
#endif

// Rounds x here: the compiler would contract a product with a sum that follows, in one function and not in another, and results would
// depend on how a matrix is divided into tiles.
MIRAS_INLINE void round_now(Vec& x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
}

// 0, 1, 2, ...
MIRAS_INLINE IVec iota() {
  IVec x;
  MIRAS_UNROLL
  for (int i = 0; i < kLanes; ++i) x[i] = i;
  return x;
}

// ---- bfloat16: widen exactly, round to nearest even ----
MIRAS_INLINE Vec load(const uint16_t* p) {
  const HVec half = *reinterpret_cast<const HVecAtAnyAddress*>(p);
  return (Vec)(__builtin_convertvector(half, UVec) << 16);
}
#ifdef MIRAS_PAIRS
MIRAS_INLINE void store(uint16_t* p, Vec x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)x)); }
#else
MIRAS_INLINE void store(uint16_t* p, Vec x) {
  const UVec bits = (UVec)x;
  const UVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const UVec safe = x == x ? rounded : UVec{} + 0x7fc0u;
  *reinterpret_cast<HVecAtAnyAddress*>(p) = __builtin_convertvector(safe, HVec);
}
#endif

// ---- the first n <= kLanes elements only; the rest reads as zero ----
template <class T> MIRAS_INLINE Vec load_first(const T* p, int n) {
  T lanes[kLanes] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <class T> MIRAS_INLINE void store_first(T* p, Vec x, int n) {
  T lanes[kLanes];
  store(lanes, x);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

#if defined(__x86_64__) && MIRAS_LANES == 16
MIRAS_INLINE Vec load_first(const float* p, int n) { return (Vec)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p); }
MIRAS_INLINE void store_first(float* p, Vec x, int n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)x); }
#elif defined(__x86_64__) && MIRAS_LANES == 8
MIRAS_INLINE Vec load_first(const float* p, int n) { return (Vec)_mm256_maskload_ps(p, (__m256i)(iota() < n)); }
MIRAS_INLINE void store_first(float* p, Vec x, int n) { _mm256_maskstore_ps(p, (__m256i)(iota() < n), (__m256)x); }
#endif

// x in the first n lanes, zero in the rest
MIRAS_INLINE Vec first_lanes(Vec x, int n) { return iota() < n ? x : zeros(); }

// ---- shuffles with compile-time indices: 0..kLanes-1 from a, kLanes..2 kLanes-1 from b ----
#if defined(__clang__)
#define MIRAS_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MIRAS_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, IVec{__VA_ARGS__})
#endif

#if MIRAS_LANES == 16
// In every group of four: a0 b0 a1 b1, a2 b2 a3 b3; a0 a1 b0 b1, a2 a3 b2 b3.
MIRAS_INLINE Vec zip_low(Vec a, Vec b) { return MIRAS_SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29); }
MIRAS_INLINE Vec zip_high(Vec a, Vec b) { return MIRAS_SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31); }
MIRAS_INLINE Vec join_low(Vec a, Vec b) { return MIRAS_SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29); }
MIRAS_INLINE Vec join_high(Vec a, Vec b) { return MIRAS_SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31); }
// Four floats each of rows 0, 4, 8, 12
MIRAS_INLINE Vec load_quads(const float* p, index_t ld) {
  __m512 x = _mm512_castps128_ps512(_mm_loadu_ps(p));
  x = _mm512_insertf32x4(x, _mm_loadu_ps(p + 4 * ld), 1);
  x = _mm512_insertf32x4(x, _mm_loadu_ps(p + 8 * ld), 2);
  return (Vec)_mm512_insertf32x4(x, _mm_loadu_ps(p + 12 * ld), 3);
}
// All lanes with one operation, which takes vectors and floats
template <class Operation> MIRAS_INLINE float fold(Vec x, Operation with) {
  x = with(x, MIRAS_SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  x = with(x, MIRAS_SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  x = with(x, MIRAS_SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  return with(x[0], x[1]);
}
#elif MIRAS_LANES == 8
MIRAS_INLINE Vec zip_low(Vec a, Vec b) { return MIRAS_SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13); }
MIRAS_INLINE Vec zip_high(Vec a, Vec b) { return MIRAS_SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15); }
MIRAS_INLINE Vec join_low(Vec a, Vec b) { return MIRAS_SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13); }
MIRAS_INLINE Vec join_high(Vec a, Vec b) { return MIRAS_SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15); }
MIRAS_INLINE Vec load_quads(const float* p, index_t ld) {
  return (Vec)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4 * ld), 1);
}
template <class Operation> MIRAS_INLINE float fold(Vec x, Operation with) {
  x = with(x, MIRAS_SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3));
  x = with(x, MIRAS_SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5));
  return with(x[0], x[1]);
}
#else
MIRAS_INLINE Vec zip_low(Vec a, Vec b) { return MIRAS_SHUFFLE(a, b, 0, 4, 1, 5); }
MIRAS_INLINE Vec zip_high(Vec a, Vec b) { return MIRAS_SHUFFLE(a, b, 2, 6, 3, 7); }
MIRAS_INLINE Vec join_low(Vec a, Vec b) { return MIRAS_SHUFFLE(a, b, 0, 1, 4, 5); }
MIRAS_INLINE Vec join_high(Vec a, Vec b) { return MIRAS_SHUFFLE(a, b, 2, 3, 6, 7); }
MIRAS_INLINE Vec load_quads(const float* p, index_t) { return load(p); }
template <class Operation> MIRAS_INLINE float fold(Vec x, Operation with) { return with(with(x[0], x[2]), with(x[1], x[3])); }
#endif
MIRAS_INLINE float sum(Vec x) {
  return fold(x, [](auto a, auto b) MIRAS_LAMBDA { return a + b; });
}
MIRAS_INLINE float largest(Vec x) {
  return fold(x, [](auto a, auto b) MIRAS_LAMBDA { return a > b ? a : b; });
}

// ---- an inner step of products: an element of A for all lanes, c += sign x y; with pairs, of two numbers each, sign = 1 ----
#ifdef MIRAS_PAIRS
MIRAS_INLINE Vec broadcast_element(float x) { return (Vec)_mm512_set1_ps(x); }
template <int sign> MIRAS_INLINE void multiply_add(Vec& c, Vec x, Vec y) {
  static_assert(sign == 1);
  c = (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)x, (__m512bh)y);
}
// The numbers of `first`, then those of `second`, rounded to nearest even
MIRAS_INLINE __m512i side_by_side(const float* first, const float* second) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)load(second), (__m512)load(first));
}
MIRAS_INLINE __m512i side_by_side(const uint16_t* first, const uint16_t* second) {
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first));
  return _mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(low), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)), 1);
}
MIRAS_INLINE void store_sides(uint16_t* first, uint16_t* second, __m512i both) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(first), _mm512_maskz_extracti64x4_epi64(0xff, both, 0));  // without masks gcc warns
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(second), _mm512_maskz_extracti64x4_epi64(0xff, both, 1));
}
// In every lane the pair of their numbers
MIRAS_INLINE Vec pairs(__m512i both) {
  const IVec order = iota() | (iota() + kLanes) << 16;
  return (Vec)_mm512_permutexvar_epi16((__m512i)order, both);
}
#else
MIRAS_INLINE Vec broadcast_element(float x) { return broadcast(x); }
template <int sign> MIRAS_INLINE void multiply_add(Vec& c, Vec x, Vec y) {
#if defined(__x86_64__) && MIRAS_LANES == 8  // in place: in a loop of several steps the compiler would move the 12 sums about, and store some
  if constexpr (sign > 0) asm("vfmadd231ps %1, %2, %0" : "+x"(c) : "x"(x), "x"(y));
  else asm("vfnmadd231ps %1, %2, %0" : "+x"(c) : "x"(x), "x"(y));
#else
  c = sign > 0 ? c + x * y : c - x * y;
#endif
}
#endif

// Flushes denormals to zero while it lives: products of decays reach their range and would be 20 times slower.
struct FlushDenormals {
#if defined(__x86_64__)
  unsigned saved;
  MIRAS_FN FlushDenormals() : saved(_mm_getcsr()) { _mm_setcsr(saved | 0x8040); }  // FTZ | DAZ
  MIRAS_FN ~FlushDenormals() { _mm_setcsr(saved); }
#elif defined(__aarch64__)
  uint64_t saved;
  MIRAS_FN FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved));
    asm volatile("msr fpcr, %0" ::"r"(saved | (uint64_t(1) << 24)));
  }
  MIRAS_FN ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved)); }
#else
  MIRAS_FN FlushDenormals() {}
  MIRAS_FN ~FlushDenormals() {}
#endif
};

}  // namespace miras::cpu::MIRAS_LEVEL
