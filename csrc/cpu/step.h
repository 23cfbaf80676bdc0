// What steps of both memories share: matrices that are read and written where a decoder keeps them (SPEC section 2, one token
// after the other).
//
// A matrix [K x V] has rows of V floats, without padding. Scratch rows have it (Kp, Vp), zero.
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

// One matrix of one head, where its buffers are.
struct StepMatrix {
  int rows, cols;
  LastAxis last;
  float *dual, *start, *primal, *momentum, *rho;  // null where a decoder has none

  MIRAS_FN StepMatrix(const StepBuffers& x, int64_t index, int K, int V, LastAxis last) : rows(K), cols(V), last(last) {
    const int64_t at = index * K * V;
    const auto matrix = [at](float* base) { return base ? base + at : nullptr; };
    dual = matrix(x.dual), start = matrix(x.start), primal = matrix(x.primal), momentum = matrix(x.momentum);
    rho = x.rho ? x.rho + index : nullptr;
  }

  // W_0, which predictions are made with
  MIRAS_FN const float* predicting() const { return primal ? primal : start ? start : dual; }
  MIRAS_FN float read_scale() const { return rho ? *rho : 1.0f; }

  // A chunk begins: A_0 = A, W_0 = phi(A_0). spare [rows x Vp]
  void open(const Retention& gate, float* spare) const {
    if (start) __builtin_memcpy(start, dual, size_t(rows) * cols * sizeof(float));
    map(gate, spare);
  }
  void map(const Retention& gate, float* spare) const {
    if (!primal) return;
    const int ld = round_up(cols, kPad);
    Rho scale;
    if (ld == cols) {
      scale = gate.primal({rows, cols, cols, last}, start, primal);
    } else {
      copy_in(start, cols, rows, cols, spare, ld);
      scale = gate.primal({rows, cols, ld, last}, spare, spare);
      copy_out(spare, ld, rows, cols, primal, cols);
    }
    if (rho) *rho = scale.value;
  }
};

// Where a head stands in its chunk, and what the chunk has decayed.
struct StepDecay {
  float* total;  // [width]  log gamma, kept in the buffer
  int width;
  float *alpha, *gamma;  // [Vp], the same in all columns where decays are not channel-wise

  MIRAS_FN void set(float* row, int columns, float value) const {
    for (int j = 0; j < columns; j += kLanes) store(row + j, broadcast(value));
  }
  // A token with decays x, `stride` apart, or null: alpha and, if wanted, gamma after it. columns = Vp
  void advance(const float* x, int64_t stride, int columns, bool wants_gamma) const {
    if (x)
      for (int j = 0; j < width; ++j) total[j] += x[j * stride];
    if (width == 1) {
      set(alpha, columns, x ? exp_nonpositive(broadcast(x[0]))[0] : 1.0f);
      if (wants_gamma) set(gamma, columns, exp_nonpositive(broadcast(total[0]))[0]);
      return;
    }
    if (!x) set(alpha, columns, 1.0f);
    for (int j = 0; j < width; ++j) {
      if (x) alpha[j] = x[j * stride];
      if (wants_gamma) gamma[j] = total[j];
    }
    for (int j = 0; j < columns; j += kLanes) {
      if (x) store(alpha + j, exp_nonpositive(load(alpha + j)));
      if (wants_gamma) store(gamma + j, exp_nonpositive(load(gamma + j)));
    }
  }
  MIRAS_FN void close() const {
    for (int j = 0; j < width; ++j) total[j] = 0.0f;
  }
};

}  // namespace miras::cpu::MIRAS_LEVEL
