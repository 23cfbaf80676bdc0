// Forward of the linear memory with exact steps of the L2 bias, in blocks of C tokens (docs/mathematics.md, section 13):
//
//   E, U (see block.h)    O = gamma * (Q A_0') - (L o Q K') U    A_C = gamma_C A_0 - sum_s (gamma_C / gamma_s) U_s k_s'
//
// Names and layouts as in linear_forward.h.
#pragma once

#include "block.h"

namespace miras::cpu::MIRAS_LEVEL {

struct BlockForwardScratch {
  float *A, *A0;     // [Dk x Dvp]  current state; that at the start of a chunk that is open where the call begins or ends
  float* KT;         // [Dk x Cp]
  float *Q, *V, *O;  // [C x Dkp], [C x Dvp] twice: if the tensors cannot be used in place
  float *U, *U_end;  // [C x Dvp]
  float *G, *P;      // [C x Cp]    P = L o Q K'
  float* spare;      // [Dv x Dkp]
  Gates gates;
  BlockWeights weights;

  MIRAS_FN BlockForwardScratch(Arena& a, const LinearForward& p) : gates(a, p), weights(a, p) {
    const int cp = round_up(p.C, kPad), dkp = round_up(p.Dk, kPad), dvp = round_up(p.panel_width, kPad);
    A = a.take(p.Dk, dvp), A0 = a.take(p.Dk, p.start || p.final_start ? dvp : 0);
    KT = a.take(p.Dk, cp);
    Q = a.take(p.C, dkp), V = a.take(p.C, dvp), O = a.take(p.C, dvp);
    U = a.take(p.C, dvp), U_end = a.take(p.C, dvp);
    G = a.take(p.C, cp), P = a.take(p.C, cp);
    spare = a.take(dvp, dkp);
  }
};

struct BlockForwardTask {
  const LinearForward& p;
  BlockForwardScratch s;
  Task task;
  int64_t n, h, b, length;
  int dk, dkp, dvp, cp;

  // Of the current block
  int64_t token;
  int c;

  MIRAS_FN BlockForwardTask(const LinearForward& params, const BlockForwardScratch& scratch, int64_t i)
      : p(params), s(scratch), task(params, i) {
    n = task.n, h = task.h, b = p.batch(n), length = p.length(n);
    dk = p.Dk, dkp = round_up(dk, kPad), dvp = task.dvp, cp = round_up(p.C, kPad);
  }

  MIRAS_FN ChunkView keys(const TokenTensor& x) const { return {x, p.dtype, b, token, h, 0, dk}; }
  MIRAS_FN ChunkView values(const TokenTensor& x) const { return {x, p.dtype, b, token, h, task.first, task.dv}; }
  void put(const StateTensor& to, const float* state) { write_state(to, n, h, task.first, task.dv, dk, state, dvp, s.spare); }

  void read_out(Rows Q, WriteSoon out_soon, ReadSoon k_soon);
  void block(const float* predicting, int start, int next);
  void run();
};

// O = gamma * (Q A') - P U
void BlockForwardTask::read_out(Rows Q, WriteSoon out_soon, ReadSoon k_soon) {
  sweep_lower(c, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    x.add(Q.at(i), s.KT + j, cp, 0, dk, out_soon);
    x.multiply(s.weights.row(i) + j, cp);
    x.store_to(s.P + i * cp + j, cp);
  });
  const ChunkView out = values(p.out);
  float* O = out.in_place() ? out.at<float>() : s.O;
  const index_t ldo = out.in_place() ? p.out.token : dvp;
  read_block(c, dk, dvp, Q, s.A, s.gates.decays ? s.gates.gamma : nullptr, s.P, cp, s.U, O, ldo, k_soon);
  if (!out.in_place()) out.write(c, s.O, dvp);
}

// c tokens, whose first chunk takes its errors at the state `predicting`; `next` tokens come after them. Leaves the state before token
// `start`, if that is not negative, in A0.
void BlockForwardTask::block(const float* predicting, int start, int next) {
  s.gates.read(p, b, token, h, c);
  s.weights.read(s.gates, c);
  keys(p.k).transpose_in(c, s.KT, cp);
  Rows Q{s.Q, dkp};
  if (p.dtype == Dtype::f32) Q = {keys(p.q).at<float>(), p.q.token};
  else keys(p.q).read(c, s.Q, dkp);
  const ChunkView v = values(p.v);
  const bool decays = s.gates.decays;
  BlockErrors errors{s.KT, predicting, s.V,    s.G, cp, dvp, s.gates.eta, decays ? s.weights.r : nullptr, decays ? s.gates.to_end : nullptr,
                     s.U,  s.U_end,    nullptr};
  if (v.in_place()) errors.v = v.at<float>(), errors.ldv = p.v.token;
  else v.read(c, s.V, dvp);

  const ReadSoon k_soon({p.k, p.dtype, b, token + c, h, 0, dk}, next);
  const ReadSoon v_soon({p.v, p.dtype, b, token + c, h, task.first, task.dv}, next);
  key_scores(s.weights, c, dk, s.KT, cp, s.G, ReadSoon());
  solve_errors(c, dk, dvp, errors, ReadSoon(keys(p.q), c));
  read_out(Q, WriteSoon(values(p.out), c), k_soon);
  if (start == 0) __builtin_memcpy(s.A0, s.A, size_t(dk) * dvp * sizeof(float));
  if (start > 0) {
    weigh_rows(start, dvp, s.weights.row(start - 1), s.U, s.V);
    advance(start, dk, Rows{s.KT, cp}, s.V, dvp, {s.A, s.gates.end(start)}, s.A0, ReadSoon());
  }
  advance(c, dk, Rows{s.KT, cp}, s.gates.decays ? s.U_end : s.U, dvp, {s.A, s.gates.end(c)}, s.A, v_soon);
}

void BlockForwardTask::run() {
  s.weights.clear(p.C);
  read_state(p.dual, n, h, task.first, task.dv, dk, s.A, dvp);
  int position = p.position ? int(p.position[n]) : 0;
  float log_decay = position && p.open_log_decay ? p.open_log_decay[n * p.H + h] : 0.0f;
  if (position) read_state(p.start, n, h, task.first, task.dv, dk, s.A0, dvp);
  const int64_t span = int64_t(p.C) * p.checkpoint_every;
  for (int64_t t = 0; t < length;) {
    const int64_t left = length - t;
    const int whole = position ? p.chunk - position : p.C;  // the rest of an open chunk is a block of its own
    c = int(left < whole ? left : whole);
    token = p.begin(n) + t;
    const int open = (position + c) % p.chunk;  // tokens of the chunk that stays open, 0 if none does
    if (p.checkpoints && t % span == 0) {
      float* to = p.checkpoints + ((p.slot(n) + t / span) * p.H + h) * dk * p.Dv + task.first;
      copy_out(s.A, dvp, dk, task.dv, to, p.Dv);
    }
    block(position ? s.A0 : s.A, open && !position && p.final_start ? c - open : -1, int(left - c < p.C ? left - c : p.C));
    if (!position || !open) log_decay = 0.0f;
    for (int i = open > c ? 0 : c - open; i < c && s.gates.decays; ++i) log_decay += s.gates.log_decay[i];
    t += c;
    position = open;
  }

  if (p.final_dual) put(p.final_dual, s.A);
  if (p.final_start) put(p.final_start, position ? s.A0 : s.A);
  if (p.final_log_decay && task.panel == 0) p.final_log_decay[n * p.H + h] = log_decay;
}

static void block_forward(const LinearForward& p, int64_t first, int64_t last) {
  with_scratch<BlockForwardScratch>(p, [&](const BlockForwardScratch& s) MIRAS_LAMBDA {
    for (int64_t i = first; i < last; ++i) BlockForwardTask(p, s, i).run();
  });
}

}  // namespace miras::cpu::MIRAS_LEVEL
