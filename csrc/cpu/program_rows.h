// A user's bias applied to the rows of a chunk: write, grade and pull_back of bias_rows.h for a Program.
#pragma once

#include "bias_rows.h"
#include "interpret.h"

namespace miras::cpu::MIRAS_LEVEL {

// A stage over the rows of a chunk
class ProgramRows {
 public:
  MIRAS_FN ProgramRows(const BiasRows& x, const Stage* stages)
      : rows(block_rows(x, stages[x.per_channel])), x_(x), program_(*x.p.bias_program),
        interpreter_(program_, stages[x.per_channel], rows, x.cols) {}

  const int rows;  // of a block

  MIRAS_FN const float* output(int i) const { return interpreter_.output(i); }

  // Rows [t, t + count): from e, and psi if the stage reads it
  MIRAS_FN void run(int t, int count, const float* e, float* psi) {
    float *norm2 = interpreter_.norm2(), *delta = interpreter_.delta();
    for (int r = 0; r < kPad; ++r) {
      norm2[r] = r < count && program_.couples_row ? squared_norm(e + r * x_.cols) : 0.0f;
      delta[r] = r < count && x_.delta && !x_.per_channel ? x_.delta[t + r] : 0.0f;
    }
    interpreter_.run_rows(count);
    interpreter_.run_elements(count, e, x_.per_channel ? x_.delta + index_t(t) * x_.cols : nullptr, psi);
  }

 private:
  MIRAS_INLINE int block_rows(const BiasRows& x, const Stage& stage) {
    return minimum(x.c, minimum(kPad, x.cols < Interpreter::block(stage) ? Interpreter::block(stage) / x.cols : 1));
  }
  MIRAS_FN float squared_norm(const float* e) const {
    Vec norm2 = zeros();
    for (int j = 0; j < x_.cols; j += kLanes) norm2 += load(e + j) * load(e + j);
    return sum(norm2);
  }

  const BiasRows& x_;
  const Program& program_;
  Interpreter interpreter_;
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
    ProgramRows program(x, x.p.bias_program->value);
    for (int first = 0; first < x.c; first += program.rows) {
      const int rows = minimum(program.rows, x.c - first);
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
    ProgramRows program(x, x.p.bias_program->value);
    for (int t = 0; t < x.c; t += program.rows) {
      const int rows = minimum(program.rows, x.c - t);
      const index_t at = index_t(t) * x.cols;
      errors(x, t, rows, kw_e + at);
      program.run(t, rows, kw_e + at, g + at);
    }
  }

  static void pull_back(const BiasRows& x, const float* e, const float* g, float* du_de, float* deta, float* ddelta) {
    const bool uses_delta = x.p.bias_program->uses_delta;
    ProgramRows program(x, x.p.bias_program->derivatives);
    for (int first = 0; first < x.c; first += program.rows) {
      const int rows = minimum(program.rows, x.c - first);
      program.run(first, rows, e, const_cast<float*>(g));  // which derivatives only read
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
