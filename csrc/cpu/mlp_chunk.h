// What the forward and the backward of a chunk of the MLP memory share (docs/mathematics.md, section 9).
//
//   c tokens of the chunk (C at most, Cp padded)   D channels (Dp)   Hd hidden units
//   T after a name: transposed
//
// The matrices of a state are stored hidden-major, W1T = W1' and W2, both [Hd x Dp], as is everything with hidden units, [Hd x Cp]:
//
//   Z' = W2 K'   U = A W1T   Ga' = W1T Gu'   W1T -= A' (..Gu)   W2 -= Gz' (..K)   Zq' = W2 Q' - ..   Uq = Aq W1T - ..
//
// Every product reads its second operand by rows, nothing larger than [c x Dp] or [c x c] is transposed, and hidden units need
// no padding.
#pragma once

#include "chunk.h"
#include "layer_norm.h"

namespace miras::cpu::MIRAS_LEVEL {

// The state at a chunk's start, W1 (transposed) and W2 each, [Hd x Dp].
struct MlpState {
  float* dual[2];
  float* primal[2];   // W = phi(A); the duals themselves if phi is the identity
  float* momenta[2];  // S; null without momentum
  Rho* rho;           // [2]

  // Duals, then momenta
  MIRAS_FN float* matrix(int i) const { return i < 2 ? dual[i] : momenta[i - 2]; }
};

// Memory for the states of that many chunks.
struct MlpStates {
  index_t size;  // of a matrix
  bool momentum;
  float *dual[2], *primal[2], *momenta[2];
  Rho* rho;

  MIRAS_FN MlpStates(Arena& a, const MlpParams& p, const Retention& retention, int64_t n)
      : size(index_t(p.Hd) * round_up(p.D, kPad)), momentum(bool(p.momentum)) {
    for (float*& x : dual) x = a.take(n, size);
    for (int i = 0; i < 2; ++i) primal[i] = retention.identity ? dual[i] : a.take(n, size);
    for (float*& x : momenta) x = a.take(momentum ? n : 0, size);
    rho = reinterpret_cast<Rho*>(a.take(n, 2 * sizeof(Rho) / sizeof(float)));
  }

  MIRAS_FN MlpState at(int64_t chunk) const {
    const auto place = [&](float* x) MIRAS_LAMBDA { return x + chunk * size; };
    return {{place(dual[0]), place(dual[1])},
            {place(primal[0]), place(primal[1])},
            {momentum ? place(momenta[0]) : nullptr, momentum ? place(momenta[1]) : nullptr},
            rho + 2 * chunk};
  }
};

struct MlpChunk {
  int d, dp, hd, cp;
  Retention retention;
  Gates gates;
  LayerNorm norm;
  float *K, *Q, *V;            // [C x Dp]
  float *KT, *QT;              // [D x Cp]
  float *X, *E, *G, *Gu;       // [C x Dp]  LN(A W1T) without its affine part; M(K), then its error; psi; g_u
  float* GuT;                  // [D x Cp]
  float *U1, *U1_end, *K_end;  // [C x Dp]  eta Gu; (eta gamma_c / gamma_t) times Gu and K
  float *AT, *GzT;             // [Hd x Cp]
  float *slopeT, *AqT;         // [Hd x Cp]  gelu'(Z); gelu(Zq)
  float *P1, *P2, *P2T;        // [C x Cp]  rho L o (Aq A'), rho L o (Q K'), and its transpose with row s times eta_s
  float* Xq;                   // [C x Dp]  LN(Uq) without its affine part
  float *r, *rq, *weight;      // [Cp]  1 / std of the two; eta gamma_c / gamma_t
  float *last_rows, *delta;    // [2 x Cp], [Cp]
  // With momentum, M in place of L and to_end in place of gamma_c / gamma_t, and:
  float *step_weight, *carry[2];  // [Cp]  eta step_end; rho b
  float *partT, *part;            // [Hd x Cp], [C x Dp]  what S, or its gradient, adds to a product with A, or J

  MIRAS_FN MlpChunk(Arena& a, const MlpParams& p)
      : d(p.D), dp(round_up(p.D, kPad)), hd(p.Hd), cp(round_up(p.C, kPad)), retention(p), gates(a, p), norm(a, p) {
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
    last_rows = a.take(2, cp), delta = a.take(1, cp);
    const int momentum = gates.momentum;
    step_weight = a.take(momentum, cp), carry[0] = a.take(momentum, cp), carry[1] = a.take(momentum, cp);
    partT = a.take(momentum * hd, cp), part = a.take(momentum * p.C, dp);
  }

  // Once per task: the head's parameters, and zeros right of the diagonals, where nothing is written later.
  void begin(const MlpParams& p, int64_t h) {
    norm.read(p, h);
    fill_zero(P1, int64_t(p.C) * cp), fill_zero(P2, int64_t(p.C) * cp);
  }

  MIRAS_FN ChunkView view(const MlpParams& p, const TokenTensor& x, int64_t b, int64_t token, int64_t h) const {
    return {x, p.dtype, b, token, h, 0, d};
  }

  // Reads what the writes need of a chunk's tokens.
  void read(const MlpParams& p, int64_t b, int64_t token, int64_t h, int c) {
    gates.read(p, b, token, h, c);
    for (int t = 0; t < c; ++t) weight[t] = gates.eta[t] * gates.to_end[t];
    if (gates.momentum) {
      for (int t = 0; t < c; ++t) step_weight[t] = gates.eta[t] * gates.step_end[t];
    }
    view(p, p.k, b, token, h).read(c, K, dp);
    view(p, p.v, b, token, h).read(c, V, dp);
    transpose(K, dp, c, d, KT, cp);
    if (p.delta) read_gate(p.delta, b, token, h, c, delta);
  }
  // Reads what the read-out needs in addition.
  void read_queries(const MlpParams& p, int64_t b, int64_t token, int64_t h, int c) {
    view(p, p.q, b, token, h).read(c, Q, dp);
    transpose(Q, dp, c, d, QT, cp);
  }

  MIRAS_FN BiasRows bias_rows(const MlpParams& p, int c, const float* eta) const {
    return {c, dp, p, eta, p.delta ? delta : nullptr, false, V, dp};
  }

  // Sweeps a matrix with a row per hidden unit and a column per token.
  template <int N = kTileVectors, class Function> MIRAS_FN void sweep_hidden(int c, Function&& f) const {
    sweep<N>(hd, round_up(c, kPad), f);
  }

  // The same, vector by vector.
  template <class Function> MIRAS_FN void each_hidden(int c, Function&& f) const {
    const int cols = round_up(c, kPad);
    for (int i = 0; i < hd; ++i)
      for (int j = 0; j < cols; j += kLanes) f(index_t(i) * cp + j);
  }

  // The last axis of W1 [D, Hd] runs down its transpose, that of W2 [Hd, D] along its rows.
  MIRAS_FN StateShape shape(int i) const { return {hd, d, dp, i == 0 ? LastAxis::down : LastAxis::along}; }

  // W = phi(A) and rho
  void find_primal(const MlpState& s) const {
    for (int i = 0; i < 2; ++i) s.rho[i] = retention.identity ? Rho() : retention.primal(shape(i), s.dual[i], s.primal[i]);
  }

  // S X' [Hd x Cp] for a matrix S of a state and rows X, given transposed
  void hidden_product(int c, const float* S, const float* XT, float* to, ReadSoon soon) const {
    sweep_hidden(c, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
      Tile<R, N> z;
      z.add(Rows{S + index_t(i) * dp, dp}, XT + j, cp, 0, d, soon);
      z.store_to(to + index_t(i) * cp + j, cp);
    });
  }

  // E, G and Gu from X
  void errors(const MlpParams& p, const BiasTable& bias, int c) {
    norm.affine(c, X, K, E);
    bias.grade(bias_rows(p, c, gates.eta), E, G);
    norm.pull_back_weighted(c, X, r, G, Gu);
  }

  // The inner gradients at a state: Z, X, E, G, Gu, A, Gz, and Ga unless GaT is null.
  void write(const MlpParams& p, const BiasTable& bias, int c, const MlpState& s, float* ZT, float* GaT, ReadSoon soon) {
    const float *W1T = s.primal[0], *W2 = s.primal[1];
    MIRAS_STAGE("hidden units", 2 * c * d * hd, hd * d + d * c + hd * c);
    hidden_product(c, W2, KT, ZT, soon);
    MIRAS_STAGE("gelu", 0, 3 * hd * c);
    each_hidden(c, [&](index_t at) MIRAS_LAMBDA {
      const Gelu gelu(load(ZT + at));
      store(AT + at, gelu.value());
      store(slopeT + at, gelu.slope());
    });
    MIRAS_STAGE("predict", 2 * c * d * hd, hd * c + hd * d + c * d);
    predict(c, hd, AT, cp, W1T, dp, X, soon);
    MIRAS_STAGE("row pass", 0, 12 * c * d);
    norm.normalise(c, X, r);
    errors(p, bias, c);
    transpose(Gu, dp, c, d, GuT, cp);
    MIRAS_STAGE("hidden gradient", 2 * c * d * hd, hd * d + d * c + 2 * hd * c);
    sweep_hidden(c, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
      const index_t at = index_t(i) * cp + j;
      Tile<R, N> x;
      x.add(Rows{W1T + index_t(i) * dp, dp}, GuT + j, cp, 0, d, soon);
      if (GaT) x.store_to(GaT + at, cp);
      x.multiply(slopeT + at, cp);
      x.store_to(GzT + at, cp);
    });
  }

  // The duals and momenta after the chunk; next may be the same as s.
  void advance_both(int c, const MlpState& s, const MlpState& next, ReadSoon soon) {
    MIRAS_STAGE("update", 4 * c * d * hd, 2 * hd * c + 6 * c * d + 4 * hd * d);
    const auto momenta = [&](int i) MIRAS_LAMBDA { return Scaled{s.momenta[i], gates.momenta_end(c)}; };
    weigh_rows(c, dp, weight, Gu, U1_end);
    weigh_rows(c, dp, weight, K, K_end);
    advance(c, hd, AT, cp, U1_end, dp, {s.dual[0], gates.end(c)}, next.dual[0], soon, momenta(0));
    advance(c, hd, GzT, cp, K_end, dp, {s.dual[1], gates.end(c)}, next.dual[1], soon, momenta(1));
    if (!gates.momentum) return;
    weigh_rows(c, dp, step_weight, Gu, U1_end);
    weigh_rows(c, dp, step_weight, K, K_end);
    advance(c, hd, AT, cp, U1_end, dp, {s.momenta[0], gates.step_momenta_end(c)}, next.momenta[0], ReadSoon());
    advance(c, hd, GzT, cp, K_end, dp, {s.momenta[1], gates.step_momenta_end(c)}, next.momenta[1], ReadSoon());
  }

  // Scores that the backward needs, if L is not null, [C x Cp]; the last two with momentum, where L is M.
  struct KeptScores {
    float *L, *Theta, *XY;
  };

  // P = rho L o (X Y')  [c x Cp] for queries X and keys Y, both transposed
  void scores(int c, int width, const float* XT, const float* YT, const Rho& rho, float* P, const KeptScores& kept, WriteSoon soon) {
    const Cols x{XT, cp};
    if (gates.momentum) {
      const auto run = kept.L ? momentum_scores<true, Cols> : momentum_scores<false, Cols>;
      run(gates, c, width, x, YT, cp, last_rows, P, kept.L, kept.Theta, kept.XY, soon);
    } else {
      const auto run = kept.L ? decayed_scores<true, Cols> : decayed_scores<false, Cols>;
      run(gates, c, width, x, YT, cp, last_rows, P, kept.L, soon);
    }
    if (retention.scales_reads) scale(rho.value, index_t(c) * cp, P);
  }

  // carry = rho b
  void weigh_momenta(int c, const Rho* rho) {
    for (int i = 0; i < 2; ++i)
      for (int t = 0; t < round_up(c, kPad); t += kLanes) store(carry[i] + t, rho[i].value * load(gates.b + t));
  }

  // Zq' = gamma * (W2 Q') - Gz' (P2 eta)'  over AqT, with momentum + carry * (S2 Q')
  void read_hidden(int c, const MlpState& s, const KeptScores& kept, WriteSoon soon) {
    const float* W2 = s.primal[1];
    MIRAS_STAGE("pairs", c * (c + 1) * d, 2 * d * c + 5 * c * (c + 1) / 2);
    scores(c, d, QT, KT, s.rho[1], P2, kept, soon);
    transpose(P2, cp, c, c, P2T, cp);
    weigh_rows(c, cp, gates.eta, P2T, P2T);
    MIRAS_STAGE("hidden read-out", 2 * c * d * hd + c * (c + 1) * hd, hd * d + d * c + 2 * hd * c + c * (c + 1) / 2);
    if (gates.momentum) {
      weigh_momenta(c, s.rho);
      hidden_product(c, s.momenta[1], QT, partT, ReadSoon());
    }
    sweep_hidden<2>(c, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
      const index_t at = index_t(i) * cp + j;
      Tile<R, N> z;
      z.add(Rows{W2 + index_t(i) * dp, dp}, QT + j, cp, 0, d, soon);
      z.scale_cols(gates.gamma + j);
      if (gates.momentum) z.add_scaled_cols(partT + at, cp, carry[1] + j);
      z.subtract(Rows{GzT + index_t(i) * cp, cp}, P2T + j, cp, 0, minimum(c, j + N * kLanes));
      z.store_to(AqT + at, cp);
    });
  }

  // Uq = gamma * (Aq W1T) - P1 U1, with momentum + carry * (Aq S1'), and in its place X = LN(Uq)
  void read_out(int c, const MlpState& s, const KeptScores& kept, WriteSoon soon) {
    const float* W1T = s.primal[0];
    MIRAS_STAGE("pairs", c * (c + 1) * hd, 2 * hd * c + c * (c + 1) / 2);
    scores(c, hd, AqT, AT, s.rho[0], P1, kept, soon);
    MIRAS_STAGE("read-out", 2 * c * d * hd + c * (c + 1) * d, hd * c + hd * d + c * (c + 1) / 2 + 5 * c * d);
    weigh_rows(c, dp, gates.eta, Gu, U1);
    if (gates.momentum) {
      predict(c, hd, AqT, cp, s.momenta[0], dp, part, ReadSoon());
      weigh_rows(c, dp, carry[0], part, part);
    }
    sweep(c, dp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
      Tile<R, N> u;
      u.add(Cols{AqT + i, cp}, W1T + j, dp, 0, hd);
      u.scale_rows(gates.gamma + i);
      if (gates.momentum) u.add_matrix(part + index_t(i) * dp + j, dp);
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
static void read_states(const StateTensor (&x)[2], int64_t n, int64_t h, int d, int hd, float* const (&to)[2], index_t dp) {
  read_state(x[0], n, h, 0, d, hd, to[0], dp);
  read_state(transposed(x[1]), n, h, 0, d, hd, to[1], dp);
}
// to contiguous rows; `spare` [D x round_up(Hd)] is overwritten
static void write_states(const StateTensor (&x)[2], int64_t n, int64_t h, int d, int hd, float* const (&from)[2], index_t dp,
                         float* spare) {
  write_state(x[0], n, h, 0, d, hd, from[0], dp, spare);
  copy_out(from[1], dp, hd, d, x[1].data + n * x[1].seq + h * x[1].head, x[1].row);
}

// ---- checkpoints: duals, then momenta, [2 or 4][Hd x D] ----
struct Checkpoint {
  float* data;
  int matrices, d, hd;
  index_t dp;

  MIRAS_FN Checkpoint(const MlpParams& p, int64_t n, int64_t h, int64_t chunk)
      : matrices(p.momentum ? 4 : 2), d(p.D), hd(p.Hd), dp(round_up(p.D, kPad)) {
    data = p.checkpoints + ((p.slot(n) + chunk / p.checkpoint_every) * p.H + h) * matrices * hd * d;
  }
  MIRAS_FN float* matrix(int i) const { return data + int64_t(i) * hd * d; }

  void write(const MlpState& s) const {
    for (int i = 0; i < matrices; ++i) copy_out(s.matrix(i), dp, hd, d, matrix(i), d);
  }
  void read(const MlpState& s) const {
    for (int i = 0; i < matrices; ++i) copy_in(matrix(i), d, hd, d, s.matrix(i), dp);
  }
};

}  // namespace miras::cpu::MIRAS_LEVEL
