// Replaces CUDA's runtime: a launch calls the caller's function with the kernel's name and pointers to its arguments.
#include <cuda_runtime_api.h>

#include <cstring>

namespace {
using Receive = void (*)(const char* kernel, unsigned blocks, unsigned cluster, unsigned threads, unsigned shared, void** arguments);
Receive receive = nullptr;
struct {
  const void* function;
  const char* name;
} kernels[256];
int count = 0;
void* handle = nullptr;
}  // namespace

extern "C" {
void miras_receive(Receive function) { receive = function; }

void** __cudaRegisterFatBinary(void*) { return &handle; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  kernels[count++] = {host, name};
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, CUstream_st*) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaSuccess; }
// of the launches that kernels' own stubs would make
cudaError_t __cudaGetKernel(void**, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  for (int i = 0; i < count; ++i)
    if (kernels[i].function == function) {
      unsigned cluster = 1;
      for (unsigned j = 0; j < config->numAttrs; ++j)
        if (config->attrs[j].id == cudaLaunchAttributeClusterDimension) cluster = config->attrs[j].val.clusterDim.x;
      receive(kernels[i].name, config->gridDim.x, cluster, config->blockDim.x, unsigned(config->dynamicSmemBytes), arguments);
      return cudaSuccess;
    }
  return cudaErrorInvalidDeviceFunction;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int) { return cudaErrorNotSupported; }
const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "an error"; }
}
