// The retention gates applied to a state: the only place where the kernels use phi. Once per chunk, over a whole matrix, or by threads
// that share its columns: a sum over the matrix is one over each column, then over the columns.
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
  Range visited = int(ld);  // columns, padding included; all of them if the last axis runs along the rows

  MIRAS_FN StateShape of(Range columns) const { return {rows, cols, ld, last, columns}; }

  // f(offset, j) for every vector; j its first column
  template <class Function> MIRAS_FN void each(Function&& f) const { each_from(visited.first, f); }
  // the same for the vectors with padding
  template <class Function> MIRAS_FN void padding(Function&& f) const {
    const int first = cols / kLanes * kLanes;
    each_from(first > visited.first ? first : visited.first, f);
  }
  MIRAS_FN Vec without_padding(Vec x, int j) const { return j + kLanes <= cols ? x : first_lanes(x, cols - j); }
  MIRAS_FN Vec instead_of_padding(Vec x, int j, Vec other) const { return iota() < cols - j ? x : other; }

 private:
  template <class Function> MIRAS_FN void each_from(int first, Function&& f) const {
    for (int i = 0; i < rows; ++i)
      for (int j = first; j < visited.last; j += kLanes) f(i * ld + j, j);
  }
};

// stage(columns) for all columns of a state, by one thread
struct AllColumns {
  int count;
  template <class Stage> MIRAS_FN void operator()(const Stage& stage) const { stage(Range(count)); }
};

// rho of a chunk's start, and what its derivative needs (LqRetention::slope)
struct Rho {
  float value = 1.0f, slope = 0.0f;
};

template <class Gate> struct RetentionKernels {
  // Of each column: sum power(a), or with G <a, g>. For Coupling::matrix
  static void column_sums(const MemoryParams& p, const StateShape& m, const float* A, const float* G, float* sums) {
    if constexpr (Gate::kCoupling == Coupling::matrix) {
      const Gate gate(p.retention_params);
      for (int j = m.visited.first; j < m.visited.last; j += kLanes) {
        Vec total = zeros();
        for (index_t i = 0, at = j; i < m.rows; ++i, at += m.ld) total += G ? load(A + at) * load(G + at) : gate.power(load(A + at));
        store(sums + j, total);
      }
    }
  }

  // From the sum of power(a)
  static Rho rho(const MemoryParams& p, float sum) {
    if constexpr (Gate::kCoupling == Coupling::matrix) {
      const Gate gate(p.retention_params);
      const double n = gate.offset() + sum;
      return {float(gate.rho(n)), float(gate.slope(n))};
    }
    return {};
  }

  // W = phi(A)
  static void primal(const MemoryParams& p, const StateShape& m, const Rho& rho, const float* A, float* W) {
    const Gate gate(p.retention_params);
    if constexpr (Gate::kCoupling == Coupling::none) {
      m.each([&](index_t at, int j) MIRAS_LAMBDA { store(W + at, m.without_padding(gate.phi(load(A + at)), j)); });
    } else if constexpr (Gate::kCoupling == Coupling::row) {
      if (m.last == LastAxis::down) normalise_down(gate, m, A, W);
      else normalise_along(gate, m, A, W);
    } else {
      const Vec scale = broadcast(rho.value);
      m.each([&](index_t at, int) MIRAS_LAMBDA { store(W + at, scale * load(A + at)); });
    }
  }

  // dA in place of dW, from d rho, which includes <A, dW>
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
      const Vec scale = broadcast(rho.value), pull = broadcast(rho.slope * drho);
      m.each([&](index_t at, int) MIRAS_LAMBDA { store(g + at, scale * load(g + at) + pull * gate.power_vjp(load(A + at))); });
    }
  }

 private:
  MIRAS_INLINE void normalise_down(const Gate& gate, const StateShape& m, const float* A, float* W) {
    for (int j = m.visited.first; j < m.visited.last; j += kLanes) {
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
    for (int j = m.visited.first; j < m.visited.last; j += kLanes) {
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
  static void column_sums(const MemoryParams&, const StateShape&, const float*, const float*, float*) {}
  static Rho rho(const MemoryParams&, float) { return {}; }

  static void primal(const MemoryParams& p, const StateShape& m, const Rho&, const float* A, float* W) {
    run(p, p.retention_program->value[0], m, A, W, [](const Interpreter&, index_t, int) MIRAS_LAMBDA {});
    m.padding([&](index_t at, int j) MIRAS_LAMBDA { store(W + at, m.without_padding(load(W + at), j)); });
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
    const bool together = m.visited.count() == m.ld;
    const index_t length = together ? m.rows * m.ld : m.visited.count();
    for (index_t row = m.visited.first; row < (together ? 1 : m.rows * m.ld); row += m.ld) {
      for (index_t at = 0; at < length; at += block) {
        const int count = int(length - at < block ? length - at : block);
        program.run_elements(count, A + row + at, W + row + at);
        f(program, row + at, count);
      }
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
    if (p.retention == RetentionTag::custom) use<ProgramStates>();
    else with_retention(p.retention, p.retention_params, [this]<class Gate>(const Gate&) { use<RetentionKernels<Gate>>(); });
  }

  bool identity;      // W = A: nothing is called and nothing is copied
  bool scales_reads;  // rho is not 1

  // W = phi(A), rho; in_columns(stage) as AllColumns
  template <class Columns> MIRAS_FN Rho primal(const StateShape& m, const float* A, float* W, const Columns& in_columns) const {
    const Rho rho = scales_reads ? rho_(*p_, total(m, A, nullptr, in_columns)) : Rho();
    in_columns([&](Range mine) { primal_(*p_, m.of(mine), rho, A, W); });
    return rho;
  }
  MIRAS_FN Rho primal(const StateShape& m, const float* A, float* W) const { return primal(m, A, W, AllColumns{int(m.ld)}); }

  // d A = phi'(A)^T [d W] + d rho d rho / d A, in place of d W; then(columns) follows
  template <class Columns, class Then>
  MIRAS_FN void pull_back(const StateShape& m, const float* A, const float* W, const Rho& rho, float drho, float* dW_dA,
                          const Columns& in_columns, const Then& then) const {
    if (scales_reads) drho += total(m, A, dW_dA, in_columns);
    in_columns([&](Range mine) {
      pull_back_(*p_, m.of(mine), A, W, rho, drho, dW_dA);
      then(mine);
    });
  }
  MIRAS_FN void pull_back(const StateShape& m, const float* A, const float* W, const Rho& rho, float drho, float* dW_dA) const {
    pull_back(m, A, W, rho, drho, dW_dA, AllColumns{int(m.ld)}, [](Range) {});
  }

 private:
  template <class States> MIRAS_FN void use() {
    column_sums_ = States::column_sums, rho_ = States::rho, primal_ = States::primal, pull_back_ = States::pull_back;
  }

  // The sum of column_sums, in an order that does not depend on who computed them
  template <class Columns> MIRAS_FN float total(const StateShape& m, const float* A, const float* G, const Columns& in_columns) const {
    alignas(64) float sums[kMaxHead];
    in_columns([&](Range mine) { column_sums_(*p_, m.of(mine), A, G, sums); });
    Vec total = zeros();
    for (int j = 0; j < m.ld; j += kLanes) total += load(sums + j);
    return sum(total);
  }

  const MemoryParams* p_;
  void (*column_sums_)(const MemoryParams&, const StateShape&, const float*, const float*, float*);
  Rho (*rho_)(const MemoryParams&, float);
  void (*primal_)(const MemoryParams&, const StateShape&, const Rho&, const float*, float*);
  void (*pull_back_)(const MemoryParams&, const StateShape&, const float*, const float*, const Rho&, float, float*);
};

}  // namespace miras::cpu::MIRAS_LEVEL
