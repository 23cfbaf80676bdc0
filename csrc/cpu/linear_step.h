// Tokens of the linear memory one after the other, on a decoder's buffers (SPEC section 2), S = W' [Dk x Dv]:
//
//   e = W_0 k - v    u = eta psi(e)    S <- theta S - k u'    A <- alpha A + S    o = gamma W_0 q + rho (A - gamma A_0) q
//
// (without momentum S = -k u', without a mirror map o = A q). A task is one head of one sequence: one pass over the matrix that
// predicts, one over A.
#pragma once

#include "step.h"

namespace miras::cpu::MIRAS_LEVEL {

struct LinearStepScratch {
  float *K, *Q;         // [Dkp]
  float *V, *U;         // [Dvp]  U: W_0 k at first, then eta psi(e)
  float *Wq, *O;        // [Dvp]
  float *eta, *delta;   // [Dvp]
  float *alpha, *gamma; // [Dvp]
  float* spare;         // [Dk x Dvp]

  MIRAS_FN LinearStepScratch(Arena& a, const LinearStep& p) {
    const int dkp = round_up(p.Dk, kPad), dvp = round_up(p.Dv, kPad);
    K = a.take(1, dkp), Q = a.take(1, dkp);
    V = a.take(1, dvp), U = a.take(1, dvp);
    Wq = a.take(1, dvp), O = a.take(1, dvp);
    eta = a.take(1, dvp), delta = a.take(1, dvp);
    alpha = a.take(1, dvp), gamma = a.take(1, dvp);
    spare = a.take(p.state.primal && dvp != p.Dv ? p.Dk : 0, dvp);
  }
};

// y = W x and, if kTwo, y2 = W x2, from W' [rows x cols], while a matrix that is needed next comes nearer
template <bool kTwo>
static void products(const float* W, int rows, int cols, const float* x, float* y, const float* x2, float* y2, const float* soon) {
  each_columns(cols, [&]<class C>(const C& c) MIRAS_LAMBDA {
    constexpr int N = C::kVectors;
    Vec sum[N] = {}, sum2[N] = {};
    for (int d = 0; d < rows; ++d) {
      const float* row = W + index_t(d) * cols;
      c.prefetch(soon + index_t(d) * cols);
      const Vec xd = broadcast(x[d]), x2d = kTwo ? broadcast(x2[d]) : zeros();
      MIRAS_UNROLL
      for (int n = 0; n < N; ++n) {
        const Vec w = c.load(row, n);
        sum[n] += xd * w;
        if constexpr (kTwo) sum2[n] += x2d * w;
      }
    }
    MIRAS_UNROLL
    for (int n = 0; n < N; ++n) {
      c.pad(y, n, sum[n]);
      if constexpr (kTwo) c.pad(y2, n, sum2[n]);
    }
  });
}

// S <- theta S - k u',  A <- alpha A + S,  o = A' q, with a mirror map o = (A - gamma A_0)' q; what is needed next comes nearer
template <bool kMapped, bool kMomentum>
static void write_and_read(const StepMatrix& m, const LinearStepScratch& s, float theta, const float* soon) {
  each_columns(m.cols, [&]<class C>(const C& c) MIRAS_LAMBDA {
    constexpr int N = C::kVectors;
    Vec u[N], alpha[N], gamma[N], o[N];
    MIRAS_UNROLL
    for (int n = 0; n < N; ++n) {
      u[n] = c.padded(s.U, n), alpha[n] = c.padded(s.alpha, n), o[n] = zeros();
      if constexpr (kMapped) gamma[n] = c.padded(s.gamma, n);
    }
    const Vec keep = broadcast(theta);
    for (int d = 0; d < m.rows; ++d) {
      const index_t row = index_t(d) * m.cols;
      c.prefetch(soon + row);
      const Vec k = broadcast(s.K[d]), q = broadcast(s.Q[d]);
      MIRAS_UNROLL
      for (int n = 0; n < N; ++n) {
        Vec a = alpha[n] * c.load(m.dual + row, n);
        if constexpr (kMomentum) {
          const Vec step = keep * c.load(m.momentum + row, n) - k * u[n];
          c.store(m.momentum + row, n, step);
          a += step;
        } else {
          a -= k * u[n];
        }
        c.store(m.dual + row, n, a);
        if constexpr (kMapped) a -= gamma[n] * c.load(m.start + row, n);
        o[n] += q * a;
      }
    }
    MIRAS_UNROLL
    for (int n = 0; n < N; ++n) c.pad(s.O, n, o[n]);
  });
}

// o = gamma (W_0 q) + rho o
MIRAS_INLINE void read_start(const LinearStepScratch& s, int dvp, float rho) {
  for (int j = 0; j < dvp; j += kLanes) store(s.O + j, load(s.gamma + j) * load(s.Wq + j) + broadcast(rho) * load(s.O + j));
}

static void linear_step_token(const LinearStep& p, const BiasTable& bias, const LinearStepScratch& s, const StepMatrix& m,
                              const StepDecay& decay, const Task& task, int64_t t, const float* soon) {
  const int64_t n = task.n, h = task.h;
  const int dk = p.Dk, dv = p.Dv, dvp = task.dvp;
  ChunkView{p.k, p.dtype, n, t, h, 0, dk}.read(1, s.K, 0);
  ChunkView{p.q, p.dtype, n, t, h, 0, dk}.read(1, s.Q, 0);
  ChunkView{p.v, p.dtype, n, t, h, 0, dv}.read(1, s.V, 0);

  const float* W0 = m.predicting();
  if (m.primal) products<true>(W0, dk, dv, s.K, s.U, s.Q, s.Wq, m.dual);
  else if (bias.predicts) products<false>(W0, dk, dv, s.K, s.U, nullptr, nullptr, m.dual);
  read_value_gate(p.lr, p.lr_per_channel, task, n, t, 1, s.eta);
  bias.write({1, dvp, p.bias_params, s.eta, read_delta(p, task, n, t, 1, s.delta), p.delta_per_channel, s.V, 0}, s.U, nullptr, nullptr);

  decay.advance(p.log_decay ? address<float>(p.log_decay, n, t, h) : nullptr, p.log_decay.channel, dvp, m.primal);
  if (m.momentum) {
    const float theta = *address<float>(p.momentum, n, t, h);
    if (m.primal) write_and_read<true, true>(m, s, theta, soon);
    else write_and_read<false, true>(m, s, theta, soon);
  } else {
    if (m.primal) write_and_read<true, false>(m, s, 0.0f, soon);
    else write_and_read<false, false>(m, s, 0.0f, soon);
  }
  if (m.primal) read_start(s, dvp, m.read_scale());
  ChunkView{p.out, p.dtype, n, t, h, 0, dv}.write(1, s.O, 0);
}

static void linear_step(const LinearStep& p, int64_t first, int64_t last) {
  FlushDenormals flush;
  Arena measure(nullptr);
  LinearStepScratch(measure, p);
  Arena arena(thread_scratch(size_t(measure.used())));
  const LinearStepScratch s(arena, p);
  const BiasTable bias = bias_table(p.bias, p.bias_params, p.lr_per_channel);
  const Retention gate(p.retention, p.retention_params);
  fill_zero(s.U, round_up(p.Dv, kPad));  // where nothing is predicted, or nothing is padded
  fill_zero(s.alpha, round_up(p.Dv, kPad)), fill_zero(s.gamma, round_up(p.Dv, kPad));

  for (int64_t i = first; i < last; ++i) {
    const Task task(p, i);
    const StepMatrix m(p.state, i, p.Dk, p.Dv, LastAxis::down);
    const StepDecay decay{p.state.log_decay + i * p.state.decay_width, p.state.decay_width, s.alpha, s.gamma};
    int position = int(p.state.position[task.n]);
    if (position > 0 && p.state.unmapped) m.map(gate, s.spare);
    for (int64_t t = 0; t < p.T; ++t) {
      if (position == 0) m.open(gate, s.spare);
      const float* soon = t + 1 < p.T ? m.dual : m.predicting() + int64_t(p.Dk) * p.Dv;  // what the next head predicts with
      linear_step_token(p, bias, s, m, decay, task, t, soon);
      if (++position == p.C) position = 0, decay.close();
    }
  }
}

}  // namespace miras::cpu::MIRAS_LEVEL
