// The chain of the linear memory with the output in it (docs/mathematics.md, section 2), for 16-bit tokens: one launch, nothing but the
// output, the final state and the backward's checkpoints is written.
//
//     E' = W K' - V'      U' = -eta psi(E')      O' = gamma (W Q') + U' (L o K Q')      W <- gamma_C W + (U' dec) K
//
// This interface does not depend on torch: python/miras_kernels/backends/cuda_linear.py fills the struct and passes it by ctypes.
#pragma once

#include "step.h"

extern "C" {

// Tokens are bfloat16 or float16; rows of q, k and v begin at multiples of 16 bytes, those of `out` of 4. Gates are float32, contiguous.
struct MirasLinearChain {
  MirasTokens q, k, v, out;             // [B, T, H, K] and [B, T, H, V]
  const float *lr, *log_decay, *delta;  // [B, T, H]; the last two may be null; delta may be [B, T, H, V]
  const float* initial;                 // [N, H, V, K] with strides in elements
  int64_t initial_sequence, initial_head, initial_value, initial_key;
  float *final, *start;                    // [N, H, V, K], may be null: after the last token; after the last whole chunk
  float* checkpoints;                      // [slots, H, K, V], may be null: the state before every `every`-th chunk
  const int64_t *cu_seqlens, *first_slot;  // [N + 1]; [N], a sequence's first slot. Null for a batch: N = B, `slots` a sequence
  int64_t T;
  float bias_params[miras::kBiasParams];
  int32_t bias, token_type, N, H, K, V, C, slots, every, delta_per_channel;
  int32_t values;  // of a block: 64, or for bfloat16 32
};

// 0, or a cudaError_t. It does not synchronise.
int miras_linear_chain(const MirasLinearChain* chain, cudaStream_t stream);
}

namespace miras::cuda {

constexpr int kWarpValues = 16, kChainWarps = 4;
// CudaBackend compares them with python/miras_kernels/tables/memories.py and backends/cuda_linear.py.
constexpr int kMaxChainHead = 128, kMaxChainChunk = 64;

// One for each type of token, in a file of its own: they compile side by side.
int launch_linear_chain_bf16(const MirasLinearChain& p, cudaStream_t stream);
int launch_linear_chain_f16(const MirasLinearChain& p, cudaStream_t stream);

}  // namespace miras::cuda
