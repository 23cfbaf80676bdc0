// gelu by the approximate instructions, for the MLP memory's chains.
#pragma once

#include "mma.h"

namespace miras::cuda {

// gelu in its tanh form, x s with s = 1 / (1 + 2^-y), y = log2(e) 2 sqrt(2/pi) (x + 0.044715 x^3), and its derivative; by approximate
// instructions: gelu within 2^-19 |x|, the derivative within 2^-17
struct FastGelu {
  static constexpr float kLinear = 2.302208198f, kCubic = 0.1029432396f;  // y = kLinear x + kCubic x^3
  static constexpr float kLn2 = 0.6931471806f;
  float x, square, s;
  __device__ __forceinline__ explicit FastGelu(float x) : x(x), square(x * x) {
    s = reciprocal_approx(1.0f + exp2_approx(-x * (kLinear + kCubic * square)));
  }
  __device__ __forceinline__ float value() const { return x * s; }
  __device__ __forceinline__ float steepness() const { return kLinear * kLn2 + 3.0f * kCubic * kLn2 * square; }  // of ln(2) y
  __device__ __forceinline__ float slope() const { return s + x * s * (1.0f - s) * steepness(); }
};

// N of them, step by step: the instructions of each one depend on each other
template <int N> struct FastGelus {
  float x[N], square[N], s[N];
  __device__ __forceinline__ FastGelus(const float (&low)[N / 2], const float (&high)[N / 2]) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = i < N / 2 ? low[i % (N / 2)] : high[i % (N / 2)], square[i] = x[i] * x[i];
#pragma unroll
    for (int i = 0; i < N; ++i) s[i] = -FastGelu::kLinear - FastGelu::kCubic * square[i];
#pragma unroll
    for (int i = 0; i < N; ++i) s[i] *= x[i];
#pragma unroll
    for (int i = 0; i < N; ++i) s[i] = exp2_approx(s[i]);
#pragma unroll
    for (int i = 0; i < N; ++i) s[i] += 1.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) s[i] = reciprocal_approx(s[i]);
  }
  __device__ __forceinline__ float value(int i) const { return x[i] * s[i]; }
  __device__ __forceinline__ void slopes(float (&y)[N]) const {
    constexpr float kLn2 = FastGelu::kLn2;
    float steepness[N], rest[N];
#pragma unroll
    for (int i = 0; i < N; ++i) y[i] = x[i] * s[i];
#pragma unroll
    for (int i = 0; i < N; ++i) steepness[i] = FastGelu::kLinear * kLn2 + 3.0f * FastGelu::kCubic * kLn2 * square[i];
#pragma unroll
    for (int i = 0; i < N; ++i) rest[i] = 1.0f - s[i];
#pragma unroll
    for (int i = 0; i < N; ++i) y[i] *= rest[i];
#pragma unroll
    for (int i = 0; i < N; ++i) y[i] = s[i] + y[i] * steepness[i];
  }
  // first and second derivatives
  __device__ __forceinline__ void derivatives(float (&slope)[N], float (&curve)[N]) const {
    constexpr float kA = FastGelu::kLinear * FastGelu::kLn2, kB = 3.0f * FastGelu::kCubic * FastGelu::kLn2;
    float rest[N], steepness[N], scaled[N];
#pragma unroll
    for (int i = 0; i < N; ++i) rest[i] = 1.0f - s[i];
#pragma unroll
    for (int i = 0; i < N; ++i) steepness[i] = kA + kB * square[i];
#pragma unroll
    for (int i = 0; i < N; ++i) scaled[i] = x[i] * steepness[i];
#pragma unroll
    for (int i = 0; i < N; ++i) curve[i] = 2.0f * kA + 4.0f * kB * square[i];
#pragma unroll
    for (int i = 0; i < N; ++i) steepness[i] *= scaled[i];
#pragma unroll
    for (int i = 0; i < N; ++i) curve[i] += (rest[i] - s[i]) * steepness[i];
#pragma unroll
    for (int i = 0; i < N; ++i) rest[i] *= s[i];
#pragma unroll
    for (int i = 0; i < N; ++i) slope[i] = s[i] + rest[i] * scaled[i], curve[i] *= rest[i];
  }
};

}  // namespace miras::cuda
