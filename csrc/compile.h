// From the straight-line programs of python/miras_kernels/expressions to a Program.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "program.h"

namespace miras {

// Values are numbered: the inputs e, norm2 and delta, or A, then the constants, then the results of the instructions in their order.
struct StraightLine {
  std::vector<double> constants;
  std::vector<std::pair<std::string, std::vector<int>>> instructions;  // the operation, the numbers of its operands
  std::vector<int> outputs;
};

// A Program with its memory.
class CompiledProgram {
 public:
  // 3 inputs: psi; its slope, pull and slope_delta. 1 input: phi; its slope. Throws std::invalid_argument for what is not such a program.
  CompiledProgram(int inputs, const StraightLine& value, const StraightLine& derivatives);
  CompiledProgram(const CompiledProgram&) = delete;

  const Program* get() const { return &program_; }

 private:
  Program program_ = {};
  std::vector<float> constants_;
  std::vector<std::vector<Instruction>> code_;
};

// The names of all operations and their numbers of operands
std::vector<std::pair<std::string, int>> operations();

}  // namespace miras
