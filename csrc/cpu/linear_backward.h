// Backward of the linear memory (docs/mathematics.md, section 6), chunks from last to first, J = gradient of the dual after a chunk:
//
//   dU_s = -rho sum_{t>=s} P_ts dO_t - (gamma_C/gamma_s) J k_s        P = L o (Q K')
//   d eta_s = dU_s . g_s      dE_s = psi'(E_s) (eta_s dU_s)           dV_s = -dE_s
//   dQ_t = gamma_t W0' dO_t - sum_{s<=t} N_ts k_s                     N = rho L o (dO U')
//   dK_s = W0' dE_s - sum_{t>=s} N_ts q_t - (gamma_C/gamma_s) J' U_s
//   dW0  = sum_t gamma_t dO_t q_t' + sum_s dE_s k_s'
//   J   <- gamma_C J + phi'(A_0)^T [dW0] + d rho d rho / d A_0         d rho = -sum P_ts (dO_t . U_s)
//
// and, with X_ts = -rho P_ts (dO_t . U_s) (see decay_gradient),
//
//   d log alpha_r = sum_{s<r<=t} X_ts + sum_{t>=r} gamma_t (W0 q_t).dO_t - sum_{s<r} (gamma_C/gamma_s) U_s.(J k_s) + gamma_C <J, A_0>
//
// With momentum, M in L's place, M_Cs in that of gamma_C / gamma_s, and JS = gradient of the momenta after a chunk:
//
//   dU_s -= Theta_Cs JS k_s       dQ_t += rho b_t S_0' dO_t       dK_s -= Theta_Cs JS' U_s      d rho += sum_t b_t dO_t . (S_0 q_t)
//   JS  <- b_C J + pi_C JS + rho sum_t b_t dO_t q_t'
//   d log alpha and d theta: decay_gradient_with_momentum and momentum_gradient, from
//   gM_ts = -rho (q_t.k_s) (dO_t.U_s), gM_Cs -= U_s.(J k_s), gTheta_Cs = -U_s.(JS k_s), gb_t = rho dO_t.(S_0 q_t), gb_C += <J, S_0>,
//   gpi_C = <JS, S_0>
//
// With channel-wise decays the part that goes through M is in channel_decay.h.
//
// Names and layouts: linear_backward_task.h.
#pragma once

#include "linear_backward_gates.h"

namespace miras::cpu::MIRAS_LEVEL {

// What later stages read. Tokens: K, K transposed, Q, dO, U and its transpose. Value channels: states not transposed
void BackwardTask::read_chunk(int64_t chunk, const ChunkStart& x, bool recomputed, const Part& mine) {
  const Range own = mine.tokens, cols(mine.channels.first, minimum(mine.channels.last, task.dv));
  const int count = own.count();
  MIRAS_STAGE("read", 0, 4 * count * dk + 6 * count * dvp);
  const LinearGates& gates = s.gates;
  const index_t row = index_t(own.first) * dvp, key_row = index_t(own.first) * dkp;
  if (!recomputed) read_keys(chunk, own), writes(own, x.G);
  if constexpr (!kPairs) keys(p.k, p.dtype, chunk).from(own.first).read(count, s.K.along + key_row, dkp);
  keys(p.q, p.dtype, chunk).from(own.first).read(count, s.Q.along + key_row, dkp);
  s.Q.pair_along(own, dkp);
  values(p.grad_out, chunk).from(own.first).read(count, s.dO + row, dvp);
  weigh(own, dvp, gates.from_start(), s.dO, s.dO_gamma);
  if (retention.scales_reads) scale(x.rho.value, index_t(count) * dvp, s.dO + row);
  for (const Operand& y : {s.dO, s.dO_gamma}) y.pack_along(own, dvp), y.pack_down(own, dvp);
  s.U_end.pack_along(own, dvp);
  if (!channels) {
    s.U.pack_along(own, dvp);
    transpose_operand(s.U, own, task.dv, dvp, s.UT, cp);
  }
  const auto plain = [&](const Operand& from, float* to) {
    from.pack_along(dk, {dvp, mine.channels});
    transpose_operand(from, dk, cols, dvp, to, dkp);
  };
  plain(s.J, s.J_plain), plain(s.W_copy.of(x.W), s.W_plain);
  s.J.pack_down(dk, {dvp, mine.channels});
  if (!momentum) return;
  s.U_step.pack_along(own, dvp);
  plain(s.JS, s.JS_plain), plain(s.S_copy.of(x.S), s.S_plain);
  for (const Operand& y : {s.JS, s.S_copy.of(x.S)}) y.pack_down(dk, {dvp, mine.channels});
}

// Tokens: P, N = M o (dO U') and X = -P o (dO U'), with momentum gM = -(Q K') o (dO U')  [c x Cp]; dO has the factor rho
void BackwardTask::scores_backward(int c, const Part& mine, WriteSoon soon) {
  MIRAS_STAGE("pairs", c * (c + 1) * (dk + dvp), c * dk + dk * cp + 4 * c * dvp + 2 * c * (c + 1));
  const Rows Q = by_rows(s.Q.along, dkp);
  const bool keep_x = momentum || s.gates.decays || retention.scales_reads;
  const float* factors = momentum ? s.QK : s.P.x;
  const auto then = [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    x.add(by_rows(s.dO.along, dvp).at(i), s.UT + j, cp, 0, task.dv, soon);
    x.each([&](int r, int m, Vec& y) MIRAS_LAMBDA {
      const index_t at = index_t(i + r) * cp + j + m * kLanes;
      if (keep_x) store(s.X + at, -load(factors + at) * y);
      y *= load(s.M + at);
    });
    x.store_to(s.N.along + i * cp + j, cp);
  };
  float* const last = s.last_rows + index_t(mine.index) * 2 * cp;
  if (momentum) momentum_scores<true>(s.gates, mine.tokens, dk, Q, s.KT, cp, last, s.P.x, s.M, s.Theta, s.QK, WriteSoon(), then);
  else decayed_scores<true>(s.gates, mine.tokens, dk, Q, s.KT, cp, last, s.P.x, s.M, nullptr, WriteSoon(), then);
  s.P.pack_down(mine.tokens, cp);
  s.N.pair_along(mine.tokens, cp);
}

// Tokens: dU = -P' dO - to_end * (K J') - Theta_C * (K JS')
void BackwardTask::writes_backward(int c, Range tokens, WriteSoon soon) {
  [[maybe_unused]] const int count = tokens.count();
  MIRAS_STAGE("writes", 2 * count * dk * dvp + count * (c + 1) * dvp, count * dk + dk * dvp + count * (c + 1) / 2 + 3 * count * dvp);
  const LinearGates& gates = s.gates;
  if (momentum) weigh_rows(tokens, dvp, gates.step_end, s.KJS, s.KJS);
  const float* dotted = momentum ? s.U.x : s.U_end.x;
  sweep(tokens, dvp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    x.add(by_rows(s.K.along, dkp).at(i), s.J.down + j, dvp, 0, dk, soon);
    if (gates.fades()) x.dot_rows(dotted + i * dvp + j, dvp, s.write_sums + i);
    x.scale_rows(gates.to_end + i);
    if (momentum) x.add_matrix(s.KJS + i * dvp + j, dvp);
    x.add(Cols{s.P.down + i, cp}, s.dO.down + j, dvp, i, c);
    x.negate();
    x.store_to(s.dE + i * dvp + j, dvp);
  });
}

// Value channels: JS = b_C J + pi_C JS + Q' (rho b dO), from J and JS of the chunk's end (transposed)
template <bool kChannels> void BackwardTask::momenta_gradient(int c, Range columns) {
  const LinearGates& gates = s.gates;
  const Scaled term = gates.momenta_at_end(s.J, c);
  sweep(dk, columns, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> y;
    y.add(Cols{s.Q.down + i, dkp}, s.dO_b.down + j, dvp, 0, c);
    y.add_scaled(s.JS + i * dvp + j, dvp, gates.step_momenta_end(c));
    if constexpr (kChannels) y.add_scaled_cols(s.J + i * dvp + j, dvp, term.scale + j);
    else y.add_scaled(s.J + i * dvp + j, dvp, term.scale);
    y.store_to(s.JS + i * dvp + j, dvp);
  });
}

// Value channels: dW0 = Q' (gamma dO) + K' dE, or directly J = gamma_C J + dW0 if W = A
template <bool kIdentity, bool kChannels> void BackwardTask::primal_gradient(int c, Range columns, ReadSoon soon) {
  const Scaled term = s.gates.dual_at_end(s.J, c);
  sweep(dk, columns, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> y;
    y.add(Cols{s.Q.down + i, dkp}, s.dO_gamma.down + j, dvp, 0, c, soon);
    if (bias.predicts) y.add(Cols{s.K.down + i, dkp}, s.dE.down + j, dvp, 0, c);
    if constexpr (kIdentity && kChannels) y.add_scaled_cols(s.J + i * dvp + j, dvp, term.scale + j);
    else if constexpr (kIdentity) y.add_scaled(s.J + i * dvp + j, dvp, term.scale);
    y.store_to((kIdentity ? s.J.x : s.dW) + i * dvp + j, dvp);
  });
}

// JS and J of the chunk's start, in place of those of its end
void BackwardTask::state_gradients(int c, const ChunkStart& x, float drho, ReadSoon soon) {
  MIRAS_STAGE("update", 4 * c * dk * dvp, 2 * c * dk + 2 * c * dvp + 2 * dk * dvp);
  in_parts(p, {0, c, dvp}, [&](const Part& mine) {
    const Range cols = mine.channels;
    const ReadSoon once = mine.once(soon);
    if (momentum && channels) momenta_gradient<true>(c, cols);
    else if (momentum) momenta_gradient<false>(c, cols);
    if (!retention.identity) primal_gradient<false, false>(c, cols, once);
    else if (channels) primal_gradient<true, true>(c, cols, once);
    else primal_gradient<true, false>(c, cols, once);
  });
  if (retention.identity) return;
  const float* decay = s.gates.dual_at_end(s.J, c).scale;
  retention.pull_back(shape(), x.A, x.W, x.rho, drho, s.dW, ChannelsInParts{p, dvp}, [&](Range cols) {
    shape().of(cols).each([&](index_t at, int j) MIRAS_LAMBDA {
      const Vec gamma = channels ? load(decay + j) : broadcast(*decay);
      store(s.J + at, gamma * load(s.J + at) + load(s.dW + at));
    });
  });
}

// Tokens, from dU: d eta, d delta, dE, dV
void BackwardTask::errors_backward(int64_t chunk, const ChunkStart& x, const Part& mine) {
  const Range own = mine.tokens;
  const int count = own.count();
  if (count == 0) return;
  MIRAS_STAGE("row pass", 0, 8 * count * dvp);
  const index_t row = index_t(own.first) * dvp;
  float* const deta = s.deta + (p.lr_per_channel ? row : own.first);
  float* const ddelta = s.ddelta + (p.delta_per_channel ? row : own.first);
  bias.pull_back(rows(chunk, own), x.E + row, x.G + row, s.dE + row, deta, ddelta);
  s.dE.pack_along(own, dvp), s.dE.pack_down(own, dvp);
  const ChunkView dv = values(p.dv, chunk).from(own.first);
  float* const dV = dv.in_place() ? dv.at<float>() : s.U + row;  // free until the next chunk
  const index_t ldv = dv.in_place() ? p.dv.token : dvp;
  for (int t = 0; t < count; ++t)
    for (int j = 0; j < dvp; j += kLanes) store(dV + t * ldv + j, -load(s.dE + row + index_t(t) * dvp + j));
  if (!dv.in_place()) dv.write(count, dV, dvp);
}

// Tokens: dQ = (gamma dO) W0 + (rho b dO) S_0 - N K
void BackwardTask::query_gradient(int64_t chunk, const Part& mine) {
  const int c = tokens(chunk), first = mine.tokens.first, count = mine.tokens.count();
  MIRAS_STAGE("dQ", 2 * count * dk * dvp + count * (c + 1) * dk, count * dvp + dk * dvp + count * (c + 1) / 2 + 3 * count * dk);
  const LinearGates& gates = s.gates;
  const TokenTensor dq_part = part(p.dq, p.key_part, p.grad_dtype), dk_part = part(p.dk, p.key_part, p.grad_dtype);
  const ChunkView dq = keys(dq_part, p.grad_dtype, chunk);
  WriteSoon dk_soon = mine.once(WriteSoon(keys(dk_part, p.grad_dtype, chunk), c, products(c)));
  float* to = dq.in_place() ? dq.at<float>() : s.dX;
  const index_t ld = dq.in_place() ? p.dq.token : dkp;
  sweep(mine.tokens, dkp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> y;
    y.add(by_rows(s.dO_gamma.along, dvp).at(i), s.W_plain + j, dkp, 0, task.dv, dk_soon);
    if (gates.decays) y.dot_rows(s.Q.along + i * dkp + j, dkp, s.read_sums + i);
    if (momentum) y.add_matrix(s.dQ_b + i * dkp + j, dkp);
    y.subtract(by_rows(s.N.along, cp).at(i), s.K.down + j, dkp, 0, i + R);
    y.store_to(to + i * ld + j, ld);
  });
  if (!dq.in_place()) dq.from(first).write(count, s.dX + index_t(first) * dkp, dkp);
}

// Tokens: dK = dE W0 - N' Q - U_end J - U_step JS
void BackwardTask::key_gradient(int64_t chunk, const Part& mine) {
  const int c = tokens(chunk), first = mine.tokens.first, count = mine.tokens.count();
  MIRAS_STAGE("dK", 4 * count * dk * dvp + count * (c + 1) * dk, 2 * count * dvp + 2 * dk * dvp + count * (c + 1) / 2 + 2 * count * dk);
  const TokenTensor dk_part = part(p.dk, p.key_part, p.grad_dtype);
  const ChunkView dkeys = keys(dk_part, p.grad_dtype, chunk);
  ReadSoon q_soon = mine.once(ReadSoon(keys(p.q, p.dtype, chunk - 1), chunk > 0 ? p.C : 0, products(c)));
  float* to = dkeys.in_place() ? dkeys.at<float>() : s.dX;
  const index_t ld = dkeys.in_place() ? p.dk.token : dkp;
  sweep(mine.tokens, dkp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> y;
    if (bias.predicts) y.add(by_rows(s.dE.along, dvp).at(i), s.W_plain + j, dkp, 0, task.dv);
    y.subtract(Cols{s.N.down + i, cp}, s.Q.down + j, dkp, i, c);
    y.subtract(by_rows(s.U_end.along, dvp).at(i), s.J_plain + j, dkp, 0, task.dv, q_soon);
    if (momentum) y.subtract(by_rows(s.U_step.along, dvp).at(i), s.JS_plain + j, dkp, 0, task.dv);
    y.store_to(to + i * ld + j, ld);
  });
  if (!dkeys.in_place()) dkeys.from(first).write(count, s.dX + index_t(first) * dkp, dkp);
}

// recomputed: the chunk's gates, keys and writes are as recomputing left them.
void BackwardTask::chunk_backward(int64_t chunk, const ChunkStart& x, bool recomputed) {
  const int c = tokens(chunk);
  const LinearGates& gates = s.gates;
  const Extent all{0, c, dvp};
  if (!recomputed) begin(chunk);
  // Prefetched meanwhile: where the results are written, then what the next chunk (the preceding one) reads.
  const TokenTensor dq_part = part(p.dq, p.key_part, p.grad_dtype);
  const WriteSoon dq_soon(keys(dq_part, p.grad_dtype, chunk), c, products(c)), dv_soon(values(p.dv, chunk), c, int64_t(c) * c / 2 * dvp);
  const ReadSoon dO_soon(values(p.grad_out, chunk - 1), chunk > 0 ? p.C : 0, products(c));
  fill_zero(s.read_sums, cp), fill_zero(s.write_sums, cp), fill_zero(s.gTheta, cp);

  in_parts(p, all, [&](const Part& mine) { read_chunk(chunk, x, recomputed, mine); });
  in_parts(p, all, [&](const Part& mine) {
    if (momentum) momenta_reads(mine.tokens, x);
    if (!channels) scores_backward(c, mine, mine.once(dv_soon));
  });
  if (channels) channels_backward(c, x);
  in_parts(p, all, [&](const Part& mine) {
    if (!channels) writes_backward(c, mine.tokens, mine.once(dq_soon));
    errors_backward(chunk, x, mine);
    query_gradient(chunk, mine);
    key_gradient(chunk, mine);
  });

  put(p.dlr, gates.channel_eta, chunk, s.deta);
  if (p.ddelta) put(p.ddelta, p.delta_per_channel, chunk, s.ddelta);
  const float drho = retention.scales_reads ? rho_gradient(c, x) : 0.0f;
  MIRAS_STAGE("gates", 0, 2 * dk * dvp + c * (c + 1) / 2);
  gate_gradients(chunk, x);
  state_gradients(c, x, drho, dO_soon);
}

void BackwardTask::run() {
  const auto read_gradient = [&](const StateTensor& from, float* to) {
    if (from) read_state(from, n, h, task.first, task.dv, dk, to, dvp);
    else fill_zero(to, state);
  };
  read_gradient(p.grad_final_dual, s.J);
  if (momentum) read_gradient(p.grad_final_momenta, s.JS);
  const int64_t square = int64_t(p.C) * cp;  // zero right of the diagonal, where nothing is written
  s.P.clear(p.C, cp), s.N.clear(p.C, cp);
  fill_zero(s.M, square), fill_zero(s.X, square);
  if (momentum) fill_zero(s.Theta, square);
  for (int64_t i = 0; retention.identity && i < p.segment; ++i) s.rho[i] = 1.0f, s.rho_slope[i] = 0.0f;

  const int64_t chunks = (length + p.C - 1) / p.C, every = p.checkpoint_every;
  for (int64_t last = chunks; last > 0;) {
    const int64_t first = (last - 1) / every * every;
    MIRAS_PASS("recompute");
    rerun(first, last);
    MIRAS_PASS("backward");
    for (int64_t chunk = last - 1; chunk >= first; --chunk) chunk_backward(chunk, start(chunk - first), chunk == last - 1);
    last = first;
  }
  write_state(p.d_dual, n, h, task.first, task.dv, dk, s.J, dvp, s.J_plain);
  if (momentum) write_state(p.d_momenta, n, h, task.first, task.dv, dk, s.JS, dvp, s.J_plain);
}

static void linear_backward(const LinearBackward& p, int64_t first, int64_t last) {
  const BiasTable bias = bias_table(p, p.lr_per_channel);
  const Retention retention(p);
  with_scratch<BackwardScratch>(p, [&](const BackwardScratch& s) MIRAS_LAMBDA {
    for (int64_t i = first; i < last; ++i) BackwardTask(p, bias, retention, s, i).run();
  });
  MIRAS_PASS(nullptr);
}

}  // namespace miras::cpu::MIRAS_LEVEL
