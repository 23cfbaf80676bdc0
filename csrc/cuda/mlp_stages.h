// The forward of the MLP memory (docs/mathematics.md, sections 9 and 10), a block a sequence and head, S1 = W1' and W2 in registers as
// accumulators of tensor-core products. With primes for transposes, t for tokens that read and s for tokens that write, per chunk:
//
//     predict         Z' = W2 K';  A' = gelu(Z');  P = -L o (Q K')                                                        | barrier
//     inner_gradient  U = A S1;  E = K + LN(U) - V;  g = psi(E);  U1 = eta LN-vjp(w g);  -dec U1, -dec K            barrier | barrier
//     update          U2' = gelu'(Z') o (S1 U1');  Zq' = gamma (W2 Q') + U2' P';  Aq' = gelu(Zq')
//                     W2 <- gamma_C W2 + U2' (-dec K);  S1 <- gamma_C S1 + A' (-dec U1)                                   | barrier
//     read            Uq = gamma (Aq S1) - (L o Aq A') U1, with S1 before the chunk;  O = Q + LN(Uq)                barrier | barrier
//
// A product contracts a register tile over its columns only. So hidden units are rows everywhere (Z', A', U2', Aq'), and what has to be
// contracted over them, A and Aq, is read from shared memory, transposed by ldmatrix. With a retention gate S1 and W2 are the duals where
// they are updated and primals in all products (mlp_primal.h), and P and L o Aq A' have the factors rho. docs/mlp-on-chip.md
#pragma once

#include "gelu.h"
#include "mlp_pairs.h"

namespace miras::cuda {

template <int C, int Hd, class T, class Layout = ChainShared<C, Hd>, int kBlocks = 1> struct Chain : Pairs<C, Hd, T, Layout, kBlocks> {
  using Base = Pairs<C, Hd, T, Layout, kBlocks>;
  using Base::Base, Base::p, Base::traits, Base::n, Base::h, Base::batch, Base::begin, Base::tokens;
  using Base::fetch, Base::fresh, Base::load_state, Base::store_state, Base::weigh;
  using Base::floats, Base::load_tokens, Base::packed;
  using Base::kGates, Base::lane, Base::warp, Base::g, Base::t, Base::tile, Base::part, Base::row, Base::s1, Base::w2, Base::u2;
  using Base::kStrips, Base::kEights, Base::kTiles, Base::kPieces, Base::kPass, Base::kParked, Base::kUnroll, Base::kState;
  using Base::log_rho, Base::own_w2, Base::put_s1, Base::put_w2, Base::sum_duals, Base::weigh_duals;
  using Base::state_times, Base::scale_tokens, Base::add_rows, Base::each_four, Base::kSplit, Base::m1, Base::m2;
  using typename Base::S;
  using typename Base::X;

  __device__ __forceinline__ void predict(uint32_t K, uint32_t Q, uint32_t logs) {
    fresh();
    put_s1(), put_w2();
    if constexpr (S::kMomentum) Base::put_state(S::kM1, m1);
    fresh();
#pragma unroll
    for (int first = 0; first < kEights; first += kPass) {
      float z[kStrips][kPass][4];
      state_times(z, w2, K + first * 8 * 2 * kD, own_w2());
#pragma unroll
      for (int m = 0; m < kStrips; ++m)
#pragma unroll
        for (int x = 0; x < kPass; x += 2) {
          const FastGelus<8> u(z[m][x], z[m][x + 1]);
          put_slopes(u2[m], first + x, u);
          uint32_t a[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) a[e] = pack<T>(u.value(2 * e), u.value(2 * e + 1));
          store_fragment<kPieces>(S::kA, X::kUnits * warp + 16 * m, first + x, lane, a);
        }
    }
    park(true);
    Base::weigh_pairs(S::kP, Q, K, logs, log_rho(1));
  }

  // packed derivatives at two tiles of 8 tokens
  __device__ __forceinline__ static void put_slopes(uint32_t (&to)[kEights][2], int x, const FastGelus<8>& u) {
    float y[8];
    u.slopes(y);
#pragma unroll
    for (int e = 0; e < 4; ++e) to[x + (e >> 1)][e & 1] = pack<T>(y[2 * e], y[2 * e + 1]);
  }

  // Half of the slopes lies in the warp's own rows of Aq while registers are short.
  __device__ __forceinline__ void park(bool out) {
#pragma unroll
    for (int i = 0; i < kParked; ++i) {
      uint4& x = at<uint4>(S::kAq + warp * (X::kUnits * C * 2) + (i * 32 + lane) * 16);
      uint32_t (&a)[2] = u2[kStrips - 1][2 * i], (&b)[2] = u2[kStrips - 1][2 * i + 1];
      if (out) {
        x = make_uint4(a[0], a[1], b[0], b[1]);
      } else {
        const uint4 y = x;
        a[0] = y.x, a[1] = y.y, b[0] = y.z, b[1] = y.w;
      }
    }
  }

  // keep(channel, four of LN(U), four of Gu without its factor, the factor)
  template <bool kAwaits = true, class Keep>
  __device__ __forceinline__ void inner_gradient(uint32_t K, uint32_t V, uint32_t rows, Keep&& keep) {
    fresh();
    float u[8][4] = {};
    Base::add_units(u, S::kA, S::kS1, [](auto&&...) {});
    float y[X::kChannels], e[X::kChannels];
    const float inverse = Base::template exchange<kAwaits, false>(u, y);
    const float4 of_token = at<float4>(rows + 16 * row);  // eta, -dec, delta, with momentum -Theta_C; eta is 0 beyond the end
    float square = 0.0f;
    each_four([&](int i, int channel) {
      float k[4], v[4], w[4], b[4];
      load_tokens(k, K + channel_place(row, channel)), load_tokens(v, V + channel_place(row, channel));
      floats(w, at<float4>(S::kNorm + 4 * channel)), floats(b, at<float4>(S::kNorm + 4 * (kD + channel)));
      Base::put_both(S::kKEnd + channel_place(row, channel), packed(k, of_token.y));
      if constexpr (S::kMomentum) Base::put_both(S::kKStep + channel_place(row, channel), packed(k, of_token.w));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float predicted = traits.predicts ? k[j] + y[i + j] * w[j] + b[j] : 0.0f;
        e[i + j] = predicted - v[j];
        square += e[i + j] * e[i + j];
      }
    });
    if (traits.couples_row) square = row_sum<X::kLanes>(square);
    with_fast_bias(p.bias, p.bias_params, [&](auto bias) {
      const auto of_row = bias.row(square, of_token.z);
#pragma unroll
      for (int i = 0; i < X::kChannels; ++i) e[i] = bias.value(e[i], of_row);
    });
    float sums[2] = {};
    each_four([&](int i, int channel) {
      float w[4];
      floats(w, at<float4>(S::kNorm + 4 * channel));
#pragma unroll
      for (int j = 0; j < 4; ++j) e[i + j] *= w[j], sums[0] += e[i + j], sums[1] += e[i + j] * y[i + j];
    });
    row_sums<X::kLanes>(sums);
    const float sum = sums[0] * (1.0f / kD), with = sums[1] * (1.0f / kD);
    each_four([&](int i, int channel) {
      float gu[4], u1[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) gu[j] = e[i + j] - sum - y[i + j] * with, u1[j] = of_token.x * inverse * gu[j];
      keep(channel, &y[i], gu, inverse);
      Base::put_both(S::kU1 + channel_place(row, channel), packed(u1, 1.0f));
      Base::put_both(S::kU1End + channel_place(row, channel), packed(u1, of_token.y));
      if constexpr (S::kMomentum) Base::put_both(S::kU1Step + channel_place(row, channel), packed(u1, of_token.w));
    });
  }

  // U2' and Aq'; keep(strip, tile of 8 tokens, gelu(Zq') of this and the next tile)
  template <class Keep> __device__ __forceinline__ void hidden(uint32_t Q, uint32_t gammas, Keep&& keep) {
    fresh();
    put_w2();
    park(false);
    __syncwarp();  // Aq overwrites what other lanes parked
#pragma unroll
    for (int first = 0; first < kEights; first += kPass) {
      float z[kStrips][kPass][4];
      state_times(z, s1, S::kU1 + first * 8 * 2 * kD, S::kS1);
#pragma unroll
      for (int m = 0; m < kStrips; ++m)
#pragma unroll
        for (int x = 0; x < kPass; ++x)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            uint32_t& own = u2[m][first + x][e];
            const float2 slope = unpack<T>(own);
            own = pack<T>(z[m][x][2 * e] * slope.x, z[m][x][2 * e + 1] * slope.y);
          }
    }
    fresh();
#pragma unroll
    for (int first = 0; first < kEights; first += kPass) {
      float z[kStrips][kPass][4];
      state_times(z, w2, Q + first * 8 * 2 * kD, own_w2());
      scale_tokens(z, gammas + 4 * 8 * first);
      if constexpr (S::kMomentum) {
        float carried[kStrips][kPass][4];
        state_times(carried, m2, Q + first * 8 * 2 * kD);
        scale_tokens(carried, S::kCarry + 4 * 8 * first);
#pragma unroll
        for (int m = 0; m < kStrips; ++m)
#pragma unroll
          for (int x = 0; x < kPass; ++x)
#pragma unroll
            for (int e = 0; e < 4; ++e) z[m][x][e] += carried[m][x][e];
      }
      Base::add_pairs(z, S::kP, first, [&](uint32_t (&a)[4], int m, int k) {
        a[0] = u2[m][2 * k][0], a[1] = u2[m][2 * k][1], a[2] = u2[m][2 * k + 1][0], a[3] = u2[m][2 * k + 1][1];
      });
#pragma unroll
      for (int m = 0; m < kStrips; ++m)
#pragma unroll
        for (int x = 0; x < kPass; x += 2) {
          const FastGelus<8> u(z[m][x], z[m][x + 1]);
          keep(m, first + x, u);
          uint32_t a[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) a[e] = pack<T>(u.value(2 * e), u.value(2 * e + 1));
          store_fragment<kPieces>(S::kAq, X::kUnits * warp + 16 * m, first + x, lane, a);
        }
    }
  }

  __device__ __forceinline__ void update(uint32_t gammas) {
    fresh();
    const float gamma = at<float>(gammas + 4 * (C - 1));  // tokens beyond the end do not decay
#pragma unroll
    for (int m = 0; m < kStrips; ++m)
#pragma unroll
      for (int x = 0; x < 8; ++x)
#pragma unroll
        for (int e = 0; e < 4; ++e) w2[m][x][e] *= gamma, s1[m][x][e] *= gamma;
    if constexpr (S::kMomentum) {
      const float carry = at<float>(S::kCarry + 4 * (C - 1)), pi = at<float>(S::kPi);
#pragma unroll
      for (int m = 0; m < kStrips; ++m)
#pragma unroll
        for (int x = 0; x < 8; ++x)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            w2[m][x][e] += carry * m2[m][x][e], s1[m][x][e] += carry * m1[m][x][e];
            m2[m][x][e] *= pi, m1[m][x][e] *= pi;
          }
    }
    uint32_t a[kStrips][4];
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
#pragma unroll
      for (int m = 0; m < kStrips; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) a[m][e] = u2[m][2 * k + e / 2][e % 2];
      Base::add_strips(w2, a, S::kKEnd, 16 * k);
      if constexpr (S::kMomentum) Base::add_strips(m2, a, S::kKStep, 16 * k);
    }
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
#pragma unroll
      for (int m = 0; m < kStrips; ++m) ldmatrix_x4(a[m], address(S::kA + by_rows<kPieces>(X::kUnits * warp + 16 * m, 16 * k, lane)));
      Base::add_strips(s1, a, S::kU1End, 16 * k);
      if constexpr (S::kMomentum) Base::add_strips(m1, a, S::kU1Step, 16 * k);
    }
  }

  // This part's share of u = gamma (left' state) - rho (L o scores) rows, scores = left' right, for 16 tokens; with hidden units as rows
  __device__ __forceinline__ void read_part(float (&u)[8][4], float (&scores)[kEights][4], uint32_t left, uint32_t state, uint32_t right,
                                            uint32_t rows, uint32_t logs, uint32_t gammas, float log_rho = 0.0f) {
    fresh();
    Base::add_units(u, left, state, [&](const uint32_t (&a)[4], int k) {
      uint32_t b[kTiles][4];
#pragma unroll
      for (int s = 0; s < kTiles; ++s)
        if (s <= tile) ldmatrix_x4_trans(b[s], address(right + by_rows<kPieces>(k, 16 * s, lane)));
#pragma unroll
      for (int s = 0; s < kTiles; ++s)
        if (s <= tile) mma_m16n8k16<T>(scores[2 * s], a, b[s][0], b[s][1]), mma_m16n8k16<T>(scores[2 * s + 1], a, b[s][2], b[s][3]);
    });
    const int t0 = 16 * tile + g;
    const float upper = at<float>(gammas + 4 * t0), lower = at<float>(gammas + 4 * (t0 + 8));
#pragma unroll
    for (int x = 0; x < 8; ++x) u[x][0] *= upper, u[x][1] *= upper, u[x][2] *= lower, u[x][3] *= lower;
#pragma unroll
    for (int s = 0; s < kTiles; ++s)
      if (s <= tile) {  // each part's share of the scores has its own rounding and product
        float weights[2][4];
        Base::template weigh_fragment<S::kKeeps>(weights, logs, 2 * s, log_rho);
        uint32_t a[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = e >> 1, half = 2 * (e & 1);
          const float (&x)[4] = scores[2 * s + i];
          a[e] = pack<T>(x[half] * weights[i][half], x[half + 1] * weights[i][half + 1]);
        }
        add_rows(u, a, rows, 16 * s);
      }
  }

  // u += b (Aq M1), this part's share
  __device__ __forceinline__ void read_carried(float (&u)[8][4]) {
    fresh();
    float carried[8][4] = {};
    Base::add_units(carried, S::kAq, S::kM1, [](auto&&...) {});
    const float upper = at<float>(S::kCarry + 4 * (16 * tile + g)), lower = at<float>(S::kCarry + 4 * (16 * tile + g + 8));
#pragma unroll
    for (int x = 0; x < 8; ++x) {
      u[x][0] += upper * carried[x][0], u[x][1] += upper * carried[x][1];
      u[x][2] += lower * carried[x][2], u[x][3] += lower * carried[x][3];
    }
  }

  __device__ __forceinline__ void read(uint32_t Q, uint32_t logs, uint32_t gammas, int first_token) {
    float u[8][4] = {}, scores[kEights][4] = {};
    read_part(u, scores, S::kAq, S::kS1, S::kA, S::kU1, logs, gammas, log_rho(0));
    if constexpr (S::kMomentum) read_carried(u);
    float y[X::kChannels];
    Base::template exchange<false, true>(u, y);
    if (first_token + row < tokens && Base::writes(row))
      each_four([&](int i, int channel) {
        float q[4], w[4], b[4];
        load_tokens(q, Q + channel_place(row, channel));
        floats(w, at<float4>(S::kNorm + 4 * channel)), floats(b, at<float4>(S::kNorm + 4 * (kD + channel)));
#pragma unroll
        for (int j = 0; j < 4; ++j) q[j] += y[i + j] * w[j] + b[j];
        T* to = static_cast<T*>(p.out.data) + batch * p.out.batch + (begin + first_token + row) * p.out.token + h * p.out.head + channel;
        *reinterpret_cast<uint2*>(to) = packed(q, 1.0f);
      });
  }

  __device__ __forceinline__ void run() {
    const int64_t head = int64_t(n) * p.H + h, own = head * kState;
    const int chunks = (tokens + C - 1) / C;
    fresh();
    load_state(p.state + own);
    for (int i = threadIdx.x; i < kD; i += X::kThreads)
      at<float>(S::kNorm + 4 * i) = p.ln_weight[h * kD + i], at<float>(S::kNorm + 4 * (kD + i)) = p.ln_bias[h * kD + i];
    if constexpr (kSplit) Base::meet();  // the other block has begun, to which this one writes
    Base::release();
#pragma unroll 1
    for (int c = -1; c < chunks; ++c) {  // before the first chunk what a chunk does for the next one
      const uint32_t tile = (c & 1) * S::kTile, buffer = (c & 1) * S::kGateBuffer;
      const uint32_t K = S::kK + tile, V = S::kV + tile, Q = S::kQ + tile;
      const uint32_t logs = S::kLogs + buffer, gammas = S::kGamma + buffer;
      if (c + 1 < chunks) fetch(c + 1);
      if (c >= 0) {
        if (p.checkpoints && c % p.every == 0) {
          const int64_t slot = (p.first_slot ? p.first_slot[n] : int64_t(n) * p.slots_per_sequence) + c / p.every;
          store_state(p.checkpoints + (slot * p.H + h) * kState);
        }
        if (p.start && (c + 1) * C > tokens) Base::store_duals(p.start + head * Base::kDuals);
        predict(K, Q, logs);
        __syncthreads();
        inner_gradient(K, V, S::kRows + buffer, [](auto&&...) {});
        if constexpr (kSplit) Base::meet();
        else __syncthreads();
        hidden(Q, gammas, [](auto&&...) {});
        update(gammas);
      }
      sum_duals();
      __syncthreads();
      const auto weigh_next = [&] {
        cp_async_wait<0>();
        if (c + 1 < chunks && threadIdx.x < 32) weigh(c + 1);
      };
      constexpr bool kEarly = kSplit && !S::kMomentum;  // the first warp has the fewest pairs to read; but M has one buffer
      if constexpr (kEarly) weigh_next();
      if (c >= 0) read(Q, logs, gammas, c * C);
      if constexpr (!kEarly) weigh_next();
      weigh_duals();
      __syncthreads();
    }
    Base::await();
    fresh();
    if (p.start && tokens % C == 0) {
      Base::store_duals(p.start + head * Base::kDuals);
      if (threadIdx.x == 0 && Base::rank() == 0) p.open_log_decay[head] = 0.0f;
    }
    store_state(p.state + own);
  }
};

}  // namespace miras::cuda
