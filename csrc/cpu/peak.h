// A yardstick: multiplications and additions in registers, each waiting only for the one before it in its own chain.
#pragma once

#include "profile.h"
#include "vec.h"

namespace miras::cpu::MIRAS_LEVEL {

// So many chains keep two units busy over eight cycles, and leave registers for the two factors.
#if MIRAS_LANES == 16 || defined(__aarch64__)
constexpr int kChains = 16;
#else
constexpr int kChains = 12;
#endif

// At most so many operations; the result depends on all of them.
static float multiply_adds(int64_t operations) {
  const volatile float given[] = {0.5f, 1.0f};  // read at run time: nothing can be computed before
  const Vec half = broadcast(given[0]), one = broadcast(given[1]);
  Vec chain[kChains];
  MIRAS_UNROLL
  for (int i = 0; i < kChains; ++i) chain[i] = broadcast(given[0] + float(i));
  const int64_t steps = operations / (2 * kLanes * kChains);
  MIRAS_PASS("peak");
  MIRAS_STAGE("multiply-adds", 2 * kLanes * kChains * steps, 0);
  for (int64_t step = 0; step < steps; ++step) {
    MIRAS_UNROLL
    for (int i = 0; i < kChains; ++i) chain[i] = chain[i] * half + one;
  }
  MIRAS_PASS(nullptr);
  Vec total = zeros();
  MIRAS_UNROLL
  for (int i = 0; i < kChains; ++i) total += chain[i];
  return sum(total);
}

}  // namespace miras::cpu::MIRAS_LEVEL
