// Channel-wise decay of the linear memory: alpha, and with it gamma, M and b, differ between value channels, the rows of A.
//
//   O_tv = gamma_tv (W0 q_t)_v + rho (b_tv (S0 q_t)_v - sum_s M_ts,v (q_t.k_s) U_sv)
//
// The weights of all pairs of tokens and channels are never stored: for one token s at a time, vectorised over v, the
// recursion m_t = alpha_tv m_(t-1) + Theta_ts with m_s = 1 runs through the chunk. Again only numbers in [0, 1] are multiplied.
//
//   c tokens (Cp padded)   Dvp value channels of the task, padded, zero in writes and gradients
#pragma once

#include "chunk.h"

namespace miras::cpu::MIRAS_LEVEL {

// Q K'  [c x Cp], its lower triangle in the tiles of decayed_scores
template <class A> static void plain_scores(Range c, int dk, A q, const float* kt, index_t cp, float* QK, WriteSoon soon) {
  sweep_lower(c, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> s;
    s.add(q.at(i), kt + j, cp, 0, dk, soon);
    s.store_to(QK + i * cp + j, cp);
  });
}

struct ChannelDecay {
  bool on;
  int dvp;
  index_t cp;
  float *alpha, *gamma, *to_end, *b, *log_decay;  // [C x Dvp], as in Gates
  float* Theta;                                   // [C x Cp], with momentum

  MIRAS_FN ChannelDecay(Arena& arena, const LinearParams& p)
      : on(p.decay_per_channel), dvp(round_up(p.panel_width, kPad)), cp(round_up(p.C, kPad)) {
    const int rows = on ? p.C : 0, momenta = on && p.momentum ? p.C : 0;
    alpha = arena.take(rows, dvp), gamma = arena.take(rows, dvp), to_end = arena.take(rows, dvp);
    log_decay = arena.take(rows, dvp), b = arena.take(momenta, dvp), Theta = arena.take(momenta, cp);
  }

  void read(const LinearParams& p, const Task& task, int64_t batch, int64_t token, int c, const Gates& gates) {
    dvp = task.dvp;  // the last panel may be narrower
    read_value_gate(p.log_decay, true, task, batch, token, c, log_decay);
    for (index_t i = 0; i < index_t(c) * dvp; i += kLanes) store(alpha + i, exp_nonpositive(load(log_decay + i)));
    for (int j = 0; j < dvp; j += kLanes) {
      Vec product = broadcast(1.0f), fade = broadcast(1.0f), weight = zeros();
      for (int t = 0; t < c; ++t) {
        const Vec a = load(alpha + at(t, j));
        store(gamma + at(t, j), product *= a);
        if (gates.momentum) store(b + at(t, j), weight = a * weight + gates.pi[t]);
      }
      for (int s = c - 1; s >= 0; --s) {  // L_cs, then M_cs = L_cs + theta_(s+1) M_c(s+1)
        const Vec more = gates.momentum && s + 1 < c ? gates.theta[s + 1] * load(to_end + at(s + 1, j)) : zeros();
        store(to_end + at(s, j), fade + more);
        fade *= load(alpha + at(s, j));
      }
    }
    if (gates.momentum) read_steps(c, gates);
  }

  // O -= sum_s M_ts,v (q_t.k_s) U_sv
  void subtract_writes(int c, Range channels, const float* QK, const float* U, bool momentum, float* O) const {
    if (momentum) subtract<true>(c, channels, QK, U, O);
    else subtract<false>(c, channels, QK, U, O);
  }

  struct Backward {
    const float *QK, *U, *dO;  // dO times rho
    const float *KJ, *KJS;     // [c x Dvp]  (J k_s)_v, and with momentum (JS k_s)_v
    float *dU, *N;             // [c x Dvp]; [c x Cp]  sum_v M_ts,v U_sv dO_tv
    float* gM;                 // [c x Cp]  with momentum: sum_v of the gradients of M_ts,v, as they add up over t
    float* dlog;               // [c x Dvp]  the part through M is added
    float *m, *sums;           // [C x kPad] and [2 C x kPad] of scratch
  };

  // The part of the backward that goes through M:
  //
  //   dU_sv = -sum_t M_ts,v (q_t.k_s) dO_tv - M_cs,v (J k_s)_v - Theta_cs (JS k_s)_v
  //   gM_ts,v = -(q_t.k_s) U_sv dO_tv, for t = c also -U_sv (J k_s)_v;  by t backwards as in decay_gradient_with_momentum
  void backward(int c, const Gates& gates, const Backward& x) const {
    if (gates.momentum) backward<true>(c, gates, x);
    else backward<false>(c, gates, x);
  }

  // d log alpha through gamma: reads [c x Dvp] are gamma_tv (W0 q_t)_v dO_tv, `through` [Dvp] is gamma_cv <J_v, A0_v>.
  void read_gradient(int c, const float* reads, float* through, float* dlog) const {
    for (int t = c - 1; t >= 0; --t) {
      for (int j = 0; j < dvp; j += kLanes) {
        const Vec x = load(through + j) + load(reads + at(t, j));
        store(through + j, x);
        store(dlog + at(t, j), load(dlog + at(t, j)) + x);
      }
    }
  }

  // d log alpha through b, from its gradient's last row, which the row gb_end [Dvp] adds to, and from gb [c x Dvp]. `totals` [Cp]
  // receives sums over the channels of gb as it adds up.
  void momenta_gradient(int c, const float* gb, float* gb_end, float* totals, float* dlog) const {
    for (int t = c - 1; t >= 0; --t) {
      Vec total = zeros();
      for (int j = 0; j < dvp; j += kLanes) {
        const Vec g = load(gb + at(t, j)) + load(gb_end + j), earlier = load(alpha + at(t, j)) * g;
        total += g;
        store(gb_end + j, earlier);
        if (t > 0) store(dlog + at(t, j), load(dlog + at(t, j)) + earlier * load(b + at(t - 1, j)));
      }
      totals[t] = sum(total);
    }
  }

 private:
  MIRAS_FN index_t at(int t, int j) const { return index_t(t) * dvp + j; }

  void read_steps(int c, const Gates& gates) {
    fill_zero(Theta, c * cp);
    for (int t = 0; t < c; ++t) {
      for (int j = 0; t > 0 && j < t; j += kLanes) store(Theta + t * cp + j, gates.theta[t] * load(Theta + (t - 1) * cp + j));
      Theta[t * cp + t] = 1.0f;
    }
  }

  // Four tokens s at a time: x = M_ts,v U_sv.
  template <bool kMomentum> void subtract(int c, Range channels, const float* QK, const float* U, float* O) const {
    constexpr int kBlock = 4;
    for (int s = 0; s < c; s += kBlock) {
      for (int j = channels.first; j < channels.last; j += kLanes) {
        Vec u[kBlock], x[kBlock];
        MIRAS_UNROLL
        for (int r = 0; r < kBlock; ++r) u[r] = s + r < c ? load(U + at(s + r, j)) : zeros(), x[r] = zeros();
        const auto token = [&]<bool kDiagonal>(int t) MIRAS_LAMBDA {
          const Vec a = load(alpha + at(t, j));
          Vec o = load(O + at(t, j));
          MIRAS_UNROLL
          for (int r = 0; r < kBlock; ++r) {
            x[r] *= a;
            if constexpr (kMomentum) x[r] += broadcast(Theta[t * cp + s + r]) * u[r];
            else if (kDiagonal && t == s + r) x[r] = u[r];
            o -= broadcast(QK[t * cp + s + r]) * x[r];
          }
          store(O + at(t, j), o);
        };
        int t = s;
        for (; t < minimum(c, s + kBlock); ++t) token.template operator()<true>(t);
        for (; t < c; ++t) token.template operator()<false>(t);
      }
    }
  }

  template <bool kMomentum> void backward(int c, const Gates& gates, const Backward& x) const {
    float *const n_sums = x.sums, *const g_sums = x.sums + index_t(c) * kPad;
    for (int s = 0; s < c; ++s) {
      fill_zero(x.sums, index_t(kMomentum ? 2 : 1) * c * kPad);
      for (int j = 0; j < dvp; j += kLanes) {
        const Vec u = load(x.U + at(s, j)), kj = load(x.KJ + at(s, j));
        Vec m = broadcast(1.0f);
        store(x.m + index_t(s) * kPad, m);
        for (int t = s + 1; t < c; ++t) {
          m *= load(alpha + at(t, j));
          if constexpr (kMomentum) m += broadcast(Theta[t * cp + s]);
          store(x.m + index_t(t) * kPad, m);
        }
        Vec du = m * kj, g = -u * kj;
        if constexpr (kMomentum) du += broadcast(gates.step_end[s]) * load(x.KJS + at(s, j));
        for (int t = c - 1; t >= s; --t) {
          const Vec d = load(x.dO + at(t, j)), qk = broadcast(x.QK[t * cp + s]), md = m * d;
          float* const n_sum = n_sums + index_t(t) * kPad;
          store(n_sum, load(n_sum) + md * u);
          du += qk * md;
          g -= qk * (u * d);
          if constexpr (kMomentum) {
            float* const g_sum = g_sums + index_t(t) * kPad;
            store(g_sum, load(g_sum) + g);
          }
          if (t == s) break;
          g *= load(alpha + at(t, j));
          m = load(x.m + index_t(t - 1) * kPad);
          store(x.dlog + at(t, j), load(x.dlog + at(t, j)) + g * m);
        }
        store(x.dU + at(s, j), -du);
      }
      for (int t = s; t < c; ++t) {
        x.N[t * cp + s] = sum(load(n_sums + index_t(t) * kPad));
        if constexpr (kMomentum) x.gM[t * cp + s] = sum(load(g_sums + index_t(t) * kPad));
      }
    }
  }
};

// dst row t [cols] = factors of t * src row t; the factors are [c], or [c x cols] if they are channel-wise
struct Weights {
  const float* factors;
  bool per_channel;
};
static void weigh(Range c, int cols, const Weights& x, const float* src, float* dst) {
  if (!x.per_channel) return weigh_rows(c, cols, x.factors, src, dst);
  for (index_t i = index_t(c.first) * cols; i < index_t(c.last) * cols; i += kLanes) store(dst + i, load(x.factors + i) * load(src + i));
}

// The gates of a chunk of the linear memory, scalar or channel-wise.
struct LinearGates : Gates {
  ChannelDecay channel;
  bool channel_eta;

  MIRAS_FN LinearGates(Arena& a, const LinearParams& p) : Gates(a, p), channel(a, p), channel_eta(p.lr_per_channel) {
    if (channel_eta) eta = a.take(p.C, round_up(p.panel_width, kPad));
  }

  void read(const LinearParams& p, const Task& task, int64_t batch, int64_t token, int c) {
    Gates::read(p, batch, token, task.h, c);
    if (channel_eta) read_value_gate(p.lr, true, task, batch, token, c, eta);
    if (channel.on) channel.read(p, task, batch, token, c, *this);
  }

  MIRAS_FN bool fades() const { return Gates::fades() || channel.on; }
  MIRAS_FN Weights from_start() const { return channel.on ? Weights{channel.gamma, true} : Weights{gamma, false}; }
  MIRAS_FN Weights until_end() const { return channel.on ? Weights{channel.to_end, true} : Weights{to_end, false}; }
  MIRAS_FN Weights of_momenta() const { return channel.on ? Weights{channel.b, true} : Weights{b, false}; }

  // gamma_c A and b_c S, terms of A_c: the scales are per column if decays are channel-wise
  MIRAS_FN Scaled dual_at_end(const float* A, int c) const {
    return {A, channel.on ? channel.gamma + index_t(c - 1) * channel.dvp : end(c)};
  }
  MIRAS_FN Scaled momenta_at_end(const float* S, int c) const {
    return {S, channel.on ? channel.b + index_t(c - 1) * channel.dvp : momenta_end(c)};
  }

  // A_c from A_0 and the momentum S_0 (see `advance`)
  template <class Keys>
  void advance_dual(int c, int dk, Keys kt, const float* u_end, ColumnRange dvp, const float* A, const float* S, float* next,
                    ReadSoon soon) const {
    const Scaled momenta = momentum ? momenta_at_end(S, c) : Scaled{};
    if (channel.on) advance<true>(c, dk, kt, u_end, dvp, dual_at_end(A, c), next, soon, momenta);
    else advance(c, dk, kt, u_end, dvp, dual_at_end(A, c), next, soon, momenta);
  }
  // S_c
  template <class Keys>
  void advance_momenta(int c, int dk, Keys kt, const float* u_step, ColumnRange dvp, const float* S, float* next) const {
    if (momentum) advance(c, dk, kt, u_step, dvp, {S, step_momenta_end(c)}, next, ReadSoon());
  }
};

}  // namespace miras::cpu::MIRAS_LEVEL
