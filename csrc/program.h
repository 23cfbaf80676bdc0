// A user's expression, a bias or a retention gate (docs/your-own-bias.md), as the kernels run it: instructions over blocks of rows. Written by
// compile.cpp, read by cpu/interpret.h; no ownership, no standard library, since kernels of every instruction set include it.
#pragma once

#include <cstdint>

namespace miras {

// name, number of operands: as OPERATIONS of python/miras_kernels/expressions/program.py, in its order
#define MIRAS_OPERATIONS(OPERATION)                         \
  OPERATION(add, 2)   /* a + b */                           \
  OPERATION(sub, 2)   /* a - b */                           \
  OPERATION(mul, 2)   /* a b */                             \
  OPERATION(div, 2)   /* a / b */                           \
  OPERATION(neg, 1)   /* -a */                              \
  OPERATION(abs, 1)   /* |a| */                             \
  OPERATION(sign, 1)  /* 1, 0 or -1 */                      \
  OPERATION(sqrt, 1)  /* sqrt */                            \
  OPERATION(exp, 1)   /* exp */                             \
  OPERATION(log, 1)   /* log */                             \
  OPERATION(tanh, 1)  /* tanh */                            \
  OPERATION(min, 2)   /* min */                             \
  OPERATION(max, 2)   /* max */                             \
  OPERATION(power, 2) /* a to the constant b > 0, a >= 0 */ \
  OPERATION(le, 2)    /* 1 if a <= b, else 0 */             \
  OPERATION(lt, 2)    /* 1 if a < b, else 0 */              \
  OPERATION(where, 3) /* b if a is not 0, else c */

#define MIRAS_OPERATION_NAME(name, operands) name,
enum class Operation : uint8_t { MIRAS_OPERATIONS(MIRAS_OPERATION_NAME) copy };  // copy: of a scalar

// An operand is a vector, one number for every element of a block, or a scalar, the same along a row.
struct Instruction {
  Operation operation;
  uint8_t scalars;  // bit i: operand i is a scalar
  uint16_t to;      // a vector
  uint16_t operands[3];
};

struct Code {
  const Instruction* instructions;
  int count;
  int vectors;  // how many it reads or writes, kGiven at least
};

// What is computed once per row, as vectors over rows, and what once per element. Vectors of `rows`: 0 is norm2, 1 is delta. Vectors of
// `elements`: 0 is e, 1 is delta if it is per channel, 2 is psi. Scalars: the constants, then, for `elements`, the vectors of `rows`.
constexpr int kGiven = 3;
constexpr int kPsi = 2;
struct Stage {
  Code rows, elements;
  int outputs[3];  // vectors of `elements`, -1 if constantly 0
};

// psi, which `value` writes to vector kPsi, and from e and psi its slope, pull and slope_delta (bias.h). A retention gate has one input, A
// in the place of e, and phi and its slope in the places of psi and its slope.
struct Program {
  int inputs;
  const float* constants;
  int constant_count;
  bool couples_row, uses_delta;
  Stage value[2], derivatives[2];  // [delta is per channel]
};

}  // namespace miras
