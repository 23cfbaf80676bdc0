// Biases and retention gates by approximate instructions, for kernels whose operands are rounded to 16 bits: powf is a hundred instructions
// for each element, and the kernels have it at every place of a tile.
#pragma once

#include "../bias.h"
#include "math.h"
#include "mma.h"

namespace miras {
namespace cuda {

// A float whose division, exponential, tanh and powers are approximate: relative errors are below 2^-18 (of powers: 2^-20 times the
// logarithm of the result, if that is larger than 1).
struct Approximate {
  float x;
  __device__ __forceinline__ Approximate(float x = 0.0f) : x(x) {}
  __device__ __forceinline__ explicit operator float() const { return x; }
};
__device__ __forceinline__ Approximate operator-(Approximate a) { return -a.x; }
__device__ __forceinline__ Approximate operator+(Approximate a, Approximate b) { return a.x + b.x; }
__device__ __forceinline__ Approximate operator-(Approximate a, Approximate b) { return a.x - b.x; }
__device__ __forceinline__ Approximate operator*(Approximate a, Approximate b) { return a.x * b.x; }
__device__ __forceinline__ Approximate operator/(Approximate a, Approximate b) { return divide_approx(a.x, b.x); }
__device__ __forceinline__ bool operator<(Approximate a, Approximate b) { return a.x < b.x; }
__device__ __forceinline__ bool operator<=(Approximate a, Approximate b) { return a.x <= b.x; }
__device__ __forceinline__ bool operator==(Approximate a, Approximate b) { return a.x == b.x; }

}  // namespace cuda

template <> struct Math<cuda::Approximate> {
  using F = cuda::Approximate;
  __device__ __forceinline__ static F abs(F a) { return fabsf(a.x); }
  __device__ __forceinline__ static F copysign(F a, F sign) { return copysignf(a.x, sign.x); }
  __device__ __forceinline__ static F min(F a, F b) { return Math<float>::min(a.x, b.x); }
  __device__ __forceinline__ static F max(F a, F b) { return cuda::max_or_nan(a.x, b.x); }
  __device__ __forceinline__ static F sqrt(F a) { return sqrtf(a.x); }
  __device__ __forceinline__ static F exp_nonpositive(F a) { return cuda::exp2_approx(a.x * 1.442695041f); }
  __device__ __forceinline__ static F pow(F a, float exponent) { return cuda::exp2_approx(exponent * cuda::log2_approx(a.x)); }
  // near 0, where the closed form cancels, x - x^3 / 3
  __device__ __forceinline__ static F tanh(F a) {
    const float z = cuda::exp2_approx(-2.885390082f * fabsf(a.x)), far = (1.0f - z) * cuda::reciprocal_approx(1.0f + z);
    return fabsf(a.x) < 0.0625f ? a.x - a.x * (a.x * a.x) * (1.0f / 3.0f) : copysignf(far, a.x);
  }
  // 1 - tanh^2
  __device__ __forceinline__ static F sech2(F a) {
    const float z = cuda::exp2_approx(-2.885390082f * fabsf(a.x)), inverse = cuda::reciprocal_approx(1.0f + z);
    return 4.0f * z * inverse * inverse;
  }
};

namespace cuda {

// The functions of a bias, for floats
template <class Bias> struct FastBias : Bias {
  using F = Approximate;
  using Row = typename Bias::template Row<F>;
  __device__ __forceinline__ Row row(float norm2, float delta) const { return Bias::row(F(norm2), F(delta)); }
  __device__ __forceinline__ float value(float e, Row row) const { return float(Bias::value(F(e), row)); }
  __device__ __forceinline__ float slope(float e, float g, Row row) const { return float(Bias::slope(F(e), F(g), row)); }
  __device__ __forceinline__ float slope_delta(float e, Row row) const { return float(Bias::slope_delta(F(e), row)); }
  __device__ __forceinline__ float pull(float e, Row row) const { return float(Bias::pull(F(e), row)); }
};

template <class Function> __device__ __forceinline__ auto with_fast_bias(int tag, const float* params, Function&& f) {
  return with_bias(BiasTag(tag), params, [&](auto bias) { return f(FastBias<decltype(bias)>{bias}); });
}

}  // namespace cuda
}  // namespace miras
