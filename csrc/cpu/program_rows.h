// A user's expression applied to the rows of a chunk: write, grade and pull_back of bias_rows.h for a Program. It is interpreted over blocks
// of rows that stay in the first-level cache: one dispatch per instruction and block, and a loop over vectors inside.
#pragma once

#include "../program.h"
#include "bias_rows.h"
#include "scratch.h"

namespace miras::cpu::MIRAS_LEVEL {

// Where the values of a block of rows are: vector i is one of `given`, or in `scratch`.
struct Frame {
  float* given[kGiven];
  float* scratch;
  index_t size;  // of a vector in scratch
  const float* constants;
  int constant_count;
  const float* row_values;  // kPad floats for each scalar that is not a constant, one per row
  int rows, cols;           // rows of cols floats, contiguous

  MIRAS_FN float* vector(int i) const { return i < kGiven ? given[i] : scratch + (i - kGiven) * size; }
  MIRAS_FN float scalar(int i, int row) const { return i < constant_count ? constants[i] : row_values[(i - constant_count) * kPad + row]; }
};

// to = f(operands); bit k of kScalars: operand k is a scalar
template <int kScalars, int kOperands, class Function> MIRAS_INLINE void each(const Frame& f, const Instruction& i, Function&& function) {
  static_assert(kOperands <= 3);
  const float* from[3] = {};
  for (int k = 0; k < kOperands; ++k)
    if (!(kScalars >> k & 1)) from[k] = f.vector(i.operands[k]);
  float* to = f.vector(i.to);
  const int rows = kScalars == 0 ? 1 : f.rows;
  const index_t cols = kScalars == 0 ? index_t(f.rows) * f.cols : f.cols;
  index_t at = 0;
  for (int r = 0; r < rows; ++r) {
    Vec x[3] = {};
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
      case Operation::add: apply<2>(f, i, [](Vec a, Vec b, Vec) MIRAS_LAMBDA { return a + b; }); break;
      case Operation::sub: apply<2>(f, i, [](Vec a, Vec b, Vec) MIRAS_LAMBDA { return a - b; }); break;
      case Operation::mul: apply<2>(f, i, [](Vec a, Vec b, Vec) MIRAS_LAMBDA { return a * b; }); break;
      case Operation::div: apply<2>(f, i, [](Vec a, Vec b, Vec) MIRAS_LAMBDA { return a / b; }); break;
      case Operation::neg: apply<1>(f, i, [](Vec a, Vec, Vec) MIRAS_LAMBDA { return -a; }); break;
      case Operation::abs: apply<1>(f, i, [](Vec a, Vec, Vec) MIRAS_LAMBDA { return M::abs(a); }); break;
      case Operation::sign: apply<1>(f, i, [=](Vec a, Vec, Vec) MIRAS_LAMBDA { return a == a && a != zero ? M::copysign(one, a) : a; }); break;
      case Operation::sqrt: apply<1>(f, i, [](Vec a, Vec, Vec) MIRAS_LAMBDA { return M::sqrt(a); }); break;
      case Operation::exp: apply<1>(f, i, [](Vec a, Vec, Vec) MIRAS_LAMBDA { return M::exp(a); }); break;
      case Operation::log: apply<1>(f, i, [](Vec a, Vec, Vec) MIRAS_LAMBDA { return M::log(a); }); break;
      case Operation::tanh: apply<1>(f, i, [](Vec a, Vec, Vec) MIRAS_LAMBDA { return M::tanh(a); }); break;
      case Operation::min: apply<2>(f, i, [](Vec a, Vec b, Vec) MIRAS_LAMBDA { return M::min(a, b); }); break;
      case Operation::max: apply<2>(f, i, [](Vec a, Vec b, Vec) MIRAS_LAMBDA { return M::max(a, b); }); break;
      case Operation::power: {
        const float exponent = f.constants[i.operands[1]];
        apply<2>(f, i, [=](Vec a, Vec, Vec) MIRAS_LAMBDA { return M::pow(a, exponent); });
        break;
      }
      case Operation::le: apply<2>(f, i, [=](Vec a, Vec b, Vec) MIRAS_LAMBDA { return a <= b ? one : zero; }); break;
      case Operation::lt: apply<2>(f, i, [=](Vec a, Vec b, Vec) MIRAS_LAMBDA { return a < b ? one : zero; }); break;
      case Operation::where: apply<3>(f, i, [=](Vec c, Vec a, Vec b) MIRAS_LAMBDA { return c != zero ? a : b; }); break;
      case Operation::copy: apply<1>(f, i, [](Vec a, Vec, Vec) MIRAS_LAMBDA { return a; }); break;
    }
  }
}

// One stage over the rows of a chunk, block by block.
class ProgramRows {
 public:
  // Few enough floats for the vectors in scratch to stay in the first-level cache, enough for a dispatch to cost little.
  static constexpr int kBlock = 512, kCache = 6144;

  MIRAS_FN ProgramRows(const BiasRows& x, const Stage* stages) : x_(x), stage_(stages[x.per_channel]) {
    const int vectors = stage_.elements.vectors - kGiven, fitting = vectors ? kCache / vectors : kBlock;
    rows_ = minimum(fitting < kBlock ? fitting : kBlock, kPad * x.cols) / x.cols;
    rows_ = rows_ < 1 ? 1 : minimum(rows_, x.c);
    const index_t size = index_t(rows_) * x.cols, row_floats = index_t(stage_.rows.vectors) * kPad;
    const size_t all = size_t(row_floats + vectors * size);
    row_values_ = thread_scratch(all, 1);
    allow(row_values_, all);
    frame_ = {{}, row_values_ + row_floats, size, x.program->constants, x.program->constant_count, row_values_, 0, x.cols};
  }

  MIRAS_FN int rows() const { return rows_; }
  MIRAS_FN const float* output(int i) const { return stage_.outputs[i] < 0 ? nullptr : frame_.vector(stage_.outputs[i]); }

  // Rows [t, t + rows), whose errors and psi are given
  MIRAS_FN void run(int t, int rows, float* e, float* psi) {
    const int cols = x_.cols;
    float* const delta = const_cast<float*>(x_.delta);  // never written
    if (stage_.rows.count || x_.program->couples_row || x_.program->uses_delta) {
      for (int r = 0; r < kPad; ++r) {
        Vec norm2 = zeros();
        if (r < rows && x_.program->couples_row)
          for (int j = 0; j < cols; j += kLanes) norm2 += load(e + r * cols + j) * load(e + r * cols + j);
        row_values_[r] = sum(norm2);
        row_values_[kPad + r] = r < rows && delta && !x_.per_channel ? delta[t + r] : 0.0f;
      }
      const Frame rows_only = {{row_values_, row_values_ + kPad, row_values_ + 2 * kPad}, row_values_ + kGiven * kPad, kPad,
                               frame_.constants, frame_.constant_count, nullptr, 1, round_up(rows, kLanes)};
      interpret(rows_only, stage_.rows);
    }
    frame_.given[0] = e, frame_.given[1] = x_.per_channel ? delta + index_t(t) * cols : nullptr, frame_.given[kPsi] = psi;
    frame_.rows = rows;
    interpret(frame_, stage_.elements);
  }

 private:
  const BiasRows& x_;
  const Stage& stage_;
  int rows_;
  float* row_values_;
  Frame frame_;
};

// As BiasKernels
template <bool kChannelEta> struct ProgramKernels {
  using Rows = BiasKernels<L2, kChannelEta>;

  // E over K W0'
  MIRAS_INLINE void errors(const BiasRows& x, int t, int rows, float* kw_e) {
    for (int r = 0; r < rows; ++r, kw_e += x.cols) {
      const float* v = x.v + (t + r) * x.ldv;
      for (int j = 0; j < x.cols; j += kLanes) store(kw_e + j, load(kw_e + j) - load(v + j));
    }
  }

  static void write(const BiasRows& x, float* kw_u, const float* to_end, float* u_end) {
    ProgramRows program(x, x.program->value);
    for (int first = 0; first < x.c; first += program.rows()) {
      const int rows = minimum(program.rows(), x.c - first);
      float* u = kw_u + index_t(first) * x.cols;
      errors(x, first, rows, u);
      program.run(first, rows, u, u);
      for (int t = first; t < first + rows; ++t, u += x.cols) {
        const Vec eta = Rows::row_eta(x, t), end = to_end ? broadcast(to_end[t]) : zeros();
        for (int j = 0; j < x.cols; j += kLanes) {
          const Vec uj = Rows::eta_at(x, t, j, eta) * load(u + j);
          store(u + j, uj);
          if (to_end) store(u_end + index_t(t) * x.cols + j, end * uj);
        }
      }
    }
  }

  static void grade(const BiasRows& x, float* kw_e, float* g) {
    ProgramRows program(x, x.program->value);
    for (int t = 0; t < x.c; t += program.rows()) {
      const int rows = minimum(program.rows(), x.c - t);
      const index_t at = index_t(t) * x.cols;
      errors(x, t, rows, kw_e + at);
      program.run(t, rows, kw_e + at, g + at);
    }
  }

  static void pull_back(const BiasRows& x, const float* e_, const float* g_, float* du_de, float* deta, float* ddelta) {
    float *e = const_cast<float*>(e_), *g = const_cast<float*>(g_);  // given to a stage that only reads them
    const bool uses_delta = x.program->uses_delta;
    ProgramRows program(x, x.program->derivatives);
    for (int first = 0; first < x.c; first += program.rows()) {
      const int rows = minimum(program.rows(), x.c - first);
      program.run(first, rows, e, g);
      const float *slope = program.output(0), *pull = program.output(1), *slope_delta = uses_delta ? program.output(2) : nullptr;
      for (int r = 0, t = first; r < rows; ++r, ++t, e += x.cols, g += x.cols, du_de += x.cols) {
        const index_t row = index_t(r) * x.cols;
        const Vec eta = Rows::row_eta(x, t);
        Vec along = zeros(), eta_sum = zeros(), delta_sum = zeros();
        if (pull) {
          for (int j = 0; j < x.cols; j += kLanes) along += load(pull + row + j) * (Rows::eta_at(x, t, j, eta) * load(du_de + j));
          along = broadcast(sum(along));
        }
        for (int j = 0; j < x.cols; j += kLanes) {
          const Vec du = load(du_de + j), y = Rows::eta_at(x, t, j, eta) * du;
          if constexpr (kChannelEta) store(deta + index_t(t) * x.cols + j, du * load(g + j));
          else eta_sum += du * load(g + j);
          Vec de = slope ? load(slope + row + j) * y : zeros();
          if (pull) de += along * load(e + j);
          store(du_de + j, de);
          if (!uses_delta) continue;
          const Vec per_delta = slope_delta ? load(slope_delta + row + j) * y : zeros();
          if (x.per_channel) store(ddelta + index_t(t) * x.cols + j, per_delta);
          else delta_sum += per_delta;
        }
        if constexpr (!kChannelEta) deta[t] = sum(eta_sum);
        if (uses_delta && !x.per_channel) ddelta[t] = sum(delta_sum);
      }
    }
  }
};

}  // namespace miras::cpu::MIRAS_LEVEL
