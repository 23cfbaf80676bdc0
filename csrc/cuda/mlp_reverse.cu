// The backward of the MLP memory in chunks: the walk from last to first, for each size.
#include "mlp_reverse.h"

namespace miras::cuda {
namespace {

template <int C, int Hd, class T>
__global__ void __launch_bounds__(Shape<C, Hd>::kThreads, 1) mlp_reverse(const __grid_constant__ MirasMlpBackward b) {
  if constexpr (ReverseShared<C, Hd>::kBytes <= kMaxShared) Reverse<C, Hd, T>(b, blockIdx.x / b.chain.H, blockIdx.x % b.chain.H).run();
}

}  // namespace
}  // namespace miras::cuda

extern "C" int miras_mlp_reverse(const MirasMlpBackward* b, cudaStream_t stream) {
  using namespace miras::cuda;
  return with_backward_sizes(*b, [&](auto c, auto hd, auto token) {
    constexpr int C = c.value, Hd = hd.value;
    const auto kernel = mlp_reverse<C, Hd, typename decltype(token)::type>;
    return launch_chain(kernel, int64_t(b->chain.N) * b->chain.H, Shape<C, Hd>::kThreads, ReverseShared<C, Hd>::kBytes, stream, *b);
  });
}
