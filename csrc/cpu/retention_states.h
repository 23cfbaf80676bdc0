// The retention gates applied to a state: the only place where the kernels use phi. Once per chunk, over a whole matrix.
//
// A state is a matrix [rows x cols] in rows of ld floats; columns from cols on are padding, zero in A, W and gradients alike
// (phi(0) need not be 0). Its last axis, which KLRetention normalises over, runs down the columns if the kernels store the matrix
// transposed, else along the rows.
#pragma once

#include "../retention.h"
#include "math.h"
#include "interpret.h"

namespace miras::cpu::MIRAS_LEVEL {

enum class LastAxis { down, along };

struct StateShape {
  int rows, cols;
  index_t ld;
  LastAxis last;

  // f(offset, j) for every vector; j its first column
  template <class Function> MIRAS_FN void each(Function&& f) const {
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < ld; j += kLanes) f(i * ld + j, j);
  }
  // the same for the vectors with padding
  template <class Function> MIRAS_FN void padding(Function&& f) const {
    for (int i = 0; i < rows; ++i)
      for (int j = cols / kLanes * kLanes; j < ld; j += kLanes) f(i * ld + j, j);
  }
  MIRAS_FN Vec without_padding(Vec x, int j) const { return j + kLanes <= cols ? x : first_lanes(x, cols - j); }
  MIRAS_FN Vec instead_of_padding(Vec x, int j, Vec other) const { return iota() < cols - j ? x : other; }
};

// rho of a chunk's start, and what its derivative needs (LqRetention::slope)
struct Rho {
  float value = 1.0f, slope = 0.0f;
};

template <class Gate> struct RetentionKernels {
  // W = phi(A), rho
  static Rho primal(const MemoryParams& p, const StateShape& m, const float* A, float* W) {
    const Gate gate(p.retention_params);
    if constexpr (Gate::kCoupling == Coupling::none) {
      m.each([&](index_t at, int j) MIRAS_LAMBDA { store(W + at, m.without_padding(gate.phi(load(A + at)), j)); });
    } else if constexpr (Gate::kCoupling == Coupling::row) {
      if (m.last == LastAxis::down) normalise_down(gate, m, A, W);
      else normalise_along(gate, m, A, W);
    } else {
      Vec total = zeros();
      m.each([&](index_t at, int) MIRAS_LAMBDA { total += gate.power(load(A + at)); });
      const double n = gate.offset() + sum(total);
      const Rho rho{float(gate.rho(n)), float(gate.slope(n))};
      const Vec scale = broadcast(rho.value);
      m.each([&](index_t at, int) MIRAS_LAMBDA { store(W + at, scale * load(A + at)); });
      return rho;
    }
    return {};
  }

  // dA in place of dW, from d rho
  static void pull_back(const MemoryParams& p, const StateShape& m, const float* A, const float* W, const Rho& rho, float drho,
                        float* dW_dA) {
    const Gate gate(p.retention_params);
    float* const g = dW_dA;
    if constexpr (Gate::kCoupling == Coupling::none) {
      m.each([&](index_t at, int) MIRAS_LAMBDA { store(g + at, gate.phi_vjp(load(W + at), load(g + at))); });
    } else if constexpr (Gate::kCoupling == Coupling::row) {
      if (m.last == LastAxis::down) pull_back_down(gate, m, W, g);
      else pull_back_along(gate, m, W, g);
    } else {
      Vec dot = zeros();
      m.each([&](index_t at, int) MIRAS_LAMBDA { dot += load(A + at) * load(g + at); });
      const Vec scale = broadcast(rho.value), pull = broadcast(rho.slope * (sum(dot) + drho));
      m.each([&](index_t at, int) MIRAS_LAMBDA { store(g + at, scale * load(g + at) + pull * gate.power_vjp(load(A + at))); });
    }
  }

 private:
  MIRAS_INLINE void normalise_down(const Gate& gate, const StateShape& m, const float* A, float* W) {
    for (int j = 0; j < m.ld; j += kLanes) {
      Vec max = load(A + j), total = zeros();
      for (int i = 1; i < m.rows; ++i) max = Math<Vec>::max(max, load(A + i * m.ld + j));
      for (int i = 0; i < m.rows; ++i) {
        const Vec e = gate.weight(load(A + i * m.ld + j), max);
        store(W + i * m.ld + j, e);
        total += e;
      }
      const Vec factor = m.without_padding(gate.factor(total), j);
      for (int i = 0; i < m.rows; ++i) store(W + i * m.ld + j, factor * load(W + i * m.ld + j));
    }
  }

  MIRAS_INLINE void normalise_along(const Gate& gate, const StateShape& m, const float* A, float* W) {
    for (int i = 0; i < m.rows; ++i, A += m.ld, W += m.ld) {
      Vec max = broadcast(A[0]), total = zeros();
      for (int j = 0; j < m.ld; j += kLanes) max = Math<Vec>::max(max, m.instead_of_padding(load(A + j), j, max));
      max = broadcast(largest(max));
      for (int j = 0; j < m.ld; j += kLanes) {
        const Vec e = m.without_padding(gate.weight(load(A + j), max), j);
        store(W + j, e);
        total += e;
      }
      const Vec factor = gate.factor(broadcast(sum(total)));
      for (int j = 0; j < m.ld; j += kLanes) store(W + j, factor * load(W + j));
    }
  }

  MIRAS_INLINE void pull_back_down(const Gate& gate, const StateShape& m, const float* W, float* g) {
    for (int j = 0; j < m.ld; j += kLanes) {
      Vec dot = zeros();
      for (int i = 0; i < m.rows; ++i) dot += load(W + i * m.ld + j) * load(g + i * m.ld + j);
      for (int i = 0; i < m.rows; ++i) {
        const index_t at = i * m.ld + j;
        store(g + at, gate.phi_vjp(load(W + at), load(g + at), dot));
      }
    }
  }

  MIRAS_INLINE void pull_back_along(const Gate& gate, const StateShape& m, const float* W, float* g) {
    for (int i = 0; i < m.rows; ++i, W += m.ld, g += m.ld) {
      Vec dot = zeros();
      for (int j = 0; j < m.ld; j += kLanes) dot += load(W + j) * load(g + j);
      dot = broadcast(sum(dot));
      for (int j = 0; j < m.ld; j += kLanes) store(g + j, gate.phi_vjp(load(W + j), load(g + j), dot));
    }
  }
};

// A user's gate: elementwise, rho = 1
struct ProgramStates {
  static Rho primal(const MemoryParams& p, const StateShape& m, const float* A, float* W) {
    run(p, p.retention_program->value[0], m, A, W, [](const Interpreter&, index_t, int) MIRAS_LAMBDA {});
    m.padding([&](index_t at, int j) MIRAS_LAMBDA { store(W + at, m.without_padding(load(W + at), j)); });
    return {};
  }

  static void pull_back(const MemoryParams& p, const StateShape& m, const float* A, const float* W, const Rho&, float, float* dW_dA) {
    float* const phi = const_cast<float*>(W);  // which derivatives only read
    run(p, p.retention_program->derivatives[0], m, A, phi, [&](const Interpreter& program, index_t first, int count) MIRAS_LAMBDA {
      const float* slope = program.output(0);
      float* const g = dW_dA + first;
      for (int i = 0; i < count; i += kLanes) store(g + i, slope ? load(slope + i) * load(g + i) : zeros());
    });
    // where W is 0 and not phi, the slope may be NaN
    m.padding([&](index_t at, int j) MIRAS_LAMBDA { store(dW_dA + at, m.without_padding(load(dW_dA + at), j)); });
  }

 private:
  // f(program, first, count) after every block
  template <class Function>
  MIRAS_INLINE void run(const MemoryParams& p, const Stage& stage, const StateShape& m, const float* A, float* W, Function&& f) {
    const int block = Interpreter::block(stage);
    Interpreter program(*p.retention_program, stage, 1, block);
    program.run_rows(1);
    for (index_t first = 0, size = m.rows * m.ld; first < size; first += block) {
      const int count = int(size - first < block ? size - first : block);
      program.run_elements(count, A + first, W + first);
      f(program, first, count);
    }
  }
};

// The gate of a call.
class Retention {
 public:
  // `p` is read as long as this lives.
  MIRAS_FN explicit Retention(const MemoryParams& p) : p_(&p) {
    const RetentionTraits traits = retention_traits(p.retention);
    identity = traits.identity, scales_reads = traits.coupling == Coupling::matrix;
    if (p.retention == RetentionTag::custom) {
      primal_ = ProgramStates::primal, pull_back_ = ProgramStates::pull_back;
      return;
    }
    with_retention(p.retention, p.retention_params, [this]<class Gate>(const Gate&) {
      primal_ = RetentionKernels<Gate>::primal, pull_back_ = RetentionKernels<Gate>::pull_back;
    });
  }

  bool identity;      // W = A: nothing is called and nothing is copied
  bool scales_reads;  // rho is not 1

  // W = phi(A), rho
  MIRAS_FN Rho primal(const StateShape& m, const float* A, float* W) const { return primal_(*p_, m, A, W); }
  // d A = phi'(A)^T [d W] + d rho d rho / d A, in place of d W
  MIRAS_FN void pull_back(const StateShape& m, const float* A, const float* W, const Rho& rho, float drho, float* dW_dA) const {
    pull_back_(*p_, m, A, W, rho, drho, dW_dA);
  }

 private:
  const MemoryParams* p_;
  Rho (*primal_)(const MemoryParams&, const StateShape&, const float*, float*);
  void (*pull_back_)(const MemoryParams&, const StateShape&, const float*, const float*, const Rho&, float, float*);
};

}  // namespace miras::cpu::MIRAS_LEVEL
