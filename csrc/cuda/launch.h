// What the host side of all kernels shares: launches, and what the library tells Python of its structs.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace miras::cuda {

// kCluster: blocks of a cluster, which neighbours form; more than one on sm_90 and later
template <int kCluster = 1, class... Parameters, class... Arguments>
int launch_blocks(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, cudaStream_t stream,
                  const Arguments&... arguments) {
  if (blocks == 0) return cudaSuccess;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute cluster = {};
  if (kCluster > 1) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = kCluster, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster, config.numAttrs = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// The same with more shared memory than kernels may take without asking
template <int kCluster = 1, class... Parameters, class... Arguments>
int launch_chain(void (*kernel)(Parameters...), int64_t blocks, int threads, int bytes, cudaStream_t stream,
                 const Arguments&... arguments) {
  const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  return error ? error : launch_blocks<kCluster>(kernel, blocks, threads, size_t(bytes), stream, arguments...);
}

// Gives the caller of a *_layout function up to `room` of the numbers found; returns how many there are.
template <int kCount> int put_layout(const int64_t (&found)[kCount], int64_t* layout, int room) {
  for (int i = 0; i < kCount && i < room; ++i) layout[i] = found[i];
  return kCount;
}

}  // namespace miras::cuda
