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

// P, N = M o (dO U') and X = -P o (dO U'), with momentum gM = -(Q K') o (dO U')  [c x Cp]; dO has the factor rho
void BackwardTask::scores_backward(int c, WriteSoon soon) {
  MIRAS_STAGE("pairs", c * (c + 1) * (dk + dvp), c * dk + dk * cp + 4 * c * dvp + 2 * c * (c + 1));
  const Rows Q{s.Q, dkp};
  transpose(s.U, dvp, c, task.dv, s.UT, cp);
  const bool keep_x = momentum || s.gates.decays || retention.scales_reads;
  const float* factors = momentum ? s.QK : s.P;
  const auto then = [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    x.add(Rows{s.dO + i * dvp, dvp}, s.UT + j, cp, 0, task.dv, soon);
    x.each([&](int r, int m, Vec& y) MIRAS_LAMBDA {
      const index_t at = index_t(i + r) * cp + j + m * kLanes;
      if (keep_x) store(s.X + at, -load(factors + at) * y);
      y *= load(s.M + at);
    });
    x.store_to(s.N + i * cp + j, cp);
  };
  if (momentum) momentum_scores<true>(s.gates, c, dk, Q, s.KT, cp, s.last_rows, s.P, s.M, s.Theta, s.QK, WriteSoon(), then);
  else decayed_scores<true>(s.gates, c, dk, Q, s.KT, cp, s.last_rows, s.P, s.M, WriteSoon(), then);
}

// dU = -P' dO - to_end * (K J') - Theta_C * (K JS')
void BackwardTask::writes_backward(int c, WriteSoon soon) {
  MIRAS_STAGE("writes", 2 * c * dk * dvp + c * (c + 1) * dvp, c * dk + dk * dvp + c * (c + 1) / 2 + 3 * c * dvp);
  const LinearGates& gates = s.gates;
  if (momentum) weigh_rows(c, dvp, gates.step_end, s.KJS, s.KJS);
  const float* dotted = momentum ? s.U : s.U_end;
  sweep(c, dvp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    x.add(Rows{s.K + i * dkp, dkp}, s.J + j, dvp, 0, dk, soon);
    if (gates.fades()) x.dot_rows(dotted + i * dvp + j, dvp, s.write_sums + i);
    x.scale_rows(gates.to_end + i);
    if (momentum) x.add_matrix(s.KJS + i * dvp + j, dvp);
    x.add(Cols{s.P + i, cp}, s.dO + j, dvp, i, c);
    x.each([](int, int, Vec& y) MIRAS_LAMBDA { y = -y; });
    x.store_to(s.dE + i * dvp + j, dvp);
  });
}

// JS = b_C J + pi_C JS + Q' (rho b dO), from J and JS of the chunk's end (transposed)
template <bool kChannels> void BackwardTask::momenta_gradient(int c) {
  const LinearGates& gates = s.gates;
  const Scaled term = gates.momenta_at_end(s.J, c);
  sweep(dk, dvp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> y;
    y.add(Cols{s.Q + i, dkp}, s.dO_b + j, dvp, 0, c);
    y.add_scaled(s.JS + i * dvp + j, dvp, gates.step_momenta_end(c));
    if constexpr (kChannels) y.add_scaled_cols(s.J + i * dvp + j, dvp, term.scale + j);
    else y.add_scaled(s.J + i * dvp + j, dvp, term.scale);
    y.store_to(s.JS + i * dvp + j, dvp);
  });
}

// dW0 = Q' (gamma dO) + K' dE, or directly J = gamma_C J + dW0 if W = A
template <bool kIdentity, bool kChannels> void BackwardTask::primal_gradient(int c, ReadSoon soon) {
  const Scaled term = s.gates.dual_at_end(s.J, c);
  sweep(dk, dvp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> y;
    y.add(Cols{s.Q + i, dkp}, s.dO_gamma + j, dvp, 0, c, soon);
    if (bias.predicts) y.add(Cols{s.K + i, dkp}, s.dE + j, dvp, 0, c);
    if constexpr (kIdentity && kChannels) y.add_scaled_cols(s.J + i * dvp + j, dvp, term.scale + j);
    else if constexpr (kIdentity) y.add_scaled(s.J + i * dvp + j, dvp, term.scale);
    y.store_to((kIdentity ? s.J : s.dW) + i * dvp + j, dvp);
  });
}

// JS and J of the chunk's start, in place of those of its end
void BackwardTask::state_gradients(int c, const ChunkStart& x, float drho, ReadSoon soon) {
  if (momentum && channels) momenta_gradient<true>(c);
  else if (momentum) momenta_gradient<false>(c);
  if (retention.identity) return channels ? primal_gradient<true, true>(c, soon) : primal_gradient<true, false>(c, soon);

  primal_gradient<false, false>(c, soon);
  retention.pull_back(shape(), x.A, x.W, x.rho, drho, s.dW);
  const float* scale = s.gates.dual_at_end(s.J, c).scale;
  shape().each([&](index_t at, int j) MIRAS_LAMBDA {
    const Vec gamma = channels ? load(scale + j) : broadcast(*scale);
    store(s.J + at, gamma * load(s.J + at) + load(s.dW + at));
  });
}

void BackwardTask::chunk_backward(int64_t chunk, const ChunkStart& x) {
  const int c = tokens(chunk);
  MIRAS_STAGE("read", 0, 4 * c * dk + 6 * c * dvp);
  const LinearGates& gates = s.gates;
  const TokenTensor dq_part = part(p.dq, p.key_part, p.grad_dtype), dk_part = part(p.dk, p.key_part, p.grad_dtype);
  const ChunkView dq = keys(dq_part, p.grad_dtype, chunk), dkeys = keys(dk_part, p.grad_dtype, chunk);
  // Prefetched meanwhile: where the results are written, then what the next chunk (the preceding one) reads.
  const int next = chunk > 0 ? p.C : 0;
  WriteSoon dk_soon(dkeys, c, products(c));
  ReadSoon q_soon(keys(p.q, p.dtype, chunk - 1), next, products(c)), dO_soon(values(p.grad_out, chunk - 1), next, products(c));

  keys(p.k, p.dtype, chunk).read(c, s.K, dkp);
  keys(p.q, p.dtype, chunk).read(c, s.Q, dkp);
  values(p.grad_out, chunk).read(c, s.dO, dvp);
  weigh(c, dvp, gates.from_start(), s.dO, s.dO_gamma);
  if (retention.scales_reads) scale(x.rho.value, index_t(c) * dvp, s.dO);
  writes(c, x.G);
  fill_zero(s.read_sums, cp), fill_zero(s.write_sums, cp), fill_zero(s.gTheta, cp);

  if (momentum) {
    momenta_reads(c, x);
    times_state(c, dk, Rows{s.K, dkp}, s.JS, dvp, s.KJS);
    for (int t = 0; t < c; ++t) s.gTheta[t] = -inner_product(s.U + index_t(t) * dvp, s.KJS + index_t(t) * dvp, dvp);
  }
  if (channels) {
    channels_backward(c, x);
  } else {
    scores_backward(c, WriteSoon(values(p.dv, chunk), c, int64_t(c) * c / 2 * dvp));
    writes_backward(c, WriteSoon(dq, c, products(c)));
  }

  MIRAS_STAGE("row pass", 0, 4 * dk * dvp + 8 * c * dvp);
  transpose(s.J, dvp, dk, task.dv, s.J_plain, dkp);  // while J is in the cache
  if (momentum) transpose(s.JS, dvp, dk, task.dv, s.JS_plain, dkp);

  // d eta, dE, dV, d delta
  bias.pull_back(bias_rows(chunk), x.E, x.G, s.dE, s.deta, s.ddelta);
  put(p.dlr, gates.channel_eta, chunk, s.deta);
  if (p.ddelta) put(p.ddelta, p.delta_per_channel, chunk, s.ddelta);
  const float drho = retention.scales_reads ? rho_gradient(c, x) : 0.0f;
  const ChunkView dv = values(p.dv, chunk);
  float* dV = dv.in_place() ? dv.at<float>() : s.U;  // free until the next chunk
  const index_t ldv = dv.in_place() ? p.dv.token : dvp;
  for (int t = 0; t < c; ++t)
    for (int j = 0; j < dvp; j += kLanes) store(dV + t * ldv + j, -load(s.dE + index_t(t) * dvp + j));
  if (!dv.in_place()) dv.write(c, s.U, dvp);

  // dQ = (gamma dO) W0 + (rho b dO) S_0 - N K
  transpose(x.W, dvp, dk, task.dv, s.W_plain, dkp);
  MIRAS_STAGE("dQ", 2 * c * dk * dvp + c * (c + 1) * dk, c * dvp + dk * dvp + c * (c + 1) / 2 + 3 * c * dk);
  float* to = dq.in_place() ? dq.at<float>() : s.dX;
  index_t ld = dq.in_place() ? p.dq.token : dkp;
  sweep(c, dkp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> y;
    y.add(Rows{s.dO_gamma + i * dvp, dvp}, s.W_plain + j, dkp, 0, task.dv, dk_soon);
    if (gates.decays) y.dot_rows(s.Q + i * dkp + j, dkp, s.read_sums + i);
    if (momentum) y.add_matrix(s.dQ_b + i * dkp + j, dkp);
    y.subtract(Rows{s.N + i * cp, cp}, s.K + j, dkp, 0, i + R);
    y.store_to(to + i * ld + j, ld);
  });
  if (!dq.in_place()) dq.write(c, s.dX, dkp);

  // dK = dE W0 - N' Q - U_end J - U_step JS
  MIRAS_STAGE("dK", 4 * c * dk * dvp + c * (c + 1) * dk, 2 * c * dvp + 2 * dk * dvp + c * (c + 1) / 2 + 2 * c * dk);
  to = dkeys.in_place() ? dkeys.at<float>() : s.dX;
  ld = dkeys.in_place() ? p.dk.token : dkp;
  sweep(c, dkp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> y;
    if (bias.predicts) y.add(Rows{s.dE + i * dvp, dvp}, s.W_plain + j, dkp, 0, task.dv);
    y.subtract(Cols{s.N + i, cp}, s.Q + j, dkp, i, c);
    y.subtract(Rows{s.U_end + i * dvp, dvp}, s.J_plain + j, dkp, 0, task.dv, q_soon);
    if (momentum) y.subtract(Rows{s.U_step + i * dvp, dvp}, s.JS_plain + j, dkp, 0, task.dv);
    y.store_to(to + i * ld + j, ld);
  });
  if (!dkeys.in_place()) dkeys.write(c, s.dX, dkp);

  MIRAS_STAGE("gates", 0, 2 * dk * dvp + c * (c + 1) / 2);
  gate_gradients(chunk, x);
  MIRAS_STAGE("update", 4 * c * dk * dvp, 2 * c * dk + 2 * c * dvp + 2 * dk * dvp);
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
  fill_zero(s.P, square), fill_zero(s.M, square), fill_zero(s.N, square), fill_zero(s.X, square);
  if (momentum) fill_zero(s.Theta, square);
  for (int64_t i = 0; retention.identity && i < p.segment; ++i) s.rho[i] = 1.0f, s.rho_slope[i] = 0.0f;

  const int64_t chunks = (length + p.C - 1) / p.C, every = p.checkpoint_every;
  for (int64_t last = chunks; last > 0;) {
    const int64_t first = (last - 1) / every * every;
    MIRAS_PASS("recompute");
    rerun(first, last);
    MIRAS_PASS("backward");
    for (int64_t chunk = last - 1; chunk >= first; --chunk) {
      if (chunk != last - 1) begin(chunk);  // the last one is as recomputing left it
      chunk_backward(chunk, start(chunk - first));
    }
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
