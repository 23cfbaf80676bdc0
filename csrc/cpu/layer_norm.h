// LayerNorm over the channels of a chunk's rows, and its vjp.
//
//   c tokens, or a range of them   D channels (Dp padded); matrices are [c x Dp], x is a normalised row, r its 1 / std
#pragma once

#include "pack.h"

namespace miras::cpu::MIRAS_LEVEL {

struct LayerNorm {
  float *weight, *bias;  // [Dp]
  float* real;           // [Dp]  1 for the D channels, 0 for the padding
  float eps;
  int d, dp;
  // Rows are centred a second time: rounding leaves a small mean, which W1 enlarges where its entries are nearly equal, as those of a
  // softmax or a sigmoid are. This costs almost nothing and is up to a hundred times as accurate then.
  bool centres_twice;

  MIRAS_FN LayerNorm(Arena& a, const MlpParams& p)
      : eps(p.ln_eps), d(p.D), dp(round_up(p.D, kPad)), centres_twice(!retention_traits(p.retention).identity) {
    weight = a.take(1, dp), bias = a.take(1, dp), real = a.take(1, dp);
  }

  void read(const MlpParams& p, int64_t h) {
    copy_in(p.ln_weight + h * d, d, 1, d, weight, dp);
    copy_in(p.ln_bias + h * d, d, 1, d, bias, dp);
    for (int j = 0; j < dp; ++j) real[j] = j < d ? 1.0f : 0.0f;
  }

  MIRAS_FN float mean(Vec row_sum) const { return sum(row_sum) / float(d); }

  MIRAS_FN void centre_again(float* row) const {
    if (!centres_twice) return;
    Vec total = zeros();
    for (int j = 0; j < dp; j += kLanes) total += load(row + j);
    const Vec centre = broadcast(mean(total));
    for (int j = 0; j < dp; j += kLanes) store(row + j, (load(row + j) - centre) * load(real + j));
  }

  // x = r (u - mean(u)) over u in place, and r [c]
  void normalise(Range c, float* u_x, float* r) const {
    u_x += index_t(c.first) * dp;
    for (int t = c.first; t < c.last; ++t, u_x += dp) {
      Vec total = zeros(), square = zeros();
      for (int j = 0; j < dp; j += kLanes) total += load(u_x + j);
      const Vec centre = broadcast(mean(total));
      for (int j = 0; j < dp; j += kLanes) {
        const Vec y = (load(u_x + j) - centre) * load(real + j);
        square += y * y;
        store(u_x + j, y);
      }
      centre_again(u_x);  // changes the sum of squares only by the square of a rounding error
      r[t] = 1.0f / __builtin_sqrtf(mean(square) + eps);
      for (int j = 0; j < dp; j += kLanes) store(u_x + j, broadcast(r[t]) * load(u_x + j));
    }
  }

  // y = base + x weight + bias
  void affine(Range c, const float* x, const float* base, float* y) const {
    for (int t = c.first; t < c.last; ++t) {
      const index_t at = index_t(t) * dp;
      for (int j = 0; j < dp; j += kLanes) store(y + at + j, load(base + at + j) + (load(x + at + j) * load(weight + j) + load(bias + j)));
    }
  }

  // One row: du = r (y - m(y) - x m(y x)), m the mean over channels; y(j) is zero in the padding.
  template <class Row> MIRAS_FN void pull_row(const float* x, float r, Row&& y, float* du) const {
    Vec total = zeros(), along = zeros();
    for (int j = 0; j < dp; j += kLanes) {
      store(du + j, y(j));
      total += load(du + j), along += load(du + j) * load(x + j);
    }
    const Vec my = broadcast(mean(total)), mx = broadcast(mean(along)), scale = broadcast(r);
    for (int j = 0; j < dp; j += kLanes) store(du + j, scale * (load(du + j) - my - load(x + j) * mx) * load(real + j));
    centre_again(du);
  }

  // du, the gradient in u of LN(u) without its affine part, for the gradient y of its output
  void pull_back(Range c, const float* x, const float* r, const float* y, float* du) const {
    for (int t = c.first; t < c.last; ++t) {
      const index_t at = index_t(t) * dp;
      pull_row(x + at, r[t], [&](int j) MIRAS_LAMBDA { return load(y + at + j); }, du + at);
    }
  }
  // the same for the gradient y of the whole
  void pull_back_weighted(Range c, const float* x, const float* r, const float* y, float* du) const {
    for (int t = c.first; t < c.last; ++t) {
      const index_t at = index_t(t) * dp;
      pull_row(x + at, r[t], [&](int j) MIRAS_LAMBDA { return load(y + at + j) * load(weight + j); }, du + at);
    }
  }
};

}  // namespace miras::cpu::MIRAS_LEVEL
