// What the caller asks about this library.
#include <stddef.h>

#include "step.h"

extern "C" {

const char* miras_cuda_error(int error) { return cudaGetErrorString(cudaError_t(error)); }

// Sizes and offsets of MirasStep, by which the caller knows that its struct is this one; returns how many there are.
int miras_step_layout(int64_t* layout, int room) {
  const int64_t found[] = {
      sizeof(MirasStep),
      offsetof(MirasStep, q),
      offsetof(MirasStep, out),
      offsetof(MirasStep, lr),
      offsetof(MirasStep, start),
      offsetof(MirasStep, left),
      offsetof(MirasStep, sums),
      offsetof(MirasStep, position),
      offsetof(MirasStep, ln_weight),
      offsetof(MirasStep, products),
      offsetof(MirasStep, after),
      offsetof(MirasStep, ln_eps),
      offsetof(MirasStep, bias_params),
      offsetof(MirasStep, bias),
      offsetof(MirasStep, N),
      offsetof(MirasStep, lr_per_channel),
      offsetof(MirasStep, delta_per_channel),
  };
  constexpr int count = sizeof(found) / sizeof(found[0]);
  for (int i = 0; i < count && i < room; ++i) layout[i] = found[i];
  return count;
}
}
