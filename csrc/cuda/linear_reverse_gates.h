// Gradients of the errors and of the gates, for the kernel of linear_reverse_kernel.h, and its stores.
#pragma once

#include "linear_reverse_state.h"

namespace miras::cuda {
namespace {

// Of a tile of dP o P: what its pairs add to the gradients of log-decays. Token t's is the sum over pairs of a read r >= t and a write s < t.
template <class S> __device__ __forceinline__ void Reverse<S>::pair_sums(int row, int column, const float (&m)[2][4]) const {
  const int place = (row * kSixteens + column) * 16, g = lane / 4, t = lane & 3;
  if (row != column) {
    float sums[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) sums[i] = row_sum<4>((m[0][2 * i] + m[0][2 * i + 1]) + (m[1][2 * i] + m[1][2 * i + 1]));
    if (t == 0) at<float>(S::kRows + 4 * (place + g)) = sums[0], at<float>(S::kRows + 4 * (place + g + 8)) = sums[1];
    float2 columns[2] = {make_float2(m[0][0] + m[0][2], m[0][1] + m[0][3]), make_float2(m[1][0] + m[1][2], m[1][1] + m[1][3])};
    const int group = token_sums(columns, lane);
    at<float2>(S::kColumns + 4 * (place + 8 * group + 2 * t)) = columns[0];
    return;
  }
  float2 columns[2] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int read = g + 8 * i;
    float before = 0.0f;  // of the row, the tokens of earlier groups
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float x = m[n][2 * i], own = x + m[n][2 * i + 1];
      float sum = own;
      const float one = __shfl_up_sync(kWholeWarp, sum, 1, 4);
      sum += t >= 1 ? one : 0.0f;
      const float two = __shfl_up_sync(kWholeWarp, sum, 2, 4);
      sum += t >= 2 ? two : 0.0f;
      const float left = __shfl_up_sync(kWholeWarp, sum, 1, 4), all = __shfl_sync(kWholeWarp, sum, 3, 4);
      const float first = before + (t >= 1 ? left : 0.0f);
      columns[n].x += read >= 8 * n + 2 * t ? first : 0.0f, columns[n].y += read > 8 * n + 2 * t ? first + x : 0.0f;
      before += all;
    }
  }
  const int group = token_sums(columns, lane);
  at<float2>(S::kDiagonal + 4 * (16 * row + 8 * group + 2 * t)) = columns[0];
}

// A token's share of them, over all tiles: that of thread `part` of its kLanes.
template <class S> __device__ __forceinline__ float Reverse<S>::decay_from_pairs(int token, int part) const {
  constexpr int kEach = 16 / S::kLanes;
  const int block = token / 16, place = token % 16;
  float sum = part == 0 ? at<float>(S::kDiagonal + 4 * token) : 0.0f;
#pragma unroll
  for (int row = 0; row < kSixteens; ++row)
#pragma unroll
    for (int column = 0; column < row; ++column) {
      if (row < block || column > block) continue;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int other = part * kEach + i, of = 4 * ((row * kSixteens + column) * 16 + other);
        if (column == block) sum += other < place ? at<float>(S::kColumns + of) : 0.0f;
        else sum += row > block || other >= place ? at<float>(S::kRows + of) : 0.0f;
      }
    }
  return sum;
}

// Rows of a token gradient: the thread's two words of each group of 8 channels.
template <class S>
__device__ __forceinline__ void Reverse<S>::store_rows(void* to, int chunk, int row, int channel,
                                                       const uint32_t (&x)[2 * S::kPairs][2]) const {
  const int token = 16 * row + lane / 4, count = tokens_of(chunk);
  const int64_t step = int64_t(p.H) * kDim * 2;
  char* const at = static_cast<char*>(to) + first_gate * kDim * 2 + (int64_t(chunk) * kChunk + token) * step + 2 * channel + 4 * (lane & 3);
#pragma unroll
  for (int n = 0; n < 2 * S::kPairs; ++n) {
    if (token < count) *reinterpret_cast<uint32_t*>(at + 16 * n) = x[n][0];
    if (token + 8 < count) *reinterpret_cast<uint32_t*>(at + 16 * n + 8 * step) = x[n][1];
  }
}
template <class S>
__device__ __forceinline__ void Reverse<S>::store_rows(void* to, int chunk, int row, int channel,
                                                       const float (&x)[2 * S::kPairs][4]) const {
  uint32_t words[2 * S::kPairs][2];
#pragma unroll
  for (int n = 0; n < 2 * S::kPairs; ++n) words[n][0] = pack<T>(x[n][0], x[n][1]), words[n][1] = pack<T>(x[n][2], x[n][3]);
  store_rows(to, chunk, row, channel, words);
}

// dE' from dU', and the sums over values of the gradients of gates
template <class S>
__device__ __forceinline__ void Reverse<S>::gradients_of_errors(float (&d)[kGroups][4], float (&e)[kGroups][4], int chunk) const {
  with_bias(BiasTag(p.bias), p.bias_params, [&](auto bias) {
    using Bias = decltype(bias);
    float2 of_lr[kGroups] = {}, of_delta[kGroups] = {}, pulls[kGroups] = {};
    each_error(bias, chunk, [&](int n, int i, int half, float eta, auto row) {
      [[maybe_unused]] const int token = 8 * n + 2 * (lane & 3) + i;
      const float error = e[n][2 * half + i], psi = bias.value(error, row);
      float& y = d[n][2 * half + i];
      const float weighted = y * eta;
      (i ? of_lr[n].y : of_lr[n].x) -= y * psi;
      y = bias.slope(error, psi, row) * weighted;
      if constexpr (Bias::kUsesDelta) {
        const float of = bias.slope_delta(error, row) * weighted;
        (i ? of_delta[n].y : of_delta[n].x) += of;
        if constexpr (!Bias::kCouplesRow)
          if (p.delta_per_channel && token < tokens_of(chunk)) p.grad_delta[channel_place(chunk, token, half)] = of;
      }
      if constexpr (Bias::kCouplesRow) (i ? pulls[n].y : pulls[n].x) += bias.pull(error, row) * weighted;
    });
    store_sums(kOfLr, of_lr);
    if constexpr (Bias::kUsesDelta) store_sums(kOfDelta, of_delta);
    if constexpr (Bias::kCouplesRow) {
      store_sums(kPulls, pulls);
      __syncthreads();
#pragma unroll
      for (int n = 0; n < kGroups; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float pull = sum_over_warps(kPulls, 8 * n + 2 * (lane & 3) + i);
          d[n][i] += pull * e[n][i], d[n][2 + i] += pull * e[n][2 + i];
        }
    }
  });
}

// Of the token that this thread and its neighbours have, once all warps' sums over values are there. Returns a part of its log-decay's.
template <class S> __device__ __forceinline__ float Reverse<S>::gate_gradients(int chunk) const {
  const int token = thread() / S::kLanes, part = thread() % S::kLanes;
  const bool writes = part == 0 && token < tokens_of(chunk);
  const int64_t place = first_gate + (int64_t(chunk) * kChunk + token) * p.H;
  const auto of_token = [&](Sum sum) {
    float x = 0.0f;
#pragma unroll
    for (int i = 0; i < S::kWarps; i += S::kLanes)
      if (S::kLanes <= S::kWarps || part < S::kWarps) x += sums(sum, i + part)[token];
    return row_sum<S::kLanes>(x);
  };
  const float of_lr = of_token(kOfLr);
  if (writes) p.grad_lr[place] = of_lr;
  if (p.grad_delta && !p.delta_per_channel) {
    const float of_delta = of_token(kOfDelta);
    if (writes) p.grad_delta[place] = of_delta;
  }
  if (p.log_decay == nullptr) return 0.0f;
  const float end = of_token(kOfEnd);
  if (part == 0) at<float>(S::kEnds + 4 * token) = end;
  return decay_from_pairs(token, part);
}

// The rest of it, once the sums over keys are there too.
template <class S> __device__ __forceinline__ void Reverse<S>::decay_gradients(int chunk, float sum, float total) const {
  const int token = thread() / S::kLanes, part = thread() % S::kLanes;
  constexpr int kEach = kChunk / S::kLanes;
  float ends[kEach], reads[kEach][S::kParts];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    ends[i] = load_float(S::kEnds + 4 * (i * S::kLanes + part));
#pragma unroll
    for (int n = 0; n < S::kParts; ++n) reads[i][n] = load_float(S::kReads + 4 * (n * kChunk + i * S::kLanes + part));
  }
  float inner[S::kWarps];
#pragma unroll
  for (int i = 0; i < S::kWarps; ++i) inner[i] = load_float(S::kInner + 4 * i);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    float read = reads[i][0];
#pragma unroll
    for (int n = 1; n < S::kParts; ++n) read += reads[i][n];
    sum += i * S::kLanes + part < token ? ends[i] : read;
  }
#pragma unroll
  for (int i = 0; i < S::kWarps; ++i) sum += part == 0 ? total * inner[i] : 0.0f;
  sum = row_sum<S::kLanes>(sum);
  if (part == 0 && token < tokens_of(chunk)) p.grad_log_decay[first_gate + (int64_t(chunk) * kChunk + token) * p.H] = sum;
}

}  // namespace
}  // namespace miras::cuda
