// The stages of the MLP memory's backward that lie inside a chunk, in order: the read-out, the writes, the inner gradient, the hidden
// units. mlp_backward.h has the equations.
#pragma once

#include "mlp_backward_task.h"

namespace miras::cpu::MIRAS_LEVEL {

// sums[t] += <row t of a, row t of b>   [c x cols]
static void row_dots(int c, int cols, const float* a, const float* b, float* sums) {
  for (int t = 0; t < c; ++t, a += cols, b += cols) sums[t] += inner_product(a, b, cols);
}
// sums[t] += <column t of a, column t of b>   [rows x Cp]
static void column_dots(int rows, int c, index_t cp, const float* a, const float* b, float* sums) {
  for (int t = 0; t < c; t += kLanes) {
    Vec dot = load(sums + t);
    for (int i = 0; i < rows; ++i) dot += load(a + i * cp + t) * load(b + i * cp + t);
    store(sums + t, dot);
  }
}

// x / rho for an x that is a multiple of rho; if rho underflows, so does everything that it multiplies
MIRAS_INLINE float unscaled(float x, const Rho& rho) { return rho.value > 0.0f ? x / rho.value : 0.0f; }

// The gradient of b, and d rho's share, from the products <what a token reads of S, its gradient> of matrix i
void MlpBackwardTask::reads_of_momenta(int c, const float* products, int i, const Rho& rho) {
  for (int t = 0; t < c; ++t) {
    s.dcarry[t] += rho.value * products[t];
    drho[i] += m.gates.b[t] * products[t];
  }
}

// dUq, M1, dZq, the pairs of W1 and its reads
void MlpBackwardTask::read_backward(int c, const MlpState& start, WriteSoon soon) {
  const float* W1T = start.primal[0];
  const Vec rho = broadcast(start.rho[0].value);
  MIRAS_STAGE("row pass", 0, 11 * c * d);
  m.norm.pull_back_weighted(c, m.Xq, m.rq, s.dO, s.dUq);
  for (int t = 0; t < c; ++t) {
    for (int j = 0; j < dp; j += kLanes) {
      const Vec dO = load(s.dO + t * dp + j);
      store(s.dweight + j, load(s.dweight + j) + dO * load(m.Xq + t * dp + j));
      store(s.dbias + j, load(s.dbias + j) + dO);
    }
  }
  transpose(m.U1, dp, c, d, s.U1T, cp);
  transpose(s.dUq, dp, c, d, s.dUqT, cp);

  MIRAS_STAGE("pairs", c * (c + 1) * d, 2 * c * d + 3 * c * (c + 1));
  sweep_lower(c, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    x.add(Rows{s.dUq + i * dp, dp}, s.U1T + j, cp, 0, d, soon);
    x.each([&](int r, int k, Vec& y) MIRAS_LAMBDA {
      const index_t at = index_t(i + r) * cp + j + k * kLanes;
      store(s.pairs + at, momentum ? -rho * load(s.scores1 + at) * y : -load(m.P1 + at) * y);
      y *= rho * load(s.L + at);
    });
    x.store_to(s.M1 + i * cp + j, cp);
  });
  transpose(s.M1, cp, c, c, s.M1T, cp);
  if (m.retention.scales_reads) {
    float total = 0.0f;
    for (int t = 0; t < c; ++t) total += inner_product(s.pairs + t * cp, momentum ? s.L + t * cp : s.ones, cp);
    drho[0] = unscaled(total, start.rho[0]);
  }
  MIRAS_STAGE("dZq", 2 * c * d * hd + c * (c + 1) * hd, hd * d + d * c + c * (c + 1) / 2 + 4 * hd * c);
  if (momentum) {
    m.hidden_product(c, start.momenta[0], s.dUqT, m.partT, ReadSoon());
    fill_zero(s.dots, cp);
    column_dots(hd, c, cp, m.AqT, m.partT, s.dots);
    reads_of_momenta(c, s.dots, 0, start.rho[0]);
  }

  m.sweep_hidden<2>(c, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    const index_t at = index_t(i) * cp + j;
    Tile<R, N> x;
    x.add(Rows{W1T + index_t(i) * dp, dp}, s.dUqT + j, cp, 0, d);
    x.scale_cols(m.gates.gamma + j);
    if (m.gates.decays) x.dot_cols(m.AqT + at, cp, s.read_sums + j);
    if (momentum) x.add_scaled_cols(m.partT + at, cp, m.carry[0] + j);
    x.subtract(Rows{m.AT + index_t(i) * cp, cp}, s.M1T + j, cp, 0, minimum(c, j + N * kLanes));
    x.multiply(s.dZqT + at, cp);
    x.store_to(s.dZqT + at, cp);
  });
}

// M2, the pairs of W2, dU1, dGu, and in place of gelu'' o Ga its product with dGz; d eta gets the share of W2's pairs
void MlpBackwardTask::write_backward(int c, const MlpState& start, const float* slopeT, float* HT) {
  const float* W1T = start.primal[0];
  const Vec rho = broadcast(start.rho[1].value);
  MIRAS_STAGE("pairs", c * (c + 1) * hd, 2 * hd * c + 5 * c * (c + 1) / 2);
  sweep_lower(c, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    x.add(Cols{s.dZqT + i, cp}, m.GzT + j, cp, 0, hd);
    MIRAS_UNROLL
    for (int k = 0; k < N; ++k) {
      const index_t column = j + k * kLanes;
      const Vec eta = load(m.gates.eta + column);
      Vec total = load(s.deta + column);
      MIRAS_UNROLL
      for (int r = 0; r < R; ++r) {
        const index_t at = index_t(i + r) * cp + column;
        const Vec pair = load(m.P2 + at) * x.acc[r][k];
        total -= pair;
        store(s.pairs + at, load(s.pairs + at) - eta * (momentum ? rho * load(s.scores2 + at) * x.acc[r][k] : pair));
        x.acc[r][k] *= eta * load(s.L + at) * rho;
      }
      store(s.deta + column, total);
    }
    x.store_to(s.M2 + i * cp + j, cp);
  });
  if (m.retention.scales_reads) drho[1] = unscaled(inner_product(m.gates.eta, s.deta, cp), start.rho[1]);

  MIRAS_STAGE("dU", 2 * c * d * hd + c * (c + 1) * d, hd * c + hd * d + c * (c + 1) / 2 + 3 * c * d);
  if (momentum) {
    predict(c, hd, m.AT, cp, s.JS[0], dp, m.part, ReadSoon());
    row_dots(c, dp, m.U1, m.part, s.dstep);
    weigh_rows(c, dp, m.gates.step_end, m.part, m.part);
  }
  sweep(c, dp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    x.add(Cols{m.AT + i, cp}, s.J[0] + j, dp, 0, hd);
    if (momentum) x.dot_rows(m.U1 + i * dp + j, dp, s.write_sums + i);
    x.scale_rows(m.gates.to_end + i);
    if (m.gates.decays && !momentum) x.dot_rows(m.U1 + i * dp + j, dp, s.write_sums + i);
    if (momentum) x.add_matrix(m.part + index_t(i) * dp + j, dp);
    x.add(Cols{m.P1 + i, cp}, s.dUq + j, dp, i, c);
    x.each([](int, int, Vec& y) MIRAS_LAMBDA { y = -y; });
    x.store_to(s.dU1 + i * dp + j, dp);
  });

  MIRAS_STAGE("dGz", 2 * c * d * hd + c * (c + 1) * hd, hd * d + d * c + c * (c + 1) / 2 + 5 * hd * c);
  if (momentum) m.hidden_product(c, s.JS[1], m.KT, m.partT, ReadSoon());
  m.sweep_hidden<2>(c, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    x.add(Rows{s.J[1] + index_t(i) * dp, dp}, m.KT + j, cp, 0, d);
    x.scale_cols(m.gates.to_end + j);
    if (momentum) x.add_scaled_cols(m.partT + index_t(i) * cp + j, cp, m.gates.step_end + j);
    x.add(Rows{s.dZqT + index_t(i) * cp, cp}, m.P2 + j, cp, j, c);
    x.each([&](int r, int k, Vec& y) MIRAS_LAMBDA {
      const index_t at = index_t(i + r) * cp + j + k * kLanes;
      const Vec dGz = -load(m.gates.eta + j + k * kLanes) * y;
      store(HT + at, load(HT + at) * dGz);
      y = load(slopeT + at) * dGz;
    });
    x.store_to(s.dGaT + index_t(i) * cp + j, cp);
  });

  MIRAS_STAGE("dGu", 2 * c * d * hd, hd * c + hd * d + 2 * c * d);
  sweep(c, dp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    x.add(Cols{s.dGaT + i, cp}, W1T + j, dp, 0, hd);
    x.each([&](int r, int k, Vec& y)
               MIRAS_LAMBDA { y += broadcast(m.gates.eta[i + r]) * load(s.dU1 + index_t(i + r) * dp + j + k * kLanes); });
    x.store_to(s.dGu + i * dp + j, dp);
  });
}

// From dGu back to dE and dU, row by row; d eta's share of W1, d delta, d weight and d bias.
void MlpBackwardTask::inner_backward(int c) {
  MIRAS_STAGE("row pass", 0, 24 * c * d);
  const LayerNorm& norm = m.norm;
  norm.pull_back(c, m.X, m.r, s.dGu, s.dE);
  for (int t = 0; t < c; ++t) {
    Vec dot = zeros();
    for (int j = 0; j < dp; j += kLanes) {
      const index_t at = index_t(t) * dp + j;
      const Vec dGw = load(s.dE + at);
      dot += load(s.dU1 + at) * load(m.Gu + at);
      store(s.dweight + j, load(s.dweight + j) + dGw * load(m.G + at));
      store(s.dE + at, dGw * load(norm.weight + j));
    }
    s.deta[t] += sum(dot);
  }

  bias.pull_back(m.bias_rows(p, c, s.ones), m.E, m.G, s.dE, s.dlog, s.ddelta);  // its d eta is not used

  for (int t = 0; t < c; ++t) {
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
    for (int j = 0; j < dp; j += kLanes) {
      store(s.dU + row + j, load(s.dU + row + j) - shrink * load(x + j));
      if (!bias.predicts) continue;
      store(s.dweight + j, load(s.dweight + j) + load(de + j) * load(x + j));
      store(s.dbias + j, load(s.dbias + j) + load(de + j));
    }
    norm.centre_again(s.dU + row);
  }
  transpose(s.dU, dp, c, d, s.dUT, cp);
}

// dZ in place of gelu'' o Ga o dGz
void MlpBackwardTask::hidden_backward(int c, const MlpState& start, const float* slopeT, float* HT_dZT) {
  const float* W1T = start.primal[0];
  MIRAS_STAGE("dZ", 4 * c * d * hd + c * (c + 1) * hd, 2 * hd * d + 2 * d * c + c * (c + 1) / 2 + 4 * hd * c);
  if (momentum) m.hidden_product(c, s.JS[0], s.U1T, m.partT, ReadSoon());
  m.sweep_hidden<2>(c, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    x.subtract(Rows{s.J[0] + index_t(i) * dp, dp}, s.U1T + j, cp, 0, d);
    x.scale_cols(m.gates.to_end + j);
    if (momentum) x.subtract_scaled_cols(m.partT + index_t(i) * cp + j, cp, m.gates.step_end + j);
    x.subtract(Rows{m.AqT + index_t(i) * cp, cp}, s.M1 + j, cp, j, c);
    x.add(Rows{W1T + index_t(i) * dp, dp}, s.dUT + j, cp, 0, d);
    x.each([&](int r, int k, Vec& y) MIRAS_LAMBDA {
      const index_t at = index_t(i + r) * cp + j + k * kLanes;
      store(HT_dZT + at, load(HT_dZT + at) + load(slopeT + at) * y);
    });
  });
}

}  // namespace miras::cpu::MIRAS_LEVEL
