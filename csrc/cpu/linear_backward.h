// Backward of the linear memory (SPEC section 2), chunks from last to first, J = gradient of the dual a chunk ends with:
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
// With momentum, M in L's place, M_Cs in that of gamma_C / gamma_s, and JS = gradient of the momentum a chunk ends with:
//
//   dU_s -= Theta_Cs JS k_s       dQ_t += rho b_t S_0' dO_t       dK_s -= Theta_Cs JS' U_s      d rho += sum_t b_t dO_t . (S_0 q_t)
//   JS  <- b_C J + pi_C JS + rho sum_t b_t dO_t q_t'
//   d log alpha and d theta: decay_gradient_with_momentum and momentum_gradient, from
//   gM_ts = -rho (q_t.k_s) (dO_t.U_s), gM_Cs -= U_s.(J k_s), gTheta_Cs = -U_s.(JS k_s), gb_t = rho dO_t.(S_0 q_t), gb_C += <J, S_0>,
//   gpi_C = <JS, S_0>
//
// Channel-wise decays: channel_decay.h has what goes through M.
//
// Every `checkpoint_every`-th chunk start was saved. A segment of chunks is first run forward from its start, keeping its
// states, errors and inner gradients, then backward.
//
//   c tokens of the chunk (Cp padded)   Dk key channels (Dkp)   Dv value channels of the task (Dvp)
//   T after a name: transposed. States are held transposed: A, S, W, J, JS [Dk x Dvp].
#pragma once

#include "channel_decay.h"

namespace miras::cpu::MIRAS_LEVEL {

struct BackwardScratch {
  // Of a segment: [segment][Dk x Dvp], W and S only where they are needed; [segment][C x Dvp] twice; [segment] twice
  float *A, *W, *S, *E, *G;
  float *rho, *rho_slope;
  float *J, *JS;                       // [Dk x Dvp]
  float *dW;                           // [Dk x Dvp]  where W = A does not hold
  float *W_plain, *J_plain;            // [Dv x Dkp]  not transposed
  float *S_plain, *JS_plain;           // [Dv x Dkp]
  float *KT;                           // [Dk x Cp]
  float *K, *Q;                        // [C x Dkp]
  float *V;                            // [C x Dvp]   where v cannot be read in place
  float *dO, *dO_gamma, *dO_b;         // [C x Dvp]   rho dO_t, gamma_t dO_t, rho b_t dO_t
  float *U, *U_end, *U_step;           // [C x Dvp]
  float *UT;                           // [Dv x Cp]
  float *P, *M, *N, *X;                // [C x Cp]    X with momentum: gM
  float *QK, *Theta;                   // [C x Cp]    with momentum
  float *dE;                           // [C x Dvp]   dU at first
  float *KJ, *KJS, *QW, *QS;           // [C x Dvp]   products of K and Q with states; all but KJS where decays are channel-wise
  float *dQ_b;                         // [C x Dkp]   rho b_t S_0' dO_t
  float *dX;                           // [C x Dkp]   dQ, dK where they cannot be written in place
  float *delta, *ddelta;               // [C] or [C x Dvp]
  float *deta, *dlog;                  // [Cp] or [C x Dvp]
  float *read_sums, *write_sums;       // [Cp]  gamma_t (W0 q_t).dO_t and (gamma_C/gamma_s) U_s.(J k_s), with momentum -gM_Cs's share of it
  float *gTheta, *gb, *dtheta;         // [Cp]
  float *last_rows;                    // [2 x Cp]
  float *columns;                      // [Dvp]
  float *m, *sums;                     // of ChannelDecay::Backward
  LinearGates gates;

  MIRAS_FN BackwardScratch(Arena& a, const LinearBackward& p) : gates(a, p) {
    const int cp = round_up(p.C, kPad), dkp = round_up(p.Dk, kPad), dvp = round_up(p.panel_width, kPad);
    const bool momentum(p.momentum), channels = p.decay_per_channel;
    const int primal = retention_traits(p.retention).identity ? 0 : dvp, carried = momentum ? dvp : 0, wide = channels ? dvp : 0;
    const int64_t states = int64_t(p.segment) * p.Dk, tokens = int64_t(p.segment) * p.C;
    A = a.take(states, dvp), W = a.take(states, primal), S = a.take(states, carried);
    E = a.take(tokens, dvp), G = a.take(tokens, dvp);
    rho = a.take(1, p.segment), rho_slope = a.take(1, p.segment);
    J = a.take(p.Dk, dvp), JS = a.take(p.Dk, carried), dW = a.take(p.Dk, primal);
    W_plain = a.take(p.panel_width, dkp), J_plain = a.take(p.panel_width, dkp);
    S_plain = a.take(carried, dkp), JS_plain = a.take(carried, dkp);
    KT = a.take(p.Dk, cp);
    K = a.take(p.C, dkp), Q = a.take(p.C, dkp);
    V = a.take(p.C, dvp);
    dO = a.take(p.C, dvp), dO_gamma = a.take(p.C, dvp), dO_b = a.take(p.C, carried);
    U = a.take(p.C, dvp), U_end = a.take(p.C, dvp), U_step = a.take(p.C, carried);
    UT = a.take(p.panel_width, cp);
    P = a.take(p.C, cp), M = a.take(p.C, cp), N = a.take(p.C, cp), X = a.take(p.C, cp);
    QK = a.take(momentum ? p.C : 0, cp), Theta = a.take(momentum ? p.C : 0, cp);
    dE = a.take(p.C, dvp);
    KJ = a.take(p.C, wide), KJS = a.take(p.C, carried), QW = a.take(p.C, wide), QS = a.take(p.C, momentum ? wide : 0);
    dQ_b = a.take(momentum ? p.C : 0, dkp), dX = a.take(p.C, dkp);
    delta = a.take(p.C, dvp), ddelta = a.take(p.C, dvp);
    deta = p.lr_per_channel ? a.take(p.C, dvp) : a.take(1, cp), dlog = channels ? a.take(p.C, dvp) : a.take(1, cp);
    read_sums = a.take(1, cp), write_sums = a.take(1, cp);
    gTheta = a.take(1, cp), gb = a.take(1, cp), dtheta = a.take(1, cp);
    last_rows = a.take(2, cp), columns = a.take(1, dvp);
    m = a.take(channels ? p.C : 0, kPad), sums = a.take(channels ? 2 * p.C : 0, kPad);
  }
};

// What a chunk began with and computed there.
struct ChunkStart {
  float *A, *W, *S;  // W = A's memory where they are equal
  float *E, *G;
  Rho rho;
};

// One head of one sequence, or a panel of its value rows.
struct BackwardTask {
  const LinearBackward& p;
  const BiasTable& bias;
  const Retention& retention;
  BackwardScratch s;
  Task task;
  int64_t n, h, b, length;
  int dk, dkp, dvp, cp;
  index_t state;  // floats of [Dk x Dvp]
  bool momentum, channels;

  MIRAS_FN BackwardTask(const LinearBackward& params, const BiasTable& table, const Retention& gate, const BackwardScratch& scratch,
                        int64_t i)
      : p(params), bias(table), retention(gate), s(scratch), task(params, i), momentum(s.gates.momentum), channels(s.gates.channel.on) {
    n = task.n, h = task.h, b = p.batch(n), length = p.length(n);
    dk = p.Dk, dkp = round_up(dk, kPad), dvp = task.dvp, cp = round_up(p.C, kPad);
    state = index_t(dk) * dvp;
  }

  MIRAS_FN int tokens(int64_t chunk) const {
    const int64_t left = length - chunk * p.C;
    return int(left < p.C ? left : p.C);
  }
  MIRAS_FN int64_t token(int64_t chunk) const { return p.begin(n) + chunk * p.C; }
  MIRAS_FN StateShape shape() const { return {dk, task.dv, dvp, LastAxis::down}; }

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
  // The gradient of a gate, [c] or the task's channels [c x Dvp]
  void put(const TokenTensor& x, bool per_channel, int64_t chunk, const float* src) const {
    const int c = tokens(chunk);
    if (!per_channel) write_gate(part(x, p.gate_part), b, token(chunk), h, c, src);
    else copy_out(src, dvp, c, task.dv, address<float>(x, b, token(chunk), h) + task.first, x.token);
  }

  MIRAS_FN ChunkStart start(int64_t i) const {
    float* const A = s.A + i * state;
    return {A, retention.identity ? A : s.W + i * state, s.S + i * state, s.E + i * p.C * dvp, s.G + i * p.C * dvp,
            {s.rho[i], s.rho_slope[i]}};
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
    s.gates.read(p, task, b, token(chunk), tokens(chunk));
    keys(p.k, p.dtype, chunk).transpose_in(tokens(chunk), s.KT, cp);
  }

  void writes(int c, const float* g);
  void rerun(int64_t first, int64_t last);
  void scores_backward(int c, WriteSoon p_soon, WriteSoon n_soon);
  void writes_backward(int c, WriteSoon soon);
  void channels_backward(int c, const ChunkStart& x);
  void carried_reads(int c, const ChunkStart& x);
  void gate_gradients(int64_t chunk, const ChunkStart& x);
  float rho_gradient(int c, const ChunkStart& x) const;
  template <bool kChannels> void carried_gradient(int c);
  template <bool kIdentity, bool kChannels> void primal_gradient(int c, ReadSoon soon);
  void state_gradients(int c, const ChunkStart& x, float drho, ReadSoon soon);
  void chunk_backward(int64_t chunk, const ChunkStart& x);
  void run();
};

// U = eta g,  U_end = to_end * U,  U_step = Theta_C * U
void BackwardTask::writes(int c, const float* g) {
  const LinearGates& gates = s.gates;
  if (gates.channel_eta || channels) {
    weigh(c, dvp, {gates.eta, gates.channel_eta}, g, s.U);
    weigh(c, dvp, gates.until_end(), s.U, s.U_end);
  } else {
    for (int t = 0; t < c; ++t) {
      const Vec eta = broadcast(gates.eta[t]), end = broadcast(gates.to_end[t]);
      for (int j = 0; j < dvp; j += kLanes) {
        const Vec u = eta * load(g + t * dvp + j);
        store(s.U + t * dvp + j, u);
        store(s.U_end + t * dvp + j, end * u);
      }
    }
  }
  if (momentum) weigh_rows(c, dvp, gates.step_end, s.U, s.U_step);
}

// Chunks [first, last) forward once more: states, errors, inner gradients.
void BackwardTask::rerun(int64_t first, int64_t last) {
  const int64_t slot = p.slot(n) + first / p.checkpoint_every, matrix = int64_t(dk) * p.Dv;
  const float* from = p.saved + (slot * p.H + h) * (momentum ? 2 : 1) * matrix + task.first;
  copy_in(from, p.Dv, dk, task.dv, s.A, dvp);
  if (momentum) copy_in(from + matrix, p.Dv, dk, task.dv, s.S, dvp);
  for (int64_t chunk = first; chunk < last; ++chunk) {
    const int64_t i = chunk - first;
    const int c = tokens(chunk);
    const ChunkStart x = start(i);
    if (!retention.identity) {
      const Rho rho = retention.primal(shape(), x.A, x.W);
      s.rho[i] = rho.value, s.rho_slope[i] = rho.slope;
    }
    begin(chunk);
    if (bias.predicts) predict(c, dk, s.KT, cp, x.W, dvp, x.E, ReadSoon(values(p.v, chunk), c));
    if (!values(p.v, chunk).in_place()) values(p.v, chunk).read(c, s.V, dvp);
    bias.grade(bias_rows(chunk), x.E, x.G);
    if (chunk + 1 == last) break;
    writes(c, x.G);
    const ReadSoon k_soon(keys(p.k, p.dtype, chunk + 1), tokens(chunk + 1));
    s.gates.advance_dual(c, dk, s.KT, cp, s.U_end, dvp, x.A, x.S, x.A + state, k_soon);
    s.gates.advance_carried(c, dk, s.KT, cp, s.U_step, dvp, x.S, x.S + state);
  }
}

// P, N = M o (dO U') and X = -P o (dO U'), with momentum gM = -(Q K') o (dO U')  [c x Cp]; dO has the factor rho
void BackwardTask::scores_backward(int c, WriteSoon p_soon, WriteSoon n_soon) {
  const Rows Q{s.Q, dkp};
  if (momentum) momentum_scores<true>(s.gates, c, dk, Q, s.KT, cp, s.last_rows, s.P, s.M, s.Theta, s.QK, p_soon);
  else decayed_scores<true>(s.gates, c, dk, Q, s.KT, cp, s.last_rows, s.P, s.M, p_soon);
  transpose(s.U, dvp, c, task.dv, s.UT, cp);
  const bool keep_x = momentum || s.gates.decays || retention.scales_reads;
  const float* factors = momentum ? s.QK : s.P;
  sweep_lower(c, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    x.add(Rows{s.dO + i * dvp, dvp}, s.UT + j, cp, 0, task.dv, n_soon);
    x.each([&](int r, int m, Vec& y) MIRAS_LAMBDA {
      const index_t at = index_t(i + r) * cp + j + m * kLanes;
      if (keep_x) store(s.X + at, -load(factors + at) * y);
      y *= load(s.M + at);
    });
    x.store_to(s.N + i * cp + j, cp);
  });
}

// dU = -P' dO - to_end * (K J') - Theta_C * (K JS')
void BackwardTask::writes_backward(int c, WriteSoon soon) {
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

// dU, N, and d log alpha but for what goes through b
void BackwardTask::channels_backward(int c, const ChunkStart& x) {
  const ChannelDecay& channel = s.gates.channel;
  const Rows Q{s.Q, dkp};
  plain_scores(c, dk, Q, s.KT, cp, s.P, WriteSoon());
  times_state(c, dk, Rows{s.K, dkp}, s.J, dvp, s.KJ);
  times_state(c, dk, Q, x.W, dvp, s.QW);
  fill_zero(s.dlog, int64_t(c) * dvp);
  channel.backward(c, s.gates, {s.P, s.U, s.dO, s.KJ, s.KJS, s.dE, s.N, s.X, s.dlog, s.m, s.sums});
  for (index_t i = 0; i < index_t(c) * dvp; i += kLanes) store(s.QW + i, load(s.QW + i) * load(s.dO_gamma + i));
  const float* gamma = channel.gamma + index_t(c - 1) * dvp;
  column_products(dk, dvp, s.J, x.A, s.columns);
  for (int j = 0; j < dvp; j += kLanes) store(s.columns + j, load(gamma + j) * load(s.columns + j));
  channel.read_gradient(c, s.QW, s.columns, s.dlog);
}

// rho b_t S_0' dO_t and gb, the gradient of b through the chunk's reads
void BackwardTask::carried_reads(int c, const ChunkStart& x) {
  weigh(c, dvp, s.gates.of_carried(), s.dO, s.dO_b);
  transpose(x.S, dvp, dk, task.dv, s.S_plain, dkp);
  if (channels) {
    times_state(c, task.dv, Rows{s.dO_b, dvp}, s.S_plain, dkp, s.dQ_b);
    times_state(c, dk, Rows{s.Q, dkp}, x.S, dvp, s.QS);
    for (index_t i = 0; i < index_t(c) * dvp; i += kLanes) store(s.QS + i, load(s.QS + i) * load(s.dO + i));
  } else {
    times_state(c, task.dv, Rows{s.dO, dvp}, s.S_plain, dkp, s.dQ_b);
    for (int t = 0; t < c; ++t) s.gb[t] = inner_product(s.Q + index_t(t) * dkp, s.dQ_b + index_t(t) * dkp, dkp);
    weigh_rows(c, dkp, s.gates.b, s.dQ_b, s.dQ_b);
  }
}

// d rho = sum_t dO_t . (b_t S_0 q_t - sum_s P_ts U_s); dO, and all that came of it, has the factor rho
float BackwardTask::rho_gradient(int c, const ChunkStart& x) const {
  double total = 0.0;
  for (int t = 0; t < c; ++t) {
    Vec row = zeros();
    for (int j = 0; j <= t; j += kLanes) {
      const index_t at = t * cp + j;
      const Vec pairs = momentum || channels ? -load((channels ? s.P : s.QK) + at) * load(s.N + at) : load(s.X + at);
      row += first_lanes(pairs, t + 1 - j);
    }
    total += sum(row);
    if (momentum) total += channels ? inner_product(s.QS + index_t(t) * dvp, s.gates.channel.b + index_t(t) * dvp, dvp)
                                    : s.gates.b[t] * s.gb[t];
  }
  return float(total / x.rho.value);
}

// d log alpha and d theta, while J and JS are still those of the chunk's end
void BackwardTask::gate_gradients(int64_t chunk, const ChunkStart& x) {
  const int c = tokens(chunk);
  const LinearGates& gates = s.gates;
  if (momentum) {
    if (channels) {
      column_products(dk, dvp, s.J, x.S, s.columns);
      gates.channel.carried_gradient(c, s.QS, s.columns, s.gb, s.dlog);
    } else {
      const float through = *gates.end(c) * inner_product(s.J, x.A, state);
      for (int t = 0; t < round_up(c, kPad); ++t) s.write_sums[t] = -s.write_sums[t];
      s.gb[c - 1] += inner_product(s.J, x.S, state);
      decay_gradient_with_momentum(gates, c, s.M, cp, s.write_sums, s.X, s.gb, s.read_sums, through, s.dlog);
    }
    const float* Theta = channels ? gates.channel.Theta : s.Theta;
    momentum_gradient(gates, c, Theta, cp, s.X, s.gb, s.gTheta, inner_product(s.JS, x.S, state), s.dtheta);
    put(p.dmomentum, false, chunk, s.dtheta);
  } else if (gates.decays) {
    const float through = *gates.end(c) * inner_product(s.J, x.A, state);
    decay_gradient(c, s.X, cp, s.read_sums, s.write_sums, through, s.dlog);
  }
  if (p.dlog_decay) put(p.dlog_decay, channels, chunk, s.dlog);
}

// JS = b_C J + pi_C JS + Q' (rho b dO), from J and JS of the chunk's end (transposed)
template <bool kChannels> void BackwardTask::carried_gradient(int c) {
  const LinearGates& gates = s.gates;
  const Kept kept = gates.kept_carried(s.J, c);
  sweep(dk, dvp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> y;
    y.add(Cols{s.Q + i, dkp}, s.dO_b + j, dvp, 0, c);
    y.add_scaled(s.JS + i * dvp + j, dvp, gates.step_carried_end(c));
    if constexpr (kChannels) y.add_scaled_cols(s.J + i * dvp + j, dvp, kept.scale + j);
    else y.add_scaled(s.J + i * dvp + j, dvp, kept.scale);
    y.store_to(s.JS + i * dvp + j, dvp);
  });
}

// dW0 = Q' (gamma dO) + K' dE, or where W = A at once J = gamma_C J + dW0
template <bool kIdentity, bool kChannels> void BackwardTask::primal_gradient(int c, ReadSoon soon) {
  const Kept kept = s.gates.kept(s.J, c);
  sweep(dk, dvp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> y;
    y.add(Cols{s.Q + i, dkp}, s.dO_gamma + j, dvp, 0, c, soon);
    if (bias.predicts) y.add(Cols{s.K + i, dkp}, s.dE + j, dvp, 0, c);
    if constexpr (kIdentity && kChannels) y.add_scaled_cols(s.J + i * dvp + j, dvp, kept.scale + j);
    else if constexpr (kIdentity) y.add_scaled(s.J + i * dvp + j, dvp, kept.scale);
    y.store_to((kIdentity ? s.J : s.dW) + i * dvp + j, dvp);
  });
}

// JS and J of the chunk's start over those of its end
void BackwardTask::state_gradients(int c, const ChunkStart& x, float drho, ReadSoon soon) {
  if (momentum && channels) carried_gradient<true>(c);
  else if (momentum) carried_gradient<false>(c);
  if (retention.identity) return channels ? primal_gradient<true, true>(c, soon) : primal_gradient<true, false>(c, soon);

  primal_gradient<false, false>(c, soon);
  retention.pull_back(shape(), x.A, x.W, x.rho, drho, s.dW);
  const float* scale = s.gates.kept(s.J, c).scale;
  shape().each([&](index_t at, int j) MIRAS_LAMBDA {
    const Vec gamma = channels ? load(scale + j) : broadcast(*scale);
    store(s.J + at, gamma * load(s.J + at) + load(s.dW + at));
  });
}

void BackwardTask::chunk_backward(int64_t chunk, const ChunkStart& x) {
  const int c = tokens(chunk);
  const LinearGates& gates = s.gates;
  const TokenTensor dq_part = part(p.dq, p.key_part, p.grad_dtype), dk_part = part(p.dk, p.key_part, p.grad_dtype);
  const ChunkView dq = keys(dq_part, p.grad_dtype, chunk), dkeys = keys(dk_part, p.grad_dtype, chunk);
  // Brought nearer meanwhile: where the results go, then what the next chunk (the one before) reads.
  const int next = chunk > 0 ? p.C : 0;
  ReadSoon q_soon(keys(p.q, p.dtype, chunk - 1), next), dO_soon(values(p.grad_out, chunk - 1), next);

  keys(p.k, p.dtype, chunk).read(c, s.K, dkp);
  keys(p.q, p.dtype, chunk).read(c, s.Q, dkp);
  values(p.grad_out, chunk).read(c, s.dO, dvp);
  weigh(c, dvp, gates.from_start(), s.dO, s.dO_gamma);
  if (retention.scales_reads) scale(x.rho.value, index_t(c) * dvp, s.dO);
  writes(c, x.G);
  fill_zero(s.read_sums, cp), fill_zero(s.write_sums, cp), fill_zero(s.gTheta, cp);

  if (momentum) {
    carried_reads(c, x);
    times_state(c, dk, Rows{s.K, dkp}, s.JS, dvp, s.KJS);
    for (int t = 0; t < c; ++t) s.gTheta[t] = -inner_product(s.U + index_t(t) * dvp, s.KJS + index_t(t) * dvp, dvp);
  }
  if (channels) {
    channels_backward(c, x);
  } else {
    scores_backward(c, WriteSoon(values(p.dv, chunk), c), WriteSoon(dq, c));
    writes_backward(c, WriteSoon(dkeys, c));
  }

  transpose(s.J, dvp, dk, task.dv, s.J_plain, dkp);  // while J is near
  if (momentum) transpose(s.JS, dvp, dk, task.dv, s.JS_plain, dkp);

  // d eta, dE, dV, d delta
  bias.pull_back(bias_rows(chunk), x.E, x.G, s.dE, s.deta, s.ddelta);
  put(p.dlr, gates.channel_eta, chunk, s.deta);
  if (p.ddelta) put(p.ddelta, p.delta_per_channel, chunk, s.ddelta);
  const float drho = retention.scales_reads ? rho_gradient(c, x) : 0.0f;
  float* dV = s.U;  // free until the next chunk
  for (index_t i = 0; i < index_t(c) * dvp; i += kLanes) store(dV + i, -load(s.dE + i));
  values(p.dv, chunk).write(c, dV, dvp);

  // dQ = (gamma dO) W0 + (rho b dO) S_0 - N K
  transpose(x.W, dvp, dk, task.dv, s.W_plain, dkp);
  float* to = dq.in_place() ? dq.at<float>() : s.dX;
  index_t ld = dq.in_place() ? p.dq.token : dkp;
  sweep(c, dkp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> y;
    y.add(Rows{s.dO_gamma + i * dvp, dvp}, s.W_plain + j, dkp, 0, task.dv);
    if (gates.decays) y.dot_rows(s.Q + i * dkp + j, dkp, s.read_sums + i);
    if (momentum) y.add_matrix(s.dQ_b + i * dkp + j, dkp);
    y.subtract(Rows{s.N + i * cp, cp}, s.K + j, dkp, 0, i + R);
    y.store_to(to + i * ld + j, ld);
  });
  if (!dq.in_place()) dq.write(c, s.dX, dkp);

  // dK = dE W0 - N' Q - U_end J - U_step JS
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

  gate_gradients(chunk, x);
  state_gradients(c, x, drho, dO_soon);
}

void BackwardTask::run() {
  const auto read_gradient = [&](const StateTensor& from, float* to) {
    if (from) read_state(from, n, h, task.first, task.dv, dk, to, dvp);
    else fill_zero(to, state);
  };
  read_gradient(p.grad_final_dual, s.J);
  if (momentum) read_gradient(p.grad_final_carried, s.JS);
  const int64_t square = int64_t(p.C) * cp;  // zero right of the diagonal, and staying so
  fill_zero(s.P, square), fill_zero(s.M, square), fill_zero(s.N, square), fill_zero(s.X, square);
  if (momentum) fill_zero(s.Theta, square);
  for (int64_t i = 0; retention.identity && i < p.segment; ++i) s.rho[i] = 1.0f, s.rho_slope[i] = 0.0f;

  const int64_t chunks = (length + p.C - 1) / p.C, every = p.checkpoint_every;
  for (int64_t last = chunks; last > 0;) {
    const int64_t first = (last - 1) / every * every;
    rerun(first, last);
    for (int64_t chunk = last - 1; chunk >= first; --chunk) {
      if (chunk != last - 1) begin(chunk);  // the last one is as the rerun left it
      chunk_backward(chunk, start(chunk - first));
    }
    last = first;
  }
  write_state(p.d_dual, n, h, task.first, task.dv, dk, s.J, dvp, s.J_plain);
  if (momentum) write_state(p.d_carried, n, h, task.first, task.dv, dk, s.JS, dvp, s.J_plain);
}

static void linear_backward(const LinearBackward& p, int64_t first, int64_t last) {
  FlushDenormals flush;
  Arena measure(nullptr);
  BackwardScratch(measure, p);
  Arena arena(thread_scratch(size_t(measure.used())));
  const BackwardScratch s(arena, p);
  const BiasTable bias = bias_table(p.bias, p.bias_params, p.lr_per_channel);
  const Retention retention(p.retention, p.retention_params);
  for (int64_t i = first; i < last; ++i) BackwardTask(p, bias, retention, s, i).run();
}

}  // namespace miras::cpu::MIRAS_LEVEL
