// Launches of the MLP memory's backward.
#pragma once

#include "mlp_backward.h"

namespace miras::cuda {

template <class T> struct OfType {
  using type = T;
};

// f(integral constants C, Hd, OfType<token type>), or an error if they are not served
template <class Function> int with_backward_sizes(const MirasMlpBackward& b, Function&& f) {
  if (!miras_mlp_handed(b.chain.Hd, b.chain.C)) return cudaErrorInvalidValue;
  return with_backward_sizes(b.chain.C, b.chain.Hd, [&](auto c, auto hd) {
    if (b.chain.token_type == MIRAS_BF16) return f(c, hd, OfType<Bf16>());
    if (b.chain.token_type == MIRAS_F16) return f(c, hd, OfType<Fp16>());
    return int(cudaErrorInvalidValue);
  });
}

// a block of `threads` for each of b's heads of `rows` sequences or segments
template <class Kernel> int launch(Kernel kernel, const MirasMlpBackward& b, int rows, int threads, uint32_t bytes, cudaStream_t stream) {
  const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (error || !rows || !b.chain.H) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(rows) * unsigned(b.chain.H));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, b);
}

}  // namespace miras::cuda
