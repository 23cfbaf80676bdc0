// The primals of the MLP memory's duals (docs/mathematics.md, sections 5 and 9) where a retention gate maps them: the duals stay in
// registers, and what is read of them, phi(S1) and phi(W2), lies in shared memory in 16 bits. phi(W2), whose rows a warp has for itself, is in
// the warp's rows of the exchange buffer while that is not in use, twice a chunk.
//
// What couples elements is summed after the update (`sum_duals`), each warp its own units, and put together by one warp (`weigh_duals`)
// before the next chunk: the barriers between them are those that a chunk has anyway.
#pragma once

#include "mlp_block.h"

namespace miras::cuda {

template <int C, int Hd, class T, class Layout, int kBlocks> struct Primal : Block<C, Hd, T, Layout, kBlocks> {
  using Base = Block<C, Hd, T, Layout, kBlocks>;
  using Base::Base, Base::p, Base::kStrips, Base::kGates, Base::gated, Base::fresh, Base::put_state;
  using Base::lane, Base::warp, Base::g, Base::t, Base::s1, Base::w2;
  using typename Base::S;
  using typename Base::X;
  using F = Approximate;

  // where phi(W2) lies, as of the block's first row: this warp's rows are in its part of the exchange buffer
  __device__ __forceinline__ uint32_t own_w2() const {
    constexpr int kRoom = 16 * S::kExchangeRow * 4, kUsed = X::kUnits * kD * 2;
    static_assert(kUsed <= kRoom && kRoom % 128 == 0);
    return S::kExchange + warp * (kRoom - kUsed);
  }

  // f(gate) if the call has one
  template <class Function> __device__ __forceinline__ void with_gate(Function&& f) const {
    with_retention(RetentionTag(p.retention), p.retention_params, [&](auto gate) {
      if constexpr (!decltype(gate)::kIdentity) f(gate);
    });
  }
  __device__ __forceinline__ Coupling coupling() const { return retention_traits(RetentionTag(p.retention)).coupling; }
  __device__ __forceinline__ bool coupled() const { return kGates && coupling() != Coupling::none; }

  // log2 of rho, 0 for S1 and 1 for W2
  __device__ __forceinline__ float log_rho(int matrix) const {
    if constexpr (kGates)
      if (coupling() == Coupling::matrix) return at<float>(S::kMap + 8 + 4 * matrix);
    return 0.0f;
  }

  __device__ __forceinline__ void put_s1() {
    if constexpr (kGates)
      if (gated) return with_gate([&](auto gate) { put_primal<true>(gate, S::kS1, s1); });
    put_state(S::kS1, s1);
  }
  // for this warp alone
  __device__ __forceinline__ void put_w2() {
    if constexpr (kGates)
      if (gated) {
        with_gate([&](auto gate) { put_primal<false>(gate, own_w2(), w2); });
        __syncwarp();
      }
  }
  // see above
  __device__ __forceinline__ void sum_duals() {
    if constexpr (kGates)
      if (coupled()) with_gate([&](auto gate) { sum(gate); });
  }
  __device__ __forceinline__ void weigh_duals() {
    if constexpr (kGates)
      if (coupled() && threadIdx.x >= X::kThreads - 32) with_gate([&](auto gate) { weigh_sums(gate); });
  }

  // S1 is read through a LayerNorm, which removes the mean of its rows. The primal has it removed before it is rounded: where all of it lies
  // near one value, as under a sigmoid, rounding would cost as much precision as the remainder has.
  template <bool kFirst, class Gate>
  __device__ __forceinline__ void put_primal(const Gate& gate, uint32_t to, const float (&dual)[kStrips][8][4]) const {
#pragma unroll
    for (int m = 0; m < kStrips; ++m) {
      float y[8][4], mean[2] = {0.0f, 0.0f};
      map<kFirst>(gate, y, dual[m]);
      if constexpr (kFirst) {
        row_sums(y, mean);
        mean[0] *= 1.0f / kD, mean[1] *= 1.0f / kD;
      }
#pragma unroll
      for (int x = 0; x < 8; x += 2) {
        uint32_t a[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float(&z)[4] = y[x + (e >> 1)];
          a[e] = pack<T>(z[2 * (e & 1)] - mean[e & 1], z[2 * (e & 1) + 1] - mean[e & 1]);
        }
        store_fragment<8>(to, X::kUnits * warp + 16 * m, x, lane, a);
      }
    }
  }
  // y = phi(a), for 16 rows
  template <bool kFirst, class Gate> __device__ __forceinline__ void map(const Gate& gate, float (&y)[8][4], const float (&a)[8][4]) const {
    if constexpr (Gate::kCoupling == Coupling::none) {
      each(y, [&](int x, int e) { return gate.phi(F(a[x][e])).x; });
    } else if constexpr (Gate::kCoupling == Coupling::matrix) {
      const float rho = at<float>(S::kMap + (kFirst ? 0 : 4));
      each(y, [&](int x, int e) { return rho * a[x][e]; });
    } else if constexpr (kFirst) {  // a row of W1 is a column of S1
#pragma unroll
      for (int x = 0; x < 8; ++x) {
        const float4 of = at<float4>(S::kMap + 16 * (4 * x + t));
#pragma unroll
        for (int e = 0; e < 4; e += 2)
          y[x][e] = (gate.weight(F(a[x][e]), F(of.x)) * of.y).x, y[x][e + 1] = (gate.weight(F(a[x][e + 1]), F(of.z)) * of.w).x;
      }
    } else {
      float most[2] = {a[0][0], a[0][2]}, factor[2];
#pragma unroll
      for (int x = 0; x < 8; ++x)
#pragma unroll
        for (int e = 0; e < 4; ++e) most[e / 2] = fmaxf(most[e / 2], a[x][e]);
      most[0] = lane_max<1, 4>(most[0]), most[1] = lane_max<1, 4>(most[1]);
      each(y, [&](int x, int e) { return gate.weight(F(a[x][e]), F(most[e / 2])).x; });
      row_sums(y, factor);
      factor[0] = gate.factor(F(factor[0])).x, factor[1] = gate.factor(F(factor[1])).x;
      each(y, [&](int x, int e) { return y[x][e] * factor[e / 2]; });
    }
  }
  template <class Function> __device__ __forceinline__ static void each(float (&y)[8][4], Function&& f) {
#pragma unroll
    for (int x = 0; x < 8; ++x)
#pragma unroll
      for (int e = 0; e < 4; ++e) y[x][e] = f(x, e);
  }
  // of this lane's two rows
  __device__ __forceinline__ static void row_sums(const float (&y)[8][4], float (&sums)[2]) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      sums[e] = 0.0f;
#pragma unroll
      for (int x = 0; x < 8; ++x) sums[e] += y[x][2 * e] + y[x][2 * e + 1];
      sums[e] = row_sum<4>(sums[e]);
    }
  }
  // over lanes at distances of kFrom, 2 kFrom, ... below kTo
  template <int kFrom, int kTo> __device__ __forceinline__ static float lane_max(float a) {
#pragma unroll
    for (int i = kFrom; i < kTo; i *= 2) a = fmaxf(a, __shfl_xor_sync(0xffffffffu, a, i));
    return a;
  }

  // This warp's sums of powers; or of each of S1's columns, a row of W1, the largest element and the sum of weights
  template <class Gate> __device__ __forceinline__ void sum(const Gate& gate) {
    fresh();
    if constexpr (Gate::kCoupling == Coupling::matrix) {
      float first = 0.0f, second = 0.0f;
      const auto add = [&](auto&& power) {
#pragma unroll
        for (int m = 0; m < kStrips; ++m)
#pragma unroll
          for (int x = 0; x < 8; ++x)
#pragma unroll
            for (int e = 0; e < 4; ++e) first += power(F(s1[m][x][e])).x, second += power(F(w2[m][x][e])).x;
      };
      constexpr float fourth[kRetentionParams] = {4.0f};  // the default, known to the compiler; no branch for each element
      if (gate.q == 4.0f) add([](F a) { return Gate(fourth).power(a); });
      else add([&](F a) { return Math<F>::pow(Math<F>::abs(a), gate.q); });
      first = row_sum<32>(first), second = row_sum<32>(second);
      if (lane == 0) at<float2>(S::kSums + 8 * warp) = make_float2(first, second);
    } else if constexpr (Gate::kCoupling == Coupling::row) {
#pragma unroll
      for (int x = 0; x < 8; ++x) {
        float most[2] = {s1[0][x][0], s1[0][x][1]}, sum[2] = {0.0f, 0.0f};
#pragma unroll
        for (int m = 0; m < kStrips; ++m)
#pragma unroll
          for (int e = 0; e < 4; ++e) most[e % 2] = fmaxf(most[e % 2], s1[m][x][e]);
        most[0] = lane_max<4, 32>(most[0]), most[1] = lane_max<4, 32>(most[1]);
#pragma unroll
        for (int m = 0; m < kStrips; ++m)
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[e % 2] += gate.weight(F(s1[m][x][e]), F(most[e % 2])).x;
#pragma unroll
        for (int i = 4; i < 32; i *= 2)
          sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], i), sum[1] += __shfl_xor_sync(0xffffffffu, sum[1], i);
        if (g == 0) at<float4>(S::kSums + (warp * kD + 8 * x + 2 * t) * 8) = make_float4(most[0], sum[0], most[1], sum[1]);
      }
    }
  }
  // From the sums of all warps rho of both matrices and its logarithms; or of each column of S1 the largest element and the factor
  template <class Gate> __device__ __forceinline__ void weigh_sums(const Gate& gate) {
    fresh();
    if constexpr (Gate::kCoupling == Coupling::matrix) {
      float first = gate.power(F(gate.floor)).x, second = first;
#pragma unroll
      for (int w = 0; w < X::kWarps; ++w) {
        const float2 of = at<float2>(S::kSums + 8 * w);
        first += of.x, second += of.y;
      }
      const float exponent = float(gate.exponent());
      first = exponent * log2_approx(first), second = exponent * log2_approx(second);
      if (lane == 0) at<float4>(S::kMap) = make_float4(exp2_approx(first), exp2_approx(second), first, second);
    } else if constexpr (Gate::kCoupling == Coupling::row) {
      float4 of[X::kWarps];  // two columns
      float most[2];
      F sum[2];
#pragma unroll
      for (int w = 0; w < X::kWarps; ++w) {
        of[w] = at<float4>(S::kSums + (w * kD + 2 * lane) * 8);
        most[0] = w ? fmaxf(most[0], of[w].x) : of[w].x, most[1] = w ? fmaxf(most[1], of[w].z) : of[w].z;
      }
#pragma unroll
      for (int w = 0; w < X::kWarps; ++w) {
        sum[0] = sum[0] + of[w].y * gate.weight(F(of[w].x), F(most[0]));
        sum[1] = sum[1] + of[w].w * gate.weight(F(of[w].z), F(most[1]));
      }
      at<float4>(S::kMap + 16 * lane) = make_float4(most[0], gate.factor(sum[0]).x, most[1], gate.factor(sum[1]).x);
    }
  }
};

}  // namespace miras::cuda
