// Forward of the MLP memory M(x) = x + LN(W1 gelu(W2 x)), chunk by chunk (docs/mathematics.md, section 9). Inner gradients at the
// chunk's start:
//
//   Z = K W2'   A = gelu(Z)   U = A W1'   E = K + LN(U) - V   Gu = LN'(psi(E))   Gz = (Gu W1) gelu'(Z)
//
// read-out, P2 = L o (Q K'), P1 = L o (Aq A'), and states:
//
//   Zq = gamma * (Q W2') - P2 (eta Gz)   Aq = gelu(Zq)   Uq = gamma * (Aq W1') - P1 (eta Gu)   O = Q + LN(Uq)
//   W1 <- gamma_C W1 - sum_s (gamma_C/gamma_s) eta_s gu_s a_s'     W2 <- gamma_C W2 - sum_s (gamma_C/gamma_s) eta_s gz_s k_s'
//
// This is for L2Retention without momentum. Otherwise both matrices have duals A and momenta S, with W = phi(A) and rho of each at the
// chunk's start, M = L Theta in place of L, and b (see Gates):
//
//   Zq = gamma * (Q W2') + rho2 (b * (Q S2') - (M o Q K') (eta Gz))       A <- gamma_C A + b_C S - sum_s M_Cs ...
//   Uq = gamma * (Aq W1') + rho1 (b * (Aq S1') - (M o Aq A') (eta Gu))    S <- pi_C S - sum_s Theta_Cs ...
//
// A task is one head of one sequence, which threads may share (parts.h). Sizes and layouts: mlp_chunk.h.
#pragma once

#include "mlp_chunk.h"

namespace miras::cpu::MIRAS_LEVEL {

struct MlpForwardScratch {
  MlpChunk chunk;
  MlpStates state, start;  // start: of an open chunk
  float* O;                // [C x Dp]
  float* spare;            // [D x Hdp]

  MIRAS_FN MlpForwardScratch(Arena& a, const MlpForward& p)
      : chunk(a, p, 0), state(a, p, chunk.retention, 1, false),
        start(a, p, chunk.retention, p.position ? 1 : 0, false) {
    O = a.take(p.C, chunk.dp);
    spare = a.take(p.D, round_up(p.Hd, kPad));
  }
};

// What an open chunk's tokens read, in place of W: g W_0 + rho (A - g A_0), with g = exp(open_log_decay), the chunk's decay so far,
// its start A_0 and W_0, the current dual A, and rho of the start. If W = A, this is A.
static void find_open_readout(const MlpChunk& m, float open_log_decay, const MlpState& start, const MlpState& s) {
  const float g = exp_nonpositive(broadcast(open_log_decay))[0];
  for (int i = 0; i < 2; ++i) {
    s.rho[i] = start.rho[i];
    if (m.retention.identity) continue;
    for (index_t at = 0; at < index_t(m.hd) * m.dp; at += kLanes) {
      const Vec written = load(s.dual[i] + at) - g * load(start.dual[i] + at);
      store(s.primal[i] + at, g * load(start.primal[i] + at) + start.rho[i].value * written);
    }
  }
}

static void mlp_forward_task(const MlpForward& p, const BiasTable& bias, const MlpForwardScratch& scratch, int64_t task) {
  MlpForwardScratch s = scratch;
  MlpChunk& m = s.chunk;
  const int64_t n = task / p.H, h = task % p.H, b = p.batch(n), length = p.length(n);
  const int d = p.D, hd = p.Hd, dp = m.dp;

  m.begin(p, h);
  const MlpState state = s.state.at(0), start = s.start.at(0);
  read_states(p.dual, n, h, d, hd, state.dual, dp);
  if (p.momentum) read_states(p.momenta, n, h, d, hd, state.momenta, dp);

  // An open chunk: inner gradients use the state at its start, reads and writes go on from the current state.
  int position = p.position ? int(p.position[n]) : 0;
  bool opened = position > 0;
  float open_log_decay = 0.0f;
  if (opened) {
    if (p.open_log_decay) open_log_decay = p.open_log_decay[n * p.H + h];
    read_states(p.start, n, h, d, hd, start.dual, dp);
    m.find_primal(start);
    find_open_readout(m, open_log_decay, start, state);
  }
  const auto write_start = [&] { write_states(p.final_start, n, h, d, hd, (opened ? start : state).dual, dp, s.spare); };
  bool start_written = false;

  int64_t chunk = 0;
  for (int64_t t = 0; t < length; ++chunk) {
    const int c = int(length - t < p.C - position ? length - t : p.C - position);
    const bool closes = position + c == p.C;
    const int64_t token = p.begin(n) + t;

    MIRAS_STAGE("read", 0, 12 * c * d);
    if (p.checkpoints && chunk % p.checkpoint_every == 0) Checkpoint(p, n, h, chunk).write(state);
    if (!closes && p.final_start[0]) write_start(), start_written = true;  // this chunk stays open
    if (!opened) m.find_primal(p, state);

    m.read(p, b, token, h, c);
    m.read_queries(p, b, token, h, c);
    const int next = int(length - t - c < p.C ? length - t - c : p.C);
    const MlpState& written = opened ? start : state;
    in_parts(p, c, [&](const Part& mine) {
      m.pack(mine.units, state.primal);
      if (opened) m.pack(mine.units, written.primal);
      if (p.momentum) m.pack(mine.units, state.momenta);
      m.predict_hidden(mine, c, written, ReadSoon());
      m.AT.pair_along(mine.units, m.columns(c));
      m.query_scores(mine, c, state, {});
    });
    in_parts(p, c, [&](const Part& mine) {
      m.predict_rows(mine, written);
      if (p.products) m.keep(mine.tokens, m.X, d, p.product(0, b, h, token));
      m.find_errors(mine, p, bias);
    });
    in_parts(p, c, [&](const Part& mine) {
      m.hidden_gradient(mine, c, written, ReadSoon(m.view(p, p.v, b, token + c, h), next));
      m.read_hidden(mine, c, state);
      MIRAS_STAGE("gelu", 0, 2 * hd * c);
      m.gelu(mine.units, c, m.AqT, m.AqT.along);
      m.AqT.pair_along(mine.units, m.columns(c));
      m.advance_matrix(1, mine, c, state, state, ReadSoon(m.view(p, p.k, b, token + c, h), next));
    });
    in_parts(p, c, [&](const Part& mine) {
      const int first = mine.tokens.first;
      m.read_out<false>(mine, state, WriteSoon(m.view(p, p.out, b, token, h), c));
      if (p.products) {
        m.keep(mine.tokens, m.reads, d, p.product(1, b, h, token));
        m.keep(mine.tokens, m.AqA, p.C, p.chunk_scores(b, h, token));
      }
      MIRAS_STAGE("row pass", 0, 5 * c * d);
      m.norm.affine(mine.tokens, m.Xq, m.Q, s.O);
      m.view(p, p.out, b, token + first, h).write(mine.tokens.count(), s.O + index_t(first) * dp, dp);
    });
    in_parts(p, c, [&](const Part& mine) { m.advance_matrix(0, mine, c, state, state, ReadSoon(m.view(p, p.q, b, token + c, h), next)); });

    if (m.gates.decays) {
      for (int i = 0; i < c; ++i) open_log_decay += m.gates.log_decay[i];
    }
    if (closes) open_log_decay = 0.0f;
    t += c;
    position = 0, opened = false;
  }

  if (p.final_dual[0]) write_states(p.final_dual, n, h, d, hd, state.dual, dp, s.spare);
  if (p.final_momenta[0]) write_states(p.final_momenta, n, h, d, hd, state.momenta, dp, s.spare);
  if (p.final_start[0] && !start_written) write_start();  // no token, or a chunk boundary
  if (p.final_log_decay) p.final_log_decay[n * p.H + h] = open_log_decay;
}

static void mlp_forward(const MlpForward& p, int64_t first, int64_t last) {
  MIRAS_PASS("forward");
  const BiasTable bias = bias_table(p);
  with_scratch<MlpForwardScratch>(p, [&](const MlpForwardScratch& s) MIRAS_LAMBDA {
    for (int64_t i = first; i < last; ++i) mlp_forward_task(p, bias, s, i);
  });
  MIRAS_PASS(nullptr);
}

}  // namespace miras::cpu::MIRAS_LEVEL
