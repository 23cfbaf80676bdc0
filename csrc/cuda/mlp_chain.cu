// The forward of the MLP memory in chunks: the kernel for each size, and what the library offers. mlp_stages.h has the computation.
#include "mlp_stages.h"

#include <stddef.h>

namespace miras::cuda {
namespace {

template <int C, int Hd, class T>
__global__ void __launch_bounds__(Shape<C, Hd>::kThreads, 1) mlp_chain(const __grid_constant__ MirasMlpChain p) {
  if constexpr (ChainShared<C, Hd>::kBytes <= kMaxShared) {
    Chain<C, Hd, T> chain(p, blockIdx.x / p.H, blockIdx.x % p.H);
    chain.run();
  }
}

// the same by clusters of two blocks
template <int C, int Hd, class T>
__global__ void __launch_bounds__(Shape<C, Hd>::kThreads, 1) mlp_chain_cluster(const __grid_constant__ MirasMlpChain p) {
  constexpr int kUnits = Hd / 2;
  static_assert(kBlocksOf<C, Hd> == 2 && Shape<C, kUnits>::kThreads == Shape<C, Hd>::kThreads);
  if constexpr (ClusterShared<C, kUnits>::kBytes <= kMaxShared) {
    const unsigned head = blockIdx.x / 2;
    Chain<C, kUnits, T, ClusterShared<C, kUnits>, 2>(p, head / p.H, head % p.H).run();
  }
}

// and with momentum, which doubles the state
template <int C, int Hd, class T>
__global__ void __launch_bounds__(Shape<C, Hd>::kThreads, 1) mlp_chain_momentum(const __grid_constant__ MirasMlpChain p) {
  constexpr int kUnits = Hd / 2;
  if constexpr (MomentumShared<C, kUnits>::kBytes <= kMaxShared) {
    const unsigned head = blockIdx.x / 2;
    Chain<C, kUnits, T, MomentumShared<C, kUnits>, 2>(p, head / p.H, head % p.H).run();
  }
}

// f(std::integral_constant<int, C>, std::integral_constant<int, Hd>) if these sizes are served
template <class Function> int with_sizes(int C, int Hd, Function&& f) {
  if (C == 16) return with_hidden<16>(Hd, f);
  if (C == 32) return with_hidden<32>(Hd, f);
  if (C == 64) return with_hidden<64>(Hd, f);
  return 0;
}

}  // namespace
}  // namespace miras::cuda

// The size of the struct and the offsets of some fields, up to `room` of them; returns how many there are.
extern "C" int miras_mlp_chain_layout(int64_t* layout, int room) {
  const int64_t found[] = {
      sizeof(MirasMlpChain),
      offsetof(MirasMlpChain, q),
      offsetof(MirasMlpChain, lr),
      offsetof(MirasMlpChain, checkpoints),
      offsetof(MirasMlpChain, ln_eps),
      offsetof(MirasMlpChain, bias),
      offsetof(MirasMlpChain, blocks),
  };
  return miras::cuda::put_layout(found, layout, room);
}

extern "C" int miras_mlp_chain_shared(int Hd, int C) {
  return miras::cuda::with_sizes(C, Hd, [](auto c, auto hd) { return int(miras::cuda::ChainShared<c.value, hd.value>::kBytes); });
}

extern "C" int miras_mlp_momentum_shared(int Hd, int C) {
  return miras::cuda::with_sizes(C, Hd, [](auto c, auto hd) {
    if constexpr (miras::cuda::kBlocksOf<c.value, hd.value> == 2) return int(miras::cuda::MomentumShared<c.value, hd.value / 2>::kBytes);
    else return 0;
  });
}

extern "C" int miras_mlp_chain(const MirasMlpChain* chain, cudaStream_t stream) {
  using namespace miras::cuda;
  if (!miras_mlp_chain_shared(chain->Hd, chain->C)) return cudaErrorInvalidValue;
  return with_sizes(chain->C, chain->Hd, [&](auto c, auto hd) {
    constexpr int C = c.value, Hd = hd.value;
    return with_token_type(chain->token_type, [&](auto token) {
      using T = typename decltype(token)::type;
      constexpr int kThreads = Shape<C, Hd>::kThreads;
      const int64_t heads = int64_t(chain->N) * chain->H;
      if constexpr (kBlocksOf<C, Hd> == 2) {
        if (chain->momentum)
          return launch_chain<2>(mlp_chain_momentum<C, Hd, T>, 2 * heads, kThreads, MomentumShared<C, Hd / 2>::kBytes, stream, *chain);
        if (chain->blocks == 2)
          return launch_chain<2>(mlp_chain_cluster<C, Hd, T>, 2 * heads, kThreads, ClusterShared<C, Hd / 2>::kBytes, stream, *chain);
      }
      if (chain->momentum) return int(cudaErrorInvalidValue);
      return launch_chain(mlp_chain<C, Hd, T>, heads, kThreads, ChainShared<C, Hd>::kBytes, stream, *chain);
    });
  });
}
