// The backward of the linear memory's chain (docs/mathematics.md, sections 2 and 6), for bfloat16 tokens: one block for a sequence and head,
// which holds the gradient J of the state in registers and walks the chunks backwards. With dU' the gradient in U' = -eta psi(E):
//
//     dU' = P' dO + dec (K J')      dE = psi'(E) (-eta dU')      dV = -dE      G = L o (dO U')
//     dQ = gamma (dO S) + G K       dK = dE S + G' Q + dec (U' J)
//     J <- gamma_C J + (gamma dO)' Q + dE' K
//
// The states S at the starts of a segment's chunks come from the forward's checkpoint, by the forward's recurrence without the output. So
// nothing but the gradients is written, and every input is read from memory once. All values of a head are in one block: no sum goes over
// several blocks, and none over atomics.
//
// This interface does not depend on torch: python/miras_kernels/backends/cuda_linear.py fills the struct and passes it by ctypes.
#pragma once

#include "step.h"

extern "C" {

// Tokens are bfloat16; rows of q, k, v and grad_out begin at multiples of 16 bytes. All else is contiguous; gates are float32.
struct MirasLinearReverse {
  MirasTokens q, k, v, grad_out;        // [B, T, H, D]
  void *grad_q, *grad_k, *grad_v;       // [B, T, H, D]
  const float *lr, *log_decay, *delta;  // [B, T, H]; the last two may be null; delta may be [B, T, H, D]
  float *grad_lr, *grad_log_decay, *grad_delta;
  const float* checkpoints;                // [slots, H, K, V]: the state before every `every`-th chunk
  const float* grad_final;                 // [N, H, V, K], may be null
  float* grad_initial;                     // [N, H, V, K]
  void* states;                            // workspace [N, H, kept, V, K] of the tokens' type: the states of a segment's chunks
  const int64_t *cu_seqlens, *first_slot;  // as in MirasLinearChain
  int64_t T;
  float bias_params[miras::kBiasParams];
  int32_t bias, token_type, N, H, K, V, C, slots, every, kept, delta_per_channel;
};

// 0, or a cudaError_t. It does not synchronise.
int miras_linear_reverse(const MirasLinearReverse* chain, cudaStream_t stream);
// bytes of shared memory of a block, 0 for sizes that are not served
int miras_linear_reverse_shared(int D, int C);
}

namespace miras::cuda {

// D = 128, C = 64, in a file of its own: the others' PTX for sm_80, which has not enough shared memory for it, is that for later chips too.
int launch_linear_reverse_largest(const MirasLinearReverse& p, cudaStream_t stream);

}  // namespace miras::cuda
