// What is launched behind a step, and what the caller asks about this library.
#include <stddef.h>

#include "step.h"

namespace miras::cuda {

__global__ void __launch_bounds__(kThreads, 1) advance(const Step p) {
  const int n = blockIdx.x;
  const int64_t before = p.position[n];
  if (!p.decay_per_channel) {
    for (int h = thread(); h < p.H; h += kThreads) {
      Place place(p, n, h);
      for (int t = 0; t < p.T; ++t) place.go(p, t, p.log_decay ? p.log_decay[p.gate_of(n, t, h)] : 0.0f);
      if (p.T > 0) p.sums[p.head_of(n, h)] = place.ends ? 0.0f : place.open;
    }
  }
  __syncthreads();  // every thread has read the position
  if (thread() == 0) p.position[n] = (before + p.T) % p.C;
}

int launch_advance(const Step& p, cudaStream_t stream) { return p.C == 1 ? int(cudaSuccess) : launch(advance, p.N, stream, p); }

}  // namespace miras::cuda

extern "C" {

const char* miras_cuda_error(int error) { return cudaGetErrorString(cudaError_t(error)); }

// Sizes and offsets of MirasStep, by which the caller knows that its struct is this one; returns how many there are.
int miras_step_layout(int64_t* layout, int room) {
  const int64_t found[] = {
      sizeof(MirasStep),                      offsetof(MirasStep, q),         offsetof(MirasStep, out),
      offsetof(MirasStep, lr),                offsetof(MirasStep, dual),      offsetof(MirasStep, sums),
      offsetof(MirasStep, position),          offsetof(MirasStep, ln_weight), offsetof(MirasStep, ln_eps),
      offsetof(MirasStep, bias_params),       offsetof(MirasStep, bias),      offsetof(MirasStep, N),
      offsetof(MirasStep, lr_per_channel),    offsetof(MirasStep, delta_per_channel),
  };
  constexpr int count = sizeof(found) / sizeof(found[0]);
  for (int i = 0; i < count && i < room; ++i) layout[i] = found[i];
  return count;
}
}
