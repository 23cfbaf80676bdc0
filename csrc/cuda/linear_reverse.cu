// The backward of the linear memory: the kernel for each size, and what the library offers.
#include "linear_reverse_kernel.h"

#include <stddef.h>

namespace miras::cuda {
namespace {

// f(shape) if these sizes are served, else `none`
template <int kDim, class Function> int with_chunk(int C, int none, Function&& f) {
  switch (C) {
    case 16: return f(ReverseShape<kDim, 16>());
    case 32: return f(ReverseShape<kDim, 32>());
    case 64: return f(ReverseShape<kDim, 64>());
    default: return none;
  }
}
template <class Function> int with_shape(int D, int C, int none, Function&& f) {
  switch (D) {
    case 64: return with_chunk<64>(C, none, f);
    case 128: return with_chunk<128>(C, none, f);
    default: return none;
  }
}

}  // namespace
}  // namespace miras::cuda

extern "C" {

int miras_linear_reverse_shared(int D, int C) {
  return miras::cuda::with_shape(D, C, 0, [](auto shape) { return int(decltype(shape)::kBytes); });
}

int miras_linear_reverse(const MirasLinearReverse* chain, cudaStream_t stream) {
  using namespace miras::cuda;
  if (chain->token_type != MIRAS_BF16 || chain->K != chain->V) return cudaErrorInvalidValue;
  return with_shape(chain->K, chain->C, cudaErrorInvalidValue, [&](auto shape) {
    using S = decltype(shape);
    if constexpr (S::kDim == 128 && S::kChunk == 64) {
      return launch_linear_reverse_largest(*chain, stream);
    } else {
      static_assert(S::kBytes <= 163 * 1024, "what a block may have on sm_80");
      return launch_reverse<S>(*chain, stream);
    }
  });
}

// As miras_step_layout, of MirasLinearReverse.
int miras_linear_backward_layout(int64_t* layout, int room) {
  const int64_t found[] = {
      sizeof(MirasLinearReverse),
      offsetof(MirasLinearReverse, q),
      offsetof(MirasLinearReverse, grad_q),
      offsetof(MirasLinearReverse, lr),
      offsetof(MirasLinearReverse, checkpoints),
      offsetof(MirasLinearReverse, states),
      offsetof(MirasLinearReverse, T),
      offsetof(MirasLinearReverse, bias_params),
      offsetof(MirasLinearReverse, bias),
      offsetof(MirasLinearReverse, delta_per_channel),
  };
  return miras::cuda::put_layout(found, layout, room);
}
}
