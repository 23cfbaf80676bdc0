// The instruction set levels: one table of kernels for each, chosen once at run time.
#pragma once

#include <string>
#include <vector>

#include "../params.h"

namespace miras::cpu {

// Kernels work on tasks [first, last) of params.tasks(): one head of one sequence each, or (linear) a panel of its
// value rows.
struct Kernels {
  const char* name;
  void (*linear_forward)(const LinearForward&, int64_t first, int64_t last);
  void (*linear_backward)(const LinearBackward&, int64_t first, int64_t last);
  void (*block_forward)(const LinearForward&, int64_t first, int64_t last);
  void (*block_backward)(const LinearBackward&, int64_t first, int64_t last);
  void (*keyed_forward)(const LinearForward&, int64_t first, int64_t last);
  void (*keyed_backward)(const LinearBackward&, int64_t first, int64_t last);
  void (*mlp_forward)(const MlpForward&, int64_t first, int64_t last);
  void (*mlp_backward)(const MlpBackward&, int64_t first, int64_t last);
  void (*linear_step)(const LinearStep&, int64_t first, int64_t last);
  void (*mlp_step)(const MlpStep&, int64_t first, int64_t last);
  float (*multiply_adds)(int64_t operations);
};

// Null if the compiler or the architecture has no such level. Defined in level_*.cpp.
const Kernels* avx512_bf16_kernels();
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* portable_kernels();

// The levels that this machine can run, best first; those that it can run, but that are taken only by name.
std::vector<std::string> capabilities();
std::vector<std::string> capabilities_by_name();

// The best level, or the one that the environment variable MIRAS_CPU_CAPABILITY names; throws if this machine does not have it.
const Kernels& kernels();

}  // namespace miras::cpu
