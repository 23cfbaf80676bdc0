// The forward of a segment again, from its checkpoint, with the read-out's backward (docs/mathematics.md, section 10) and everything that
// `reverse` needs of a chunk. Per chunk, after the stages of mlp_stages.h up to Aq, with Pn = -L o (Q K') and N1n, N2n likewise:
//
//     read_out      Uq = gamma (Aq S1) - (L o Aq A') U1;  dUq = LN-vjp(w dO)                                     barrier | barrier
//     hidden_grad   N1n = -L o (dUq U1')                                                                                 | barrier
//                   dZq' = gelu'(Zq') o (gamma (S1 dUq') + A' N1n');  R1 = -(L o Aq A')' dUq                             | barrier
//     query_grad    dQ = dO + gamma (dZq W2) - (L o dZq U2') K;  N2n;  d log alpha's pairs                       barrier | barrier
//     update
#pragma once

#include "mlp_replay_block.h"

namespace miras::cuda {

template <int C, int Hd, class T, int kBlocks> struct Replay : ReplayBlock<C, Hd, T, kBlocks> {
  using Base = ReplayBlock<C, Hd, T, kBlocks>;
  using Base::Base, Base::b, Base::to, Base::fresh, Base::each_four, Base::floats, Base::packed, Base::kColumns, Base::kFours;
  using Base::each_piece, Base::hand_fragment, Base::hand_pairs, Base::load_output_grad, Base::packed_piece, Base::unpack_four,
      Base::unpack_piece, Base::weigh_row;
  using Base::kStrips, Base::kEights, Base::kTiles, Base::kPieces, Base::kPass;
  using Base::lane, Base::warp, Base::g, Base::t, Base::row, Base::piece, Base::s1, Base::w2, Base::u2;
  using Base::p, Base::h, Base::batch, Base::begin, Base::tokens;
  using typename Base::Piece;
  using typename Base::S;
  using typename Base::To;
  using typename Base::X;

  uint32_t dzq[kStrips][kEights][2];  // gelu'(Zq'), then dZq'
  float raw[kColumns];                // (Aq A') of this thread's row
  float dw[X::kChannels] = {}, db[X::kChannels] = {};

  __device__ __forceinline__ void read_out(uint32_t logs, uint32_t gammas, int first_token) {
    float u[8][4] = {}, scores[kEights][4] = {};
    Base::read_part(u, scores, S::kAq, S::kS1, S::kA, S::kU1, logs, gammas);
    Base::hand_over(u), Base::hand_over(scores, kD);
    Base::release();
    uint2 grad[kFours];
    load_output_grad(grad, first_token);
    Base::join();
    float x[X::kChannels], y[X::kChannels];
    Base::collect(x, raw);
    const float inverse = Base::normalise(x);
    float weighed[kColumns];
    weigh_row(weighed, raw, logs);
    each_piece([&](int i, uint32_t place) { Base::put_both(S::kScores + place, packed_piece(weighed, i)); });
    float sums[2] = {};  // of y and of y o x
    each_four([&](int i, int channel) {
      float o[4], w[4];
      unpack_four(o, grad[i / 4]), floats(w, at<float4>(S::kNorm + 4 * channel));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        dw[i + j] += o[j] * x[i + j], db[i + j] += o[j];
        y[i + j] = w[j] * o[j], sums[0] += y[i + j], sums[1] += y[i + j] * x[i + j];
      }
    });
    row_sums<X::kLanes>(sums);
    const float sum = sums[0] * (1.0f / kD), with = sums[1] * (1.0f / kD), gamma = at<float>(gammas + 4 * row);
    each_four([&](int i, int channel) {
      float du[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) du[j] = inverse * (y[i + j] - sum - x[i + j] * with);
      Base::put_both(S::kDUq + channel_place(row, channel), packed(du, 1.0f));
      *reinterpret_cast<uint2*>(to + To::kDUq + channel_place(row, channel)) = packed(du, gamma);
    });
  }

  __device__ __forceinline__ void hidden_grad(uint32_t Q, uint32_t logs, uint32_t gammas) {
    fresh();
    Base::template weigh_pairs<false>(S::kN1, S::kDUq, S::kU1, logs);
    Base::release();
    float z[kStrips][kPass][4] = {}, reads[kEights][2] = {};
    const auto read = [&](int m, int x, int e, uint32_t of) {  // d log alpha's share of what is read of the state
      const float2 y = unpack<T>(of);
      reads[x][0] += z[m][x][2 * e] * y.x, reads[x][1] += z[m][x][2 * e + 1] * y.y;
    };
    Base::slice_times(z, S::kS1, S::kDUq);
    Base::scale_tokens(z, gammas);
#pragma unroll
    for (int m = 0; m < kStrips; ++m)
#pragma unroll
      for (int k = 0; k < kTiles; ++k) {
        uint32_t a[4];
        ldmatrix_x4(a, address(S::kAq + by_rows<kPieces>(X::kUnits * warp + 16 * m, 16 * k, lane)));
        hand_fragment(To::kAq, m, k, a);
#pragma unroll
        for (int e = 0; e < 4; ++e) read(m, 2 * k + (e >> 1), e & 1, a[e]);
      }
    Base::join();
    fresh();
    Base::add_pairs(z, S::kN1, 0, [&](uint32_t (&a)[4], int m, int k) {
      ldmatrix_x4(a, address(S::kA + by_rows<kPieces>(X::kUnits * warp + 16 * m, 16 * k, lane)));
    });
#pragma unroll
    for (int m = 0; m < kStrips; ++m)
#pragma unroll
      for (int x = 0; x < kEights; x += 2) {
        uint32_t a[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          uint32_t& own = dzq[m][x + (e >> 1)][e & 1];
          const float2 slope = unpack<T>(own);
          a[e] = own = pack<T>(z[m][x + (e >> 1)][2 * (e & 1)] * slope.x, z[m][x + (e >> 1)][2 * (e & 1) + 1] * slope.y);
        }
        Base::template put_fragment<kPieces>(S::kDZq, m, x, a);
        hand_fragment(To::kDZq, m, x / 2, a);
      }
    Base::state_times(z, w2, Q);
    Base::scale_tokens(z, gammas);
#pragma unroll
    for (int m = 0; m < kStrips; ++m)
#pragma unroll
      for (int x = 0; x < kEights; ++x)
#pragma unroll
        for (int e = 0; e < 2; ++e) read(m, x, e, dzq[m][x][e]);
    put_sums(S::kReads + warp * C * 4, reads, lane);
    Base::put_state(S::kS1, w2);  // in the place of S1, whose rows no other warp reads any more
    write_grad();
  }

  // R1 = -(L o Aq A')' dUq: this block's tiles of 16 tokens, the channels shared out over the warps
  __device__ __forceinline__ void write_grad() {
    constexpr int kOwnTiles = kTiles / kBlocks, kShares = X::kWarps / kOwnTiles, kOwn = 8 / kShares;
    const int tile = warp / kShares * kBlocks + Base::rank(), first = warp % kShares * kOwn;
    float u[kOwn][4] = {};
#pragma unroll
    for (int k = 0; k < kTiles; ++k)
      if (k >= tile) {
        uint32_t a[4], c[(kOwn + 1) / 2][4];
        ldmatrix_x4_trans(a, address(S::kScores + by_columns<kPieces>(16 * k, 16 * tile, lane)));
#pragma unroll
        for (int i = 0; i < kOwn; i += 2) ldmatrix_x4_trans(c[i / 2], address(S::kDUq + by_rows<8>(16 * k, 16 * ((first + i) / 2), lane)));
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const uint32_t (&of)[4] = c[i / 2];
          const bool second = (first + i) % 2;
          mma_m16n8k16<T>(u[i], a, second ? of[2] : of[0], second ? of[3] : of[1]);
        }
      }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      float* from = reinterpret_cast<float*>(to + To::kR1) + (16 * tile + g) * kD + 8 * (first + i) + 2 * t;
      *reinterpret_cast<float2*>(from) = make_float2(u[i][0], u[i][1]);
      *reinterpret_cast<float2*>(from + 8 * kD) = make_float2(u[i][2], u[i][3]);
    }
  }

  // up to the exchange's barrier
  __device__ __forceinline__ void query_grad(uint32_t K, uint32_t logs, uint32_t gammas) {
    float u[8][4] = {}, pairs[kEights][4] = {};
    Base::read_part(u, pairs, S::kDZq, S::kS1, S::kU2, K, logs, gammas);
    Base::hand_over(u), Base::hand_over(pairs, kD);
    Base::release();
    Base::template hand<Hd * kD * 2>(To::kW2, S::kS1), hand_pairs(To::kN1, S::kN1);
  }
  // and after it
  __device__ __forceinline__ void query_rows(uint32_t logs, int first_token) {
    uint2 grad[kFours];
    load_output_grad(grad, first_token);
    float read = 0.0f;  // of d log alpha: what is read of the state
    for (int w = piece; w < X::kWarps; w += X::kLanes) read += Base::of_blocks(S::kReads + 4 * (w * C + row), Base::other());
    float y[X::kChannels], x[kColumns];
    Base::collect(y, x);
    if (first_token + row < tokens) {
      const MirasTokens& of = b.grad_q;
      T* to = static_cast<T*>(of.data) + batch * of.batch + (begin + first_token + row) * of.token + h * of.head;
      each_four([&](int i, int channel) {
        float o[4];
        unpack_four(o, grad[i / 4]);
#pragma unroll
        for (int j = 0; j < 4; ++j) o[j] += y[i + j];
        *reinterpret_cast<uint2*>(to + channel) = packed(o, 1.0f);
      });
    }
    float crossing[kColumns] = {}, weighed[kColumns];  // pairs' shares of d log alpha of the tokens between
    weigh_row(weighed, x, logs);
    if (piece * kColumns / 16 <= row / 16) {  // up to the diagonal's tile
      float n1[kColumns], of_p[kColumns];
      each_piece([&](int i, uint32_t place) {
        *reinterpret_cast<Piece*>(to + To::kN2 + place) = packed_piece(weighed, i);
        unpack_piece(n1, i, at<Piece>(S::kN1 + place)), unpack_piece(of_p, i, at<Piece>(S::kP + place));
      });
#pragma unroll
      for (int i = 0; i < kColumns; ++i) crossing[i] = raw[i] * n1[i] + x[i] * of_p[i];
    }
    if (b.grad_log_decay) sum_crossing(crossing, read);
  }
  // d log alpha of a token: pairs of tokens that cross it. From each pair's share to the sum over each warp's rows, by columns
  __device__ __forceinline__ void sum_crossing(float (&x)[kColumns], float read) {
    float all = 0.0f;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const float own = x[i];
      x[i] = all, all += own;  // pairs that begin before this column
    }
    float up = all;
#pragma unroll
    for (int m = 1; m < X::kLanes; m *= 2) {
      const float more = __shfl_up_sync(0xffffffffu, up, m), other = __shfl_xor_sync(0xffffffffu, read, m);
      if (piece >= m) up += more;
      read += other;
    }
    read += up - all;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) x[i] = piece * kColumns + i <= row ? x[i] + read : 0.0f;
    const int first = share_sums<X::kLanes>(x, lane);
    if (keeps_sum<X::kLanes, kColumns>(lane))
#pragma unroll
      for (int i = 0; i < kLeft<X::kLanes, kColumns>; ++i) at<float>(S::kCrossed + 4 * (warp * C + piece * kColumns + first + i)) = x[i];
  }
  // then of all warps, by the first threads, which have the fewest pairs in `read_out`, each a token of this block's
  __device__ __forceinline__ void put_crossing(int first_token) {
    constexpr int kOwn = C / kBlocks;
    const int s = Base::rank() * kOwn + threadIdx.x;
    if (!b.grad_log_decay || threadIdx.x >= kOwn || first_token + s >= tokens) return;
    b.grad_log_decay[(batch * p.T + begin + first_token + s) * p.H + h] = Base::sum_warps(S::kCrossed + 4 * s, C);
  }
  // the segment at a place, of its sequence the one of this number, whose checkpoint lies in a slot
  __device__ __forceinline__ void run(int at_place, int64_t number, int64_t slot) {
    const int64_t first = number * p.every;
    const int chunks = (tokens + C - 1) / C, last = int(first + p.every < chunks ? first + p.every : chunks);
    if (first >= last) return;
    fresh();
    Base::release();
    Base::fetch(int(first));
    const int i = threadIdx.x % kD;
    const float weight = p.ln_weight[h * kD + i], bias = p.ln_bias[h * kD + i];
    Base::load_state(p.checkpoints + (slot * p.H + h) * Base::kState);
    if (threadIdx.x < kD) at<float>(S::kNorm + 4 * i) = weight, at<float>(S::kNorm + 4 * (kD + i)) = bias;
    cp_async_wait<0>();
    if (warp == 0) Base::weigh(int(first));
    Base::await();  // the other block has begun, to which this one writes
    __syncthreads();
#pragma unroll 1
    for (int c = int(first); c < last; ++c) {
      const uint32_t tile = (c & (S::kBuffers - 1)) * S::kTile, buffer = (c & 1) * S::kGateBuffer;
      const uint32_t K = S::kK + tile, V = S::kV + tile, Q = S::kQ + tile;
      const uint32_t logs = S::kLogs + buffer, gammas = S::kGamma + buffer;
      to = b.handed + ((int64_t(at_place) * p.every + (c - first)) * p.H + h) * To::kBytes;
      const bool more = c + 1 < last;
      if (more && S::kBuffers > 1) Base::fetch(c + 1);
      else if (more) Base::fresh(), Base::fetch_gates(c + 1), cp_async_commit();
      Base::predict(K, Q, logs);
      __syncthreads();
      Base::template hand<Hd * kD * 2>(To::kS1, S::kS1), hand_pairs(To::kP, S::kP), Base::hand_gates(S::kRows + buffer, gammas);
      Base::template inner_gradient<false>(K, V, S::kRows + buffer, [&](int channel, const float* x, const float (&gu)[4], float inverse) {
        *reinterpret_cast<float4*>(to + To::kX + 4 * (row * kD + channel)) = make_float4(x[0], x[1], x[2], x[3]);
        *reinterpret_cast<uint2*>(to + To::kGu + channel_place(row, channel)) = packed(gu, inverse);
        if (channel == 0) *reinterpret_cast<float*>(to + To::kInverse + 4 * row) = inverse;
      });
      Base::meet();
      Base::hidden(Q, gammas, [&](int m, int x, const FastGelus<8>& u) { Base::put_slopes(dzq[m], x, u); });
      put_u2();
      __syncthreads();
      if (c > first) put_crossing((c - 1) * C);
      read_out(logs, gammas, c * C);
      Base::meet();
      hidden_grad(Q, logs, gammas);
      __syncthreads();
      if (more && threadIdx.x < 32) cp_async_wait<0>(), Base::weigh(c + 1);  // the first warp has the fewest pairs here
      query_grad(K, logs, gammas);
      Base::join();
      if (more && S::kBuffers == 1) Base::fetch_tokens(c + 1), cp_async_commit();
      query_rows(logs, c * C);
      Base::release();
      load_u2();
      Base::update(gammas);
      Base::join();
      cp_async_wait<0>();
      __syncthreads();
    }
    fresh();
    put_crossing((last - 1) * C);
    sum_tokens(dw, 0), sum_tokens(db, kD);
    Base::meet();
    if (Base::rank() == 0 && threadIdx.x < 2 * kD)
      b.norm_shares[(int64_t(at_place) * p.H + h) * 2 * kD + threadIdx.x] = Base::sum_warps(S::kExchange + 4 * threadIdx.x, 2 * kD);
    Base::release(), Base::await();
  }
  // U2' lies in shared memory alone until `update`, while registers are short
  __device__ __forceinline__ void put_u2() {
#pragma unroll
    for (int m = 0; m < kStrips; ++m)
#pragma unroll
      for (int x = 0; x < kEights; x += 2) {
        const uint32_t a[4] = {u2[m][x][0], u2[m][x][1], u2[m][x + 1][0], u2[m][x + 1][1]};
        Base::template put_fragment<kPieces>(S::kU2, m, x, a);
      }
  }
  __device__ __forceinline__ void load_u2() {
    fresh();
#pragma unroll
    for (int m = 0; m < kStrips; ++m)
#pragma unroll
      for (int k = 0; k < kTiles; ++k) {
        uint32_t a[4];
        ldmatrix_x4(a, address(S::kU2 + by_rows<kPieces>(X::kUnits * warp + 16 * m, 16 * k, lane)));
        u2[m][2 * k][0] = a[0], u2[m][2 * k][1] = a[1], u2[m][2 * k + 1][0] = a[2], u2[m][2 * k + 1][1] = a[3];
      }
  }
  // over this warp's rows, to the exchange buffer
  __device__ __forceinline__ void sum_tokens(float (&x)[X::kChannels], int to) {
    const int first = share_sums<X::kLanes>(x, lane);
#pragma unroll
    for (int i = 0; i < kLeft<X::kLanes, X::kChannels>; ++i) {
      const int j = first + i, channel = 4 * piece + X::kLanes * (j / 4 * 4) + j % 4;
      at<float>(S::kExchange + 4 * (warp * 2 * kD + to + channel)) = x[i];
    }
  }
};

}  // namespace miras::cuda
