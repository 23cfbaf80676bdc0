// As much of CUDA as csrc/cuda uses, for a C++ compiler: blocks run one after the other on the CPU, the threads of a block as coroutines
// that switch at barriers and shuffles. A missing barrier shows when the threads run in the reverse order.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <memory>
#include <tuple>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline int min(int a, int b) { return a < b ? a : b; }

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid argument"; }
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

namespace emulator {

enum class Waits { no, for_warp, for_block, forever };

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Waits waits;
  float exchanged;
};

inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline unsigned current = 0;
inline bool backwards = false;
inline void (*body)(void*) = nullptr;
inline void* closure = nullptr;

inline void wait(Waits for_what) {
  threads[current].waits = for_what;
  swapcontext(&threads[current].context, &scheduler);
}

inline void entry() {
  body(closure);
  wait(Waits::forever);
}

// Threads first ... last may continue if all of them wait at the same place.
inline bool release(unsigned first, unsigned last, Waits what) {
  for (unsigned i = first; i < last; ++i)
    if (threads[i].waits != what) return false;
  for (unsigned i = first; i < last; ++i) threads[i].waits = Waits::no;
  return true;
}

inline void run_block(unsigned count) {
  constexpr size_t kStack = 1 << 17;
  while (threads.size() < count) threads.push_back({{}, std::make_unique<char[]>(kStack), Waits::no, 0.0f});
  for (unsigned i = 0; i < count; ++i) {
    threads[i].waits = Waits::no;
    getcontext(&threads[i].context);
    threads[i].context.uc_stack = {threads[i].stack.get(), 0, kStack};
    threads[i].context.uc_link = nullptr;
    makecontext(&threads[i].context, entry, 0);
  }
  for (;;) {
    bool went = false;
    for (unsigned i = 0; i < count; ++i) {
      current = backwards ? count - 1 - i : i;
      if (threads[current].waits != Waits::no) continue;
      went = true;
      swapcontext(&scheduler, &threads[current].context);
    }
    for (unsigned i = 0; i < count; i += 32) went |= release(i, i + 32, Waits::for_warp);
    went |= release(0, count, Waits::for_block);
    if (went) continue;
    for (unsigned i = 0; i < count; ++i)
      if (threads[i].waits != Waits::forever) fprintf(stderr, "thread %u waits where others do not come\n", i), abort();
    return;
  }
}

struct Index {
  unsigned x;
};
inline Index block;
struct ThreadIndex {
  struct X {
    operator unsigned() const { return current; }
  } x;
};

}  // namespace emulator

inline emulator::ThreadIndex threadIdx;
#define blockIdx emulator::block

inline void __syncthreads() { emulator::wait(emulator::Waits::for_block); }

inline float __shfl_xor_sync(unsigned, float x, int bits) {
  using namespace emulator;
  threads[current].exchanged = x;
  wait(Waits::for_warp);
  const float y = threads[current ^ unsigned(bits)].exchanged;
  wait(Waits::for_warp);
  return y;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), const Arguments&... arguments) {
  auto call = [&] { kernel(arguments...); };
  emulator::body = [](void* given) { (*static_cast<decltype(call)*>(given))(); };
  emulator::closure = &call;
  for (unsigned i = 0; i < config->gridDim.x; ++i) {
    emulator::block.x = emulator::backwards ? config->gridDim.x - 1 - i : i;
    emulator::run_block(config->blockDim.x);
  }
  emulator::closure = nullptr;
  return cudaSuccess;
}
