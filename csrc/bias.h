// Attentional biases: psi(e), the gradient of the inner loss in the prediction, and its derivatives (docs/mathematics.md, section 4).
//
// A bias is a functor over a number type F: a SIMD vector on the CPU, `float` in CUDA. `Math<F>` has the functions.
//
//   Row<F> row(norm2, delta)   what the elements of a row of e share: delta itself, or coefficients from |e|^2 if kCouplesRow
//   F value(e, row)            psi(e)
//   F slope(e, g, row)         the diagonal part of d psi / d e, given g = psi(e)
//   F slope_delta(e, row)      d psi / d delta                                        (if kUsesDelta)
//   F pull(e, row)             d psi / d e = diag(slope) + pull e'                     (if kCouplesRow)
//
// so that, for an incoming y:  dE = slope y + (pull.y) e,   d delta = sum slope_delta y.
// psi(0) = 0 for all of them: zero padding stays zero.
//
// Biases with a Program are not among them: cpu/program_rows.h. Adding a bias: docs/adding-a-bias.md.
#pragma once

#include "params.h"

namespace miras {

template <class F> struct Math;  // abs, sqrt, min, max, copysign, tanh, sech2, pow, exp_nonpositive: cpu/math.h, cuda/math.h

struct Elementwise {
  static constexpr bool kPredicts = true;     // psi needs the prediction K W'
  static constexpr bool kCouplesRow = false;  // psi depends on |e|
  static constexpr bool kUsesDelta = false;
  template <class F> using Row = F;  // delta, one per token or per value channel
  template <class F> MIRAS_FN F row(F, F delta) const { return delta; }
  template <class F> MIRAS_FN F slope_delta(F, F) const { return F{}; }
  template <class F> MIRAS_FN F pull(F, F) const { return F{}; }
};

// psi = -v: Hebbian. The kernels pass e = -v and skip everything that depends on the prediction.
struct DotProduct : Elementwise {
  static constexpr const char* kName = "dot";
  static constexpr bool kPredicts = false;
  MIRAS_FN explicit DotProduct(const float*) {}
  template <class F> MIRAS_FN F value(F e, F) const { return e; }
  template <class F> MIRAS_FN F slope(F, F, F) const { return F{} + 1.0f; }
};

// psi = e
struct L2 : Elementwise {
  static constexpr const char* kName = "l2";
  MIRAS_FN explicit L2(const float*) {}
  template <class F> MIRAS_FN F value(F e, F) const { return e; }
  template <class F> MIRAS_FN F slope(F, F, F) const { return F{} + 1.0f; }
};

// psi = tanh(s e),  psi' = s (1 - tanh^2)
struct L1 : Elementwise {
  static constexpr const char* kName = "l1";
  float sharpness;
  MIRAS_FN explicit L1(const float* p) : sharpness(p[0]) {}
  template <class F> MIRAS_FN F value(F e, F) const { return Math<F>::tanh(sharpness * e); }
  template <class F> MIRAS_FN F slope(F e, F, F) const { return sharpness * Math<F>::sech2(sharpness * e); }
};

// psi = p sign(e) |e|^(p-1),  psi' = p (p-1) |e|^(p-2) = (p-1) psi / e
struct Lp : Elementwise {
  static constexpr const char* kName = "lp";
  float p;
  MIRAS_FN explicit Lp(const float* params) : p(params[0]) {}
  template <class F> MIRAS_FN F value(F e, F) const {
    if (p == 3.0f) return (3.0f * e) * Math<F>::abs(e);
    if (p == 2.0f) return 2.0f * e;
    return p * Math<F>::copysign(Math<F>::pow(Math<F>::abs(e), p - 1.0f), e);
  }
  template <class F> MIRAS_FN F slope(F e, F g, F) const {
    if (p == 3.0f) return 6.0f * Math<F>::abs(e);
    if (p == 2.0f) return F{} + 2.0f;
    return e == F{} ? F{} : (p - 1.0f) * g / e;
  }
};

// psi = p tanh(s e) m^((p-1)/2) with m = e^2 + eps,  psi' = p m^((p-1)/2) (s sech^2(s e) + (p-1) tanh(s e) e / m)
struct LpSmooth : Elementwise {
  static constexpr const char* kName = "lp_smooth";
  float p, sharpness, eps;
  MIRAS_FN explicit LpSmooth(const float* params) : p(params[0]), sharpness(params[1]), eps(params[2]) {}
  template <class F> MIRAS_FN F scale(F m) const {
    if (p == 3.0f) return 3.0f * m;
    if (p == 2.0f) return 2.0f * Math<F>::sqrt(m);
    return p * Math<F>::pow(m, 0.5f * (p - 1.0f));
  }
  template <class F> MIRAS_FN F value(F e, F) const { return Math<F>::tanh(sharpness * e) * scale(e * e + eps); }
  template <class F> MIRAS_FN F slope(F e, F, F) const {
    const F m = e * e + eps;
    const F h = Math<F>::tanh(sharpness * e);
    return scale(m) * (sharpness * Math<F>::sech2(sharpness * e) + (p - 1.0f) * h * e / m);
  }
};

// psi = clip(e, -delta, delta); ties count as inside
struct HuberCoordinate : Elementwise {
  static constexpr const char* kName = "huber_coordinate";
  static constexpr bool kUsesDelta = true;
  MIRAS_FN explicit HuberCoordinate(const float*) {}
  template <class F> MIRAS_FN F value(F e, F delta) const { return Math<F>::max(-delta, Math<F>::min(e, delta)); }
  template <class F> MIRAS_FN F slope(F e, F, F delta) const { return Math<F>::abs(e) <= delta ? F{} + 1.0f : F{}; }
  template <class F> MIRAS_FN F slope_delta(F e, F delta) const {
    return Math<F>::abs(e) <= delta ? F{} : Math<F>::copysign(F{} + 1.0f, e);
  }
};

struct RowCoupled : Elementwise {
  static constexpr bool kCouplesRow = true;
  static constexpr bool kUsesDelta = true;
};

// psi = e if |e| <= delta, else delta e / |e|
struct HuberNorm : RowCoupled {
  static constexpr const char* kName = "huber_norm";
  template <class F> struct Row {
    F scale, per_delta, pull;
  };
  MIRAS_FN explicit HuberNorm(const float*) {}
  template <class F> MIRAS_FN Row<F> row(F norm2, F delta) const {
    const F norm = Math<F>::sqrt(norm2), one = F{} + 1.0f;
    const F inverse = norm <= delta ? F{} : one / norm;
    const F scale = norm <= delta ? one : delta * inverse;
    return {scale, inverse, -(delta * inverse) * inverse * inverse};
  }
  template <class F> MIRAS_FN F value(F e, Row<F> r) const { return r.scale * e; }
  template <class F> MIRAS_FN F slope(F, F, Row<F> r) const { return r.scale; }
  template <class F> MIRAS_FN F slope_delta(F e, Row<F> r) const { return r.per_delta * e; }
  template <class F> MIRAS_FN F pull(F e, Row<F> r) const { return r.pull * e; }
};

// psi = e if |e| <= delta, else delta tanh(s e); the switch itself has no gradient
struct HuberSwitch : RowCoupled {
  static constexpr const char* kName = "huber_switch";
  float sharpness;
  template <class F> struct Row {
    F norm, delta;
  };
  MIRAS_FN explicit HuberSwitch(const float* p) : sharpness(p[0]) {}
  template <class F> MIRAS_FN Row<F> row(F norm2, F delta) const { return {Math<F>::sqrt(norm2), delta}; }
  template <class F> MIRAS_FN F value(F e, Row<F> r) const { return r.norm <= r.delta ? e : r.delta * Math<F>::tanh(sharpness * e); }
  template <class F> MIRAS_FN F slope(F e, F, Row<F> r) const {
    return r.norm <= r.delta ? F{} + 1.0f : r.delta * sharpness * Math<F>::sech2(sharpness * e);
  }
  template <class F> MIRAS_FN F slope_delta(F e, Row<F> r) const { return r.norm <= r.delta ? F{} : Math<F>::tanh(sharpness * e); }
  template <class F> MIRAS_FN F pull(F, Row<F>) const { return F{}; }
};

// psi = e (1 + delta / sqrt(|e|^2 + eps))
struct RobustL2 : RowCoupled {
  static constexpr const char* kName = "robust_l2";
  float eps;
  template <class F> struct Row {
    F scale, per_delta, pull;
  };
  MIRAS_FN explicit RobustL2(const float* p) : eps(p[0]) {}
  template <class F> MIRAS_FN Row<F> row(F norm2, F delta) const {
    const F inverse = 1.0f / Math<F>::sqrt(norm2 + eps);
    return {1.0f + delta * inverse, inverse, -(delta * inverse) * inverse * inverse};
  }
  template <class F> MIRAS_FN F value(F e, Row<F> r) const { return r.scale * e; }
  template <class F> MIRAS_FN F slope(F, F, Row<F> r) const { return r.scale; }
  template <class F> MIRAS_FN F slope_delta(F e, Row<F> r) const { return r.per_delta * e; }
  template <class F> MIRAS_FN F pull(F e, Row<F> r) const { return r.pull * e; }
};

// Calls f(bias) with the functor of a tag; a custom bias has none.
template <class Function> MIRAS_FN auto with_bias(BiasTag tag, const float* params, Function&& f) {
  switch (tag) {
    case BiasTag::dot: return f(DotProduct(params));
    case BiasTag::l2: return f(L2(params));
    case BiasTag::l1: return f(L1(params));
    case BiasTag::lp: return f(Lp(params));
    case BiasTag::lp_smooth: return f(LpSmooth(params));
    case BiasTag::huber_coordinate: return f(HuberCoordinate(params));
    case BiasTag::huber_norm: return f(HuberNorm(params));
    case BiasTag::huber_switch: return f(HuberSwitch(params));
    case BiasTag::robust_l2: return f(RobustL2(params));
    case BiasTag::custom: break;
  }
  return f(L2(params));
}

// The traits of a bias; `program` is that of a custom one.
struct BiasTraits {
  const char* name;
  bool predicts, couples_row, uses_delta;
};
MIRAS_FN BiasTraits bias_traits(BiasTag tag, const Program* program = nullptr) {
  if (tag == BiasTag::custom) return {"custom", true, program && program->couples_row, program && program->uses_delta};
  constexpr float no_params[kBiasParams] = {};
  return with_bias(tag, no_params, [](auto bias) {
    using Bias = decltype(bias);
    return BiasTraits{Bias::kName, Bias::kPredicts, Bias::kCouplesRow, Bias::kUsesDelta};
  });
}

}  // namespace miras
