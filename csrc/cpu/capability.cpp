#include "capability.h"

#include <cstdlib>
#include <stdexcept>

namespace miras::cpu {
namespace {

bool machine_has_avx512() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

bool machine_has_avx512_bf16() {
#if defined(__x86_64__)
  return machine_has_avx512() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

bool machine_has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

using Levels = std::vector<const Kernels*>;

Levels usable() {
  Levels levels;
  if (avx512_kernels() && machine_has_avx512()) levels.push_back(avx512_kernels());
  if (avx2_kernels() && machine_has_avx2()) levels.push_back(avx2_kernels());
  levels.push_back(portable_kernels());
  return levels;
}

// Their results differ from float32's by more than rounding in float32.
Levels usable_by_name() {
  Levels levels;
  if (machine_has_avx512_bf16() && avx512_bf16_kernels()) levels.push_back(avx512_bf16_kernels());
  return levels;
}

std::vector<std::string> names(const Levels& levels) {
  std::vector<std::string> found;
  for (const Kernels* level : levels) found.push_back(level->name);
  return found;
}

}  // namespace

std::vector<std::string> capabilities() { return names(usable()); }
std::vector<std::string> capabilities_by_name() { return names(usable_by_name()); }

const Kernels& kernels() {
  Levels levels = usable();
  const char* asked = std::getenv("MIRAS_CPU_CAPABILITY");
  if (!asked || !*asked) return *levels.front();
  for (const Kernels* level : usable_by_name()) levels.push_back(level);
  std::string possible;
  for (const Kernels* level : levels) {
    if (std::string(asked) == level->name) return *level;
    possible += (possible.empty() ? "" : ", ") + std::string(level->name);
  }
  throw std::invalid_argument("MIRAS_CPU_CAPABILITY: expected one of " + possible + " (what this machine can run), got '" + asked + "'");
}

}  // namespace miras::cpu
