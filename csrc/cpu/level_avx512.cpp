// The kernels at level avx512: 16 lanes, 32 registers.
#include "capability.h"
#include "profile.h"
#include "scratch.h"

#if defined(__x86_64__)
#include <immintrin.h>  // before the target changes

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#define MIRAS_LEVEL avx512
#define MIRAS_LANES 16
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

const Kernels* avx512_kernels() {
  static constexpr Kernels table = {"avx512",
                                    avx512::linear_forward,
                                    avx512::linear_backward,
                                    avx512::block_forward,
                                    avx512::block_backward,
                                    avx512::keyed_forward,
                                    avx512::keyed_backward,
                                    avx512::mlp_forward,
                                    avx512::mlp_backward,
                                    avx512::linear_step,
                                    avx512::mlp_step,
                                    avx512::multiply_adds};
  return &table;
}

}  // namespace miras::cpu

#else

namespace miras::cpu {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace miras::cpu

#endif
