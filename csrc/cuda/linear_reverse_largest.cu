#include "linear_reverse_kernel.h"

int miras::cuda::launch_linear_reverse_largest(const MirasLinearReverse& p, cudaStream_t stream) {
  return launch_reverse<ReverseShape<128, 64>>(p, stream);
}
