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
      offsetof(MirasMlpChain, slots_per_sequence),
  };
  return miras::cuda::put_layout(found, layout, room);
}

extern "C" int miras_mlp_chain_shared(int Hd, int C) {
  return miras::cuda::with_sizes(C, Hd, [](auto c, auto hd) { return int(miras::cuda::ChainShared<c.value, hd.value>::kBytes); });
}

extern "C" int miras_mlp_chain(const MirasMlpChain* chain, cudaStream_t stream) {
  using namespace miras::cuda;
  if (!miras_mlp_chain_shared(chain->Hd, chain->C)) return cudaErrorInvalidValue;
  return with_sizes(chain->C, chain->Hd, [&](auto c, auto hd) {
    constexpr int C = c.value, Hd = hd.value;
    return with_token_type(chain->token_type, [&](auto token) {
      const auto kernel = mlp_chain<C, Hd, typename decltype(token)::type>;
      return launch_chain(kernel, int64_t(chain->N) * chain->H, Shape<C, Hd>::kThreads, ChainShared<C, Hd>::kBytes, stream, *chain);
    });
  });
}
