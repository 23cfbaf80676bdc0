// What a block of linear_reverse_kernel.h holds, how it loads tokens and gates, and how it reruns a segment of the forward.
#pragma once

#include "linear_reverse_tools.h"

namespace miras::cuda {
namespace {

template <class S> struct Reverse {
  using T = typename S::T;
  static constexpr int kDim = S::kDim, kChunk = S::kChunk, kGroups = S::kGroups, kSixteens = S::kSixteens, kSteps = S::kSteps;
  enum Sum { kOfLr, kOfEnd, kOfDelta, kSquares, kPulls };

  const MirasLinearReverse& p;
  const Sequence s;
  int warp, lane, first_value;
  const bool couples;        // the bias, a row of E
  const int64_t first_gate;  // of the sequence's first token and the head
  uint16_t* const states;    // the block's workspace
  float j[kDim / 8][4];      // J: the warp's values by keys

  __device__ __forceinline__ Reverse(const MirasLinearReverse& p, int head)
      : p(p), s(p, head, kChunk), warp(thread() / 32), lane(thread() % 32), first_value(16 * warp),
        couples(bias_traits(BiasTag(p.bias)).couples_row), first_gate((s.batch * p.T + s.begin) * p.H + s.h),
        states(static_cast<uint16_t*>(p.states) + int64_t(head) * p.kept * kDim * kDim) {}

  // Addresses made of these are computed again from here on, instead of being kept in registers from stage to stage and chunk to chunk.
  __device__ __forceinline__ void refresh() {
    const int thread = fresh_thread();
    warp = thread / 32, lane = thread % 32, first_value = 16 * warp;
  }
  __device__ __forceinline__ int tokens_of(int chunk) const { return min(s.length - chunk * kChunk, kChunk); }
  __device__ __forceinline__ ReverseGates<kChunk>& gates(int chunk) const {
    return at<ReverseGates<kChunk>>(S::kGates + (chunk & 1) * sizeof(ReverseGates<kChunk>));
  }
  // of a chunk's tokens, one for each warp
  __device__ __forceinline__ float* sums(Sum sum, int warp) const { return &at<float>(S::kSums) + (sum * S::kWarps + warp) * kChunk; }
  __device__ __forceinline__ float sum_over_warps(Sum sum, int token) const {
    float x = 0.0f;
#pragma unroll
    for (int i = 0; i < S::kWarps; ++i) x += sums(sum, i)[token];
    return x;
  }
  __device__ __forceinline__ void store_sums(Sum sum, float2 (&x)[kGroups]) const {
    const int group = token_sums(x, lane);
    *reinterpret_cast<float2*>(sums(sum, warp) + 8 * group + 2 * (lane & 3)) = x[0];
  }
  // of the thread's two tokens of each group
  __device__ __forceinline__ void pairs(float2 (&to)[kGroups], const float (&of)[kChunk]) const {
#pragma unroll
    for (int n = 0; n < kGroups; ++n) to[n] = *reinterpret_cast<const float2*>(of + 8 * n + 2 * (lane & 3));
  }

  // ---------------------------------------------------------------------------------------------------------------- copies

  static __device__ __forceinline__ uint32_t stage(int chunk) { return (chunk & 1) * S::kStage; }
  __device__ __forceinline__ void copy(uint32_t tile, const MirasTokens& x, int chunk) const {
    constexpr int kRows = S::kThreads / S::kPieces, kTimes = (kChunk + kRows - 1) / kRows;
    const int piece = thread() % S::kPieces, row = thread() / S::kPieces, count = tokens_of(chunk);
    const char* from = s.token(x, int64_t(chunk) * kChunk + row) + 16 * piece;
    const int64_t step = 2 * kRows * x.token;
#pragma unroll
    for (int i = 0; i < kTimes; ++i, from += step) {
      const int r = row + i * kRows;
      if (kChunk % kRows == 0 || r < kChunk) cp_async_16(address(tile + piece_of<kChunk>(r, piece)), from, r < count);
    }
  }
  // a state of the workspace, where 16-byte pieces of all values lie side by side
  __device__ __forceinline__ void copy_state(int kept) const {
    const char* const from = reinterpret_cast<const char*>(states + int64_t(kept) * kDim * kDim);
#pragma unroll
    for (int i = thread(); i < kDim * S::kPieces; i += S::kThreads)
      cp_async_16(address(S::kS + piece_of<kDim>(i % kDim, i / kDim)), from + 16 * i);
  }

  // By one warp.
  __device__ __forceinline__ void prepare(int chunk) const {
    constexpr int kEach = kChunk < 32 ? 1 : kChunk / 32;
    const int count = tokens_of(chunk);
    float lr[kEach], delta[kEach];
    float2 sums[kEach], end = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int row = lane * kEach + i;
      const bool has = row < count;
      const int64_t at = first_gate + (int64_t(chunk) * kChunk + (has ? row : 0)) * p.H;
      lr[i] = has ? -p.lr[at] : 0.0f, delta[i] = has && p.delta && !p.delta_per_channel ? p.delta[at] : 0.0f;
      const float g = max_nan(has && p.log_decay ? p.log_decay[at] : 0.0f, kLowest), units = floorf(fmaf(g, kUnit, 0.5f));
      end.x += units, end.y += (g - units * (1 / kUnit)) * kLog2;
      sums[i] = end;
    }
    const float2 own = end;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const float x = __shfl_up_sync(kWholeWarp, end.x, step), y = __shfl_up_sync(kWholeWarp, end.y, step);
      end.x += lane >= step ? x : 0.0f, end.y += lane >= step ? y : 0.0f;
    }
    const float2 all = make_float2(__shfl_sync(kWholeWarp, end.x, 31), __shfl_sync(kWholeWarp, end.y, 31));
    if (lane * kEach >= kChunk) return;
    ReverseGates<kChunk>& to = gates(chunk);
    const float2 zero = make_float2(0.0f, 0.0f), before = make_float2(end.x - own.x, end.y - own.y);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int row = lane * kEach + i;
      const float2 of = make_float2(sums[i].x + before.x, sums[i].y + before.y);
      to.log_gamma[row] = of, to.eta[row] = lr[i], to.delta[row] = delta[i];
      to.to_end[row] = decay_of(all, of), to.gamma[row] = decay_of(of, zero);
    }
    if (lane == 0) to.total = decay_of(all, zero);
  }

  // ------------------------------------------------------------------------------------------------------------- matrices

  // f(value, key, the numbers of value and of value + 8, for `key` and the next)
  template <class Matrix, class Function> __device__ __forceinline__ void each_pair(Matrix& x, Function&& f) const {
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) f(first_value + lane / 4, 8 * n + 2 * (lane & 3), x[n]);
  }
  __device__ __forceinline__ int64_t matrix() const { return (int64_t(s.n) * p.H + s.h) * kDim * kDim; }
  __device__ __forceinline__ void load_gradient() {
    const float* const from = p.grad_final + matrix();
    each_pair(j, [&](int value, int key, float (&x)[4]) {
      float2 low = make_float2(0.0f, 0.0f), high = low;
      if (p.grad_final) {
        low = *reinterpret_cast<const float2*>(from + value * kDim + key);
        high = *reinterpret_cast<const float2*>(from + (value + 8) * kDim + key);
      }
      x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
    });
  }
  __device__ __forceinline__ void store_gradient() const {
    float* const to = p.grad_initial + matrix();
    each_pair(j, [&](int value, int key, const float (&x)[4]) {
      *reinterpret_cast<float2*>(to + value * kDim + key) = make_float2(x[0], x[1]);
      *reinterpret_cast<float2*>(to + (value + 8) * kDim + key) = make_float2(x[2], x[3]);
    });
  }
  __device__ __forceinline__ void load_checkpoint(float (&w)[kDim / 8][4], int segment) const {
    const int64_t slot = (p.first_slot ? p.first_slot[s.n] : int64_t(s.n) * p.slots) + segment;
    const float* const from = p.checkpoints + (slot * p.H + s.h) * kDim * kDim;
    each_pair(w, [&](int value, int key, float (&x)[4]) {
      const float* const at = from + key * kDim + value;
      x[0] = at[0], x[1] = at[kDim], x[2] = at[8], x[3] = at[kDim + 8];
    });
  }
  __device__ __forceinline__ void keep(const float (&w)[kDim / 8][4], int kept) const {
    char* const to = reinterpret_cast<char*>(states + int64_t(kept) * kDim * kDim);
    each_pair(w, [&](int value, int key, const float (&x)[4]) {
      char* const at = to + (key / 8 * kDim + value) * 16 + 2 * (key % 8);
      *reinterpret_cast<uint32_t*>(at) = pack<T>(x[0], x[1]), *reinterpret_cast<uint32_t*>(at + 128) = pack<T>(x[2], x[3]);
    });
  }

  // --------------------------------------------------------------------------------------------------------------- updates

  // V' of the warp's values: subtracted from E', or its negative
  template <bool kPredicts> __device__ __forceinline__ void subtract(float (&e)[kGroups][4], uint32_t values) const {
    const uint32_t rows = address(values + columns_of<kChunk>(0, first_value, lane));
    uint32_t v[kSixteens][4];
    each<kSixteens>([&](auto n) { load_transposed<n * 16 * 128>(v[n], rows); });
#pragma unroll
    for (int n = 0; n < kSixteens; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 x = unpack<T>(v[n][i]);
        float* const to = &e[2 * n + i / 2][2 * (i % 2)];
        to[0] = kPredicts ? to[0] - x.x : -x.x, to[1] = kPredicts ? to[1] - x.y : -x.y;
      }
  }
  // f(group, token of two, half of the values, -eta, what the bias shares in the token's row): |e|^2 of all rows must be in `sums`
  template <class Bias, class Function> __device__ __forceinline__ void each_error(const Bias& bias, int chunk, Function&& f) const {
    float2 eta[kGroups], deltas[kGroups];
    pairs(eta, gates(chunk).eta);
    if constexpr (Bias::kUsesDelta) pairs(deltas, gates(chunk).delta);
#pragma unroll
    for (int n = 0; n < kGroups; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = 8 * n + 2 * (lane & 3) + i;
        float norm2 = 0.0f;
        if constexpr (Bias::kCouplesRow) norm2 = sum_over_warps(kSquares, token);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float delta = 0.0f;
          if constexpr (Bias::kUsesDelta) {
            delta = i ? deltas[n].y : deltas[n].x;
            if constexpr (!Bias::kCouplesRow)
              if (p.delta_per_channel) delta = token < tokens_of(chunk) ? p.delta[channel_place(chunk, token, half)] : 0.0f;
          }
          f(n, i, half, i ? eta[n].y : eta[n].x, bias.row(norm2, delta));
        }
      }
  }
  // of a gate of each channel
  __device__ __forceinline__ int64_t channel_place(int chunk, int token, int half) const {
    return (first_gate + (int64_t(chunk) * kChunk + token) * p.H) * kDim + first_value + lane / 4 + 8 * half;
  }
  __device__ __forceinline__ void share_squares(const float (&e)[kGroups][4]) const {
    float2 squares[kGroups];
#pragma unroll
    for (int n = 0; n < kGroups; ++n)
      squares[n] = make_float2(e[n][0] * e[n][0] + e[n][2] * e[n][2], e[n][1] * e[n][1] + e[n][3] * e[n][3]);
    store_sums(kSquares, squares);
    __syncthreads();
  }
  // E' from W K', and U' from E'; they may be the same place
  __device__ __forceinline__ void updates(float (&u)[kGroups][4], float (&e)[kGroups][4], int chunk, uint32_t values) const {
    with_bias(BiasTag(p.bias), p.bias_params, [&](auto bias) {
      using Bias = decltype(bias);
      subtract<Bias::kPredicts>(e, values);
      if constexpr (Bias::kCouplesRow) share_squares(e);
      each_error(bias, chunk,
                 [&](int n, int i, int half, float eta, auto row) { u[n][2 * half + i] = bias.value(e[n][2 * half + i], row) * eta; });
    });
  }

  // Of dQ or dK: c += A B over steps first to last - 1 of kCount, B the warp's keys of a tile of kRows rows.
  template <int kCount, int kRows, class Load>
  __device__ __forceinline__ void add_keys(float (&c)[2 * S::kPairs][4], uint32_t tile, int first, int last, Load&& load) const {
    const int first_key = warp / kSixteens * S::kPartKeys;
    products<kCount, S::kPairs>(c, first, last, [&](auto i, uint32_t (&a)[4], uint32_t (&b)[S::kPairs][4]) {
      load(i, a);
      each<S::kPairs>([&](auto n) { load_transposed<i * 16 * 128>(b[n], address(tile + rows_of<kRows>(0, first_key + 16 * n, lane))); });
    });
  }

  // ------------------------------------------------------------------------------------------------------------ the rerun

  // Keeps the states of the chunks from `first` on, up to `last`, whose own products nobody needs here. Meanwhile J lies in shared memory.
  __device__ __forceinline__ void rerun(int first, int last) {
    const auto parked = [&](int i) -> float4& { return at<float4>(S::kS + (i * S::kThreads + thread()) * 16); };
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) parked(i) = make_float4(j[i][0], j[i][1], j[i][2], j[i][3]);
    float w[kDim / 8][4];
    load_checkpoint(w, first / p.every);
    const auto copy_tokens = [&](int chunk) {
      if (chunk < last) {
        copy(stage(chunk), p.k, chunk), copy(chunk & 1 ? S::kU : S::kV, p.v, chunk);
        if (warp == S::kWarps - 1) prepare(chunk);
      }
      cp_async_commit();
    };
    copy_tokens(first);
#pragma unroll 1
    for (int chunk = first;; ++chunk) {
      keep(w, chunk - first);
      if (chunk == last) break;
      cp_async_wait<0>();
      fence_async();
      __syncthreads();  // the chunk's tokens and gates are here, and those before it have been read
      copy_tokens(chunk + 1);
      refresh();
      const uint32_t keys = stage(chunk);
      float e[kGroups][4];
      tile_product<kSteps, kGroups, kChunk, false, false>(e, keys, 0, lane,
                                                          [&](auto i, uint32_t (&a)[4]) { packed(a, w[2 * i], w[2 * i + 1]); });
      wgmma_wait(e);
      updates(e, e, chunk, chunk & 1 ? S::kU : S::kV);
      const ReverseGates<kChunk>& x = gates(chunk);
      uint32_t u[kSixteens][4];
      float2 to_end[kGroups];
      pairs(to_end, x.to_end);
#pragma unroll
      for (int n = 0; n < kGroups; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) u[n / 2][n % 2 * 2 + i] = pack<T>(e[n][2 * i] * to_end[n].x, e[n][2 * i + 1] * to_end[n].y);
      const float total = x.total;
      for (auto& tile : w)
        for (float& y : tile) y *= total;
      tile_product<kSixteens, kDim / 8, kChunk, true, true>(w, keys, 0, lane, [&](auto i, uint32_t (&a)[4]) {
#pragma unroll
        for (int r = 0; r < 4; ++r) a[r] = u[i][r];
      });
      wgmma_wait(w);
    }
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
      const float4 x = parked(i);
      j[i][0] = x.x, j[i][1] = x.y, j[i][2] = x.z, j[i][3] = x.w;
    }
    cp_async_wait<0>();
    __syncthreads();  // the states are kept, the stages read
  }

  // of linear_reverse_kernel.h
  __device__ __forceinline__ void read_chunk(int chunk, int kept);
  __device__ __forceinline__ void pair_sums(int row, int column, const float (&m)[2][4]) const;
  __device__ __forceinline__ float decay_from_pairs(int token, int part) const;
  __device__ __forceinline__ void store_rows(void* to, int chunk, int row, int channel, const uint32_t (&x)[2 * S::kPairs][2]) const;
  __device__ __forceinline__ void store_rows(void* to, int chunk, int row, int channel, const float (&x)[2 * S::kPairs][4]) const;
  __device__ __forceinline__ float gate_gradients(int chunk) const;
  __device__ __forceinline__ void decay_gradients(int chunk, float sum, float total) const;
  __device__ __forceinline__ void gradients_of_errors(float (&d)[kGroups][4], float (&e)[kGroups][4], int chunk) const;

  __device__ __forceinline__ void run() {
    load_gradient();
#pragma unroll 1
    for (int last = s.chunks - 1; last >= 0;) {
      const int first = last / p.every * p.every;
      rerun(first, last);
      copy(stage(last), p.k, last), copy(stage(last) + S::kQ, p.q, last), copy(stage(last) + S::kD, p.grad_out, last);
      if (warp == S::kWarps - 1) prepare(last);
#pragma unroll 1
      for (; last >= first; --last) read_chunk(last, last - first);
    }
    store_gradient();
  }
};

}  // namespace
}  // namespace miras::cuda
