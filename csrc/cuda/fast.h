// Biases by approximate instructions, for kernels whose operands are rounded to 16 bits: powf is a hundred instructions for each element,
// and the kernels have it at every place of a tile.
#pragma once

#include "../bias.h"
#include "math.h"
#include "mma.h"

namespace miras {
namespace cuda {

// A float whose division, tanh, sech2 and pow are approximate; the rest is that of float.
struct Fast {
  float x;
  Fast() = default;
  __device__ __forceinline__ Fast(float x) : x(x) {}
  __device__ __forceinline__ explicit operator float() const { return x; }
  __device__ __forceinline__ friend Fast operator-(Fast a) { return -a.x; }
  __device__ __forceinline__ friend Fast operator+(Fast a, Fast b) { return a.x + b.x; }
  __device__ __forceinline__ friend Fast operator-(Fast a, Fast b) { return a.x - b.x; }
  __device__ __forceinline__ friend Fast operator*(Fast a, Fast b) { return a.x * b.x; }
  __device__ __forceinline__ friend Fast operator/(Fast a, Fast b) { return divide_approx(a.x, b.x); }
  __device__ __forceinline__ friend bool operator<=(Fast a, Fast b) { return a.x <= b.x; }
  __device__ __forceinline__ friend bool operator==(Fast a, Fast b) { return a.x == b.x; }
};

}  // namespace cuda

template <> struct Math<cuda::Fast> {
  using Fast = cuda::Fast;
  __device__ __forceinline__ static Fast abs(Fast a) { return Math<float>::abs(a.x); }
  __device__ __forceinline__ static Fast copysign(Fast a, Fast b) { return Math<float>::copysign(a.x, b.x); }
  __device__ __forceinline__ static Fast min(Fast a, Fast b) { return Math<float>::min(a.x, b.x); }
  __device__ __forceinline__ static Fast max(Fast a, Fast b) { return Math<float>::max(a.x, b.x); }
  __device__ __forceinline__ static Fast sqrt(Fast a) { return Math<float>::sqrt(a.x); }
  // within 2^-18: near 0, where the closed form cancels, x - x^3 / 3
  __device__ __forceinline__ static Fast tanh(Fast a) {
    const float z = cuda::exp2_approx(-2.885390082f * fabsf(a.x)), far = (1.0f - z) * cuda::reciprocal_approx(1.0f + z);
    return fabsf(a.x) < 0.0625f ? a.x - a.x * (a.x * a.x) * (1.0f / 3.0f) : copysignf(far, a.x);
  }
  // 1 - tanh^2, within 2^-20
  __device__ __forceinline__ static Fast sech2(Fast a) {
    const float z = cuda::exp2_approx(-2.885390082f * fabsf(a.x)), inverse = cuda::reciprocal_approx(1.0f + z);
    return 4.0f * z * inverse * inverse;
  }
  // x^a for x >= 0 and a > 0, or x > 0: 2^(a log2 x). The error is 2^-22 of the exponent (of 1, where the exponent is smaller), so that
  // results from 2^-45 to 2^45 are within 2^-17.
  __device__ __forceinline__ static Fast pow(Fast x, Fast a) { return cuda::exp2_approx(a.x * cuda::log2_approx(x.x)); }
};

namespace cuda {

// The functions of a bias, for floats
template <class Bias> struct FastBias : Bias {
  using Row = typename Bias::template Row<Fast>;
  __device__ __forceinline__ Row row(float norm2, float delta) const { return Bias::row(Fast(norm2), Fast(delta)); }
  __device__ __forceinline__ float value(float e, Row row) const { return float(Bias::value(Fast(e), row)); }
  __device__ __forceinline__ float slope(float e, float g, Row row) const { return float(Bias::slope(Fast(e), Fast(g), row)); }
  __device__ __forceinline__ float slope_delta(float e, Row row) const { return float(Bias::slope_delta(Fast(e), row)); }
  __device__ __forceinline__ float pull(float e, Row row) const { return float(Bias::pull(Fast(e), row)); }
};

template <class Function> __device__ __forceinline__ auto with_fast_bias(int tag, const float* params, Function&& f) {
  return with_bias(BiasTag(tag), params, [&](auto bias) { return f(FastBias<decltype(bias)>{bias}); });
}

}  // namespace cuda
}  // namespace miras
