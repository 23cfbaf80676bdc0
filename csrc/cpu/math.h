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

// f(m) for all m < M: the same operation on several vectors
template <int M, class Function> MIRAS_INLINE void in_turn(Function&& f) {
  MIRAS_UNROLL
  for (int m = 0; m < M; ++m) f(m);
}

// 2^n for integers -127 < n < 128
MIRAS_INLINE Vec power_of_two(Vec n) { return (Vec)((__builtin_convertvector(n, IVec) + 127) << 23); }

// 2^r - 1 for |r| <= 1/2, accurate near zero; of M vectors in turn (see Gelus)
template <int M> MIRAS_INLINE void exp2_minus_one(const Vec* r, Vec* y) {
  constexpr float coefficients[] = {1.339073548e-03f, 9.618237495e-03f, 5.550357434e-02f, 2.402264979e-01f, 6.931471879e-01f};
  in_turn<M>([&](int m) MIRAS_LAMBDA { y[m] = broadcast(1.540351224e-04f); });
  MIRAS_UNROLL
  for (int i = 0; i < 5; ++i) in_turn<M>([&](int m) MIRAS_LAMBDA { y[m] = y[m] * r[m] + coefficients[i]; });
  in_turn<M>([&](int m) MIRAS_LAMBDA { y[m] *= r[m]; });
}
MIRAS_INLINE Vec exp2_minus_one(Vec r) {
  Vec y;
  exp2_minus_one<1>(&r, &y);
  return y;
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
// one power e = exp(-|y|), of base two because y is not needed itself. Each operation waits for the one before it, so M vectors take turns.
template <int M> struct Gelus {
  static constexpr float kLinear = 1.595769122f, kCubic = 0.07135481627f;   // y = kLinear x + kCubic x^3
  static constexpr float kLinear2 = 2.302208198f, kCubic2 = 0.1029432397f;  // y / ln 2
  Vec x[M], s[M], st[M];                                                    // st = s (1 - s)
  MIRAS_FN explicit Gelus(const Vec* of) {
    const Vec magic = broadcast(12582912.0f);
    Vec exponent[M], shifted[M], e[M], large[M], small[M];
    in_turn<M>([&](int m) MIRAS_LAMBDA { x[m] = of[m]; });
    in_turn<M>([&](int m) MIRAS_LAMBDA { exponent[m] = kLinear2 + kCubic2 * x[m] * x[m]; });
    in_turn<M>([&](int m) MIRAS_LAMBDA { exponent[m] *= x[m]; });
    in_turn<M>([&](int m) MIRAS_LAMBDA { exponent[m] = (Vec)((IVec)exponent[m] | int32_t(0x80000000)); });  // -|y| / ln 2
    in_turn<M>([&](int m) MIRAS_LAMBDA { exponent[m] = larger(exponent[m], broadcast(-127.0f)); });         // 2^-127 is zero here
    in_turn<M>([&](int m) MIRAS_LAMBDA { shifted[m] = exponent[m] + magic; });  // its rounding is in the last bits
    in_turn<M>([&](int m) MIRAS_LAMBDA { exponent[m] -= shifted[m] - magic; });
    exp2_minus_one<M>(exponent, e);
    in_turn<M>([&](int m) MIRAS_LAMBDA { shifted[m] = (Vec)(((IVec)shifted[m] + 127) << 23); });
    in_turn<M>([&](int m) MIRAS_LAMBDA { e[m] = shifted[m] + shifted[m] * e[m]; });
    in_turn<M>([&](int m) MIRAS_LAMBDA { large[m] = 1.0f / (1.0f + e[m]); });
    in_turn<M>([&](int m) MIRAS_LAMBDA { small[m] = e[m] * large[m]; });  // s of |y| and of -|y|
    in_turn<M>([&](int m) MIRAS_LAMBDA { s[m] = where_negative(x[m], small[m], large[m]); });
    in_turn<M>([&](int m) MIRAS_LAMBDA { st[m] = small[m] * large[m]; });
  }
  MIRAS_FN Vec dy(int m) const { return kLinear + (3.0f * kCubic) * x[m] * x[m]; }
  MIRAS_FN Vec value(int m) const { return x[m] * s[m]; }
  MIRAS_FN Vec slope(int m) const { return s[m] + x[m] * (dy(m) * st[m]); }
  MIRAS_FN Vec curvature(int m) const {
    const Vec ds = dy(m) * st[m];
    return 2.0f * ds + x[m] * ((6.0f * kCubic) * x[m] * st[m] + dy(m) * ds * (1.0f - 2.0f * s[m]));
  }
};
constexpr int kGelus = kLanes == 16 ? 1 : 4;  // vectors at a time of a matrix; 4 were not measured with AVX-512

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
