// The forward of the MLP memory in chunks: the kernel for each size, and what the library offers. mlp_stages.h has the computation.
#include "mlp_stages.h"

#include <stddef.h>

namespace miras::cuda {
namespace {

template <int C, int Hd, class T>
__global__ void __launch_bounds__(Shape<C, Hd>::kThreads, 1) mlp_chain(const __grid_constant__ MirasMlpChain p) {
  if constexpr (Shared<C, Hd>::kBytes <= kMaxShared) {
    Chain<C, Hd, T> chain(p, blockIdx.x / p.H, blockIdx.x % p.H);
    chain.run();
  }
}

// f(std::integral_constant<int, C>, std::integral_constant<int, Hd>) if these sizes are served
template <class Function> int with_sizes(int C, int Hd, Function&& f) {
  const auto with_hidden = [&](auto c) {
    if (Hd == 64) return f(c, std::integral_constant<int, 64>());
    if (Hd == 128) return f(c, std::integral_constant<int, 128>());
    if (Hd == 256) return f(c, std::integral_constant<int, 256>());
    return 0;
  };
  if (C == 16) return with_hidden(std::integral_constant<int, 16>());
  if (C == 32) return with_hidden(std::integral_constant<int, 32>());
  if (C == 64) return with_hidden(std::integral_constant<int, 64>());
  return 0;
}

template <int C, int Hd, class T> int launch_chain(const MirasMlpChain& p, cudaStream_t stream) {
  constexpr int kBytes = Shared<C, Hd>::kBytes;
  const int error = cudaFuncSetAttribute(mlp_chain<C, Hd, T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error || !p.N || !p.H) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(p.N * p.H));
  config.blockDim = dim3(Shape<C, Hd>::kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, mlp_chain<C, Hd, T>, p);
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
  return miras::cuda::with_sizes(C, Hd, [](auto c, auto hd) { return int(miras::cuda::Shared<c.value, hd.value>::kBytes); });
}

extern "C" int miras_mlp_chain(const MirasMlpChain* chain, cudaStream_t stream) {
  using namespace miras::cuda;
  if (!miras_mlp_chain_shared(chain->Hd, chain->C)) return cudaErrorInvalidValue;
  return with_sizes(chain->C, chain->Hd, [&](auto c, auto hd) {
    if (chain->token_type == MIRAS_BF16) return launch_chain<c.value, hd.value, Bf16>(*chain, stream);
    if (chain->token_type == MIRAS_F16) return launch_chain<c.value, hd.value, Fp16>(*chain, stream);
    return int(cudaErrorInvalidValue);
  });
}
