// What the stages of `reverse` (mlp_reverse.h) are made of: copies of what was handed over, products with packed registers, sums.
#pragma once

#include "mlp_backward.h"

namespace miras::cuda {

template <int C, int Hd, class T, int kBlocks> struct ReverseBlock : Block<C, Hd, T, ReverseShared<C, Hd>, kBlocks> {
  using Base = Block<C, Hd, T, ReverseShared<C, Hd>, kBlocks>;
  using From = Handed<C, kBlocks * Hd>;
  using Base::fresh, Base::each_four, Base::packed;
  using Base::kStrips, Base::kEights, Base::kTiles, Base::kPieces, Base::kPass;
  using Base::lane, Base::warp, Base::g, Base::t, Base::tile, Base::part, Base::row, Base::piece;
  using Base::p, Base::traits, Base::n, Base::h, Base::batch, Base::begin, Base::tokens;
  using Base::s1, Base::w2;  // here J1 and J2
  using typename Base::S;
  using typename Base::X;
  static_assert(kPass == kEights);
  using Packed = uint32_t[kStrips][kEights][2];

  const MirasMlpBackward& b;
  const char* from;         // what was handed over of this chunk
  int turn;                 // 0 or 1: which of two places have this chunk's K and gates
  Packed slope, curve, dz;  // gelu'(Z'); gelu''(Z') o Ga', then times eta dU2'; Gz', then dGa', then dZ'
  float de[X::kChannels];
  float norm[2][X::kChannels] = {};  // of LayerNorm's weight and bias, unless they lie in shared memory

  __device__ __forceinline__ ReverseBlock(const MirasMlpBackward& b, int n, int h) : Base(b.chain, n, h), b(b) {}

  __device__ __forceinline__ uint32_t keys_tile() const { return S::kK + turn * S::kTile; }
  __device__ __forceinline__ uint32_t queries_grad_tile() const { return S::kK + (1 - turn) * S::kTile; }
  __device__ __forceinline__ uint32_t rows_of_gates() const { return S::kRows + turn * S::kGateBuffer; }
  __device__ __forceinline__ uint32_t gammas() const { return S::kGamma + turn * S::kGateBuffer; }

  // ------------------------------------------------------------------------------------------------------------------ copies

  // a chunk's tiles, and of [C, C] the pieces up to the diagonal's tile of 16
  __device__ __forceinline__ static void copy(uint32_t tile, const char* from, uint32_t bytes) {
#pragma unroll
    for (uint32_t i = 16 * threadIdx.x; i < bytes; i += 16 * X::kThreads) cp_async_16(address(tile + i), from + i);
  }
  __device__ __forceinline__ static void copy_pairs(uint32_t square, const char* from) {
#pragma unroll
    for (int i = threadIdx.x; i < C * kPieces; i += X::kThreads) {
      const int r = i / kPieces, ch = i % kPieces;
      if (ch / 2 <= r / 16) cp_async_16(address(square + place<kPieces>(r, ch)), from + place<kPieces>(r, ch));
    }
  }
  // `count` rows of chunk c's tokens from row `first` on; zeros beyond the sequence's end
  __device__ __forceinline__ void copy_tokens(uint32_t tile, const MirasTokens& x, int c, int first = 0, int count = C) {
#pragma unroll
    for (int i = threadIdx.x; i < 8 * count; i += X::kThreads) {
      const int r = first + i / 8, ch = i % 8, token = c * C + r;
      cp_async_16(address(tile + place<8>(r, ch)), of_token(x, token < tokens ? token : 0, 8 * ch), token < tokens);
    }
  }
  // Starts the copies of chunk c, as soon as their places are free: after `units` of the chunk before, after the last exchange, and after
  // that chunk. What lies at `turn` is the chunk before.
  __device__ __forceinline__ void fetch_first(int c, const char* from) {
    copy_tokens(queries_grad_tile(), p.k, c);
    copy(S::kS1, from + From::kS1 + Base::rank() * S::kState, S::kState), copy(S::kGu, from + From::kGu, S::kTile);
    copy_pairs(S::kP, from + From::kP), copy_pairs(S::kN1, from + From::kN1);
    copy(S::kRows + (1 - turn) * S::kGateBuffer, from + From::kGates, S::kGateBuffer);
  }
  __device__ __forceinline__ void fetch_second(int c, const char* from) {
    copy(S::kW2, from + From::kW2 + Base::rank() * S::kState, S::kState), copy_pairs(S::kN2, from + From::kN2);
    copy_tokens(S::kQ, p.q, c);
  }
  // now of the chunk at `turn`; of V only the rows that this block computes
  __device__ __forceinline__ void fetch_last(int c) {
    constexpr int kOwn = Base::kSplit ? C / 2 : C;
    copy_tokens(S::kV, p.v, c, Base::kSplit ? Base::rank() * kOwn : 0, kOwn);
    copy(queries_grad_tile(), from + From::kDUq, S::kTile);
    cp_async_commit();
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

  // ---------------------------------------------------------------------------------------------------------------- products

  // z [units, s] += x [units, t] square [t, s], t >= s
  __device__ __forceinline__ void times_pairs(float (&z)[kStrips][kPass][4], const Packed& x, uint32_t square) {
    constexpr int kAll = kTiles * (kTiles + 1) / 2, kAhead = kAll < 4 ? kAll : 4;
    uint32_t c[kAhead][4];
    int next_k = 0, next_s = 0;  // known to the compiler
    const auto load = [&](uint32_t (&to)[4]) {
      ldmatrix_x4_trans(to, address(square + by_rows<kPieces>(16 * next_k, 16 * next_s, lane)));
      if (++next_s > next_k) ++next_k, next_s = 0;
    };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load(c[i]);
    int i = 0;
#pragma unroll
    for (int k = 0; k < kTiles; ++k)
#pragma unroll
      for (int s = 0; s <= k; ++s, ++i) {
        uint32_t (&of)[4] = c[i % kAhead];
#pragma unroll
        for (int m = 0; m < kStrips; ++m) {
          const uint32_t a[4] = {x[m][2 * k][0], x[m][2 * k][1], x[m][2 * k + 1][0], x[m][2 * k + 1][1]};
          mma_m16n8k16<T>(z[m][2 * s], a, of[0], of[1]), mma_m16n8k16<T>(z[m][2 * s + 1], a, of[2], of[3]);
        }
        if (i + kAhead < kAll) load(of);
      }
  }
  // j += x [units, s] rows [s, D], x of this warp's units in shared memory
  __device__ __forceinline__ void add_outer(float (&j)[kStrips][8][4], uint32_t x, uint32_t rows) {
    uint32_t a[2][kStrips][4];
    const auto load = [&](int k) {
#pragma unroll
      for (int m = 0; m < kStrips; ++m) ldmatrix_x4(a[k % 2][m], address(x + by_rows<kPieces>(X::kUnits * warp + 16 * m, 16 * k, lane)));
    };
    load(0);
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
      if (k + 1 < kTiles) load(k + 1);
      Base::add_strips(j, a[k % 2], rows, 16 * k);
    }
  }
  // likewise in registers
  __device__ __forceinline__ void add_outer(float (&j)[kStrips][8][4], const Packed& x, uint32_t rows) {
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
      uint32_t a[kStrips][4];
#pragma unroll
      for (int m = 0; m < kStrips; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) a[m][e] = x[m][2 * k + e / 2][e % 2];
      Base::add_strips(j, a, rows, 16 * k);
    }
  }
  __device__ __forceinline__ void decay(float (&j)[kStrips][8][4]) {
    const float gamma = at<float>(gammas() + 4 * (C - 1));
#pragma unroll
    for (int m = 0; m < kStrips; ++m)
#pragma unroll
      for (int x = 0; x < 8; ++x)
#pragma unroll
        for (int e = 0; e < 4; ++e) j[m][x][e] *= gamma;
  }
  // z's columns times those of their tokens' eta, -dec, delta and -dec eta
  __device__ __forceinline__ void scale_columns(float (&z)[kStrips][kPass][4], int which) {
    float factors[kEights][2];
#pragma unroll
    for (int x = 0; x < kEights; ++x)
#pragma unroll
      for (int e = 0; e < 2; ++e) factors[x][e] = at<float>(rows_of_gates() + 16 * (8 * x + 2 * t + e) + 4 * which);
    reads_end();
#pragma unroll
    for (int x = 0; x < kEights; ++x)
#pragma unroll
      for (int m = 0; m < kStrips; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) z[m][x][e] *= factors[x][e % 2];
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

  // the sum over this thread's elements of j times a state in shared memory
  __device__ __forceinline__ float product_with(const float (&j)[kStrips][8][4], uint32_t state) {
    float sums[4] = {};
#pragma unroll
    for (int m = 0; m < kStrips; ++m) {
      uint32_t a[4][4];
#pragma unroll
      for (int k = 0; k < 4; ++k) ldmatrix_x4(a[k], address(state + by_rows<8>(X::kUnits * warp + 16 * m, 16 * k, lane)));
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float2 s = unpack<T>(a[k][e]);
          const float (&x)[4] = j[m][2 * k + (e >> 1)];
          sums[e] += x[2 * (e & 1)] * s.x, sums[e] += x[2 * (e & 1) + 1] * s.y;
        }
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  // u's rows times those of a tile [C, D]: this warp's share of a number per token, to its 16 places of both blocks' [blocks, warps, 16]
  __device__ __forceinline__ void put_products(const float (&u)[8][4], uint32_t rows, uint32_t to) {
    uint32_t a[4][4];
#pragma unroll
    for (int k = 0; k < 4; ++k) ldmatrix_x4(a[k], address(rows + by_rows<8>(16 * tile, 16 * k, lane)));
    float sums[2][2] = {};  // of rows g and g + 8
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 y = unpack<T>(a[k][e]);
        const float (&x)[4] = u[2 * k + (e >> 1)];
        float& sum = sums[e & 1][e >> 1];
        sum += x[2 * (e & 1)] * y.x, sum += x[2 * (e & 1) + 1] * y.y;
      }
    float both[2] = {sums[0][0] + sums[0][1], sums[1][0] + sums[1][1]};
    row_sums<4>(both);
    const uint32_t own = to + 4 * (16 * (Base::rank() * X::kWarps + warp) + g);
    if (t == 0) Base::put_both(own, both[0]), Base::put_both(own + 32, both[1]);
  }
  // a token's share that part j of a block has put there
  __device__ __forceinline__ static uint32_t share_of(uint32_t to, int block, int token, int j) {
    return to + 4 * (16 * (block * X::kWarps + token / 16 * X::kParts + j) + token % 16);
  }

  // gamma Q in the place of dU
  __device__ __forceinline__ void scale_queries() {
#pragma unroll
    for (int i = threadIdx.x; i < C * 8; i += X::kThreads) {
      const uint4 q = at<uint4>(S::kQ + 16 * i);
      const float gamma = at<float>(gammas() + 4 * (i / 8));
      const auto scaled = [&](uint32_t both) {
        const float2 y = unpack<T>(both);
        return pack<T>(y.x * gamma, y.y * gamma);
      };
      at<uint4>(S::kV + 16 * i) = make_uint4(scaled(q.x), scaled(q.y), scaled(q.z), scaled(q.w));
    }
  }

  // four of this thread's channels
  __device__ __forceinline__ static void put_four(float (&x)[X::kChannels], int i, float4 y) {
    x[i] = y.x, x[i + 1] = y.y, x[i + 2] = y.z, x[i + 3] = y.w;
  }
  // all of them, of 16-bit numbers that were read before
  __device__ __forceinline__ static void unpack_row(float (&x)[X::kChannels], const uint2 (&both)[X::kChannels / 4]) {
#pragma unroll
    for (int i = 0; i < X::kChannels / 4; ++i) {
      const float2 low = unpack<T>(both[i].x), high = unpack<T>(both[i].y);
      put_four(x, 4 * i, make_float4(low.x, low.y, high.x, high.y));
    }
  }

  __device__ __forceinline__ T* of_token(const MirasTokens& x, int token, int channel) {
    return static_cast<T*>(x.data) + batch * x.batch + (begin + token) * x.token + h * x.head + channel;
  }

  // of a warp's lanes, each with kPer tokens
  static constexpr int kPer = (C + 31) / 32, kActive = C / kPer;
  // f(i, d log alpha of a token), for the lane's tokens that this block writes
  template <class Function> __device__ __forceinline__ void each_gate(int c, Function&& f) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int s = kPer * lane + i;
      if (s < C && s / (C / kBlocks) == Base::rank() && c * C + s < tokens)
        f(i, b.grad_log_decay[(batch * p.T + begin + c * C + s) * p.H + h]);
    }
  }
  // d log alpha, by one warp: what is read across a token goes into all tokens after it; `before`: what `replay` wrote
  __device__ __forceinline__ void end_decay(int c, const float (&before)[kPer]) {
    float inner = 0.0f, all = 0.0f, ends[kPer] = {};
    if (lane < kActive)
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        const int s = kPer * lane + i;
        inner += at<float>(S::kInner + 4 * s);
        float of = at<float>(S::kToEnd + 4 * s);
#pragma unroll
        for (int j = 0; j < kBlocks * X::kParts; ++j) of += at<float>(share_of(S::kEnds, j / X::kParts, s, j % X::kParts));
        ends[i] = all, all += of;
      }
    inner = row_sum<32>(inner);
    float up = all;
#pragma unroll
    for (int m = 1; m < kActive; m *= 2) {
      const float more = __shfl_up_sync(kWholeWarp, up, m);
      if (lane >= m) up += more;
    }
    const float gamma = at<float>(gammas() + 4 * (C - 1));
    each_gate(c, [&](int i, float& to) { to = before[i] + gamma * inner + (up - all) + ends[i]; });
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

  // What this group's segments and chunks add to the gradients of LayerNorm's weight and bias
  __device__ __forceinline__ void end_norm(int64_t place, int64_t stop) {
    constexpr int kRow = S::kParks ? kD : S::kExchangeRow;
    constexpr uint32_t kAll = S::kParks ? S::kSums : S::kExchange, kBytes = C * kRow * 4;
    static_assert(S::kParks || 2 * kBytes <= S::kRows - S::kExchange);
    if constexpr (!S::kParks)
#pragma unroll
      for (int which = 0; which < 2; ++which)
        each_four([&](int i, int channel) {  // to the first block
          const float (&x)[X::kChannels] = norm[which];
          const float4 of = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
          const uint32_t to = kAll + which * kBytes + 4 * (row * kRow + channel);
          if constexpr (kBlocks == 1) at<float4>(to) = of;
          else store_cluster(address_in(0, to), of);
        });
    Base::meet();
    if (Base::rank() > 0) return;
#pragma unroll
    for (int which = 0; which < 2; ++which)
      sum_rows<C, kRow>(kAll + which * kBytes, [&](int channel, float sum) {
        for (int64_t i = place; i < stop; ++i) sum += b.norm_shares[((i * p.H + h) * 2 + which) * kD + channel];
        b.grad_norm[((int64_t(n) * p.H + h) * 2 + which) * kD + channel] += sum;
      });
  }
};

}  // namespace miras::cuda
