// What the caller asks this library, to know that both were made from the same sources.
#include "step.h"

#include <stddef.h>

extern "C" {

const char* miras_cuda_error(int error) { return cudaGetErrorString(cudaError_t(error)); }

// The bytes of shared memory that a block may have on a device, 0 if that is unknown.
int miras_shared_limit(int device) {
  int bytes = 0;
  return cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) ? 0 : bytes;
}

// The names of MirasStep's buffers in their order, separated by spaces.
const char* miras_step_buffers() {
#define MIRAS_NAME_AND_SPACE(type, name) #name " "
  return MIRAS_STEP_BUFFERS(MIRAS_NAME_AND_SPACE);
}

// The size of MirasStep, the offsets of some fields and the limits of the kernels, up to `room` of them; returns how many there are.
int miras_step_layout(int64_t* layout, int room) {
  const int64_t found[] = {
      sizeof(MirasStep),
      offsetof(MirasStep, q),
      offsetof(MirasStep, out),
      offsetof(MirasStep, lr),
      offsetof(MirasStep, start),
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
      miras::cuda::kMaxHead,
      miras::cuda::kMaxMlpHead,
      miras::cuda::kMaxHidden,
  };
  constexpr int count = sizeof(found) / sizeof(found[0]);
  for (int i = 0; i < count && i < room; ++i) layout[i] = found[i];
  return count;
}
}
