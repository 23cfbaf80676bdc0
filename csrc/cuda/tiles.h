// Tiles of 16-bit numbers in dynamic shared memory, as ldmatrix reads them without bank conflicts.
#pragma once

#include "mma.h"

namespace miras::cuda {

// what a block may have: kernels that need more are empty on the chips that the code is for
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr uint32_t kMaxShared = 163 * 1024;
#else
constexpr uint32_t kMaxShared = 227 * 1024;
#endif

extern __shared__ __align__(128) char shared_memory[];

template <class X> __device__ __forceinline__ X& at(uint32_t offset) { return *reinterpret_cast<X*>(shared_memory + offset); }
__device__ __forceinline__ uint32_t address(uint32_t offset) { return shared_address(shared_memory) + offset; }

// Byte offset of a 16-byte piece of a row, in a tile of rows of kPieces: swizzled, so that neither ldmatrix nor the stores of fragments
// meet a bank twice.
template <int kPieces> __device__ __forceinline__ uint32_t place(int row, int piece) {
  constexpr int kPer = kPieces >= 8 ? 1 : 8 / kPieces;
  return uint32_t(row * kPieces + (piece ^ ((row / kPer) & (kPieces < 8 ? kPieces - 1 : 7)))) * 16;
}
// place of column `channel` of a row of 64 channels
__device__ __forceinline__ uint32_t channel_place(int row, int channel) { return place<8>(row, channel / 8) + channel % 8 * 2; }

// What ldmatrix_x4 takes for 16 x 16 elements from row r0, column c0 on (multiples of 16): their four 8 x 8 matrices in one of two orders.
// Only the lane's part is computed; r0 and c0 are mostly known to the compiler.
//   by_rows: A from [m][k], B from [k][n] with _trans         by_columns: B from [n][k], A from [k][m] with _trans
template <int kPieces> __device__ __forceinline__ uint32_t by_rows(int r0, int c0, int lane) {
  return (place<kPieces>(lane & 15, lane >> 4) ^ uint32_t(c0 * 2)) + r0 * kPieces * 16;
}
template <int kPieces> __device__ __forceinline__ uint32_t by_columns(int r0, int c0, int lane) {
  return (place<kPieces>((lane >> 4) * 8 + (lane & 7), (lane >> 3) & 1) ^ uint32_t(c0 * 2)) + r0 * kPieces * 16;
}

// stores two neighbouring packed C tiles: 16 rows from row0 on, pieces `piece` and the next
template <int kPieces>
__device__ __forceinline__ void store_fragment(uint32_t tile, int row0, int piece, int lane, const uint32_t (&x)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  stmatrix_x4(address(tile + place<kPieces>(row0 + (lane & 15), piece + (lane >> 4))), x);
#else
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int i = 0; i < 4; ++i) at<uint32_t>(tile + place<kPieces>(row0 + g + 8 * (i & 1), piece + (i >> 1)) + 4 * t) = x[i];
#endif
}

// the sum over kLanes neighbouring lanes, in each of them
template <int kLanes> __device__ __forceinline__ float row_sum(float x) {
#pragma unroll
  for (int m = 1; m < kLanes; m *= 2) x += __shfl_xor_sync(0xffffffffu, x, m);
  return x;
}

// N of them at once, step by step
template <int kLanes, int N> __device__ __forceinline__ void row_sums(float (&x)[N]) {
#pragma unroll
  for (int m = 1; m < kLanes; m *= 2) {
    float more[N];
#pragma unroll
    for (int i = 0; i < N; ++i) more[i] = __shfl_xor_sync(0xffffffffu, x[i], m);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] += more[i];
  }
}

// The sums of each x over the lanes that differ by multiples of kStride. They share the N sums out: a lane is left with kLeft of them, in
// x[0], x[1], ...; gives the number of the first. Where N is small some have the same ones, and only those with `keeps_sum` store them.
template <int kStride, int N> constexpr int kLeft = N * kStride > 32 ? N * kStride / 32 : 1;
template <int kStride, int N> __device__ __forceinline__ bool keeps_sum(int lane) { return N * kStride >= 32 || lane % (32 / N) < kStride; }
template <int kStride, int N, int m = 16, int n = N> __device__ __forceinline__ int share_sums(float (&x)[N], int lane) {
  if constexpr (m < kStride) {
    return 0;
  } else {
    constexpr int half = n / 2, left = n > 1 ? half : 1;
    const bool upper = n > 1 && lane & m;
    float more[left];
#pragma unroll
    for (int i = 0; i < left; ++i) more[i] = upper || n == 1 ? x[i] : x[i + half];
#pragma unroll
    for (int i = 0; i < left; ++i) more[i] = __shfl_xor_sync(0xffffffffu, more[i], m);
#pragma unroll
    for (int i = 0; i < left; ++i) x[i] = (upper ? x[i + half] : x[i]) + more[i];
    return (upper ? left : 0) + share_sums<kStride, N, m / 2, left>(x, lane);
  }
}

}  // namespace miras::cuda
