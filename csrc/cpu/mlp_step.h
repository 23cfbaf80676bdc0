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
  float *alpha, *gamma;        // [kPad], all the same
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
    alpha = a.take(1, kPad), gamma = a.take(1, kPad);
    gz = a.take(1, kLanes), aq = a.take(1, kLanes), sums = a.take(kLanes, kLanes);
    spare = a.take(p.state.primal && dp != p.D ? p.Hd : 0, dp);
  }
};

// Rows are fetched so many units ahead: what the hardware foresees ends with a page.
constexpr int kAhead = 16;

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

// The sums along rows of `units` rows, cols wide, in a vector: those of f(columns), a function of r that gives a vector
template <class Function> MIRAS_FN Vec unit_sums(int units, int cols, float* sums, Function&& f) {
  for (int r = 0; r < kLanes; ++r) store(sums + r * kLanes, zeros());
  each_columns(cols, [&](const auto c) MIRAS_LAMBDA {
    const auto part = f(c);
    for (int r = 0; r < units; ++r) store(sums + r * kLanes, load(sums + r * kLanes) + part(r));
  });
  return row_sums(sums);
}

// What the columns of a piece see of a row of scratch, to stay in registers
template <class C> struct Held {
  Vec x[C::kVectors];
  MIRAS_FN Held(const C& c, const float* row) {
    MIRAS_UNROLL
    for (int n = 0; n < C::kVectors; ++n) x[n] = c.padded(row, n);
  }
  MIRAS_FN Vec operator[](int n) const { return x[n]; }
};

// M_h . x of the first `units` rows of M
MIRAS_INLINE Vec row_products(const float* M, int units, int cols, const float* x, float* sums) {
  return unit_sums(units, cols, sums, [&]<class C>(const C c) MIRAS_LAMBDA {
    return [=, held = Held<C>(c, x)](int r) MIRAS_LAMBDA {
      const float* row = M + index_t(r) * cols;
      c.prefetch(row + index_t(kAhead) * cols);
      Vec total = zeros();
      MIRAS_UNROLL
      for (int n = 0; n < C::kVectors; ++n) total += c.load(row, n) * held[n];
      return total;
    };
  });
}

// The scalars of a token's write and read
struct MlpGates {
  float theta, alpha, gamma;
};

// S <- theta S - weight x',  A <- alpha A + S of one vector of one row; what the read-out takes of it: A, or
// gamma W_0 + rho (A - gamma A_0)
template <bool kMapped, bool kMomentum, class C>
MIRAS_INLINE Vec write_vector(const StepMatrix& m, index_t row, const C& c, int n, const MlpGates& gates, float weight, Vec x, float rho) {
  Vec a = gates.alpha * c.load(m.dual + row, n);
  if constexpr (kMomentum) {
    const Vec step = gates.theta * c.load(m.momentum + row, n) - weight * x;
    c.store(m.momentum + row, n, step);
    a += step;
  } else {
    a -= weight * x;
  }
  c.store(m.dual + row, n, a);
  if constexpr (!kMapped) return a;
  return gates.gamma * c.load(m.primal + row, n) + rho * (a - gates.gamma * c.load(m.start + row, n));
}

// First pass: A and slope, and X = u
static void predict_hidden(const StepMatrix& first, const StepMatrix& second, const MlpStepScratch& s) {
  const float *S1 = first.predicting(), *S2 = second.predicting(), *A = s.A;
  const int d = first.cols, hd = first.rows;
  fill_zero(s.X, s.norm.dp);
  for (int i = 0; i < hd; i += kLanes) {
    const int units = minimum(kLanes, hd - i);
    const Gelu gelu(row_products(S2 + index_t(i) * d, units, d, s.K, s.sums));
    store(s.A + i, gelu.value()), store(s.slope + i, gelu.slope());
    each_columns(d, [&]<class C>(const C& c) MIRAS_LAMBDA {
      Held<C> u(c, s.X);
      for (int r = 0; r < units; ++r) {
        const float* row = S1 + index_t(i + r) * d;
        c.prefetch(row + index_t(kAhead) * d);
        MIRAS_UNROLL
        for (int n = 0; n < C::kVectors; ++n) u.x[n] += A[i + r] * c.load(row, n);
      }
      MIRAS_UNROLL
      for (int n = 0; n < C::kVectors; ++n) c.pad(s.X, n, u[n]);
    });
  }
}

// Second pass: both matrices, and Uq
template <bool kMapped, bool kMomentum>
static void write_and_read_hidden(const StepMatrix& first_, const StepMatrix& second_, const MlpStepScratch& s, float eta,
                                  const MlpGates gates) {
  // By value: vector stores may alias anything, so what is behind a reference would be loaded again after each of them.
  const StepMatrix first = first_, second = second_;
  const float *S1 = first.predicting(), *A = s.A, *gz = s.gz, *aq = s.aq;
  const int d = first.cols, hd = first.rows;
  const float rho1 = first.read_scale(), rho2 = second.read_scale();
  fill_zero(s.Uq, s.norm.dp);
  for (int i = 0; i < hd; i += kLanes) {
    const int units = minimum(kLanes, hd - i);
    store(s.gz, eta * (row_products(S1 + index_t(i) * d, units, d, s.Gu, s.sums) * load(s.slope + i)));
    const Vec zq = unit_sums(units, d, s.sums, [&]<class C>(const C c) MIRAS_LAMBDA {
      return [=, k = Held<C>(c, s.K), q = Held<C>(c, s.Q)](int r) MIRAS_LAMBDA {
        const index_t row = index_t(i + r) * d;
        c.prefetch(second.dual + row + index_t(kAhead) * d);
        Vec total = zeros();
        MIRAS_UNROLL
        for (int n = 0; n < C::kVectors; ++n)
          total += q[n] * write_vector<kMapped, kMomentum>(second, row, c, n, gates, gz[r], k[n], rho2);
        return total;
      };
    });
    store(s.aq, Gelu(zq).value());
    each_columns(d, [&]<class C>(const C c) MIRAS_LAMBDA {
      const Held<C> u1(c, s.U1);
      Held<C> u(c, s.Uq);
      for (int r = 0; r < units; ++r) {
        const index_t row = index_t(i + r) * d;
        c.prefetch(first.dual + row + index_t(kAhead) * d);
        MIRAS_UNROLL
        for (int n = 0; n < C::kVectors; ++n)
          u.x[n] += aq[r] * write_vector<kMapped, kMomentum>(first, row, c, n, gates, A[i + r], u1[n], rho1);
      }
      MIRAS_UNROLL
      for (int n = 0; n < C::kVectors; ++n) c.pad(s.Uq, n, u[n]);
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

  decay.advance(p.log_decay ? address<float>(p.log_decay, n, t, h) : nullptr, 0, kPad, first.primal);
  const MlpGates gates{first.momentum ? *address<float>(p.momentum, n, t, h) : 0.0f, *decay.alpha, *decay.gamma};
  if (first.momentum) {
    if (first.primal) write_and_read_hidden<true, true>(first, second, s, eta, gates);
    else write_and_read_hidden<false, true>(first, second, s, eta, gates);
  } else {
    if (first.primal) write_and_read_hidden<true, false>(first, second, s, eta, gates);
    else write_and_read_hidden<false, false>(first, second, s, eta, gates);
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
