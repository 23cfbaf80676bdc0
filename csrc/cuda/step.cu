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

// The names of the operations of programs in their order, likewise.
const char* miras_operations() {
#define MIRAS_OPERATION_AND_SPACE(name, operands) #name " "
  return MIRAS_OPERATIONS(MIRAS_OPERATION_AND_SPACE);
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
      offsetof(MirasStep, bias_program),
      offsetof(MirasStep, retention_program),
      offsetof(MirasStep, ln_eps),
      offsetof(MirasStep, bias_params),
      offsetof(MirasStep, bias),
      offsetof(MirasStep, N),
      offsetof(MirasStep, lr_per_channel),
      offsetof(MirasStep, delta_per_channel),
      miras::cuda::kMaxHead,
      miras::cuda::kMaxMlpHead,
      miras::cuda::kMaxHidden,
      miras::cuda::kRegisters,
  };
  return miras::cuda::put_layout(found, layout, room);
}
}
