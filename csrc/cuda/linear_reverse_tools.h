// Sizes, sums and gates of the kernel of linear_reverse_kernel.h.
#pragma once

#include "linear_chain_tools.h"
#include "linear_reverse.h"
#include "tiles.h"
#include "wgmma.h"

namespace miras::cuda {
namespace {

// Gates of a chunk's tokens
template <int kChunk> struct ReverseGates {
  float2 log_gamma[kChunk];                                         // as in Gates
  float eta[kChunk], to_end[kChunk], gamma[kChunk], delta[kChunk];  // -eta_t; gamma_C / gamma_t
  float total, padding[3];
};

// Sizes, and the places in shared memory. A warp has 16 values.
template <int kDim_, int kChunk_> struct ReverseShape {
  using T = Bf16;
  static constexpr int kDim = kDim_, kChunk = kChunk_, kWarps = kDim / 16, kThreads = 32 * kWarps;
  static constexpr int kPieces = kDim / 8, kTokenPieces = kChunk / 8;  // 16 bytes each, of a row of channels and of one of tokens
  static constexpr int kGroups = kChunk / 8, kSixteens = kChunk / 16, kSteps = kDim / 16;
  static constexpr int kParts = kWarps / kSixteens;  // of the keys of dQ and dK; a warp has 16 tokens of a part
  static constexpr int kPartKeys = kDim / kParts, kPairs = kPartKeys / 16;
  static constexpr int kUnits = (kSixteens * kSixteens + kWarps - 1) / kWarps;  // of 16 x 16 pairs of tokens, of a warp
  static constexpr int kLanes = kThreads / kChunk;                              // threads of a token that add up its sums
  static_assert(kPartKeys % 16 == 0 && kLanes <= 16);

  static constexpr int kTokens = kChunk * kDim * 2, kMatrix = kDim * kDim * 2, kSquare = kChunk * kChunk * 2;
  static constexpr int kStage = 3 * kTokens, kQ = kTokens, kD = 2 * kTokens;  // two stages of K, Q and dO
  static constexpr int kV = 2 * kStage, kE = kV;                              // V', then dE
  static constexpr int kU = kV + kTokens, kS = kU + kTokens, kJ = kS + kMatrix, kP = kJ + kMatrix, kG = kP + kSquare;
  static constexpr int kGates = kG + kSquare;
  static constexpr int kSums = kGates + 2 * int(sizeof(ReverseGates<kChunk>));  // [5, warps, tokens]
  static constexpr int kEnds = kSums + 5 * kWarps * kChunk * 4;                 // [tokens]
  static constexpr int kRows = kEnds + kChunk * 4, kUnitSums = kSixteens * kSixteens * 16 * 4, kColumns = kRows + kUnitSums;
  static constexpr int kDiagonal = kColumns + kUnitSums, kReads = kDiagonal + kChunk * 4, kInner = kReads + kParts * kChunk * 4;
  static constexpr int kBytes = kInner + kWarps * 4;
  static_assert(kBytes <= 226 * 1024);
};

// The two tokens of a thread in each of kGroups groups of 8: their sums over the lanes / 4. A lane has the results of one group, which is
// returned; where there are fewer groups than lanes, several lanes have the same.
template <int kGroups> __device__ __forceinline__ int token_sums(float2 (&x)[kGroups], int lane) {
  int group = 0;
  each<3>([&](auto i) {
    constexpr int kMask = 16 >> i, kLeft = kGroups >> i;  // groups that a lane still has
    if constexpr (kLeft > 1) {
      const bool upper = lane & kMask;
      float2 others[kLeft / 2];  // all shuffles first: none waits for another
#pragma unroll
      for (int n = 0; n < kLeft / 2; ++n) {
        const float2 other = upper ? x[n] : x[n + kLeft / 2];
        others[n].x = __shfl_xor_sync(kWholeWarp, other.x, kMask), others[n].y = __shfl_xor_sync(kWholeWarp, other.y, kMask);
        x[n] = upper ? x[n + kLeft / 2] : x[n];
      }
#pragma unroll
      for (int n = 0; n < kLeft / 2; ++n) x[n].x += others[n].x, x[n].y += others[n].y;
      group += upper ? kLeft / 2 : 0;
    } else {
      const float one = __shfl_xor_sync(kWholeWarp, x[0].x, kMask), two = __shfl_xor_sync(kWholeWarp, x[0].y, kMask);
      x[0].x += one, x[0].y += two;
    }
  });
  return group;
}

// c += a b, two neighbouring tiles
__device__ __forceinline__ void multiply(float (&low)[4], float (&high)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  mma_m16n8k16<Bf16>(low, a, b[0], b[1]), mma_m16n8k16<Bf16>(high, a, b[2], b[3]);
}

// Products of 16 x 16 and 16 x 16 kPairs numbers, summed over steps first to last - 1: load(i, a, b) loads the operands of step i, which
// happens before those of step i - 1 are multiplied.
template <int kSteps, int kPairs, class Load> __device__ __forceinline__ void products(float (*c)[4], int first, int last, Load&& load) {
  uint32_t a[2][4], b[2][kPairs][4];
  each<kSteps + 1>([&](auto i) {
    if constexpr (i < kSteps)
      if (i >= first && i < last) load(i, a[i % 2], b[i % 2]);
    if constexpr (i > 0)
      if (i - 1 >= first && i - 1 < last)
        each<kPairs>([&](auto n) { multiply(c[2 * n], c[2 * n + 1], a[(i + 1) % 2], b[(i + 1) % 2][n]); });
  });
}

// A tile of kRows rows of channels in shared memory: 64 channels of all rows, then the next 64. What ldmatrix_x4 takes for 16 x 16 numbers
// (tiles.h), and a 16-byte piece.
template <int kRows> __device__ __forceinline__ uint32_t piece_of(int row, int piece) {
  return piece / 8 * (kRows * 128) + place<8>(row, piece % 8);
}
template <int kRows> __device__ __forceinline__ uint32_t rows_of(int r0, int c0, int lane) {
  return by_rows<8>(r0, c0 % 64, lane) + c0 / 64 * (kRows * 128);
}
template <int kRows> __device__ __forceinline__ uint32_t columns_of(int r0, int c0, int lane) {
  return by_columns<8>(r0, c0 % 64, lane) + c0 / 64 * (kRows * 128);
}

// tile_product by each warp alone, kPairs pairs of tiles at a time
template <int kSteps, int kPairs, int kTiles, int kRows, bool kByRows, class Load>
__device__ __forceinline__ void warp_product(float (&c)[kTiles][4], uint32_t tile, int c0, int lane, Load&& load) {
#pragma unroll
  for (int first = 0; first < kTiles / 2; first += kPairs)
    products<kSteps, kPairs>(c + 2 * first, 0, kSteps, [&](auto i, uint32_t (&a)[4], uint32_t (&b)[kPairs][4]) {
      load(i, a);
      each<kPairs>([&](auto n) {
        if constexpr (kByRows) load_transposed<i * 16 * 128>(b[n], address(tile + rows_of<kRows>(0, c0 + 16 * (first + n), lane)));
        else load_matrices<n * 16 * 128>(b[n], address(tile + columns_of<kRows>(16 * first, c0 + 16 * i, lane)));
      });
    });
}

// c += A B (kAdds; else c = A B) over kSteps times 16, where load(i, a) loads the A operand of step i, and B is such a tile from channel c0
// on. kByRows: the sum goes over its rows and the columns of c are channels; else the sum goes over channels and its rows are the columns.
// The warps of a warpgroup, which have 16 rows of c each, come together. c is there after wgmma_wait(c), and the tile may then change.
template <int kSteps, int kTiles, int kRows, bool kByRows, bool kAdds, class Load>
__device__ __forceinline__ void tile_product(float (&c)[kTiles][4], uint32_t tile, int c0, int lane, Load&& load) {
  if constexpr (kWgmma) {
    uint32_t a[kSteps][4];
    each<kSteps>([&](auto i) { load(i, a[i]); });
    wgmma_fence();
    const uint64_t b = wgmma_tile(address(tile) + c0 / 64 * (kRows * 128) + c0 % 64 * 2, kRows * 128);
    each<kSteps>([&](auto i) {
      constexpr uint32_t kStep = kByRows ? i * 16 * 128 : i / 4 * (kRows * 128) + i % 4 * 32;
      wgmma<kTiles, i == 0 && !kAdds, kByRows>(c, a[i], b + kStep / 16);
    });
  } else {
    if constexpr (!kAdds)
      for (auto& x : c)
        for (float& y : x) y = 0.0f;
    warp_product<kSteps, (kTiles / 2 < 4 ? kTiles / 2 : 4), kTiles, kRows, kByRows>(c, tile, c0, lane, load);
  }
}

// From shared memory, in this order: the compiler does not move loads to where their results are used.
__device__ __forceinline__ float load_float(uint32_t offset) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address(offset)) : "memory");
  return x;
}
__device__ __forceinline__ uint32_t load_word(uint32_t offset) {
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address(offset)) : "memory");
  return x;
}

// two neighbouring C tiles as an A operand
__device__ __forceinline__ void packed(uint32_t (&a)[4], const float (&low)[4], const float (&high)[4]) {
  a[0] = pack<Bf16>(low[0], low[1]), a[1] = pack<Bf16>(low[2], low[3]);
  a[2] = pack<Bf16>(high[0], high[1]), a[3] = pack<Bf16>(high[2], high[3]);
}

}  // namespace
}  // namespace miras::cuda
