// What the decoding steps of both memories share: a decoder's buffers, read and written in place (docs/mathematics.md, section 11).
// The writes of an open chunk's tokens are kept as factors, with weights:
//
//   A = gamma A_0 + kappa_0 D + kappa_1 S_0 + sum_i left_i (kappa_(2+i) o right_i)'    S = mu_1 S_0 + sum_i mu_(2+i) left_i right_i'
//
// Matrices are written when the chunk closes, and when there are so many factors that adding them to D means reading less.
//
// A matrix [K x V] and factors [R x K], [R x V] have rows without padding. Scratch rows have it (Kp, Vp).
#pragma once

#include "step_products.h"

namespace miras::cpu::MIRAS_LEVEL {

// ---- where a head's state is ----

// The order of a task's heads, alternately forwards and backwards: of a state larger than a cache, the part that was read last is still
// cached for the next token. In one fixed order it would have been evicted.
struct HeadOrder {
  int64_t first, last;
  int step;  // 1 or -1
  MIRAS_FN HeadOrder(const MemoryParams& p, const StepBuffers& x, int64_t first, int64_t last)
      : first(first), last(last), step(first < last && x.position[first / p.H] % 2 ? -1 : 1) {}
  MIRAS_FN int64_t head(int64_t turn) const { return step > 0 ? turn : first + last - 1 - turn; }
};

// One matrix of one head, and the factors of the open chunk's writes to it
struct StepMatrix {
  int rows, cols;  // K, V
  LastAxis last;
  float *start, *primal, *written, *momenta, *rho;  // null if absent
  float* result;                                    // the next chunk's start
  float *left, *right;                              // [R x K], [R x V]

  MIRAS_FN StepMatrix(const StepBuffers& x, int64_t index, int K, int V, LastAxis last) : rows(K), cols(V), last(last) {
    const int64_t at = index * K * V;
    const auto matrix = [at](float* base) { return base ? base + at : nullptr; };
    start = matrix(x.start), primal = matrix(x.primal), written = matrix(x.written), momenta = matrix(x.momenta);
    result = x.result ? x.result + at : start;
    rho = x.rho ? x.rho + index : nullptr;
    left = x.left + index * x.rows * K, right = x.right + index * x.rows * V;
  }

  // W_0, which predictions are made with
  MIRAS_FN const float* predicting() const { return primal ? primal : start; }
  MIRAS_FN float read_scale() const { return rho ? *rho : 1.0f; }
  MIRAS_FN index_t size() const { return index_t(rows) * cols; }
};

// A head's decays, and the weights of the terms of its state.
struct StepWeights {
  float *weights, *momentum_weights, *open_log_decay;  // [2 + R, width], [2 + R] or null, [width]: in the buffers
  int width;
  float *alpha, *gamma;  // [Vp], the same in all columns unless decays are channel-wise

  MIRAS_FN StepWeights(const StepBuffers& x, int64_t head, float* alpha, float* gamma) : width(x.width), alpha(alpha), gamma(gamma) {
    weights = x.weights + head * (2 + x.rows) * width;
    momentum_weights = x.momentum_weights ? x.momentum_weights + head * (2 + x.rows) : nullptr;
    open_log_decay = x.open_log_decay + head * width;
  }
  MIRAS_FN const float* row(int i) const { return weights + index_t(i) * width; }
  MIRAS_FN bool nonzero(int i) const {
    for (int j = 0; j < width; ++j)
      if (row(i)[j] != 0.0f) return true;
    return false;
  }
  // How many of the first `count` tokens have weights of 0, up to the first that has not
  MIRAS_FN int folded(int count) const {
    int i = 0;
    if (width == 1)
      while (i + kLanes <= count && largest(Math<Vec>::abs(load(weights + 2 + i))) == 0.0f) i += kLanes;
    while (i < count && !nonzero(2 + i)) ++i;
    return i;
  }
  // Token `row` of the chunk, with log-decays x, `stride` apart, or null: S <- theta S + left right', A <- alpha A + S.
  void advance(const float* x, int64_t stride, float momentum, int row, int vp) const {
    decay(x, stride, vp);
    const int before = 2 + row;
    if (width > 1) return advance_channels(momentum, before, vp);
    for (int j = 0; j <= before; j += kLanes) {
      const int n = minimum(kLanes, before + 1 - j);
      const IVec at = iota() + j;
      const Vec one = at == before ? broadcast(1.0f) : zeros();
      Vec step = one;
      if (momentum_weights) {
        step = at < before ? momentum * load_first(momentum_weights + j, n) : one;
        store_first(momentum_weights + j, step, n);
      }
      store_first(weights + j, at < before ? load(alpha) * load_first(weights + j, n) + (momentum_weights ? step : zeros()) : one, n);
    }
  }

  // The state consists of its start and D with this weight; S_0 has weight 0 in A and 1 in S.
  MIRAS_FN void restart(float weight) const {
    for (int j = 0; j < width; ++j) weights[j] = weight, weights[width + j] = 0.0f;
    if (momentum_weights) momentum_weights[0] = 0.0f, momentum_weights[1] = 1.0f;
  }
  // The weights of tokens first <= i < count become 0.
  MIRAS_FN void drop(int first, int count) const {
    fill_zero(weights + index_t(2 + first) * width, index_t(count - first) * width);
    if (momentum_weights) fill_zero(momentum_weights + 2 + first, count - first);
  }

  // alpha, and gamma after it
  void decay(const float* x, int64_t stride, int vp) const {
    if (x)
      for (int j = 0; j < width; ++j) open_log_decay[j] += x[j * stride];
    if (width == 1) {
      const Vec both = exp_nonpositive(iota() == 0 ? broadcast(x ? *x : 0.0f) : broadcast(*open_log_decay));
      for (int j = 0; j < vp; j += kLanes) store(alpha + j, broadcast(both[0])), store(gamma + j, broadcast(both[1]));
      return;
    }
    for (int j = 0; j < width; ++j) alpha[j] = x ? x[j * stride] : 0.0f, gamma[j] = open_log_decay[j];
    for (int j = 0; j < vp; j += kLanes)
      store(alpha + j, exp_nonpositive(load(alpha + j))), store(gamma + j, exp_nonpositive(load(gamma + j)));
  }

 private:
  void advance_channels(float momentum, int before, int vp) const {
    for (int i = 0; i <= before; ++i) {
      const float step = i == before ? 1.0f : momentum_weights ? momentum_weights[i] *= momentum : 0.0f;
      float* const row = weights + index_t(i) * width;
      each_columns(width, [&](const auto& c) MIRAS_LAMBDA {
        for (int n = 0; n < c.kVectors; ++n) c.store(row, n, i < before ? c.padded(alpha, n) * c.load(row, n) + step : zeros() + step);
      });
    }
    if (momentum_weights) momentum_weights[before] = 1.0f;
  }
};

// ---- matrices ----

// Scratch for writing them
struct StepSpare {
  float* right;      // [R x Vp]
  float* scales[3];  // [Vp]
  float* matrix[3];  // [K x Vp]  where Vp > V

  MIRAS_FN StepSpare(Arena& a, const StepBuffers& x, int rows, int cols) {
    const int vp = round_up(cols, kPad), height = vp == cols ? 0 : rows;
    right = a.take(x.rows, vp);
    for (float*& scale : scales) scale = a.take(1, vp);
    for (float*& room : matrix) room = a.take(height, vp);
  }
};

// The tokens [first, last) of an open chunk
struct TokenRange {
  int first, last;
  MIRAS_FN int count() const { return last - first; }
};

// A sum of matrices, with weights of their columns, and of a chunk's writes
class StepSum {
 public:
  MIRAS_FN StepSum(const StepMatrix& m, const StepSpare& s) : m_(m), s_(s), vp_(round_up(m.cols, kPad)) {}

  // weight [width]
  MIRAS_FN void add(const float* matrix, const float* weight, int width) {
    if (vp_ != m_.cols) copy_in(matrix, m_.cols, m_.rows, m_.cols, s_.matrix[terms_], vp_), matrix = s_.matrix[terms_];
    float* const scale = s_.scales[terms_];
    if (width > 1) copy_in(weight, width, 1, width, scale, vp_);
    else
      for (int j = 0; j < vp_; j += kLanes) store(scale + j, broadcast(*weight));
    matrix_[terms_++] = matrix;
  }

  // to = the sum, with the tokens' weights [R x width]; `to` may be one of the added matrices
  void write(TokenRange tokens, const float* weights, int width, float* to) const {
    each_columns(m_.cols, [&](const auto& c) MIRAS_LAMBDA {
      for (int i = 0; i < tokens.count(); ++i) {
        const float *weight = weights + index_t(tokens.first + i) * width, *right = m_.right + index_t(tokens.first + i) * m_.cols;
        for (int n = 0; n < c.kVectors; ++n)
          c.pad(s_.right + index_t(i) * vp_, n, c.load(right, n) * (width > 1 ? c.load(weight, n) : broadcast(*weight)));
      }
    });
    const float* left = m_.left + index_t(tokens.first) * m_.rows;
    float* const room = vp_ == m_.cols ? to : s_.matrix[0];
    sweep(m_.rows, vp_, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
      Tile<R, N> a;
      a.add(Cols{left + i, m_.rows}, s_.right + j, vp_, 0, tokens.count());
      MIRAS_UNROLL
      for (int term = 0; term < 3; ++term)
        if (term < terms_) a.add_scaled_cols(matrix_[term] + index_t(i) * vp_ + j, vp_, s_.scales[term] + j);
      a.store_to(room + index_t(i) * vp_ + j, vp_);
    });
    if (room != to) copy_out(room, vp_, m_.rows, m_.cols, to, m_.cols);
  }

 private:
  const StepMatrix& m_;
  const StepSpare& s_;
  int vp_, terms_ = 0;
  const float* matrix_[3];
};

// to = start, columns weighted, + left right', of one token, whose weight is 1
static void write_token(const StepMatrix& m, const float* weight, int width, float* to) {
  each_columns(m.cols, [&]<class C>(const C& c) MIRAS_LAMBDA {
    Vec right[C::kVectors], scale[C::kVectors];
    MIRAS_UNROLL
    for (int n = 0; n < C::kVectors; ++n) right[n] = c.load(m.right, n), scale[n] = width > 1 ? c.load(weight, n) : broadcast(*weight);
    for (int i = 0; i < m.rows; ++i) {
      const index_t row = index_t(i) * m.cols;
      const Vec left = broadcast(m.left[i]);
      MIRAS_UNROLL
      for (int n = 0; n < C::kVectors; ++n) c.store(to + row, n, left * right[n] + c.load(m.start + row, n) * scale[n]);
    }
  });
}

// A, or without the chunk's start only its writes, into `to`, which may be one of the matrices; then S in place of S_0.
static void write_matrices(const StepMatrix& m, const StepWeights& w, const StepSpare& spare, TokenRange tokens, bool with_start,
                           float* to) {
  StepSum a(m, spare);
  if (with_start) a.add(m.start, w.gamma, w.width);
  if (m.written && w.nonzero(0)) a.add(m.written, w.row(0), w.width);
  if (m.momenta && w.nonzero(1)) a.add(m.momenta, w.row(1), w.width);
  a.write(tokens, w.row(2), w.width, to);
  if (!m.momenta) return;
  StepSum s(m, spare);
  s.add(m.momenta, w.momentum_weights + 1, 1);
  s.write(tokens, w.momentum_weights + 2, 1, m.momenta);
}

// W_0 = phi(A_0), rho
static void map_start(const Retention& gate, const StepMatrix& m, const StepSpare& spare) {
  if (!m.primal) return;
  const int ld = round_up(m.cols, kPad);
  Rho scale;
  if (ld == m.cols) {
    scale = gate.primal({m.rows, m.cols, ld, m.last}, m.start, m.primal);
  } else {
    copy_in(m.start, m.cols, m.rows, m.cols, spare.matrix[0], ld);
    scale = gate.primal({m.rows, m.cols, ld, m.last}, spare.matrix[0], spare.matrix[0]);
    copy_out(spare.matrix[0], ld, m.rows, m.cols, m.primal, m.cols);
  }
  if (m.rho) *m.rho = scale.value;
}

// The tokens whose factors the next token, the chunk's `row`-th, has to read. Reading D takes as long as reading the factors of
// K V / (K + V) tokens. So the factors are added to D when there are a few more than that, or just a few if D is read anyway.
constexpr int kFew = 8;
template <int kMatrices>
static TokenRange fold(const StepMatrix (&matrices)[kMatrices], const StepWeights& w, const StepSpare& spare, int row) {
  const StepMatrix& m = matrices[0];
  const TokenRange tokens{w.folded(row), row};
  const bool reads_written = m.written && w.nonzero(0);
  if (tokens.count() < kFew + (reads_written ? 0 : m.rows * m.cols / (m.rows + m.cols))) return tokens;
  for (const StepMatrix& each : matrices) write_matrices(each, w, spare, tokens, false, each.written);
  w.restart(1.0f);
  w.drop(tokens.first, row);
  return {row, row};
}

// After a chunk's last token: the next chunk starts from the dual.
template <int kMatrices>
static void close_chunk(const Retention& gate, StepMatrix (&matrices)[kMatrices], const StepWeights& w, const StepSpare& spare,
                        TokenRange tokens) {
  for (StepMatrix& m : matrices) {
    if (m.written || m.momenta) write_matrices(m, w, spare, tokens, true, m.result);
    else write_token(m, w.gamma, w.width, m.result);  // every token is a chunk
    m.start = m.result;
    map_start(gate, m, spare);
  }
  w.restart(0.0f);
  for (int j = 0; j < w.width; ++j) w.open_log_decay[j] = 0.0f;
}

// ---- a state as a value ----

// The buffer `written` holds the dual: becomes D = A - gamma A_0, or A_0 = A if no chunk is open.
template <int kMatrices>
static void begin_value(const Retention& gate, const StepMatrix (&matrices)[kMatrices], const StepWeights& w, const StepSpare& spare,
                        bool open, int vp) {
  w.restart(open ? 1.0f : 0.0f);
  if (open) w.decay(nullptr, 0, vp);
  for (const StepMatrix& m : matrices) {
    if (!open) {
      __builtin_memcpy(m.start, m.written, size_t(m.size()) * sizeof(float));
    } else {
      each_columns(m.cols, [&](const auto& c) MIRAS_LAMBDA {
        for (index_t at = 0; at < m.size(); at += m.cols)
          for (int n = 0; n < c.kVectors; ++n)
            c.store(m.written + at, n, c.load(m.written + at, n) - c.padded(w.gamma, n) * c.load(m.start + at, n));
      });
    }
    map_start(gate, m, spare);
  }
}

// `written` becomes the dual again.
template <int kMatrices>
static void end_value(const StepMatrix (&matrices)[kMatrices], const StepWeights& w, const StepSpare& spare, TokenRange tokens) {
  for (const StepMatrix& m : matrices) {
    if (tokens.last > 0) write_matrices(m, w, spare, tokens, true, m.written);
    else __builtin_memcpy(m.written, m.start, size_t(m.size()) * sizeof(float));
  }
}

}  // namespace miras::cpu::MIRAS_LEVEL
