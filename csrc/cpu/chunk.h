// Stages that the forward and the backward of a chunk share.
//
//   c tokens (Cp padded)   Dk key channels (Dkp)   Dvp value channels of the task, padded
#pragma once

#include "bias_rows.h"
#include "pack.h"
#include "tile.h"

namespace miras::cpu::MIRAS_LEVEL {

// Which piece of the work a task is.
struct Task {
  int64_t n, h;        // sequence, head
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

// The scalar gates of a chunk, [Cp] each.
struct Gates {
  float *eta, *alpha, *gamma, *to_end;  // gamma_t = alpha_1 ... alpha_t;  to_end_t = gamma_c / gamma_t
  float *log_decay;
  bool decays;

  MIRAS_FN Gates(Arena& arena, const MemoryParams& p) : decays(bool(p.log_decay)) {
    const int cp = round_up(p.C, kPad);
    eta = arena.take(1, cp), alpha = arena.take(1, cp), gamma = arena.take(1, cp), to_end = arena.take(1, cp);
    log_decay = arena.take(1, cp);
  }

  MIRAS_FN const float* end(int c) const { return gamma + c - 1; }

  // Only products of decays in (0, 1]: nothing overflows, and what underflows is zero.
  void read(const MemoryParams& p, int64_t b, int64_t token, int64_t h, int c) {
    read_gate(p.lr, b, token, h, c, eta);
    if (decays) {
      read_gate(p.log_decay, b, token, h, c, log_decay);
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
  }
};

// P = L o (Q K')  [c x Cp], and L itself if wanted. L by rows, L_t = alpha_t L_(t-1) with L_tt = 1, in registers.
// P and L are zero right of the diagonal as far as a tile was visited; beyond it they are never written.
template <bool kKeepL, class A>
static void decayed_scores(const Gates& gates, int c, int dk, A q, const float* kt, index_t cp, float* last_row, float* P,
                           float* L, WriteSoon soon) {
  fill_zero(last_row, round_up(c, kPad));
  sweep_lower(c, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> s;  // Q K'
    s.add(q.at(i), kt + j, cp, 0, dk, soon);
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
  });
}

// K W0'  [c x Dvp], from K transposed [Dk x Cp] and W0 transposed [Dk x Dvp]
static void predict(int c, int dk, const float* kt, index_t cp, const float* w, int dvp, float* kw, ReadSoon soon) {
  sweep(c, dvp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;
    x.add(Cols{kt + i, cp}, w + j, dvp, 0, dk, soon);
    x.store_to(kw + index_t(i) * dvp + j, dvp);
  });
}

// A_c = gamma_c A_0 - sum_s (gamma_c / gamma_s) U_s k_s'  [Dk x Dvp], transposed like all states; next may be state
static void advance(int c, int dk, const float* kt, index_t cp, const float* u_end, int dvp, const float* decay,
                    const float* state, float* next, ReadSoon soon) {
  sweep(dk, dvp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> a;
    a.subtract(Rows{kt + i * cp, cp}, u_end + j, dvp, 0, c, soon);
    a.add_scaled(state + index_t(i) * dvp + j, dvp, decay);
    a.store_to(next + index_t(i) * dvp + j, dvp);
  });
}

// What a chunk did depends on log alpha_r through every path that crosses token r: from a write s < r, or the state before
// the chunk, to a read t >= r, or the state after it:
//
//   d log alpha_r = sum_{s<r<=t} X_ts + sum_{t>=r} reads_t - sum_{s<r} writes_s + through
//
// Summed as it stands, without differences of cumulative sums: exact where decays are small and all terms with them.
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

// <a, b> over n floats, a multiple of kPad
static float inner_product(const float* a, const float* b, index_t n) {
  Vec dot = zeros();
  for (index_t i = 0; i < n; i += kLanes) dot += load(a + i) * load(b + i);
  return sum(dot);
}

// delta of a chunk: [c], or the task's channels [c x Dvp]
static const float* read_delta(const LinearParams& p, const Task& task, int64_t b, int64_t token, int c, float* dst) {
  if (!p.delta) return nullptr;
  if (!p.delta_per_channel) return read_gate(p.delta, b, token, task.h, c, dst), dst;
  const float* from = address<float>(p.delta, b, token, task.h) + task.first * p.delta.channel;
  for (int t = 0; t < c; ++t)
    for (int j = 0; j < task.dvp; ++j)
      dst[t * task.dvp + j] = j < task.dv ? from[t * p.delta.token + j * p.delta.channel] : 0.0f;
  return dst;
}

}  // namespace miras::cpu::MIRAS_LEVEL
