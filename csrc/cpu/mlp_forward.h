// Forward of the MLP memory M(x) = x + LN(W1 gelu(W2 x)), chunk by chunk (SPEC section 5). Gradients at the chunk's start:
//
//   Z = K W2'   A = gelu(Z)   U = A W1'   E = K + LN(U) - V   Gu = LN'(psi(E))   Gz = (Gu W1) gelu'(Z)
//
// read-out, P2 = L o (Q K'), P1 = L o (Aq A'), and states:
//
//   Zq = gamma * (Q W2') - P2 (eta Gz)   Aq = gelu(Zq)   Uq = gamma * (Aq W1') - P1 (eta Gu)   O = Q + LN(Uq)
//   W1 <- gamma_C W1 - sum_s (gamma_C/gamma_s) eta_s gu_s a_s'     W2 <- gamma_C W2 - sum_s (gamma_C/gamma_s) eta_s gz_s k_s'
//
// A task is one head of one sequence. Sizes and layouts: mlp_chunk.h.
#pragma once

#include "mlp_chunk.h"

namespace miras::cpu::MIRAS_LEVEL {

struct MlpForwardScratch {
  float *S1, *S2;              // [Hd x Dp]
  float *start1, *start2;      // [Hd x Dp]  of an open chunk
  float *ZT;                   // [Hd x Cp]
  float *O;                    // [C x Dp]
  float *spare;                // [D x Hdp]
  MlpChunk chunk;

  MIRAS_FN MlpForwardScratch(Arena& a, const MlpForward& p) : chunk(a, p) {
    const int dp = chunk.dp, opened = p.position ? dp : 0;
    S1 = a.take(p.Hd, dp), S2 = a.take(p.Hd, dp);
    start1 = a.take(p.Hd, opened), start2 = a.take(p.Hd, opened);
    ZT = a.take(p.Hd, chunk.cp);
    O = a.take(p.C, dp);
    spare = a.take(p.D, round_up(p.Hd, kPad));
  }
};

static void mlp_forward_task(const MlpForward& p, const BiasTable& bias, const MlpForwardScratch& scratch, int64_t task) {
  MlpForwardScratch s = scratch;
  MlpChunk& m = s.chunk;
  const int64_t n = task / p.H, h = task % p.H, b = p.batch(n), length = p.length(n);
  const int d = p.D, hd = p.Hd, dp = m.dp;

  m.begin(p, h);
  read_states(p.dual, n, h, d, hd, s.S1, s.S2, dp);

  // An open chunk: gradients are taken at its start, reading and writing go on from the current state.
  int position = p.position ? int(p.position[n]) : 0;
  bool opened = position > 0;
  float open_log_decay = 0.0f;
  if (opened) {
    if (p.open_log_decay) open_log_decay = p.open_log_decay[n * p.H + h];
    read_states(p.start, n, h, d, hd, s.start1, s.start2, dp);
  }
  const auto write_start = [&] {
    write_states(p.final_start, n, h, d, hd, opened ? s.start1 : s.S1, opened ? s.start2 : s.S2, dp, s.spare);
  };
  bool start_written = false;

  int64_t chunk = 0;
  for (int64_t t = 0; t < length; ++chunk) {
    const int c = int(length - t < p.C - position ? length - t : p.C - position);
    const bool closes = position + c == p.C;
    const int64_t token = p.begin(n) + t;

    if (p.saved && chunk % p.checkpoint_every == 0) {
      float* to = p.saved + ((p.slot(n) + chunk / p.checkpoint_every) * p.H + h) * 2 * hd * d;
      copy_out(s.S1, dp, hd, d, to, d);
      copy_out(s.S2, dp, hd, d, to + int64_t(hd) * d, d);
    }
    if (!closes && p.final_start[0]) write_start(), start_written = true;  // this chunk stays open

    m.read(p, b, token, h, c);
    m.write(p, bias, c, opened ? s.start1 : s.S1, opened ? s.start2 : s.S2, s.ZT, nullptr, ReadSoon(m.view(p, p.q, b, token, h), c));

    m.read_queries(p, b, token, h, c);
    m.read_hidden<false>(c, s.S2, nullptr, WriteSoon());
    m.each_hidden(c, [&](index_t at) MIRAS_LAMBDA { store(m.AqT + at, Gelu(load(m.AqT + at)).value()); });
    m.read_out(c, s.S1, WriteSoon(m.view(p, p.out, b, token, h), c));
    m.norm.affine(c, m.Xq, m.Q, s.O);
    m.view(p, p.out, b, token, h).write(c, s.O, dp);

    const int next = int(length - t - c < p.C ? length - t - c : p.C);
    m.advance_both(c, s.S1, s.S2, s.S1, s.S2, ReadSoon(m.view(p, p.k, b, token + c, h), next));

    if (m.gates.decays) {
      for (int i = 0; i < c; ++i) open_log_decay += m.gates.log_decay[i];
    }
    if (closes) open_log_decay = 0.0f;
    t += c;
    position = 0, opened = false;
  }

  if (p.final_dual[0]) write_states(p.final_dual, n, h, d, hd, s.S1, s.S2, dp, s.spare);
  if (p.final_start[0] && !start_written) write_start();  // nothing came in, or the end is a boundary
  if (p.final_log_decay) p.final_log_decay[n * p.H + h] = open_log_decay;
}

static void mlp_forward(const MlpForward& p, int64_t first, int64_t last) {
  FlushDenormals flush;
  Arena measure(nullptr);
  MlpForwardScratch(measure, p);
  Arena arena(thread_scratch(size_t(measure.used())));
  const MlpForwardScratch scratch(arena, p);
  const BiasTable bias = bias_table(p.bias, p.bias_params);
  for (int64_t i = first; i < last; ++i) mlp_forward_task(p, bias, scratch, i);
}

}  // namespace miras::cpu::MIRAS_LEVEL
