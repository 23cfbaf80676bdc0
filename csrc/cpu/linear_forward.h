// Forward of the linear memory, chunk by chunk (SPEC section 2):
//
//   E = K W0' - V    U = eta psi(E)    O = gamma * (Q W0') - (L o Q K') U    A_C = gamma_C A_0 - sum_s (gamma_C / gamma_s) U_s k_s'
//
// A task is one head of one sequence, or a panel of its value rows.
//
//   c tokens of the chunk (C at most, Cp padded)   Dk key channels   Dv value channels of the task (Dvp padded)
//   T after a name: transposed. States are held transposed: W [Dk x Dvp].
#pragma once

#include "chunk.h"

namespace miras::cpu::MIRAS_LEVEL {

struct ForwardScratch {
  float *W, *W0;        // [Dk x Dvp]  current state; start of an open chunk
  float *KT;            // [Dk x Cp]
  float *Q;             // [C x Dkp]   only where q cannot be read in place
  float *V, *O;         // [C x Dvp]   likewise
  float *U, *U_end;     // [C x Dvp]   K W0' at first, then eta psi(E); U_end_s = (gamma_C / gamma_s) U_s
  float *P;             // [C x Cp]    L o Q K'
  float *last_row;      // [Cp]
  float *delta;         // [C] or [C x Dvp]
  float *spare;         // [Dv x Dkp]
  Gates gates;

  MIRAS_FN ForwardScratch(Arena& a, const LinearForward& p) : gates(a, p) {
    const int cp = round_up(p.C, kPad), dkp = round_up(p.Dk, kPad), dvp = round_up(p.panel_width, kPad);
    W = a.take(p.Dk, dvp), W0 = a.take(p.Dk, p.start ? dvp : 0);
    KT = a.take(p.Dk, cp);
    Q = a.take(p.C, dkp), V = a.take(p.C, dvp), O = a.take(p.C, dvp);
    U = a.take(p.C, dvp), U_end = a.take(p.C, dvp);
    P = a.take(p.C, cp);
    last_row = a.take(1, cp), delta = a.take(p.C, dvp);
    spare = a.take(dvp, dkp);
  }
};

static void forward_task(const LinearForward& p, const BiasTable& bias, const ForwardScratch& scratch, const Task& task) {
  static_assert(L2Retention::kIdentity, "W = A below");
  ForwardScratch s = scratch;
  const int64_t n = task.n, h = task.h, b = p.batch(n), length = p.length(n);
  const int dk = p.Dk, dvp = task.dvp, dkp = round_up(dk, kPad), cp = round_up(p.C, kPad);

  fill_zero(s.P, int64_t(p.C) * cp);  // right of the diagonal it stays so
  read_state(p.dual, n, h, task.first, task.dv, dk, s.W, dvp);

  // An open chunk: predictions are made at its start, reading and writing go on from the current state.
  int position = p.position ? int(p.position[n]) : 0;
  float open_log_decay = 0.0f;
  const float* chunk_start = nullptr;
  if (position > 0) {
    if (p.open_log_decay) open_log_decay = p.open_log_decay[n * p.H + h];
    read_state(p.start, n, h, task.first, task.dv, dk, s.W0, dvp);
    chunk_start = s.W0;
  }
  bool start_written = false;

  int64_t chunk = 0;
  for (int64_t t = 0; t < length; ++chunk) {
    const int c = int(length - t < p.C - position ? length - t : p.C - position);
    const bool closes = position + c == p.C;
    const int64_t token = p.begin(n) + t;
    const ChunkView q{p.q, p.dtype, b, token, h, 0, dk}, k{p.k, p.dtype, b, token, h, 0, dk};
    const ChunkView v{p.v, p.dtype, b, token, h, task.first, task.dv};
    const ChunkView out{p.out, p.dtype, b, token, h, task.first, task.dv};

    if (p.saved && chunk % p.checkpoint_every == 0) {
      const int64_t slot = p.slot(n) + chunk / p.checkpoint_every;
      copy_out(s.W, dvp, dk, task.dv, p.saved + (slot * p.H + h) * dk * p.Dv + task.first, p.Dv);
    }
    if (!closes && p.final_start) {  // this chunk stays open: hand on the state it began with
      write_state(p.final_start, n, h, task.first, task.dv, dk, chunk_start ? chunk_start : s.W, dvp, s.spare);
      start_written = true;
    }

    s.gates.read(p, b, token, h, c);
    k.transpose_in(c, s.KT, cp);

    Rows Q{s.Q, dkp};
    if (p.dtype == Dtype::f32) Q = {q.at<float>(), p.q.token};
    else q.read(c, s.Q, dkp);

    // E = K W0' - V,  U = eta psi(E)
    BiasRows rows{c, dvp, p.bias_params, s.gates.eta, nullptr, p.delta_per_channel, s.V, dvp};
    if (v.in_place()) rows.v = v.at<float>(), rows.ldv = p.v.token;
    else v.read(c, s.V, dvp);
    rows.delta = read_delta(p, task, b, token, c, s.delta);
    if (bias.predicts) predict(c, dk, s.KT, cp, chunk_start ? chunk_start : s.W, dvp, s.U, ReadSoon(q, c));
    bias.write(rows, s.U, s.gates.decays ? s.gates.to_end : nullptr, s.U_end);
    const float* u_end = s.gates.decays ? s.U_end : s.U;

    decayed_scores<false>(s.gates, c, dk, Q, s.KT, cp, s.last_row, s.P, nullptr, WriteSoon(out, c));

    // O = gamma * (Q W') - P U
    const int next = int(length - t - c < p.C ? length - t - c : p.C);
    ReadSoon k_soon({p.k, p.dtype, b, token + c, h, 0, dk}, next);
    const ReadSoon v_soon({p.v, p.dtype, b, token + c, h, task.first, task.dv}, next);
    float* O = out.in_place() ? out.at<float>() : s.O;
    const index_t ldo = out.in_place() ? p.out.token : dvp;
    sweep(c, dvp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
      Tile<R, N> o;
      o.add(Q.at(i), s.W + j, dvp, 0, dk, k_soon);
      o.scale_rows(s.gates.gamma + i);
      o.subtract(Rows{s.P + i * cp, cp}, s.U + j, dvp, 0, i + R);
      o.store_to(O + i * ldo + j, ldo);
    });
    if (!out.in_place()) out.write(c, s.O, dvp);

    advance(c, dk, s.KT, cp, u_end, dvp, {s.W, s.gates.end(c)}, s.W, v_soon);

    if (s.gates.decays) {
      for (int i = 0; i < c; ++i) open_log_decay += s.gates.log_decay[i];
    }
    if (closes) open_log_decay = 0.0f;
    t += c;
    position = 0, chunk_start = nullptr;
  }

  if (p.final_dual) write_state(p.final_dual, n, h, task.first, task.dv, dk, s.W, dvp, s.spare);
  if (p.final_start && !start_written) {
    const float* start = position > 0 ? chunk_start : s.W;  // nothing came in, or the end is a boundary
    write_state(p.final_start, n, h, task.first, task.dv, dk, start, dvp, s.spare);
  }
  if (p.final_log_decay && task.panel == 0) p.final_log_decay[n * p.H + h] = open_log_decay;
}

static void linear_forward(const LinearForward& p, int64_t first, int64_t last) {
  FlushDenormals flush;
  Arena measure(nullptr);
  ForwardScratch(measure, p);
  Arena arena(thread_scratch(size_t(measure.used())));
  ForwardScratch scratch(arena, p);
  const BiasTable bias = bias_table(p.bias, p.bias_params);
  for (int64_t i = first; i < last; ++i) forward_task(p, bias, scratch, Task(p, i));
}

}  // namespace miras::cpu::MIRAS_LEVEL
