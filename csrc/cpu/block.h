// Exact steps of the L2 bias, a block of tokens at a time (docs/mathematics.md, section 13): what forward and backward share.
//
// A block holds whole chunks of `chunk` tokens. The error of token t is taken at the state after token b(t), the last one before its
// chunk; with L_ts = gamma_t / gamma_s and r_t = gamma_b(t)
//
//   E = r * (K A_0') - V - G U    U = eta * E    G_ts = L_b(t)s k_t.k_s for s <= b(t), else 0
//
// With decay first the error of token t is taken after its decay: b(t) = t, and G_ts = 0 for s = t.
//
// which is a unit lower triangular system, solved row by row. In the kernels C is the number of tokens of a block.
#pragma once

#include "chunk.h"

namespace miras::cpu::MIRAS_LEVEL {

// The weights of a block, L [(1 + C) x Cp] with a row of zeros for the state before it, and r [Cp]
class BlockWeights {
 public:
  MIRAS_FN BlockWeights(Arena& a, const LinearParams& p) : cp_(round_up(p.C, kPad)), chunk_(p.chunk), decay_first_(p.decay_first) {
    rows_ = a.take(1 + p.C, cp_), r = a.take(1, cp_);
  }

  float* r;

  // Row t of L, from -1 on
  MIRAS_FN const float* row(int t) const { return rows_ + (1 + t) * cp_; }
  // The token before t's chunk, -1 where that begins the block; with decay first t itself
  MIRAS_FN int before(int t) const { return decay_first_ ? t : chunk_ == 1 ? t - 1 : t / chunk_ * chunk_ - 1; }
  // Row t of L where t's error is taken
  MIRAS_FN const float* error_row(int t) const { return row(before(t)); }

  // Zeros, as all entries right of the diagonal remain
  MIRAS_FN void clear(int C) { fill_zero(rows_, (1 + C) * cp_); }

  // No token's error sees its own write: M [c x Cp]
  MIRAS_FN void clear_own(int c, float* M) const {
    for (int t = 0; t < c && decay_first_; ++t) M[t * cp_ + t] = 0.0f;
  }

  // Only products of decays in (0, 1], by rows in registers: L_t = alpha_t L_(t-1) with L_tt = 1
  void read(const Gates& gates, int c) {
    for (int j = 0; j < c; j += kLanes) {
      const IVec column = iota() + j;
      Vec decay = zeros();
      for (int t = j; t < c; ++t) {
        decay *= broadcast(gates.alpha[t]);
        decay = column == t ? broadcast(1.0f) : decay;
        store(rows_ + (1 + t) * cp_ + j, decay);
      }
    }
    for (int t = 0; t < c; ++t) r[t] = before(t) < 0 ? 1.0f : gates.gamma[before(t)];
  }

 private:
  index_t cp_;
  int chunk_;
  bool decay_first_;
  float* rows_;
};

// G [c x Cp], from K transposed [Dk x Cp]; written in the tiles that sweep_lower visits
static void key_scores(const BlockWeights& weights, int c, int dk, const float* kt, index_t cp, float* G, ReadSoon soon) {
  sweep_lower(c, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> s;
    s.add(Cols{kt + i, cp}, kt + j, cp, 0, dk, soon);
    MIRAS_UNROLL
    for (int r = 0; r < R; ++r) {
      const float* const weight = weights.error_row(i + r) + j;
      MIRAS_UNROLL
      for (int n = 0; n < N; ++n) store(G + (i + r) * cp + j + n * kLanes, s.acc[r][n] * load(weight + n * kLanes));
    }
  });
  weights.clear_own(c, G);
}

// Rows of the triangle of R tokens on the diagonal of a lower triangular M: y_r -= sum_{s <= r} M_rs x_s, x [R x ldx]
template <int R, int N> MIRAS_INLINE void subtract_triangle(Tile<R, N>& y, const float* M, index_t ldm, const float* x, index_t ldx) {
  MIRAS_UNROLL
  for (int s = 0; s < R; ++s) {
    MIRAS_UNROLL
    for (int n = 0; n < N; ++n) {
      const Vec row = load(x + s * ldx + n * kLanes);
      MIRAS_UNROLL
      for (int r = 0; r < R; ++r)
        if (r >= s) y.acc[r][n] -= broadcast(M[r * ldm + s]) * row;
    }
  }
}

struct BlockErrors {
  const float *kt, *A;  // [Dk x Cp], [Dk x Dvp]
  const float *v, *G;   // [c x ldv], [c x Cp]
  index_t cp, ldv;
  const float* eta;         // [Cp]
  const float *r, *to_end;  // [Cp], or null: all ones
  float *U, *U_end, *E;     // [c x Dvp]; U_end_s = to_end_s U_s, only with to_end; E optional
};

// E and U: the product with A, then forward substitution, a tile of rows in registers.
static void solve_errors(int c, int dk, int dvp, const BlockErrors& x, ReadSoon soon) {
  sweep(c, dvp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> e;
    e.add(Cols{x.kt + i, x.cp}, x.A + j, dvp, 0, dk, soon);
    if (x.r) e.scale_rows(x.r + i);
    e.subtract_matrix(x.v + i * x.ldv + j, x.ldv);
    e.subtract(Rows{x.G + i * x.cp, x.cp}, x.U + j, dvp, 0, i);
    const float* const G = x.G + i * x.cp + i;
    const index_t at = index_t(i) * dvp + j;
    MIRAS_UNROLL
    for (int s = 0; s < R; ++s) {
      const Vec eta = broadcast(x.eta[i + s]);
      MIRAS_UNROLL
      for (int n = 0; n < N; ++n) {
        const Vec u = eta * e.acc[s][n];
        store(x.U + at + s * dvp + n * kLanes, u);
        if (x.to_end) store(x.U_end + at + s * dvp + n * kLanes, broadcast(x.to_end[i + s]) * u);
        MIRAS_UNROLL
        for (int r = 0; r < R; ++r)
          if (r > s) e.acc[r][n] -= broadcast(G[r * x.cp + s]) * u;
      }
    }
    if (x.E) e.store_to(x.E + at, dvp);
  });
}

// O = gamma * (Q A') - P U  [c x ldo], gamma [Cp] or null: all ones
static void read_block(int c, int dk, int dvp, Rows Q, const float* A, const float* gamma, const float* P, index_t cp, const float* U,
                       float* O, index_t ldo, ReadSoon soon) {
  sweep(c, dvp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> o;
    o.add(Q.at(i), A + j, dvp, 0, dk, soon);
    if (gamma) o.scale_rows(gamma + i);
    o.subtract(Rows{P + i * cp, cp}, U + j, dvp, 0, i);
    subtract_triangle(o, P + i * cp + i, cp, U + index_t(i) * dvp + j, dvp);
    o.store_to(O + i * ldo + j, ldo);
  });
}

}  // namespace miras::cpu::MIRAS_LEVEL
