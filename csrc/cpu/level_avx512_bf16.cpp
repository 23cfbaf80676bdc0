// The kernels at level avx512_bf16: those of avx512, except that the chunks of both memories with bfloat16 inputs multiply bfloat16
// numbers (operand.h).
#include "capability.h"
#include "profile.h"
#include "scratch.h"

#if defined(__x86_64__) && __has_include(<avx512bf16intrin.h>)
#include <immintrin.h>  // before the target changes

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#endif

#define MIRAS_LEVEL avx512_bf16
#define MIRAS_LANES 16
#define MIRAS_PAIRS
#include "linear_backward.h"
#include "linear_forward.h"
#include "mlp_backward.h"
#include "mlp_forward.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace miras::cpu {
namespace {

// pairs with bfloat16 inputs, else the kernel of that member of avx512's table
template <auto pairs, auto kernel, class Params> void either(const Params& p, int64_t first, int64_t last) {
  (p.dtype == Dtype::bf16 ? pairs : avx512_kernels()->*kernel)(p, first, last);
}

}  // namespace

const Kernels* avx512_bf16_kernels() {
  static const Kernels table = [] {
    Kernels kernels = *avx512_kernels();
    kernels.name = "avx512_bf16";
    kernels.linear_forward = either<avx512_bf16::linear_forward, &Kernels::linear_forward>;
    kernels.linear_backward = either<avx512_bf16::linear_backward, &Kernels::linear_backward>;
    kernels.mlp_forward = either<avx512_bf16::mlp_forward, &Kernels::mlp_forward>;
    kernels.mlp_backward = either<avx512_bf16::mlp_backward, &Kernels::mlp_backward>;
    return kernels;
  }();
  return &table;
}

}  // namespace miras::cpu

#else

namespace miras::cpu {
const Kernels* avx512_bf16_kernels() { return nullptr; }
}  // namespace miras::cpu

#endif
