// The backward of the MLP memory in chunks: segments again, with the read-out's backward, for each size; and what the library says of both
// kernels.
#include "mlp_replay.h"

#include <stddef.h>

namespace miras::cuda {
namespace {

template <int C, int Hd, class T>
__global__ void __launch_bounds__(Shape<C, Hd>::kThreads, 1) mlp_replay(const __grid_constant__ MirasMlpBackward b) {
  constexpr int kBlocks = kBlocksOf<C, Hd>, kUnits = Hd / kBlocks;
  static_assert(Shape<C, kUnits>::kThreads == Shape<C, Hd>::kThreads);
  if constexpr (ReplayShared<C, kUnits>::kBytes <= kMaxShared) {
    const unsigned head = blockIdx.x / kBlocks;
    const int place = head / b.chain.H;
    const longlong2 segment = reinterpret_cast<const longlong2*>(b.segments)[place];
    const int64_t slot = b.slots[place];
    Replay<C, kUnits, T, kBlocks>(b, int(segment.x), head % b.chain.H).run(place, segment.y, slot);
  }
}

}  // namespace
}  // namespace miras::cuda

extern "C" int miras_mlp_replay(const MirasMlpBackward* b, cudaStream_t stream) {
  using namespace miras::cuda;
  return with_backward_sizes(*b, [&](auto c, auto hd, auto token) {
    constexpr int C = c.value, Hd = hd.value, kBlocks = kBlocksOf<C, Hd>;
    using Layout = ReplayShared<C, Hd / kBlocks>;
    const auto kernel = mlp_replay<C, Hd, typename decltype(token)::type>;
    const int64_t heads = int64_t(b->places) * b->chain.H;
    return launch_chain<kBlocks>(kernel, heads * kBlocks, Shape<C, Hd>::kThreads, Layout::kBytes, stream, *b);
  });
}

// as miras_mlp_chain_layout
extern "C" int miras_mlp_backward_layout(int64_t* layout, int room) {
  const int64_t found[] = {
      sizeof(MirasMlpBackward),
      offsetof(MirasMlpBackward, grad_out),
      offsetof(MirasMlpBackward, grad_lr),
      offsetof(MirasMlpBackward, segments),
      offsetof(MirasMlpBackward, grad_norm),
      offsetof(MirasMlpBackward, places),
  };
  return miras::cuda::put_layout(found, layout, room);
}

extern "C" int miras_mlp_handed(int Hd, int C) {
  return miras::cuda::with_backward_sizes(C, Hd, [](auto c, auto hd) { return int(miras::cuda::Handed<c.value, hd.value>::kBytes); });
}

extern "C" int miras_mlp_backward_shared(int Hd, int C) {
  return miras::cuda::with_backward_sizes(C, Hd, [](auto c, auto hd) { return int(miras::cuda::backward_shared<c.value, hd.value>()); });
}
