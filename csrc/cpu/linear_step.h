// Decoding steps of the linear memory on a decoder's buffers (docs/mathematics.md, section 11), W' [Dk x Dv]:
//
//   e = W_0 k - v    u = eta psi(e)    left, right = k, -u          with decay_first, of chunks of one token: e = gamma W_0 k - v
//   o = gamma W_0 q + rho (kappa_0 D q + kappa_1 S_0 q + sum_i (left_i . q) kappa_(2+i) o right_i)
//
// A task is one head of one sequence: one pass over W_0, for k and q together, and one over the open chunk's factors.
#pragma once

#include "step.h"

namespace miras::cpu::MIRAS_LEVEL {

struct LinearStepScratch {
  float *K, *Q;          // [Dkp]
  float *V, *U;          // [Dvp]  U: W_0 k at first, then eta psi(e)
  float *Wq, *O, *more;  // [Dvp]
  float *eta, *delta;    // [Dvp]
  float *alpha, *gamma;  // [Dvp]
  float* scores;         // [R]
  StepSpare spare;

  MIRAS_FN LinearStepScratch(Arena& a, const LinearStep& p) : LinearStepScratch(a, p, round_up(p.Dk, kPad), round_up(p.Dv, kPad)) {}

 private:
  MIRAS_FN LinearStepScratch(Arena& a, const LinearStep& p, int dkp, int dvp)
      : K(a.take(1, dkp)), Q(a.take(1, dkp)), V(a.take(1, dvp)), U(a.take(1, dvp)), Wq(a.take(1, dvp)), O(a.take(1, dvp)),
        more(a.take(1, dvp)), eta(a.take(1, dvp)), delta(a.take(1, dvp)), alpha(a.take(1, dvp)), gamma(a.take(1, dvp)),
        scores(a.take(1, round_up(p.state.rows, kPad))), spare(a, p.state, p.Dk, p.Dv) {}
};

// O = sum_i (left_i . q) kappa_(2+i) o right_i
static void read_factors(const StepMatrix& m, const StepWeights& w, TokenRange tokens, const LinearStepScratch& s, Soon soon) {
  const float *left = m.left + index_t(tokens.first) * m.rows, *right = m.right + index_t(tokens.first) * m.cols;
  const float* const weights = w.row(2 + tokens.first);
  const int count = tokens.count();
  for (int i = 0; i < count; i += kLanes) {
    const int n = minimum(kLanes, count - i);
    const Vec dots = row_products<false>(left + index_t(i) * m.rows, n, m.rows, s.Q, nullptr, right + index_t(i) * m.cols).x;
    store(s.scores + i, w.width == 1 ? dots * load_first(weights + i, n) : dots);
  }
  if (w.width == 1) return products<false>(right, count, m.cols, s.scores, s.O, nullptr, nullptr, soon);
  each_columns(m.cols, [&]<class C>(const C& c) MIRAS_LAMBDA {
    Vec sum[C::kVectors] = {};
    for (int i = 0; i < count; ++i) {
      const index_t row = index_t(i) * m.cols;
      MIRAS_UNROLL
      for (int n = 0; n < C::kVectors; ++n) sum[n] += broadcast(s.scores[i]) * (c.load(weights + row, n) * c.load(right + row, n));
    }
    MIRAS_UNROLL
    for (int n = 0; n < C::kVectors; ++n) c.pad(s.O, n, sum[n]);
  });
}

// O += weight o (M q)
static void read_matrix(const float* M, const StepMatrix& m, const StepWeights& w, const float* weight, int dvp,
                        const LinearStepScratch& s) {
  products<false>(M, m.rows, m.cols, s.Q, s.more);
  if (w.width == 1) {
    for (int j = 0; j < dvp; j += kLanes) store(s.O + j, load(s.O + j) + *weight * load(s.more + j));
    return;
  }
  each_columns(m.cols, [&](const auto& c) MIRAS_LAMBDA {
    for (int n = 0; n < c.kVectors; ++n) c.pad(s.O, n, c.padded(s.O, n) + c.load(weight, n) * c.padded(s.more, n));
  });
}

// Token t, after the tokens `before` of its chunk. Reading their factors does not depend on the token's own write.
static void linear_step_token(const LinearStep& p, const BiasTable& bias, const LinearStepScratch& s, const StepMatrix& m,
                              const StepWeights& w, const Task& task, int64_t t, TokenRange before, Soon next) {
  const int64_t n = task.n, h = task.h;
  const int dk = p.Dk, dv = p.Dv, dvp = task.dvp;
  ChunkView{p.k, p.dtype, n, t, h, 0, dk}.read(1, s.K, 0);
  ChunkView{p.q, p.dtype, n, t, h, 0, dk}.read(1, s.Q, 0);
  ChunkView{p.v, p.dtype, n, t, h, 0, dv}.read(1, s.V, 0);
  const float* log_decay = p.log_decay ? address<float>(p.log_decay, n, t, h) : nullptr;
  w.advance(log_decay, p.log_decay.channel, p.momentum ? *address<float>(p.momentum, n, t, h) : 0.0f, before.last, dvp);

  const float* W0 = m.predicting();
  read_factors(m, w, before, s, {W0, dk});
  if (m.written && w.nonzero(0)) read_matrix(m.written, m, w, w.row(0), dvp, s);
  if (m.momenta && w.nonzero(1)) read_matrix(m.momenta, m, w, w.row(1), dvp, s);

  if (bias.predicts) products<true>(W0, dk, dv, s.K, s.U, s.Q, s.Wq, next);
  else products<false>(W0, dk, dv, s.Q, s.Wq, nullptr, nullptr, next);
  fill_zero(s.U + dv, dvp - dv);  // a NaN left there by another head would reach |e|^2
  if (p.decay_first)
    for (int j = 0; j < dvp; j += kLanes) store(s.U + j, load(w.gamma + j) * load(s.U + j));
  read_value_gate(p.lr, p.lr_per_channel, task, n, t, 1, s.eta);
  bias.write({1, dvp, p.bias_params, s.eta, read_delta(p, task, n, t, 1, s.delta), p.delta_per_channel, s.V, 0}, s.U, nullptr, nullptr);
  scale(-1.0f, dvp, s.U);
  copy_out(s.K, 0, 1, dk, m.left + index_t(before.last) * dk, 0);
  copy_out(s.U, 0, 1, dv, m.right + index_t(before.last) * dv, 0);

  const Vec own = broadcast(inner_product(s.K, s.Q, round_up(dk, kPad))), rho = broadcast(m.read_scale());
  for (int j = 0; j < dvp; j += kLanes) store(s.O + j, load(w.gamma + j) * load(s.Wq + j) + rho * (load(s.O + j) + own * load(s.U + j)));
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
  const int dvp = round_up(p.Dv, kPad);
  for (float* x : {s.U, s.Wq, s.O, s.more, s.alpha, s.gamma}) fill_zero(x, dvp);  // for a bias without predictions, and the padding

  const HeadOrder order(p, p.state, first, last);
  for (int64_t turn = first; turn < last; ++turn) {
    const int64_t i = order.head(turn);
    const Task task(p, i);
    StepMatrix matrices[] = {{p.state, i, p.Dk, p.Dv, LastAxis::down}};
    const StepMatrix& m = matrices[0];
    const StepWeights w(p.state, i, s.alpha, s.gamma);
    int position = int(p.state.position[task.n]), row = position;
    if (p.state.by_value) begin_value(gate, matrices, w, s.spare, position > 0, dvp), row = 0;
    TokenRange tokens{0, row};
    for (int64_t t = 0; t < p.T; ++t) {
      tokens = fold(matrices, w, s.spare, tokens.last);
      const index_t to_next = t + 1 < p.T ? 0 : order.step;  // the next head's factors, or matrix where every token is a chunk
      const float* const factors = m.left + to_next * p.state.rows * p.Dk + index_t(tokens.first) * p.Dk;
      const Soon next = p.C == 1 ? Soon{m.predicting() + to_next * m.size(), p.Dk} : Soon{factors, tokens.count()};
      linear_step_token(p, bias, s, m, w, task, t, tokens, next);
      ++tokens.last;
      if (++position == p.C) close_chunk(gate, matrices, w, s.spare, tokens), position = 0, tokens = {0, 0};
    }
    if (p.state.by_value) end_value(matrices, w, s.spare, tokens);
  }
}

}  // namespace miras::cpu::MIRAS_LEVEL
