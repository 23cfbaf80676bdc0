// Vector mathematics of one level: the `Math` that the bias functors use, exp for the decays, and GELU. Their errors are stated in
// docs/backends.md, Elementary functions.
#pragma once

#include "../bias.h"
#include "vec.h"

namespace miras::cpu::MIRAS_LEVEL {

MIRAS_INLINE Vec round_to_even(Vec x) {      // |x| < 2^22
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23
  return (x + magic) - magic;
}

// 2^n for integers -127 < n < 128
MIRAS_INLINE Vec power_of_two(Vec n) { return (Vec)((__builtin_convertvector(n, IVec) + 127) << 23); }

// 2^r - 1 for |r| <= 1/2, accurate near zero
MIRAS_INLINE Vec exp2_minus_one(Vec r) {
  Vec p = broadcast(1.540351224e-04f);
  p = p * r + 1.339073548e-03f;
  p = p * r + 9.618237495e-03f;
  p = p * r + 5.550357434e-02f;
  p = p * r + 2.402264979e-01f;
  p = p * r + 6.931471879e-01f;
  return p * r;
}

// log2(m) for m in [sqrt(1/2), sqrt(2))
MIRAS_INLINE Vec log2_mantissa(Vec m) {
  const Vec f = m - 1.0f;
  Vec p = broadcast(-1.099493792e-01f);
  p = p * f + 1.861748676e-01f;
  p = p * f - 1.910627803e-01f;
  p = p * f + 2.046006370e-01f;
  p = p * f - 2.396174025e-01f;
  p = p * f + 2.885674074e-01f;
  p = p * f - 3.606966494e-01f;
  p = p * f + 4.808982411e-01f;
  p = p * f - 7.213473515e-01f;
  p = p * f + 1.442695041e+00f;
  return p * f;
}

// A number as (2^n)(1 + tail): exp(x), with exp(x) - 1 recoverable without cancellation. x <= 0; below -87 it is zero.
struct SplitExp {
  Vec scale, tail;
  MIRAS_FN explicit SplitExp(Vec x) {
    x = x < -88.0f ? broadcast(-88.0f) : x;
    const Vec n = round_to_even(x * 1.44269504f);
    const Vec r = (x - n * 6.93145752e-01f) - n * 1.42860677e-06f;  // x - n ln 2, in two steps
    scale = n < -126.5f ? zeros() : power_of_two(n);
    tail = exp2_minus_one(r * 1.44269504f);
  }
  MIRAS_FN Vec value() const { return scale + scale * tail; }
  MIRAS_FN Vec minus_one() const { return (scale - 1.0f) + scale * tail; }
};

MIRAS_INLINE Vec exp_nonpositive(Vec x) { return SplitExp(x).value(); }

// gelu in its tanh form, gelu(x) = x s with s = 1 / (1 + exp(-y)), y = 2 sqrt(2/pi) (x + 0.044715 x^3), and its derivatives: all from
// one power e = exp(-|y|), of base two because y is not needed itself.
struct Gelu {
  static constexpr float kLinear = 1.595769122f, kCubic = 0.07135481627f;   // y = kLinear x + kCubic x^3
  static constexpr float kLinear2 = 2.302208198f, kCubic2 = 0.1029432397f;  // y / ln 2
  Vec x, s, st;                                                             // st = s (1 - s)
  MIRAS_FN explicit Gelu(Vec x) : x(x) {
    Vec exponent = x * (kLinear2 + kCubic2 * x * x);
    exponent = (Vec)((IVec)exponent | int32_t(0x80000000));         // -|y| / ln 2
    exponent = exponent > -127.0f ? exponent : broadcast(-127.0f);  // 2^-127 is zero here
    const Vec magic = broadcast(12582912.0f), shifted = exponent + magic, n = shifted - magic;  // n in the last bits of `shifted`
    const Vec scale = (Vec)(((IVec)shifted + 127) << 23), e = scale + scale * exp2_minus_one(exponent - n);
    const Vec large = 1.0f / (1.0f + e), small = e * large;  // s of |y| and of -|y|
    s = x < 0.0f ? small : large;
    st = small * large;
  }
  MIRAS_FN Vec dy() const { return kLinear + (3.0f * kCubic) * x * x; }
  MIRAS_FN Vec value() const { return x * s; }
  MIRAS_FN Vec slope() const { return s + x * (dy() * st); }
  MIRAS_FN Vec curvature() const {
    const Vec ds = dy() * st;
    return 2.0f * ds + x * ((6.0f * kCubic) * x * st + dy() * ds * (1.0f - 2.0f * s));
  }
};

}  // namespace miras::cpu::MIRAS_LEVEL

namespace miras {

template <> struct Math<cpu::MIRAS_LEVEL::Vec> {
  using F = cpu::MIRAS_LEVEL::Vec;
  using I = cpu::MIRAS_LEVEL::IVec;

  MIRAS_FN static F abs(F x) { return (F)((I)x & 0x7fffffff); }
  MIRAS_FN static F copysign(F magnitude, F sign) { return (F)((I)magnitude | ((I)sign & int32_t(0x80000000))); }
  // NaN if either is
  MIRAS_FN static F min(F a, F b) { return (a < b) | (a != a) ? a : b; }
  MIRAS_FN static F max(F a, F b) { return (a > b) | (a != a) ? a : b; }

  MIRAS_FN static F exp_nonpositive(F x) { return cpu::MIRAS_LEVEL::exp_nonpositive(x); }

  MIRAS_FN static F sqrt(F x) {
#if defined(__x86_64__) && MIRAS_LANES == 16
    return (F)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
#elif defined(__x86_64__) && MIRAS_LANES == 8
    return (F)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
    return (F)_mm_sqrt_ps((__m128)x);
#elif defined(__aarch64__)
    return (F)vsqrtq_f32((float32x4_t)x);
#else
    for (int i = 0; i < MIRAS_LANES; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
  }

  // With z = exp(-2|x|): tanh|x| = (1 - z) / (1 + z),  sech^2 x = 4 z / (1 + z)^2.
  MIRAS_FN static F tanh(F x) {
    const F minus_one = cpu::MIRAS_LEVEL::SplitExp(-2.0f * abs(x)).minus_one();
    return copysign(-minus_one / (2.0f + minus_one), x);
  }
  MIRAS_FN static F sech2(F x) {
    const F z = cpu::MIRAS_LEVEL::SplitExp(-2.0f * abs(x)).value();
    const F inverse = 1.0f / (1.0f + z);
    return 4.0f * z * inverse * inverse;
  }

  // within 4 ulp; zero below -87.6, infinite above 88.7
  MIRAS_FN static F exp(F x) {
    using namespace cpu::MIRAS_LEVEL;
    x = x < -88.0f ? broadcast(-88.0f) : (x > 89.0f ? broadcast(89.0f) : x);
    const F n = round_to_even(x * 1.44269504f);
    const F r = (x - n * 6.93145752e-01f) - n * 1.42860677e-06f;
    const F twice = n > 0.0f ? F{} + 1.0f : F{};  // 2^128 is infinity
    const F y = power_of_two(n - twice) * (1.0f + exp2_minus_one(r * 1.44269504f)) * (1.0f + twice);
    return n < -126.5f ? F{} : y;
  }

  // (n + log2 m) ln 2, x = 2^n m with m in [sqrt(1/2), sqrt(2)): within 3 ulp
  MIRAS_FN static F log(F x) {
    using namespace cpu::MIRAS_LEVEL;
    const I bits = (I)abs(x);
    const I exponent = (bits - 0x3f3504f3) >> 23;
    const F n = __builtin_convertvector(exponent, F);
    const F y = n * 6.93145752e-01f + (n * 1.42860677e-06f + log2_mantissa((F)(bits - (exponent << 23))) * 6.93147181e-01f);
    const F edge = x > 0.0f ? x : (x == 0.0f ? F{} - __builtin_inff() : F{} + __builtin_nanf(""));  // infinity stays
    return (x > 0.0f) & (x < __builtin_inff()) ? y : edge;
  }

  // x^a for x >= 0 and a > 0 as 2^(a n + a log2 m), x = 2^n m; a is split so that its products with n are exact but for a small one.
  MIRAS_FN static F pow(F x, float a) {
    using namespace cpu::MIRAS_LEVEL;
    const I bits = (I)x;
    const I exponent = (bits - 0x3f3504f3) >> 23;
    const F n = __builtin_convertvector(exponent, F);
    const float a_high = __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, a) & 0xfffff000u);
    const F fraction = a * log2_mantissa((F)(bits - (exponent << 23))) + (a - a_high) * n;
    const F k = round_to_even(a_high * n + fraction);
    const F r = (a_high * n - k) + fraction;
    const F clamped = min(max(k, F{} - 126.0f), F{} + 129.0f), twice = clamped > 127.0f ? F{} + 1.0f : F{};  // 2^128 is infinity
    const F y = power_of_two(clamped - twice) * (1.0f + exp2_minus_one(r)) * (1.0f + twice);
    const F edge = x < 1.0f ? F{} : x;  // of 0, infinity and NaN, and what underflows
    return ((x > 0.0f) & (k >= -126.0f) & (x < __builtin_inff())) ? y : edge;
  }
};

}  // namespace miras
