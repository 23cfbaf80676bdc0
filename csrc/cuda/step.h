// Decoding steps: T tokens, usually one, read into a decoder's buffers. What both memories share.
//
// A step is defined by python/miras_kernels/backends/reference/step.py. A token takes the time of reading phi(A_0), once, for k and q
// together, and the factors of the open chunk's tokens. The token that ends its chunk writes the matrices; whether it does is read on the
// device, since every sequence is at its own place in its chunk.
//
// A token takes two or three launches, whose blocks may run in any order: what one launch writes the next one reads. The first launch
// advances `position`, which no other block reads in it; to the later launches the token's row is the one before.
//
// This interface does not depend on torch: python/miras_kernels/backends/cuda.py fills the struct and passes it by ctypes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "interpret.h"
#include "launch.h"

extern "C" {

enum MirasTokenType { MIRAS_F32 = 0, MIRAS_BF16 = 1, MIRAS_F16 = 2 };

// q, k, v or the result, [N, T, H, D] with strides in elements; that of the channels is 1
struct MirasTokens {
  void* data;
  int64_t batch, token, head;
};

// The buffers are those of params.h, width 1, or V if `decay_per_channel`, and R = C. Gates are float32, contiguous: [N, T, H], or
// [N, T, H, V] if `*_per_channel`. The workspace is written by one launch and read by the next; see the kernels.
struct MirasStep {
  MirasTokens q, k, v, out;
  const float *lr, *log_decay, *delta, *momentum;  // all but lr may be null
#define MIRAS_BUFFER_FIELD(type, name) type* name;
  MIRAS_STEP_BUFFERS(MIRAS_BUFFER_FIELD)
  const float *ln_weight, *ln_bias;                     // [H, D] of an MLP
  float *products, *hidden, *partial, *scores, *after;  // workspace: the first of a linear memory, the others of an MLP
  const int32_t *bias_program, *retention_program;      // of interpret.h, if custom
  float ln_eps;
  float bias_params[miras::kBiasParams], retention_params[miras::kRetentionParams];
  int32_t bias, retention, token_type;
  int32_t N, T, H, K, V, C;
  int32_t lr_per_channel, decay_per_channel, delta_per_channel;
};

// 0, or a cudaError_t. They do not synchronise.
int miras_linear_step(const MirasStep* step, cudaStream_t stream);
int miras_mlp_step(const MirasStep* step, cudaStream_t stream);
}

namespace miras::cuda {

// The largest sizes; CudaBackend compares them with python/miras_kernels/tables/memories.py.
constexpr int kMaxHead = 256, kMaxMlpHead = 128, kMaxHidden = 1024;

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kRows = 64;  // of a chunk's factors that a block reads at once

__device__ inline int thread() { return int(threadIdx.x); }

// A step with the traits of its bias and retention gate, looked up once on the host.
struct Step : MirasStep {
  bool predicts, couples_row;  // the bias: reads the memory; needs |e|^2
  Coupling coupling;           // of the gate

  explicit Step(const MirasStep& step) : MirasStep(step) {
    const BiasTraits traits = bias_traits(BiasTag(bias));
    predicts = traits.predicts, couples_row = traits.couples_row || bias_program;  // whether its program does is not known here
    coupling = retention_traits(RetentionTag(retention)).coupling;
  }
  __device__ int64_t head_of(int n, int h) const { return int64_t(n) * H + h; }
  __device__ const float* predicting() const { return primal ? primal : start; }
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
template <int kVec> __device__ inline bool any(const Pack<kVec>& a) {  // is not 0
  bool found = false;
#pragma unroll
  for (int i = 0; i < kVec; ++i) found |= a[i] != 0.0f;
  return found;
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

// op over lanes whose numbers differ in the bits from `low` to below `high`; all of them get the result
template <class Op> __device__ inline float over_lanes(float x, int low, int high, Op op) {
  for (int bit = low; bit < high; bit *= 2) x = op(x, __shfl_xor_sync(kWholeWarp, x, bit));
  return x;
}
__device__ inline float warp_sum(float x) { return over_lanes(x, 1, 32, Add{}); }

// f(row, row . x over `length`) for rows before `count`, called by one lane; a warp takes several rows, which it loads together
template <class Function>
__device__ inline void row_dots(const float* rows, int stride, int count, const float* x, int length, Function&& f) {
  constexpr int kTogether = 4;
  for (int first = thread() / 32 * kTogether; first < count; first += kWarps * kTogether) {
    float dot[kTogether] = {};
    for (int c = thread() % 32; c < length; c += 32)
#pragma unroll
      for (int i = 0; i < kTogether; ++i) dot[i] += rows[int64_t(min(first + i, count - 1)) * stride + c] * x[c];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const float sum = warp_sum(dot[i]);
      if (thread() % 32 == 0 && first + i < count) f(first + i, sum);
    }
  }
}

// use(i, load(i)) for i before `count`, with many loads in flight
template <class Load, class Use> __device__ inline void loaded_together(int count, Load&& load, Use&& use) {
  constexpr int kTogether = 16;
  for (int first = 0; first < count; first += kTogether) {
    decltype(load(0)) x[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) x[i] = load(min(first + i, count - 1));
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
      if (first + i < count) use(first + i, x[i]);
  }
}

// the sum over the block; every thread gets it
__device__ inline float block_sum(float x) {
  __shared__ float warps[kWarps];
  x = warp_sum(x);
  __syncthreads();  // the previous sum has been read
  if (thread() % 32 == 0) warps[thread() / 32] = x;
  __syncthreads();
  x = 0.0f;
  for (int i = 0; i < kWarps; ++i) x += warps[i];
  return x;
}

// ---------------------------------------------------------------------------------------------------------- biases and gates

// A program's registers, [kRegisters, kThreads] of dynamic shared memory
inline int register_bytes(const Step& p) { return p.bias_program || p.retention_program ? kRegisters * kThreads * int(sizeof(float)) : 0; }
__device__ inline float run(const int32_t* program, float first, float second = 0.0f, float third = 0.0f) {
  extern __shared__ float registers[];
  return interpret<kThreads>(program, registers + thread(), first, second, third);
}

MIRAS_FN float built_in_psi(const Step& p, float e, float square, float delta) {
  return with_bias(BiasTag(p.bias), p.bias_params, [&](auto bias) { return bias.value(e, bias.row(square, delta)); });
}
// psi of one channel; `square` is |e|^2 of the row
__device__ inline float psi(const Step& p, float e, float square, float delta) {
  return p.bias_program ? run(p.bias_program, e, square, delta) : built_in_psi(p, e, square, delta);
}

// a term of the sum of Coupling::matrix
__device__ inline float matrix_term(const Step& p, float a) { return LqRetention(p.retention_params).power(a); }
// rho from the sum
__device__ inline float matrix_scale(const Step& p, float total) {
  const LqRetention gate(p.retention_params);
  return float(gate.rho(double(total) + gate.offset()));
}
// a term of the sum of Coupling::row, and the factor from the sum
__device__ inline float row_term(const Step& p, float a, float max) { return KLRetention(p.retention_params).weight(a, max); }
__device__ inline float row_factor(const Step& p, float total) { return KLRetention(p.retention_params).factor(total); }

MIRAS_FN float built_in_phi(const Step& p, float a, float max, float factor) {
  return with_retention(RetentionTag(p.retention), p.retention_params, [&](auto gate) {
    using Gate = decltype(gate);
    if constexpr (Gate::kCoupling == Coupling::row) return factor * gate.weight(a, max);
    else if constexpr (Gate::kCoupling == Coupling::matrix) return factor * a;
    else return gate.phi(a);
  });
}
// phi(a); for a gate that couples, from the row's largest element and the factor of its row or matrix
__device__ inline float phi(const Step& p, float a, float max, float factor) {
  return p.retention_program ? run(p.retention_program, a) : built_in_phi(p, a, max, factor);
}

// ------------------------------------------------------------------------------------------------- places in a chunk

// advances a sequence by one token of its chunk
__device__ inline void move_on(const Step& p, int n) { p.position[n] = (p.position[n] + 1) % p.C; }
// the token's place in its chunk, after move_on
__device__ inline int row_of(const Step& p, int n) { return int((p.position[n] + p.C - 1) % p.C); }

// ---------------------------------------------------------------------------------------------------------- a chunk's end

// One matrix of one head: row i of `left` and of `right` are the factors of what token i wrote.
struct Matrix {
  float *start, *primal, *written, *momenta;
  const float *left, *right;

  // matrix i of the `count` of a head
  __device__ Matrix(const Step& p, int64_t head, int i, int count) {
    const int64_t at = (head * count + i) * p.K * p.V, factors = (head * count + i) * p.C;
    start = p.start + at, left = p.left + factors * p.K, right = p.right + factors * p.V;
    primal = p.primal ? p.primal + at : nullptr;
    written = p.written ? p.written + at : nullptr;
    momenta = p.momenta ? p.momenta + at : nullptr;
  }
};

// The weights of a head's terms after the last token of its chunk.
struct Weights {
  const float *weights, *momentum_weights, *open_log_decay;  // momentum_weights is null without momentum
};

// some columns of a row of `weights` or of `open_log_decay`
template <int kVec> __device__ inline Pack<kVec> load_channels(const Step& p, const float* of, int column) {
  Pack<kVec> x;
#pragma unroll
  for (int c = 0; c < kVec; ++c) x[c] = of[p.decay_per_channel ? column + c : 0];
  return x;
}

// Writes rows [first, last) of A and S at the end of a chunk, the start of the next: a thread takes kDown rows of kVec columns at a time.
template <int kVec> __device__ void end_chunk(const Step& p, const Matrix& x, const Weights& w, int first, int last) {
  constexpr int kDown = 4;
  const int across = p.V / kVec, width = p.decay_per_channel ? p.V : 1;
  for (int item = thread(); item < across * ((last - first + kDown - 1) / kDown); item += kThreads) {
    const int column = item % across * kVec, row = first + item / across * kDown, rows = min(kDown, last - row);
    const auto channels = [&](const float* of) { return load_channels<kVec>(p, of, column); };
    const Pack<kVec> open = channels(w.open_log_decay), of_written = channels(w.weights), of_momenta = channels(w.weights + width);
    Pack<kVec> a[kDown], s[kDown];
#pragma unroll
    for (int j = 0; j < kDown; ++j) {
      a[j] = s[j] = zero<kVec>();
      if (j >= rows) continue;
      const int64_t at = int64_t(row + j) * p.V + column;
      a[j] = load<kVec>(x.start + at);
      for (int c = 0; c < kVec; ++c) a[j][c] *= expf(open[c]);
      if (x.written && any(of_written)) {
        const Pack<kVec> d = load<kVec>(x.written + at);
        for (int c = 0; c < kVec; ++c) a[j][c] += of_written[c] * d[c];
      }
      if (x.momenta) {
        s[j] = load<kVec>(x.momenta + at);
        for (int c = 0; c < kVec; ++c) a[j][c] += of_momenta[c] * s[j][c], s[j][c] *= w.momentum_weights[1];
      }
    }
#pragma unroll 2
    for (int i = 0; i < p.C; ++i) {
      const Pack<kVec> right = load<kVec>(x.right + int64_t(i) * p.V + column), weight = channels(w.weights + int64_t(2 + i) * width);
      const float moves = x.momenta ? w.momentum_weights[2 + i] : 0.0f;
#pragma unroll
      for (int j = 0; j < kDown; ++j) {
        const float left = x.left[int64_t(i) * p.K + min(row + j, last - 1)];
        for (int c = 0; c < kVec; ++c) a[j][c] += left * (weight[c] * right[c]), s[j][c] += left * (moves * right[c]);
      }
    }
#pragma unroll
    for (int j = 0; j < kDown; ++j) {
      if (j >= rows) continue;
      const int64_t at = int64_t(row + j) * p.V + column;
      store<kVec>(x.start + at, a[j]);
      if (x.momenta) store<kVec>(x.momenta + at, s[j]);
    }
  }
  __syncthreads();
}

// f(index) for every element of rows [first, last)
template <class Function> __device__ inline void each_element(const Step& p, int first, int last, Function&& f) {
  for (int64_t i = int64_t(first) * p.V + thread(); i < int64_t(last) * p.V; i += kThreads) f(i);
}

// Reduces f(element) over the rows of every column by `op` into columns[V], which every thread may read afterwards.
template <class Op, class Function>
__device__ inline void over_columns(const Step& p, const float* matrix, float* columns, float from, Op op, Function&& f) {
  __shared__ float partial[kThreads];
  const int groups = kThreads / p.V, column = thread() % p.V, group = thread() / p.V;
  float found = from;
  if (group < groups)
    for (int r = group; r < p.K; r += groups) found = op(found, f(matrix[int64_t(r) * p.V + column], column));
  partial[thread()] = found;
  __syncthreads();
  if (group == 0) {
    for (int g = 1; g < groups; ++g) found = op(found, partial[g * p.V + column]);
    columns[column] = found;
  }
  __syncthreads();
}

// The primal of rows [first, last) of a start; all rows if the gate couples more than a row of the buffer. `columns`: a row of the
// memory's matrix is a column of the buffer. Returns rho.
__device__ inline float map(const Step& p, const Matrix& x, bool columns, int first, int last) {
  if (p.coupling == Coupling::row && columns) {
    __shared__ float max[kThreads], factor[kThreads];
    over_columns(p, x.start, max, -INFINITY, Max{}, [](float a, int) { return a; });
    over_columns(p, x.start, factor, 0.0f, Add{}, [&](float a, int column) { return row_term(p, a, max[column]); });
    each_element(p, first, last, [&](int64_t i) {
      const int column = int(i % p.V);
      x.primal[i] = phi(p, x.start[i], max[column], row_factor(p, factor[column]));
    });
  } else if (p.coupling == Coupling::row) {  // one warp a row
    for (int r = first + thread() / 32; r < last; r += kWarps) {
      const float* a = x.start + int64_t(r) * p.V;
      float max = -INFINITY, sum = 0.0f;
      for (int c = thread() % 32; c < p.V; c += 32) max = fmaxf(max, a[c]);
      max = over_lanes(max, 1, 32, Max{});
      for (int c = thread() % 32; c < p.V; c += 32) sum += row_term(p, a[c], max);
      const float factor = row_factor(p, warp_sum(sum));
      for (int c = thread() % 32; c < p.V; c += 32) x.primal[int64_t(r) * p.V + c] = phi(p, a[c], max, factor);
    }
  } else {
    float rho = 1.0f;
    if (p.coupling == Coupling::matrix) {
      float total = 0.0f;
      each_element(p, first, last, [&](int64_t i) { total += matrix_term(p, x.start[i]); });
      rho = matrix_scale(p, block_sum(total));
    }
    each_element(p, first, last, [&](int64_t i) { x.primal[i] = phi(p, x.start[i], 0.0f, rho); });
    return rho;
  }
  return 1.0f;
}

// ------------------------------------------------------------------------------------------------------------------ launches

template <class... Arguments>
int launch(void (*kernel)(Step, Arguments...), int64_t blocks, cudaStream_t stream, const Step& p, const Arguments&... arguments) {
  return launch_blocks(kernel, blocks, kThreads, register_bytes(p), stream, p, arguments...);
}

}  // namespace miras::cuda
