// The kernel of linear_reverse.h: a chunk, once its segment has been rerun.
//
// A warp holds 16 values of J, all keys, as accumulators of mma.m16n8k16; E', U', dU' and dE' are tiles of the same values by tokens, so
// that what is elementwise stays in registers. What other warps need goes through shared memory, rounded: U', dE', J and the state. Tokens by
// tokens, in tiles of 16 x 16, a warp computes the scores and, at the same places, G. Of dQ and dK it has 16 tokens and a part of the keys.
//
//     [tokens, state here]    E', K J', scores, U'    [U', J, scores here]    G, dU', dE'    [dE', G here]    J, dQ, dK, dV    [all read]
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

template <class S>
__device__ __forceinline__ void Reverse<S>::store_rows(void* to, int chunk, int row, int channel, const float (&x)[2 * S::kPairs][4]) const {
  const int token = 16 * row + lane / 4, count = tokens_of(chunk);
  const int64_t step = int64_t(p.H) * kDim * 2;
  char* const at = static_cast<char*>(to) + first_gate * kDim * 2 + (int64_t(chunk) * kChunk + token) * step + 2 * channel + 4 * (lane & 3);
#pragma unroll
  for (int n = 0; n < 2 * S::kPairs; ++n) {
    if (token < count) *reinterpret_cast<uint32_t*>(at + 16 * n) = pack<T>(x[n][0], x[n][1]);
    if (token + 8 < count) *reinterpret_cast<uint32_t*>(at + 16 * n + 8 * step) = pack<T>(x[n][2], x[n][3]);
  }
}

// dE' from dU', and the sums over values of the gradients of gates
template <class S>
__device__ __forceinline__ void Reverse<S>::gradients_of_errors(float (&d)[kGroups][4], float (&e)[kGroups][4], int chunk) const {
  with_bias(BiasTag(p.bias), p.bias_params, [&](auto bias) {
    using Bias = decltype(bias);
    float2 of_lr[kGroups] = {}, of_delta[kGroups] = {}, pulls[kGroups] = {};
    each_error(bias, chunk, [&](int n, int i, int half, auto row) {
      const int token = 8 * n + 2 * (lane & 3) + i;
      const float error = e[n][2 * half + i], psi = bias.value(error, row);
      float& y = d[n][2 * half + i];
      const float weighted = y * gates(chunk).eta[token];
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

// The chunk's K, Q, dO and gates are on their way, and its state is the `kept`-th of the workspace.
template <class S> __device__ __forceinline__ void Reverse<S>::read_chunk(int chunk, int kept) {
  const uint32_t keys = stage(chunk), queries = keys + S::kQ, grads = keys + S::kD;
  const BiasTraits traits = bias_traits(BiasTag(p.bias));
  const ReverseGates<kChunk>& x = gates(chunk);
  const bool decays = p.log_decay != nullptr;
  copy(S::kV, p.v, chunk), copy_state(kept);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  if (kept > 0) {
    const uint32_t next = stage(chunk - 1);
    copy(next, p.k, chunk - 1), copy(next + S::kQ, p.q, chunk - 1), copy(next + S::kD, p.grad_out, chunk - 1);
    if (warp == S::kWarps - 1) prepare(chunk - 1);
  }
  cp_async_commit();

  float e[kGroups][4] = {}, d[kGroups][4] = {}, scores[S::kUnits][2][4] = {}, inner = 0.0f;
  {
    uint32_t a[2][4], b[2][kSixteens][4];
    each<kSteps + 1>([&](auto i) {
      if constexpr (i < kSteps) {
        load_matrices<0>(a[i % 2], address(S::kS + by_rows<S::kPieces>(first_value, 16 * i, lane)));
        const uint32_t at = address(keys + by_columns<S::kPieces>(0, 16 * i, lane));
        each<kSixteens>([&](auto n) { load_matrices<n * 16 * 2 * kDim>(b[i % 2][n], at); });
      }
      if constexpr (i > 0) {
        constexpr int kStep = i - 1, kOf = kStep % 2;
        float (&low)[4] = j[kStep / 4][kStep % 4 * 2], (&high)[4] = j[kStep / 4][kStep % 4 * 2 + 1];
        uint32_t of_j[4];
        packed(of_j, low, high);
        store_fragment<S::kPieces>(S::kJ, first_value, 2 * kStep, lane, of_j);
        each<kSixteens>([&](auto n) {
          mma_m16n8k16<T>(e[2 * n], a[kOf], b[kOf][n][0], b[kOf][n][1]), mma_m16n8k16<T>(d[2 * n], of_j, b[kOf][n][0], b[kOf][n][1]);
          mma_m16n8k16<T>(e[2 * n + 1], a[kOf], b[kOf][n][2], b[kOf][n][3]);
          mma_m16n8k16<T>(d[2 * n + 1], of_j, b[kOf][n][2], b[kOf][n][3]);
        });
        if (decays)
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const float2 of = unpack<T>(a[kOf][r]);
            const float* const with = &(r < 2 ? low : high)[2 * (r % 2)];
            inner += of.x * with[0] + of.y * with[1];
          }
      }
    });
  }
  // f(number, row, column) of the warp's tiles of pairs; decay of a pair of a tile
  const auto each_unit = [&](auto&& f) {
    each<S::kUnits>([&](auto i) {
      const int unit = warp + i * S::kWarps, row = unit / kSixteens, column = unit % kSixteens;
      if (unit < kSixteens * kSixteens && column <= row) f(i, row, column);
    });
  };
  const auto decayed = [&](float (&of)[2][4], int row, int column) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int read = 16 * row + lane / 4 + i / 2 * 8, write = 16 * column + 8 * n + 2 * (lane & 3) + i % 2;
        of[n][i] = write <= read ? of[n][i] * decay_of(x.log_gamma[read], x.log_gamma[write]) : 0.0f;
      }
  };
  each_unit([&](auto unit, int row, int column) {
    products<kSteps, 1>(scores[unit], 0, kSteps, [&](auto i, uint32_t (&a)[4], uint32_t (&b)[1][4]) {
      load_matrices<0>(a, address(queries + by_rows<S::kPieces>(16 * row, 16 * i, lane)));
      load_matrices<0>(b[0], address(keys + by_columns<S::kPieces>(16 * column, 16 * i, lane)));
    });
    decayed(scores[unit], row, column);
    uint32_t to[4];
    packed(to, scores[unit][0], scores[unit][1]);
    store_fragment<S::kTokenPieces>(S::kP, 16 * row, 2 * column, lane, to);
  });
  {
    float u[kGroups][4];
    float2 ends[kGroups];
    updates(u, e, chunk, S::kV);
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      const float2 to_end = pair(x.to_end, n);
#pragma unroll
      for (int i = 0; i < 4; ++i) d[n][i] *= i % 2 ? to_end.y : to_end.x;
      ends[n] = make_float2(u[n][0] * d[n][0] + u[n][2] * d[n][2], u[n][1] * d[n][1] + u[n][3] * d[n][3]);
    }
    if (decays) {
      store_sums(kOfEnd, ends);
      inner = warp_sum(inner);
      if (lane == 0) at<float>(S::kInner + 4 * warp) = inner;
    }
#pragma unroll
    for (int n = 0; n < kSixteens; ++n) {
      uint32_t to[4];
      packed(to, u[2 * n], u[2 * n + 1]);
      store_fragment<S::kTokenPieces>(S::kU, first_value, 2 * n, lane, to);
    }
  }
  __syncthreads();  // U', J and the scores are here

  each_unit([&](auto unit, int row, int column) {
    float g[2][4] = {};
    products<kSteps, 1>(g, 0, kSteps, [&](auto i, uint32_t (&a)[4], uint32_t (&b)[1][4]) {
      load_matrices<0>(a, address(grads + by_rows<S::kPieces>(16 * row, 16 * i, lane)));
      load_transposed<0>(b[0], address(S::kU + by_rows<S::kTokenPieces>(16 * i, 16 * column, lane)));
    });
    if (decays) {
#pragma unroll
      for (int n = 0; n < 2; ++n)
        for (int i = 0; i < 4; ++i) scores[unit][n][i] *= g[n][i];
      pair_sums(row, column, scores[unit]);
    }
    decayed(g, row, column);
    uint32_t to[4];
    packed(to, g[0], g[1]);
    store_fragment<S::kTokenPieces>(S::kG, 16 * row, 2 * column, lane, to);
  });
  uint32_t of_out[kSixteens][4], of_error[kSixteens][4];  // A operands: dO' and dE'
  {
    uint32_t b[2][kSixteens][4];
    each<kSixteens + 1>([&](auto i) {
      if constexpr (i < kSixteens) {
        load_transposed<0>(of_out[i], address(grads + by_columns<S::kPieces>(16 * i, first_value, lane)));
        each<i + 1>([&](auto n) {
          load_transposed<0>(b[i % 2][n], address(S::kP + by_rows<S::kTokenPieces>(16 * i, 16 * n, lane)));
        });
      }
      if constexpr (i > 0)
        each<i>([&](auto n) {
          constexpr int kOf = (i + 1) % 2;
          mma_m16n8k16<T>(d[2 * n], of_out[i - 1], b[kOf][n][0], b[kOf][n][1]);
          mma_m16n8k16<T>(d[2 * n + 1], of_out[i - 1], b[kOf][n][2], b[kOf][n][3]);
        });
    });
  }
  gradients_of_errors(d, e, chunk);
#pragma unroll
  for (int n = 0; n < kSixteens; ++n) {
    packed(of_error[n], d[2 * n], d[2 * n + 1]);
    store_fragment<S::kTokenPieces>(S::kE, first_value, 2 * n, lane, of_error[n]);
    const float2 low = pair(x.gamma, 2 * n), high = pair(x.gamma, 2 * n + 1);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 of = unpack<T>(of_out[n][i]), gamma = i < 2 ? low : high;
      of_out[n][i] = pack<T>(of.x * gamma.x, of.y * gamma.y);
    }
  }
  __syncthreads();  // dE' and G are here

  const float total = x.total;
  for (auto& half : j)
    for (auto& tile : half)
      for (float& y : tile) y *= total;
  // J += a b
  const auto add = [&](const uint32_t (&of)[kSixteens][4], uint32_t tile) {
    each<kHalves>([&](auto h) {
      products<kSixteens, 4>(j[h], 0, kSixteens, [&](auto i, uint32_t (&a)[4], uint32_t (&b)[4][4]) {
#pragma unroll
        for (int r = 0; r < 4; ++r) a[r] = of[i][r];
        each<4>([&](auto n) {
          load_transposed<i * 16 * 2 * kDim>(b[n], address(tile + by_rows<S::kPieces>(0, 64 * h + 16 * n, lane)));
        });
      });
    });
  };
  add(of_out, queries);
  if (traits.predicts) add(of_error, keys);

  const int row = warp % kSixteens, part = warp / kSixteens, first_key = part * S::kPartKeys, token = 16 * row + lane / 4;
  // c += a b, b from rows of all keys
  const auto load_keys = [&](uint32_t (&b)[S::kPairs][4], uint32_t tile, auto i) {
    each<S::kPairs>([&](auto n) {
      load_transposed<i * 16 * 2 * kDim>(b[n], address(tile + by_rows<S::kPieces>(0, first_key + 16 * n, lane)));
    });
  };
  const auto scale_rows = [&](float (&c)[2 * S::kPairs][4], const float (&of)[kChunk]) {
#pragma unroll
    for (int n = 0; n < 2 * S::kPairs; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[n][i] *= of[token + i / 2 * 8];
  };
  {
    float c[2 * S::kPairs][4] = {};
    products<kSteps, S::kPairs>(c, 0, kSteps, [&](auto i, uint32_t (&a)[4], uint32_t (&b)[S::kPairs][4]) {
      load_matrices<0>(a, address(grads + by_rows<S::kPieces>(16 * row, 16 * i, lane)));
      load_keys(b, S::kS, i);
    });
    scale_rows(c, x.gamma);
    if (decays) {
      float reads[2] = {};
#pragma unroll
      for (int n = 0; n < 2 * S::kPairs; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float2 q = unpack<T>(at<uint32_t>(queries + place<S::kPieces>(token + 8 * i, first_key / 8 + n) + 4 * (lane & 3)));
          reads[i] += c[n][2 * i] * q.x + c[n][2 * i + 1] * q.y;
        }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        reads[i] = row_sum<4>(reads[i]);
        if ((lane & 3) == 0) at<float>(S::kReads + 4 * (part * kChunk + token + 8 * i)) = reads[i];
      }
    }
    products<kSixteens, S::kPairs>(c, 0, row + 1, [&](auto i, uint32_t (&a)[4], uint32_t (&b)[S::kPairs][4]) {
      load_matrices<0>(a, address(S::kG + by_rows<S::kTokenPieces>(16 * row, 16 * i, lane)));
      load_keys(b, keys, i);
    });
    store_rows(p.grad_q, chunk, row, first_key, c);
  }
  {
    float c[2 * S::kPairs][4] = {};
    products<kSteps, S::kPairs>(c, 0, kSteps, [&](auto i, uint32_t (&a)[4], uint32_t (&b)[S::kPairs][4]) {
      load_transposed<0>(a, address(S::kU + by_columns<S::kTokenPieces>(16 * i, 16 * row, lane)));
      load_keys(b, S::kJ, i);
    });
    scale_rows(c, x.to_end);
    if (traits.predicts)
      products<kSteps, S::kPairs>(c, 0, kSteps, [&](auto i, uint32_t (&a)[4], uint32_t (&b)[S::kPairs][4]) {
        load_transposed<0>(a, address(S::kE + by_columns<S::kTokenPieces>(16 * i, 16 * row, lane)));
        load_keys(b, S::kS, i);
      });
    products<kSixteens, S::kPairs>(c, row, kSixteens, [&](auto i, uint32_t (&a)[4], uint32_t (&b)[S::kPairs][4]) {
      load_transposed<0>(a, address(S::kG + by_columns<S::kTokenPieces>(16 * i, 16 * row, lane)));
      load_keys(b, queries, i);
    });
    store_rows(p.grad_k, chunk, row, first_key, c);
  }
  {
    float c[2 * S::kPairs][4];  // dV = -dE
    each<S::kPairs>([&](auto n) {
      uint32_t of[4];
      load_transposed<0>(of, address(S::kE + by_rows<S::kTokenPieces>(first_key + 16 * n, 16 * row, lane)));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 y = unpack<T>(of[i]);
        c[2 * n + i % 2][i / 2 * 2] = -y.x, c[2 * n + i % 2][i / 2 * 2 + 1] = -y.y;
      }
    });
    store_rows(p.grad_v, chunk, row, first_key, c);
  }
  gate_gradients(chunk, total);
}

// Of the token that this thread and its neighbours have; all warps' sums are there.
template <class S> __device__ __forceinline__ void Reverse<S>::gate_gradients(int chunk, float total) const {
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
  float sum = 0.0f;
  if (p.log_decay) {
    sum = decay_from_pairs(token, part);
    const float end = of_token(kOfEnd);
    if (part == 0) at<float>(S::kEnds + 4 * token) = end;
  }
  __syncthreads();  // all that is in shared memory has been read, but for these sums
  if (p.log_decay == nullptr) return;
#pragma unroll 4
  for (int i = part; i < kChunk; i += S::kLanes) {
    if (i < token) {
      sum += at<float>(S::kEnds + 4 * i);
    } else {
#pragma unroll
      for (int n = 0; n < S::kParts; ++n) sum += at<float>(S::kReads + 4 * (n * kChunk + i));
    }
  }
  if (part == 0)
#pragma unroll
    for (int i = 0; i < S::kWarps; ++i) sum += total * at<float>(S::kInner + 4 * i);
  sum = row_sum<S::kLanes>(sum);
  if (writes) p.grad_log_decay[place] = sum;
}

template <class S> __global__ void __launch_bounds__(S::kThreads, 256 / S::kThreads) linear_reverse(const __grid_constant__ MirasLinearReverse p) {
  Reverse<S>(p, blockIdx.x).run();
}

}  // namespace
}  // namespace miras::cuda
