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

bool machine_has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

std::vector<const Kernels*> usable() {
  std::vector<const Kernels*> levels;
  if (avx512_kernels() && machine_has_avx512()) levels.push_back(avx512_kernels());
  if (avx2_kernels() && machine_has_avx2()) levels.push_back(avx2_kernels());
  levels.push_back(portable_kernels());
  return levels;
}

}  // namespace

std::vector<std::string> capabilities() {
  std::vector<std::string> names;
  for (const Kernels* level : usable()) names.push_back(level->name);
  return names;
}

const Kernels& kernels() {
  const auto levels = usable();
  const char* asked = std::getenv("MIRAS_CPU_CAPABILITY");
  if (!asked || !*asked) return *levels.front();
  std::string possible;
  for (const Kernels* level : levels) {
    if (std::string(asked) == level->name) return *level;
    possible += (possible.empty() ? "" : ", ") + std::string(level->name);
  }
  throw std::invalid_argument("MIRAS_CPU_CAPABILITY: expected one of " + possible + " (what this machine can run), got '" + asked + "'");
}

}  // namespace miras::cpu
