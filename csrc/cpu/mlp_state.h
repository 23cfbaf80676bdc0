// States of the MLP memory in scratch, and how they are read and written: at the ends of a sequence and as checkpoints. Both matrices are
// stored hidden-major, W1T = W1' and W2, [Hd x Dp].
#pragma once

#include "chunk.h"

namespace miras::cpu::MIRAS_LEVEL {

// The state at a chunk's start, W1 (transposed) and W2 each, [Hd x Dp].
struct MlpState {
  float* dual[2];
  Operand primal[2];   // W = phi(A); the duals themselves if phi is the identity
  Operand momenta[2];  // S; null without momentum
  Rho* rho;            // [2]

  // Duals, then momenta
  MIRAS_FN float* matrix(int i) const { return i < 2 ? dual[i] : momenta[i - 2].x; }
};

// Memory for the states of that many chunks, and for the copies of one (MlpChunk::pack). Only the backward reads W2 down.
struct MlpStates {
  index_t size;  // of a matrix
  bool momentum;
  float *dual[2], *primal[2], *momenta[2];
  Operand primal_copy[2], momenta_copy[2];  // with pairs
  Rho* rho;

  MIRAS_FN MlpStates(Arena& a, const MlpParams& p, const Retention& retention, int64_t n, bool backward)
      : size(index_t(p.Hd) * round_up(p.D, kPad)), momentum(bool(p.momentum)) {
    for (float*& x : dual) x = a.take(n, size);
    for (int i = 0; i < 2; ++i) primal[i] = retention.identity ? dual[i] : a.take(n, size);
    for (float*& x : momenta) x = a.take(momentum ? n : 0, size);
    const int dp = round_up(p.D, kPad), rows = kPairs && n > 0 ? p.Hd : 0;
    for (int i = 0; i < 2; ++i) {
      const int forms = backward || i == 0 ? kAlong | kDown : kAlong;
      primal_copy[i] = Operand(a, rows, dp, forms), momenta_copy[i] = Operand(a, momentum * rows, dp, forms);
    }
    rho = reinterpret_cast<Rho*>(a.take(n, 2 * sizeof(Rho) / sizeof(float)));
  }

  MIRAS_FN MlpState at(int64_t chunk) const {
    const auto place = [&](float* x) MIRAS_LAMBDA { return x + chunk * size; };
    const auto momenta_of = [&](int i) MIRAS_LAMBDA { return momenta_copy[i].of(momentum ? place(momenta[i]) : nullptr); };
    return {{place(dual[0]), place(dual[1])},
            {primal_copy[0].of(place(primal[0])), primal_copy[1].of(place(primal[1]))},
            {momenta_of(0), momenta_of(1)},
            rho + 2 * chunk};
  }
};

// ---- states: W1 [D, Hd] and W2 [Hd, D] outside with any strides, hidden-major [Hd x Dp] inside ----
static StateTensor transposed(StateTensor x) {
  const int64_t row = x.row;
  x.row = x.col, x.col = row;
  return x;
}
template <class Matrix>
static void read_states(const StateTensor (&x)[2], int64_t n, int64_t h, int d, int hd, const Matrix (&to)[2], index_t dp) {
  read_state(x[0], n, h, 0, d, hd, to[0], dp);
  read_state(transposed(x[1]), n, h, 0, d, hd, to[1], dp);
}
// to contiguous rows; `spare` [D x round_up(Hd)] is overwritten
template <class Matrix>
static void write_states(const StateTensor (&x)[2], int64_t n, int64_t h, int d, int hd, const Matrix (&from)[2], index_t dp,
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
