// The forward of a segment again, from its checkpoint, with the read-out's backward (docs/mathematics.md, section 10) and everything that
// `reverse` needs of a chunk. Per chunk, after the stages of mlp_stages.h up to Aq, with Pn = -L o (Q K') and N1n, N2n likewise:
//
//     read_out      Uq = gamma (Aq S1) - (L o Aq A') U1;  dUq = LN-vjp(w dO)                                     barrier | barrier
//     hidden_grad   N1n = -L o (dUq U1')                                                                                 | barrier
//                   dZq' = gelu'(Zq') o (gamma (S1 dUq') + A' N1n');  R1 = -(L o Aq A')' dUq                             | barrier
//     query_grad    dQ = dO + gamma (dZq W2) - (L o dZq U2') K;  N2n;  d log alpha's pairs                       barrier | barrier
//     update
#pragma once

#include "mlp_backward.h"

namespace miras::cuda {

template <int C, int Hd, class T, int kBlocks> struct Replay : Chain<C, Hd, T, ReplayShared<C, Hd>, kBlocks> {
  using Base = Chain<C, Hd, T, ReplayShared<C, Hd>, kBlocks>;
  using To = Handed<C, kBlocks * Hd>;
  using Base::fresh, Base::each_four, Base::floats, Base::load_tokens, Base::packed, Base::weight, Base::add_rows;
  using Base::kStrips, Base::kEights, Base::kTiles, Base::kPieces, Base::kPass;
  using Base::lane, Base::warp, Base::g, Base::t, Base::tile, Base::part, Base::row, Base::piece, Base::s1, Base::w2, Base::u2;
  using Base::p, Base::n, Base::h, Base::batch, Base::begin, Base::tokens;
  using typename Base::S;
  using typename Base::X;
  static_assert(kPass == kEights);
  static constexpr int kColumns = C / X::kLanes;  // of a square matrix that a thread has of its row

  const MirasMlpBackward& b;
  char* to;                           // what is handed over of this chunk
  uint32_t dzq[kStrips][kEights][2];  // gelu'(Zq'), then dZq'
  float raw[kColumns];                // (Aq A') of this thread's row
  float dw[X::kChannels] = {}, db[X::kChannels] = {};

  __device__ __forceinline__ Replay(const MirasMlpBackward& b, int n, int h) : Base(b.chain, n, h), b(b) {}

  // of a tile of the head's hidden units this block's share, from shared memory
  __device__ __forceinline__ void hand(uint32_t offset, uint32_t tile, uint32_t bytes) {
    offset += Base::rank() * bytes;
    for (uint32_t i = 16 * threadIdx.x; i < bytes; i += 16 * X::kThreads) *reinterpret_cast<uint4*>(to + offset + i) = at<uint4>(tile + i);
  }
  // of [C, C] the pieces up to the diagonal's tile of 16
  __device__ __forceinline__ void hand_pairs(uint32_t offset, uint32_t square) {
    for (int i = threadIdx.x; i < C * kPieces; i += X::kThreads) {
      const int r = i / kPieces, ch = i % kPieces;
      if (ch / 2 <= r / 16 && Base::writes(r))
        *reinterpret_cast<uint4*>(to + offset + place<kPieces>(r, ch)) = at<uint4>(square + place<kPieces>(r, ch));
    }
  }
  template <class Fragment> __device__ __forceinline__ void hand_fragment(uint32_t offset, int m, int k, const Fragment& a) {
    const int strip = (Base::rank() * X::kWarps + warp) * kStrips + m;
    *reinterpret_cast<uint4*>(to + offset + ((strip * kTiles + k) * 32 + lane) * 16) = make_uint4(a[0], a[1], a[2], a[3]);
  }
  // this thread's columns of its row of a square matrix whose shares lie beside the channels'
  __device__ __forceinline__ void collect_pairs(float (&x)[kColumns]) {
    if constexpr (kBlocks > 1) {
      Base::template sum_parts<4>(x, kD + piece * kColumns);
    } else {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        x[i] = 0.0f;
#pragma unroll
        for (int j = 0; j < X::kParts; ++j)
          x[i] += at<float>(Base::exchange_row(tile * X::kParts + j, row % 16) + 4 * (kD + piece * kColumns + i));
      }
    }
  }
  __device__ __forceinline__ static uint32_t pair_place(int row, int column) { return place<kPieces>(row, column / 8) + column % 8 * 2; }
  __device__ __forceinline__ void load_output_grad(float (&x)[4], int first_token, int channel) {
    uint2 both = make_uint2(0, 0);
    if (first_token + row < tokens) {
      const MirasTokens& from = b.grad_out;
      both = *reinterpret_cast<const uint2*>(static_cast<const T*>(from.data) + batch * from.batch +
                                             (begin + first_token + row) * from.token + h * from.head + channel);
    }
    const float2 low = unpack<T>(both.x), high = unpack<T>(both.y);
    x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
  }

  __device__ __forceinline__ void read_out(uint32_t logs, uint32_t gammas, int first_token) {
    float u[8][4] = {}, scores[kEights][4] = {};
    Base::read_part(u, scores, S::kAq, S::kS1, S::kA, S::kU1, logs, gammas);
    Base::await();
    Base::hand_over(u), Base::hand_over(scores, kD);
    Base::meet();
    float x[X::kChannels], y[X::kChannels];
    Base::collect(x), collect_pairs(raw);
    Base::release();
    const float inverse = Base::normalise(x);
    const float2 of_row = at<float2>(logs + 8 * row);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int s = piece * kColumns + i;
      at<T>(S::kScores + pair_place(row, s)) = T(raw[i] * weight(logs, of_row, row, s));
    }
    float sum = 0.0f, with = 0.0f;
    each_four([&](int i, int channel) {
      float o[4], w[4];
      load_output_grad(o, first_token, channel), floats(w, at<float4>(S::kNorm + 4 * channel));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        dw[i + j] += o[j] * x[i + j], db[i + j] += o[j];
        y[i + j] = w[j] * o[j], sum += y[i + j], with += y[i + j] * x[i + j];
      }
    });
    sum = row_sum<X::kLanes>(sum) * (1.0f / kD), with = row_sum<X::kLanes>(with) * (1.0f / kD);
    const float gamma = at<float>(gammas + 4 * row);
    each_four([&](int i, int channel) {
      float du[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) du[j] = inverse * (y[i + j] - sum - x[i + j] * with);
      at<uint2>(S::kDUq + channel_place(row, channel)) = packed(du, 1.0f);
      if (Base::writes(row)) *reinterpret_cast<uint2*>(to + To::kDUq + channel_place(row, channel)) = packed(du, gamma);
    });
  }

  __device__ __forceinline__ void hidden_grad(uint32_t Q, uint32_t logs, uint32_t gammas) {
    fresh();
    Base::weigh_pairs(S::kN1, S::kDUq, S::kU1, logs);
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
    __syncthreads();
    fresh();
#pragma unroll
    for (int k = 0; k < kTiles; ++k)
#pragma unroll
      for (int m = 0; m < kStrips; ++m) {
        uint32_t a[4];
        ldmatrix_x4(a, address(S::kA + by_rows<kPieces>(X::kUnits * warp + 16 * m, 16 * k, lane)));
#pragma unroll
        for (int x = 2 * k; x < kEights; x += 2) {  // tokens from those that write on
          uint32_t c[4];
          ldmatrix_x4(c, address(S::kN1 + by_columns<kPieces>(8 * x, 16 * k, lane)));
          mma_m16n8k16<T>(z[m][x], a, c[0], c[1]), mma_m16n8k16<T>(z[m][x + 1], a, c[2], c[3]);
        }
      }
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

  // R1 = -(L o Aq A')' dUq: each warp its tile of tokens and its part of the channels
  __device__ __forceinline__ void write_grad() {
    constexpr int kOwn = 8 / X::kParts;
    float u[kOwn][4] = {};
    const int first = part * kOwn;
#pragma unroll
    for (int k = 0; k < kTiles; ++k)
      if (k >= tile) {
        uint32_t a[4];
        ldmatrix_x4_trans(a, address(S::kScores + by_columns<kPieces>(16 * k, 16 * tile, lane)));
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const int column = first + i;
          uint32_t c[4];
          ldmatrix_x4_trans(c, address(S::kDUq + by_rows<8>(16 * k, 16 * (column / 2), lane)));
          mma_m16n8k16<T>(u[i], a, column % 2 ? c[2] : c[0], column % 2 ? c[3] : c[1]);
        }
      }
    if (!Base::writes(16 * tile)) return;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      float* from = reinterpret_cast<float*>(to + To::kR1) + (16 * tile + g) * kD + 8 * (first + i) + 2 * t;
      *reinterpret_cast<float2*>(from) = make_float2(u[i][0], u[i][1]);
      *reinterpret_cast<float2*>(from + 8 * kD) = make_float2(u[i][2], u[i][3]);
    }
  }

  __device__ __forceinline__ void query_grad(uint32_t K, uint32_t logs, uint32_t gammas, int first_token) {
    float u[8][4] = {}, pairs[kEights][4] = {};
    Base::read_part(u, pairs, S::kDZq, S::kS1, S::kU2, K, logs, gammas);
    Base::await();
    Base::hand_over(u), Base::hand_over(pairs, kD);
    hand(To::kW2, S::kS1, Hd * kD * 2), hand_pairs(To::kN1, S::kN1);
    Base::meet();
    float y[X::kChannels], x[kColumns];
    Base::collect(y), collect_pairs(x);
    if (first_token + row < tokens && Base::writes(row))
      each_four([&](int i, int channel) {
        float o[4];
        load_output_grad(o, first_token, channel);
#pragma unroll
        for (int j = 0; j < 4; ++j) o[j] += y[i + j];
        const MirasTokens& of = b.grad_q;
        T* at = static_cast<T*>(of.data) + batch * of.batch + (begin + first_token + row) * of.token + h * of.head + channel;
        *reinterpret_cast<uint2*>(at) = packed(o, 1.0f);
      });
    const float2 of_row = at<float2>(logs + 8 * row);
    float all = 0.0f, before[kColumns];  // over pairs that cross a token
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int s = piece * kColumns + i;
      before[i] = all;
      if (s / 16 <= row / 16) {
        if (Base::writes(row)) *reinterpret_cast<T*>(to + To::kN2 + pair_place(row, s)) = T(x[i] * weight(logs, of_row, row, s));
        const uint32_t place = pair_place(row, s);
        all += raw[i] * float(at<T>(S::kN1 + place)) + x[i] * float(at<T>(S::kP + place));
      }
    }
    if (!b.grad_log_decay) return;
    float up = all;
#pragma unroll
    for (int m = 1; m < X::kLanes; m *= 2) {
      const float more = __shfl_up_sync(0xffffffffu, up, m);
      if (piece >= m) up += more;
    }
    float read = 0.0f;
    const uint32_t other = Base::other();
#pragma unroll
    for (int w = 0; w < X::kWarps; ++w) read += Base::of_blocks(S::kReads + 4 * (w * C + row), other);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int s = piece * kColumns + i;
      at<float>(S::kCrossed + 4 * (row * C + s)) = s <= row ? before[i] + (up - all) + read : 0.0f;
    }
  }

  __device__ __forceinline__ void run(int at_place) {
    const int64_t first = b.segments[2 * at_place + 1] * p.every;
    const int chunks = (tokens + C - 1) / C, last = int(first + p.every < chunks ? first + p.every : chunks);
    if (first >= last) return;
    fresh();
    Base::release();
    Base::load_state(p.checkpoints + (b.slots[at_place] * p.H + h) * Base::kState);
    for (int i = threadIdx.x; i < kD; i += X::kThreads)
      at<float>(S::kNorm + 4 * i) = p.ln_weight[h * kD + i], at<float>(S::kNorm + 4 * (kD + i)) = p.ln_bias[h * kD + i];
    Base::fetch(int(first));
    cp_async_wait<0>();
    if (warp == 0) Base::weigh(int(first));
    __syncthreads();
#pragma unroll 1
    for (int c = int(first); c < last; ++c) {
      const uint32_t tile = (c & (S::kBuffers - 1)) * S::kTile, buffer = (c & 1) * S::kGateBuffer;
      const uint32_t K = S::kK + tile, V = S::kV + tile, Q = S::kQ + tile;
      const uint32_t logs = S::kLogs + buffer, gammas = S::kGamma + buffer;
      to = b.handed + ((int64_t(at_place) * p.every + (c - first)) * p.H + h) * To::kBytes;
      if (S::kBuffers > 1 && c + 1 < last) Base::fetch(c + 1);
      Base::predict(K, Q, logs);
      __syncthreads();
      hand(To::kS1, S::kS1, Hd * kD * 2), hand_pairs(To::kP, S::kP);
      Base::inner_gradient(K, V, S::kRows + buffer, [&](int channel, const float* x, const float (&gu)[4], float inverse) {
        if (!Base::writes(row)) return;
        *reinterpret_cast<float4*>(to + To::kX + 4 * (row * kD + channel)) = make_float4(x[0], x[1], x[2], x[3]);
        *reinterpret_cast<uint2*>(to + To::kGu + channel_place(row, channel)) = packed(gu, inverse);
        if (channel == 0) *reinterpret_cast<float*>(to + To::kInverse + 4 * row) = inverse;
      });
      __syncthreads();
      Base::hidden(Q, gammas,
                   [&](int m, int x, int e, const FastGelu& u, const FastGelu& v) { dzq[m][x][e] = pack<T>(u.slope(), v.slope()); });
#pragma unroll
      for (int m = 0; m < kStrips; ++m)
#pragma unroll
        for (int x = 0; x < kEights; x += 2) {
          const uint32_t a[4] = {u2[m][x][0], u2[m][x][1], u2[m][x + 1][0], u2[m][x + 1][1]};
          Base::template put_fragment<kPieces>(S::kU2, m, x, a);
        }
      __syncthreads();
      read_out(logs, gammas, c * C);
      __syncthreads();
      hidden_grad(Q, logs, gammas);
      __syncthreads();
      query_grad(K, logs, gammas, c * C);
      Base::release();
      __syncthreads();
      if (S::kBuffers == 1 && c + 1 < last) Base::fetch(c + 1);
      if (b.grad_log_decay && threadIdx.x < C && c * C + int(threadIdx.x) < tokens && Base::writes(threadIdx.x)) {
        float sum = 0.0f;
        for (int r = threadIdx.x; r < C; ++r) sum += at<float>(S::kCrossed + 4 * (r * C + threadIdx.x));
        b.grad_log_decay[(batch * p.T + begin + c * C + threadIdx.x) * p.H + h] = sum;
      }
      Base::update(gammas);
      cp_async_wait<0>();
      if (c + 1 < last && threadIdx.x < 32) Base::weigh(c + 1);
      __syncthreads();
    }
    Base::await();
    fresh();
    float* share = b.norm_shares + (int64_t(at_place) * p.H + h) * 2 * kD;
    sum_tokens(dw, [&](int channel, float sum) { share[channel] = sum; });
    __syncthreads();
    sum_tokens(db, [&](int channel, float sum) { share[kD + channel] = sum; });
  }
  // f(channel, the sum over tokens), by the first threads
  template <class Function> __device__ __forceinline__ void sum_tokens(const float (&x)[X::kChannels], Function&& f) {
    each_four([&](int i, int channel) {
      at<float4>(S::kExchange + 4 * (row * S::kExchangeRow + channel)) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
    });
    __syncthreads();
    if (Base::rank() == 0) sum_rows<C, S::kExchangeRow>(S::kExchange, f);
  }
};

}  // namespace miras::cuda
