// Exact steps of the L2 bias in blocks, with keys that are erased beside those that are written, and decays of key channels
// (docs/mathematics.md, section 14): what forward and backward share.
//
// Chunks have one token. With l_t = log alpha_1 + ... + log alpha_t by channels from the block's start, rho_t = l_(t-1), or l_t with
// decay first, and kappa the key that is erased (k without erase_k),
//
//   Q~_t = exp(l_t) q_t    K~_t = exp(rho_t) kappa_t    K^_s = exp(l_c - l_s) k_s
//   G_ts = sum_d kappa_td k_sd exp(rho_td - l_sd) for s < t    P_ts = sum_d q_td k_sd exp(l_td - l_sd) for s <= t
//   E = K~ A_0' - V - G U    U = eta * E    O = Q~ A_0' - P U    A_c = A_0 diag(exp l_c) - U' K^
//
// G and P are no matrix products: exp(-l_s) apart would overflow. A decay of all channels, or none, is spread over the channels.
#pragma once

#include "block.h"

namespace miras::cpu::MIRAS_LEVEL {

// What a block reads of keys, queries and decays, all [C x Dkp]
class KeyedBlock {
 public:
  MIRAS_FN KeyedBlock(Arena& a, const LinearParams& p) : p_(p), dkp_(round_up(p.Dk, kPad)), cp_(round_up(p.C, kPad)) {
    q = a.take(p.C, dkp_), k = a.take(p.C, dkp_), erased_ = a.take(p.C, p.erase_k ? dkp_ : 0), kappa = p.erase_k ? erased_ : k;
    alpha = a.take(p.C, dkp_), from_start_ = a.take(1 + p.C, dkp_), to_end = a.take(p.C, dkp_);
    q_state = a.take(p.C, dkp_), kappa_state = a.take(p.C, dkp_), k_end = a.take(p.C, dkp_);
    KT = a.take(p.Dk, cp_);
    log_decay_ = a.take(1, cp_), decaying_ = a.take(kGroup, dkp_);
  }

  float *q, *k, *kappa;
  float *alpha, *to_end;                 // to_end_s = exp(l_c - l_s)
  float *q_state, *kappa_state, *k_end;  // Q~, K~, K^
  float* KT;                             // [Dk x Cp]  K~ transposed

  // exp(l_t), from t = -1 on
  MIRAS_FN float* gamma(int t) const { return from_start_ + (1 + t) * dkp_; }
  // exp(rho_t)
  MIRAS_FN const float* error_gamma(int t) const { return gamma(p_.decay_first ? t : t - 1); }

  void read(int64_t b, int64_t token, int64_t h, int c);
  void scores(int c, float* G, float* P);

 private:
  static constexpr int kGroup = 4;  // keys that share the reads of a token

  void read_decays(int64_t b, int64_t token, int64_t h, int c);
  template <bool kFirst> void scores_of(int s, int t, float* G, float* P);

  const LinearParams& p_;
  index_t dkp_, cp_;
  float* erased_;
  float* from_start_;
  float* log_decay_;
  float* decaying_;  // [kGroup x Dkp]
};

void KeyedBlock::read_decays(int64_t b, int64_t token, int64_t h, int c) {
  if (p_.key_log_decay) {
    ChunkView{p_.key_log_decay, Dtype::f32, b, token, h, 0, p_.Dk}.read(c, alpha, dkp_);
  } else {
    if (p_.log_decay) read_gate(p_.log_decay, b, token, h, c, log_decay_);
    for (int t = 0; t < c; ++t)
      for (index_t d = 0; d < dkp_; d += kLanes) store(alpha + t * dkp_ + d, broadcast(p_.log_decay ? log_decay_[t] : 0.0f));
  }
  for (index_t i = 0; i < c * dkp_; i += kLanes) store(alpha + i, exp_nonpositive(load(alpha + i)));
}

// Only products of decays in (0, 1]: nothing overflows, and underflow gives zero.
void KeyedBlock::read(int64_t b, int64_t token, int64_t h, int c) {
  const auto keys = [&](const TokenTensor& x) MIRAS_LAMBDA { return ChunkView{x, p_.dtype, b, token, h, 0, p_.Dk}; };
  keys(p_.q).read(c, q, dkp_), keys(p_.k).read(c, k, dkp_);
  if (p_.erase_k) keys(p_.erase_k).read(c, kappa, dkp_);
  read_decays(b, token, h, c);
  for (index_t d = 0; d < dkp_; d += kLanes) {
    const Vec one = broadcast(1.0f);
    Vec start = one, end = one;
    store(gamma(-1) + d, start);
    for (int t = 0; t < c; ++t) {
      const index_t at = t * dkp_ + d;
      store(gamma(t) + d, start *= load(alpha + at));
      store(q_state + at, start * load(q + at));
      store(kappa_state + at, load(error_gamma(t) + d) * load(kappa + at));
    }
    for (int s = c - 1; s >= 0; --s) {
      const index_t at = s * dkp_ + d;
      store(to_end + at, end), store(k_end + at, end * load(k + at));
      end *= load(alpha + at);
    }
  }
  transpose(kappa_state, dkp_, c, p_.Dk, KT, cp_);
}

// Of token t and keys s ... s + kGroup - 1, which `decaying_` holds as the token before left them, zeros where they come later
template <bool kFirst> void KeyedBlock::scores_of(int s, int t, float* G, float* P) {
  Vec g[kGroup] = {}, read[kGroup] = {};
  for (index_t d = 0; d < dkp_; d += kLanes) {
    const Vec a = load(alpha + t * dkp_ + d), of_q = load(q + t * dkp_ + d), of_kappa = load(kappa + t * dkp_ + d);
    MIRAS_UNROLL
    for (int i = 0; i < kGroup; ++i) {
      float* const key = decaying_ + i * dkp_ + d;
      const Vec before = load(key), after = a * before;
      store(key, after);
      g[i] += of_kappa * (kFirst ? after : before);
      read[i] += of_q * after;
    }
  }
  MIRAS_UNROLL
  for (int i = 0; i < kGroup; ++i) G[t * cp_ + s + i] = sum(g[i]), P[t * cp_ + s + i] = sum(read[i]);
}

// G and P [c x Cp]: keys decay from token to token. Writes zeros, or nothing, right of the diagonals.
void KeyedBlock::scores(int c, float* G, float* P) {
  for (int s = 0; s < c; s += kGroup) {
    fill_zero(decaying_, kGroup * dkp_);
    for (int t = s; t < c; ++t) {
      if (p_.decay_first) scores_of<true>(s, t, G, P);
      else scores_of<false>(s, t, G, P);
      if (t >= s + kGroup) continue;
      __builtin_memcpy(decaying_ + (t - s) * dkp_, k + t * dkp_, size_t(dkp_) * sizeof(float));
      P[t * cp_ + t] = inner_product(q + t * dkp_, k + t * dkp_, dkp_);
    }
  }
}

// scale * state + sum_s left_s right_s'  [Dk x Dvp], row by row with scale [Dk]; kSign -1 subtracts the sum. `next` may be the state.
template <int kSign>
static void advance_channels(int c, int dk, const float* left, index_t ld, const float* right, int dvp, const float* scale,
                             const float* state, float* next, ReadSoon soon) {
  sweep(dk, dvp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> a;
    a.template product<kSign>(Cols{left + i, ld}, right + j, dvp, 0, c, soon);
    a.each([&](int r, int n, Vec& y) MIRAS_LAMBDA { y += broadcast(scale[i + r]) * load(state + index_t(i + r) * dvp + j + n * kLanes); });
    a.store_to(next + index_t(i) * dvp + j, dvp);
  });
}

}  // namespace miras::cpu::MIRAS_LEVEL
