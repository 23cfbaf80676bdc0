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
// no padding. Functions that take a Part do its share: of the hidden units or of the tokens, as their comments say.
//
// With pairs (operand.h) all products read rounded operands, also the small ones, of the scores: these share their operands with large
// products, which read them in this form alone. States, gates, sums, LayerNorm, biases and GELU are float32.
#pragma once

#include "layer_norm.h"
#include "mlp_state.h"
#include "parts.h"

namespace miras::cpu::MIRAS_LEVEL {

struct MlpChunk {
  int d, dp, hd, cp;
  Retention retention;
  Gates gates;
  LayerNorm norm;
  Operand K, Q;                // [C x Dp]
  float* V;                    // [C x Dp]
  float *KT, *QT;              // [D x Cp]
  float *X, *E, *G;            // [C x Dp]  LN(A W1T) without its affine part; M(K), then its error; psi
  Operand Gu;                  // [C x Dp]  g_u
  float* GuT;                  // [D x Cp]
  Operand U1, U1_end, K_end;   // [C x Dp]  eta Gu; (eta gamma_c / gamma_t) times Gu and K
  Operand AT, GzT;             // [Hd x Cp]
  float *slopeT, *HT;          // [Hd x Cp]  gelu'(Z); gelu''(Z) o Ga, null in the forward
  Operand AqT;                 // [Hd x Cp]  gelu(Zq)
  Operand P1, P2;              // [C x Cp]  rho L o (Aq A'), rho L o (Q K')
  float *AqA, *P2T;            // [C x Cp]  Aq A', if there will be a backward; P2' with row s times eta_s
  float *reads, *Xq;           // [C x Dp]  gamma * (Aq W1T); LN(Uq) without its affine part
  float *r, *rq, *weight;      // [Cp]  1 / std of the two; eta gamma_c / gamma_t
  float *last_rows, *delta;    // [2 x Cp] of each part, [Cp]
  // With momentum, M in place of L and to_end in place of gamma_c / gamma_t, and:
  float *step_weight, *carry[2];  // [Cp]  eta step_end; rho b
  Operand U1_step, K_step;        // [C x Dp]  step_weight times Gu and K
  float *partT, *part;            // [Hd x Cp], [C x Dp]  what S, or its gradient, adds to a product with A, or J

  // The backward has X, r, AT, GzT, slopeT and HT of `segment` chunks, in the forward 0: those of one, without HT.
  MIRAS_FN MlpChunk(Arena& a, const MlpParams& p, int64_t segment)
      : d(p.D), dp(round_up(p.D, kPad)), hd(p.Hd), cp(round_up(p.C, kPad)), retention(p), gates(a, p), norm(a, p) {
    const int64_t n = segment ? segment : 1;
    constexpr int kCopies = kAlong | kDown, kAll = kFloat | kCopies;
    K = Operand(a, p.C, dp, kAll), Q = Operand(a, p.C, dp, kAll), V = a.take(p.C, dp);
    KT = a.take(d, cp), QT = a.take(d, cp);
    X = a.take(n * p.C, dp), E = a.take(p.C, dp), G = a.take(p.C, dp), Gu = Operand(a, p.C, dp, kAll);
    GuT = a.take(d, cp);
    U1 = Operand(a, p.C, dp, kAll), U1_end = Operand(a, p.C, dp, kFloat | kDown), K_end = Operand(a, p.C, dp, kFloat | kDown);
    AT = Operand(a, hd, cp, kCopies, n), GzT = Operand(a, hd, cp, kCopies, n), slopeT = a.take(n * hd, cp);
    HT = segment ? a.take(n * hd, cp) : nullptr, AqT = Operand(a, hd, cp, kAll);
    P1 = Operand(a, p.C, cp, kAll), P2 = Operand(a, p.C, cp, kFloat | kDown);
    AqA = p.scores ? a.take(p.C, cp) : nullptr, P2T = a.take(p.C, cp);
    reads = a.take(p.C, dp), Xq = a.take(p.C, dp);
    r = a.take(n, cp), rq = a.take(1, cp), weight = a.take(1, cp);
    last_rows = a.take(2 * p.parts, cp), delta = a.take(1, cp);
    const int momentum = gates.momentum;
    step_weight = a.take(momentum, cp), carry[0] = a.take(momentum, cp), carry[1] = a.take(momentum, cp);
    U1_step = Operand(a, momentum * p.C, dp, kFloat | kDown), K_step = Operand(a, momentum * p.C, dp, kFloat | kDown);
    partT = a.take(momentum * hd, cp), part = a.take(momentum * p.C, dp);
  }

  // Once per task: the head's parameters, and zeros right of the diagonals, where nothing is written later.
  void begin(const MlpParams& p, int64_t h) {
    norm.read(p, h);
    P1.clear(p.C, cp), P2.clear(p.C, cp);
    if (AqA) fill_zero(AqA, int64_t(p.C) * cp);
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
    view(p, p.k, b, token, h).read(c, K.x, dp);
    view(p, p.v, b, token, h).read(c, V, dp);
    K.pack_along(c, dp);
    transpose_operand(K, c, d, dp, KT, cp);
    if (p.delta) read_gate(p.delta, b, token, h, c, delta);
  }
  // Reads what the read-out needs in addition.
  void read_queries(const MlpParams& p, int64_t b, int64_t token, int64_t h, int c) {
    view(p, p.q, b, token, h).read(c, Q.x, dp);
    Q.pack_along(c, dp);
    transpose_operand(Q, c, d, dp, QT, cp);
  }

  MIRAS_FN BiasRows bias_rows(const MlpParams& p, Range tokens, const float* eta) const {
    return {tokens.count(), dp, p, eta + tokens.first, p.delta ? delta + tokens.first : nullptr, false, V + index_t(tokens.first) * dp, dp};
  }

  // Sweeps a matrix with a row per hidden unit and a column per token.
  template <int N = kTileVectors, class Function> MIRAS_FN void sweep_hidden(Range units, int c, Function&& f) const {
    sweep<N>(units, round_up(c, kPad), f);
  }

  // gelu(Z) and, if wanted, its derivatives, [Hd x Cp] all; one of them may be in Z's place.
  void gelu(Range units, int c, const float* Z, Element* value, float* slope = nullptr, float* curvature = nullptr) const {
    const auto vectors = [&]<int M>(index_t at) MIRAS_LAMBDA {
      Vec z[M];
      in_turn<M>([&](int m) MIRAS_LAMBDA { z[m] = load(Z + at + m * kLanes); });
      const Gelus<M> gelu(z);
      in_turn<M>([&](int m) MIRAS_LAMBDA { store(value + at + m * kLanes, gelu.value(m)); });
      if (slope) in_turn<M>([&](int m) MIRAS_LAMBDA { store(slope + at + m * kLanes, gelu.slope(m)); });
      if (curvature) in_turn<M>([&](int m) MIRAS_LAMBDA { store(curvature + at + m * kLanes, gelu.curvature(m)); });
    };
    const int cols = round_up(c, kPad), rows = cols == cp ? 1 : units.count();  // full rows follow one another
    const index_t n = index_t(cols) * units.count() / rows;
    for (int i = 0; i < rows; ++i) {
      index_t at = index_t(units.first + i) * cp;
      const index_t end = at + n;
      for (; end - at >= kGelus * kLanes; at += kGelus * kLanes) vectors.template operator()<kGelus>(at);
      for (; at < end; at += kLanes) vectors.template operator()<1>(at);
    }
  }

  // The last axis of W1 [D, Hd] runs down its transpose, that of W2 [Hd, D] along its rows.
  MIRAS_FN StateShape shape(int i) const { return {hd, d, dp, i == 0 ? LastAxis::down : LastAxis::along}; }

  // W = phi(A) and rho
  void find_primal(const MlpState& s) const {
    for (int i = 0; i < 2; ++i) s.rho[i] = retention.identity ? Rho() : retention.primal(shape(i), s.dual[i], s.primal[i]);
  }
  // The same, a matrix by each part
  void find_primal(const MlpParams& p, const MlpState& s) const {
    if (retention.identity) return find_primal(s);
    in_parts(p, p.C, [&](const Part& mine) {
      for (int i = mine.index; i < 2; i += p.parts) s.rho[i] = retention.primal(shape(i), s.dual[i], s.primal[i]);
    });
  }

  // Hidden units: two matrices as products read them
  void pack(Range units, const Operand (&matrices)[2]) const {
    for (const Operand& x : matrices) x.pack(units, dp);
  }
  // Columns of a matrix with a column per token: those of c tokens
  MIRAS_FN ColumnRange columns(int c) const { return {cp, Range(round_up(c, kPad))}; }

  // S X' [Hd x Cp] for a matrix S of a state and rows X, given transposed
  void hidden_product(Range units, int c, const Operand& S, const float* XT, float* to, ReadSoon soon) const {
    sweep_hidden(units, c, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
      Tile<R, N> z;
      z.add(by_rows(S.along, dp).at(i), XT + j, cp, 0, d, soon);
      z.store_to(to + index_t(i) * cp + j, cp);
    });
  }

  // A' B [c x Dp], a sum over the rows of A [Hd x Cp] and B [Hd x Dp], a block of rows at a time: rows lie so far apart that the first-level
  // cache holds few of them. sum_units: the whole. In two steps, for a stage that goes on with a tile: sum_blocks, all but the last block,
  // and add_sum, with that the whole.
  static constexpr int kBlock = kLanes == 8 ? 64 : int(kMaxHidden);
  MIRAS_FN int last_block() const { return (hd - 1) / kBlock * kBlock; }
  template <int kSign = 1> void sum_blocks(Range tokens, const float* A, const float* B, float* partial) const {
    for (int k = 0; k < last_block(); k += kBlock) {
      sweep(tokens, dp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
        Tile<R, N> x;
        float* const to = partial + index_t(i) * dp + j;
        if (k > 0) x.add_matrix(to, dp);
        x.template accumulate<kSign>(Cols{A + i, cp}, B + j, dp, k, k + kBlock);
        x.store_to(to, dp);
      });
    }
  }
  template <int kSign = 1, int R, int N>
  MIRAS_FN void add_sum(Tile<R, N>& x, int i, int j, const float* A, const float* B, const float* partial) const {
    if (last_block() > 0) x.add_matrix(partial + index_t(i) * dp + j, dp);
    x.template accumulate<kSign>(Cols{A + i, cp}, B + j, dp, last_block(), hd);
  }
  void sum_units(Range tokens, const float* A, const float* B, float* to) const {
    sum_blocks(tokens, A, B, to);
    sweep(tokens, dp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
      Tile<R, N> x;
      add_sum(x, i, j, A, B, to);
      x.store_to(to + index_t(i) * dp + j, dp);
    });
  }

  // Columns of dst = rows of src [C x Dp]
  MIRAS_FN void transpose_rows(Range tokens, const Operand& src, float* dst) const {
    src.pack_along(tokens, dp);
    transpose_operand(src, tokens, d, dp, dst, cp);
  }

  // ---- the inner gradients at a state: A, X, E, G, Gu, Gz ----

  // Hidden units: A, gelu'(Z), gelu''(Z) in HT
  void predict_hidden(const Part& mine, int c, const MlpState& s, ReadSoon soon) {
    MIRAS_STAGE("hidden units", 2 * c * d * hd, hd * d + d * c + hd * c);
    float* const Z = kPairs ? AqT.x : AT.x;  // AqT comes later
    hidden_product(mine.units, c, s.primal[1], KT, Z, mine.once(soon));
    MIRAS_STAGE("gelu", 0, 3 * hd * c);
    gelu(mine.units, c, Z, AT.along, slopeT, HT);
  }

  // Tokens: E, G, Gu and U1 from X
  void errors(const Part& mine, const MlpParams& p, const BiasTable& bias) {
    const Range tokens = mine.tokens;
    if (tokens.count() == 0) return;
    const index_t at = index_t(tokens.first) * dp;
    norm.affine(tokens, X, K, E);
    bias.grade(bias_rows(p, tokens, gates.eta), E + at, G + at);
    norm.pull_back_weighted(tokens, X, r, G, Gu);
    weigh_rows(tokens, dp, gates.eta, Gu, U1);
    U1.pack_down(tokens, dp);
  }

  // Tokens: rows of so many numbers, [C x round_up(cols)], to and from a chunk's part of MlpParams::products or scores
  MIRAS_FN static void keep(Range tokens, const float* rows, int cols, float* kept) {
    const index_t first = tokens.first, ld = round_up(cols, kPad);
    copy_out(rows + first * ld, ld, tokens.count(), cols, kept + first * cols, cols);
  }
  MIRAS_FN static void restore(Range tokens, const float* kept, int cols, float* rows) {
    const index_t first = tokens.first, ld = round_up(cols, kPad);
    copy_in(kept + first * cols, cols, tokens.count(), cols, rows + first * ld, ld);
  }

  // Tokens: U = A W1T, in X
  void predict_rows(const Part& mine, const MlpState& s) {
    MIRAS_STAGE("predict", 2 * mine.tokens.count() * d * hd, (hd + d) * mine.tokens.count() + hd * d);
    sum_units(mine.tokens, AT.down, s.primal[0].down, X);
  }

  // Tokens: X from U, errors, and what is written to the states
  void find_errors(const Part& mine, const MlpParams& p, const BiasTable& bias) {
    const Range tokens = mine.tokens;
    MIRAS_STAGE("row pass", 0, 19 * tokens.count() * d);
    norm.normalise(tokens, X, r);
    errors(mine, p, bias);
    transpose_rows(tokens, Gu, GuT);
    const auto weigh = [&](const float* factors, const float* rows, const Operand& to) MIRAS_LAMBDA {
      weigh_rows(tokens, dp, factors, rows, to);
      to.pack_down(tokens, dp);
    };
    weigh(weight, Gu, U1_end), weigh(weight, K, K_end);
    if (gates.momentum) weigh(step_weight, Gu, U1_step), weigh(step_weight, K, K_step);
  }

  // Hidden units: Gz, HT
  void hidden_gradient(const Part& mine, int c, const MlpState& s, ReadSoon soon) {
    const Rows W1T = by_rows(s.primal[0].along, dp);
    MIRAS_STAGE("hidden gradient", 2 * c * d * hd, hd * d + d * c + 2 * hd * c);
    ReadSoon once = mine.once(soon);
    sweep_hidden(mine.units, c, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
      const index_t at = index_t(i) * cp + j;
      Tile<R, N> x;
      x.add(W1T.at(i), GuT + j, cp, 0, d, once);
      if (HT) x.multiply_into(HT + at, cp);
      x.multiply(slopeT + at, cp);
      x.store_to(GzT.along + at, cp);
    });
  }

  // Hidden units: dual and momentum i after the chunk; next may be the same as s.
  void advance_matrix(int i, const Part& mine, int c, const MlpState& s, const MlpState& next, ReadSoon soon) const {
    MIRAS_STAGE("update", 2 * c * d * hd, hd * c + c * d + 2 * hd * d);
    const Rows left = by_rows(i == 0 ? AT.along : GzT.along, cp);
    const Scaled momenta{s.momenta[i], gates.momenta_end(c)};
    advance(c, mine.units, left, i == 0 ? U1_end.down : K_end.down, dp, {s.dual[i], gates.end(c)}, next.dual[i], mine.once(soon), momenta);
    if (!gates.momentum) return;
    const Scaled steps{s.momenta[i], gates.step_momenta_end(c)};
    advance(c, mine.units, left, i == 0 ? U1_step.down : K_step.down, dp, steps, next.momenta[i], ReadSoon());
  }

  // ---- the read-out ----

  // [C x Cp]  L (M with momentum) and Theta, which the backward needs, or null; X Y', kept unless it is null, or given
  struct Kept {
    float *L, *Theta, *XY;
  };

  // Tokens: P = rho L o (X Y')  [c x Cp] for queries X and keys Y, both transposed; with width 0 from X Y'
  void scores(const Part& mine, int width, const float* XT, const float* YT, const Rho& rho, float* P, const Kept& kept, WriteSoon soon) {
    const Cols x{XT, cp};
    const Range tokens = mine.tokens;
    float* const last = last_rows + index_t(mine.index) * 2 * cp;
    if (gates.momentum) {
      const auto run = kept.L ? momentum_scores<true, Cols, float> : momentum_scores<false, Cols, float>;
      run(gates, tokens, width, x, YT, cp, last, P, kept.L, kept.Theta, kept.XY, mine.once(soon), {});
    } else {
      const auto run = kept.L ? decayed_scores<true, Cols, float> : decayed_scores<false, Cols, float>;
      run(gates, tokens, width, x, YT, cp, last, P, kept.L, kept.XY, mine.once(soon), {});
    }
    if (retention.scales_reads) scale(rho.value, index_t(tokens.count()) * cp, P + index_t(tokens.first) * cp);
  }

  // Tokens: P2 and its transpose, and carry = rho b
  void query_scores(const Part& mine, int c, const MlpState& s, const Kept& kept) {
    const Range tokens = mine.tokens;
    MIRAS_STAGE("pairs", c * (c + 1) * d, 2 * d * c + 5 * c * (c + 1) / 2);
    scores(mine, d, QT, KT, s.rho[1], P2, kept, WriteSoon());
    for (int t = tokens.first; t < tokens.last; ++t) {
      const index_t row = index_t(t) * cp;  // P1 comes later
      int j = 0;
      for (; j <= t; j += kLanes) store(P1.along + row + j, load(gates.eta + j) * load(P2 + row + j));
      for (; j < c; j += kLanes) store(P1.along + row + j, zeros());  // the chunk before may have left NaN there
    }
    transpose_operand(P1, tokens, c, cp, P2T, cp);
    for (int i = 0; i < 2 && gates.momentum; ++i)
      for (int t = tokens.first; t < tokens.last; t += kLanes) store(carry[i] + t, s.rho[i].value * load(gates.b + t));
  }

  // Hidden units: Zq' = gamma * (W2 Q') - Gz' (P2 eta)'  over AqT, with momentum + carry * (S2 Q')
  void read_hidden(const Part& mine, int c, const MlpState& s) {
    const Rows W2 = by_rows(s.primal[1].along, dp), Gz = by_rows(GzT.along, cp);
    MIRAS_STAGE("hidden read-out", 2 * c * d * hd + c * (c + 1) * hd, hd * d + d * c + 2 * hd * c + c * (c + 1) / 2);
    if (gates.momentum) hidden_product(mine.units, c, s.momenta[1], QT, partT, ReadSoon());
    sweep_hidden<2>(mine.units, c, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
      const index_t at = index_t(i) * cp + j;
      Tile<R, N> z;
      z.add(W2.at(i), QT + j, cp, 0, d);
      z.scale_cols(gates.gamma + j);
      if (gates.momentum) z.add_scaled_cols(partT + at, cp, carry[1] + j);
      z.subtract(Gz.at(i), P2T + j, cp, 0, minimum(c, j + N * kLanes));
      z.store_to(AqT + at, cp);
    });
  }

  // Tokens: Uq = gamma * (Aq W1T) - P1 U1, with momentum + carry * part, part = Aq S1'; and in its place X = LN(Uq). Its first term,
  // `reads`, and Aq A' are given or computed.
  template <bool kGiven> void read_out(const Part& mine, const MlpState& s, WriteSoon soon) {
    const float* W1T = s.primal[0].down;
    const Range tokens = mine.tokens;
    const int inner = kGiven ? 0 : hd;
    MIRAS_STAGE("pairs", tokens.count() * (tokens.count() + 1) * inner, tokens.count() * (2 * inner + (tokens.count() + 1) / 2));
    scores(mine, inner, AqT.down, AT.down, s.rho[0], P1, {nullptr, nullptr, AqA}, soon);
    P1.pack_along(tokens, cp);
    MIRAS_STAGE("read-out", tokens.count() * (2 * inner + tokens.count() + 1) * d, tokens.count() * (inner + 4 * d) + inner * d);
    if (gates.momentum) sum_units(tokens, AqT.down, s.momenta[0].down, part);
    if constexpr (!kGiven) sum_blocks(tokens, AqT.down, W1T, reads);
    sweep(tokens, dp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
      const index_t at = index_t(i) * dp + j;
      Tile<R, N> u;
      if constexpr (kGiven) {
        u.add_matrix(reads + at, dp);
      } else {
        add_sum(u, i, j, AqT.down, W1T, reads);
        u.scale_rows(gates.gamma + i);
        u.store_to(reads + at, dp);
      }
      if (gates.momentum) u.add_scaled_rows(part + at, dp, carry[0] + i);
      u.subtract(by_rows(P1.along, cp).at(i), U1.down + j, dp, 0, i + R);
      u.store_to(Xq + at, dp);
    });
    norm.normalise(tokens, Xq, rq);
  }
};

}  // namespace miras::cpu::MIRAS_LEVEL
