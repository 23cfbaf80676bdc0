// Backward of the linear memory (SPEC section 2), chunks from last to first, D = gradient of the state a chunk ends with:
//
//   dU_s = -sum_{t>=s} P_ts dO_t - (gamma_C/gamma_s) D k_s            P = L o (Q K')
//   d eta_s = dU_s . g_s      dE_s = psi'(E_s) (eta_s dU_s)      dV_s = -dE_s
//   dQ_t = gamma_t W0' dO_t - sum_{s<=t} M_ts k_s                     M = L o (dO U')
//   dK_s = W0' dE_s - sum_{t>=s} M_ts q_t - (gamma_C/gamma_s) D' U_s
//   D   <- gamma_C D + sum_t gamma_t dO_t q_t' + sum_s dE_s k_s'
//
// and, with X_ts = -P_ts (dO_t . U_s) (see decay_gradient),
//
//   d log alpha_r = sum_{s<r<=t} X_ts + sum_{t>=r} gamma_t (W0 q_t).dO_t - sum_{s<r} (gamma_C/gamma_s) U_s.(D k_s) + gamma_C <D, W0>
//
// Every `checkpoint_every`-th chunk start was saved. A segment of chunks is first run forward from its start, keeping its
// states, errors and inner gradients, then backward.
//
//   c tokens of the chunk (Cp padded)   Dk key channels (Dkp)   Dv value channels of the task (Dvp)
//   T after a name: transposed. States are held transposed: W, D [Dk x Dvp].
#pragma once

#include "chunk.h"

namespace miras::cpu::MIRAS_LEVEL {

struct BackwardScratch {
  float *W, *E, *G;          // of a segment: [segment][Dk x Dvp], [segment][C x Dvp] twice
  float *D;                  // [Dk x Dvp]
  float *W_plain, *D_plain;  // [Dv x Dkp]  not transposed
  float *KT;                 // [Dk x Cp]
  float *K, *Q;              // [C x Dkp]
  float *V;                  // [C x Dvp]   where v cannot be read in place
  float *dO, *dO_gamma;      // [C x Dvp]   dO_gamma_t = gamma_t dO_t
  float *U, *U_end;          // [C x Dvp]
  float *UT;                 // [Dv x Cp]
  float *P, *L, *M, *X;      // [C x Cp]
  float *dE;                 // [C x Dvp]   dU at first
  float *dX;                 // [C x Dkp]   dQ, dK where they cannot be written in place
  float *delta, *ddelta;     // [C] or [C x Dvp]
  float *last_row, *deta, *dlog;       // [Cp]
  float *read_sums, *write_sums;       // [Cp]  gamma_t (W0 q_t).dO_t and (gamma_C/gamma_s) U_s.(D k_s)
  Gates gates;

  MIRAS_FN BackwardScratch(Arena& a, const LinearBackward& p) : gates(a, p) {
    const int cp = round_up(p.C, kPad), dkp = round_up(p.Dk, kPad), dvp = round_up(p.panel_width, kPad);
    W = a.take(int64_t(p.segment) * p.Dk, dvp);
    E = a.take(int64_t(p.segment) * p.C, dvp), G = a.take(int64_t(p.segment) * p.C, dvp);
    D = a.take(p.Dk, dvp);
    W_plain = a.take(p.panel_width, dkp), D_plain = a.take(p.panel_width, dkp);
    KT = a.take(p.Dk, cp);
    K = a.take(p.C, dkp), Q = a.take(p.C, dkp);
    V = a.take(p.C, dvp);
    dO = a.take(p.C, dvp), dO_gamma = a.take(p.C, dvp);
    U = a.take(p.C, dvp), U_end = a.take(p.C, dvp);
    UT = a.take(p.panel_width, cp);
    P = a.take(p.C, cp), L = a.take(p.C, cp), M = a.take(p.C, cp), X = a.take(p.C, cp);
    dE = a.take(p.C, dvp), dX = a.take(p.C, dkp);
    delta = a.take(p.C, dvp), ddelta = a.take(p.C, dvp);
    last_row = a.take(1, cp), deta = a.take(1, cp), dlog = a.take(1, cp);
    read_sums = a.take(1, cp), write_sums = a.take(1, cp);
  }
};

// One head of one sequence, or a panel of its value rows.
struct BackwardTask {
  const LinearBackward& p;
  const BiasTable& bias;
  BackwardScratch s;
  Task task;
  int64_t n, h, b, length;
  int dk, dkp, dvp, cp;

  MIRAS_FN BackwardTask(const LinearBackward& params, const BiasTable& table, const BackwardScratch& scratch, int64_t i)
      : p(params), bias(table), s(scratch), task(params, i) {
    n = task.n, h = task.h, b = p.batch(n), length = p.length(n);
    dk = p.Dk, dkp = round_up(dk, kPad), dvp = task.dvp, cp = round_up(p.C, kPad);
  }

  MIRAS_FN int tokens(int64_t chunk) const {
    const int64_t left = length - chunk * p.C;
    return int(left < p.C ? left : p.C);
  }
  MIRAS_FN int64_t token(int64_t chunk) const { return p.begin(n) + chunk * p.C; }

  MIRAS_FN ChunkView keys(const TokenTensor& x, Dtype dtype, int64_t chunk) const {
    return {x, dtype, b, token(chunk), h, 0, dk};
  }
  MIRAS_FN ChunkView values(const TokenTensor& x, int64_t chunk) const {
    return {x, p.dtype, b, token(chunk), h, task.first, task.dv};
  }
  // This panel's share of a gradient that all panels add to.
  MIRAS_FN TokenTensor part(TokenTensor x, int64_t stride, Dtype dtype = Dtype::f32) const {
    x.data = static_cast<char*>(x.data) + task.panel * stride * (dtype == Dtype::f32 ? 4 : 2);
    return x;
  }

  BiasRows bias_rows(int64_t chunk) {
    const int c = tokens(chunk);
    const ChunkView v = values(p.v, chunk);
    BiasRows rows{c, dvp, p.bias_params, s.gates.eta, nullptr, p.delta_per_channel, s.V, dvp};
    if (v.in_place()) rows.v = v.at<float>(), rows.ldv = p.v.token;
    rows.delta = read_delta(p, task, b, token(chunk), c, s.delta);
    return rows;
  }

  // Gates and K transposed of a chunk.
  void begin(int64_t chunk) {
    s.gates.read(p, b, token(chunk), h, tokens(chunk));
    keys(p.k, p.dtype, chunk).transpose_in(tokens(chunk), s.KT, cp);
  }

  // U = eta g,  U_end = (gamma_C / gamma_s) U
  void writes(int c, const float* g) {
    for (int t = 0; t < c; ++t) {
      const Vec eta = broadcast(s.gates.eta[t]), end = broadcast(s.gates.to_end[t]);
      for (int j = 0; j < dvp; j += kLanes) {
        const Vec u = eta * load(g + t * dvp + j);
        store(s.U + t * dvp + j, u);
        store(s.U_end + t * dvp + j, end * u);
      }
    }
  }

  // Chunks [first, last) forward once more: states, errors, inner gradients.
  void rerun(int64_t first, int64_t last) {
    const int64_t slot = p.slot(n) + first / p.checkpoint_every;
    copy_in(p.saved + (slot * p.H + h) * dk * p.Dv + task.first, p.Dv, dk, task.dv, s.W, dvp);
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t i = chunk - first;
      const int c = tokens(chunk);
      float *W = s.W + i * dk * dvp, *E = s.E + i * p.C * dvp, *G = s.G + i * p.C * dvp;
      begin(chunk);
      if (bias.predicts) predict(c, dk, s.KT, cp, W, dvp, E, ReadSoon(values(p.v, chunk), c));
      if (!values(p.v, chunk).in_place()) values(p.v, chunk).read(c, s.V, dvp);
      bias.grade(bias_rows(chunk), E, G);
      if (chunk + 1 == last) break;
      writes(c, G);
      advance(c, dk, s.KT, cp, s.U_end, dvp, {W, s.gates.end(c)}, W + dk * dvp,
              ReadSoon(keys(p.k, p.dtype, chunk + 1), tokens(chunk + 1)));
    }
  }

  void scores_backward(int c, WriteSoon soon);
  void chunk_backward(int64_t chunk, const float* W, const float* E, const float* G);
  void run();
};

// M = L o (dO U')  and  X = -P o (dO U')  [c x Cp]
void BackwardTask::scores_backward(int c, WriteSoon soon) {
  sweep_lower(c, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    x.add(Rows{s.dO + i * dvp, dvp}, s.UT + j, cp, 0, task.dv, soon);
    x.each([&](int r, int m, Vec& y) MIRAS_LAMBDA {
      const index_t at = index_t(i + r) * cp + j + m * kLanes;
      if (s.gates.decays) store(s.X + at, -load(s.P + at) * y);
      y *= load(s.L + at);
    });
    x.store_to(s.M + i * cp + j, cp);
  });
}

void BackwardTask::chunk_backward(int64_t chunk, const float* W, const float* E, const float* G) {
  const int c = tokens(chunk);
  const Gates& gates = s.gates;
  const TokenTensor dq_part = part(p.dq, p.key_part, p.grad_dtype), dk_part = part(p.dk, p.key_part, p.grad_dtype);
  const ChunkView dq = keys(dq_part, p.grad_dtype, chunk), dkeys = keys(dk_part, p.grad_dtype, chunk);
  // Brought nearer meanwhile: where the results go, then what the next chunk (the one before) reads.
  const int next = chunk > 0 ? p.C : 0;
  WriteSoon dk_soon(dkeys, c);
  ReadSoon q_soon(keys(p.q, p.dtype, chunk - 1), next), dO_soon(values(p.grad_out, chunk - 1), next);

  keys(p.k, p.dtype, chunk).read(c, s.K, dkp);
  keys(p.q, p.dtype, chunk).read(c, s.Q, dkp);
  values(p.grad_out, chunk).read(c, s.dO, dvp);
  for (int t = 0; t < c; ++t) {
    const Vec gamma = broadcast(gates.gamma[t]);
    for (int j = 0; j < dvp; j += kLanes) store(s.dO_gamma + t * dvp + j, gamma * load(s.dO + t * dvp + j));
  }
  writes(c, G);
  transpose(s.U, dvp, c, task.dv, s.UT, cp);
  fill_zero(s.read_sums, cp);
  fill_zero(s.write_sums, cp);

  decayed_scores<true>(gates, c, dk, Rows{s.Q, dkp}, s.KT, cp, s.last_row, s.P, s.L,
                         WriteSoon(values(p.dv, chunk), c));
  scores_backward(c, WriteSoon(dq, c));

  // dU = -P' dO - to_end * (K D')
  sweep(c, dvp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    x.add(Rows{s.K + i * dkp, dkp}, s.D + j, dvp, 0, dk, dk_soon);
    if (gates.decays) x.dot_rows(s.U_end + i * dvp + j, dvp, s.write_sums + i);
    x.scale_rows(gates.to_end + i);
    x.add(Cols{s.P + i, cp}, s.dO + j, dvp, i, c);
    x.each([](int, int, Vec& y) MIRAS_LAMBDA { y = -y; });
    x.store_to(s.dE + i * dvp + j, dvp);
  });

  transpose(s.D, dvp, dk, task.dv, s.D_plain, dkp);  // while D is near

  // d eta, dE, dV, d delta
  bias.pull_back(bias_rows(chunk), E, G, s.dE, s.deta, s.ddelta);
  write_gate(part(p.dlr, p.gate_part), b, token(chunk), h, c, s.deta);
  if (p.ddelta && p.delta_per_channel) {
    copy_out(s.ddelta, dvp, c, task.dv, address<float>(p.ddelta, b, token(chunk), h) + task.first, p.ddelta.token);
  } else if (p.ddelta) {
    write_gate(part(p.ddelta, p.gate_part), b, token(chunk), h, c, s.ddelta);
  }
  float* dV = s.U;  // free until the next chunk
  for (index_t i = 0; i < index_t(c) * dvp; i += kLanes) store(dV + i, -load(s.dE + i));
  values(p.dv, chunk).write(c, dV, dvp);

  // dQ = (gamma dO) W0 - M K
  transpose(W, dvp, dk, task.dv, s.W_plain, dkp);
  float* to = dq.in_place() ? dq.at<float>() : s.dX;
  index_t ld = dq.in_place() ? p.dq.token : dkp;
  sweep(c, dkp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    x.add(Rows{s.dO_gamma + i * dvp, dvp}, s.W_plain + j, dkp, 0, task.dv);
    if (gates.decays) x.dot_rows(s.Q + i * dkp + j, dkp, s.read_sums + i);
    x.subtract(Rows{s.M + i * cp, cp}, s.K + j, dkp, 0, i + R);
    x.store_to(to + i * ld + j, ld);
  });
  if (!dq.in_place()) dq.write(c, s.dX, dkp);

  // dK = dE W0 - M' Q - U_end D
  to = dkeys.in_place() ? dkeys.at<float>() : s.dX;
  ld = dkeys.in_place() ? p.dk.token : dkp;
  sweep(c, dkp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    if (bias.predicts) x.add(Rows{s.dE + i * dvp, dvp}, s.W_plain + j, dkp, 0, task.dv);
    x.subtract(Cols{s.M + i, cp}, s.Q + j, dkp, i, c);
    x.subtract(Rows{s.U_end + i * dvp, dvp}, s.D_plain + j, dkp, 0, task.dv, q_soon);
    x.store_to(to + i * ld + j, ld);
  });
  if (!dkeys.in_place()) dkeys.write(c, s.dX, dkp);

  if (gates.decays) {
    const float through = *gates.end(c) * inner_product(s.D, W, index_t(dk) * dvp);
    decay_gradient(c, s.X, cp, s.read_sums, s.write_sums, through, s.dlog);
    write_gate(part(p.dlog_decay, p.gate_part), b, token(chunk), h, c, s.dlog);
  }

  // D = gamma_C D + Q' (gamma dO) + K' dE   (transposed)
  sweep(dk, dvp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    x.add(Cols{s.Q + i, dkp}, s.dO_gamma + j, dvp, 0, c, dO_soon);
    if (bias.predicts) x.add(Cols{s.K + i, dkp}, s.dE + j, dvp, 0, c);
    x.add_scaled(s.D + i * dvp + j, dvp, gates.end(c));
    x.store_to(s.D + i * dvp + j, dvp);
  });
}

void BackwardTask::run() {
  if (p.grad_final_dual) read_state(p.grad_final_dual, n, h, task.first, task.dv, dk, s.D, dvp);
  else fill_zero(s.D, int64_t(dk) * dvp);
  const int64_t square = int64_t(p.C) * cp;  // zero right of the diagonal, and staying so
  fill_zero(s.P, square), fill_zero(s.L, square), fill_zero(s.M, square), fill_zero(s.X, square);

  const int64_t chunks = (length + p.C - 1) / p.C, every = p.checkpoint_every;
  for (int64_t last = chunks; last > 0;) {
    const int64_t first = (last - 1) / every * every;
    rerun(first, last);
    for (int64_t chunk = last - 1; chunk >= first; --chunk) {
      const int64_t i = chunk - first;
      if (chunk != last - 1) begin(chunk);  // the last one is as the rerun left it
      chunk_backward(chunk, s.W + i * dk * dvp, s.E + i * p.C * dvp, s.G + i * p.C * dvp);
    }
    last = first;
  }
  write_state(p.d_dual, n, h, task.first, task.dv, dk, s.D, dvp, s.D_plain);
}

static void linear_backward(const LinearBackward& p, int64_t first, int64_t last) {
  FlushDenormals flush;
  Arena measure(nullptr);
  BackwardScratch(measure, p);
  Arena arena(thread_scratch(size_t(measure.used())));
  const BackwardScratch s(arena, p);
  const BiasTable bias = bias_table(p.bias, p.bias_params);
  for (int64_t i = first; i < last; ++i) BackwardTask(p, bias, s, i).run();
}

}  // namespace miras::cpu::MIRAS_LEVEL
