// What steps of both memories share: a decoder's buffers, read and written where they are (SPEC section 2, one token after the
// other). An open chunk's tokens are kept as factors of what they wrote, with weights; matrices are written when it closes:
//
//   A = gamma A_0 + kept_0 D + kept_1 S_0 + sum_i left_i (kept_(2+i) o right_i)'    S = moved_1 S_0 + sum_i moved_(2+i) left_i right_i'
//
// A matrix [K x V] and factors [R x K], [R x V] have rows without padding. Scratch rows have it (Kp, Vp), zero.
#pragma once

#include "chunk.h"

namespace miras::cpu::MIRAS_LEVEL {

// A piece of every row of a matrix: kVectors whole vectors from column `first` on, or the last `left` columns in one vector.
template <int N, bool kWhole> struct Columns {
  static constexpr int kVectors = N;
  int first, left;

  MIRAS_FN Vec load(const float* row, int n) const {
    if constexpr (kWhole) return MIRAS_LEVEL::load(row + first + n * kLanes);
    else return load_first(row + first, left);
  }
  MIRAS_FN void store(float* row, int n, Vec x) const {
    if constexpr (kWhole) MIRAS_LEVEL::store(row + first + n * kLanes, x);
    else store_first(row + first, x, left);
  }
  MIRAS_FN void prefetch(const float* row) const {
    MIRAS_UNROLL
    for (int n = 0; n < N; ++n) __builtin_prefetch(row + first + n * kLanes);
  }
  // Rows of scratch are padded.
  MIRAS_FN Vec padded(const float* row, int n) const { return MIRAS_LEVEL::load(row + first + n * kLanes); }
  MIRAS_FN void pad(float* row, int n, Vec x) const { MIRAS_LEVEL::store(row + first + n * kLanes, x); }
};

// f(columns) for pieces that cover V columns; what runs along a row is meant to stay in registers meanwhile
template <class Function> MIRAS_FN void each_columns(int V, Function&& f) {
  constexpr int kWide = kLanes == 16 ? 8 : 4;
  int j = 0;
  for (; V - j >= kWide * kLanes; j += kWide * kLanes) f(Columns<kWide, true>{j, 0});
  for (; V - j >= kWide / 2 * kLanes; j += kWide / 2 * kLanes) f(Columns<kWide / 2, true>{j, 0});
  for (; V - j >= kLanes; j += kLanes) f(Columns<1, true>{j, 0});
  if (j < V) f(Columns<1, false>{j, V - j});
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

// ---- products of a matrix with vectors ----

// y = M' x and, if kTwo, y2 = M' x2, of M [rows x cols], while something of as many rows that is needed next comes nearer
template <bool kTwo>
static void products(const float* M, int rows, int cols, const float* x, float* y, const float* x2 = nullptr, float* y2 = nullptr,
                     const float* soon = nullptr) {
  each_columns(cols, [&]<class C>(const C& c) MIRAS_LAMBDA {
    constexpr int N = C::kVectors;
    Vec sum[N] = {}, sum2[N] = {};
    for (int d = 0; d < rows; ++d) {
      const float* row = M + index_t(d) * cols;
      if (soon) c.prefetch(soon + index_t(d) * cols);
      const Vec xd = broadcast(x[d]), x2d = kTwo ? broadcast(x2[d]) : zeros();
      MIRAS_UNROLL
      for (int n = 0; n < N; ++n) {
        const Vec w = c.load(row, n);
        sum[n] += xd * w;
        if constexpr (kTwo) sum2[n] += x2d * w;
      }
    }
    MIRAS_UNROLL
    for (int n = 0; n < N; ++n) {
      c.pad(y, n, sum[n]);
      if constexpr (kTwo) c.pad(y2, n, sum2[n]);
    }
  });
}

// Rows are fetched so many ahead: what the hardware foresees ends with a page.
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

// An element for each of the first `rows` <= kLanes rows of M: M x and, if kTwo, M x2. sums [2 x kLanes x kLanes]
struct RowProducts {
  Vec x, x2;
};
template <bool kTwo>
MIRAS_INLINE RowProducts row_products(const float* M, int rows, int cols, const float* x, const float* x2, float* sums) {
  float* const sums2 = sums + kLanes * kLanes;
  each_columns(cols, [&]<class C>(const C c) MIRAS_LAMBDA {
    const Held<C> held(c, x), held2(c, kTwo ? x2 : x);
    const bool first = c.first == 0;
    for (int r = 0; r < rows; ++r) {
      const float* row = M + index_t(r) * cols;
      c.prefetch(row + index_t(kAhead) * cols);
      Vec sum = first ? zeros() : load(sums + r * kLanes), sum2 = first || !kTwo ? zeros() : load(sums2 + r * kLanes);
      MIRAS_UNROLL
      for (int n = 0; n < C::kVectors; ++n) {
        const Vec w = c.load(row, n);
        sum += w * held[n];
        if constexpr (kTwo) sum2 += w * held2[n];
      }
      store(sums + r * kLanes, sum);
      if constexpr (kTwo) store(sums2 + r * kLanes, sum2);
    }
  });
  const IVec row = iota();  // the rest of the sums is of other calls
  return {row < rows ? row_sums(sums) : zeros(), kTwo && row < rows ? row_sums(sums2) : zeros()};
}

// ---- where a head's state is ----

// One matrix of one head, and the factors of what the open chunk has written to it
struct StepMatrix {
  int rows, cols;  // K, V
  LastAxis last;
  float *start, *primal, *carried, *momentum, *rho;  // null where there are none
  float *left, *right;                               // [R x K], [R x V]

  MIRAS_FN StepMatrix(const StepBuffers& x, int64_t index, int K, int V, LastAxis last) : rows(K), cols(V), last(last) {
    const int64_t at = index * K * V;
    const auto matrix = [at](float* base) { return base ? base + at : nullptr; };
    start = matrix(x.start), primal = matrix(x.primal), carried = matrix(x.carried), momentum = matrix(x.momentum);
    rho = x.rho ? x.rho + index : nullptr;
    left = x.left + index * x.rows * K, right = x.right + index * x.rows * V;
  }

  // W_0, which predictions are made with
  MIRAS_FN const float* predicting() const { return primal ? primal : start; }
  MIRAS_FN float read_scale() const { return rho ? *rho : 1.0f; }
  MIRAS_FN index_t size() const { return index_t(rows) * cols; }
};

// A head's decays and the weights of what its state is made of.
struct StepWeights {
  float *kept, *moved, *log_decay;  // [2 + R, width], [2 + R] or null, [width]: in the buffers
  int width;
  float *alpha, *gamma;  // [Vp], the same in all columns where decays are not channel-wise

  MIRAS_FN StepWeights(const StepBuffers& x, int64_t head, float* alpha, float* gamma) : width(x.width), alpha(alpha), gamma(gamma) {
    kept = x.kept + head * (2 + x.rows) * width;
    moved = x.moved ? x.moved + head * (2 + x.rows) : nullptr;
    log_decay = x.log_decay + head * width;
  }
  MIRAS_FN const float* kept_by(int row) const { return kept + index_t(row) * width; }
  MIRAS_FN bool keeps(int row) const {
    for (int j = 0; j < width; ++j)
      if (kept_by(row)[j] != 0.0f) return true;
    return false;
  }
  // A weight [width] for Vp columns
  MIRAS_FN void spread(const float* x, int vp, float* row) const {
    if (width > 1) return copy_in(x, width, 1, width, row, vp);
    for (int j = 0; j < vp; j += kLanes) store(row + j, broadcast(*x));
  }

  // Token `row` of the chunk, with log-decays x, `stride` apart, or null: S <- theta S + left right', A <- alpha A + S.
  void advance(const float* x, int64_t stride, float theta, int row, int vp) const {
    decay(x, stride, vp);
    const int before = 2 + row;
    if (width > 1) return advance_channels(theta, before, vp);
    for (int j = 0; j <= before; j += kLanes) {
      const int n = minimum(kLanes, before + 1 - j);
      const IVec at = iota() + j;
      const Vec one = at == before ? broadcast(1.0f) : zeros();
      Vec step = one;
      if (moved) {
        step = at < before ? theta * load_first(moved + j, n) : one;
        store_first(moved + j, step, n);
      }
      store_first(kept + j, at < before ? load(alpha) * load_first(kept + j, n) + (moved ? step : zeros()) : one, n);
    }
  }

  // A chunk begins.
  MIRAS_FN void reset() const {
    for (int j = 0; j < 2 * width; ++j) kept[j] = 0.0f;
    if (moved) moved[0] = 0.0f, moved[1] = 1.0f;
    for (int j = 0; j < width; ++j) log_decay[j] = 0.0f;
  }

  // alpha, and gamma after it
  void decay(const float* x, int64_t stride, int vp) const {
    if (x)
      for (int j = 0; j < width; ++j) log_decay[j] += x[j * stride];
    if (width == 1) {
      const Vec both = exp_nonpositive(iota() == 0 ? broadcast(x ? *x : 0.0f) : broadcast(*log_decay));
      for (int j = 0; j < vp; j += kLanes) store(alpha + j, broadcast(both[0])), store(gamma + j, broadcast(both[1]));
      return;
    }
    for (int j = 0; j < width; ++j) alpha[j] = x ? x[j * stride] : 0.0f, gamma[j] = log_decay[j];
    for (int j = 0; j < vp; j += kLanes)
      store(alpha + j, exp_nonpositive(load(alpha + j))), store(gamma + j, exp_nonpositive(load(gamma + j)));
  }

 private:
  void advance_channels(float theta, int before, int vp) const {
    for (int i = 0; i <= before; ++i) {
      const float step = i == before ? 1.0f : moved ? moved[i] *= theta : 0.0f;
      float* const row = kept + index_t(i) * width;
      each_columns(width, [&](const auto& c) MIRAS_LAMBDA {
        for (int n = 0; n < c.kVectors; ++n) c.store(row, n, i < before ? c.padded(alpha, n) * c.load(row, n) + step : zeros() + step);
      });
    }
    if (moved) moved[before] = 1.0f;
  }
};

// ---- matrices ----

// Room for writing them
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

// A sum of matrices with weights of their columns and of what a chunk's tokens have written
class StepSum {
 public:
  MIRAS_FN StepSum(const StepMatrix& m, const StepSpare& s) : m_(m), s_(s), vp_(round_up(m.cols, kPad)) {}

  // scale [Vp]
  MIRAS_FN void add(const float* matrix, const float* scale) {
    if (vp_ != m_.cols) copy_in(matrix, m_.cols, m_.rows, m_.cols, s_.matrix[terms_], vp_), matrix = s_.matrix[terms_];
    matrix_[terms_] = matrix, scale_[terms_++] = scale;
  }
  MIRAS_FN void add(const float* matrix, const StepWeights& w, const float* weight, int width) {
    if (width > 1) w.spread(weight, vp_, s_.scales[terms_]);
    else
      for (int j = 0; j < vp_; j += kLanes) store(s_.scales[terms_] + j, broadcast(*weight));
    add(matrix, s_.scales[terms_]);
  }

  // to = it all, with `count` tokens of weights [count x width]; `to` may be a matrix that has been added
  void write(int count, const float* weights, int width, float* to) const {
    each_columns(m_.cols, [&](const auto& c) MIRAS_LAMBDA {
      for (int i = 0; i < count; ++i) {
        const float* const weight = weights + index_t(i) * width;
        for (int n = 0; n < c.kVectors; ++n)
          c.pad(s_.right + index_t(i) * vp_, n, c.load(m_.right + index_t(i) * m_.cols, n) * (width > 1 ? c.load(weight, n) : broadcast(*weight)));
      }
    });
    float* const room = vp_ == m_.cols ? to : s_.matrix[0];
    sweep(m_.rows, vp_, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
      Tile<R, N> a;
      a.add(Cols{m_.left + i, m_.rows}, s_.right + j, vp_, 0, count);
      MIRAS_UNROLL
      for (int term = 0; term < 3; ++term)
        if (term < terms_) a.add_scaled_cols(matrix_[term] + index_t(i) * vp_ + j, vp_, scale_[term] + j);
      a.store_to(room + index_t(i) * vp_ + j, vp_);
    });
    if (room != to) copy_out(room, vp_, m_.rows, m_.cols, to, m_.cols);
  }

 private:
  const StepMatrix& m_;
  const StepSpare& s_;
  int vp_, terms_ = 0;
  const float *matrix_[3], *scale_[3];
};

// After `count` tokens of the chunk: A into `dual`, which may be the start or what is carried, and then S over the momentum.
static void write_matrices(const StepMatrix& m, const StepWeights& w, const StepSpare& spare, int count, float* dual) {
  StepSum a(m, spare);
  a.add(m.start, w.gamma);
  if (m.carried && w.keeps(0)) a.add(m.carried, w, w.kept_by(0), w.width);
  if (m.momentum && w.keeps(1)) a.add(m.momentum, w, w.kept_by(1), w.width);
  a.write(count, w.kept_by(2), w.width, dual);
  if (!m.momentum) return;
  StepSum s(m, spare);
  s.add(m.momentum, w, w.moved + 1, 1);
  s.write(count, w.moved + 2, 1, m.momentum);
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

// A chunk has been read: the next one starts from the dual.
template <int kMatrices>
static void close_chunk(const Retention& gate, const StepMatrix (&matrices)[kMatrices], const StepWeights& w, const StepSpare& spare, int count) {
  for (const StepMatrix& m : matrices) {
    write_matrices(m, w, spare, count, m.start);
    map_start(gate, m, spare);
  }
  w.reset();
}

// A state as a value, with its dual in the place of what is carried: D = A - gamma A_0, or A_0 = A where no chunk is open.
template <int kMatrices>
static void begin_value(const Retention& gate, const StepMatrix (&matrices)[kMatrices], const StepWeights& w, const StepSpare& spare,
                        bool open, int vp) {
  for (int j = 0; j < w.width; ++j) w.kept[j] = open ? 1.0f : 0.0f, w.kept[w.width + j] = 0.0f;
  if (w.moved) w.moved[0] = 0.0f, w.moved[1] = 1.0f;
  if (open) w.decay(nullptr, 0, vp);
  for (const StepMatrix& m : matrices) {
    if (!open) {
      __builtin_memcpy(m.start, m.carried, size_t(m.size()) * sizeof(float));
    } else {
      each_columns(m.cols, [&](const auto& c) MIRAS_LAMBDA {
        for (index_t at = 0; at < m.size(); at += m.cols)
          for (int n = 0; n < c.kVectors; ++n)
            c.store(m.carried + at, n, c.load(m.carried + at, n) - c.padded(w.gamma, n) * c.load(m.start + at, n));
      });
    }
    map_start(gate, m, spare);
  }
}
template <int kMatrices>
static void end_value(const StepMatrix (&matrices)[kMatrices], const StepWeights& w, const StepSpare& spare, int count) {
  for (const StepMatrix& m : matrices) {
    if (count > 0) write_matrices(m, w, spare, count, m.carried);
    else __builtin_memcpy(m.carried, m.start, size_t(m.size()) * sizeof(float));
  }
}

}  // namespace miras::cpu::MIRAS_LEVEL
