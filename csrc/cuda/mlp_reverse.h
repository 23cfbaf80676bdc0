// The chunks of a sequence and head from last to first: J1 = dS1 and J2 = dW2 after a chunk in registers, as accumulators. With what
// `replay` handed over, X = LN(U), and ' for transposes, per chunk (docs/mathematics.md, section 10):
//
//     hidden     Z' = W2 K', A' = gelu(Z'), Ga' = S1 Gu', Gz' = gelu'(Z') o Ga'
//                dU2' = dZq' Pn - dec (J2 K');  dGa' = gelu'(Z') o eta dU2'                                              | barrier
//     rows       dGu = eta (R1 - dec (A J1)) + dGa S1;  <J, S>;  dE, dV, d lr, d delta, dU                     barrier | barrier
//     units      dZ' = gelu'(Z') o (S1 dU' + Aq' N1n - dec eta (J1 Gu')) + gelu''(Z') o Ga' o eta dU2'
//                J1 <- gamma_C J1 + Aq' (gamma dUq) + dGa' Gu + A' dU;  J2 to shared memory                               | barrier
//     keys       dK = dE + dZ W2 - dec U2 J2 + N2n' Q;  d log alpha
//                J2 <- gamma_C J2 + dZ' K + dZq' (gamma Q);  J1 to shared memory                               barrier | barrier
#pragma once

#include "mlp_reverse_block.h"

namespace miras::cuda {

template <int C, int Hd, class T, int kBlocks> struct Reverse : ReverseBlock<C, Hd, T, kBlocks> {
  using Base = ReverseBlock<C, Hd, T, kBlocks>;
  using Base::Base, Base::p, Base::traits, Base::n, Base::h, Base::batch, Base::begin, Base::tokens, Base::b, Base::from, Base::turn;
  using Base::product_with, Base::put_products, Base::share_of, Base::add_norm, Base::end_norm, Base::each_gate, Base::kPer;
  using Base::each_four, Base::each_packed, Base::scale_columns, Base::put_four, Base::packed;
  using Base::fetch_first, Base::fetch_second, Base::fetch_last, Base::put, Base::park, Base::unpark, Base::load_fragments;
  using Base::times_pairs, Base::add_outer, Base::decay, Base::of_token, Base::keys_tile, Base::rows_of_gates, Base::gammas;
  using Base::kStrips, Base::kEights, Base::kTiles, Base::kPieces, Base::kPass;
  using Base::lane, Base::warp, Base::g, Base::tile, Base::part, Base::row, Base::piece, Base::fresh;
  using Base::s1, Base::w2, Base::slope, Base::curve, Base::dz, Base::de;
  using typename Base::From;
  using typename Base::Packed;
  using typename Base::S;
  using typename Base::X;

  enum { kEta, kMinusDec, kDelta, kBoth };  // a token's gates; the last one: -dec eta

  __device__ __forceinline__ void hidden() {
    fresh();
    {
      float z[kStrips][kPass][4] = {};
      Base::slice_times(z, S::kW2, keys_tile());
#pragma unroll
      for (int m = 0; m < kStrips; ++m)
#pragma unroll
        for (int i = 0; i < kEights; i += 2) {
          const FastGelus<8> of(z[m][i], z[m][i + 1]);
          float slopes[8], curves[8];
          of.derivatives(slopes, curves);
#pragma unroll
          for (int j = 0; j < 8; j += 2) {
            const int x = i + j / 4, e = j / 2 % 2;
            dz[m][x][e] = pack<T>(of.value(j), of.value(j + 1));
            slope[m][x][e] = pack<T>(slopes[j], slopes[j + 1]), curve[m][x][e] = pack<T>(curves[j], curves[j + 1]);
          }
        }
      put(S::kA, dz);
      park(slope, S::kSlopes), park(curve, S::kExchange);
    }
    {
      float z[kStrips][kPass][4] = {};
      Base::slice_times(z, S::kS1, S::kGu);
      unpark(slope, S::kSlopes), unpark(curve, S::kExchange);
      each_packed(dz, z, [&](uint32_t& x, float& low, float& high, int m, int i, int e) {
        const float2 first = unpack<T>(slope[m][i][e]), second = unpack<T>(curve[m][i][e]);
        curve[m][i][e] = pack<T>(second.x * low, second.y * high);
        low *= first.x, high *= first.y, x = pack<T>(low, high);
      });
      park(curve, S::kExchange);
      if constexpr (S::kKeeps) {
        scale_columns(z, kBoth);
        Packed u2;
        each_packed(u2, z, [](uint32_t& x, float low, float high, int, int, int) { x = pack<T>(low, high); });
        put(S::kU2, u2);
      }
    }
    fresh();
    Packed dzq;
    load_fragments(dzq, From::kDZq);
    float z[kStrips][kPass][4], sums[kEights][2] = {};  // of z o Gz'
    Base::state_times(z, w2, keys_tile());
    scale_columns(z, kMinusDec);
    times_pairs(z, dzq, S::kP);
    each_packed(dz, z, [&](uint32_t x, float low, float high, int, int i, int) {
      const float2 gz = unpack<T>(x);
      sums[i][0] += low * gz.x, sums[i][1] += high * gz.y;
    });
    put_sums(S::kLr + warp * C * 4, sums, lane);
    scale_columns(z, kEta);
    unpark(slope, S::kSlopes), unpark(curve, S::kExchange);
    each_packed(dz, z, [&](uint32_t& x, float low, float high, int m, int i, int e) {
      const float2 first = unpack<T>(slope[m][i][e]), second = unpack<T>(curve[m][i][e]);
      x = pack<T>(first.x * low, first.y * high), curve[m][i][e] = pack<T>(second.x * low, second.y * high);
    });
    put(S::kB, dz);
    cp_async_wait<0>();
  }

  // The inner gradient's backward, for this thread's channels of its row. Ends before the barrier after which all have dU.
  __device__ __forceinline__ void rows(int first_token) {
    fresh();
    float x[X::kChannels], r1[X::kChannels], dg[X::kChannels], e[X::kChannels];
    each_four([&](int i, int channel) {
      put_four(x, i, *reinterpret_cast<const float4*>(from + From::kX + 4 * (row * kD + channel)));
      put_four(r1, i, *reinterpret_cast<const float4*>(from + From::kR1 + 4 * (row * kD + channel)));
    });
    const float inverse = *reinterpret_cast<const float*>(from + From::kInverse + 4 * row);
    {
      float u[8][4] = {};
      Base::add_units(u, S::kA, S::kJ, [](auto&&...) {});
      Base::await();
      put_products(u, S::kGu, S::kReads);
      const uint32_t factor = rows_of_gates() + 16 * (16 * tile + g) + 4 * kBoth;
      const float above = at<float>(factor), below = at<float>(factor + 8 * 16);
#pragma unroll
      for (int i = 0; i < 8; ++i) u[i][0] *= above, u[i][1] *= above, u[i][2] *= below, u[i][3] *= below;
      Base::add_units(u, S::kB, S::kS1, [](auto&&...) {});
      Base::hand_over(u);
    }
    Base::release();
    float inner = 0.0f;
    if (b.grad_log_decay) inner = product_with(s1, S::kS1);
    const float4 gates = at<float4>(rows_of_gates() + 16 * row);  // eta, -dec, delta
    const float eta = gates.x;
    float square = 0.0f, w[X::kChannels];
    {
      float k[X::kChannels], v[X::kChannels], c[X::kChannels];
      uint2 of_k[X::kChannels / 4], of_v[X::kChannels / 4];
      each_four([&](int i, int channel) {
        of_k[i / 4] = at<uint2>(keys_tile() + channel_place(row, channel)), of_v[i / 4] = at<uint2>(S::kV + channel_place(row, channel));
        put_four(w, i, at<float4>(S::kNorm + 4 * channel)), put_four(c, i, at<float4>(S::kNorm + 4 * (kD + channel)));
      });
      reads_end();
      Base::unpack_row(k, of_k), Base::unpack_row(v, of_v);
#pragma unroll
      for (int i = 0; i < X::kChannels; ++i) {
        e[i] = (traits.predicts ? k[i] + x[i] * w[i] + c[i] : 0.0f) - v[i];
        square += e[i] * e[i];
      }
    }
    if (traits.couples_row) square = row_sum<X::kLanes>(square);
    Base::join();
    constexpr int kShares = (X::kWarps + X::kLanes - 1) / X::kLanes;  // of the warps' sums for d eta
    float own[kShares], away[kShares];
    const auto each_share = [&](auto&& f) {
#pragma unroll
      for (int i = 0; i < kShares; ++i)
        if (X::kWarps % X::kLanes == 0 || piece + i * X::kLanes < X::kWarps) f(i, S::kLr + 4 * ((piece + i * X::kLanes) * C + row));
    };
    typename Base::template Shares<X::kChannels> of_dg;
    Base::template load_shares<4 * X::kLanes>(of_dg, 4 * piece);
#pragma unroll
    for (int i = 0; i < kShares; ++i) own[i] = away[i] = 0.0f;
    if constexpr (kBlocks == 2) {
      const uint32_t other = Base::other();
      each_share([&](int i, uint32_t of) { away[i] = load_cluster(other + of); });
    }
    each_share([&](int i, uint32_t of) { own[i] = at<float>(of); });
    float gu[X::kChannels], reads[kBlocks] = {};
    uint2 of_gu[X::kChannels / 4];
    each_four([&](int i, int channel) { of_gu[i / 4] = at<uint2>(S::kGu + channel_place(row, channel)); });
    if (piece < X::kParts)
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) reads[i] = at<float>(share_of(S::kReads, i, row, piece));
    reads_end();
    if (b.grad_log_decay) inner += product_with(w2, S::kW2);
    Base::sum_shares(dg, of_dg), Base::unpack_row(gu, of_gu);
    enum { kSum, kWithX, kWithGu, kOfEta, kReads, kInner, kSums };
    float sums[kSums] = {};
#pragma unroll
    for (int i = 0; i < X::kChannels; ++i) {
      dg[i] += eta * r1[i];
      sums[kOfEta] += r1[i] * gu[i];
      sums[kSum] += dg[i], sums[kWithX] += dg[i] * x[i], sums[kWithGu] += dg[i] * gu[i];
    }
#pragma unroll
    for (int i = 0; i < kShares; ++i) sums[kOfEta] += own[i] + away[i];
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) sums[kReads] += reads[i];
    sums[kInner] = inner;
    row_sums<X::kLanes>(sums);
    const float sum = sums[kSum] * (1.0f / kD), with_x = sums[kWithX] * (1.0f / kD), with_gu = sums[kWithGu] * (1.0f / kD);
    const float to_end = gates.y * sums[kReads];
    float more[2] = {};  // d delta, and the sum of w psi(E) o X
    float y[X::kChannels];  // w psi(E)
    with_fast_bias(p.bias, p.bias_params, [&](auto bias) {
      using Bias = decltype(bias);
      const auto of_row = bias.row(square, gates.z);
      float pull = 0.0f;
      each_four([&](int i, int channel) {
        float products[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float psi = bias.value(e[i + j], of_row), dy = inverse * (dg[i + j] - sum - x[i + j] * with_x), d_psi = w[i + j] * dy;
          de[i + j] = d_psi * bias.slope(e[i + j], psi, of_row);
          if (Bias::kUsesDelta) more[0] += d_psi * bias.slope_delta(e[i + j], of_row);
          if (Bias::kCouplesRow) pull += d_psi * bias.pull(e[i + j], of_row);
          products[j] = dy * psi;
          y[i + j] = w[i + j] * psi, more[1] += y[i + j] * x[i + j];
        }
        add_norm(0, i, channel, products);
      });
      if (Bias::kCouplesRow) {
        pull = row_sum<X::kLanes>(pull);
#pragma unroll
        for (int i = 0; i < X::kChannels; ++i) de[i] += pull * e[i];
      }
    });
    row_sums<X::kLanes>(more);
    const float y_with_x = more[1] * (1.0f / kD);
    const bool in = first_token + row < tokens;
    float of_dx[2] = {};  // its sum, and with X
    each_four([&](int i, int channel) {
      float dv[4], shift[4], products[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        dv[j] = -de[i + j];
        if (!traits.predicts) de[i + j] = 0.0f;
        shift[j] = de[i + j], products[j] = de[i + j] * x[i + j];
        y[i + j] = w[i + j] * de[i + j] - inverse * (dg[i + j] * y_with_x + y[i + j] * with_x);  // dX
        of_dx[0] += y[i + j], of_dx[1] += y[i + j] * x[i + j];
      }
      add_norm(0, i, channel, products), add_norm(1, i, channel, shift);
      if (in) *reinterpret_cast<uint2*>(of_token(b.grad_v, first_token + row, channel)) = packed(dv, 1.0f);
    });
    row_sums<X::kLanes>(of_dx);
    const float dx_sum = of_dx[0] * (1.0f / kD), dx_with = of_dx[1] * (1.0f / kD);
    each_four([&](int i, int channel) {
      float du[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) du[j] = y[i + j] - dx_sum - x[i + j] * (dx_with + with_gu);
      Base::put_both(S::kV + channel_place(row, channel), packed(du, inverse));
    });
    if (piece == 0) {
      if (b.grad_log_decay) Base::put_both(S::kToEnd + 4 * row, eta * to_end), Base::put_both(S::kInner + 4 * row, sums[kInner]);
      if (in) {
        const int64_t at_token = (batch * p.T + begin + first_token + row) * p.H + h;
        b.grad_lr[at_token] = sums[kOfEta] + to_end;
        if (b.grad_delta) b.grad_delta[at_token] = more[0];
      }
    }
    Base::release();
  }

  // Up to the barrier after `rows` what needs no dU
  __device__ __forceinline__ void units() {
    fresh();
    Packed aq;
    load_fragments(aq, From::kAq);
    Base::put_state(S::kJ, w2);  // in the place of J1
    float z[kStrips][kPass][4];
    Base::state_times(z, s1, S::kGu);
    scale_columns(z, kBoth);
    times_pairs(z, aq, S::kN1);
    decay(s1);
    add_outer(s1, aq, Base::queries_grad_tile());
    add_outer(s1, S::kB, S::kGu);
    Base::join();
    fresh();
    Base::slice_times(z, S::kS1, S::kV);
    unpark(slope, S::kSlopes);
    each_packed(dz, z, [&](uint32_t& x, float low, float high, int m, int i, int e) {
      const float2 first = unpack<T>(slope[m][i][e]), second = unpack<T>(curve[m][i][e]);
      x = pack<T>(first.x * low + second.x, first.y * high + second.y);
    });
    add_outer(s1, S::kA, S::kV);
    if constexpr (!S::kKeeps) {
      fresh();
#pragma unroll
      for (int m = 0; m < kStrips; ++m)
#pragma unroll
        for (int i = 0; i < kEights; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) z[m][i][e] = 0.0f;
      Base::slice_times(z, S::kS1, S::kGu);
      scale_columns(z, kBoth);
      each_packed(slope, z, [](uint32_t& x, float low, float high, int, int, int) {
        const float2 first = unpack<T>(x);
        x = pack<T>(first.x * low, first.y * high);
      });
    }
    __syncwarp();  // other lanes have read A' and dGa'
    if constexpr (!S::kKeeps) put(S::kU2, slope);
    put(S::kB, dz);
  }

  // `next`: what was handed over of the chunk before, if there is one
  __device__ __forceinline__ void keys(int c, const char* next) {
    fresh();
    if (next) fetch_first(c - 1, next);
    const bool decays = b.grad_log_decay && warp == X::kWarps - 1;  // whether this warp computes d log alpha
    float log_decay[kPer] = {};
    if (decays) each_gate(c, [&](int i, float& of) { log_decay[i] = of; });
    {
      float u[8][4] = {};
      Base::add_units(u, S::kU2, S::kJ, [](auto&&...) {});
      if (b.grad_log_decay) put_products(u, keys_tile(), S::kEnds);
      Base::add_units(u, S::kB, S::kW2, [](auto&&...) {});
      constexpr int kShares = kBlocks * X::kParts;
#pragma unroll
      for (int i = 0; i < kTiles; i += kShares) {
        const int k = tile + i + Base::rank() * X::kParts + part;
        if (k >= kTiles) break;
        uint32_t a[4];
        ldmatrix_x4_trans(a, address(S::kN2 + by_columns<kPieces>(16 * k, 16 * tile, lane)));
        Base::add_rows(u, a, S::kQ, 16 * k);
      }
      Base::hand_over(u);
    }
    Packed dzq;
    load_fragments(dzq, From::kDZq);
    Base::scale_queries();
    Base::release();
    decay(w2);
    add_outer(w2, dz, keys_tile());
    Base::join();
    if (next) fetch_second(c - 1, next);
    cp_async_commit();
    float y[X::kChannels];
    typename Base::template Shares<X::kChannels> shares;
    Base::template load_shares<4 * X::kLanes>(shares, 4 * piece);
    add_outer(w2, dzq, S::kV);
    Base::put_state(S::kJ, s1);
    Base::sum_shares(y, shares);
    const int first_token = c * C;
    if (first_token + row < tokens)
      each_four([&](int i, int channel) {
        float dk[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) dk[j] = y[i + j] + de[i + j];
        *reinterpret_cast<uint2*>(of_token(b.grad_k, first_token + row, channel)) = packed(dk, 1.0f);
      });
    if (decays) Base::end_decay(c, log_decay);
    Base::release();
    cp_async_wait<0>();
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
    turn = 1;
    fetch_first(c, from), fetch_second(c, from);
    cp_async_commit();
    Base::put_state(S::kJ, s1);
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll 1
    for (; c >= first; --c) {
      turn = 1 - turn;
      fetch_last(c);
      hidden();
      __syncthreads();
      rows(c * C);
      units();
      __syncthreads();
      const char* next = c > first ? from - int64_t(p.H) * From::kBytes : nullptr;
      keys(c, next);
      from = next;
      __syncthreads();
    }
    Base::await();
    fresh();
    Base::store_state(state);
    end_norm(place, stop);
  }
};

}  // namespace miras::cuda
