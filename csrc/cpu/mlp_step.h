// Decoding steps of the MLP memory M(x) = x + LN(W1 gelu(W2 x)) on a decoder's buffers (docs/mathematics.md, section 11). Hidden
// unit h has a row in each matrix, S1 = W1' and S2 = W2 [Hd x D]. At the chunk's start, with the primals W_0:
//
//   z_h = S2_h . k    a_h = gelu(z_h)    u = sum_h a_h S1_h    e = k + LN(u) - v    gu = LN'(psi(e))    gz_h = (S1_h . gu) gelu'(z_h)
//
// A write has the factors left, right = a, -eta gu of S1 and -eta gz, k of S2, with equal weights. Then
//
//   zq_h = R2_h . q    aq_h = gelu(zq_h)    uq = sum_h aq_h R1_h    o = q + LN(uq)
//
// with R = gamma W_0 + rho (kappa_0 D + kappa_1 S_0 + sum_i left_i (kappa_(2+i) right_i)'), which is never formed. A task is one
// head of one sequence. Two passes over the hidden units, kLanes of them at a time: sums along rows become one vector with an
// element per unit.
#pragma once

#include "layer_norm.h"
#include "step.h"

namespace miras::cpu::MIRAS_LEVEL {

struct MlpStepScratch {
  LayerNorm norm;
  float *K, *Q, *V, *O;   // [Dp]
  float *X, *E, *G, *Gu;  // [Dp]  LN(u) without its affine part; M(k), then its error; psi; gu
  float *Uq, *more;       // [Dp]  uq, and in its place LN(uq)
  float *A, *slope, *Aq;  // [Hdp]  gelu(z), gelu'(z), gelu(zq)
  float *Zq, *changed;    // [Hdp]  W2 q; (R2 - gamma W_0) q / rho without the token's own write
  float* delta;           // [kPad]
  float *alpha, *gamma;   // [Dp], all the same
  float* scores;          // [R]
  StepSpare spare;

  MIRAS_FN MlpStepScratch(Arena& a, const MlpStep& p) : MlpStepScratch(a, p, round_up(p.D, kPad), round_up(p.Hd, kPad)) {}

 private:
  MIRAS_FN MlpStepScratch(Arena& a, const MlpStep& p, int dp, int hdp)
      : norm(a, p), K(a.take(1, dp)), Q(a.take(1, dp)), V(a.take(1, dp)), O(a.take(1, dp)), X(a.take(1, dp)), E(a.take(1, dp)),
        G(a.take(1, dp)), Gu(a.take(1, dp)), Uq(a.take(1, dp)), more(a.take(1, dp)), A(a.take(1, hdp)), slope(a.take(1, hdp)),
        Aq(a.take(1, hdp)), Zq(a.take(1, hdp)), changed(a.take(1, hdp)), delta(a.take(1, kPad)), alpha(a.take(1, dp)), gamma(a.take(1, dp)),
        scores(a.take(1, round_up(p.state.rows, kPad))), spare(a, p.state, p.Hd, p.D) {}
};

// y += factor x over n floats, a multiple of kPad
static void add_multiple(float factor, const float* x, int n, float* y) {
  for (int j = 0; j < n; j += kLanes) store(y + j, load(y + j) + factor * load(x + j));
}

// scores_i = kappa_(2+i) (factor_i . x) of the tokens, from the first of them on
static void score_tokens(const float* factors, TokenRange tokens, int cols, const float* x, const StepWeights& w, const MlpStepScratch& s) {
  factors += index_t(tokens.first) * cols;
  for (int i = 0; i < tokens.count(); i += kLanes) {
    const int n = minimum(kLanes, tokens.count() - i);
    const Vec dots = row_products<false>(factors + index_t(i) * cols, n, cols, x).x;
    store(s.scores + i, dots * load_first(w.row(2 + tokens.first) + i, n));
  }
}

// y += sum_r x_r M_r over `rows` rows of M
MIRAS_INLINE void add_rows(const float* M, int rows, int cols, const float* x, float* y) {
  each_columns(cols, [&]<class C>(const C& c) MIRAS_LAMBDA {
    Held<C> sum(c, y);
    for (int r = 0; r < rows; ++r) {
      const float* row = M + index_t(r) * cols;
      MIRAS_UNROLL
      for (int n = 0; n < C::kVectors; ++n) sum.x[n] += x[r] * c.load(row, n);
    }
    MIRAS_UNROLL
    for (int n = 0; n < C::kVectors; ++n) c.pad(y, n, sum[n]);
  });
}

// y += factor M x of a whole matrix
static void add_product(float factor, const float* M, int rows, int cols, const float* x, float* y) {
  for (int i = 0; i < rows; i += kLanes) {
    const Vec product = row_products<false>(M + index_t(i) * cols, minimum(kLanes, rows - i), cols, x).x;
    store(y + i, load(y + i) + factor * product);
  }
}

// The first pass: A and slope, X = u and Zq
static void predict_hidden(const StepMatrix& first, const StepMatrix& second, const MlpStepScratch& s) {
  const float *S1 = first.predicting(), *S2 = second.predicting(), *A = s.A;
  const int d = first.cols, hd = first.rows;
  fill_zero(s.X, s.norm.dp);
  for (int i = 0; i < hd; i += kLanes) {
    const int units = minimum(kLanes, hd - i);
    const RowProducts z = row_products<true>(S2 + index_t(i) * d, units, d, s.K, s.Q);
    const Gelus<1> gelu(&z.x);
    store(s.A + i, gelu.value(0)), store(s.slope + i, gelu.slope(0)), store(s.Zq + i, z.x2);
    add_rows(S1 + index_t(i) * d, units, d, A + i, s.X);
  }
}

// The second pass: what the token writes to W2, Aq, and Uq = W1 aq. Of token `row` of the chunk, own_score weighs its own write.
static void read_hidden(const StepMatrix& first, const StepMatrix& second, const MlpStepScratch& s, float eta, float gamma, int row,
                        float own_score) {
  const float* S1 = first.predicting();
  const int d = first.cols, hd = first.rows;
  const float rho = second.read_scale();
  float* const left = second.left + index_t(row) * hd;
  fill_zero(s.Uq, s.norm.dp);
  for (int i = 0; i < hd; i += kLanes) {
    const int units = minimum(kLanes, hd - i);
    const Vec gz = row_products<false>(S1 + index_t(i) * d, units, d, s.Gu).x * load(s.slope + i);
    store_first(left + i, -eta * gz, units);
    const Vec zq = gamma * load(s.Zq + i) + rho * (load(s.changed + i) - own_score * (eta * gz));
    store(s.Aq + i, Gelus<1>(&zq).value(0));
    add_rows(S1 + index_t(i) * d, units, d, s.Aq + i, s.Uq);
  }
}

// Token t, the last of `tokens` in its chunk
static void mlp_step_token(const MlpStep& p, const BiasTable& bias, const MlpStepScratch& s, const StepMatrix& first,
                           const StepMatrix& second, const StepWeights& w, int64_t n, int64_t h, int64_t t, TokenRange tokens) {
  const int d = p.D, hd = p.Hd, dp = s.norm.dp, row = tokens.last - 1, before = tokens.count() - 1;
  ChunkView{p.k, p.dtype, n, t, h, 0, d}.read(1, s.K, 0);
  ChunkView{p.q, p.dtype, n, t, h, 0, d}.read(1, s.Q, 0);
  ChunkView{p.v, p.dtype, n, t, h, 0, d}.read(1, s.V, 0);
  const float eta = *address<float>(p.lr, n, t, h);
  if (p.delta) read_gate(p.delta, n, t, h, 1, s.delta);

  float r;
  predict_hidden(first, second, s);
  s.norm.normalise(1, s.X, &r);
  s.norm.affine(1, s.X, s.K, s.E);
  bias.grade({1, dp, p, nullptr, p.delta ? s.delta : nullptr, false, s.V, 0}, s.E, s.G);
  s.norm.pull_back_weighted(1, s.X, &r, s.G, s.Gu);

  const float momentum = p.momentum ? *address<float>(p.momentum, n, t, h) : 0.0f;
  w.advance(p.log_decay ? address<float>(p.log_decay, n, t, h) : nullptr, 0, momentum, row, dp);
  const float gamma = *w.gamma, minus_eta = -eta;
  weigh_rows(1, dp, &minus_eta, s.Gu, s.more);
  copy_out(s.A, 0, 1, hd, first.left + index_t(row) * hd, 0);
  copy_out(s.more, 0, 1, d, first.right + index_t(row) * d, 0);
  copy_out(s.K, 0, 1, d, second.right + index_t(row) * d, 0);

  // The terms of the state besides its start and factors, with their weights
  const Scaled older[] = {{first.written, w.row(0)}, {first.momenta, w.row(1)}};
  const float* const older_second[] = {second.written, second.momenta};
  score_tokens(second.right, tokens, d, s.Q, w, s);
  products<false>(second.left + index_t(tokens.first) * hd, before, hd, s.scores, s.changed);
  for (int i = 0; i < 2; ++i)
    if (older[i].state && *older[i].scale != 0.0f) add_product(*older[i].scale, older_second[i], hd, d, s.Q, s.changed);
  read_hidden(first, second, s, eta, gamma, row, s.scores[before]);

  score_tokens(first.left, tokens, hd, s.Aq, w, s);
  float* const changed = s.E;
  products<false>(first.right + index_t(tokens.first) * d, tokens.count(), d, s.scores, changed);
  for (const Scaled& x : older) {
    if (!x.state || *x.scale == 0.0f) continue;
    products<false>(x.state, hd, d, s.Aq, s.more);
    add_multiple(*x.scale, s.more, dp, changed);
  }
  scale(gamma, dp, s.Uq);
  add_multiple(first.read_scale(), changed, dp, s.Uq);
  s.norm.normalise(1, s.Uq, &r);
  s.norm.affine(1, s.Uq, s.Q, s.O);
  ChunkView{p.out, p.dtype, n, t, h, 0, d}.write(1, s.O, 0);
}

static void mlp_step(const MlpStep& p, int64_t first, int64_t last) {
  FlushDenormals flush;
  Arena measure(nullptr);
  MlpStepScratch(measure, p);
  Arena arena(thread_scratch(size_t(measure.used())));
  MlpStepScratch s(arena, p);
  const BiasTable bias = bias_table(p);
  const Retention gate(p);
  for (float* x : {s.more, s.E}) fill_zero(x, s.norm.dp);  // the padding

  const HeadOrder order(p, p.state, first, last);
  for (int64_t turn = first; turn < last; ++turn) {
    const int64_t i = order.head(turn), n = i / p.H, h = i % p.H;
    s.norm.read(p, h);
    StepMatrix matrices[] = {{p.state, 2 * i, p.Hd, p.D, LastAxis::down}, {p.state, 2 * i + 1, p.Hd, p.D, LastAxis::along}};
    const StepWeights w(p.state, i, s.alpha, s.gamma);
    int position = int(p.state.position[n]), row = position;
    if (p.state.by_value) begin_value(gate, matrices, w, s.spare, position > 0, s.norm.dp), row = 0;
    TokenRange tokens{0, row};
    for (int64_t t = 0; t < p.T; ++t) {
      tokens = fold(matrices, w, s.spare, tokens.last), ++tokens.last;
      mlp_step_token(p, bias, s, matrices[0], matrices[1], w, n, h, t, tokens);
      if (++position == p.C) close_chunk(gate, matrices, w, s.spare, tokens), position = 0, tokens = {0, 0};
    }
    if (p.state.by_value) end_value(matrices, w, s.spare, tokens);
  }
}

}  // namespace miras::cpu::MIRAS_LEVEL
