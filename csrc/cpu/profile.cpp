#include "profile.h"

#ifdef MIRAS_PROFILE

#include <chrono>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <x86intrin.h>
#endif

namespace miras::cpu {
namespace {

struct Stage {
  const char *pass, *name;
  double count, ticks, operations, bytes;
};

thread_local std::vector<Stage> stages;
thread_local const char* current_pass = nullptr;
thread_local Stage* current = nullptr;
thread_local uint64_t began = 0;

uint64_t now() {
#if defined(__x86_64__)
  return __rdtsc();
#else
  return uint64_t(std::chrono::steady_clock::now().time_since_epoch().count());
#endif
}

// Looking up is not counted.
void end_stage() {
  if (current) current->ticks += double(now() - began);
  current = nullptr;
}

}  // namespace

void begin_pass(const char* name) {
  end_stage();
  current_pass = name;
}

void begin_stage(const char* name, double operations, double bytes) {
  end_stage();
  if (!current_pass) return;
  for (Stage& stage : stages)
    if (!std::strcmp(stage.name, name) && !std::strcmp(stage.pass, current_pass)) current = &stage;
  if (!current) current = &stages.emplace_back(Stage{current_pass, name, 0, 0, 0, 0});
  current->count += 1, current->operations += operations, current->bytes += bytes;
  began = now();
}

std::vector<std::tuple<std::string, std::string, double, double, double, double>> take_stages() {
  end_stage();
  std::vector<std::tuple<std::string, std::string, double, double, double, double>> found;
  for (const Stage& x : stages) found.emplace_back(x.pass, x.name, x.count, x.ticks, x.operations, x.bytes);
  stages.clear();
  return found;
}

}  // namespace miras::cpu

#endif
