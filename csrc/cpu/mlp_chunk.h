// What the forward and the backward of a chunk of the MLP memory share (SPEC section 5).
//
//   c tokens of the chunk (C at most, Cp padded)   D channels (Dp)   Hd hidden units
//   T after a name: transposed
//
// States are held hidden-major, S1 = W1' and S2 = W2, both [Hd x Dp], and so is what has hidden units, [Hd x Cp]:
//
//   Z' = S2 K'   U = A S1   Ga' = S1 Gu'   S1 -= A' (..Gu)   S2 -= Gz' (..K)   Zq' = S2 Q' - ..   Uq = Aq S1 - ..
//
// Every product finds its second operand in rows, nothing larger than [c x Dp] or [c x c] is transposed, and hidden units need
// no padding.
#pragma once

#include "chunk.h"
#include "layer_norm.h"

namespace miras::cpu::MIRAS_LEVEL {

struct MlpChunk {
  static_assert(L2Retention::kIdentity, "W = A below");
  int d, dp, hd, cp;
  Gates gates;
  LayerNorm norm;
  float *K, *Q, *V;                   // [C x Dp]
  float *KT, *QT;                     // [D x Cp]
  float *X, *E, *G, *Gu;              // [C x Dp]  LN(A S1) without its affine part; M(K), then its error; psi; g_u
  float *GuT;                         // [D x Cp]
  float *U1, *U1_end, *K_end;         // [C x Dp]  eta Gu; (eta gamma_c / gamma_t) times Gu and K
  float *AT, *GzT;                    // [Hd x Cp]
  float *slopeT, *AqT;                // [Hd x Cp]  gelu'(Z); gelu(Zq)
  float *P1, *P2, *P2T;               // [C x Cp]  L o (Aq A'), L o (Q K'), and its transpose with row s times eta_s
  float *Xq;                          // [C x Dp]  LN(Uq) without its affine part
  float *r, *rq, *weight;             // [Cp]  1 / std of the two; eta gamma_c / gamma_t
  float *last_row, *delta;            // [Cp]

  MIRAS_FN MlpChunk(Arena& a, const MlpParams& p)
      : d(p.D), dp(round_up(p.D, kPad)), hd(p.Hd), cp(round_up(p.C, kPad)), gates(a, p), norm(a, p) {
    K = a.take(p.C, dp), Q = a.take(p.C, dp), V = a.take(p.C, dp);
    KT = a.take(d, cp), QT = a.take(d, cp);
    X = a.take(p.C, dp), E = a.take(p.C, dp), G = a.take(p.C, dp), Gu = a.take(p.C, dp);
    GuT = a.take(d, cp);
    U1 = a.take(p.C, dp), U1_end = a.take(p.C, dp), K_end = a.take(p.C, dp);
    AT = a.take(hd, cp), GzT = a.take(hd, cp);
    slopeT = a.take(hd, cp), AqT = a.take(hd, cp);
    P1 = a.take(p.C, cp), P2 = a.take(p.C, cp), P2T = a.take(p.C, cp);
    Xq = a.take(p.C, dp);
    r = a.take(1, cp), rq = a.take(1, cp), weight = a.take(1, cp);
    last_row = a.take(1, cp), delta = a.take(1, cp);
  }

  // Once per task: the head's parameters, and zeros right of the diagonals, which stay so.
  void begin(const MlpParams& p, int64_t h) {
    norm.read(p, h);
    fill_zero(P1, int64_t(p.C) * cp), fill_zero(P2, int64_t(p.C) * cp);
  }

  MIRAS_FN ChunkView view(const MlpParams& p, const TokenTensor& x, int64_t b, int64_t token, int64_t h) const {
    return {x, p.dtype, b, token, h, 0, d};
  }

  // What the writes need of a chunk's tokens.
  void read(const MlpParams& p, int64_t b, int64_t token, int64_t h, int c) {
    gates.read(p, b, token, h, c);
    for (int t = 0; t < c; ++t) weight[t] = gates.eta[t] * gates.to_end[t];
    view(p, p.k, b, token, h).read(c, K, dp);
    view(p, p.v, b, token, h).read(c, V, dp);
    transpose(K, dp, c, d, KT, cp);
    if (p.delta) read_gate(p.delta, b, token, h, c, delta);
  }
  // What the read-out needs besides.
  void read_queries(const MlpParams& p, int64_t b, int64_t token, int64_t h, int c) {
    view(p, p.q, b, token, h).read(c, Q, dp);
    transpose(Q, dp, c, d, QT, cp);
  }

  MIRAS_FN BiasRows bias_rows(const MlpParams& p, int c, const float* eta) const {
    return {c, dp, p.bias_params, eta, p.delta ? delta : nullptr, false, V, dp};
  }

  // Sweeps a matrix with a row per hidden unit and a column per token.
  template <int N = kTileVectors, class Function> MIRAS_FN void sweep_hidden(int c, Function&& f) const {
    sweep<N>(hd, round_up(c, kPad), f);
  }

  // ... and visits it vector by vector.
  template <class Function> MIRAS_FN void each_hidden(int c, Function&& f) const {
    const int cols = round_up(c, kPad);
    for (int i = 0; i < hd; ++i)
      for (int j = 0; j < cols; j += kLanes) f(index_t(i) * cp + j);
  }

  // E, G and Gu from X
  void errors(const MlpParams& p, const BiasTable& bias, int c) {
    norm.affine(c, X, K, E);
    bias.grade(bias_rows(p, c, gates.eta), E, G);
    norm.pull_back_weighted(c, X, r, G, Gu);
  }

  // The inner gradients at (S1, S2): Z, X, E, G, Gu, A, Gz, and Ga unless GaT is null.
  void write(const MlpParams& p, const BiasTable& bias, int c, const float* S1, const float* S2, float* ZT, float* GaT, ReadSoon soon) {
    sweep_hidden(c, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
      Tile<R, N> z;
      z.add(Rows{S2 + index_t(i) * dp, dp}, KT + j, cp, 0, d, soon);
      z.store_to(ZT + index_t(i) * cp + j, cp);
    });
    each_hidden(c, [&](index_t at) MIRAS_LAMBDA {
      const Gelu gelu(load(ZT + at));
      store(AT + at, gelu.value());
      store(slopeT + at, gelu.slope());
    });
    predict(c, hd, AT, cp, S1, dp, X, soon);
    norm.normalise(c, X, r);
    errors(p, bias, c);
    transpose(Gu, dp, c, d, GuT, cp);
    sweep_hidden(c, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
      const index_t at = index_t(i) * cp + j;
      Tile<R, N> x;
      x.add(Rows{S1 + index_t(i) * dp, dp}, GuT + j, cp, 0, d, soon);
      if (GaT) x.store_to(GaT + at, cp);
      x.multiply(slopeT + at, cp);
      x.store_to(GzT + at, cp);
    });
  }

  // (S1, S2) after the chunk; next may be the same
  void advance_both(int c, const float* S1, const float* S2, float* next1, float* next2, ReadSoon soon) {
    weigh_rows(c, dp, weight, Gu, U1_end);
    weigh_rows(c, dp, weight, K, K_end);
    advance(c, hd, AT, cp, U1_end, dp, {S1, gates.end(c)}, next1, soon);
    advance(c, hd, GzT, cp, K_end, dp, {S2, gates.end(c)}, next2, soon);
  }

  // Zq' = gamma * (S2 Q') - Gz' (P2 eta)'  over AqT
  template <bool kKeepL> void read_hidden(int c, const float* S2, float* L, WriteSoon soon) {
    decayed_scores<kKeepL>(gates, c, d, Cols{QT, cp}, KT, cp, last_row, P2, L, soon);
    transpose(P2, cp, c, c, P2T, cp);
    weigh_rows(c, cp, gates.eta, P2T, P2T);
    sweep_hidden<2>(c, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
      Tile<R, N> z;
      z.add(Rows{S2 + index_t(i) * dp, dp}, QT + j, cp, 0, d, soon);
      z.scale_cols(gates.gamma + j);
      z.subtract(Rows{GzT + index_t(i) * cp, cp}, P2T + j, cp, 0, minimum(c, j + N * kLanes));
      z.store_to(AqT + index_t(i) * cp + j, cp);
    });
  }

  // Uq = gamma * (Aq S1) - P1 U1, and over it X = LN(Uq)
  void read_out(int c, const float* S1, WriteSoon soon) {
    decayed_scores<false>(gates, c, hd, Cols{AqT, cp}, AT, cp, last_row, P1, nullptr, soon);
    weigh_rows(c, dp, gates.eta, Gu, U1);
    sweep(c, dp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
      Tile<R, N> u;
      u.add(Cols{AqT + i, cp}, S1 + j, dp, 0, hd);
      u.scale_rows(gates.gamma + i);
      u.subtract(Rows{P1 + i * cp, cp}, U1 + j, dp, 0, i + R);
      u.store_to(Xq + i * dp + j, dp);
    });
    norm.normalise(c, Xq, rq);
  }
};

// ---- states: W1 [D, Hd] and W2 [Hd, D] outside with any strides, hidden-major [Hd x Dp] inside ----
static StateTensor transposed(StateTensor x) {
  const int64_t row = x.row;
  x.row = x.col, x.col = row;
  return x;
}
static void read_states(const StateTensor (&x)[2], int64_t n, int64_t h, int d, int hd, float* S1, float* S2, index_t dp) {
  read_state(x[0], n, h, 0, d, hd, S1, dp);
  read_state(transposed(x[1]), n, h, 0, d, hd, S2, dp);
}
// to contiguous rows; `spare` [D x round_up(Hd)] is overwritten
static void write_states(const StateTensor (&x)[2], int64_t n, int64_t h, int d, int hd, const float* S1, const float* S2,
                         index_t dp, float* spare) {
  write_state(x[0], n, h, 0, d, hd, S1, dp, spare);
  copy_out(S2, dp, hd, d, x[1].data + n * x[1].seq + h * x[1].head, x[1].row);
}

}  // namespace miras::cpu::MIRAS_LEVEL
