// Retention gates: the primal W = phi(A) of the dual A, and rho, the factor of a chunk's own writes in its read-outs
// (docs/mathematics.md, section 5), with their derivatives.
//
// A gate is a functor over a number type F, like a bias; `Math<F>` has the functions. It declares which elements of A an
// element of W depends on, and has for an incoming gradient g of W:
//
//   Coupling::none      itself             W = phi(a)                     dA = phi_vjp(w, g)
//   Coupling::row       the last axis      W = factor(sum e) e            dA = phi_vjp(w, g, <w, g>)        e = weight(a, max a)
//   Coupling::matrix    a head's matrix    W = rho a, rho = rho(n)        dA = rho g + pull power_vjp(a)
//                                          n = sum power(a) + offset()    pull = slope(n) (<a, g> + d rho)
//
// The caller computes the sums. rho = 1 except for Coupling::matrix.
//
// A gate with a Program has no functor: cpu/program_rows.h. Adding a gate: docs/adding-a-gate.md.
#pragma once

#include "bias.h"

namespace miras {

enum class Coupling { none, row, matrix };

// phi(A) = A: kernels let primal and dual share their memory
struct L2Retention {
  static constexpr const char* kName = "l2";
  static constexpr bool kIdentity = true;
  static constexpr Coupling kCoupling = Coupling::none;
  MIRAS_FN explicit L2Retention(const float*) {}
  template <class F> MIRAS_FN F phi(F a) const { return a; }
  template <class F> MIRAS_FN F phi_vjp(F, F g) const { return g; }
};

// phi(A) = s A,  rho = s = n^(-(q-2)/q) with n = sum |A|^q + floor^q;  slope(n) = q ds/dn = -(q-2) s / n
struct LqRetention {
  static constexpr const char* kName = "lq";
  static constexpr bool kIdentity = false;
  static constexpr Coupling kCoupling = Coupling::matrix;
  float q, floor;
  MIRAS_FN explicit LqRetention(const float* p) : q(p[0]), floor(p[1]) {}
  template <class F> MIRAS_FN F power(F a) const {
    const F square = a * a;
    if (q == 4.0f) return square * square;
    if (q == 3.0f) return square * Math<F>::abs(a);
    if (q == 2.0f) return square;
    return Math<F>::pow(Math<F>::abs(a), q);
  }
  template <class F> MIRAS_FN F power_vjp(F a) const {  // sign(a) |a|^(q-1)
    if (q == 4.0f) return a * a * a;
    if (q == 3.0f) return a * Math<F>::abs(a);
    if (q == 2.0f) return a;
    return Math<F>::copysign(Math<F>::pow(Math<F>::abs(a), q - 1.0f), a);
  }
  MIRAS_FN double offset() const { return __builtin_pow(double(floor), double(q)); }
  MIRAS_FN double exponent() const { return -(q - 2.0) / q; }
  MIRAS_FN double rho(double n) const { return __builtin_pow(n, exponent()); }
  MIRAS_FN double slope(double n) const { return -(q - 2.0) * rho(n) / n; }
};

// phi(A) = mass softmax(A) over the last axis
struct KLRetention {
  static constexpr const char* kName = "kl";
  static constexpr bool kIdentity = false;
  static constexpr Coupling kCoupling = Coupling::row;
  float mass;
  MIRAS_FN explicit KLRetention(const float* p) : mass(p[0]) {}
  template <class F> MIRAS_FN F weight(F a, F max) const { return Math<F>::exp_nonpositive(a - max); }
  template <class F> MIRAS_FN F factor(F sum) const { return mass / sum; }
  template <class F> MIRAS_FN F phi_vjp(F w, F g, F dot) const { return w * (g - dot / mass); }
};

// phi(A) = sign(A) max(|A| - threshold, 0); no gradient where it is 0
struct ElasticNetRetention {
  static constexpr const char* kName = "elastic";
  static constexpr bool kIdentity = false;
  static constexpr Coupling kCoupling = Coupling::none;
  float threshold;
  MIRAS_FN explicit ElasticNetRetention(const float* p) : threshold(p[0]) {}
  template <class F> MIRAS_FN F phi(F a) const { return Math<F>::copysign(Math<F>::max(Math<F>::abs(a) - threshold, F{}), a); }
  template <class F> MIRAS_FN F phi_vjp(F w, F g) const { return w == F{} ? F{} : g; }
};

// phi(A) = 1 / (1 + exp(-A))
struct SigmoidRetention {
  static constexpr const char* kName = "sigmoid";
  static constexpr bool kIdentity = false;
  static constexpr Coupling kCoupling = Coupling::none;
  MIRAS_FN explicit SigmoidRetention(const float*) {}
  template <class F> MIRAS_FN F phi(F a) const {
    const F z = Math<F>::exp_nonpositive(-Math<F>::abs(a)), larger = 1.0f / (1.0f + z);
    return a < F{} ? z * larger : larger;
  }
  template <class F> MIRAS_FN F phi_vjp(F w, F g) const { return g * w * (1.0f - w); }
};

// Calls f(gate) with the functor of a tag; a custom gate has none.
template <class Function> MIRAS_FN auto with_retention(RetentionTag tag, const float* params, Function&& f) {
  switch (tag) {
    case RetentionTag::l2: return f(L2Retention(params));
    case RetentionTag::lq: return f(LqRetention(params));
    case RetentionTag::kl: return f(KLRetention(params));
    case RetentionTag::elastic: return f(ElasticNetRetention(params));
    case RetentionTag::sigmoid: return f(SigmoidRetention(params));
    case RetentionTag::custom: break;
  }
  return f(L2Retention(params));
}

// The traits of a gate.
struct RetentionTraits {
  const char* name;
  bool identity;
  Coupling coupling;
};
MIRAS_FN RetentionTraits retention_traits(RetentionTag tag) {
  if (tag == RetentionTag::custom) return {"custom", false, Coupling::none};
  constexpr float no_params[kRetentionParams] = {};
  return with_retention(tag, no_params, [](auto gate) {
    using Gate = decltype(gate);
    return RetentionTraits{Gate::kName, Gate::kIdentity, Gate::kCoupling};
  });
}

}  // namespace miras
