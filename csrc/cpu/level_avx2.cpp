// The kernels at level avx2: 8 lanes, 16 registers.
#include "capability.h"
#include "profile.h"
#include "scratch.h"

#if defined(__x86_64__)
#include <immintrin.h>  // before the target changes

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define MIRAS_LEVEL avx2
#define MIRAS_LANES 8
#include "block_backward.h"
#include "block_forward.h"
#include "keyed_backward.h"
#include "keyed_forward.h"
#include "linear_backward.h"
#include "linear_forward.h"
#include "linear_step.h"
#include "mlp_backward.h"
#include "mlp_forward.h"
#include "mlp_step.h"
#include "peak.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace miras::cpu {

const Kernels* avx2_kernels() {
  static constexpr Kernels table = {"avx2",
                                    avx2::linear_forward,
                                    avx2::linear_backward,
                                    avx2::block_forward,
                                    avx2::block_backward,
                                    avx2::keyed_forward,
                                    avx2::keyed_backward,
                                    avx2::mlp_forward,
                                    avx2::mlp_backward,
                                    avx2::linear_step,
                                    avx2::mlp_step,
                                    avx2::multiply_adds};
  return &table;
}

}  // namespace miras::cpu

#else

namespace miras::cpu {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace miras::cpu

#endif
