// Stages that the forward and the backward of a chunk share.
//
//   c tokens (Cp padded)   Dk key channels (Dkp)   Dvp value channels of the task, padded
#pragma once

#include "bias_table.h"
#include "operand.h"
#include "parts.h"
#include "profile.h"
#include "retention_states.h"
#include "tile.h"

namespace miras::cpu::MIRAS_LEVEL {

// The part of the work that one task does.
struct Task {
  int64_t n, h;  // sequence, head
  int panel;
  int first, dv, dvp;  // its value rows [first, first + dv), padded to dvp

  MIRAS_FN Task(const LinearParams& p, int64_t index) {
    panel = int(index % p.panels);
    h = index / p.panels % p.H;
    n = index / p.panels / p.H;
    first = panel * p.panel_width;
    dv = minimum(p.panel_width, p.Dv - first);
    dvp = round_up(dv, kPad);
  }
};

// The scalar gates of a chunk, [Cp] each. L_ts = gamma_t / gamma_s, Theta_ts = theta_(s+1) ... theta_t and M = L Theta, without
// momentum M = L, weigh the write of token s in the state, the momentum and the state of token t.
struct Gates {
  float *eta, *alpha, *gamma, *to_end;  // gamma_t = alpha_1 ... alpha_t;  to_end_t = M_ct
  float* log_decay;
  float *theta, *pi, *b, *step_end;  // pi_t = theta_1 ... theta_t;  b_t, the weight of S_0 in the state of t;  step_end_t = Theta_ct
  bool decays, momentum;

  MIRAS_FN Gates(Arena& arena, const MemoryParams& p) : decays(p.log_decay && !p.decay_per_channel), momentum(bool(p.momentum)) {
    const int cp = round_up(p.C, kPad), mp = momentum ? cp : 0;
    eta = arena.take(p.lr_per_channel ? 0 : 1, cp);
    alpha = arena.take(1, cp), gamma = arena.take(1, cp), to_end = arena.take(1, cp);
    log_decay = arena.take(1, cp);
    theta = arena.take(1, mp), pi = arena.take(1, mp), b = arena.take(1, mp), step_end = arena.take(1, mp);
  }

  MIRAS_FN const float* end(int c) const { return gamma + c - 1; }
  MIRAS_FN const float* momenta_end(int c) const { return b + c - 1; }
  MIRAS_FN const float* step_momenta_end(int c) const { return pi + c - 1; }
  // Whether writes fade until the chunk ends: to_end is not all ones.
  MIRAS_FN bool fades() const { return decays || momentum; }

  // Only decays in (0, 1] and momentum coefficients in [0, 1) are multiplied: nothing overflows, and underflow gives zero.
  void read(const MemoryParams& p, int64_t batch, int64_t token, int64_t h, int c) {
    if (!p.lr_per_channel) read_gate(p.lr, batch, token, h, c, eta);
    if (decays) {
      read_gate(p.log_decay, batch, token, h, c, log_decay);
      for (int t = 0; t < c; t += kLanes) store(alpha + t, exp_nonpositive(load(log_decay + t)));
      float product = 1.0f, reverse = 1.0f;
      for (int t = 0; t < c; ++t) {
        gamma[t] = product *= alpha[t];
        to_end[c - 1 - t] = reverse;
        reverse *= alpha[c - 1 - t];
      }
      for (int t = c; t < round_up(c, kPad); ++t) gamma[t] = to_end[t] = 0.0f;
    } else {
      for (int t = 0; t < round_up(c, kPad); ++t) alpha[t] = gamma[t] = to_end[t] = 1.0f;
    }
    if (momentum) read_momentum(p, batch, token, h, c);
  }

 private:
  // pi_t = theta_t pi_(t-1),  b_t = alpha_t b_(t-1) + pi_t;  Theta_cs = theta_(s+1) Theta_c(s+1),  M_cs = L_cs + theta_(s+1) M_c(s+1)
  void read_momentum(const MemoryParams& p, int64_t batch, int64_t token, int64_t h, int c) {
    read_gate(p.momentum, batch, token, h, c, theta);
    float product = 1.0f, weight = 0.0f;
    for (int t = 0; t < c; ++t) {
      pi[t] = product *= theta[t];
      b[t] = weight = alpha[t] * weight + product;
    }
    float step = 1.0f, fade = to_end[c - 1];
    for (int s = c - 1; s >= 0; --s) {
      step_end[s] = step, to_end[s] = fade;
      step *= theta[s];
      if (s > 0) fade = to_end[s - 1] + theta[s] * fade;
    }
    for (int t = c; t < round_up(c, kPad); ++t) pi[t] = b[t] = step_end[t] = to_end[t] = 0.0f;
  }
};

// dst row t = factors[t] * src row t   [c x cols]
static void weigh_rows(Range c, int cols, const float* factors, const float* src, float* dst) {
  for (int t = c.first; t < c.last; ++t) {
    const index_t at = index_t(t) * cols;
    for (int j = 0; j < cols; j += kLanes) store(dst + at + j, broadcast(factors[t]) * load(src + at + j));
  }
}

struct NoStage {
  template <int R, int N> MIRAS_FN void operator()(int, int) const {}
};

// The tile of Q K' at (i, j): computed, and stored in `scores` if that is not null; or as it is there, if dk = 0
template <int R, int N, class A>
MIRAS_FN Tile<R, N> scores_tile(int i, int j, int dk, const A& q, const float* kt, index_t cp, float* scores, WriteSoon& soon) {
  Tile<R, N> s;
  if (dk == 0) {
    s.add_matrix(scores + index_t(i) * cp + j, cp);
    return s;
  }
  s.add(q.at(i), kt + j, cp, 0, dk, soon);
  if (scores) s.store_to(scores + index_t(i) * cp + j, cp);
  return s;
}

// P = L o (Q K')  [c x Cp], and L itself if wanted. L by rows, L_t = alpha_t L_(t-1) with L_tt = 1, in registers. Q K': see scores_tile.
// P and L are zero right of the diagonal inside the tiles that were visited, and not written elsewhere. With a range of rows only those.
// then<R, N>(i, j) follows each tile.
template <bool kKeepL, class A, class T, class Then = NoStage>
static void decayed_scores(const Gates& gates, Range c, int dk, A q, const float* kt, index_t cp, float* last_row, T* P, float* L,
                           float* QK, WriteSoon soon, Then then = {}) {
  fill_zero(last_row, round_up(c.last, kPad));
  for (int j = 0; j < c.first; j += kLanes) {  // row c.first - 1, as the rows before would leave it
    Vec decay = zeros();
    for (int t = j; t < c.first; ++t) {
      decay *= broadcast(gates.alpha[t]);
      decay = iota() + j == t ? broadcast(1.0f) : decay;
    }
    store(last_row + j, decay);
  }
  sweep_lower(c, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> s = scores_tile<R, N>(i, j, dk, q, kt, cp, QK, soon);
    MIRAS_UNROLL
    for (int n = 0; n < N; ++n) {
      const IVec column = iota() + (j + n * kLanes);
      Vec decay = load(last_row + j + n * kLanes);
      MIRAS_UNROLL
      for (int r = 0; r < R; ++r) {
        decay *= broadcast(gates.alpha[i + r]);
        decay = column == i + r ? broadcast(1.0f) : decay;
        s.acc[r][n] *= decay;
        if constexpr (kKeepL) store(L + (i + r) * cp + j + n * kLanes, decay);
      }
      store(last_row + j + n * kLanes, decay);
    }
    s.store_to(P + i * cp + j, cp);
    then.template operator()<R, N>(i, j);
  });
}

// The same with momentum, P = M o (Q K'), and if wanted M and Theta. By rows, Theta_t = theta_t Theta_(t-1) with
// Theta_tt = 1 and M_t = alpha_t M_(t-1) + Theta_t. last_rows [2 x Cp].
template <bool kKeep, class A, class T, class Then = NoStage>
static void momentum_scores(const Gates& gates, Range c, int dk, A q, const float* kt, index_t cp, float* last_rows, T* P, float* M,
                            float* Theta, float* QK, WriteSoon soon, Then then = {}) {
  float *const last_m = last_rows, *const last_theta = last_rows + cp;
  fill_zero(last_rows, 2 * cp);
  for (int j = 0; j < c.first; j += kLanes) {  // as in decayed_scores
    Vec m = zeros(), theta = zeros();
    for (int t = j; t < c.first; ++t) {
      theta *= broadcast(gates.theta[t]);
      theta = iota() + j == t ? broadcast(1.0f) : theta;
      m = m * broadcast(gates.alpha[t]) + theta;
    }
    store(last_m + j, m), store(last_theta + j, theta);
  }
  sweep_lower(c, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> s = scores_tile<R, N>(i, j, dk, q, kt, cp, QK, soon);
    MIRAS_UNROLL
    for (int n = 0; n < N; ++n) {
      const index_t first = j + n * kLanes;
      const IVec column = iota() + int(first);
      Vec m = load(last_m + first), theta = load(last_theta + first);
      MIRAS_UNROLL
      for (int r = 0; r < R; ++r) {
        theta *= broadcast(gates.theta[i + r]);
        theta = column == i + r ? broadcast(1.0f) : theta;
        m = m * broadcast(gates.alpha[i + r]) + theta;
        s.acc[r][n] *= m;
        if constexpr (kKeep) store(M + (i + r) * cp + first, m), store(Theta + (i + r) * cp + first, theta);
      }
      store(last_m + first, m), store(last_theta + first, theta);
    }
    s.store_to(P + i * cp + j, cp);
    then.template operator()<R, N>(i, j);
  });
}

// X W0'  [c x Dvp], from X [c x Dk] by rows or columns and W0 transposed [Dk x Dvp]
template <class X> static void times_state(Range c, int dk, X x, const float* w, int dvp, float* xw, ReadSoon soon = {}) {
  sweep(c, dvp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> y;
    y.add(x.at(i), w + j, dvp, 0, dk, soon);
    y.store_to(xw + index_t(i) * dvp + j, dvp);
  });
}

// K W0'  [c x Dvp], from K transposed [Dk x Cp]
static void predict(Range c, int dk, const float* kt, index_t cp, const float* w, int dvp, float* kw, ReadSoon soon) {
  times_state(c, dk, Cols{kt, cp}, w, dvp, kw, soon);
}

// x *= factor, n floats, a multiple of kPad
static void scale(float factor, index_t n, float* x) {
  for (index_t i = 0; i < n; i += kLanes) store(x + i, factor * load(x + i));
}

// A term of a state's advance: scale * state. The scale is left in memory (see Tile::add_scaled).
struct Scaled {
  const float *state = nullptr, *scale = nullptr;
};

// A_c = gamma_c A_0 - sum_s U_end_s k_s'  [Dk x Dvp], transposed like all states, where U_end_s = to_end_s U_s; with momentum a
// second term, b_c S_0, and likewise for the momenta S_c = pi_c S_0 - sum_s step_end_s U_s k_s'. `next` may be the given state.
// kPerColumn: scales are [Dvp].
template <bool kPerColumn = false, class A>
static void advance(int c, Range dk, A kt, const float* u_end, ColumnRange dvp, Scaled dual, float* next, ReadSoon soon, Scaled more = {}) {
  const index_t ld = dvp.ld;
  const auto run = [&]<bool kMore>() MIRAS_LAMBDA {
    sweep(dk, dvp.range, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
      Tile<R, N> a;
      const auto keep = [&](const Scaled& x) MIRAS_LAMBDA {
        const float* state = x.state + i * ld + j;
        if constexpr (kPerColumn) a.add_scaled_cols(state, ld, x.scale + j);
        else a.add_scaled(state, ld, x.scale);
      };
      a.subtract(kt.at(i), u_end + j, ld, 0, c, soon);
      keep(dual);
      if constexpr (kMore) keep(more);
      a.store_to(next + i * ld + j, ld);
    });
  };
  if (more.state) run.template operator()<true>();
  else run.template operator()<false>();
}

// log alpha_r acts on every path that crosses token r: from a write s < r, or the state before the chunk, to a read t >= r, or the
// state after it:
//
//   d log alpha_r = sum_{s<r<=t} X_ts + sum_{t>=r} reads_t - sum_{s<r} writes_s + through
//
// The terms are summed directly, without differences of cumulative sums: accurate also where decays, and so all terms, are small.
// dlog [Cp] from X [c x Cp], reads and writes [Cp].
static void decay_gradient(int c, const float* X, index_t cp, const float* reads, const float* writes, float through, float* dlog) {
  for (int r = c - 1; r >= 0; --r) dlog[r] = through += reads[r];

  for (int j = 0; j < c; j += kLanes) {  // writes s in [j, j + kLanes): Y_s = sum over t >= r
    const IVec column = iota() + j;
    Vec y = column < c ? -load(writes + j) : zeros();
    for (int r = c - 1; r > j; --r) {
      y += load(X + r * cp + j);
      dlog[r] += sum(column < r ? y : zeros());
    }
  }
}

// With momentum M = L Theta takes L's place, and S_0 is read with weights b. From gM, gb, gradients of M [c x Cp] and b [Cp] as they
// are used, by rows backwards and without cancellation:
//
//   d alpha_t = gM_t . M_(t-1) + gb_t b_(t-1),  gM_(t-1) += alpha_t gM_t,  gb_(t-1) += alpha_t gb_t
//
// gM and gb hold the accumulated values afterwards. The row gM_end [Cp] adds to the last row of gM.
static void decay_gradient_with_momentum(const Gates& gates, int c, const float* M, index_t cp, const float* gM_end, float* gM, float* gb,
                                         const float* reads, float through, float* dlog) {
  const float* later = gM_end;  // row t + 1, as it added up, or the row that adds to the last
  float alpha = 1.0f, later_gb = 0.0f;
  for (int t = c - 1; t >= 0; --t) {
    Vec dot = zeros();
    float* row = gM + t * cp;
    for (int j = 0; j <= t; j += kLanes) {
      const Vec g = load(row + j) + alpha * load(later + j);
      store(row + j, g);
      if (t > 0) dot += g * load(M + (t - 1) * cp + j);
    }
    gb[t] += alpha * later_gb;
    later = row, later_gb = gb[t], alpha = gates.alpha[t];
    dlog[t] = (through += reads[t]) + alpha * (sum(dot) + (t > 0 ? gb[t] * gates.b[t - 1] : 0.0f));
  }
}

// d theta from the accumulated gM and gb. gTheta and gpi, the gradients of the last row of Theta [Cp] and of pi, add up here:
//
//   gTheta_t += gM_t,  gpi_t += gb_t,  d theta_t = gTheta_t . Theta_(t-1) + gpi_t pi_(t-1),
//   gTheta_(t-1) += theta_t gTheta_t,  gpi_(t-1) += theta_t gpi_t
static void momentum_gradient(const Gates& gates, int c, const float* Theta, index_t cp, const float* gM, const float* gb, float* gTheta,
                              float gpi, float* dmomentum) {
  for (int t = c - 1; t >= 0; --t) {
    const float theta = gates.theta[t];
    Vec dot = zeros();
    for (int j = 0; j <= t; j += kLanes) {
      const Vec g = load(gTheta + j) + load(gM + t * cp + j);
      store(gTheta + j, theta * g);
      if (t > 0) dot += g * load(Theta + (t - 1) * cp + j);
    }
    gpi += gb[t];
    dmomentum[t] = sum(dot) + gpi * (t > 0 ? gates.pi[t - 1] : 1.0f);
    gpi *= theta;
  }
}

// <a, b> over n floats, a multiple of kPad; four sums, which need not wait for each other
template <class T> static float inner_product(const T* a, const float* b, index_t n) {
  Vec dot[4] = {};
  index_t i = 0;
  for (; n - i >= 4 * kLanes; i += 4 * kLanes) {
    MIRAS_UNROLL
    for (int l = 0; l < 4; ++l) dot[l] += load(a + i + l * kLanes) * load(b + i + l * kLanes);
  }
  for (; i < n; i += kLanes) dot[0] += load(a + i) * load(b + i);
  return sum((dot[0] + dot[1]) + (dot[2] + dot[3]));
}

// The column sums of A o B  [Dvp], both [rows x Dvp]
static void column_products(int rows, int dvp, const float* A, const float* B, float* sums) {
  for (int j = 0; j < dvp; j += kLanes) {
    Vec dot = zeros();
    for (int i = 0; i < rows; ++i) dot += load(A + index_t(i) * dvp + j) * load(B + index_t(i) * dvp + j);
    store(sums + j, dot);
  }
}

// A gate of a chunk: [c], or, channel-wise, the task's channels [c x Dvp], padded with zeros
static void read_value_gate(const TokenTensor& x, bool per_channel, const Task& task, int64_t b, int64_t token, int c, float* dst) {
  if (!per_channel) return read_gate(x, b, token, task.h, c, dst);
  const float* from = address<float>(x, b, token, task.h) + task.first * x.channel;
  for (int t = 0; t < c; ++t)
    for (int j = 0; j < task.dvp; ++j) dst[t * task.dvp + j] = j < task.dv ? from[t * x.token + j * x.channel] : 0.0f;
}

// Of some tokens of a chunk: v, in V [c x Dvp] unless it is used in place; the chunk's eta and delta are [c] or [c x Dvp]
static BiasRows bias_rows(const LinearParams& p, const ChunkView& v, Range tokens, const float* eta, const float* delta, float* V,
                          int dvp) {
  const index_t row = index_t(tokens.first) * dvp;
  const ChunkView own = v.from(tokens.first);
  BiasRows rows{tokens.count(), dvp, p, eta + (p.lr_per_channel ? row : tokens.first), nullptr, p.delta_per_channel, V + row, dvp};
  if (p.delta) rows.delta = delta + (p.delta_per_channel ? row : tokens.first);
  if (own.in_place()) rows.v = own.at<float>(), rows.ldv = v.x.token;
  return rows;
}

static const float* read_delta(const LinearParams& p, const Task& task, int64_t b, int64_t token, int c, float* dst) {
  if (!p.delta) return nullptr;
  read_value_gate(p.delta, p.delta_per_channel, task, b, token, c, dst);
  return dst;
}

}  // namespace miras::cpu::MIRAS_LEVEL
