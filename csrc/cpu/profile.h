// How long the stages of a chunk take, in a build with MIRAS_PROFILE; without it a mark is nothing.
//
//   MIRAS_PASS("backward");                       what the marks that follow belong to
//   MIRAS_STAGE("read-out", operations, floats);  from here to the next mark, with its useful operations, and what it reads and writes
#pragma once

#ifdef MIRAS_PROFILE

#include <string>
#include <tuple>
#include <vector>

#define MIRAS_PASS(name) ::miras::cpu::begin_pass(name)
#define MIRAS_STAGE(name, operations, floats) ::miras::cpu::begin_stage(name, double(operations), 4.0 * double(floats))

namespace miras::cpu {

void begin_pass(const char* name);  // null: nothing is counted until the next one
void begin_stage(const char* name, double operations, double bytes);

// Of the calling thread, and zero again afterwards: pass, stage, how often, ticks of the time stamp counter, operations, bytes.
std::vector<std::tuple<std::string, std::string, double, double, double, double>> take_stages();

}  // namespace miras::cpu

#else

#define MIRAS_PASS(name) static_cast<void>(0)
#define MIRAS_STAGE(name, operations, floats) static_cast<void>(0)

#endif
