// The kernel of linear_reverse.h: a chunk, once its segment has been rerun.
//
// A warp holds 16 values of J, all keys, as accumulators of mma.m16n8k16; E', U', dU' and dE' are tiles of the same values by tokens, so
// that what is elementwise stays in registers. What other warps need goes through shared memory, rounded: U', dE', J and the state. Tokens by
// tokens, in tiles of 16 x 16, a warp computes the scores and, at the same places, G. Of dQ and dK it has 16 tokens and a part of the keys.
//
//     [tokens, state here]    E', K J', scores, U'    [U', J, scores here]    G, dU', dE'    [dE', G here]    J, dQ, dK, dV    [all read]
#pragma once

#include "linear_reverse_gates.h"

namespace miras::cuda {
namespace {

// The chunk's K, Q, dO and gates are on their way, and its state is the `kept`-th of the workspace.
template <class S> __device__ __forceinline__ void Reverse<S>::read_chunk(int chunk, int kept) {
  const uint32_t keys = stage(chunk), queries = keys + S::kQ, grads = keys + S::kD;
  const BiasTraits traits = bias_traits(BiasTag(p.bias));
  const ReverseGates<kChunk>& x = gates(chunk);
  const bool decays = p.log_decay != nullptr;
  copy(S::kV, p.v, chunk), copy_state(kept);
  cp_async_commit();
  cp_async_wait<0>();
  fence_async();
  __syncthreads();
  if (kept > 0) {
    const uint32_t next = stage(chunk - 1);
    copy(next, p.k, chunk - 1), copy(next + S::kQ, p.q, chunk - 1), copy(next + S::kD, p.grad_out, chunk - 1);
    if (warp == S::kWarps - 1) prepare(chunk - 1);
  }
  cp_async_commit();
  refresh();

  float e[kGroups][4], d[kGroups][4], scores[S::kUnits][2][4] = {}, inner[4] = {};
  tile_product<kSteps, kGroups, kChunk, false, false>(d, keys, 0, lane, [&](auto i, uint32_t (&a)[4]) {
    packed(a, j[2 * i], j[2 * i + 1]);
    store_fragment<8>(S::kJ + i / 4 * (kDim * 128), first_value, i % 4 * 2, lane, a);
  });
  uint32_t of_state[kSteps][4];
  each<kSteps>([&](auto i) { load_matrices<0>(of_state[i], address(S::kS + rows_of<kDim>(first_value, 16 * i, lane))); });
  tile_product<kSteps, kGroups, kChunk, false, false>(e, keys, 0, lane, [&](auto i, uint32_t (&a)[4]) {
#pragma unroll
    for (int r = 0; r < 4; ++r) a[r] = of_state[i][r];
  });
  if (decays)
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float2 of = unpack<T>(of_state[i][r]);
        const float* const with = &j[2 * i + r / 2][2 * (r % 2)];
        inner[r] = fmaf(of.x, with[0], inner[r]), inner[r] = fmaf(of.y, with[1], inner[r]);
      }
  wgmma_wait(d, e);  // their operands take the registers that the scores need
  // f(number, row, column) of the warp's tiles of pairs; decay of a pair of a tile
  const auto each_unit = [&](auto&& f) {
    each<S::kUnits>([&](auto i) {
      const int unit = warp + i * S::kWarps, row = unit / kSixteens, column = unit % kSixteens;
      if (unit < kSixteens * kSixteens && column <= row) f(i, row, column);
    });
  };
  const auto decayed = [&](float (&of)[2][4], int row, int column) {
    const int read = 16 * row + lane / 4, write = 16 * column + 2 * (lane & 3);
    float2 reads[2], writes[2][2];
    float by[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 two = *reinterpret_cast<const float4*>(x.log_gamma + write + 8 * i);
      reads[i] = x.log_gamma[read + 8 * i], writes[i][0] = make_float2(two.x, two.y), writes[i][1] = make_float2(two.z, two.w);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) by[n][i] = decay_of(reads[i / 2], writes[n][i % 2]);
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) of[n][i] = write + 8 * n + i % 2 <= read + i / 2 * 8 ? of[n][i] * by[n][i] : 0.0f;
  };
  each_unit([&](auto unit, int row, int column) {
    products<kSteps, 1>(scores[unit], 0, kSteps, [&](auto i, uint32_t (&a)[4], uint32_t (&b)[1][4]) {
      load_matrices<0>(a, address(queries + rows_of<kChunk>(16 * row, 16 * i, lane)));
      load_matrices<0>(b[0], address(keys + columns_of<kChunk>(16 * column, 16 * i, lane)));
    });
    decayed(scores[unit], row, column);
    uint32_t to[4];
    packed(to, scores[unit][0], scores[unit][1]);
    store_fragment<S::kTokenPieces>(S::kP, 16 * row, 2 * column, lane, to);
  });
  {
    float u[kGroups][4];
    float2 ends[kGroups];
    float2 to_end[kGroups];
    pairs(to_end, x.to_end);
    updates(u, e, chunk, S::kV);
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) d[n][i] *= i % 2 ? to_end[n].y : to_end[n].x;
      ends[n] = make_float2(u[n][0] * d[n][0] + u[n][2] * d[n][2], u[n][1] * d[n][1] + u[n][3] * d[n][3]);
    }
    if (decays) {
      store_sums(kOfEnd, ends);
      const float sum = warp_sum((inner[0] + inner[1]) + (inner[2] + inner[3]));
      if (lane == 0) at<float>(S::kInner + 4 * warp) = sum;
    }
#pragma unroll
    for (int n = 0; n < kSixteens; ++n) {
      uint32_t to[4];
      packed(to, u[2 * n], u[2 * n + 1]);
      store_fragment<S::kTokenPieces>(S::kU, first_value, 2 * n, lane, to);
    }
  }
  fence_async();
  __syncthreads();  // U', J and the scores are here
  refresh();

  each_unit([&](auto unit, int row, int column) {
    float g[2][4] = {};
    products<kSteps, 1>(g, 0, kSteps, [&](auto i, uint32_t (&a)[4], uint32_t (&b)[1][4]) {
      load_matrices<0>(a, address(grads + rows_of<kChunk>(16 * row, 16 * i, lane)));
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
        load_transposed<0>(of_out[i], address(grads + columns_of<kChunk>(16 * i, first_value, lane)));
        each<i + 1>([&](auto n) { load_transposed<0>(b[i % 2][n], address(S::kP + by_rows<S::kTokenPieces>(16 * i, 16 * n, lane))); });
      }
      if constexpr (i > 0) each<i>([&](auto n) { multiply(d[2 * n], d[2 * n + 1], of_out[i - 1], b[(i + 1) % 2][n]); });
    });
  }
  {
    float2 gamma[kGroups];
    pairs(gamma, x.gamma);
#pragma unroll
    for (int n = 0; n < kSixteens; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 of = unpack<T>(of_out[n][i]), by = gamma[2 * n + i / 2];
        of_out[n][i] = pack<T>(of.x * by.x, of.y * by.y);
      }
  }
  gradients_of_errors(d, e, chunk);
#pragma unroll
  for (int n = 0; n < kSixteens; ++n) {
    packed(of_error[n], d[2 * n], d[2 * n + 1]);
    store_fragment<S::kTokenPieces>(S::kE, first_value, 2 * n, lane, of_error[n]);
  }
  fence_async();
  __syncthreads();  // dE' and G are here
  refresh();

  const float total = x.total;
  for (auto& tile : j)
    for (float& y : tile) y *= total;
  // J += a b
  const auto add = [&](const uint32_t (&of)[kSixteens][4], uint32_t tile) {
    tile_product<kSixteens, kDim / 8, kChunk, true, true>(j, tile, 0, lane, [&](auto i, uint32_t (&a)[4]) {
#pragma unroll
      for (int r = 0; r < 4; ++r) a[r] = of[i][r];
    });
  };
  add(of_out, queries);
  if (traits.predicts) add(of_error, keys);
  const float sum = gate_gradients(chunk);
  const int row = warp % kSixteens, part = warp / kSixteens, first_key = part * S::kPartKeys, token = 16 * row + lane / 4;
  const auto scale_rows = [&](float (&c)[2 * S::kPairs][4], const float (&of)[kChunk]) {
    const float by[2] = {of[token], of[token + 8]};
#pragma unroll
    for (int n = 0; n < 2 * S::kPairs; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[n][i] *= by[i / 2];
  };
  {
    uint32_t of[S::kPairs][4], words[2 * S::kPairs][2];  // dV = -dE
    each<S::kPairs>(
        [&](auto n) { load_transposed<0>(of[n], address(S::kE + by_rows<S::kTokenPieces>(first_key + 16 * n, 16 * row, lane))); });
#pragma unroll
    for (int n = 0; n < S::kPairs; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) words[2 * n + i % 2][i / 2] = of[n][i] ^ 0x80008000u;
    store_rows(p.grad_v, chunk, row, first_key, words);
  }
  wgmma_wait(j);
  float of_k[2 * S::kPairs][4] = {}, c[2 * S::kPairs][4] = {};  // dK, dQ
  add_keys<kSteps, kDim>(of_k, S::kJ, 0, kSteps, [&](auto i, uint32_t (&a)[4]) {
    load_transposed<0>(a, address(S::kU + by_columns<S::kTokenPieces>(16 * i, 16 * row, lane)));
  });
  scale_rows(of_k, x.to_end);
  if (traits.predicts)
    add_keys<kSteps, kDim>(of_k, S::kS, 0, kSteps, [&](auto i, uint32_t (&a)[4]) {
      load_transposed<0>(a, address(S::kE + by_columns<S::kTokenPieces>(16 * i, 16 * row, lane)));
    });
  add_keys<kSixteens, kChunk>(of_k, queries, row, kSixteens, [&](auto i, uint32_t (&a)[4]) {
    load_transposed<0>(a, address(S::kG + by_columns<S::kTokenPieces>(16 * i, 16 * row, lane)));
  });
  add_keys<kSteps, kDim>(c, S::kS, 0, kSteps,
                         [&](auto i, uint32_t (&a)[4]) { load_matrices<0>(a, address(grads + rows_of<kChunk>(16 * row, 16 * i, lane))); });
  store_rows(p.grad_k, chunk, row, first_key, of_k);
  uint32_t q[2 * S::kPairs][2];
  if (decays)
#pragma unroll
    for (int n = 0; n < 2 * S::kPairs; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) q[n][i] = load_word(queries + piece_of<kChunk>(token + 8 * i, first_key / 8 + n) + 4 * (lane & 3));
  scale_rows(c, x.gamma);
  if (decays) {
    float reads[2][2] = {};
#pragma unroll
    for (int n = 0; n < 2 * S::kPairs; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 of = unpack<T>(q[n][i]);
        reads[i][0] = fmaf(c[n][2 * i], of.x, reads[i][0]), reads[i][1] = fmaf(c[n][2 * i + 1], of.y, reads[i][1]);
      }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = row_sum<4>(reads[i][0] + reads[i][1]);
      if ((lane & 3) == 0) at<float>(S::kReads + 4 * (part * kChunk + token + 8 * i)) = sum;
    }
  }
  add_keys<kSixteens, kChunk>(c, keys, 0, row + 1, [&](auto i, uint32_t (&a)[4]) {
    load_matrices<0>(a, address(S::kG + by_rows<S::kTokenPieces>(16 * row, 16 * i, lane)));
  });
  store_rows(p.grad_q, chunk, row, first_key, c);
  __syncthreads();  // all that is in shared memory has been read, but for the sums
  if (decays) decay_gradients(chunk, sum, total);
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, 256 / S::kThreads) linear_reverse(const __grid_constant__ MirasLinearReverse p) {
  if constexpr (S::kBytes <= kMaxShared) Reverse<S>(p, blockIdx.x).run();
}
template <class S> int launch_reverse(const MirasLinearReverse& p, cudaStream_t stream) {
  return launch_chain(linear_reverse<S>, int64_t(p.N) * p.H, S::kThreads, S::kBytes, stream, p);
}

}  // namespace
}  // namespace miras::cuda
