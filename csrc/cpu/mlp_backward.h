// Backward of the MLP memory (SPEC section 5), chunks from last to first. J1, J2 = gradients of W1, W2 as a chunk ends with them,
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
// This is L2Retention without momentum. Else, with JS1, JS2 the gradients of the momenta a chunk ends with, M, Theta, b and pi as
// in Gates, and rho in all that a chunk reads of its own writes (P = rho M o ..):
//
//   M for L,  M_C for end                                dU1_s -= Theta_Cs JS1 a_s         dU2_s -= Theta_Cs JS2 k_s
//   dZq += gelu'(Zq) o rho1 b dUq S1                     dQ += rho2 b dZq S2
//   dZ -= gelu'(Z) o Theta_C JS1' U1                     dK -= Theta_C JS2' U2
//   J <- gamma_C J + phi'(A)^T [dW] + d rho d rho / dA   JS1 <- b_C J1 + pi_C JS1 + rho1 sum_t b_t dUq_t aq_t'   (JS2 likewise)
//
// with dW what J adds up above, and d rho1 = sum_t dUq_t . (b_t S1 aq_t - sum_s M_ts (aq_t . a_s) U1_s), d rho2 likewise.
//
// Every `checkpoint_every`-th chunk start was saved. A segment of chunks is first run forward from its start, keeping its
// states and what it computed with matrices at the chunks' starts, then backward. Sizes and layouts: mlp_chunk.h.
#pragma once

#include "mlp_chunk.h"

namespace miras::cpu::MIRAS_LEVEL {

struct MlpBackwardScratch {
  MlpChunk chunk;
  MlpStates states;                   // of a segment
  float *ZT, *GaT, *X, *r;            // of a segment: [segment][Hd x Cp] twice, [C x Dp], [Cp]
  float *J[2], *JS[2];                // [Hd x Dp]  JS with momentum
  float *dW;                          // [Hd x Dp]  where W is not A
  float *dO;                          // [C x Dp]
  float *dUq, *dUq_gamma, *Q_gamma;   // [C x Dp]  rows times gamma_t in the last two
  float *dU1, *dGu, *dE, *dU, *dX;    // [C x Dp]  dE is dG at first; dX: dQ and dK
  float *U1T, *dUqT, *dUT;            // [D x Cp]
  float *dZqT, *dGaT;                 // [Hd x Cp]  gelu'(Zq) at first in dZqT
  float *L, *M1, *M1T, *M2, *pairs;   // [C x Cp]  pairs: what log alpha has of reads of writes, with momentum what M has
  float *Theta, *scores1, *scores2;   // [C x Cp]  with momentum: Theta, Aq A', Q K'
  float *ones, *deta, *ddelta, *dlog;            // [Cp]
  float *read_sums, *write_sums, *write2_sums;   // [Cp]  gamma (W q).d; end U.(J a); of W2, without eta. Without end with momentum
  float *dcarry, *dstep, *dtheta;     // [Cp]  with momentum: gradients of b, of the last row of Theta, of theta
  float *dots;                        // [Cp]
  float *dweight, *dbias;             // [Dp]
  float *spare;                       // [D x Hdp]

  MIRAS_FN MlpBackwardScratch(Arena& a, const MlpBackward& p)
      : chunk(a, p), states(a, p, chunk.retention, p.segment) {
    const int64_t n = p.segment;
    const int dp = chunk.dp, cp = chunk.cp, momentum = chunk.gates.momentum;
    ZT = a.take(n * p.Hd, cp), GaT = a.take(n * p.Hd, cp);
    X = a.take(n * p.C, dp), r = a.take(n, cp);
    for (float*& x : J) x = a.take(p.Hd, dp);
    for (float*& x : JS) x = a.take(momentum * p.Hd, dp);
    dW = a.take(chunk.retention.identity ? 0 : p.Hd, dp);
    dO = a.take(p.C, dp);
    dUq = a.take(p.C, dp), dUq_gamma = a.take(p.C, dp), Q_gamma = a.take(p.C, dp);
    dU1 = a.take(p.C, dp), dGu = a.take(p.C, dp), dE = a.take(p.C, dp), dU = a.take(p.C, dp), dX = a.take(p.C, dp);
    U1T = a.take(p.D, cp), dUqT = a.take(p.D, cp), dUT = a.take(p.D, cp);
    dZqT = a.take(p.Hd, cp), dGaT = a.take(p.Hd, cp);
    L = a.take(p.C, cp), M1 = a.take(p.C, cp), M1T = a.take(p.C, cp), M2 = a.take(p.C, cp), pairs = a.take(p.C, cp);
    Theta = a.take(momentum * p.C, cp), scores1 = a.take(momentum * p.C, cp), scores2 = a.take(momentum * p.C, cp);
    ones = a.take(1, cp), deta = a.take(1, cp), ddelta = a.take(1, cp), dlog = a.take(1, cp);
    read_sums = a.take(1, cp), write_sums = a.take(1, cp), write2_sums = a.take(1, cp);
    dcarry = a.take(momentum, cp), dstep = a.take(momentum, cp), dtheta = a.take(momentum, cp);
    dots = a.take(momentum, cp);
    dweight = a.take(1, dp), dbias = a.take(1, dp);
    spare = a.take(p.D, round_up(p.Hd, kPad));
  }
};

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

// One head of one sequence.
struct MlpBackwardTask {
  const MlpBackward& p;
  const BiasTable& bias;
  MlpBackwardScratch s;
  MlpChunk& m;
  int64_t n, h, b, length;
  int d, dp, hd, cp;
  index_t state, hidden, rows;  // floats of [Hd x Dp], [Hd x Cp], [C x Dp]
  bool momentum;
  float drho[2];

  MIRAS_FN MlpBackwardTask(const MlpBackward& params, const BiasTable& table, const MlpBackwardScratch& scratch, int64_t task)
      : p(params), bias(table), s(scratch), m(s.chunk) {
    n = task / p.H, h = task % p.H, b = p.batch(n), length = p.length(n);
    d = p.D, dp = m.dp, hd = p.Hd, cp = m.cp;
    momentum = m.gates.momentum;
    state = index_t(hd) * dp, hidden = index_t(hd) * cp, rows = index_t(p.C) * dp;
  }

  MIRAS_FN int tokens(int64_t chunk) const {
    const int64_t left = length - chunk * p.C;
    return int(left < p.C ? left : p.C);
  }
  MIRAS_FN int64_t token(int64_t chunk) const { return p.begin(n) + chunk * p.C; }
  MIRAS_FN ChunkView view(const TokenTensor& x, int64_t chunk) const { return m.view(p, x, b, token(chunk), h); }

  // Chunk i of a segment's part of MlpChunk lies in the segment's memory.
  void choose(int64_t i) { m.X = s.X + i * rows, m.r = s.r + i * cp; }

  void rerun(int64_t first, int64_t last);
  void repeat(int64_t i, int c);
  void read_backward(int c, const MlpState& start, WriteSoon soon);
  void write_backward(int c, const MlpState& start, const float* slopeT, float* HT);
  void inner_backward(int c);
  void hidden_backward(int c, const MlpState& start, const float* slopeT, float* HT_dZT);
  void token_gradients(int64_t chunk, const MlpState& start, const float* dZT);
  void gate_gradients(int64_t chunk, const MlpState& start);
  void state_gradients(int c, const MlpState& start, const float* dZT, ReadSoon soon);
  void reads_of_carried(int c, const float* products, int i, const Rho& rho);
  void chunk_backward(int64_t chunk, int64_t i);
  void run();
};

// Chunks [first, last) forward once more.
void MlpBackwardTask::rerun(int64_t first, int64_t last) {
  SavedState(p, n, h, first).read(s.states.at(0));
  for (int64_t chunk = first; chunk < last; ++chunk) {
    const int64_t i = chunk - first;
    const int c = tokens(chunk);
    const MlpState start = s.states.at(i);
    choose(i);
    m.find_primal(start);
    m.read(p, b, token(chunk), h, c);
    m.write(p, bias, c, start, s.ZT + i * hidden, s.GaT + i * hidden, ReadSoon());
    if (chunk + 1 == last) break;
    m.advance_both(c, start, s.states.at(i + 1), ReadSoon(view(p.k, chunk + 1), tokens(chunk + 1)));
  }
}

// What the rerun did not keep of chunk i; gelu'(Z) comes to lie over Z, gelu''(Z) o Ga over Ga.
void MlpBackwardTask::repeat(int64_t i, int c) {
  float *ZT = s.ZT + i * hidden, *GaT = s.GaT + i * hidden;
  m.each_hidden(c, [&](index_t at) MIRAS_LAMBDA {
    const Gelu gelu(load(ZT + at));
    const Vec slope = gelu.slope(), ga = load(GaT + at);
    store(m.AT + at, gelu.value());
    store(m.GzT + at, slope * ga);
    store(ZT + at, slope);
    store(GaT + at, gelu.curvature() * ga);
  });
  m.errors(p, bias, c);
}

// x / rho for an x that is a multiple of rho; rho underflows with all that it multiplies
MIRAS_INLINE float unscaled(float x, const Rho& rho) { return rho.value > 0.0f ? x / rho.value : 0.0f; }

// The gradient of b, and d rho's share, from the products <what a token reads of S, its gradient> of matrix i
void MlpBackwardTask::reads_of_carried(int c, const float* products, int i, const Rho& rho) {
  for (int t = 0; t < c; ++t) {
    s.dcarry[t] += rho.value * products[t];
    drho[i] += m.gates.b[t] * products[t];
  }
}

// dUq, M1, dZq, the pairs of W1 and its reads
void MlpBackwardTask::read_backward(int c, const MlpState& start, WriteSoon soon) {
  const float* W1T = start.primal[0];
  const Vec rho = broadcast(start.rho[0].value);
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
  if (momentum) {
    m.hidden_product(c, start.carried[0], s.dUqT, m.partT, ReadSoon());
    fill_zero(s.dots, cp);
    column_dots(hd, c, cp, m.AqT, m.partT, s.dots);
    reads_of_carried(c, s.dots, 0, start.rho[0]);
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

// M2, the pairs of W2, dU1, dGu, and over gelu'' o Ga its product with dGz; d eta has the pairs' share of W2
void MlpBackwardTask::write_backward(int c, const MlpState& start, const float* slopeT, float* HT) {
  const float* W1T = start.primal[0];
  const Vec rho = broadcast(start.rho[1].value);
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

  sweep(c, dp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    x.add(Cols{s.dGaT + i, cp}, W1T + j, dp, 0, hd);
    x.each([&](int r, int k, Vec& y) MIRAS_LAMBDA {
      y += broadcast(m.gates.eta[i + r]) * load(s.dU1 + index_t(i + r) * dp + j + k * kLanes);
    });
    x.store_to(s.dGu + i * dp + j, dp);
  });
}

// From dGu back to dE and dU, row by row; d eta's share of W1, d delta, d weight and d bias.
void MlpBackwardTask::inner_backward(int c) {
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

  bias.pull_back(m.bias_rows(p, c, s.ones), m.E, m.G, s.dE, s.dlog, s.ddelta);  // what it calls d eta is of no use

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

// dZ over gelu'' o Ga o dGz
void MlpBackwardTask::hidden_backward(int c, const MlpState& start, const float* slopeT, float* HT_dZT) {
  const float* W1T = start.primal[0];
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

// dQ, dV, dK and the gates
void MlpBackwardTask::token_gradients(int64_t chunk, const MlpState& start, const float* dZT) {
  const int c = tokens(chunk);
  const Gates& gates = m.gates;
  const float* W2 = start.primal[1];

  if (momentum) {
    predict(c, hd, s.dZqT, cp, start.carried[1], dp, m.part, ReadSoon());
    fill_zero(s.dots, cp);
    row_dots(c, dp, m.Q, m.part, s.dots);
    reads_of_carried(c, s.dots, 1, start.rho[1]);
    weigh_rows(c, dp, m.carry[1], m.part, m.part);
  }
  sweep(c, dp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    x.add(Cols{s.dZqT + i, cp}, W2 + j, dp, 0, hd);
    x.scale_rows(gates.gamma + i);
    if (gates.decays) x.dot_rows(m.Q + i * dp + j, dp, s.read_sums + i);
    if (momentum) x.add_matrix(m.part + index_t(i) * dp + j, dp);
    x.subtract(Rows{s.M2 + i * cp, cp}, m.K + j, dp, 0, i + R);
    x.each([&](int r, int k, Vec& y) MIRAS_LAMBDA { y += load(s.dO + index_t(i + r) * dp + j + k * kLanes); });
    x.store_to(s.dX + i * dp + j, dp);
  });
  view(p.dq, chunk).write(c, s.dX, dp);

  for (index_t i = 0; i < index_t(c) * dp; i += kLanes) store(s.dX + i, -load(s.dE + i));
  view(p.dv, chunk).write(c, s.dX, dp);

  if (momentum) {
    predict(c, hd, m.GzT, cp, s.JS[1], dp, m.part, ReadSoon());
    fill_zero(s.dots, cp);
    row_dots(c, dp, m.K, m.part, s.dots);
    for (int t = 0; t < c; ++t) {
      s.dstep[t] += gates.eta[t] * s.dots[t];
      s.deta[t] -= gates.step_end[t] * s.dots[t];
    }
    weigh_rows(c, dp, m.step_weight, m.part, m.part);
  }
  sweep(c, dp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    x.subtract(Cols{m.GzT + i, cp}, s.J[1] + j, dp, 0, hd);
    if (momentum) x.dot_rows(m.K + i * dp + j, dp, s.write2_sums + i);
    x.scale_rows(gates.to_end + i);
    if (!momentum) x.dot_rows(m.K + i * dp + j, dp, s.write2_sums + i);
    x.scale_rows(gates.eta + i);
    if (momentum) x.subtract_matrix(m.part + index_t(i) * dp + j, dp);
    x.add(Cols{dZT + i, cp}, W2 + j, dp, 0, hd);
    x.subtract(Cols{s.M2 + i, cp}, m.Q + j, dp, i, c);
    if (bias.predicts) x.each([&](int r, int k, Vec& y) MIRAS_LAMBDA { y += load(s.dE + index_t(i + r) * dp + j + k * kLanes); });
    x.store_to(s.dX + i * dp + j, dp);
  });
  view(p.dk, chunk).write(c, s.dX, dp);

  for (int t = 0; t < c; ++t) {
    s.deta[t] += momentum ? gates.to_end[t] * s.write2_sums[t] : s.write2_sums[t];
    s.write_sums[t] -= gates.eta[t] * s.write2_sums[t];
  }
  write_gate(p.dlr, b, token(chunk), h, c, s.deta);
  if (p.ddelta) write_gate(p.ddelta, b, token(chunk), h, c, s.ddelta);
}

// d log alpha and d theta
void MlpBackwardTask::gate_gradients(int64_t chunk, const MlpState& start) {
  const int c = tokens(chunk);
  const Gates& gates = m.gates;
  const auto along = [&](float* const (&grads)[2], float* const (&states)[2]) {
    return inner_product(grads[0], states[0], state) + inner_product(grads[1], states[1], state);
  };
  const float through = gates.decays ? *gates.end(c) * along(s.J, start.dual) : 0.0f;
  if (!momentum) {
    if (gates.decays) decay_gradient(c, s.pairs, cp, s.read_sums, s.write_sums, through, s.dlog);
  } else {
    s.dcarry[c - 1] += along(s.J, start.carried);
    for (int t = 0; t < cp; ++t) s.write_sums[t] = -s.write_sums[t], s.dstep[t] = -s.dstep[t];
    decay_gradient_with_momentum(gates, c, s.L, cp, s.write_sums, s.pairs, s.dcarry, s.read_sums, through, s.dlog);
    momentum_gradient(gates, c, s.Theta, cp, s.pairs, s.dcarry, s.dstep, along(s.JS, start.carried), s.dtheta);
    write_gate(p.dmomentum, b, token(chunk), h, c, s.dtheta);
  }
  if (gates.decays) write_gate(p.dlog_decay, b, token(chunk), h, c, s.dlog);
}

// J and JS of the chunk before
void MlpBackwardTask::state_gradients(int c, const MlpState& start, const float* dZT, ReadSoon soon) {
  const Gates& gates = m.gates;
  const bool identity = m.retention.identity;
  if (momentum) {
    const auto carried_gradient = [&](int i, const float* leftT, const float* right) {
      weigh_rows(c, dp, m.carry[i], right, m.part);
      sweep(hd, dp, [&]<int R, int N>(int row, int j) MIRAS_LAMBDA {
        const index_t at = index_t(row) * dp + j;
        Tile<R, N> x;
        x.add(Rows{leftT + index_t(row) * cp, cp}, m.part + j, dp, 0, c);
        x.add_scaled(s.J[i] + at, dp, gates.carried_end(c));
        x.add_scaled(s.JS[i] + at, dp, gates.step_carried_end(c));
        x.store_to(s.JS[i] + at, dp);
      });
    };
    carried_gradient(0, m.AqT, s.dUq);
    carried_gradient(1, s.dZqT, m.Q);
  }

  // Over J where W = A; else what W's gradient adds goes through phi first.
  const auto through_phi = [&](int i) {
    if (identity) return;
    m.retention.pull_back(m.shape(i), start.dual[i], start.primal[i], start.rho[i], drho[i], s.dW);
    const Vec decay = broadcast(*gates.end(c));
    for (index_t at = 0; at < state; at += kLanes) store(s.J[i] + at, decay * load(s.J[i] + at) + load(s.dW + at));
  };
  weigh_rows(c, dp, gates.gamma, s.dUq, s.dUq_gamma);
  weigh_rows(c, dp, gates.gamma, m.Q, s.Q_gamma);
  float* to = identity ? s.J[0] : s.dW;
  sweep(hd, dp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    const index_t row = index_t(i) * cp, at = index_t(i) * dp + j;
    Tile<R, N> x;
    x.add(Rows{m.AqT + row, cp}, s.dUq_gamma + j, dp, 0, c, soon);
    x.add(Rows{s.dGaT + row, cp}, m.Gu + j, dp, 0, c);
    x.add(Rows{m.AT + row, cp}, s.dU + j, dp, 0, c);
    if (identity) x.add_scaled(s.J[0] + at, dp, gates.end(c));
    x.store_to(to + at, dp);
  });
  through_phi(0);
  to = identity ? s.J[1] : s.dW;
  sweep(hd, dp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    const index_t row = index_t(i) * cp, at = index_t(i) * dp + j;
    Tile<R, N> x;
    x.add(Rows{s.dZqT + row, cp}, s.Q_gamma + j, dp, 0, c, soon);
    x.add(Rows{dZT + row, cp}, m.K + j, dp, 0, c);
    if (identity) x.add_scaled(s.J[1] + at, dp, gates.end(c));
    x.store_to(to + at, dp);
  });
  through_phi(1);
}

void MlpBackwardTask::chunk_backward(int64_t chunk, int64_t i) {
  const int c = tokens(chunk);
  const MlpState start = s.states.at(i);
  float *slopeT = s.ZT + i * hidden, *HT = s.GaT + i * hidden;  // as `repeat` leaves them; HT becomes dZ'
  m.read_queries(p, b, token(chunk), h, c);
  view(p.grad_out, chunk).read(c, s.dO, dp);
  fill_zero(s.deta, cp);
  fill_zero(s.read_sums, cp), fill_zero(s.write_sums, cp), fill_zero(s.write2_sums, cp);
  if (momentum) fill_zero(s.dcarry, cp), fill_zero(s.dstep, cp);
  drho[0] = drho[1] = 0.0f;

  repeat(i, c);
  m.read_hidden(c, start, {s.L, s.Theta, s.scores2}, WriteSoon(view(p.dq, chunk), c));
  m.each_hidden(c, [&](index_t at) MIRAS_LAMBDA {
    const Gelu gelu(load(m.AqT + at));
    store(m.AqT + at, gelu.value());
    store(s.dZqT + at, gelu.slope());
  });
  const auto kept = momentum ? MlpChunk::KeptScores{s.L, s.Theta, s.scores1} : MlpChunk::KeptScores{};
  m.read_out(c, start, kept, WriteSoon(view(p.dv, chunk), c));

  read_backward(c, start, WriteSoon(view(p.dk, chunk), c));
  write_backward(c, start, slopeT, HT);
  inner_backward(c);
  hidden_backward(c, start, slopeT, HT);
  token_gradients(chunk, start, HT);
  gate_gradients(chunk, start);
  state_gradients(c, start, HT, ReadSoon(view(p.k, chunk - 1), chunk > 0 ? p.C : 0));
}

void MlpBackwardTask::run() {
  m.begin(p, h);
  const auto begin_with = [&](const StateTensor (&grads)[2], float* const (&to)[2]) {
    if (grads[0]) read_states(grads, n, h, d, hd, to, dp);
    else fill_zero(to[0], state), fill_zero(to[1], state);
  };
  begin_with(p.grad_final_dual, s.J);
  if (momentum) begin_with(p.grad_final_carried, s.JS);
  const int64_t square = int64_t(p.C) * cp;  // zero right of the diagonal, and staying so
  fill_zero(s.L, square), fill_zero(s.M1, square), fill_zero(s.M2, square), fill_zero(s.pairs, square);
  if (momentum) fill_zero(s.Theta, square);
  fill_zero(s.dweight, dp), fill_zero(s.dbias, dp);
  for (int t = 0; t < cp; ++t) s.ones[t] = 1.0f;

  const int64_t chunks = (length + p.C - 1) / p.C, every = p.checkpoint_every;
  for (int64_t last = chunks; last > 0;) {
    const int64_t first = (last - 1) / every * every;
    rerun(first, last);
    for (int64_t chunk = last - 1; chunk >= first; --chunk) {
      choose(chunk - first);
      if (chunk != last - 1) m.read(p, b, token(chunk), h, tokens(chunk));  // the last one is as the rerun left it
      chunk_backward(chunk, chunk - first);
    }
    last = first;
  }
  write_states(p.d_dual, n, h, d, hd, s.J, dp, s.spare);
  if (momentum) write_states(p.d_carried, n, h, d, hd, s.JS, dp, s.spare);
  copy_out(s.dweight, dp, 1, d, p.dln_weight + (n * p.H + h) * d, d);
  copy_out(s.dbias, dp, 1, d, p.dln_bias + (n * p.H + h) * d, d);
}

static void mlp_backward(const MlpBackward& p, int64_t first, int64_t last) {
  FlushDenormals flush;
  Arena measure(nullptr);
  MlpBackwardScratch(measure, p);
  Arena arena(thread_scratch(size_t(measure.used())));
  const MlpBackwardScratch s(arena, p);
  const BiasTable bias = bias_table(p.bias, p.bias_params);
  for (int64_t i = first; i < last; ++i) MlpBackwardTask(p, bias, s, i).run();
}

}  // namespace miras::cpu::MIRAS_LEVEL
