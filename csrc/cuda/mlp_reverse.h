// The chunks of a sequence and head from last to first: J1 = dS1 and J2 = dW2 after a chunk in registers, as accumulators. With what
// `replay` handed over, X = LN(U), and ' for transposes, per chunk (docs/mathematics.md, section 10):
//
//     write      J1 to shared memory                                                                                     | barrier
//     hidden     Z' = W2 K', A' = gelu(Z'), Ga' = S1 Gu', Gz' = gelu'(Z') o Ga'
//                dU2' = dZq' Pn - dec (J2 K');  dGa' = gelu'(Z') o eta dU2';  <J, S>                                     | barrier
//     rows       dU1 = R1 - dec (A J1);  dGu = eta dU1 + dGa S1;  dE, dV, d lr, d delta, dU          barrier | barrier | barrier | barrier
//     units      dZ' = gelu'(Z') o (S1 dU' + Aq' N1n - dec eta (J1 Gu')) + gelu''(Z') o Ga' o eta dU2'
//                J1 <- gamma_C J1 + Aq' (gamma dUq) + dGa' Gu + A' dU;  J2 to shared memory                               | barrier
//     keys       dK = dE + dZ W2 - dec U2 J2 + N2n' Q;  d log alpha                                             barrier
//     states     J2 <- gamma_C J2 + dZ' K + dZq' (gamma Q)                                                                | barrier
#pragma once

#include "mlp_reverse_block.h"

namespace miras::cuda {

template <int C, int Hd, class T, int kBlocks> struct Reverse : ReverseBlock<C, Hd, T, kBlocks> {
  using Base = ReverseBlock<C, Hd, T, kBlocks>;
  using Base::Base, Base::p, Base::traits, Base::n, Base::h, Base::batch, Base::begin, Base::tokens, Base::b, Base::from;
  using Base::contract, Base::product_with, Base::add_norm, Base::end_norm, Base::add_rows;
  using Base::each_four, Base::each_packed, Base::scale_columns, Base::floats, Base::load_tokens, Base::packed, Base::of_token;
  using Base::fetch, Base::fetch_early, Base::put, Base::park, Base::unpark, Base::load_fragments, Base::times_pairs, Base::add_outer,
      Base::decay;
  using Base::kStrips, Base::kEights, Base::kTiles, Base::kPieces, Base::kPass;
  using Base::lane, Base::warp, Base::tile, Base::part, Base::row, Base::piece, Base::fresh;
  using Base::s1, Base::w2, Base::slope, Base::curve, Base::dz, Base::de;
  using typename Base::From;
  using typename Base::Packed;
  using typename Base::S;
  using typename Base::X;

  __device__ __forceinline__ void hidden() {
    fresh();
    {
      float z[kStrips][kPass][4] = {};
      Base::slice_times(z, S::kW2, S::kK);
      each_packed(dz, z, [&](uint32_t& x, float low, float high, int m, int i, int e) {
        const FastGelu u(low), v(high);
        x = pack<T>(u.value(), v.value());
        slope[m][i][e] = pack<T>(u.slope(), v.slope()), curve[m][i][e] = pack<T>(u.curve(), v.curve());
      });
      put(S::kA, dz);
      park(slope, S::kSlopes), park(curve, S::kExchange);
    }
    {
      float z[kStrips][kPass][4] = {};
      Base::slice_times(z, S::kS1, S::kGu);
      unpark(slope, S::kSlopes), unpark(curve, S::kExchange);
      each_packed(dz, z, [&](uint32_t& x, float low, float high, int m, int i, int e) {
        const float2 first = unpack<T>(slope[m][i][e]), second = unpack<T>(curve[m][i][e]);
        x = pack<T>(first.x * low, first.y * high), curve[m][i][e] = pack<T>(second.x * low, second.y * high);
      });
      park(curve, S::kExchange);
    }
    fresh();
    float z[kStrips][kPass][4], sums[kEights][2] = {};
    const auto sum = [&] {  // of z o Gz'
      each_packed(dz, z, [&](uint32_t x, float low, float high, int m, int i, int e) {
        const float2 gz = unpack<T>(x);
        sums[i][0] += low * gz.x, sums[i][1] += high * gz.y;
      });
    };
    Base::state_times(z, w2, S::kK);
    scale_columns(z, [](float, float minus_dec) { return minus_dec; });
    if (b.grad_log_decay) {
      sum();
      put_sums(S::kEnds + warp * C * 4, sums, lane);
#pragma unroll
      for (int i = 0; i < kEights; ++i) sums[i][0] = sums[i][1] = 0.0f;
    }
    {
      Packed dzq;
      load_fragments(dzq, From::kDZq);
      times_pairs(z, dzq, S::kP);
    }
    sum();
    put_sums(S::kLr + warp * C * 4, sums, lane);
    scale_columns(z, [](float eta, float) { return eta; });
    unpark(slope, S::kSlopes), unpark(curve, S::kExchange);
    each_packed(dz, z, [&](uint32_t& x, float low, float high, int m, int i, int e) {
      const float2 first = unpack<T>(slope[m][i][e]), second = unpack<T>(curve[m][i][e]);
      x = pack<T>(first.x * low, first.y * high), curve[m][i][e] = pack<T>(second.x * low, second.y * high);
    });
    put(S::kB, dz);
    if (b.grad_log_decay) {
      const float inner = row_sum<32>(product_with(s1, S::kS1) + product_with(w2, S::kW2));
      if (lane == 0) at<float>(S::kInner + 4 * warp) = inner;
    }
  }

  // The inner gradient's backward, for this thread's channels of its row
  __device__ __forceinline__ void rows(int first_token) {
    float aj[X::kChannels], dg[X::kChannels];
    Base::template contract_all<false>(aj, S::kA, S::kJ);
    Base::release();
    if constexpr (kBlocks == 1) __syncthreads();  // else what follows `await` comes after all threads' `release`
    Base::template contract_all<true>(dg, S::kB, S::kS1);
    const float4 gates = at<float4>(S::kRows + 16 * row);  // eta, -dec, delta
    const float eta = gates.x, inverse = *reinterpret_cast<const float*>(from + From::kInverse + 4 * row);
    float x[X::kChannels], e[X::kChannels];
    float d_eta = 0.0f, to_end = 0.0f, square = 0.0f, sum = 0.0f, with_x = 0.0f, with_gu = 0.0f;
    each_four([&](int i, int channel) {
      float k[4], v[4], w[4], c[4], gu[4], r1[4], of[4];
      load_tokens(k, S::kK + channel_place(row, channel)), load_tokens(v, S::kV + channel_place(row, channel));
      load_tokens(gu, S::kGu + channel_place(row, channel));
      floats(w, at<float4>(S::kNorm + 4 * channel)), floats(c, at<float4>(S::kNorm + 4 * (kD + channel)));
      floats(of, *reinterpret_cast<const float4*>(from + From::kX + 4 * (row * kD + channel)));
      floats(r1, *reinterpret_cast<const float4*>(from + From::kR1 + 4 * (row * kD + channel)));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        x[i + j] = of[j];
        e[i + j] = (traits.predicts ? k[j] + of[j] * w[j] + c[j] : 0.0f) - v[j];
        square += e[i + j] * e[i + j];
        const float du1 = r1[j] + gates.y * aj[i + j];
        d_eta += du1 * gu[j], to_end += gu[j] * aj[i + j];
        dg[i + j] += eta * du1;
        sum += dg[i + j], with_x += dg[i + j] * of[j], with_gu += dg[i + j] * gu[j];
      }
    });
    d_eta = row_sum<X::kLanes>(d_eta), to_end = row_sum<X::kLanes>(to_end);
    sum = row_sum<X::kLanes>(sum) * (1.0f / kD), with_x = row_sum<X::kLanes>(with_x) * (1.0f / kD);
    with_gu = row_sum<X::kLanes>(with_gu) * (1.0f / kD);
    if (traits.couples_row) square = row_sum<X::kLanes>(square);
    float d_delta = 0.0f, y_with_x = 0.0f;
    float y[X::kChannels];  // w psi(E)
    with_fast_bias(p.bias, p.bias_params, [&](auto bias) {
      using Bias = decltype(bias);
      const auto of_row = bias.row(square, gates.z);
      float pull = 0.0f;
      each_four([&](int i, int channel) {
        float w[4], products[4];
        floats(w, at<float4>(S::kNorm + 4 * channel));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float psi = bias.value(e[i + j], of_row), dy = inverse * (dg[i + j] - sum - x[i + j] * with_x), d_psi = w[j] * dy;
          de[i + j] = d_psi * bias.slope(e[i + j], psi, of_row);
          if (Bias::kUsesDelta) d_delta += d_psi * bias.slope_delta(e[i + j], of_row);
          if (Bias::kCouplesRow) pull += d_psi * bias.pull(e[i + j], of_row);
          products[j] = dy * psi;
          y[i + j] = w[j] * psi, y_with_x += y[i + j] * x[i + j];
        }
        add_norm(0, i, channel, products);
      });
      if (Bias::kCouplesRow) {
        pull = row_sum<X::kLanes>(pull);
#pragma unroll
        for (int i = 0; i < X::kChannels; ++i) de[i] += pull * e[i];
      }
    });
    y_with_x = row_sum<X::kLanes>(y_with_x) * (1.0f / kD);
    if (traits.uses_delta) d_delta = row_sum<X::kLanes>(d_delta);
    const bool in = first_token + row < tokens && Base::writes(row);
    float dx_sum = 0.0f, dx_with = 0.0f;
    each_four([&](int i, int channel) {
      float w[4], dv[4], shift[4], products[4];
      floats(w, at<float4>(S::kNorm + 4 * channel));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        dv[j] = -de[i + j];
        if (!traits.predicts) de[i + j] = 0.0f;
        shift[j] = de[i + j], products[j] = de[i + j] * x[i + j];
        y[i + j] = w[j] * de[i + j] - inverse * (dg[i + j] * y_with_x + y[i + j] * with_x);  // dX
        dx_sum += y[i + j], dx_with += y[i + j] * x[i + j];
      }
      add_norm(0, i, channel, products), add_norm(1, i, channel, shift);
      if (in) *reinterpret_cast<uint2*>(of_token(b.grad_v, first_token + row, channel)) = packed(dv, 1.0f);
    });
    dx_sum = row_sum<X::kLanes>(dx_sum) * (1.0f / kD), dx_with = row_sum<X::kLanes>(dx_with) * (1.0f / kD);
    each_four([&](int i, int channel) {
      float du[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) du[j] = y[i + j] - dx_sum - x[i + j] * (dx_with + with_gu);
      at<uint2>(S::kV + channel_place(row, channel)) = packed(du, inverse);
    });
    if (piece == 0) {
      const uint32_t other = Base::other();
      float lr = d_eta, end = gates.y * to_end;
#pragma unroll
      for (int w = 0; w < X::kWarps; ++w) {
        lr += Base::of_blocks(S::kLr + 4 * (w * C + row), other);
        if (b.grad_log_decay) end += Base::of_blocks(S::kEnds + 4 * (w * C + row), other);
      }
      if (b.grad_log_decay) at<float>(S::kToEnd + 4 * row) = eta * end;
      if (in) {
        const int64_t at_token = (batch * p.T + begin + first_token + row) * p.H + h;
        b.grad_lr[at_token] = lr;
        if (b.grad_delta) b.grad_delta[at_token] = d_delta;
      }
    }
    Base::release();
  }

  __device__ __forceinline__ void units() {
    fresh();
    Base::put_state(S::kJ, w2);  // in the place of J1
    float z[kStrips][kPass][4];
    Packed aq;
    Base::state_times(z, s1, S::kGu);
    scale_columns(z, [](float eta, float minus_dec) { return eta * minus_dec; });
    Base::slice_times(z, S::kS1, S::kV);
    load_fragments(aq, From::kAq);
    times_pairs(z, aq, S::kN1);
    decay(s1);
    add_outer(s1, aq, S::kDUq);
    unpark(slope, S::kSlopes);
    each_packed(dz, z, [&](uint32_t& x, float low, float high, int m, int i, int e) {
      const float2 first = unpack<T>(slope[m][i][e]), second = unpack<T>(curve[m][i][e]);
      x = pack<T>(first.x * low + second.x, first.y * high + second.y);
    });
    fresh();
    add_outer(s1, S::kB, S::kGu);
    add_outer(s1, S::kA, S::kV);
    fresh();
#pragma unroll
    for (int m = 0; m < kStrips; ++m)
#pragma unroll
      for (int i = 0; i < kEights; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) z[m][i][e] = 0.0f;
    Base::slice_times(z, S::kS1, S::kGu);
    scale_columns(z, [](float eta, float minus_dec) { return eta * minus_dec; });
    each_packed(slope, z, [](uint32_t& x, float low, float high, int, int, int) {
      const float2 first = unpack<T>(x);
      x = pack<T>(first.x * low, first.y * high);
    });
    __syncwarp();  // other lanes have read A' and dGa'
    put(S::kA, slope), put(S::kB, dz);
  }

  __device__ __forceinline__ void keys(int first_token) {
    fresh();
    float u[8][4] = {};
    contract(u, S::kA, S::kJ);
    contract(u, S::kB, S::kW2);
#pragma unroll
    for (int k = 0; k < kTiles; ++k)
      if (k >= tile && (k - tile) % (kBlocks * X::kParts) == Base::rank() * X::kParts + part) {
        uint32_t a[4];
        ldmatrix_x4_trans(a, address(S::kN2 + by_columns<kPieces>(16 * k, 16 * tile, lane)));
        add_rows(u, a, S::kQ, 16 * k);
      }
    const float gamma = at<float>(S::kGamma + 4 * row);
    each_four([&](int, int channel) {
      float q[4];
      load_tokens(q, S::kQ + channel_place(row, channel));
      at<uint2>(S::kGu + channel_place(row, channel)) = packed(q, gamma);
    });
    Base::await();
    Base::hand_over(u);
    Base::meet();
    float y[X::kChannels];
    Base::collect(y);
    if (first_token + row < tokens && Base::writes(row))
      each_four([&](int i, int channel) {
        float dk[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) dk[j] = y[i + j] + de[i + j];
        *reinterpret_cast<uint2*>(of_token(b.grad_k, first_token + row, channel)) = packed(dk, 1.0f);
      });
    if (b.grad_log_decay && threadIdx.x < C && first_token + int(threadIdx.x) < tokens && Base::writes(threadIdx.x)) {
      float inner = 0.0f, end = 0.0f;
      const uint32_t other = Base::other();
      for (int w = 0; w < X::kWarps; ++w) inner += Base::of_blocks(S::kInner + 4 * w, other);
      for (int s = 0; s < int(threadIdx.x); ++s) end += at<float>(S::kToEnd + 4 * s);
      b.grad_log_decay[(batch * p.T + begin + first_token + threadIdx.x) * p.H + h] += at<float>(S::kGamma + 4 * (C - 1)) * inner + end;
    }
    Base::release();
  }

  __device__ __forceinline__ void states() {
    fresh();
    decay(w2);
    add_outer(w2, dz, S::kK);
    load_fragments(dz, From::kDZq);
    add_outer(w2, dz, S::kGu);
  }

  __device__ __forceinline__ void run() {
    const int64_t place = b.sequence_places[2 * n], stop = b.sequence_places[2 * n + 1];
    if (place == stop) return;
    const int64_t first = b.segments[2 * place + 1] * p.every, last = first + (stop - place) * p.every;
    const int chunks = (tokens + C - 1) / C;
    float* state = p.state + (int64_t(n) * p.H + h) * Base::kState;
    fresh();
    Base::release();
    Base::load_state(state);
    if constexpr (S::kParks)
      for (int i = threadIdx.x; i < 2 * C * kD; i += X::kThreads) at<float>(S::kSums + 4 * i) = 0.0f;
    for (int i = threadIdx.x; i < kD; i += X::kThreads)
      at<float>(S::kNorm + 4 * i) = p.ln_weight[h * kD + i], at<float>(S::kNorm + 4 * (kD + i)) = p.ln_bias[h * kD + i];
    int c = int(last < chunks ? last : chunks) - 1;
    from = b.handed + ((place * p.every + (c - first)) * p.H + h) * From::kBytes;
    fetch_early(from);
#pragma unroll 1
    for (; c >= first; --c) {
      fetch(c);
      Base::put_state(S::kJ, s1);
      cp_async_wait<0>();
      if (threadIdx.x < 32) Base::weigh(c);
      __syncthreads();
      Base::await();
      hidden();
      __syncthreads();
      rows(c * C);
      __syncthreads();
      units();
      __syncthreads();
      const char* next = from - int64_t(p.H) * From::kBytes;
      if (c > first) fetch_early(next);
      keys(c * C);
      states();
      from = next;
      __syncthreads();
    }
    Base::await();
    fresh();
    Base::store_state(state);
    end_norm(place, stop, 0);
    __syncthreads();
    end_norm(place, stop, 1);
  }
};

}  // namespace miras::cuda
