// The attentional bias applied to the rows of a chunk: the only place where the kernels use psi. Everything else is the same for all
// biases and compiled once; one call handles a whole chunk.
//
//   c tokens   Dvp value channels of the task, padded; matrices are [c x Dvp] float32 unless said otherwise
#pragma once

#include "math.h"

namespace miras::cpu::MIRAS_LEVEL {

struct BiasRows {
  int c, cols;  // cols = Dvp
  const MemoryParams& p;
  const float* eta;    // [c], or [c x Dvp] in kernels with kChannelEta
  const float* delta;  // [c], or [c x Dvp] if per_channel; null if the bias uses none
  bool per_channel;    // delta is
  const float* v;      // [c x ldv]
  index_t ldv;
};

template <class Bias, bool kChannelEta> struct BiasKernels {
  // eta of one token, as one vector of channels reads it
  MIRAS_INLINE Vec row_eta(const BiasRows& x, int t) { return kChannelEta ? zeros() : broadcast(x.eta[t]); }
  MIRAS_INLINE Vec eta_at(const BiasRows& x, int t, int j, Vec row) { return kChannelEta ? load(x.eta + index_t(t) * x.cols + j) : row; }

  // What the rows of one token share: delta, or coefficients from |e|^2.
  template <class Error> MIRAS_INLINE typename Bias::template Row<Vec> shared(const Bias& bias, const BiasRows& x, int t, Error&& error) {
    const Vec delta = Bias::kUsesDelta && !x.per_channel ? broadcast(x.delta[t]) : zeros();
    Vec norm2 = zeros();
    if constexpr (Bias::kCouplesRow) {
      for (int j = 0; j < x.cols; j += kLanes) {
        const Vec e = error(j);
        norm2 += e * e;
      }
      norm2 = broadcast(sum(norm2));
    }
    return bias.row(norm2, delta);
  }

  // ... as one vector of channels reads it.
  template <class Row> MIRAS_INLINE Row at(const BiasRows& x, int t, int j, const Row& row) {
    if constexpr (Bias::kUsesDelta && !Bias::kCouplesRow) {
      if (x.per_channel) return load(x.delta + index_t(t) * x.cols + j);
    }
    return row;
  }

  MIRAS_INLINE Vec error(const float* kw, const float* v, int j) {
    if constexpr (Bias::kPredicts) return load(kw + j) - load(v + j);
    else return -load(v + j);
  }

  // Forward: u = eta psi(E) over K W0' in place; u_end = to_end * u unless null.
  static void write(const BiasRows& x, float* kw_u, const float* to_end, float* u_end) {
    const Bias bias(x.p.bias_params);
    for (int t = 0; t < x.c; ++t, kw_u += x.cols) {
      const float* v = x.v + t * x.ldv;
      const auto row = shared(bias, x, t, [&](int j) MIRAS_LAMBDA { return error(kw_u, v, j); });
      const Vec eta = row_eta(x, t), end = to_end ? broadcast(to_end[t]) : zeros();
      for (int j = 0; j < x.cols; j += kLanes) {
        const Vec u = eta_at(x, t, j, eta) * bias.value(error(kw_u, v, j), at(x, t, j, row));
        store(kw_u + j, u);
        if (to_end) store(u_end + index_t(t) * x.cols + j, end * u);
      }
    }
  }

  // Backward, first half: E over K W0' in place, g = psi(E).
  static void grade(const BiasRows& x, float* kw_e, float* g) {
    const Bias bias(x.p.bias_params);
    for (int t = 0; t < x.c; ++t, kw_e += x.cols, g += x.cols) {
      const float* v = x.v + t * x.ldv;
      const auto row = shared(bias, x, t, [&](int j) MIRAS_LAMBDA { return error(kw_e, v, j); });
      for (int j = 0; j < x.cols; j += kLanes) {
        const Vec e = error(kw_e, v, j);
        store(kw_e + j, e);
        store(g + j, bias.value(e, at(x, t, j, row)));
      }
    }
  }

  // Backward, second half: from dU, over it in place, dE = psi'(E) (eta dU); d eta = dU . g [c] or dU o g [c x Dvp]; d delta
  // [c] or [c x Dvp].
  static void pull_back(const BiasRows& x, const float* e, const float* g, float* du_de, float* deta, float* ddelta) {
    const Bias bias(x.p.bias_params);
    for (int t = 0; t < x.c; ++t, e += x.cols, g += x.cols, du_de += x.cols) {
      const auto row = shared(bias, x, t, [&](int j) MIRAS_LAMBDA { return load(e + j); });
      const Vec eta = row_eta(x, t);
      Vec pull = zeros();
      if constexpr (Bias::kCouplesRow) {  // pull . eta dU
        for (int j = 0; j < x.cols; j += kLanes) {
          const Vec du = load(du_de + j);
          pull += bias.pull(load(e + j), row) * (kChannelEta ? eta_at(x, t, j, eta) * du : du);
        }
        pull = kChannelEta ? broadcast(sum(pull)) : eta * broadcast(sum(pull));
      }
      Vec eta_sum = zeros(), delta_sum = zeros();
      for (int j = 0; j < x.cols; j += kLanes) {
        const auto r = at(x, t, j, row);
        const Vec ej = load(e + j), gj = load(g + j), du = load(du_de + j), y = eta_at(x, t, j, eta) * du;
        if constexpr (kChannelEta) store(deta + index_t(t) * x.cols + j, du * gj);
        else eta_sum += du * gj;
        Vec de = bias.slope(ej, gj, r) * y;
        if constexpr (Bias::kCouplesRow) de += pull * ej;
        store(du_de + j, de);
        if constexpr (Bias::kUsesDelta) {
          const Vec per_delta = bias.slope_delta(ej, r) * y;
          if (x.per_channel) store(ddelta + index_t(t) * x.cols + j, per_delta);
          else delta_sum += per_delta;
        }
      }
      if constexpr (!kChannelEta) deta[t] = sum(eta_sum);
      if (Bias::kUsesDelta && !x.per_channel) ddelta[t] = sum(delta_sum);
    }
  }
};

}  // namespace miras::cpu::MIRAS_LEVEL
