// The kernel of linear_chain.h, for one type of token.
//
// A warp holds 16 values of W, all keys, as float32 accumulators of mma.m16n8k16 through all chunks of a sequence. Rounded and packed they
// are the A operand of W K' and W Q'; U' is the A operand of both products that it enters: so no element of W, E, U or O goes from one
// thread to another. Row g of a warp's tile is its value 2g and row g + 8 its value 2g + 1, so that a thread has neighbouring values of a
// token, which lie in one word of v and of the output.
//
// Of the scores L o K Q', 8 tokens t are a B operand, whose k runs over the earlier tokens s. A tile of them has the tokens of groups w and
// G - 1 - w of the chunk's G groups of 8: every tile then has the same number of pairs s <= t. Each is computed by one warp, from the keys
// that it reads for E' anyway, and handed over through shared memory. In a block of 32 values only half of the warps have values; the
// others compute all scores, up to two tiles each, and the next chunk's decays.
//
// A chunk: its tokens have arrived [barrier]; E', scores and W Q'; copies of the next chunk's tokens begin; scores to shared memory; U'
// [barrier]; O'; W; the next chunk's decays. Products that do not wait for each other are issued together: one block of few warps has a
// multiprocessor to itself, and what a chunk takes is the latency of its steps.
#pragma once

#include "linear_chain_state.h"

namespace miras::cuda {
namespace {

template <class S>
template <bool kErrors, bool kScores, class Work>
__device__ __forceinline__ void Chain<S>::errors_and_scores(float (&e)[kGroups][4], float (&scores)[S::kTiles][kGroups][4], uint32_t stage,
                                                            float factor, Work&& work) const {
  constexpr int kTiles = kScores ? S::kTiles : 0;
  const uint32_t keys = stage + lane_rows();
  uint32_t queries[S::kTiles];
  each<kTiles>([&](auto j) {
    const int tile = (first_tile() + j) % kSixteens, group = (lane >> 3) & 1 ? kGroups - 1 - tile : tile;
    queries[j] = stage + S::kQ + (8 * group + (lane & 7)) * S::kRow + (((lane >> 4) ^ (lane & 7)) << 4);
  });
  uint32_t b[2][kSixteens][4], q[2][S::kTiles][4], a[2][4];
  const auto load = [&](auto i) {
    each<kTiles>([&](auto j) { load_matrices<0>(q[i % 2][j], queries[j] ^ (i << 5)); });
    const uint32_t at = keys ^ (i << 5);
    each<kSixteens>([&](auto n) { load_matrices<n * 16 * S::kRow>(b[i % 2][n], at); });
    if constexpr (kErrors) operand(a[i % 2], i, factor);
  };
  load(Index<0>{});
  each<kSteps>([&](auto i) {
    if constexpr (i + 1 < kSteps) load(Index<i + 1>{});
    each<kGroups>([&](auto n) {
      const uint32_t (&x)[4] = b[i % 2][n / 2];
      each<kTiles>([&](auto j) { multiply<i == 0>(scores[j][n], q[i % 2][j], x[n % 2 * 2], x[n % 2 * 2 + 1]); });
      if constexpr (kErrors) multiply<i == 0>(e[n], a[i % 2], x[n % 2 * 2], x[n % 2 * 2 + 1]);
    });
    work(i);
  });
}

template <class S>
template <class Work>
__device__ __forceinline__ void Chain<S>::read_out(float (&o)[kGroups][4], uint32_t stage, float factor, Work&& work) const {
  const uint32_t queries = stage + S::kQ + lane_rows();
  uint32_t b[2][kSixteens][4], a[2][4];
  const auto load = [&](auto i) {
    const uint32_t at = queries ^ (i << 5);
    each<kSixteens>([&](auto n) { load_matrices<n * 16 * S::kRow>(b[i % 2][n], at); });
    operand(a[i % 2], i, factor);
  };
  load(Index<0>{});
  each<kSteps>([&](auto i) {
    if constexpr (i + 1 < kSteps) load(Index<i + 1>{});
    each<kGroups>([&](auto n) { multiply<i == 0>(o[n], a[i % 2], b[i % 2][n / 2][n % 2 * 2], b[i % 2][n / 2][n % 2 * 2 + 1]); });
    work(i);
  });
}

template <class S>
__device__ __forceinline__ float Chain<S>::updates(uint32_t (&u)[kSixteens][4], uint32_t (&to_end)[kSixteens][4], float (&e)[kGroups][4],
                                                   const uint32_t (&v)[kGroups][2], int chunk, int count, float scale) const {
  float2 of[kGroups][2];
#pragma unroll
  for (int n = 0; n < kGroups; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) of[n][i] = unpack<T>(v[n][i]);
  const Gates<kChunk>& x = gates(chunk);
  float4 eta[kGroups];
#pragma unroll
  for (int n = 0; n < kGroups; ++n) eta[n] = pair(x.eta, n);
  return with_bias(BiasTag(p.bias), p.bias_params, [&](auto bias) {
    using Bias = decltype(bias);
#pragma unroll
    for (int n = 0; n < kGroups; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (Bias::kPredicts && !std::is_same_v<T, Bf16>) e[n][i] *= scale, e[n][i + 2] *= scale;
        e[n][i] = Bias::kPredicts ? e[n][i] - of[n][i].x : -of[n][i].x;
        e[n][i + 2] = Bias::kPredicts ? e[n][i + 2] - of[n][i].y : -of[n][i].y;
      }
    if constexpr (Bias::kCouplesRow) {
      store_squares(e);
      __syncthreads();
    }
#pragma unroll
    for (int n = 0; n < kGroups; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = 8 * n + 2 * (lane & 3) + i;
        float2 delta = make_float2(0.0f, 0.0f);
        float norm2 = 0.0f;
        if constexpr (Bias::kUsesDelta) {
          if (!Bias::kCouplesRow && p.delta_per_channel) delta = channel_delta(chunk, count, token);
          else delta.x = delta.y = x.delta[token];
        }
        if constexpr (Bias::kCouplesRow) norm2 = square(token);
        e[n][i] = bias.value(e[n][i], bias.row(norm2, delta.x)), e[n][i + 2] = bias.value(e[n][i + 2], bias.row(norm2, delta.y));
      }
    return weigh(u, to_end, e, eta);
  });
}

template <class S>
__device__ __forceinline__ float Chain<S>::weigh(uint32_t (&u)[kSixteens][4], uint32_t (&to_end)[kSixteens][4],
                                                 const float (&psi)[kGroups][4], const float4 (&eta)[kGroups]) const {
  float largest = 0.0f;
  if constexpr (!std::is_same_v<T, Bf16>)
#pragma unroll
    for (int n = 0; n < kGroups; ++n)
      for (int j = 0; j < 4; ++j) largest = fmaxf(largest, fabsf(psi[n][j] * (j % 2 ? eta[n].z : eta[n].x)));
  const float scale = fitting<T>(largest), factor = inverse<T>(scale);
#pragma unroll
  for (int n = 0; n < kGroups; ++n) {
    float4 of = eta[n];
    if constexpr (!std::is_same_v<T, Bf16>) of.x *= factor, of.y *= factor, of.z *= factor, of.w *= factor;
    float a[4], b[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = psi[n][i] * (i % 2 ? of.z : of.x), b[i] = psi[n][i] * (i % 2 ? of.w : of.y);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      u[n / 2][n % 2 * 2 + i] = pack<T>(a[2 * i], a[2 * i + 1]);
      to_end[n / 2][n % 2 * 2 + i] = pack<T>(b[2 * i], b[2 * i + 1]);
    }
  }
  return scale;
}

template <class S>
template <class Work>
__device__ __forceinline__ void Chain<S>::write(const uint32_t (&to_end)[kSixteens][4], uint32_t stage, float total, float scale,
                                                Work&& work) {
  const float factor = total * inverse<T>(scale);
  // lanes 8 to 15 and 24 to 31 have the later tokens, lanes 16 to 31 the later keys
  const uint32_t rows = stage + (((lane >> 3) & 1) * 8 + (lane & 7)) * S::kRow + (((lane >> 4) ^ (lane & 7)) << 4);
  constexpr int kAcross = kKeys / 64;
  uint32_t b[2][4][4];
  const auto load = [&](auto i) {  // 64 keys of 16 tokens
    each<4>([&](auto n) { load_transposed<i / kAcross * 16 * S::kRow>(b[i % 2][n], rows ^ ((i % kAcross * 4 + n) << 5)); });
  };
  const auto decay = [&](auto n) {
    for (float& x : w[n]) x *= factor;
  };
  load(Index<0>{});
  each<2>(decay);
  each<kSixteens * kAcross>([&](auto i) {
    if constexpr (i + 1 < kSixteens * kAcross) load(Index<i + 1>{});
    each<8>([&](auto n) {
      constexpr int at = i % kAcross * 8 + n;
      if constexpr (i < kAcross && at + 2 < kKeys / 8) decay(Index<at + 2>{});
      mma_m16n8k16<T>(w[at], to_end[i / kAcross], b[i % 2][n / 2][n % 2 * 2], b[i % 2][n / 2][n % 2 * 2 + 1]);
    });
    work(i);
  });
  if constexpr (!std::is_same_v<T, Bf16>)
    if (scale != 1.0f)
      for (auto& x : w)
        for (float& y : x) y *= scale;
}

template <class S> __device__ __forceinline__ void Chain<S>::store_output(const float (&o)[kGroups][4], int count, float scale) {
  const int64_t token = 2 * p.out.token, step = 8 * token;
  char* to[2] = {out, out + token};
  out += kChunk * token;
  const int left = count - 2 * (lane & 3);
  uint32_t words[kGroups][2];
#pragma unroll
  for (int n = 0; n < kGroups; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      words[n][i] = std::is_same_v<T, Bf16> ? pack<T>(o[n][i], o[n][i + 2]) : pack<T>(o[n][i] * scale, o[n][i + 2] * scale);
  const auto store = [&](bool whole) {  // without a branch for each token
    each<kGroups>([&](auto n) {
      each<2>([&](auto i) {
        if (whole || left > 8 * n + i) *reinterpret_cast<uint32_t*>(to[i]) = words[n][i];
        to[i] += step;
      });
    });
  };
  if (count == kChunk) store(true);
  else store(false);
}

template <class S> template <bool kActive> __device__ __forceinline__ void Chain<S>::read_chunk(int chunk) {
  const uint32_t stage = base + (chunk & 1) * S::kStage;
  const int count = tokens_of(chunk);
  const Gates<kChunk>& x = gates(chunk);
  cp_async_wait<0>();
  __syncthreads();  // the tokens and gates of the chunk are here, and those before it have been read
  constexpr bool kScores = !kActive || !S::kHelped;
  float e[kGroups][4], o[kGroups][4], scores[S::kTiles][kGroups][4];
  float w_scale = 1.0f, factor = 1.0f;
  if constexpr (kActive) w_scale = fitting<T>(largest()), factor = inverse<T>(w_scale);
  errors_and_scores<kActive, kScores>(e, scores, stage, factor, [&](auto i) { copy<i, kSteps>(chunk + 1); });
  if constexpr (!kActive) {
    const bool prepares = S::kHelped && warp == S::kWarps - 1;
    Raw next{};
    if (prepares) next = load_gates(chunk + 1);
    const auto store = [&](auto first) {  // of both tiles together
      Units units[] = {Units(*this, x, first), Units(*this, x, first + S::kTiles - 1)};
      each<kSteps>([&](auto i) { each<S::kTiles>([&](auto j) { units[j].template step<i>(scores[j]); }); });
    };
    if (!S::kHelped) store(warp);
    else if (first_tile() == 0) store(Index<0>{});  // tiles that the compiler knows: a third of the instructions
    else store(Index<S::kTiles>{});
    if (couples) __syncthreads();
    __syncthreads();
    if (prepares) prepare(next, chunk + 1);
  } else {
    Units units(*this, x, S::kHelped ? 0 : warp);
    uint32_t v[kGroups][2], u[kSixteens][4], to_end[kSixteens][4];
    read_out(o, stage, factor, [&](auto i) {
      if constexpr (kScores) units.template step<i>(scores[0]);
      if constexpr (i == kSteps - 1) load_values(v, chunk);
    });
    const Raw next = S::kHelped ? Raw{} : load_gates(chunk + 1);
    const float u_scale = updates(u, to_end, e, v, chunk, count, w_scale), total = x.total;
    float2 gamma[kGroups];
#pragma unroll
    for (int n = 0; n < kGroups; ++n) gamma[n] = pair(x.gamma, n);
    __syncthreads();  // all scores are here
    uint2 b[2][kGroups];
    load_scores(b[0], 0);
    decay_output(o, gamma, w_scale * inverse<T>(u_scale));
    Scan scan{*this, next, chunk + 1};
    constexpr int kWrites = kSixteens * (kKeys / 64), kScan = Scan::kSteps;
    write(to_end, stage, total, u_scale, [&](auto i) {
      if constexpr (i < kSixteens) {
        if constexpr (i + 1 < kSixteens) load_scores(b[(i + 1) % 2], i + 1);
        each<kGroups - 2 * i>([&](auto n) { mma_m16n8k16<T>(o[2 * i + n], u[i], b[i % 2][2 * i + n].x, b[i % 2][2 * i + n].y); });
      }
      if constexpr (!S::kHelped)
        each<kScan>([&](auto j) {
          if constexpr (j * kWrites / kScan == i) scan.template step<j>();
        });
    });
    store_output(o, count, u_scale);
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, 2) linear_chain(const __grid_constant__ MirasLinearChain p, const int tiles) {
  extern __shared__ __align__(1024) unsigned char shared[];
  Chain<S>(p, shared, blockIdx.x / tiles, blockIdx.x % tiles).run();
}

template <class S> int launch_tiles(const MirasLinearChain& p, cudaStream_t stream) {
  const int tiles = (p.V + S::kValues - 1) / S::kValues;
  return launch_chain(linear_chain<S>, int64_t(p.N) * p.H * tiles, S::kThreads, S::kBytes, stream, p, tiles);
}
template <class T, int kKeys, int kChunk> int launch_values(const MirasLinearChain& p, cudaStream_t stream) {
  switch (p.values) {
    case 32:  // for few heads; not for float16, since these kernels take nvcc as long as the others
      if constexpr (std::is_same_v<T, Bf16>) return launch_tiles<ChainShape<T, kKeys, kChunk, 32>>(p, stream);
      else return cudaErrorInvalidValue;
    case 64: return launch_tiles<ChainShape<T, kKeys, kChunk, 64>>(p, stream);
    default: return cudaErrorInvalidValue;
  }
}
template <class T, int kKeys> int launch_chunks(const MirasLinearChain& p, cudaStream_t stream) {
  switch (p.C) {
    case 16: return launch_values<T, kKeys, 16>(p, stream);
    case 32: return launch_values<T, kKeys, 32>(p, stream);
    case 64: return launch_values<T, kKeys, 64>(p, stream);
    default: return cudaErrorInvalidValue;
  }
}
template <class T> int launch_keys(const MirasLinearChain& p, cudaStream_t stream) {
  if (p.V % kWarpValues || int64_t(p.N) * p.H == 0) return p.V % kWarpValues ? cudaErrorInvalidValue : cudaSuccess;
  switch (p.K) {
    case 64: return launch_chunks<T, 64>(p, stream);
    case 128: return launch_chunks<T, 128>(p, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace miras::cuda
