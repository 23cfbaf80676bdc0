// A task of the MLP memory's backward (mlp_backward.h): its memory, and the recomputation of its chunks.
//
// There is a checkpoint of every `checkpoint_every`-th chunk. The chunks of a segment are first recomputed forward from its checkpoint,
// storing their states and the products with matrices at the chunks' starts, then differentiated backward. Sizes and layouts: mlp_chunk.h.
#pragma once

#include "mlp_chunk.h"

namespace miras::cpu::MIRAS_LEVEL {

struct MlpBackwardScratch {
  MlpChunk chunk;
  MlpStates states;                       // of a segment
  Operand J[2], JS[2];                 // [Hd x Dp]  JS with momentum
  float* dW[2];                        // [Hd x Dp]  unless W = A
  float* dO;                           // [C x Dp]
  Operand dUq, dUq_gamma, Q_gamma;     // [C x Dp]  rows times gamma_t in the last two
  Operand dUq_carry, Q_carry;          // [C x Dp]  with momentum: rows times carry
  float *dU1, *dGu, *dGw, *dE, *dX;    // [C x Dp]  dE is dG at first; dX: dQ and dK
  Operand dU;                          // [C x Dp]
  float *U1T, *dUqT, *dUT;             // [D x Cp]
  Operand dZqT, dGaT;                  // [Hd x Cp]  gelu'(Zq) at first in dZqT
  Operand dZ_copy;                     // [Hd x Cp]  with pairs: copies of dZ, which is in HT's place
  Operand M1, M2;                      // [C x Cp]
  float *M1T, *L, *pairs;              // [C x Cp]  pairs: the gradient of log alpha through reads of writes, with momentum that of M
  float* pairs2;                       // [C x Cp]  P2 o (dZq Gz')
  float *Theta, *QK;                   // [C x Cp]  with momentum: Theta, Q K'
  float *ones, *deta, *ddelta, *dlog;     // [Cp]
  float *read_sums, *write_sums, *write2_sums;  // [Cp]  gamma (W q).d; end U.(J a); of W2, without eta. Without end with momentum
  float *dcarry, *dstep, *dmomentum;            // [Cp]  with momentum: gradients of b, of the last row of Theta, of theta
  float* dots;                                  // [Cp]  with momentum
  float* along[3];                              // [Hd / kPad]  <J, A>, <J, S>, <JS, S> of kPad hidden units
  float *dweight, *dbias;                       // [Dp]
  float* spare;                                 // [D x Hdp]

  MIRAS_FN MlpBackwardScratch(Arena& a, const MlpBackward& p) : chunk(a, p, p.segment), states(a, p, chunk.retention, p.segment, true) {
    const int dp = chunk.dp, cp = chunk.cp, momentum = chunk.gates.momentum;
    constexpr int kCopies = kAlong | kDown, kAll = kFloat | kCopies;
    for (Operand& x : J) x = Operand(a, p.Hd, dp, kAll);
    for (Operand& x : JS) x = Operand(a, momentum * p.Hd, dp, kAll);
    for (float*& x : dW) x = a.take(chunk.retention.identity ? 0 : p.Hd, dp);
    dO = a.take(p.C, dp);
    dUq = Operand(a, p.C, dp, kAll);
    for (Operand* x : {&dUq_gamma, &Q_gamma}) *x = Operand(a, p.C, dp, kFloat | kDown);
    for (Operand* x : {&dUq_carry, &Q_carry}) *x = Operand(a, momentum * p.C, dp, kFloat | kDown);
    dU1 = a.take(p.C, dp), dGu = a.take(p.C, dp), dGw = a.take(p.C, dp);
    dE = a.take(p.C, dp), dU = Operand(a, p.C, dp, kAll), dX = a.take(p.C, dp);
    U1T = a.take(p.D, cp), dUqT = a.take(p.D, cp), dUT = a.take(p.D, cp);
    dZqT = Operand(a, p.Hd, cp, kAll), dGaT = Operand(a, p.Hd, cp, kCopies);
    dZ_copy = Operand(a, kPairs ? p.Hd : 0, cp, kCopies);
    L = a.take(p.C, cp), M1 = Operand(a, p.C, cp, kCopies), M1T = a.take(p.C, cp), M2 = Operand(a, p.C, cp, kCopies);
    pairs = a.take(p.C, cp), pairs2 = a.take(p.C, cp);
    Theta = a.take(momentum * p.C, cp), QK = a.take(momentum * p.C, cp);
    ones = a.take(1, cp), deta = a.take(1, cp), ddelta = a.take(1, cp), dlog = a.take(1, cp);
    read_sums = a.take(1, cp), write_sums = a.take(1, cp), write2_sums = a.take(1, cp);
    dcarry = a.take(momentum, cp), dstep = a.take(momentum, cp), dmomentum = a.take(momentum, cp);
    dots = a.take(momentum, cp);
    for (float*& x : along) x = a.take(1, round_up(p.Hd, kPad) / kPad);
    dweight = a.take(1, dp), dbias = a.take(1, dp);
    spare = a.take(p.D, round_up(p.Hd, kPad));
  }
};

// One head of one sequence.
struct MlpBackwardTask {
  const MlpBackward& p;
  const BiasTable& bias;
  const MlpChunk& segment;
  MlpBackwardScratch s;
  MlpChunk& m;
  int64_t n, h, b, length;
  int d, dp, hd, cp;
  index_t state, hidden, rows;  // floats of [Hd x Dp], [Hd x Cp], [C x Dp]
  bool momentum;
  float drho[2];

  MIRAS_FN MlpBackwardTask(const MlpBackward& params, const BiasTable& table, const MlpBackwardScratch& scratch, int64_t task)
      : p(params), bias(table), segment(scratch.chunk), s(scratch), m(s.chunk) {
    n = task / p.H, h = task % p.H, b = p.batch(n), length = p.length(n);
    d = p.D, dp = m.dp, hd = p.Hd, cp = m.cp;
    momentum = m.gates.momentum;
    state = index_t(hd) * dp, hidden = index_t(hd) * cp, rows = index_t(p.C) * dp;
  }

  MIRAS_FN int tokens(int64_t chunk) const {
    const int64_t left = length - chunk * p.C;
    return int(left < p.C ? left : p.C);
  }
  MIRAS_FN int64_t token(int64_t chunk) const { return p.begin(n) + chunk * p.C; }
  MIRAS_FN ChunkView view(const TokenTensor& x, int64_t chunk, int first = 0) const { return m.view(p, x, b, token(chunk) + first, h); }

  // Chunk i's part of what MlpChunk has for the whole segment.
  void choose(int64_t i) {
    m.X = segment.X + i * rows, m.r = segment.r + i * cp;
    m.AT = segment.AT.matrix(i, hidden), m.GzT = segment.GzT.matrix(i, hidden);
    m.slopeT = segment.slopeT + i * hidden, m.HT = segment.HT + i * hidden;
  }

  // An array that MlpChunk has for the whole segment, as the preceding chunk has it
  template <class T> MIRAS_FN ReadSoon preceding(const Part& mine, const T* x, index_t n) const {
    if (m.X == segment.X || mine.index > 0) return ReadSoon();
    return ReadSoon(reinterpret_cast<const float*>(x - n), n * index_t(sizeof(T)) / 4);
  }
  MIRAS_FN Operand dZT() const { return s.dZ_copy.of(m.HT); }

  void rerun(int64_t first, int64_t last);
  // Stages, by parts of the hidden units or of the tokens
  void read_backward(const Part& mine, int c, const MlpState& start);
  void read_backward_hidden(const Part& mine, int c, const MlpState& start);
  void write_backward_hidden(const Part& mine, int c);
  void write_backward(const Part& mine, int c, const MlpState& start);
  void inner_backward(const Part& mine, const MlpState& start);
  void hidden_backward(const Part& mine, int c, const MlpState& start);
  void norm_gradients(const Part& mine, int c);
  void inner_products(const Part& mine, const MlpState& start);
  void token_gradients(const Part& mine, int64_t chunk, const MlpState& start);
  void state_gradients(const Part& mine, int i, int c, const MlpState& start, ReadSoon soon);
  // Between stages
  void reads_of_momenta(int c, int i, const Rho& rho);
  void rho_gradient(int c, const Rho& rho);
  void add_pairs(int c, const Rho& rho);
  void gate_gradients(int64_t chunk);
  void through_primal(const Part& mine, int c, const MlpState& start);
  void chunk_backward(int64_t chunk, int64_t i);
  void run();
};

// Recompute chunks [first, last).
void MlpBackwardTask::rerun(int64_t first, int64_t last) {
  Checkpoint(p, n, h, first).read(s.states.at(0));
  for (int64_t chunk = first; chunk < last; ++chunk) {
    const int64_t i = chunk - first;
    const int c = tokens(chunk);
    const MlpState start = s.states.at(i);
    choose(i);
    MIRAS_STAGE("read", 0, 8 * c * d);
    m.find_primal(p, start);
    m.read(p, b, token(chunk), h, c);
    const MlpState next = s.states.at(chunk + 1 < last ? i + 1 : i);
    in_parts(p, c, [&](const Part& mine) {
      for (const Operand& x : start.primal) x.pack_along(mine.units, m.dp);
      m.predict_hidden(mine, c, start, ReadSoon());
    });
    in_parts(p, c, [&](const Part& mine) {
      m.restore(mine.tokens, p.product(0, b, h, token(chunk)), d, m.X);
      m.find_errors(mine, p, bias);
    });
    in_parts(p, c, [&](const Part& mine) {
      const auto soon = [&](const TokenTensor& x) {
        return chunk + 1 < last ? ReadSoon(view(x, chunk + 1), tokens(chunk + 1)) : ReadSoon();
      };
      m.hidden_gradient(mine, c, start, soon(p.v));
      if (chunk + 1 == last) return;
      m.advance_matrix(0, mine, c, start, next, soon(p.k));
      m.advance_matrix(1, mine, c, start, next, ReadSoon());
    });
  }
}

}  // namespace miras::cpu::MIRAS_LEVEL
