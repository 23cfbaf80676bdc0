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
// Every `checkpoint_every`-th chunk start was saved. A segment of chunks is first run forward from its start, keeping its
// states and what it computed with matrices at the chunks' starts, then backward. Sizes and layouts: mlp_chunk.h.
#pragma once

#include "mlp_chunk.h"

namespace miras::cpu::MIRAS_LEVEL {

struct MlpBackwardScratch {
  float *S1, *S2, *ZT, *GaT, *X, *r;  // of a segment: [segment][Hd x Dp] twice, [Hd x Cp] twice, [C x Dp], [Cp]
  float *J1, *J2;                     // [Hd x Dp]
  float *dO;                          // [C x Dp]
  float *dUq, *dUq_gamma, *Q_gamma;   // [C x Dp]  rows times gamma_t in the last two
  float *dU1, *dGu, *dE, *dU, *dX;    // [C x Dp]  dE is dG at first; dX: dQ and dK
  float *U1T, *dUqT, *dUT;            // [D x Cp]
  float *dZqT, *dGaT;                 // [Hd x Cp]  gelu'(Zq) at first in dZqT
  float *L, *M1, *M1T, *M2, *pairs;   // [C x Cp]  pairs: what log alpha has of reads of writes
  float *ones, *deta, *ddelta, *dlog;            // [Cp]
  float *read_sums, *write_sums, *write2_sums;   // [Cp]  gamma (W q).d; end U.(J a); of W2, without eta
  float *dweight, *dbias;             // [Dp]
  float *spare;                       // [D x Hdp]
  MlpChunk chunk;

  MIRAS_FN MlpBackwardScratch(Arena& a, const MlpBackward& p) : chunk(a, p) {
    const int64_t n = p.segment;
    const int dp = chunk.dp, cp = chunk.cp;
    S1 = a.take(n * p.Hd, dp), S2 = a.take(n * p.Hd, dp);
    ZT = a.take(n * p.Hd, cp), GaT = a.take(n * p.Hd, cp);
    X = a.take(n * p.C, dp), r = a.take(n, cp);
    J1 = a.take(p.Hd, dp), J2 = a.take(p.Hd, dp);
    dO = a.take(p.C, dp);
    dUq = a.take(p.C, dp), dUq_gamma = a.take(p.C, dp), Q_gamma = a.take(p.C, dp);
    dU1 = a.take(p.C, dp), dGu = a.take(p.C, dp), dE = a.take(p.C, dp), dU = a.take(p.C, dp), dX = a.take(p.C, dp);
    U1T = a.take(p.D, cp), dUqT = a.take(p.D, cp), dUT = a.take(p.D, cp);
    dZqT = a.take(p.Hd, cp), dGaT = a.take(p.Hd, cp);
    L = a.take(p.C, cp), M1 = a.take(p.C, cp), M1T = a.take(p.C, cp), M2 = a.take(p.C, cp), pairs = a.take(p.C, cp);
    ones = a.take(1, cp), deta = a.take(1, cp), ddelta = a.take(1, cp), dlog = a.take(1, cp);
    read_sums = a.take(1, cp), write_sums = a.take(1, cp), write2_sums = a.take(1, cp);
    dweight = a.take(1, dp), dbias = a.take(1, dp);
    spare = a.take(p.D, round_up(p.Hd, kPad));
  }
};

// One head of one sequence.
struct MlpBackwardTask {
  const MlpBackward& p;
  const BiasTable& bias;
  MlpBackwardScratch s;
  MlpChunk& m;
  int64_t n, h, b, length;
  int d, dp, hd, cp;
  index_t state, hidden, rows;  // floats of [Hd x Dp], [Hd x Cp], [C x Dp]

  MIRAS_FN MlpBackwardTask(const MlpBackward& params, const BiasTable& table, const MlpBackwardScratch& scratch, int64_t task)
      : p(params), bias(table), s(scratch), m(s.chunk) {
    n = task / p.H, h = task % p.H, b = p.batch(n), length = p.length(n);
    d = p.D, dp = m.dp, hd = p.Hd, cp = m.cp;
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
  void read_backward(int c, const float* S1, WriteSoon soon);
  void write_backward(int c, const float* S1, const float* slopeT, float* HT);
  void inner_backward(int c);
  void hidden_backward(int c, const float* S1, const float* slopeT, float* HT_dZT);
  void token_gradients(int64_t chunk, const float* S2, const float* dZT);
  void state_gradients(int c, const float* dZT, ReadSoon soon);
  void chunk_backward(int64_t chunk, int64_t i);
  void run();
};

// Chunks [first, last) forward once more.
void MlpBackwardTask::rerun(int64_t first, int64_t last) {
  const float* from = p.saved + ((p.slot(n) + first / p.checkpoint_every) * p.H + h) * 2 * hd * d;
  copy_in(from, d, hd, d, s.S1, dp);
  copy_in(from + int64_t(hd) * d, d, hd, d, s.S2, dp);
  for (int64_t chunk = first; chunk < last; ++chunk) {
    const int64_t i = chunk - first;
    const int c = tokens(chunk);
    float *S1 = s.S1 + i * state, *S2 = s.S2 + i * state;
    choose(i);
    m.read(p, b, token(chunk), h, c);
    m.write(p, bias, c, S1, S2, s.ZT + i * hidden, s.GaT + i * hidden, ReadSoon());
    if (chunk + 1 == last) break;
    m.advance_both(c, S1, S2, S1 + state, S2 + state, ReadSoon(view(p.k, chunk + 1), tokens(chunk + 1)));
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

// dUq, M1, dZq, the pairs of W1 and its reads
void MlpBackwardTask::read_backward(int c, const float* S1, WriteSoon soon) {
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
      store(s.pairs + at, -load(m.P1 + at) * y);
      y *= load(s.L + at);
    });
    x.store_to(s.M1 + i * cp + j, cp);
  });
  transpose(s.M1, cp, c, c, s.M1T, cp);

  m.sweep_hidden<2>(c, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    const index_t at = index_t(i) * cp + j;
    Tile<R, N> x;
    x.add(Rows{S1 + index_t(i) * dp, dp}, s.dUqT + j, cp, 0, d);
    x.scale_cols(m.gates.gamma + j);
    if (m.gates.decays) x.dot_cols(m.AqT + at, cp, s.read_sums + j);
    x.subtract(Rows{m.AT + index_t(i) * cp, cp}, s.M1T + j, cp, 0, minimum(c, j + N * kLanes));
    x.multiply(s.dZqT + at, cp);
    x.store_to(s.dZqT + at, cp);
  });
}

// M2, the pairs of W2, dU1, dGu, and over gelu'' o Ga its product with dGz; d eta has the pairs' share of W2
void MlpBackwardTask::write_backward(int c, const float* S1, const float* slopeT, float* HT) {
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
        store(s.pairs + at, load(s.pairs + at) - eta * pair);
        x.acc[r][k] *= eta * load(s.L + at);
      }
      store(s.deta + column, total);
    }
    x.store_to(s.M2 + i * cp + j, cp);
  });

  sweep(c, dp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    x.add(Cols{m.AT + i, cp}, s.J1 + j, dp, 0, hd);
    x.scale_rows(m.gates.to_end + i);
    if (m.gates.decays) x.dot_rows(m.U1 + i * dp + j, dp, s.write_sums + i);
    x.add(Cols{m.P1 + i, cp}, s.dUq + j, dp, i, c);
    x.each([](int, int, Vec& y) MIRAS_LAMBDA { y = -y; });
    x.store_to(s.dU1 + i * dp + j, dp);
  });

  m.sweep_hidden<2>(c, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    x.add(Rows{s.J2 + index_t(i) * dp, dp}, m.KT + j, cp, 0, d);
    x.scale_cols(m.gates.to_end + j);
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
    x.add(Cols{s.dGaT + i, cp}, S1 + j, dp, 0, hd);
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
  }
  transpose(s.dU, dp, c, d, s.dUT, cp);
}

// dZ over gelu'' o Ga o dGz
void MlpBackwardTask::hidden_backward(int c, const float* S1, const float* slopeT, float* HT_dZT) {
  m.sweep_hidden<2>(c, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    x.subtract(Rows{s.J1 + index_t(i) * dp, dp}, s.U1T + j, cp, 0, d);
    x.scale_cols(m.gates.to_end + j);
    x.subtract(Rows{m.AqT + index_t(i) * cp, cp}, s.M1 + j, cp, j, c);
    x.add(Rows{S1 + index_t(i) * dp, dp}, s.dUT + j, cp, 0, d);
    x.each([&](int r, int k, Vec& y) MIRAS_LAMBDA {
      const index_t at = index_t(i + r) * cp + j + k * kLanes;
      store(HT_dZT + at, load(HT_dZT + at) + load(slopeT + at) * y);
    });
  });
}

// dQ, dV, dK and the gates
void MlpBackwardTask::token_gradients(int64_t chunk, const float* S2, const float* dZT) {
  const int c = tokens(chunk);
  const Gates& gates = m.gates;

  sweep(c, dp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    x.add(Cols{s.dZqT + i, cp}, S2 + j, dp, 0, hd);
    x.scale_rows(gates.gamma + i);
    if (gates.decays) x.dot_rows(m.Q + i * dp + j, dp, s.read_sums + i);
    x.subtract(Rows{s.M2 + i * cp, cp}, m.K + j, dp, 0, i + R);
    x.each([&](int r, int k, Vec& y) MIRAS_LAMBDA { y += load(s.dO + index_t(i + r) * dp + j + k * kLanes); });
    x.store_to(s.dX + i * dp + j, dp);
  });
  view(p.dq, chunk).write(c, s.dX, dp);

  for (index_t i = 0; i < index_t(c) * dp; i += kLanes) store(s.dX + i, -load(s.dE + i));
  view(p.dv, chunk).write(c, s.dX, dp);

  sweep(c, dp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    x.subtract(Cols{m.GzT + i, cp}, s.J2 + j, dp, 0, hd);
    x.scale_rows(gates.to_end + i);
    x.dot_rows(m.K + i * dp + j, dp, s.write2_sums + i);
    x.scale_rows(gates.eta + i);
    x.add(Cols{dZT + i, cp}, S2 + j, dp, 0, hd);
    x.subtract(Cols{s.M2 + i, cp}, m.Q + j, dp, i, c);
    if (bias.predicts) x.each([&](int r, int k, Vec& y) MIRAS_LAMBDA { y += load(s.dE + index_t(i + r) * dp + j + k * kLanes); });
    x.store_to(s.dX + i * dp + j, dp);
  });
  view(p.dk, chunk).write(c, s.dX, dp);

  for (int t = 0; t < c; ++t) {
    s.deta[t] += s.write2_sums[t];
    s.write_sums[t] -= gates.eta[t] * s.write2_sums[t];
  }
  write_gate(p.dlr, b, token(chunk), h, c, s.deta);
  if (p.ddelta) write_gate(p.ddelta, b, token(chunk), h, c, s.ddelta);
}

void MlpBackwardTask::state_gradients(int c, const float* dZT, ReadSoon soon) {
  weigh_rows(c, dp, m.gates.gamma, s.dUq, s.dUq_gamma);
  weigh_rows(c, dp, m.gates.gamma, m.Q, s.Q_gamma);
  sweep(hd, dp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    const index_t row = index_t(i) * cp;
    Tile<R, N> x;
    x.add(Rows{m.AqT + row, cp}, s.dUq_gamma + j, dp, 0, c, soon);
    x.add(Rows{s.dGaT + row, cp}, m.Gu + j, dp, 0, c);
    x.add(Rows{m.AT + row, cp}, s.dU + j, dp, 0, c);
    x.add_scaled(s.J1 + index_t(i) * dp + j, dp, m.gates.end(c));
    x.store_to(s.J1 + index_t(i) * dp + j, dp);
  });
  sweep(hd, dp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    const index_t row = index_t(i) * cp;
    Tile<R, N> x;
    x.add(Rows{s.dZqT + row, cp}, s.Q_gamma + j, dp, 0, c, soon);
    x.add(Rows{dZT + row, cp}, m.K + j, dp, 0, c);
    x.add_scaled(s.J2 + index_t(i) * dp + j, dp, m.gates.end(c));
    x.store_to(s.J2 + index_t(i) * dp + j, dp);
  });
}

void MlpBackwardTask::chunk_backward(int64_t chunk, int64_t i) {
  const int c = tokens(chunk);
  const float *S1 = s.S1 + i * state, *S2 = s.S2 + i * state;
  float *slopeT = s.ZT + i * hidden, *HT = s.GaT + i * hidden;  // as `repeat` leaves them; HT becomes dZ'
  m.read_queries(p, b, token(chunk), h, c);
  view(p.grad_out, chunk).read(c, s.dO, dp);
  fill_zero(s.deta, cp);
  fill_zero(s.read_sums, cp), fill_zero(s.write_sums, cp), fill_zero(s.write2_sums, cp);

  repeat(i, c);
  m.read_hidden<true>(c, S2, s.L, WriteSoon(view(p.dq, chunk), c));
  m.each_hidden(c, [&](index_t at) MIRAS_LAMBDA {
    const Gelu gelu(load(m.AqT + at));
    store(m.AqT + at, gelu.value());
    store(s.dZqT + at, gelu.slope());
  });
  m.read_out(c, S1, WriteSoon(view(p.dv, chunk), c));

  read_backward(c, S1, WriteSoon(view(p.dk, chunk), c));
  write_backward(c, S1, slopeT, HT);
  inner_backward(c);
  hidden_backward(c, S1, slopeT, HT);
  token_gradients(chunk, S2, HT);
  if (m.gates.decays) {
    const float through = *m.gates.end(c) * (inner_product(s.J1, S1, state) + inner_product(s.J2, S2, state));
    decay_gradient(c, s.pairs, cp, s.read_sums, s.write_sums, through, s.dlog);
    write_gate(p.dlog_decay, b, token(chunk), h, c, s.dlog);
  }
  state_gradients(c, HT, ReadSoon(view(p.k, chunk - 1), chunk > 0 ? p.C : 0));
}

void MlpBackwardTask::run() {
  m.begin(p, h);
  if (p.grad_final_dual[0]) {
    read_states(p.grad_final_dual, n, h, d, hd, s.J1, s.J2, dp);
  } else {
    fill_zero(s.J1, state), fill_zero(s.J2, state);
  }
  const int64_t square = int64_t(p.C) * cp;  // zero right of the diagonal, and staying so
  fill_zero(s.L, square), fill_zero(s.M1, square), fill_zero(s.M2, square), fill_zero(s.pairs, square);
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
  write_states(p.d_dual, n, h, d, hd, s.J1, s.J2, dp, s.spare);
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
