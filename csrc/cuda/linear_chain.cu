// The interface of the chain of the linear memory.
#include "linear_chain.h"

#include <stddef.h>

extern "C" {

int miras_linear_chain(const MirasLinearChain* chain, cudaStream_t stream) {
  switch (chain->token_type) {
    case MIRAS_BF16: return miras::cuda::launch_linear_chain_bf16(*chain, stream);
    case MIRAS_F16: return miras::cuda::launch_linear_chain_f16(*chain, stream);
    default: return cudaErrorInvalidValue;
  }
}

// As miras_step_layout, of MirasLinearChain.
int miras_linear_chain_layout(int64_t* layout, int room) {
  const int64_t found[] = {
      sizeof(MirasLinearChain),
      offsetof(MirasLinearChain, q),
      offsetof(MirasLinearChain, lr),
      offsetof(MirasLinearChain, initial_sequence),
      offsetof(MirasLinearChain, final),
      offsetof(MirasLinearChain, T),
      offsetof(MirasLinearChain, bias_params),
      offsetof(MirasLinearChain, bias),
      offsetof(MirasLinearChain, values),
      miras::cuda::kMaxChainHead,
      miras::cuda::kMaxChainChunk,
      miras::cuda::kWarpValues * miras::cuda::kChainWarps,
  };
  return miras::cuda::put_layout(found, layout, room);
}
}
