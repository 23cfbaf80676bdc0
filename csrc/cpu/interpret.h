// Interprets a user's expression over blocks of rows that stay in the first-level cache: one dispatch per instruction and block, and a loop
// over vectors inside.
#pragma once

#include "../params.h"
#include "math.h"
#include "scratch.h"

namespace miras::cpu::MIRAS_LEVEL {

// Where the values of a block of rows are: vector i is one of `given`, or in `scratch`.
struct Frame {
  float* given[kGiven];
  float* scratch;
  index_t size;  // of a vector in scratch
  const float* constants;
  int constant_count;
  float* row_values;  // kPad floats for each scalar that is not a constant, one per row
  int rows, cols;     // rows of cols floats, contiguous

  MIRAS_FN float* vector(int i) const { return i < kGiven ? given[i] : scratch + (i - kGiven) * size; }
  MIRAS_FN float scalar(int i, int row) const { return i < constant_count ? constants[i] : row_values[(i - constant_count) * kPad + row]; }
};

// to = f(operands); bit k of kScalars: operand k is a scalar
template <int kScalars, int kOperands, class Function> MIRAS_INLINE void each(const Frame& f, const Instruction& i, Function&& function) {
  static_assert(kOperands <= 3);
  const float* from[3] = {};
  MIRAS_UNROLL
  for (int k = 0; k < kOperands; ++k)
    if (!(kScalars >> k & 1)) from[k] = f.vector(i.operands[k]);
  float* to = f.vector(i.to);
  const int rows = kScalars == 0 ? 1 : f.rows;
  const index_t cols = kScalars == 0 ? index_t(f.rows) * f.cols : f.cols;
  index_t at = 0;
  for (int r = 0; r < rows; ++r) {
    Vec x[3] = {};
    MIRAS_UNROLL
    for (int k = 0; k < kOperands; ++k)
      if (kScalars >> k & 1) x[k] = broadcast(f.scalar(i.operands[k], r));
    for (const index_t end = at + cols; at < end; at += kLanes) {
      MIRAS_UNROLL
      for (int k = 0; k < kOperands; ++k)
        if (!(kScalars >> k & 1)) x[k] = load(from[k] + at);
      store(to + at, function(x[0], x[1], x[2]));
    }
  }
}

template <int kOperands, class Function> MIRAS_INLINE void apply(const Frame& f, const Instruction& i, Function&& function) {
  if constexpr (kOperands == 1) {
    if (i.scalars) each<1, 1>(f, i, function);
    else each<0, 1>(f, i, function);
  } else {
    switch (i.scalars) {
      case 0: return each<0, kOperands>(f, i, function);
      case 1: return each<1, kOperands>(f, i, function);
      case 2: return each<2, kOperands>(f, i, function);
      case 3: return each<3, kOperands>(f, i, function);
    }
    if constexpr (kOperands == 3) {
      switch (i.scalars) {
        case 4: return each<4, 3>(f, i, function);
        case 5: return each<5, 3>(f, i, function);
        case 6: return each<6, 3>(f, i, function);
        case 7: return each<7, 3>(f, i, function);
      }
    }
  }
}

static void interpret(const Frame& f, const Code& code) {
  using M = Math<Vec>;
  const Vec one = broadcast(1.0f), zero = zeros();
  for (const Instruction *at = code.instructions, *end = at + code.count; at < end; ++at) {
    const Instruction& i = *at;
    switch (i.operation) {
      case Operation::add: apply<2>(f, i, [&](Vec a, Vec b, Vec) MIRAS_LAMBDA { return a + b; }); break;
      case Operation::sub: apply<2>(f, i, [&](Vec a, Vec b, Vec) MIRAS_LAMBDA { return a - b; }); break;
      case Operation::mul: apply<2>(f, i, [&](Vec a, Vec b, Vec) MIRAS_LAMBDA { return a * b; }); break;
      case Operation::div: apply<2>(f, i, [&](Vec a, Vec b, Vec) MIRAS_LAMBDA { return a / b; }); break;
      case Operation::neg: apply<1>(f, i, [&](Vec a, Vec, Vec) MIRAS_LAMBDA { return -a; }); break;
      case Operation::abs: apply<1>(f, i, [&](Vec a, Vec, Vec) MIRAS_LAMBDA { return M::abs(a); }); break;
      case Operation::sign:
        apply<1>(f, i, [&](Vec a, Vec, Vec) MIRAS_LAMBDA { return a == a && a != zero ? M::copysign(one, a) : a; });
        break;
      case Operation::sqrt: apply<1>(f, i, [&](Vec a, Vec, Vec) MIRAS_LAMBDA { return M::sqrt(a); }); break;
      case Operation::exp: apply<1>(f, i, [&](Vec a, Vec, Vec) MIRAS_LAMBDA { return M::exp(a); }); break;
      case Operation::log: apply<1>(f, i, [&](Vec a, Vec, Vec) MIRAS_LAMBDA { return M::log(a); }); break;
      case Operation::tanh: apply<1>(f, i, [&](Vec a, Vec, Vec) MIRAS_LAMBDA { return M::tanh(a); }); break;
      case Operation::min: apply<2>(f, i, [&](Vec a, Vec b, Vec) MIRAS_LAMBDA { return M::min(a, b); }); break;
      case Operation::max: apply<2>(f, i, [&](Vec a, Vec b, Vec) MIRAS_LAMBDA { return M::max(a, b); }); break;
      case Operation::power: {
        const float exponent = f.constants[i.operands[1]];
        apply<2>(f, i, [&](Vec a, Vec, Vec) MIRAS_LAMBDA { return M::pow(M::abs(a), exponent); });
        break;
      }
      case Operation::le: apply<2>(f, i, [&](Vec a, Vec b, Vec) MIRAS_LAMBDA { return a <= b ? one : zero; }); break;
      case Operation::lt: apply<2>(f, i, [&](Vec a, Vec b, Vec) MIRAS_LAMBDA { return a < b ? one : zero; }); break;
      case Operation::where: apply<3>(f, i, [&](Vec c, Vec a, Vec b) MIRAS_LAMBDA { return c != zero ? a : b; }); break;
      case Operation::copy: apply<1>(f, i, [&](Vec a, Vec, Vec) MIRAS_LAMBDA { return a; }); break;
    }
  }
}

// One stage over blocks of at most `rows` rows.
class Interpreter {
 public:
  // Few enough floats for the vectors in scratch to stay in the first-level cache, enough for a dispatch to cost little.
  static constexpr int kBlock = 512, kCache = 6144;

  // How many floats of a vector to take at a time
  MIRAS_INLINE int block(const Stage& stage) {
    const int vectors = stage.elements.vectors - kGiven;
    return vectors * kBlock <= kCache ? kBlock : kCache / vectors / kPad * kPad;
  }

  MIRAS_FN Interpreter(const Program& program, const Stage& stage, int rows, int cols) : stage_(stage) {
    const index_t size = index_t(rows) * cols, row_floats = index_t(stage.rows.vectors) * kPad;
    const size_t all = size_t(row_floats + (stage.elements.vectors - kGiven) * size);
    float* const memory = thread_scratch(all, 1);
    allow(memory, all);
    frame_ = {{}, memory + row_floats, size, program.constants, program.constant_count, memory, 0, cols};
  }

  MIRAS_FN const float* output(int i) const { return stage_.outputs[i] < 0 ? nullptr : frame_.vector(stage_.outputs[i]); }

  // kPad floats each, one per row
  MIRAS_FN float* norm2() { return frame_.row_values; }
  MIRAS_FN float* delta() { return frame_.row_values + kPad; }
  // What is the same along a row
  MIRAS_FN void run_rows(int rows) const {
    float* const values = frame_.row_values;
    const Frame vectors = {{values, values + kPad, values + 2 * kPad},
                           values + kGiven * kPad,
                           kPad,
                           frame_.constants,
                           frame_.constant_count,
                           nullptr,
                           1,
                           round_up(rows, kLanes)};
    if (stage_.rows.count) interpret(vectors, stage_.rows);
  }
  // Only psi is written.
  MIRAS_FN void run_elements(int rows, const float* e, const float* delta, float* psi) {
    frame_.given[0] = const_cast<float*>(e), frame_.given[1] = const_cast<float*>(delta), frame_.given[kPsi] = psi;
    frame_.rows = rows;
    interpret(frame_, stage_.elements);
  }
  // One row of `count` elements
  MIRAS_FN void run_elements(int count, const float* a, float* phi) {
    frame_.cols = count;
    run_elements(1, a, nullptr, phi);
  }

 private:
  const Stage& stage_;
  Frame frame_;
};

}  // namespace miras::cpu::MIRAS_LEVEL
