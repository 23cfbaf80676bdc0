// Backward of the linear memory with exact steps of the L2 bias, keys that are erased and decays of key channels (docs/mathematics.md,
// section 14), blocks from last to first, J = gradient of the state a block ends with; names as in keyed.h:
//
//   Y = -P' dO - K^ J' - G' dE    dE = eta * Y    d eta_t = Y_t . E_t    dV = -dE
//   dQ~ = dO A_0    dK~ = dE A_0    dK^ = -U J    dP = -dO U' for s <= t    dG = -dE U' for s < t
//   J  <- J diag(exp l_c) + dO' Q~ + dE' K~
//
// and then every channel by itself, see channel_gradients.
#pragma once

#include "block_backward.h"
#include "keyed.h"

namespace miras::cpu::MIRAS_LEVEL {

struct KeyedBackwardScratch {
  float *A, *E, *G, *P;                     // [segment] of [Dk x Dvp], [C x Dvp], [C x Cp] twice
  float* J;                                 // [Dk x Dvp]
  float *A_plain, *J_plain;                 // [Dv x Dkp]  not transposed
  float *V, *dO, *dE, *U;                   // [C x Dvp]
  float* UT;                                // [Dv x Cp]
  float *dP, *dG;                           // [C x Cp]
  float *dq_state, *dkappa_state, *dk_end;  // [C x Dkp]  dQ~, dK~, dK^
  float *dq, *dk, *dkappa, *dlog;           // [C x Dkp]  dlog: of log alpha
  float* through;                           // [Dkp]      <J, A_0> by channel
  float *deta, *dlog_sum;                   // [Cp]
  Gates gates;
  KeyedBlock keyed;

  MIRAS_FN KeyedBackwardScratch(Arena& a, const LinearBackward& p) : gates(a, p), keyed(a, p) {
    const int cp = round_up(p.C, kPad), dkp = round_up(p.Dk, kPad), dvp = round_up(p.panel_width, kPad);
    const int64_t tokens = int64_t(p.segment) * p.C;
    A = a.take(int64_t(p.segment) * p.Dk, dvp), E = a.take(tokens, dvp), G = a.take(tokens, cp), P = a.take(tokens, cp);
    J = a.take(p.Dk, dvp);
    A_plain = a.take(p.panel_width, dkp), J_plain = a.take(p.panel_width, dkp);
    V = a.take(p.C, dvp), dO = a.take(p.C, dvp), dE = a.take(p.C, dvp), U = a.take(p.C, dvp);
    UT = a.take(p.panel_width, cp);
    dP = a.take(p.C, cp), dG = a.take(p.C, cp);
    dq_state = a.take(p.C, dkp), dkappa_state = a.take(p.C, dkp), dk_end = a.take(p.C, dkp);
    dq = a.take(p.C, dkp), dk = a.take(p.C, dkp), dkappa = a.take(p.C, p.erase_k ? dkp : 0), dlog = a.take(p.C, dkp);
    through = a.take(1, dkp), deta = a.take(1, cp), dlog_sum = a.take(1, cp);
  }
};

struct KeyedBackwardTask : BlockWalk {
  KeyedBackwardScratch s;

  MIRAS_FN KeyedBackwardTask(const LinearBackward& params, const KeyedBackwardScratch& scratch, int64_t i)
      : BlockWalk(params, i), s(scratch) {}

  MIRAS_FN ChunkView keys(const TokenTensor& x, int64_t block) const { return BlockWalk::keys(x, p.dtype, block); }
  void put_keys(const TokenTensor& x, Dtype dtype, int64_t block, const float* from) const {
    const TokenTensor to = part(x, p.key_part, dtype);
    ChunkView{to, dtype, b, token(block), h, 0, dk}.write(tokens(block), from, dkp);
  }

  void begin(int64_t block);
  void recompute(int64_t first, int64_t last);
  void pairs(int c, const float* dX, float* to);
  void state_gradients(int c, const float* A, ReadSoon soon);
  template <bool kFirst> void channel_gradients(int c, int d);
  void put_gradients(int64_t block);
  void block_backward(int64_t block, int64_t i);
  void run();
};

void KeyedBackwardTask::begin(int64_t block) {
  read_gate(p.lr, b, token(block), h, tokens(block), s.gates.eta);
  s.keyed.read(b, token(block), h, tokens(block));
}

// Blocks [first, last) forward once more: states, errors, G and P.
void KeyedBackwardTask::recompute(int64_t first, int64_t last) {
  const int64_t slot = p.slot(n) + first / p.checkpoint_every;
  copy_in(p.checkpoints + (slot * p.H + h) * dk * p.Dv + task.first, p.Dv, dk, task.dv, s.A, dvp);
  for (int64_t block = first; block < last; ++block) {
    const int c = tokens(block), next = block + 1 < last ? tokens(block + 1) : 0;
    const index_t i = block - first;
    float *const A = s.A + i * state, *const G = s.G + i * p.C * cp;
    begin(block);
    s.keyed.scores(c, G, s.P + i * p.C * cp);
    const ChunkView v = values(p.v, block);
    BlockErrors x{s.keyed.KT, A, s.V, G, cp, dvp, s.gates.eta, nullptr, nullptr, s.U, nullptr, s.E + i * p.C * dvp};
    if (v.in_place()) x.v = v.at<float>(), x.ldv = p.v.token;
    else v.read(c, s.V, dvp);
    solve_errors(c, dk, dvp, x, ReadSoon(keys(p.k, block + 1), next));
    if (block + 1 == last) break;
    advance_channels<-1>(c, dk, s.keyed.k_end, dkp, s.U, dvp, s.keyed.gamma(c - 1), A, A + state, ReadSoon(keys(p.q, block + 1), next));
  }
}

// -dX U'  [c x Cp], right of the diagonal whatever it happens to be
void KeyedBackwardTask::pairs(int c, const float* dX, float* to) {
  sweep_lower(c, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    x.subtract(Rows{dX + index_t(i) * dvp, dvp}, s.UT + j, cp, 0, task.dv);
    x.store_to(to + i * cp + j, cp);
  });
}

// dQ~, dK~, dK^, <J, A_0>, and J of the block's start in place of that of its end
void KeyedBackwardTask::state_gradients(int c, const float* A, ReadSoon soon) {
  transpose(s.J, dvp, dk, task.dv, s.J_plain, dkp);
  transpose(A, dvp, dk, task.dv, s.A_plain, dkp);
  times_state(c, task.dv, Rows{s.dO, dvp}, s.A_plain, dkp, s.dq_state);
  times_state(c, task.dv, Rows{s.dE, dvp}, s.A_plain, dkp, s.dkappa_state);
  times_state(c, task.dv, Rows{s.U, dvp}, s.J_plain, dkp, s.dk_end);
  scale(-1.0f, index_t(c) * dkp, s.dk_end);
  fill_zero(s.through, dkp);
  for (int d = 0; d < dk; ++d) s.through[d] = inner_product(s.J + index_t(d) * dvp, A + index_t(d) * dvp, dvp);
  advance_channels<1>(c, dk, s.keyed.q_state, dkp, s.dO, dvp, s.keyed.gamma(c - 1), s.J, s.J, soon);
  sweep(dk, dvp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> y;
    y.add(Cols{s.keyed.kappa_state + i, dkp}, s.dE + j, dvp, 0, c);
    y.add_matrix(s.J + index_t(i) * dvp + j, dvp);
    y.store_to(s.J + index_t(i) * dvp + j, dvp);
  });
}

// Channels d to d + kLanes of dq, dk, dkappa and d log alpha. The key of token s is x_t = exp(l_t - l_s) k_s when token t reads it, and
// g_t, the gradient of x_t, adds up backwards: g = alpha_(t+1) g_(t+1) + dP_ts q_t + dG kappa of the token whose error sees x_t. Then
// dk_s = g_s, and token t's decay has the gradient g_t x_t of every pair that crosses it, besides
//
//   sum_{r>=t} (Q~_r dQ~_r + errors' reads K~ dK~ from token t on) + sum_{s<t} K^_s dK^_s + exp(l_c) <J, A_0>
//
// All are sums of products as they are: none is a difference of sums, so they are accurate also where decays are strong.
template <bool kFirst> void KeyedBackwardTask::channel_gradients(int c, int d) {
  constexpr int kMost = 16;  // tokens of a block
  const KeyedBlock& x = s.keyed;
  Vec alpha[kMost], q[kMost], kappa[kMost], dq[kMost], dkappa[kMost], crossed[kMost], key[kMost];
  for (int t = 0; t < c; ++t) {
    const index_t at = index_t(t) * dkp + d;
    alpha[t] = load(x.alpha + at), q[t] = load(x.q + at), kappa[t] = load(x.kappa + at), crossed[t] = zeros();
    dq[t] = load(x.gamma(t) + d) * load(s.dq_state + at);
    dkappa[t] = load(x.error_gamma(t) + d) * load(s.dkappa_state + at);
  }
  Vec reads = load(x.gamma(c - 1) + d) * load(s.through + d);
  for (int t = c - 1; t >= 0; --t) {
    const auto error_read = [&](int r) MIRAS_LAMBDA { return kappa[r] * dkappa[r]; };
    reads += q[t] * dq[t];
    if (kFirst) reads += error_read(t);
    else if (t + 1 < c) reads += error_read(t + 1);
    crossed[t] = reads;
  }

  Vec writes = zeros();
  for (int w = 0; w < c; ++w) {
    const index_t at = index_t(w) * dkp + d;
    const float *const dP = s.dP + w, *const dG = s.dG + w;  // a column of each
    Vec now = key[w] = load(x.k + at);
    dq[w] += broadcast(dP[w * cp]) * now;
    for (int t = w + 1; t < c; ++t) {
      if (!kFirst) dkappa[t] += broadcast(dG[t * cp]) * now;
      now *= alpha[t];
      if (kFirst) dkappa[t] += broadcast(dG[t * cp]) * now;
      dq[t] += broadcast(dP[t * cp]) * now;
      key[t] = now;
    }
    Vec g = zeros();
    for (int t = c - 1; t > w; --t) {
      g += broadcast(dP[t * cp]) * q[t];
      if (kFirst) g += broadcast(dG[t * cp]) * kappa[t];
      crossed[t] += g * key[t];
      g *= alpha[t];
      if (!kFirst) g += broadcast(dG[t * cp]) * kappa[t];
    }
    const Vec of_end = load(x.to_end + at) * load(s.dk_end + at);
    store(s.dk + at, g + broadcast(dP[w * cp]) * q[w] + of_end);
    store(s.dlog + at, crossed[w] + writes);
    writes += key[w] * of_end;
  }
  for (int t = 0; t < c; ++t) {
    const index_t at = index_t(t) * dkp + d;
    store(s.dq + at, dq[t]);
    if (p.erase_k) store(s.dkappa + at, dkappa[t]);
    else store(s.dk + at, load(s.dk + at) + dkappa[t]);
  }
}

void KeyedBackwardTask::put_gradients(int64_t block) {
  const int c = tokens(block);
  write_gate(part(p.dlr, p.gate_part), b, token(block), h, c, s.deta);
  put_keys(p.dq, p.grad_dtype, block, s.dq), put_keys(p.dk, p.grad_dtype, block, s.dk);
  if (p.derase_k) put_keys(p.derase_k, p.grad_dtype, block, s.dkappa);
  if (p.dkey_log_decay) put_keys(p.dkey_log_decay, Dtype::f32, block, s.dlog);
  if (p.dlog_decay) {
    for (int t = 0; t < c; ++t) {
      Vec total = zeros();
      for (int d = 0; d < dkp; d += kLanes) total += load(s.dlog + index_t(t) * dkp + d);
      s.dlog_sum[t] = sum(total);
    }
    write_gate(part(p.dlog_decay, p.gate_part), b, token(block), h, c, s.dlog_sum);
  }
  for (index_t i = 0; i < index_t(c) * dvp; i += kLanes) store(s.V + i, -load(s.dE + i));
  values(p.dv, block).write(c, s.V, dvp);
}

void KeyedBackwardTask::block_backward(int64_t block, int64_t i) {
  const int c = tokens(block), next = block > 0 ? p.C : 0;  // tokens of the block to come, the one before
  const float *const A = s.A + i * state, *const E = s.E + i * p.C * dvp;
  const float *const G = s.G + i * p.C * cp, *const P = s.P + i * p.C * cp;
  values(p.grad_out, block).read(c, s.dO, dvp);
  weigh_rows(c, dvp, s.gates.eta, E, s.U);
  transpose(s.U, dvp, c, task.dv, s.UT, cp);
  block_errors_backward(
      c, dk, dvp, {s.keyed.k_end, s.J, P, G, s.dO, E, dkp, cp, s.gates.eta, nullptr, nullptr, nullptr, s.dE, nullptr, s.deta, nullptr},
      WriteSoon(values(p.dv, block), c));
  pairs(c, s.dO, s.dP), pairs(c, s.dE, s.dG);
  state_gradients(c, A, ReadSoon(values(p.grad_out, block - 1), next));
  for (int d = 0; d < dkp; d += kLanes) {
    if (p.decay_first) channel_gradients<true>(c, d);
    else channel_gradients<false>(c, d);
  }
  put_gradients(block);
}

void KeyedBackwardTask::run() {
  fill_zero(s.P, int64_t(p.C) * cp * p.segment);  // nothing is written right of the diagonal
  backwards(*this, s.J, s.J_plain);
}

static void keyed_backward(const LinearBackward& p, int64_t first, int64_t last) {
  with_scratch<KeyedBackwardScratch>(p, [&](const KeyedBackwardScratch& s) MIRAS_LAMBDA {
    for (int64_t i = first; i < last; ++i) KeyedBackwardTask(p, s, i).run();
  });
}

}  // namespace miras::cpu::MIRAS_LEVEL
