// Backward of the MLP memory (docs/mathematics.md, section 10), chunks from last to first. J1, J2 = gradients of W1, W2 after a chunk,
// L_ts = gamma_t / gamma_s for s <= t, U1 = eta Gu, U2 = eta Gz, end_s = gamma_C / gamma_s; the rest is named as in mlp_forward.h.
//
// Read-out:
//   dUq = LN'(dO)                                        M1 = L o (dUq U1')    M2 = L o (dZq U2')
//   dZq = gelu'(Zq) o (gamma dUq W1 - M1 A)              dQ = dO + gamma dZq W2 - M2 K
// Writes:
//   dU1_s = -sum_{t>=s} P1_ts dUq_t - end_s J1 a_s       dU2_s = -sum_{t>=s} P2_ts dZq_t - end_s J2 k_s
//   d eta_s = dU1_s . gu_s + dU2_s . gz_s                dGz = eta dU2    dGa = gelu'(Z) o dGz    dGu = eta dU1 + dGa W1'
// Inner gradient, through LN's vjp (which is its own) and psi, w the weight, m() the mean over channels, x = LN(U), r = 1 / std:
//   dG = w o r (dGu - m(dGu) - x m(dGu x))    dE = psi'(E) dG    dV = -dE
//   dx = w o dE - r (dGu m(wG x) + wG m(dGu x))          dU = r (dx - m(dx) - x m(dx x)) - r x m(dGu Gu)
//   dZ = gelu'(Z) o (dU W1 - M1' Aq - end J1' U1) + gelu''(Z) o Ga o dGz
//   dK = dE + dZ W2 - M2' Q - end J2' U2
// States:
//   J1 <- gamma_C J1 + sum_t gamma_t dUq_t aq_t' + Gu' dGa + dU' A       J2 <- gamma_C J2 + sum_t gamma_t dZq_t q_t' + dZ' K
// Parameters of LN: d w = sum dO o xq + dGw o G + dE o x,  d bias = sum dO + dE, with dGw = dG / w.
//
// d log alpha as for the linear memory, the pairs and sums of both matrices added up (see decay_gradient).
//
// This is for L2Retention without momentum. Otherwise, with JS1, JS2 the gradients of the momenta after a chunk, M, Theta, b and pi as
// in Gates, and rho in everything that a chunk reads of its own writes (P = rho M o ..):
//
//   M for L,  M_C for end                                dU1_s -= Theta_Cs JS1 a_s         dU2_s -= Theta_Cs JS2 k_s
//   dZq += gelu'(Zq) o rho1 b dUq S1                     dQ += rho2 b dZq S2
//   dZ -= gelu'(Z) o Theta_C JS1' U1                     dK -= Theta_C JS2' U2
//   J <- gamma_C J + phi'(A)^T [dW] + d rho d rho / dA   JS1 <- b_C J1 + pi_C JS1 + rho1 sum_t b_t dUq_t aq_t'   (JS2 likewise)
//
// with dW the sums added to J above, and d rho1 = sum_t dUq_t . (b_t S1 aq_t - sum_s M_ts (aq_t . a_s) U1_s), d rho2 likewise.
//
// Names and layouts: mlp_backward_task.h.
#pragma once

#include "mlp_backward_stages.h"

namespace miras::cpu::MIRAS_LEVEL {

// Tokens: dQ, dV, dK
void MlpBackwardTask::token_gradients(const Part& mine, int64_t chunk, const MlpState& start) {
  const int c = tokens(chunk), first = mine.tokens.first, count = mine.tokens.count();
  const Range rows = mine.tokens;
  const Gates& gates = m.gates;
  const float* W2 = start.primal[1].down;
  const Operand dZT = this->dZT();
  float* const dX = s.dX + index_t(first) * dp;

  MIRAS_STAGE("dQ", 2 * c * d * hd + c * (c + 1) * d, hd * c + hd * d + c * (c + 1) / 2 + 5 * c * d);
  if (momentum) {
    m.sum_units(rows, s.dZqT.down, start.momenta[1].down, m.part);
    for (int t = rows.first; t < rows.last; ++t) s.dots[t] = 0.0f;
    row_dots(rows, dp, m.Q, m.part, s.dots);
  }
  m.sum_blocks(rows, s.dZqT.down, W2, s.dX);
  sweep(rows, dp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    m.add_sum(x, i, j, s.dZqT.down, W2, s.dX);
    x.scale_rows(gates.gamma + i);
    if (gates.decays) x.dot_rows(m.Q + i * dp + j, dp, s.read_sums + i);
    if (momentum) x.add_scaled_rows(m.part + index_t(i) * dp + j, dp, m.carry[1] + i);
    x.subtract(by_rows(s.M2.along, cp).at(i), m.K.down + j, dp, 0, i + R);
    x.each([&](int r, int k, Vec& y) MIRAS_LAMBDA { y += load(s.dO + index_t(i + r) * dp + j + k * kLanes); });
    x.store_to(s.dX + i * dp + j, dp);
  });
  view(p.dq, chunk, first).write(count, dX, dp);

  for (index_t i = index_t(rows.first) * dp; i < index_t(rows.last) * dp; i += kLanes) store(s.dX + i, -load(s.dE + i));
  view(p.dv, chunk, first).write(count, dX, dp);

  MIRAS_STAGE("dK", 4 * c * d * hd + c * (c + 1) * d, 2 * hd * c + 2 * hd * d + c * (c + 1) / 2 + 6 * c * d);
  if (momentum) {
    m.sum_units(rows, m.GzT.down, s.JS[1].down, m.part);
    for (int t = rows.first; t < rows.last; ++t) {
      const float dot = inner_product(m.K + index_t(t) * dp, m.part + index_t(t) * dp, dp);
      s.dstep[t] += gates.eta[t] * dot;
      s.deta[t] -= gates.step_end[t] * dot;
    }
  }
  m.sum_blocks<-1>(rows, m.GzT.down, s.J[1].down, s.dX);
  sweep(rows, dp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    m.add_sum<-1>(x, i, j, m.GzT.down, s.J[1].down, s.dX);
    if (momentum) x.dot_rows(m.K + i * dp + j, dp, s.write2_sums + i);
    x.scale_rows(gates.to_end + i);
    if (!momentum) x.dot_rows(m.K + i * dp + j, dp, s.write2_sums + i);
    x.scale_rows(gates.eta + i);
    if (momentum) x.subtract_scaled_rows(m.part + index_t(i) * dp + j, dp, m.step_weight + i);
    x.add(Cols{dZT.down + i, cp}, W2 + j, dp, 0, hd);
    x.subtract(Cols{s.M2.down + i, cp}, m.Q.down + j, dp, i, c);
    if (bias.predicts) x.each([&](int r, int k, Vec& y) MIRAS_LAMBDA { y += load(s.dE + index_t(i + r) * dp + j + k * kLanes); });
    x.store_to(s.dX + i * dp + j, dp);
  });
  view(p.dk, chunk, first).write(count, dX, dp);

  for (int t = rows.first; t < rows.last; ++t) {
    s.deta[t] += momentum ? gates.to_end[t] * s.write2_sums[t] : s.write2_sums[t];
    s.write_sums[t] -= gates.eta[t] * s.write2_sums[t];
  }
}

// The gates' gradients
void MlpBackwardTask::gate_gradients(int64_t chunk) {
  const int c = tokens(chunk);
  const Gates& gates = m.gates;
  const auto along = [&](int i) {
    float total = 0.0f;
    for (int k = 0; k < round_up(hd, kPad) / kPad; ++k) total += s.along[i][k];
    return total;
  };
  write_gate(p.dlr, b, token(chunk), h, c, s.deta);
  if (p.ddelta) write_gate(p.ddelta, b, token(chunk), h, c, s.ddelta);
  const float through = gates.decays ? *gates.end(c) * along(0) : 0.0f;
  if (!momentum) {
    if (gates.decays) decay_gradient(c, s.pairs, cp, s.read_sums, s.write_sums, through, s.dlog);
  } else {
    s.dcarry[c - 1] += along(1);
    for (int t = 0; t < cp; ++t) s.write_sums[t] = -s.write_sums[t], s.dstep[t] = -s.dstep[t];
    decay_gradient_with_momentum(gates, c, s.L, cp, s.write_sums, s.pairs, s.dcarry, s.read_sums, through, s.dlog);
    momentum_gradient(gates, c, s.Theta, cp, s.pairs, s.dcarry, s.dstep, along(2), s.dmomentum);
    write_gate(p.dmomentum, b, token(chunk), h, c, s.dmomentum);
  }
  if (gates.decays) write_gate(p.dlog_decay, b, token(chunk), h, c, s.dlog);
}

// Hidden units: JS and J of matrix i of the preceding chunk, or the gradient of its W
void MlpBackwardTask::state_gradients(const Part& mine, int i, int c, const MlpState& start, ReadSoon soon) {
  const Gates& gates = m.gates;
  MIRAS_STAGE("update", (i == 0 ? 6 : 4) * c * d * hd, (i == 0 ? 3 : 2) * hd * c + 3 * c * d + 2 * hd * d);
  const bool identity = m.retention.identity;
  const Rows read = by_rows(i == 0 ? m.AqT.along : s.dZqT.along, cp), A = by_rows(m.AT.along, cp);
  const Rows dGa = by_rows(s.dGaT.along, cp), dZ = by_rows(dZT().along, cp);
  if (momentum) {
    sweep(mine.units, dp, [&]<int R, int N>(int row, int j) MIRAS_LAMBDA {
      const index_t at = index_t(row) * dp + j;
      Tile<R, N> x;
      x.add(read.at(row), (i == 0 ? s.dUq_carry.down : s.Q_carry.down) + j, dp, 0, c);
      x.add_scaled(s.J[i] + at, dp, gates.momenta_end(c));
      x.add_scaled(s.JS[i] + at, dp, gates.step_momenta_end(c));
      x.store_to(s.JS[i] + at, dp);
    });
  }
  ReadSoon once = mine.once(soon), w_soon = preceding(mine, start.dual[1 - i], state);
  ReadSoon a_soon = preceding(mine, m.AT.along, hidden), gz_soon = preceding(mine, m.GzT.along, hidden);
  float* const to = identity ? s.J[i].x : s.dW[i];
  sweep(mine.units, dp, [&]<int R, int N>(int unit, int j) MIRAS_LAMBDA {
    const index_t at = index_t(unit) * dp + j;
    Tile<R, N> x;
    if (i == 0) {
      x.add(read.at(unit), s.dUq_gamma.down + j, dp, 0, c, w_soon);
      x.add(dGa.at(unit), m.Gu.down + j, dp, 0, c, gz_soon);
      x.add(A.at(unit), s.dU.down + j, dp, 0, c, a_soon);
    } else {
      x.add(read.at(unit), s.Q_gamma.down + j, dp, 0, c, once);
      x.add(dZ.at(unit), m.K.down + j, dp, 0, c, w_soon);
    }
    if (identity) x.add_scaled(s.J[i] + at, dp, gates.end(c));
    x.store_to(to + at, dp);
  });
}

// The gradient of W goes through phi, a matrix by each part.
void MlpBackwardTask::through_primal(const Part& mine, int c, const MlpState& start) {
  for (int i = mine.index; i < 2; i += p.parts) {
    m.retention.pull_back(m.shape(i), start.dual[i], start.primal[i], start.rho[i], drho[i], s.dW[i]);
    const Vec decay = broadcast(*m.gates.end(c));
    for (index_t at = 0; at < state; at += kLanes) store(s.J[i] + at, decay * load(s.J[i] + at) + load(s.dW[i] + at));
  }
}

void MlpBackwardTask::chunk_backward(int64_t chunk, int64_t i) {
  const int c = tokens(chunk);
  const MlpState start = s.states.at(i);
  const bool identity = m.retention.identity;
  m.read_queries(p, b, token(chunk), h, c);
  view(p.grad_out, chunk).read(c, s.dO, dp);
  fill_zero(s.deta, cp);
  fill_zero(s.read_sums, cp), fill_zero(s.write_sums, cp), fill_zero(s.write2_sums, cp);
  if (momentum) fill_zero(s.dcarry, cp), fill_zero(s.dstep, cp);
  drho[0] = drho[1] = 0.0f;

  in_parts(p, c, [&](const Part& mine) {
    m.errors(mine, p, bias);
    m.transpose_rows(mine.tokens, m.U1, s.U1T);
    m.query_scores(mine, c, start, {s.L, s.Theta, momentum ? s.QK : nullptr});
    for (const Operand& x : {m.K, m.Q, m.Gu}) x.pack_down(mine.tokens, dp);
    m.P2.pack_down(mine.tokens, cp);
    m.pack(mine.units, start.primal), m.pack(mine.units, s.J);
    if (momentum) m.pack(mine.units, start.momenta), m.pack(mine.units, s.JS);
    for (const Operand& x : {m.AT, m.GzT}) x.pair_along(mine.units, m.columns(c));
  });
  in_parts(p, c, [&](const Part& mine) {
    m.read_hidden(mine, c, start);
    MIRAS_STAGE("gelu", 0, 3 * hd * c);
    m.gelu(mine.units, c, m.AqT, m.AqT.along, s.dZqT);
    m.AqT.pair_along(mine.units, m.columns(c));
  });
  in_parts(p, c, [&](const Part& mine) {
    m.restore(mine.tokens, p.product(1, b, h, token(chunk)), d, m.reads);
    m.restore(mine.tokens, p.chunk_scores(b, h, token(chunk)), p.C, m.AqA);
    m.read_out<true>(mine, start, WriteSoon());
    MIRAS_PASS("backward");
    read_backward(mine, c, start);
  });
  rho_gradient(c, start.rho[0]);
  in_parts(p, c, [&](const Part& mine) {
    read_backward_hidden(mine, c, start);
    write_backward_hidden(mine, c);
  });
  in_parts(p, c, [&](const Part& mine) {
    write_backward(mine, c, start);
    inner_backward(mine, start);
  });
  add_pairs(c, start.rho[1]);
  in_parts(p, c, [&](const Part& mine) {
    MIRAS_STAGE("gates", 0, 4 * hd * d);
    inner_products(mine, start);
    hidden_backward(mine, c, start);
    norm_gradients(mine, c);
    if (identity) state_gradients(mine, 0, c, start, ReadSoon());
  });
  in_parts(p, c, [&](const Part& mine) { token_gradients(mine, chunk, start); });
  if (momentum) reads_of_momenta(c, 1, start.rho[1]);
  MIRAS_STAGE("gates", 0, c * (c + 1) / 2);
  gate_gradients(chunk);
  in_parts(p, c, [&](const Part& mine) {
    if (!identity) state_gradients(mine, 0, c, start, ReadSoon());
    state_gradients(mine, 1, c, start, ReadSoon(view(p.k, chunk - 1), chunk > 0 ? p.C : 0));
  });
  if (!identity) in_parts(p, c, [&](const Part& mine) { through_primal(mine, c, start); });
}

void MlpBackwardTask::run() {
  m.begin(p, h);
  const auto begin_with = [&](const StateTensor(&grads)[2], const Operand(&to)[2]) {
    if (grads[0]) read_states(grads, n, h, d, hd, to, dp);
    else fill_zero(to[0], state), fill_zero(to[1], state);
  };
  begin_with(p.grad_final_dual, s.J);
  if (momentum) begin_with(p.grad_final_momenta, s.JS);
  const int64_t square = int64_t(p.C) * cp;  // zero right of the diagonal, where nothing is written
  fill_zero(s.L, square), s.M1.clear(p.C, cp), s.M2.clear(p.C, cp), fill_zero(s.pairs, square);
  if (momentum) fill_zero(s.Theta, square);
  fill_zero(s.dweight, dp), fill_zero(s.dbias, dp);
  for (int t = 0; t < cp; ++t) s.ones[t] = 1.0f;

  const int64_t chunks = (length + p.C - 1) / p.C, every = p.checkpoint_every;
  for (int64_t last = chunks; last > 0;) {
    const int64_t first = (last - 1) / every * every;
    MIRAS_PASS("recompute");
    rerun(first, last);
    for (int64_t chunk = last - 1; chunk >= first; --chunk) {
      MIRAS_PASS("recompute");
      MIRAS_STAGE("read", 0, 14 * p.C * d);
      choose(chunk - first);
      if (chunk != last - 1) m.read(p, b, token(chunk), h, tokens(chunk));  // the last one is as recomputing left it
      chunk_backward(chunk, chunk - first);
    }
    last = first;
  }
  write_states(p.d_dual, n, h, d, hd, s.J, dp, s.spare);
  if (momentum) write_states(p.d_momenta, n, h, d, hd, s.JS, dp, s.spare);
  copy_out(s.dweight, dp, 1, d, p.dln_weight + (n * p.H + h) * d, d);
  copy_out(s.dbias, dp, 1, d, p.dln_bias + (n * p.H + h) * d, d);
}

static void mlp_backward(const MlpBackward& p, int64_t first, int64_t last) {
  const BiasTable bias = bias_table(p);
  with_scratch<MlpBackwardScratch>(p, [&](const MlpBackwardScratch& s) MIRAS_LAMBDA {
    for (int64_t i = first; i < last; ++i) MlpBackwardTask(p, bias, s, i).run();
  });
  MIRAS_PASS(nullptr);
}

}  // namespace miras::cpu::MIRAS_LEVEL
