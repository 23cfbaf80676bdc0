// Sizes, gates and copies of the kernel of linear_chain_kernel.h.
#pragma once

#include <utility>

#include "linear_chain.h"
#include "mma.h"

namespace miras::cuda {
namespace {

// Gates of a chunk's tokens as the products take them
template <int kChunk> struct Gates {
  float2 log_gamma[kChunk];  // log2 of gamma_t in two parts: multiples of 1 / kUnit, and the rest (kernels/common/decays.py)
  float2 eta[kChunk];        // -eta_t, -eta_t gamma_C / gamma_t
  float gamma[kChunk], delta[kChunk];
  float total, padding[3];  // gamma_C
};

// Sizes, and the places in shared memory
template <class T_, int kKeys_, int kChunk_, int kValues_> struct ChainShape {
  using T = T_;
  static constexpr int kKeys = kKeys_, kChunk = kChunk_, kValues = kValues_;
  static constexpr int kWarps = kChainWarps, kThreads = 32 * kWarps, kGroups = kChunk / 8;
  static_assert(kGroups / 2 <= kWarps, "a warp computes one tile of the scores at most");
  static_assert(kValues <= kWarps * kWarpValues);
  static constexpr int kRow = 2 * kKeys, kValueRow = 2 * kValues + 16;  // bytes of a token; with the padding no banks conflict
  static constexpr int kTokens = kChunk * kRow, kStage = 2 * kTokens + kChunk * kValueRow;
  static constexpr bool kHelped = kValues < kWarps * kWarpValues;  // half of the warps have no values: they compute scores and decays
  static constexpr int kTiles = kHelped && kGroups > 4 ? kGroups / 4 : 1;  // of the scores, for a warp that computes them
  static constexpr int kQ = kTokens, kV = 2 * kTokens;
  static constexpr int kScores = 2 * kStage, kScoresBytes = kGroups * (kGroups / 2) * 32 * 8;
  static constexpr int kGates = kScores + kScoresBytes;
  static constexpr int kSquares = kGates + 2 * int(sizeof(Gates<kChunk>));
  static constexpr int kBytes = kSquares + kWarps * kChunk * 4;
  static_assert(kStage % 256 == 0 && kScores % 256 == 0);
  static_assert(kBytes <= 99 * 1024, "what a block may have on every chip from compute capability 8.0 on");
};

constexpr float kLog2 = 1.44269504f, kUnit = 1024.0f, kLowest = -110.0f;  // exp of anything lower is 0

// A number that the compiler knows, f(Index<i>) for i = 0 to kCount - 1
template <int kValue> struct Index {
  __device__ constexpr operator int() const { return kValue; }
};
template <class Function, int... kIndices> __device__ __forceinline__ void each(Function&& f, std::integer_sequence<int, kIndices...>) {
  (f(Index<kIndices>{}), ...);
}
template <int kCount, class Function> __device__ __forceinline__ void each(Function&& f) {
  each(f, std::make_integer_sequence<int, kCount>{});
}

__device__ __forceinline__ float max_nan(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}
// log2 of a decay, which has these parts; the decay between two tokens, whose log2 gammas have these
__device__ __forceinline__ float exponent_of(float2 parts) { return fmaf(parts.x, kLog2 / kUnit, parts.y); }
__device__ __forceinline__ float decay_of(float2 later, float2 earlier) {
  return exp2_approx(exponent_of(make_float2(later.x - earlier.x, later.y - earlier.y)));
}

// With the offset in the instruction.
template <int kOffset> __device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4+%5];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address), "n"(kOffset)
               : "memory");
}
template <int kOffset> __device__ __forceinline__ void load_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4+%5];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address), "n"(kOffset)
               : "memory");
}
template <int kOffset> __device__ __forceinline__ void copy_16(uint32_t to, const char* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0+%3], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes), "n"(kOffset) : "memory");
}

// A power of two, 1 unless numbers up to `largest` exceed float16's range: what they are divided by before they are rounded.
template <class T> __device__ __forceinline__ float fitting(float largest) {
  if constexpr (std::is_same_v<T, Bf16>) return 1.0f;
  const int more = max((__float_as_int(over_lanes(largest, 1, 32, Max{})) >> 23) - 127 - 14, 0);
  return __int_as_float((127 + more) << 23);
}
template <class T> __device__ __forceinline__ float inverse(float power) {
  if constexpr (std::is_same_v<T, Bf16>) return 1.0f;
  return __int_as_float((254 << 23) - __float_as_int(power));
}

// The tokens of one sequence and head.
struct Sequence {
  int64_t batch, begin;
  int length, n, h, chunks, whole;

  template <class P> __device__ __forceinline__ Sequence(const P& p, int head, int chunk) : n(head / p.H), h(head % p.H) {
    batch = p.cu_seqlens ? 0 : n;
    begin = p.cu_seqlens ? p.cu_seqlens[n] : 0;
    length = int(p.cu_seqlens ? p.cu_seqlens[n + 1] - begin : p.T);
    whole = length / chunk, chunks = whole + (length % chunk > 0);
  }
  // where the token `t` of the sequence begins
  __device__ __forceinline__ char* token(const MirasTokens& x, int64_t t) const {
    return static_cast<char*>(x.data) + 2 * (batch * x.batch + (begin + t) * x.token + h * x.head);
  }
};

// Rows of q, k or v on their way to shared memory: a thread copies the same 16 bytes of every kRows-th token, chunk after chunk.
template <int kRows, int kPitch> struct Copies {
  const char* from;
  uint32_t to[2];  // for even and odd of them
  int row;         // the thread's first token

  // the next of them; `left`: the chunk's tokens from `row` on
  template <int kIndex> __device__ __forceinline__ void copy(const MirasTokens& x, uint32_t stage, int left) {
    copy_16<kIndex * kRows * kPitch>(to[kRows % 8 ? kIndex % 2 : 0] + stage, from, left > kIndex * kRows ? 16 : 0);
    from += 2 * kRows * x.token;
  }
};

}  // namespace
}  // namespace miras::cuda
