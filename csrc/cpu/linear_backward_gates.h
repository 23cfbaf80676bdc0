// Gradients of log alpha, theta and rho in the linear memory's backward (linear_backward.h), and everything that goes through M if
// decays are channel-wise.
#pragma once

#include "linear_backward_task.h"

namespace miras::cpu::MIRAS_LEVEL {

// dU, N, and d log alpha without the part through b
void BackwardTask::channels_backward(int c, const ChunkStart& x) {
  const ChannelDecay& channel = s.gates.channel;
  const Rows Q = by_rows(s.Q.along, dkp);
  plain_scores(c, dk, Q, s.KT, cp, s.P.x, WriteSoon());
  times_state(c, dk, by_rows(s.K.along, dkp), s.J.down, dvp, s.KJ);
  times_state(c, dk, Q, packed_down(x.W, dk, dvp, s.W_down), dvp, s.QW);
  fill_zero(s.dlog, int64_t(c) * dvp);
  channel.backward(c, s.gates, {s.P, s.U, s.dO, s.KJ, s.KJS, s.dE, s.N, s.X, s.dlog, s.m, s.sums});
  s.N.pack_along(c, cp), s.N.pack_down(c, cp);
  for (index_t i = 0; i < index_t(c) * dvp; i += kLanes) store(s.QW + i, load(s.QW + i) * load(s.dO_gamma + i));
  const float* gamma = channel.gamma + index_t(c - 1) * dvp;
  column_products(dk, dvp, s.J, x.A, s.columns);
  for (int j = 0; j < dvp; j += kLanes) store(s.columns + j, load(gamma + j) * load(s.columns + j));
  channel.read_gradient(c, s.QW, s.columns, s.dlog);
}

// Tokens: K JS', rho b_t S_0' dO_t and gb, the gradient of b through the chunk's reads
void BackwardTask::momenta_reads(Range tokens, const ChunkStart& x) {
  times_state(tokens, dk, by_rows(s.K.along, dkp), s.JS.down, dvp, s.KJS);
  for (int t = tokens.first; t < tokens.last; ++t) s.gTheta[t] = -inner_product(s.U + index_t(t) * dvp, s.KJS + index_t(t) * dvp, dvp);
  weigh(tokens, dvp, s.gates.of_momenta(), s.dO, s.dO_b);
  s.dO_b.pack_along(tokens, dvp), s.dO_b.pack_down(tokens, dvp);
  if (channels) {
    times_state(tokens, task.dv, by_rows(s.dO_b.along, dvp), s.S_plain, dkp, s.dQ_b);
    times_state(tokens, dk, by_rows(s.Q.along, dkp), s.S_copy.of(x.S).down, dvp, s.QS);
    weigh(tokens, dvp, {s.dO, true}, s.QS, s.QS);
  } else {
    times_state(tokens, task.dv, by_rows(s.dO.along, dvp), s.S_plain, dkp, s.dQ_b);
    for (int t = tokens.first; t < tokens.last; ++t) s.gb[t] = inner_product(s.Q.along + index_t(t) * dkp, s.dQ_b + index_t(t) * dkp, dkp);
    weigh_rows(tokens, dkp, s.gates.b, s.dQ_b, s.dQ_b);
  }
}

// d rho = sum_t dO_t . (b_t S_0 q_t - sum_s P_ts U_s); dO, and everything computed from it, has the factor rho
float BackwardTask::rho_gradient(int c, const ChunkStart& x) const {
  double total = 0.0;
  for (int t = 0; t < c; ++t) {
    Vec row = zeros();
    for (int j = 0; j <= t; j += kLanes) {
      const index_t at = t * cp + j;
      const Vec pairs = momentum || channels ? -load((channels ? s.P.x : s.QK) + at) * load(s.N.along + at) : load(s.X + at);
      row += first_lanes(pairs, t + 1 - j);
    }
    total += sum(row);
    if (momentum)
      total += channels ? inner_product(s.QS + index_t(t) * dvp, s.gates.channel.b + index_t(t) * dvp, dvp) : s.gates.b[t] * s.gb[t];
  }
  return float(total / x.rho.value);
}

// d log alpha and d theta; J and JS are still those of the chunk's end
void BackwardTask::gate_gradients(int64_t chunk, const ChunkStart& x) {
  const int c = tokens(chunk);
  const LinearGates& gates = s.gates;
  if (momentum) {
    if (channels) {
      column_products(dk, dvp, s.J, x.S, s.columns);
      gates.channel.momenta_gradient(c, s.QS, s.columns, s.gb, s.dlog);
    } else {
      const float through = *gates.end(c) * inner_product(s.J.x, x.A, state);
      for (int t = 0; t < round_up(c, kPad); ++t) s.write_sums[t] = -s.write_sums[t];
      s.gb[c - 1] += inner_product(s.J.x, x.S, state);
      decay_gradient_with_momentum(gates, c, s.M, cp, s.write_sums, s.X, s.gb, s.read_sums, through, s.dlog);
    }
    const float* Theta = channels ? gates.channel.Theta : s.Theta;
    momentum_gradient(gates, c, Theta, cp, s.X, s.gb, s.gTheta, inner_product(s.JS.x, x.S, state), s.dmomentum);
    put(p.dmomentum, false, chunk, s.dmomentum);
  } else if (gates.decays) {
    const float through = *gates.end(c) * inner_product(s.J.x, x.A, state);
    decay_gradient(c, s.X, cp, s.read_sums, s.write_sums, through, s.dlog);
  }
  if (p.dlog_decay) put(p.dlog_decay, channels, chunk, s.dlog);
}

}  // namespace miras::cpu::MIRAS_LEVEL
