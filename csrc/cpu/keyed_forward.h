// Forward of the linear memory with exact steps of the L2 bias, keys that are erased and decays of key channels; equations in keyed.h.
#pragma once

#include "keyed.h"

namespace miras::cpu::MIRAS_LEVEL {

struct KeyedForwardScratch {
  float* A;          // [Dk x Dvp]
  float *V, *O, *U;  // [C x Dvp]   V, O if the tensors cannot be used in place
  float *G, *P;      // [C x Cp]
  float* spare;      // [Dv x Dkp]
  Gates gates;
  KeyedBlock keyed;

  MIRAS_FN KeyedForwardScratch(Arena& a, const LinearForward& p) : gates(a, p), keyed(a, p) {
    const int cp = round_up(p.C, kPad), dvp = round_up(p.panel_width, kPad);
    A = a.take(p.Dk, dvp);
    V = a.take(p.C, dvp), O = a.take(p.C, dvp), U = a.take(p.C, dvp);
    G = a.take(p.C, cp), P = a.take(p.C, cp);
    spare = a.take(dvp, round_up(p.Dk, kPad));
  }
};

struct KeyedForwardTask {
  const LinearForward& p;
  KeyedForwardScratch s;
  Task task;
  int64_t n, h, b;
  int dk, dkp, dvp, cp;

  MIRAS_FN KeyedForwardTask(const LinearForward& params, const KeyedForwardScratch& scratch, int64_t i)
      : p(params), s(scratch), task(params, i) {
    n = task.n, h = task.h, b = p.batch(n);
    dk = p.Dk, dkp = round_up(dk, kPad), dvp = task.dvp, cp = round_up(p.C, kPad);
  }

  MIRAS_FN ChunkView keys(const TokenTensor& x, int64_t token) const { return {x, p.dtype, b, token, h, 0, dk}; }
  MIRAS_FN ChunkView values(const TokenTensor& x, int64_t token) const { return {x, p.dtype, b, token, h, task.first, task.dv}; }
  void put(const StateTensor& to) { write_state(to, n, h, task.first, task.dv, dk, s.A, dvp, s.spare); }

  void block(int64_t token, int c, int next);
  void run();
};

// c tokens; `next` tokens come after them.
void KeyedForwardTask::block(int64_t token, int c, int next) {
  read_gate(p.lr, b, token, h, c, s.gates.eta);
  s.keyed.read(b, token, h, c);
  s.keyed.scores(c, s.G, s.P);
  const ChunkView v = values(p.v, token), out = values(p.out, token);
  BlockErrors errors{s.keyed.KT, s.A, s.V, s.G, cp, dvp, s.gates.eta, nullptr, nullptr, s.U, nullptr, nullptr};
  if (v.in_place()) errors.v = v.at<float>(), errors.ldv = p.v.token;
  else v.read(c, s.V, dvp);
  solve_errors(c, dk, dvp, errors, ReadSoon(keys(p.q, token + c), next));
  const bool in_place = out.in_place();
  read_block(c, dk, dvp, Rows{s.keyed.q_state, dkp}, s.A, nullptr, s.P, cp, s.U, in_place ? out.at<float>() : s.O,
             in_place ? p.out.token : dvp, ReadSoon(keys(p.k, token + c), next));
  if (!in_place) out.write(c, s.O, dvp);
  advance_channels<-1>(c, dk, s.keyed.k_end, dkp, s.U, dvp, s.keyed.gamma(c - 1), s.A, s.A, ReadSoon(values(p.v, token + c), next));
}

void KeyedForwardTask::run() {
  fill_zero(s.P, int64_t(p.C) * cp);  // nothing is written right of the diagonal
  read_state(p.dual, n, h, task.first, task.dv, dk, s.A, dvp);
  const int64_t span = int64_t(p.C) * p.checkpoint_every, length = p.length(n);
  for (int64_t t = 0; t < length; t += p.C) {
    const int64_t left = length - t;
    if (p.checkpoints && t % span == 0) {
      float* to = p.checkpoints + ((p.slot(n) + t / span) * p.H + h) * dk * p.Dv + task.first;
      copy_out(s.A, dvp, dk, task.dv, to, p.Dv);
    }
    const int c = int(left < p.C ? left : p.C);
    block(p.begin(n) + t, c, int(left - c < p.C ? left - c : p.C));
  }
  if (p.final_dual) put(p.final_dual);
  if (p.final_start) put(p.final_start);
  if (p.final_log_decay && task.panel == 0) p.final_log_decay[n * p.H + h] = 0.0f;
}

static void keyed_forward(const LinearForward& p, int64_t first, int64_t last) {
  with_scratch<KeyedForwardScratch>(p, [&](const KeyedForwardScratch& s) MIRAS_LAMBDA {
    for (int64_t i = first; i < last; ++i) KeyedForwardTask(p, s, i).run();
  });
}

}  // namespace miras::cpu::MIRAS_LEVEL
