// Decoding steps: T tokens, usually one, read into a state that is written in place. What both memories share.
//
// A step is defined by python/miras_kernels/reference/step.py. It takes the time of reading and writing the state once: products of
// a matrix and a vector, in float32, by threads that each own the same elements of every matrix from the first load to the last
// store, so that nothing but sums passes between them.
//
// Each sequence stands somewhere else in its chunk. Blocks read that from `position` and do not write it: the blocks of a sequence
// would race. `advance`, launched behind the step, moves the positions on, and the sums of log-decays that heads share.
//
// This interface knows no torch: miras_kernels/cuda_backend.py fills the struct and passes it by ctypes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "math.h"

extern "C" {

enum MirasTokenType { MIRAS_F32 = 0, MIRAS_BF16 = 1, MIRAS_F16 = 2 };

// q, k, v or the result, [N, T, H, D] with strides in elements; that of the channels is 1
struct MirasTokens {
  void* data;
  int64_t batch, token, head;
};

// Matrices are [N, H, m, K, V] float32, contiguous: m = 1 and K x V = Dk x Dv of a linear memory; m = 2, K x V = Hd x D of an MLP,
// W1 transposed and W2. See decode.Buffers. Gates are float32, contiguous: [N, T, H], or [N, T, H, V] where `*_per_channel`.
struct MirasStep {
  MirasTokens q, k, v, out;
  const float *lr, *log_decay, *delta, *momentum;  // all but lr may be null
  float *dual, *start, *primal, *rho, *carried;    // all but dual may be null
  float* sums;                                     // [N, H] or [N, H, V], the open chunk's log-decays
  int64_t* position;                               // [N]
  const float *ln_weight, *ln_bias;                // [H, D] of an MLP
  float ln_eps;
  float bias_params[miras::kBiasParams], retention_params[miras::kRetentionParams];
  int32_t bias, retention, token_type;
  int32_t N, T, H, K, V, C;
  int32_t lr_per_channel, decay_per_channel, delta_per_channel;
};

// 0, or a cudaError_t. Nothing is waited for.
int miras_linear_step(const MirasStep* step, cudaStream_t stream);
int miras_mlp_step(const MirasStep* step, cudaStream_t stream);
}

namespace miras::cuda {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

__device__ inline int thread() { return int(threadIdx.x); }

// What the functors of a step say of themselves, asked once on the host.
struct Step : MirasStep {
  bool predicts, couples_row;  // the bias: reads the memory; needs |e|^2
  Coupling coupling;           // of the gate

  explicit Step(const MirasStep& step) : MirasStep(step) {
    const BiasTraits traits = bias_traits(BiasTag(bias));
    predicts = traits.predicts, couples_row = traits.couples_row;
    coupling = retention_traits(RetentionTag(retention)).coupling;
  }
  __device__ int64_t head_of(int n, int h) const { return int64_t(n) * H + h; }
  // the place of a token's gate in [N, T, H]
  __device__ int64_t gate_of(int n, int t, int h) const { return (int64_t(n) * T + t) * H + h; }
};

// ------------------------------------------------------------------------------------------------------------------- tokens

__device__ inline float load_token(const MirasTokens& x, int type, int n, int t, int h, int channel) {
  const int64_t at = n * x.batch + t * x.token + h * x.head + channel;
  if (type == MIRAS_BF16) return __bfloat162float(static_cast<const __nv_bfloat16*>(x.data)[at]);
  if (type == MIRAS_F16) return __half2float(static_cast<const __half*>(x.data)[at]);
  return static_cast<const float*>(x.data)[at];
}

__device__ inline void store_token(const MirasTokens& x, int type, int n, int t, int h, int channel, float value) {
  const int64_t at = n * x.batch + t * x.token + h * x.head + channel;
  if (type == MIRAS_BF16) static_cast<__nv_bfloat16*>(x.data)[at] = __float2bfloat16_rn(value);
  else if (type == MIRAS_F16) static_cast<__half*>(x.data)[at] = __float2half_rn(value);
  else static_cast<float*>(x.data)[at] = value;
}

// a gate of one token and channel; `at` is its place in [N, T, H]
__device__ inline float load_gate(const float* gate, bool per_channel, int64_t at, int channels, int channel) {
  return gate[per_channel ? at * channels + channel : at];
}

// ------------------------------------------------------------------------------------------------------------- small vectors

// kVec neighbouring numbers of a row
template <int kVec> struct Pack {
  float x[kVec];
  __device__ float& operator[](int i) { return x[i]; }
  __device__ float operator[](int i) const { return x[i]; }
};
template <int kVec> __device__ inline Pack<kVec> zero() {
  Pack<kVec> a;
#pragma unroll
  for (int i = 0; i < kVec; ++i) a[i] = 0.0f;
  return a;
}
template <int kVec> __device__ inline Pack<kVec> load(const float* p) {
  if constexpr (kVec == 4) {
    const float4 v = *reinterpret_cast<const float4*>(p);
    return {{v.x, v.y, v.z, v.w}};
  } else {
    return {{*p}};
  }
}
template <int kVec> __device__ inline void store(float* p, const Pack<kVec>& a) {
  if constexpr (kVec == 4) *reinterpret_cast<float4*>(p) = make_float4(a[0], a[1], a[2], a[3]);
  else *p = a[0];
}

// ---------------------------------------------------------------------------------------------------------------------- sums

struct Add {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// over lanes whose numbers differ in the bits from `low` to below `high`; every one of them gets it
template <class Op> __device__ inline float over_lanes(float x, int low, int high, Op op) {
  for (int bit = low; bit < high; bit *= 2) x = op(x, __shfl_xor_sync(kWholeWarp, x, bit));
  return x;
}
__device__ inline float warp_sum(float x) { return over_lanes(x, 1, 32, Add{}); }

// over the block; every thread gets it
__device__ inline float block_sum(float x) {
  __shared__ float warps[kWarps];
  x = warp_sum(x);
  __syncthreads();  // the last sum has been read
  if (thread() % 32 == 0) warps[thread() / 32] = x;
  __syncthreads();
  x = 0.0f;
  for (int i = 0; i < kWarps; ++i) x += warps[i];
  return x;
}

// ---------------------------------------------------------------------------------------------------------- biases and gates

// psi of one channel; `square` is |e|^2 of the row
MIRAS_FN float psi(const Step& p, float e, float square, float delta) {
  return with_bias(BiasTag(p.bias), p.bias_params, [&](auto bias) { return bias.value(e, bias.row(square, delta)); });
}

// a summand of what Coupling::matrix couples by
__device__ inline float matrix_term(const Step& p, float a) { return LqRetention(p.retention_params).power(a); }
// rho of the sum of them
__device__ inline float matrix_scale(const Step& p, float total) {
  const LqRetention gate(p.retention_params);
  return float(gate.rho(double(total) + gate.offset()));
}
// a summand of what Coupling::row couples by, and the factor of the sum of them
__device__ inline float row_term(const Step& p, float a, float max) { return KLRetention(p.retention_params).weight(a, max); }
__device__ inline float row_factor(const Step& p, float total) { return KLRetention(p.retention_params).factor(total); }

// phi(a), from the row's largest element and the factor of its row or matrix, where the gate couples
MIRAS_FN float phi(const Step& p, float a, float max, float factor) {
  return with_retention(RetentionTag(p.retention), p.retention_params, [&](auto gate) {
    using Gate = decltype(gate);
    if constexpr (Gate::kCoupling == Coupling::row) return factor * gate.weight(a, max);
    else if constexpr (Gate::kCoupling == Coupling::matrix) return factor * a;
    else return gate.phi(a);
  });
}

// ------------------------------------------------------------------------------------------------------- where a token stands

// One sequence's place in its chunk, and the log-decay its open chunk has summed up, where channels share it.
struct Place {
  int64_t before;  // tokens of the open chunk before this call's
  float open;
  bool fresh, ends;

  __device__ Place(const Step& p, int n, int h)
      : before(p.position[n]), open(p.decay_per_channel ? 0.0f : p.sums[p.head_of(n, h)]), fresh(false), ends(false) {}

  // go to token t, whose log-decay is `log_alpha`
  __device__ void go(const Step& p, int t, float log_alpha) {
    fresh = (before + t) % p.C == 0;
    ends = (before + t + 1) % p.C == 0;
    open = (fresh ? 0.0f : open) + log_alpha;
  }
};

// One block a sequence: positions after T tokens and, unless channels have their own, the sums of log-decays.
__global__ void __launch_bounds__(kThreads, 1) advance(const Step p);

// Behind a step. Where every token is a chunk, every sequence stands at a boundary before and after.
int launch_advance(const Step& p, cudaStream_t stream);

template <class... Arguments>
int launch(void (*kernel)(Arguments...), int64_t blocks, cudaStream_t stream, const Arguments&... arguments) {
  if (blocks == 0) return cudaSuccess;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace miras::cuda
