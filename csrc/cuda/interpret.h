// A user's expression, interpreted for one element (csrc/program.h has the operations). python/miras_kernels/backends/cuda.py writes the
// program, in device memory:
//
//   count of instructions, output, then for each instruction: operation, to, three operands; then the constants, as float's bits
//
// Numbers of values below kRegisters are registers: the inputs first, then results. The others are constants.
#pragma once

#include "math.h"

namespace miras::cuda {

constexpr int kRegisters = 32, kInstruction = 5;

MIRAS_FN float operate(Operation operation, float a, float b, float c) {
  switch (operation) {
    case Operation::add: return a + b;
    case Operation::sub: return a - b;
    case Operation::mul: return a * b;
    case Operation::div: return a / b;
    case Operation::neg: return -a;
    case Operation::abs: return fabsf(a);
    case Operation::sign: return a > 0.0f ? 1.0f : (a < 0.0f ? -1.0f : a);
    case Operation::sqrt: return sqrtf(a);
    case Operation::exp: return expf(a);
    case Operation::log: return logf(a);
    case Operation::tanh: return tanhf(a);
    case Operation::min: return Math<float>::min(a, b);
    case Operation::max: return Math<float>::max(a, b);
    case Operation::power: return powf(a, b);
    case Operation::le: return a <= b ? 1.0f : 0.0f;
    case Operation::lt: return a < b ? 1.0f : 0.0f;
    case Operation::where: return a != 0.0f ? b : c;
    case Operation::copy: break;
  }
  return a;
}

// Register i of this thread is own[i * kStride].
template <int kStride> __device__ float interpret(const int32_t* program, float* own, float first, float second, float third) {
  own[0] = first, own[kStride] = second, own[2 * kStride] = third;
  const int count = program[0];
  const int32_t *instruction = program + 2, *constants = instruction + kInstruction * count;
  const auto value = [&](int i) { return i < kRegisters ? own[i * kStride] : __int_as_float(constants[i - kRegisters]); };
#pragma unroll 1
  for (int i = 0; i < count; ++i, instruction += kInstruction) {
    const float a = value(instruction[2]), b = value(instruction[3]), c = value(instruction[4]);
    own[instruction[1] * kStride] = operate(Operation(instruction[0]), a, b, c);
  }
  return value(program[1]);
}

}  // namespace miras::cuda
