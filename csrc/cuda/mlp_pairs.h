// Pairs of tokens in the MLP memory's chain, t that reads and s that writes: their weights L, and products with tiles [t, s].
#pragma once

#include "mlp_primal.h"

namespace miras::cuda {

template <int C, int Hd, class T, class Layout, int kBlocks> struct Pairs : Primal<C, Hd, T, Layout, kBlocks> {
  using Base = Primal<C, Hd, T, Layout, kBlocks>;
  using Base::Base, Base::kGates, Base::kSplit, Base::kStrips, Base::kEights, Base::kTiles, Base::kPieces, Base::kPass, Base::kUnit;
  using Base::lane, Base::g, Base::t, Base::tile, Base::part;
  using typename Base::S;
  using typename Base::X;

  // log2 of L of the pair (t, s); -L itself is 0 if s > t
  __device__ __forceinline__ static float exponent(float2 of_t, float s_units, float s_rest) {
    return (of_t.x - s_units) * kUnit + (of_t.y - s_rest);
  }
  // the same as fragments have it: tokens t and t + 8 by kCount tiles of 8 tokens from s on
  template <int kCount>
  __device__ __forceinline__ static void weigh_tiles(float (&y)[kCount][4], uint32_t logs, const float2 (&of_t)[2], int t, int s) {
    float4 of_s[kCount];  // and s + 1
#pragma unroll
    for (int i = 0; i < kCount; ++i) of_s[i] = at<float4>(logs + 8 * (s + 8 * i));
#pragma unroll
    for (int i = 0; i < kCount; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) y[i][e] = exponent(of_t[e / 2], e % 2 ? of_s[i].z : of_s[i].x, e % 2 ? of_s[i].w : of_s[i].y);
#pragma unroll
    for (int i = 0; i < kCount; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) y[i][e] = exp2_approx(y[i][e]);
#pragma unroll
    for (int i = 0; i < kCount; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) y[i][e] = s + 8 * i + e % 2 <= t + e / 2 * 8 ? -y[i][e] : 0.0f;
  }
  // -rho L of this warp's tile of tokens and kCount tiles of 8 from x on, computed or as shared memory has them
  template <KeptWeights kKept, int kCount>
  __device__ __forceinline__ void weigh_fragment(float (&y)[kCount][4], uint32_t logs, int x, float log_rho) {
    const int t0 = 16 * tile + g, s = 8 * x + 2 * t;
    if constexpr (kKept == KeptWeights::fragments) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) Base::floats(y[i], at<float4>(kept_place(x + i)));
    } else if constexpr (kKept == KeptWeights::rows) {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float2 of = at<float2>(S::kWeights + 4 * ((t0 + 8 * e) * S::kWeightRow + s + 8 * i));
          y[i][2 * e] = of.x, y[i][2 * e + 1] = of.y;
        }
    } else {
      float2 of_t[2] = {at<float2>(logs + 8 * t0), at<float2>(logs + 8 * (t0 + 8))};
      if constexpr (kGates) of_t[0].y += log_rho, of_t[1].y += log_rho;
      weigh_tiles(y, logs, of_t, t0, s);
    }
  }
  __device__ __forceinline__ uint32_t kept_place(int x) const { return S::kWeights + ((tile * (tile + 1) + x) * 32 + lane) * 16; }

  // -rho L o (left right'): the tiles up to the diagonal, shared out over the parts, if rows are split of both blocks. kFirst: the weights
  // are not kept yet
  template <bool kFirst = true>
  __device__ __forceinline__ void weigh_pairs(uint32_t to, uint32_t left, uint32_t right, uint32_t logs, float log_rho = 0.0f) {
    constexpr int kShares = X::kParts * (kSplit ? kBlocks : 1), kShare = kEights > kShares ? kEights / kShares : 1;
    const int t0 = 16 * tile + g, s0 = (kSplit ? part * kBlocks + Base::rank() : part) * kShare;
    if (s0 < kEights && 8 * s0 < 16 * tile + 16) {
      uint32_t a[4][4];
#pragma unroll
      for (int k = 0; k < 4; ++k) ldmatrix_x4(a[k], address(left + by_rows<8>(16 * tile, 16 * k, lane)));
      constexpr int kAtOnce = kShare < 2 ? 1 : 2;
#pragma unroll
      for (int first = 0; first < kShare; first += kAtOnce) {
        const int x0 = s0 + first;
        if (kShare > 2 && 8 * x0 >= 16 * tile + 16) break;
        uint32_t b[2][kAtOnce][4];
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) ldmatrix_x4(b[k][i], address(right + place<8>(8 * (x0 + i) + (lane & 7), 4 * k + (lane >> 3))));
        float acc[kAtOnce][4] = {}, weights[kAtOnce][4];
        weigh_fragment<kFirst && !S::kMomentum ? KeptWeights::none : S::kKeeps>(weights, logs, x0, log_rho);
        if constexpr (kFirst && S::kKeeps == KeptWeights::fragments) {
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i)
            Base::put_both(kept_place(x0 + i), make_float4(weights[i][0], weights[i][1], weights[i][2], weights[i][3]));
        }
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) mma_m16n8k16<T>(acc[i], a[k], b[k / 2][i][k % 2 * 2], b[k / 2][i][k % 2 * 2 + 1]);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int r = t0 + 8 * e, x = x0 + i;
            const float2 of = make_float2(weights[i][2 * e], weights[i][2 * e + 1]);
            if constexpr (S::kKeeps == KeptWeights::rows && !S::kMomentum)
              Base::put_both(S::kWeights + 4 * (r * S::kWeightRow + 8 * x + 2 * t), of);
            Base::put_both(to + place<kPieces>(r, x) + 4 * t, pack<T>(acc[i][2 * e] * of.x, acc[i][2 * e + 1] * of.y));
          }
      }
    }
  }

  // z += a square', square [t, s] in shared memory, for tiles of 8 tokens t from `first` on; operand(a, strip, tile of 16 tokens s)
  template <class Operand>
  __device__ __forceinline__ void add_pairs(float (&z)[kStrips][kPass][4], uint32_t square, int first, Operand&& operand) {
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
      if (first + kPass <= 2 * k) break;  // tokens t come before those that write
      uint32_t a[kStrips][4], b[kPass / 2][4];
#pragma unroll
      for (int m = 0; m < kStrips; ++m) operand(a[m], m, k);
#pragma unroll
      for (int x = 0; x < kPass; x += 2)
        if (first + x >= 2 * k) ldmatrix_x4(b[x / 2], address(square + by_columns<kPieces>(8 * (first + x), 16 * k, lane)));
#pragma unroll
      for (int x = 0; x < kPass; ++x)
        if (first + x >= 2 * k)
#pragma unroll
          for (int m = 0; m < kStrips; ++m) mma_m16n8k16<T>(z[m][x], a[m], b[x / 2][x % 2 * 2], b[x / 2][x % 2 * 2 + 1]);
    }
  }
};

}  // namespace miras::cuda
