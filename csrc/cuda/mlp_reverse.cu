// The backward of the MLP memory in chunks: the walk from last to first, for each size.
#include "mlp_reverse.h"

namespace miras::cuda {
namespace {

template <int C, int Hd, class T>
__global__ void __launch_bounds__(Shape<C, Hd>::kThreads, 1) mlp_reverse(const __grid_constant__ MirasMlpBackward b) {
  constexpr int kBlocks = kBlocksOf<C, Hd>, kUnits = Hd / kBlocks;
  static_assert(Shape<C, kUnits>::kThreads == Shape<C, Hd>::kThreads);
  if constexpr (ReverseShared<C, kUnits>::kBytes <= kMaxShared) {
    const unsigned head = blockIdx.x / kBlocks;
    Reverse<C, kUnits, T, kBlocks>(b, head / b.chain.H, head % b.chain.H).run();
  }
}

}  // namespace
}  // namespace miras::cuda

extern "C" int miras_mlp_reverse(const MirasMlpBackward* b, cudaStream_t stream) {
  using namespace miras::cuda;
  return with_backward_sizes(*b, [&](auto c, auto hd, auto token) {
    constexpr int C = c.value, Hd = hd.value, kBlocks = kBlocksOf<C, Hd>;
    using Layout = ReverseShared<C, Hd / kBlocks>;
    const auto kernel = mlp_reverse<C, Hd, typename decltype(token)::type>;
    const int64_t heads = int64_t(b->chain.N) * b->chain.H;
    return launch_chain<kBlocks>(kernel, heads * kBlocks, Shape<C, Hd>::kThreads, Layout::kBytes, stream, *b);
  });
}
