#include "linear_chain_kernel.h"

int miras::cuda::launch_linear_chain_bf16(const MirasLinearChain& p, cudaStream_t stream) { return launch_keys<Bf16>(p, stream); }
