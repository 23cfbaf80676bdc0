// The functions of `Math` for one float, which the bias and retention functors use; they are written for the CPU's vectors too.
#pragma once

#include <math.h>

#include "../retention.h"

namespace miras {

template <> struct Math<float> {
  MIRAS_FN static float abs(float x) { return fabsf(x); }
  MIRAS_FN static float copysign(float magnitude, float sign) { return copysignf(magnitude, sign); }
  // NaN if either is, which fminf and fmaxf are not
  MIRAS_FN static float min(float a, float b) { return a < b || a != a ? a : b; }
  MIRAS_FN static float max(float a, float b) { return a > b || a != a ? a : b; }
  MIRAS_FN static float sqrt(float x) { return sqrtf(x); }
  MIRAS_FN static float exp_nonpositive(float x) { return expf(x); }
  MIRAS_FN static float tanh(float x) { return tanhf(x); }
  MIRAS_FN static float sech2(float x) {
    const float z = expf(-2.0f * fabsf(x)), inverse = 1.0f / (1.0f + z);
    return 4.0f * z * inverse * inverse;
  }
  MIRAS_FN static float pow(float x, float a) { return powf(x, a); }  // x >= 0
};

namespace cuda {

// gelu in its tanh form, gelu(x) = x s with s = 1 / (1 + exp(-y)), y = 2 sqrt(2/pi) (x + 0.044715 x^3)
struct Gelu {
  static constexpr float kLinear = 1.595769122f, kCubic = 0.07135481627f;  // y = kLinear x + kCubic x^3
  float x, s, t;                                                           // t = 1 - s
  MIRAS_FN explicit Gelu(float x) : x(x) {
    const float y = x * (kLinear + kCubic * x * x);
    const float z = expf(-fabsf(y)), larger = 1.0f / (1.0f + z), smaller = z * larger;
    s = y < 0.0f ? smaller : larger;
    t = y < 0.0f ? larger : smaller;
  }
  MIRAS_FN float value() const { return x * s; }
  MIRAS_FN float slope() const { return s + x * ((kLinear + 3.0f * kCubic * x * x) * s * t); }
};

}  // namespace cuda
}  // namespace miras
