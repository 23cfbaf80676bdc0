// Retention gates: how the primal W = phi(A) follows from the dual A (SPEC section 4). Each gate is a functor with `phi`
// and its vjp side by side, selected by an integer tag. So far there is the identity; the kernels rely on it where they say so.
#pragma once

#include "params.h"

namespace miras {

enum class RetentionTag : int { l2 = 0 };

struct L2Retention {
  static constexpr bool kIdentity = true;  // phi(A) = A and rho = 1: primal and dual share their memory

  template <class F> MIRAS_FN F phi(F a) const { return a; }
  template <class F> MIRAS_FN F phi_vjp(F, F grad) const { return grad; }
};

}  // namespace miras
