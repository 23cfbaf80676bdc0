// Tokens of the MLP memory M(x) = x + LN(W1 gelu(W2 x)) one after the other, on a decoder's buffers (SPEC section 5). Hidden
// unit h has a row in each matrix, S1 = W1' and S2 = W2 [Hd x D]. At the chunk's start, with the primals W_0:
//
//   z_h = S2_h . k    a_h = gelu(z_h)    u = sum_h a_h S1_h    e = k + LN(u) - v    gu = LN'(psi(e))    gz_h = (S1_h . gu) gelu'(z_h)
//
// and then, S2_h <- alpha S2_h - eta gz_h k' and S1_h <- alpha S1_h - eta a_h gu' (through the momenta where there are some):
//
//   zq_h = R2_h . q    aq_h = gelu(zq_h)    uq = sum_h aq_h R1_h    o = q + LN(uq)       R = gamma W_0 + rho (A - gamma A_0)
//
// (R = A without a mirror map). A task is one head of one sequence. Two passes over the hidden units, kLanes of them at a time:
// what is a sum along a row becomes one vector with an element per unit.
#pragma once

#include "layer_norm.h"
#include "step.h"

namespace miras::cpu::MIRAS_LEVEL {

struct MlpStepScratch {
  LayerNorm norm;
  float *K, *Q, *V, *O;        // [Dp]
  float *X, *E, *G, *Gu;       // [Dp]  LN(u) without its affine part; M(k), then its error; psi; gu
  float *U1, *Uq;              // [Dp]  eta gu; uq, and LN(uq) over it
  float *A, *slope;            // [Hdp]  gelu(z), gelu'(z)
  float *delta;                // [kPad]
  float *alpha, *gamma;        // [Dp]
  float *gz, *aq;              // [kLanes]  eta gz and gelu(zq) of the units at hand
  float* sums;                 // [kLanes x kLanes]
  float* spare;                // [Hd x Dp]

  MIRAS_FN MlpStepScratch(Arena& a, const MlpStep& p) : norm(a, p) {
    const int dp = norm.dp, hdp = round_up(p.Hd, kPad);
    K = a.take(1, dp), Q = a.take(1, dp), V = a.take(1, dp), O = a.take(1, dp);
    X = a.take(1, dp), E = a.take(1, dp), G = a.take(1, dp), Gu = a.take(1, dp);
    U1 = a.take(1, dp), Uq = a.take(1, dp);
    A = a.take(1, hdp), slope = a.take(1, hdp);
    delta = a.take(1, kPad);
    alpha = a.take(1, dp), gamma = a.take(1, dp);
    gz = a.take(1, kLanes), aq = a.take(1, kLanes), sums = a.take(kLanes, kLanes);
    spare = a.take(p.state.primal && dp != p.D ? p.Hd : 0, dp);
  }
};

// Sums along the rows of `parts` [kLanes x kLanes], the sum of row r in lane r.
MIRAS_INLINE Vec row_sums(const float* parts) {
  Vec total = zeros();
  MIRAS_UNROLL
  for (int quad = 0; quad < kLanes; quad += 4) {
    Vec x[4];
    transpose_quads(parts + quad, kLanes, x);
    total += (x[0] + x[1]) + (x[2] + x[3]);
  }
  return total;
}

// The sums of f(r) for r < units, in lane r; zero in the others
template <class Function> MIRAS_FN Vec unit_sums(int units, float* sums, Function&& f) {
  for (int r = 0; r < units; ++r) store(sums + r * kLanes, f(r));
  for (int r = units; r < kLanes; ++r) store(sums + r * kLanes, zeros());
  return row_sums(sums);
}

// M_h . x of the first `units` rows of M
MIRAS_INLINE Vec row_products(const float* M, int units, int cols, const float* x, float* sums) {
  return unit_sums(units, sums, [&](int r) MIRAS_LAMBDA {
    Vec total = zeros();
    const float* row = M + index_t(r) * cols;
    each_columns(cols, [&](const auto& c) MIRAS_LAMBDA {
      constexpr int N = std::remove_reference_t<decltype(c)>::kVectors;
      MIRAS_UNROLL
      for (int n = 0; n < N; ++n) total += c.load(row, n) * c.padded(x, n);
    });
    return total;
  });
}

// S <- theta S - weight x',  A <- alpha A + S of one vector of one row; what the read-out takes of it: A, or
// gamma W_0 + rho (A - gamma A_0)
template <bool kMapped, bool kMomentum, class C>
MIRAS_INLINE Vec write_vector(const StepMatrix& m, index_t row, const C& c, int n, float theta, float weight, const float* x,
                              const float* alpha, const float* gamma, float rho) {
  Vec a = c.padded(alpha, n) * c.load(m.dual + row, n);
  if constexpr (kMomentum) {
    const Vec step = theta * c.load(m.momentum + row, n) - weight * c.padded(x, n);
    c.store(m.momentum + row, n, step);
    a += step;
  } else {
    a -= weight * c.padded(x, n);
  }
  c.store(m.dual + row, n, a);
  if constexpr (!kMapped) return a;
  const Vec g = c.padded(gamma, n);
  return g * c.load(m.primal + row, n) + rho * (a - g * c.load(m.start + row, n));
}

// First pass: A and slope, and X = u
static void predict_hidden(const StepMatrix& first, const StepMatrix& second, const MlpStepScratch& s) {
  const float *S1 = first.predicting(), *S2 = second.predicting();
  const int d = first.cols, hd = first.rows;
  fill_zero(s.X, s.norm.dp);
  for (int i = 0; i < hd; i += kLanes) {
    const int units = minimum(kLanes, hd - i);
    const Gelu gelu(row_products(S2 + index_t(i) * d, units, d, s.K, s.sums));
    store(s.A + i, gelu.value()), store(s.slope + i, gelu.slope());
    each_columns(d, [&](const auto& c) MIRAS_LAMBDA {
      constexpr int N = std::remove_reference_t<decltype(c)>::kVectors;
      Vec u[N];
      MIRAS_UNROLL
      for (int n = 0; n < N; ++n) u[n] = c.padded(s.X, n);
      for (int r = 0; r < units; ++r) {
        const float* row = S1 + index_t(i + r) * d;
        const Vec a = broadcast(s.A[i + r]);
        MIRAS_UNROLL
        for (int n = 0; n < N; ++n) u[n] += a * c.load(row, n);
      }
      MIRAS_UNROLL
      for (int n = 0; n < N; ++n) c.pad(s.X, n, u[n]);
    });
  }
}

// Second pass: both matrices, and Uq
template <bool kMapped, bool kMomentum>
static void write_and_read_hidden(const StepMatrix& first, const StepMatrix& second, const MlpStepScratch& s, float eta, float theta) {
  const float* S1 = first.predicting();
  const int d = first.cols, hd = first.rows;
  const float rho1 = first.read_scale(), rho2 = second.read_scale();
  fill_zero(s.Uq, s.norm.dp);
  for (int i = 0; i < hd; i += kLanes) {
    const int units = minimum(kLanes, hd - i);
    store(s.gz, eta * (row_products(S1 + index_t(i) * d, units, d, s.Gu, s.sums) * load(s.slope + i)));
    const Vec zq = unit_sums(units, s.sums, [&](int r) MIRAS_LAMBDA {
      Vec total = zeros();
      each_columns(d, [&](const auto& c) MIRAS_LAMBDA {
        constexpr int N = std::remove_reference_t<decltype(c)>::kVectors;
        MIRAS_UNROLL
        for (int n = 0; n < N; ++n) {
          const Vec w = write_vector<kMapped, kMomentum>(second, index_t(i + r) * d, c, n, theta, s.gz[r], s.K, s.alpha, s.gamma, rho2);
          total += w * c.padded(s.Q, n);
        }
      });
      return total;
    });
    store(s.aq, Gelu(zq).value());
    each_columns(d, [&](const auto& c) MIRAS_LAMBDA {
      constexpr int N = std::remove_reference_t<decltype(c)>::kVectors;
      Vec u[N];
      MIRAS_UNROLL
      for (int n = 0; n < N; ++n) u[n] = c.padded(s.Uq, n);
      for (int r = 0; r < units; ++r) {
        MIRAS_UNROLL
        for (int n = 0; n < N; ++n) {
          const index_t row = index_t(i + r) * d;
          u[n] += s.aq[r] * write_vector<kMapped, kMomentum>(first, row, c, n, theta, s.A[i + r], s.U1, s.alpha, s.gamma, rho1);
        }
      }
      MIRAS_UNROLL
      for (int n = 0; n < N; ++n) c.pad(s.Uq, n, u[n]);
    });
  }
}

static void mlp_step_token(const MlpStep& p, const BiasTable& bias, const MlpStepScratch& s, const StepMatrix& first,
                           const StepMatrix& second, const StepDecay& decay, int64_t n, int64_t h, int64_t t) {
  const int dp = s.norm.dp;
  ChunkView{p.k, p.dtype, n, t, h, 0, p.D}.read(1, s.K, 0);
  ChunkView{p.q, p.dtype, n, t, h, 0, p.D}.read(1, s.Q, 0);
  ChunkView{p.v, p.dtype, n, t, h, 0, p.D}.read(1, s.V, 0);
  const float eta = *address<float>(p.lr, n, t, h);
  if (p.delta) read_gate(p.delta, n, t, h, 1, s.delta);

  float r;
  predict_hidden(first, second, s);
  s.norm.normalise(1, s.X, &r);
  s.norm.affine(1, s.X, s.K, s.E);
  bias.grade({1, dp, p.bias_params, nullptr, p.delta ? s.delta : nullptr, false, s.V, 0}, s.E, s.G);
  s.norm.pull_back_weighted(1, s.X, &r, s.G, s.Gu);
  weigh_rows(1, dp, &eta, s.Gu, s.U1);

  decay.advance(p.log_decay ? address<float>(p.log_decay, n, t, h) : nullptr, 0, dp, first.primal);
  if (first.momentum) {
    const float theta = *address<float>(p.momentum, n, t, h);
    if (first.primal) write_and_read_hidden<true, true>(first, second, s, eta, theta);
    else write_and_read_hidden<false, true>(first, second, s, eta, theta);
  } else {
    if (first.primal) write_and_read_hidden<true, false>(first, second, s, eta, 0.0f);
    else write_and_read_hidden<false, false>(first, second, s, eta, 0.0f);
  }
  s.norm.normalise(1, s.Uq, &r);
  s.norm.affine(1, s.Uq, s.Q, s.O);
  ChunkView{p.out, p.dtype, n, t, h, 0, p.D}.write(1, s.O, 0);
}

static void mlp_step(const MlpStep& p, int64_t first, int64_t last) {
  FlushDenormals flush;
  Arena measure(nullptr);
  MlpStepScratch(measure, p);
  Arena arena(thread_scratch(size_t(measure.used())));
  MlpStepScratch s(arena, p);
  const BiasTable bias = bias_table(p.bias, p.bias_params);
  const Retention gate(p.retention, p.retention_params);

  for (int64_t i = first; i < last; ++i) {
    const int64_t n = i / p.H, h = i % p.H;
    s.norm.read(p, h);
    const StepMatrix W1(p.state, 2 * i, p.Hd, p.D, LastAxis::down), W2(p.state, 2 * i + 1, p.Hd, p.D, LastAxis::along);
    const StepDecay decay{p.state.log_decay + i, 1, s.alpha, s.gamma};
    int position = int(p.state.position[n]);
    if (position > 0 && p.state.unmapped) W1.map(gate, s.spare), W2.map(gate, s.spare);
    for (int64_t t = 0; t < p.T; ++t) {
      if (position == 0) W1.open(gate, s.spare), W2.open(gate, s.spare);
      mlp_step_token(p, bias, s, W1, W2, decay, n, h, t);
      if (++position == p.C) position = 0, decay.close();
    }
  }
}

}  // namespace miras::cpu::MIRAS_LEVEL
