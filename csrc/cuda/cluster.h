// Blocks of a cluster (sm_90 and later): their barrier, and each other's shared memory.
#pragma once

#include "tiles.h"

namespace miras::cuda {

// this block's number in its cluster
__device__ __forceinline__ int cluster_rank() {
  int x;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(x));
  return x;
}

// Tells the cluster's other blocks that this thread has come here; and waits until all threads of all its blocks have told. What they
// wrote and read before is then over.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// the address of a place of dynamic shared memory in block `rank`
__device__ __forceinline__ uint32_t address_in(int rank, uint32_t offset) {
  uint32_t x;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(x) : "r"(address(offset)), "r"(rank));
  return x;
}
__device__ __forceinline__ float load_cluster(uint32_t address) {
  float x;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
  return x;
}
__device__ __forceinline__ float4 load_cluster_4(uint32_t address) {
  float4 x;
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(address) : "memory");
  return x;
}

__device__ __forceinline__ void store_cluster(uint32_t address, uint32_t x) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
__device__ __forceinline__ void store_cluster(uint32_t address, uint2 x) {
  asm volatile("st.shared::cluster.v2.u32 [%0], {%1,%2};" ::"r"(address), "r"(x.x), "r"(x.y) : "memory");
}
__device__ __forceinline__ void store_cluster(uint32_t address, uint4 x) {
  asm volatile("st.shared::cluster.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
__device__ __forceinline__ void store_cluster(uint32_t address, float x) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}
__device__ __forceinline__ void store_cluster(uint32_t address, float4 x) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(address), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w) : "memory");
}
__device__ __forceinline__ void store_cluster(uint32_t address, float2 x) {
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1,%2};" ::"r"(address), "f"(x.x), "f"(x.y) : "memory");
}

}  // namespace miras::cuda
