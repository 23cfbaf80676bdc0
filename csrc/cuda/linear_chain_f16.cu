#include "linear_chain_kernel.h"

int miras::cuda::launch_linear_chain_f16(const MirasLinearChain& p, cudaStream_t stream) { return launch_keys<Fp16>(p, stream); }
