// Tensor-core products and the asynchronous copies and barriers around them, for kernels with 16-bit operands (sm_80 and later).
//
// Fragments of mma.m16n8k16, with g = lane / 4, t = lane % 4; a register of two 16-bit numbers has the lower column in its lower half:
//
//     A [16, 16]   a[0] (g, 2t)   a[1] (g + 8, 2t)   a[2] (g, 2t + 8)   a[3] (g + 8, 2t + 8)
//     B [16, 8]    b[0] (k = 2t, n = g)   b[1] (k = 2t + 8, n = g)
//     C [16, 8]    c[0], c[1] (g, 2t), (g, 2t + 1)   c[2], c[3] (g + 8, 2t), (g + 8, 2t + 1)
//
// So two neighbouring C tiles, rounded and packed, are an A operand of the same rows whose k runs over their columns.
// Shared memory is addressed by 32-bit addresses (shared_address), which ldmatrix and cp.async take. The statements are volatile: they stay
// in the order that the kernel gives them, which bounds the registers in use.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace miras::cuda {

using Bf16 = __nv_bfloat16;
using Fp16 = __half;

// the address of shared memory as instructions take it
__device__ __forceinline__ uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

// ----------------------------------------------------------------------------------------------------------------- products

// c += a b, [16, 8] += [16, 16] [16, 8], float32 sums
template <class T> __device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<T, Bf16> || std::is_same_v<T, Fp16>);
  if constexpr (std::is_same_v<T, Bf16>)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ------------------------------------------------------------------------------------------------------------ shared memory

// four 8 x 8 matrices of 16-bit numbers; lanes 8 i to 8 i + 7 give the addresses of matrix i's rows, 16 bytes each
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// the same four matrices, each transposed
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// stores four 8 x 8 matrices as ldmatrix_x4 loads them (sm_90)
__device__ __forceinline__ void stmatrix_x4(uint32_t address, const uint32_t (&r)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#endif
}

// 16 bytes from global to shared memory, or zeros; they are there once the thread has waited and the block has met at a barrier
__device__ __forceinline__ void cp_async_16(uint32_t to, const void* from, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

// likewise 4 bytes
__device__ __forceinline__ void cp_async_4(uint32_t to, const void* from, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid ? 4 : 0) : "memory");
}

// ends a group of this thread's copies
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// waits until at most kPending of this thread's groups are on their way
template <int kPending> __device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ------------------------------------------------------------------------------------------------------------------ barriers

// `threads` threads of whole warps meet at barrier `id`, 0 to 15; __syncthreads is barrier 0 of all
__device__ __forceinline__ void named_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// ------------------------------------------------------------------------------------------------------------------- numbers

// two floats rounded to 16 bits, the first in the lower half
template <class T> __device__ __forceinline__ uint32_t pack(float low, float high) {
  static_assert(std::is_same_v<T, Bf16> || std::is_same_v<T, Fp16>);
  uint32_t packed;
  if constexpr (std::is_same_v<T, Bf16>) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// likewise, but not kept in registers from one product to the next
template <class T> __device__ __forceinline__ uint32_t pack_again(float low, float high) {
  uint32_t packed;
  if constexpr (std::is_same_v<T, Bf16>) asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  else asm volatile("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// the lower and the upper half as floats
template <class T> __device__ __forceinline__ float2 unpack(uint32_t packed) {
  if constexpr (std::is_same_v<T, Bf16>) {
    float2 both;  // in one instruction each: the compiler would move them from integer registers to others
    asm("shl.b32 %0, %1, 16;" : "=f"(both.x) : "r"(packed));
    asm("and.b32 %0, %1, 0xffff0000;" : "=f"(both.y) : "r"(packed));
    return both;
  } else {
    __half2 halves;
    memcpy(&halves, &packed, sizeof packed);
    return __half22float2(halves);
  }
}

// the larger number; NaN if either is
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// 1 / x to 1 unit in the last place; 0 for what is above 2^126
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x) within 2^-22, or 2^-22 of it beyond [0.5, 2]; -infinity for 0
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 2^x to 2 units in the last place; what is below 2^-126 becomes 0
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x / y to 2 units in the last place
__device__ __forceinline__ float divide_approx(float x, float y) {
  float z;
  asm("div.full.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

// What is read from memory before it is asked for before what follows is computed: the compiler would move it to where it is needed, and
// wait there.
__device__ __forceinline__ void reads_end() { asm volatile("" ::: "memory"); }

// the thread's number as a value that the compiler cannot carry from one stage of a kernel to the next: addresses made of it are computed
// again instead of being kept in registers
__device__ __forceinline__ int fresh_thread() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

}  // namespace miras::cuda
