// The stages of the MLP memory's backward that lie inside a chunk, in order: the read-out, the writes, the inner gradient, the hidden
// units. mlp_backward.h has the equations.
#pragma once

#include "mlp_backward_task.h"

namespace miras::cpu::MIRAS_LEVEL {

// sums[t] += <row t of a, row t of b>   [c x cols]
static void row_dots(Range c, int cols, const float* a, const float* b, float* sums) {
  for (int t = c.first; t < c.last; ++t) sums[t] += inner_product(a + index_t(t) * cols, b + index_t(t) * cols, cols);
}

// x / rho for an x that is a multiple of rho; if rho underflows, so does everything that it multiplies
MIRAS_INLINE float unscaled(float x, const Rho& rho) { return rho.value > 0.0f ? x / rho.value : 0.0f; }

// The gradient of b, and d rho's share, from `dots`: <what a token reads of S, its gradient> of matrix i
void MlpBackwardTask::reads_of_momenta(int c, int i, const Rho& rho) {
  for (int t = 0; t < c; ++t) {
    s.dcarry[t] += rho.value * s.dots[t];
    drho[i] += m.gates.b[t] * s.dots[t];
  }
}

// Tokens: dUq, M1, the pairs of W1, its reads
void MlpBackwardTask::read_backward(const Part& mine, int c, const MlpState& start) {
  const Range tokens = mine.tokens;
  const Vec rho = broadcast(start.rho[0].value);
  const auto weigh = [&](const float* factors, const float* rows, const Operand& to) MIRAS_LAMBDA {
    weigh_rows(tokens, dp, factors, rows, to);
    to.pack_down(tokens, dp);
  };
  MIRAS_STAGE("row pass", 0, 9 * c * d);
  m.norm.pull_back_weighted(tokens, m.Xq, m.rq, s.dO, s.dUq);
  if (m.gates.decays) row_dots(tokens, dp, m.reads, s.dUq, s.read_sums);
  if (momentum) {
    for (int t = tokens.first; t < tokens.last; ++t) s.dots[t] = 0.0f;
    row_dots(tokens, dp, m.part, s.dUq, s.dots);
    weigh(m.carry[0], s.dUq, s.dUq_carry), weigh(m.carry[1], m.Q, s.Q_carry);
  }
  weigh(m.gates.gamma, s.dUq, s.dUq_gamma), weigh(m.gates.gamma, m.Q, s.Q_gamma);
  m.transpose_rows(tokens, s.dUq, s.dUqT);
  s.dUq.pack_down(tokens, dp), m.P1.pack_down(tokens, cp);

  MIRAS_STAGE("pairs", c * (c + 1) * d, 2 * c * d + 3 * c * (c + 1));
  sweep_lower(tokens, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    x.add(by_rows(s.dUq.along, dp).at(i), s.U1T + j, cp, 0, d);
    x.each([&](int r, int k, Vec& y) MIRAS_LAMBDA {
      const index_t at = index_t(i + r) * cp + j + k * kLanes;
      store(s.pairs + at, momentum ? -rho * load(m.AqA + at) * y : -load(m.P1 + at) * y);
      y *= rho * load(s.L + at);
    });
    x.store_to(s.M1.along + i * cp + j, cp);
  });
  s.M1.pair_along(tokens, cp);
  transpose_operand(s.M1, tokens, c, cp, s.M1T, cp);
}

// d rho of W1
void MlpBackwardTask::rho_gradient(int c, const Rho& rho) {
  if (m.retention.scales_reads) {
    float total = 0.0f;
    for (int t = 0; t < c; ++t) total += inner_product(s.pairs + t * cp, momentum ? s.L + t * cp : s.ones, cp);
    drho[0] = unscaled(total, rho);
  }
  if (momentum) reads_of_momenta(c, 0, rho);
}

// Hidden units: dZq
void MlpBackwardTask::read_backward_hidden(const Part& mine, int c, const MlpState& start) {
  const Rows W1T = by_rows(start.primal[0].along, dp), A = by_rows(m.AT.along, cp);
  MIRAS_STAGE("dZq", 2 * c * d * hd + c * (c + 1) * hd, hd * d + d * c + c * (c + 1) / 2 + 3 * hd * c);
  if (momentum) m.hidden_product(mine.units, c, start.momenta[0], s.dUqT, m.partT, ReadSoon());
  m.sweep_hidden<2>(mine.units, c, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    const index_t at = index_t(i) * cp + j;
    Tile<R, N> x;
    x.add(W1T.at(i), s.dUqT + j, cp, 0, d);
    x.scale_cols(m.gates.gamma + j);
    if (momentum) x.add_scaled_cols(m.partT + at, cp, m.carry[0] + j);
    x.subtract(A.at(i), s.M1T + j, cp, 0, minimum(c, j + N * kLanes));
    x.multiply(s.dZqT + at, cp);
    x.store_to(s.dZqT.along + at, cp);
  });
  s.dZqT.pair_along(mine.units, m.columns(c));
}

// Hidden units: dGa, and in place of gelu'' o Ga its product with dGz
void MlpBackwardTask::write_backward_hidden(const Part& mine, int c) {
  MIRAS_STAGE("dGz", 2 * c * d * hd + c * (c + 1) * hd, hd * d + d * c + c * (c + 1) / 2 + 5 * hd * c);
  const Rows J = by_rows(s.J[1].along, dp), dZq = by_rows(s.dZqT.along, cp);
  if (momentum) m.hidden_product(mine.units, c, s.JS[1], m.KT, m.partT, ReadSoon());
  m.sweep_hidden<2>(mine.units, c, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    x.prefetch(m.HT + index_t(i) * cp + j, cp), x.prefetch(m.slopeT + index_t(i) * cp + j, cp);
    x.add(J.at(i), m.KT + j, cp, 0, d);
    x.scale_cols(m.gates.to_end + j);
    if (momentum) x.add_scaled_cols(m.partT + index_t(i) * cp + j, cp, m.gates.step_end + j);
    x.add(dZq.at(i), m.P2.down + j, cp, j, c);
    x.each([&](int r, int k, Vec& y) MIRAS_LAMBDA {
      const index_t at = index_t(i + r) * cp + j + k * kLanes;
      const Vec dGz = -load(m.gates.eta + j + k * kLanes) * y;
      store(m.HT + at, load(m.HT + at) * dGz);
      y = load(m.slopeT + at) * dGz;
    });
    x.store_to(s.dGaT.along + index_t(i) * cp + j, cp);
  });
  s.dGaT.pair_along(mine.units, m.columns(c));
}

// Tokens: M2, the pairs of W2, dU1
void MlpBackwardTask::write_backward(const Part& mine, int c, const MlpState& start) {
  const Range tokens = mine.tokens;
  const Vec rho = broadcast(start.rho[1].value);
  MIRAS_STAGE("pairs", c * (c + 1) * hd, 2 * hd * c + 3 * c * (c + 1));
  sweep_lower(tokens, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    x.add(Cols{s.dZqT.down + i, cp}, m.GzT.down + j, cp, 0, hd);
    x.each([&](int r, int k, Vec& y) MIRAS_LAMBDA {
      const index_t column = j + k * kLanes, at = index_t(i + r) * cp + column;
      const Vec eta = load(m.gates.eta + column), pair = load(m.P2 + at) * y;
      store(s.pairs2 + at, pair);
      store(s.pairs + at, load(s.pairs + at) - eta * (momentum ? rho * load(s.QK + at) * y : pair));
      y *= eta * load(s.L + at) * rho;
    });
    x.store_to(s.M2.along + i * cp + j, cp);
  });
  s.M2.pair_along(tokens, cp);

  MIRAS_STAGE("dU", 2 * c * d * hd + c * (c + 1) * d, hd * c + hd * d + c * (c + 1) / 2 + 3 * c * d);
  if (momentum) {
    m.sum_units(tokens, m.AT.down, s.JS[0].down, m.part);
    row_dots(tokens, dp, m.U1, m.part, s.dstep);
    weigh_rows(tokens, dp, m.gates.step_end, m.part, m.part);
  }
  m.sum_blocks(tokens, m.AT.down, s.J[0].down, s.dU1);
  sweep(tokens, dp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    m.add_sum(x, i, j, m.AT.down, s.J[0].down, s.dU1);
    if (momentum) x.dot_rows(m.U1 + i * dp + j, dp, s.write_sums + i);
    x.scale_rows(m.gates.to_end + i);
    if (m.gates.decays && !momentum) x.dot_rows(m.U1 + i * dp + j, dp, s.write_sums + i);
    if (momentum) x.add_matrix(m.part + index_t(i) * dp + j, dp);
    x.add(Cols{m.P1.down + i, cp}, s.dUq.down + j, dp, i, c);
    x.each([](int, int, Vec& y) MIRAS_LAMBDA { y = -y; });
    x.store_to(s.dU1 + i * dp + j, dp);
  });
}

// d eta's share of the pairs of W2, and d rho of W2
void MlpBackwardTask::add_pairs(int c, const Rho& rho) {
  Vec total = zeros();
  for (int j = 0; j < c; j += kLanes) {
    Vec sums = zeros();
    for (int t = j; t < c; ++t) sums -= load(s.pairs2 + index_t(t) * cp + j);
    store(s.deta + j, load(s.deta + j) + sums);
    total += load(m.gates.eta + j) * sums;
  }
  if (m.retention.scales_reads) drho[1] = unscaled(sum(total), rho);
}

// Tokens: dGu, then back to dE and dU, row by row; d eta's share of W1, d delta
void MlpBackwardTask::inner_backward(const Part& mine, const MlpState& start) {
  const Range tokens = mine.tokens;
  if (tokens.count() == 0) return;
  const LayerNorm& norm = m.norm;
  MIRAS_STAGE("dGu", 2 * tokens.count() * d * hd, hd * tokens.count() + hd * d + 2 * tokens.count() * d);
  m.sum_blocks(tokens, s.dGaT.down, start.primal[0].down, s.dGu);
  sweep(tokens, dp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    m.add_sum(x, i, j, s.dGaT.down, start.primal[0].down, s.dGu);
    x.each([&](int r, int k, Vec& y)
               MIRAS_LAMBDA { y += broadcast(m.gates.eta[i + r]) * load(s.dU1 + index_t(i + r) * dp + j + k * kLanes); });
    x.store_to(s.dGu + i * dp + j, dp);
  });
  MIRAS_STAGE("row pass", 0, 20 * tokens.count() * d);
  norm.pull_back(tokens, m.X, m.r, s.dGu, s.dGw);
  for (int t = tokens.first; t < tokens.last; ++t) {
    Vec dot = zeros();
    for (int j = 0; j < dp; j += kLanes) {
      const index_t at = index_t(t) * dp + j;
      dot += load(s.dU1 + at) * load(m.Gu + at);
      store(s.dE + at, load(s.dGw + at) * load(norm.weight + j));
    }
    s.deta[t] = sum(dot);
  }

  const index_t first = tokens.first, from = first * dp;  // its d eta is not used
  bias.pull_back(m.bias_rows(p, tokens, s.ones), m.E + from, m.G + from, s.dE + from, s.dlog + first, s.ddelta + first);

  for (int t = tokens.first; t < tokens.last; ++t) {
    const index_t row = index_t(t) * dp;
    const float *x = m.X + row, *g = m.G + row, *gu = m.Gu + row, *dgu = s.dGu + row, *de = s.dE + row;
    Vec g_x = zeros(), dgu_x = zeros(), dgu_gu = zeros();
    for (int j = 0; j < dp; j += kLanes) {
      g_x += load(norm.weight + j) * load(g + j) * load(x + j);
      dgu_x += load(dgu + j) * load(x + j);
      dgu_gu += load(dgu + j) * load(gu + j);
    }
    const Vec r = broadcast(m.r[t]), c1 = r * norm.mean(g_x), c2 = r * norm.mean(dgu_x), shrink = r * norm.mean(dgu_gu);
    const auto dx = [&](int j) MIRAS_LAMBDA {
      const Vec w = load(norm.weight + j), direct = bias.predicts ? w * load(de + j) : zeros();
      return direct - (load(dgu + j) * c1 + w * load(g + j) * c2);
    };
    norm.pull_row(x, m.r[t], dx, s.dU + row);
    for (int j = 0; j < dp; j += kLanes) store(s.dU + row + j, load(s.dU + row + j) - shrink * load(x + j));
    norm.centre_again(s.dU + row);
  }
  m.transpose_rows(tokens, s.dU, s.dUT);
  s.dU.pack_down(tokens, dp);
}

// Hidden units: dZ in place of gelu'' o Ga o dGz
void MlpBackwardTask::hidden_backward(const Part& mine, int c, const MlpState& start) {
  const Rows W1T = by_rows(start.primal[0].along, dp), J = by_rows(s.J[0].along, dp), Aq = by_rows(m.AqT.along, cp);
  const Operand dZT = this->dZT();
  MIRAS_STAGE("dZ", 4 * c * d * hd + c * (c + 1) * hd, 2 * hd * d + 2 * d * c + c * (c + 1) / 2 + 4 * hd * c);
  if (momentum) m.hidden_product(mine.units, c, s.JS[0], s.U1T, m.partT, ReadSoon());
  m.sweep_hidden<2>(mine.units, c, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    x.subtract(J.at(i), s.U1T + j, cp, 0, d);
    x.scale_cols(m.gates.to_end + j);
    if (momentum) x.subtract_scaled_cols(m.partT + index_t(i) * cp + j, cp, m.gates.step_end + j);
    x.subtract(Aq.at(i), s.M1.down + j, cp, j, c);
    x.add(W1T.at(i), s.dUT + j, cp, 0, d);
    x.each([&](int r, int k, Vec& y) MIRAS_LAMBDA {
      const index_t at = index_t(i + r) * cp + j + k * kLanes;
      store(dZT.along + at, load(dZT + at) + load(m.slopeT + at) * y);
    });
  });
  dZT.pair_along(mine.units, m.columns(c));
}

// Channels: d weight and d bias
void MlpBackwardTask::norm_gradients(const Part& mine, int c) {
  MIRAS_STAGE("row pass", 0, 6 * c * d);
  for (int j = mine.channels.first; j < mine.channels.last; j += kLanes) {
    Vec dweight = load(s.dweight + j), dbias = load(s.dbias + j);
    for (int t = 0; t < c; ++t) {
      const index_t at = index_t(t) * dp + j;
      const Vec dO = load(s.dO + at), dE = bias.predicts ? load(s.dE + at) : zeros();
      dweight += dO * load(m.Xq + at) + load(s.dGw + at) * load(m.G + at) + dE * load(m.X + at);
      dbias += dO + dE;
    }
    store(s.dweight + j, dweight), store(s.dbias + j, dbias);
  }
}

// Hidden units: products of the states and their gradients, kPad units at a time, whatever the number of parts
void MlpBackwardTask::inner_products(const Part& mine, const MlpState& start) {
  for (int i = mine.units.first; i < mine.units.last; i += kPad) {
    const index_t at = index_t(i) * dp, n = index_t(minimum(kPad, hd - i)) * dp;
    const auto along = [&](const auto& grads, const auto& states) {
      return inner_product(grads[0] + at, states[0] + at, n) + inner_product(grads[1] + at, states[1] + at, n);
    };
    s.along[0][i / kPad] = along(s.J, start.dual);
    if (momentum) s.along[1][i / kPad] = along(s.J, start.momenta), s.along[2][i / kPad] = along(s.JS, start.momenta);
  }
}

}  // namespace miras::cpu::MIRAS_LEVEL
