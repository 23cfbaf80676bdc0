// What the stages of `reverse` (mlp_reverse.h) are made of: copies of what was handed over, products with packed registers, sums.
#pragma once

#include "mlp_backward.h"

namespace miras::cuda {

template <int C, int Hd, class T, int kBlocks> struct ReverseBlock : Block<C, Hd, T, ReverseShared<C, Hd>, kBlocks> {
  using Base = Block<C, Hd, T, ReverseShared<C, Hd>, kBlocks>;
  using From = Handed<C, kBlocks * Hd>;
  using Base::fresh, Base::each_four, Base::floats, Base::load_tokens, Base::packed, Base::add_rows;
  using Base::kStrips, Base::kEights, Base::kTiles, Base::kPieces, Base::kPass, Base::kUnroll;
  using Base::lane, Base::warp, Base::g, Base::t, Base::tile, Base::part, Base::row, Base::piece;
  using Base::p, Base::traits, Base::n, Base::h, Base::batch, Base::begin, Base::tokens;
  using Base::s1, Base::w2;  // here J1 and J2
  using typename Base::S;
  using typename Base::X;
  static_assert(kPass == kEights);
  using Packed = uint32_t[kStrips][kEights][2];

  const MirasMlpBackward& b;
  const char* from;         // what was handed over of this chunk
  Packed slope, curve, dz;  // gelu'(Z'); gelu''(Z') o Ga', then times eta dU2'; Gz', then dGa', then dZ'
  float de[X::kChannels];
  float norm[2][X::kChannels] = {};  // of LayerNorm's weight and bias, unless they lie in shared memory

  __device__ __forceinline__ ReverseBlock(const MirasMlpBackward& b, int n, int h) : Base(b.chain, n, h), b(b) {}

  // a chunk's tiles, and of [C, C] the pieces up to the diagonal's tile of 16
  __device__ __forceinline__ static void copy(uint32_t tile, const char* from, uint32_t bytes) {
    for (uint32_t i = 16 * threadIdx.x; i < bytes; i += 16 * X::kThreads) cp_async_16(address(tile + i), from + i);
  }
  __device__ __forceinline__ static void copy_pairs(uint32_t square, const char* from) {
    for (int i = threadIdx.x; i < C * kPieces; i += X::kThreads) {
      const int r = i / kPieces, ch = i % kPieces;
      if (ch / 2 <= r / 16) cp_async_16(address(square + place<kPieces>(r, ch)), from + place<kPieces>(r, ch));
    }
  }
  // those whose places are free after `units`, and the others
  __device__ __forceinline__ static void fetch_early(const char* from) {
    copy(S::kS1, from + From::kS1 + Base::rank() * S::kState, S::kState), copy(S::kDUq, from + From::kDUq, S::kTile);
    copy_pairs(S::kP, from + From::kP), copy_pairs(S::kN1, from + From::kN1);
  }
  __device__ __forceinline__ void fetch(int c) {
    copy(S::kW2, from + From::kW2 + Base::rank() * S::kState, S::kState), copy(S::kGu, from + From::kGu, S::kTile),
        copy_pairs(S::kN2, from + From::kN2);
    Base::fetch(c);
  }
  __device__ __forceinline__ void load_fragments(Packed& x, uint32_t offset) {
#pragma unroll
    for (int m = 0; m < kStrips; ++m)
#pragma unroll
      for (int k = 0; k < kTiles; ++k) {
        const int strip = (Base::rank() * X::kWarps + warp) * kStrips + m;
        const uint4 a = *reinterpret_cast<const uint4*>(from + offset + ((strip * kTiles + k) * 32 + lane) * 16);
        x[m][2 * k][0] = a.x, x[m][2 * k][1] = a.y, x[m][2 * k + 1][0] = a.z, x[m][2 * k + 1][1] = a.w;
      }
  }
  __device__ __forceinline__ void put(uint32_t tile, const Packed& x) {
#pragma unroll
    for (int m = 0; m < kStrips; ++m)
#pragma unroll
      for (int k = 0; k < kTiles; ++k) {
        const uint32_t a[4] = {x[m][2 * k][0], x[m][2 * k][1], x[m][2 * k + 1][0], x[m][2 * k + 1][1]};
        Base::template put_fragment<kPieces>(tile, m, 2 * k, a);
      }
  }
  // z [units, s] += x [units, t] square [t, s], t >= s
  __device__ __forceinline__ void times_pairs(float (&z)[kStrips][kPass][4], const Packed& x, uint32_t square) {
#pragma unroll
    for (int k = 0; k < kTiles; ++k)
#pragma unroll
      for (int s = 0; s <= k; ++s) {
        uint32_t c[4];
        ldmatrix_x4_trans(c, address(square + by_rows<kPieces>(16 * k, 16 * s, lane)));
#pragma unroll
        for (int m = 0; m < kStrips; ++m) {
          const uint32_t a[4] = {x[m][2 * k][0], x[m][2 * k][1], x[m][2 * k + 1][0], x[m][2 * k + 1][1]};
          mma_m16n8k16<T>(z[m][2 * s], a, c[0], c[1]), mma_m16n8k16<T>(z[m][2 * s + 1], a, c[2], c[3]);
        }
      }
  }
  // j += x [units, s] rows [s, D], x of this warp's units in shared memory
  __device__ __forceinline__ void add_outer(float (&j)[kStrips][8][4], uint32_t x, uint32_t rows) {
#pragma unroll
    for (int k = 0; k < kTiles; ++k)
#pragma unroll
      for (int m = 0; m < kStrips; ++m) {
        uint32_t a[4];
        ldmatrix_x4(a, address(x + by_rows<kPieces>(X::kUnits * warp + 16 * m, 16 * k, lane)));
        add_rows(j[m], a, rows, 16 * k);
      }
  }
  // likewise in registers
  __device__ __forceinline__ void add_outer(float (&j)[kStrips][8][4], const Packed& x, uint32_t rows) {
#pragma unroll
    for (int k = 0; k < kTiles; ++k)
#pragma unroll
      for (int m = 0; m < kStrips; ++m) {
        const uint32_t a[4] = {x[m][2 * k][0], x[m][2 * k][1], x[m][2 * k + 1][0], x[m][2 * k + 1][1]};
        add_rows(j[m], a, rows, 16 * k);
      }
  }
  __device__ __forceinline__ void decay(float (&j)[kStrips][8][4]) {
    const float gamma = at<float>(S::kGamma + 4 * (C - 1));
#pragma unroll
    for (int m = 0; m < kStrips; ++m)
#pragma unroll
      for (int x = 0; x < 8; ++x)
#pragma unroll
        for (int e = 0; e < 4; ++e) j[m][x][e] *= gamma;
  }
  // z's columns times f(eta, -dec)
  template <class Function> __device__ __forceinline__ void scale_columns(float (&z)[kStrips][kPass][4], Function&& f) {
#pragma unroll
    for (int x = 0; x < kEights; ++x)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float2 of = at<float2>(S::kRows + 16 * (8 * x + 2 * t + e));
        const float factor = f(of.x, of.y);
#pragma unroll
        for (int m = 0; m < kStrips; ++m) z[m][x][e] *= factor, z[m][x][e + 2] *= factor;
      }
  }
  // f(packed register, the two elements of z at its place)
  template <class Function> __device__ __forceinline__ void each_packed(Packed& x, float (&z)[kStrips][kPass][4], Function&& f) {
#pragma unroll
    for (int m = 0; m < kStrips; ++m)
#pragma unroll
      for (int i = 0; i < kEights; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) f(x[m][i][e], z[m][i][2 * e], z[m][i][2 * e + 1], m, i, e);
  }

  // While registers are short, x lies where this thread alone reads it: kHidden bytes from `to` on
  __device__ __forceinline__ void park(const Packed& x, uint32_t to) {
    if constexpr (S::kParks)
#pragma unroll
      for (int m = 0; m < kStrips; ++m)
#pragma unroll
        for (int k = 0; k < kTiles; ++k)
          at<uint4>(to + ((m * kTiles + k) * X::kThreads + 32 * warp + lane) * 16) =
              make_uint4(x[m][2 * k][0], x[m][2 * k][1], x[m][2 * k + 1][0], x[m][2 * k + 1][1]);
  }
  __device__ __forceinline__ void unpark(Packed& x, uint32_t from) {
    if constexpr (S::kParks)
#pragma unroll
      for (int m = 0; m < kStrips; ++m)
#pragma unroll
        for (int k = 0; k < kTiles; ++k) {
          const uint4 a = at<uint4>(from + ((m * kTiles + k) * X::kThreads + 32 * warp + lane) * 16);
          x[m][2 * k][0] = a.x, x[m][2 * k][1] = a.y, x[m][2 * k + 1][0] = a.z, x[m][2 * k + 1][1] = a.w;
        }
  }

  __device__ __forceinline__ float product_with(const float (&j)[kStrips][8][4], uint32_t state) {
    float sum = 0.0f;
#pragma unroll
    for (int m = 0; m < kStrips; ++m)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        uint32_t a[4];
        ldmatrix_x4(a, address(state + by_rows<8>(X::kUnits * warp + 16 * m, 16 * k, lane)));
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float2 s = unpack<T>(a[e]);
          const float (&x)[4] = j[m][2 * k + (e >> 1)];
          sum += x[2 * (e & 1)] * s.x + x[2 * (e & 1) + 1] * s.y;
        }
      }
    return sum;
  }

  // this warp's share of left' right, for its tile of tokens, with hidden units as rows
  __device__ __forceinline__ void contract(float (&u)[8][4], uint32_t left, uint32_t right) {
#pragma unroll kUnroll
    for (int k = part * X::kPartUnits; k < (part + 1) * X::kPartUnits; k += 16) {
      uint32_t a[4];
      ldmatrix_x4_trans(a, address(left + by_columns<kPieces>(k, 16 * tile, lane)));
      add_rows(u, a, right, k);
    }
  }
  template <bool kAwait> __device__ __forceinline__ void contract_all(float (&y)[X::kChannels], uint32_t left, uint32_t right) {
    fresh();
    float u[8][4] = {};
    contract(u, left, right);
    if (kAwait) Base::await();
    Base::hand_over(u);
    Base::meet();
    Base::collect(y);
  }

  __device__ __forceinline__ T* of_token(const MirasTokens& x, int token, int channel) {
    return static_cast<T*>(x.data) + batch * x.batch + (begin + token) * x.token + h * x.head + channel;
  }

  // adds to the gradient of LayerNorm's weight (0) or bias (1), for this thread's row and channels
  __device__ __forceinline__ void add_norm(int which, int i, int channel, const float (&x)[4]) {
    if constexpr (S::kParks) {
      float4& sum = at<float4>(S::kSums + 4 * ((which * C + row) * kD + channel));
      sum = make_float4(sum.x + x[0], sum.y + x[1], sum.z + x[2], sum.w + x[3]);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) norm[which][i + j] += x[j];
    }
  }

  // LayerNorm's weight (0) or bias (1): what this group's segments and chunks add to its gradient
  __device__ __forceinline__ void end_norm(int64_t place, int64_t stop, int which) {
    constexpr int kRow = S::kParks ? kD : S::kExchangeRow;
    const uint32_t rows = S::kParks ? S::kSums + which * C * kD * 4 : S::kExchange;
    if constexpr (!S::kParks) {
      each_four([&](int i, int channel) {
        const float (&x)[X::kChannels] = norm[which];
        at<float4>(rows + 4 * (row * kRow + channel)) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
      });
      __syncthreads();
    }
    if (Base::rank() > 0) return;
    sum_rows<C, kRow>(rows, [&](int channel, float sum) {
      for (int64_t i = place; i < stop; ++i) sum += b.norm_shares[((i * p.H + h) * 2 + which) * kD + channel];
      b.grad_norm[((int64_t(n) * p.H + h) * 2 + which) * kD + channel] += sum;
    });
  }
};

}  // namespace miras::cuda
