// Backward of the linear memory with exact steps of the L2 bias, in blocks of C tokens (docs/mathematics.md, section 13), blocks from last
// to first, J = gradient of the state a block ends with:
//
//   Y   = -P' dO - to_end * (K J') - G' dE    dE = eta * Y    d eta_t = Y_t . E_t    dV = -dE         P = L o Q K'
//   dQ  = gamma * (dO A_0) - N K                                                                     N = L o (dO U')
//   dK  = r * (dE A_0) - (F + F') K - N' Q - U_end J                                                 F_ts = L_b(t)s dE_t.U_s
//   J  <- gamma_C J + Q' (gamma dO) + K' (r dE)
//
// and d log alpha as in linear_backward.h, with two more kinds of reads: what E reads of the state, r_t dE_t.A_0 k_t, and of the writes,
// -G_ts dE_t.U_s, both at token b(t).
#pragma once

#include "block.h"

namespace miras::cpu::MIRAS_LEVEL {

struct BlockBackwardScratch {
  float *A, *E, *G;                      // [segment] of [Dk x Dvp], [C x Dvp], [C x Cp]
  float* J;                              // [Dk x Dvp]
  float *A_plain, *J_plain;              // [Dv x Dkp]  not transposed
  float* KT;                             // [Dk x Cp]
  float *K, *Q, *dX;                     // [C x Dkp]   dX: dQ, dK if they cannot be written in place
  float *V, *dO, *dO_gamma, *dE, *dE_r;  // [C x Dvp]   dO_gamma, dE_r: gamma dO and r dE, if decays are given
  float *U, *U_end;                      // [C x Dvp]
  float* UT;                             // [Dv x Cp]
  float *P, *N, *X, *F;                  // [C x Cp]
  float *deta, *dlog;                    // [Cp]
  float *read_sums, *write_sums;         // [Cp]
  float* error_sums;                     // [Cp]  r_t dE_t.A_0 k_t
  Gates gates;
  BlockWeights weights;

  MIRAS_FN BlockBackwardScratch(Arena& a, const LinearBackward& p) : gates(a, p), weights(a, p) {
    const int cp = round_up(p.C, kPad), dkp = round_up(p.Dk, kPad), dvp = round_up(p.panel_width, kPad);
    const int64_t tokens = int64_t(p.segment) * p.C;
    A = a.take(int64_t(p.segment) * p.Dk, dvp), E = a.take(tokens, dvp), G = a.take(tokens, cp);
    J = a.take(p.Dk, dvp);
    A_plain = a.take(p.panel_width, dkp), J_plain = a.take(p.panel_width, dkp);
    KT = a.take(p.Dk, cp);
    K = a.take(p.C, dkp), Q = a.take(p.C, dkp), dX = a.take(p.C, dkp);
    V = a.take(p.C, dvp), dO = a.take(p.C, dvp), dO_gamma = a.take(p.C, dvp), dE = a.take(p.C, dvp), dE_r = a.take(p.C, dvp);
    U = a.take(p.C, dvp), U_end = a.take(p.C, dvp);
    UT = a.take(p.panel_width, cp);
    P = a.take(p.C, cp), N = a.take(p.C, cp), X = a.take(p.C, cp), F = a.take(p.C, cp);
    deta = a.take(1, cp), dlog = a.take(1, cp);
    read_sums = a.take(1, cp), write_sums = a.take(1, cp), error_sums = a.take(1, cp);
  }
};

// As sweep, rows from last to first
template <int N, class Function> MIRAS_INLINE void sweep_rows_up(int rows, int j, Function& visit) {
  constexpr int R = kTileRows<N>;
  int i = rows;
  while (i >= R && !(R == 6 && i == 8)) i -= R, visit.template operator()<R, N>(i, j);
  if constexpr (R == 16) {
    if (i >= 8) i -= 8, visit.template operator()<8, N>(i, j);
  }
  if constexpr (R != 4) {
    while (i >= 4) i -= 4, visit.template operator()<4, N>(i, j);
  }
  while (i > 0) i -= 1, visit.template operator()<1, N>(i, j);
}
template <class Function> MIRAS_INLINE void sweep_up(int rows, int cols, Function visit) {
  constexpr int N = kTileVectors;
  int j = 0;
  for (; cols - j >= N * kLanes; j += N * kLanes) sweep_rows_up<N>(rows, j, visit);
  if constexpr (N == 4) {
    if (cols - j >= 2 * kLanes) sweep_rows_up<2>(rows, j, visit), j += 2 * kLanes;
  }
  if constexpr (N * kLanes > kPad) {
    if (cols - j >= kLanes) sweep_rows_up<1>(rows, j, visit);
  }
}

struct BlockErrorsBackward {
  const float *K, *J;   // [c x Dkp], [Dk x Dvp]
  const float *P, *G;   // [c x Cp]
  const float *dO, *E;  // [c x Dvp]
  index_t dkp, cp;
  const float *eta, *to_end;  // [Cp]; to_end is null where it is all ones, and the four below with it
  const float *U_end, *r;     // [c x Dvp], [Cp]
  float *dE, *dE_r;           // [c x Dvp]  dE_r: r dE
  float *deta, *write_sums;   // [Cp]
};

// Y by back substitution, a tile of rows in registers; dE, r dE and d eta of it. Adds to write_sums.
static void block_errors_backward(int c, int dk, int dvp, const BlockErrorsBackward& x, WriteSoon soon) {
  fill_zero(x.deta, x.cp);
  sweep_up(c, dvp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    const index_t at = index_t(i) * dvp + j;
    Tile<R, N> y;
    y.add(Rows{x.K + i * x.dkp, x.dkp}, x.J + j, dvp, 0, dk, soon);
    if (x.to_end) y.dot_rows(x.U_end + at, dvp, x.write_sums + i), y.scale_rows(x.to_end + i);
    y.add(Cols{x.P + i, x.cp}, x.dO + j, dvp, i, c);
    y.add(Cols{x.G + i, x.cp}, x.dE + j, dvp, i + R, c);
    const float* const G = x.G + i * x.cp + i;
    MIRAS_UNROLL
    for (int t = R - 1; t >= 0; --t) {
      const Vec eta = broadcast(-x.eta[i + t]);
      MIRAS_UNROLL
      for (int n = 0; n < N; ++n) {
        const Vec de = eta * y.acc[t][n];  // of -Y
        store(x.dE + at + t * dvp + n * kLanes, de);
        if (x.to_end) store(x.dE_r + at + t * dvp + n * kLanes, broadcast(x.r[i + t]) * de);
        MIRAS_UNROLL
        for (int r = 0; r < R; ++r)
          if (r < t) y.acc[r][n] += broadcast(G[t * x.cp + r]) * de;
      }
    }
    y.dot_rows(x.E + at, dvp, x.deta + i);
  });
  for (int t = 0; t < c; ++t) x.deta[t] = -x.deta[t];
}

// What the backwards in blocks share: the sizes and places of one task, a panel of values of one head, and the way through its blocks.
struct BlockWalk {
  const LinearBackward& p;
  Task task;
  int64_t n, h, b, length;
  int dk, dkp, dvp, cp;
  index_t state;  // floats of [Dk x Dvp]

  MIRAS_FN BlockWalk(const LinearBackward& params, int64_t i) : p(params), task(params, i) {
    n = task.n, h = task.h, b = p.batch(n), length = p.length(n);
    dk = p.Dk, dkp = round_up(dk, kPad), dvp = task.dvp, cp = round_up(p.C, kPad);
    state = index_t(dk) * dvp;
  }

  MIRAS_FN int tokens(int64_t block) const {
    const int64_t left = length - block * p.C;
    return int(left < p.C ? left : p.C);
  }
  MIRAS_FN int64_t token(int64_t block) const { return p.begin(n) + block * p.C; }
  MIRAS_FN ChunkView keys(const TokenTensor& x, Dtype dtype, int64_t block) const { return {x, dtype, b, token(block), h, 0, dk}; }
  MIRAS_FN ChunkView values(const TokenTensor& x, int64_t block) const { return {x, p.dtype, b, token(block), h, task.first, task.dv}; }
  // This panel's share of a gradient that all panels add to
  MIRAS_FN TokenTensor part(TokenTensor x, int64_t stride, Dtype dtype = Dtype::f32) const {
    x.data = static_cast<char*>(x.data) + task.panel * stride * (dtype == Dtype::f32 ? 4 : 2);
    return x;
  }

  // All blocks from last to first, the segments between checkpoints recomputed; J [Dk x Dvp] from the final state to the initial one.
  template <class BackwardTask> void backwards(BackwardTask& x, float* J, float* J_plain) {
    if (p.grad_final_dual) read_state(p.grad_final_dual, n, h, task.first, task.dv, dk, J, dvp);
    else fill_zero(J, state);
    const int64_t blocks = (length + p.C - 1) / p.C, every = p.checkpoint_every;
    for (int64_t last = blocks; last > 0;) {
      const int64_t first = (last - 1) / every * every;
      x.recompute(first, last);
      for (int64_t block = last - 1; block >= first; --block) {
        if (block != last - 1) x.begin(block);  // the last one is as recomputing left it
        x.block_backward(block, block - first);
      }
      last = first;
    }
    write_state(p.d_dual, n, h, task.first, task.dv, dk, J, dvp, J_plain);
  }
};

struct BlockBackwardTask : BlockWalk {
  BlockBackwardScratch s;
  bool decays;

  MIRAS_FN BlockBackwardTask(const LinearBackward& params, const BlockBackwardScratch& scratch, int64_t i)
      : BlockWalk(params, i), s(scratch), decays(s.gates.decays) {}

  void begin(int64_t block);
  void recompute(int64_t first, int64_t last);
  void scores(int c, WriteSoon p_soon, WriteSoon n_soon);
  void errors_backward(int c, const float* E, const float* G, WriteSoon soon);
  void key_pairs(int c, const float* G, bool of_decay);
  void query_gradient(int64_t block, const ChunkView& dq);
  void key_gradient(int64_t block, const ChunkView& dkeys, ReadSoon soon);
  void decay_gradients(int64_t block, const float* A);
  void state_gradient(int c, ReadSoon soon);
  void block_backward(int64_t block, int64_t i);
  void run();
};

// Gates, weights and K transposed of a block
void BlockBackwardTask::begin(int64_t block) {
  const int c = tokens(block);
  s.gates.read(p, b, token(block), h, c);
  s.weights.read(s.gates, c);
  keys(p.k, p.dtype, block).transpose_in(c, s.KT, cp);
}

// Blocks [first, last) forward once more: states, errors and G.
void BlockBackwardTask::recompute(int64_t first, int64_t last) {
  const int64_t slot = p.slot(n) + first / p.checkpoint_every;
  copy_in(p.checkpoints + (slot * p.H + h) * dk * p.Dv + task.first, p.Dv, dk, task.dv, s.A, dvp);
  for (int64_t block = first; block < last; ++block) {
    const int c = tokens(block);
    const index_t i = block - first;
    float* const A = s.A + i * state;
    begin(block);
    float* const G = s.G + i * p.C * cp;
    key_scores(s.weights, c, dk, s.KT, cp, G, ReadSoon(values(p.v, block), c));
    const ChunkView v = values(p.v, block);
    BlockErrors x{s.KT,
                  A,
                  s.V,
                  G,
                  cp,
                  dvp,
                  s.gates.eta,
                  decays ? s.weights.r : nullptr,
                  decays ? s.gates.to_end : nullptr,
                  s.U,
                  s.U_end,
                  s.E + i * p.C * dvp};
    if (v.in_place()) x.v = v.at<float>(), x.ldv = p.v.token;
    else v.read(c, s.V, dvp);
    const int next = block + 1 < last ? tokens(block + 1) : 0;
    solve_errors(c, dk, dvp, x, ReadSoon(keys(p.k, p.dtype, block + 1), next));
    if (block + 1 == last) break;
    advance(c, dk, Rows{s.KT, cp}, decays ? s.U_end : s.U, dvp, {A, s.gates.end(c)}, A + state, ReadSoon());
  }
}

// P, N and X = -P o (dO U')
void BlockBackwardTask::scores(int c, WriteSoon p_soon, WriteSoon n_soon) {
  sweep_lower(c, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;  // Q K'
    x.add(Rows{s.Q + i * dkp, dkp}, s.KT + j, cp, 0, dk, p_soon);
    x.multiply(s.weights.row(i) + j, cp);
    x.store_to(s.P + i * cp + j, cp);
  });
  transpose(s.U, dvp, c, task.dv, s.UT, cp);
  sweep_lower(c, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;  // dO U'
    x.add(Rows{s.dO + i * dvp, dvp}, s.UT + j, cp, 0, task.dv, n_soon);
    if (decays) {
      x.each([&](int r, int m, Vec& y) MIRAS_LAMBDA {
        const index_t at = (i + r) * cp + j + m * kLanes;
        store(s.X + at, -load(s.P + at) * y);
      });
    }
    x.multiply(s.weights.row(i) + j, cp);
    x.store_to(s.N + i * cp + j, cp);
  });
}

void BlockBackwardTask::errors_backward(int c, const float* E, const float* G, WriteSoon soon) {
  fill_zero(s.write_sums, cp);
  block_errors_backward(c, dk, dvp,
                        {s.K, s.J, s.P, G, s.dO, E, dkp, cp, s.gates.eta, decays ? s.gates.to_end : nullptr, s.U_end, s.weights.r, s.dE,
                         s.dE_r, s.deta, s.write_sums},
                        soon);
}

// F, and of d log alpha what E reads of the writes
void BlockBackwardTask::key_pairs(int c, const float* G, bool of_decay) {
  sweep_lower(c, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> x;  // dE U'
    x.add(Rows{s.dE + i * dvp, dvp}, s.UT + j, cp, 0, task.dv);
    MIRAS_UNROLL
    for (int r = 0; r < R; ++r) {
      const int before = s.weights.before(i + r);
      const float* const weight = s.weights.row(before) + j;
      const index_t at = (i + r) * cp + j;
      float* const X = s.X + before * cp + j;
      MIRAS_UNROLL
      for (int n = 0; n < N; ++n) {
        const Vec pair = x.acc[r][n];
        if (of_decay && before >= 0) store(X + n * kLanes, load(X + n * kLanes) - load(G + at + n * kLanes) * pair);
        store(s.F + at + n * kLanes, load(weight + n * kLanes) * pair);
      }
    }
  });
  s.weights.clear_own(c, s.F);
}

void BlockBackwardTask::query_gradient(int64_t block, const ChunkView& dq) {
  const int c = tokens(block);
  const float* const dO = decays ? s.dO_gamma : s.dO;
  float* const to = dq.in_place() ? dq.at<float>() : s.dX;
  const index_t ld = dq.in_place() ? p.dq.token : dkp;
  fill_zero(s.read_sums, cp);
  sweep(c, dkp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> y;
    y.add(Rows{dO + i * dvp, dvp}, s.A_plain + j, dkp, 0, task.dv);
    if (decays) y.dot_rows(s.Q + i * dkp + j, dkp, s.read_sums + i);
    y.subtract(Rows{s.N + i * cp, cp}, s.K + j, dkp, 0, i + R);
    y.store_to(to + i * ld + j, ld);
  });
  if (!dq.in_place()) dq.write(c, s.dX, dkp);
}

void BlockBackwardTask::key_gradient(int64_t block, const ChunkView& dkeys, ReadSoon soon) {
  const int c = tokens(block);
  const float *const dE = decays ? s.dE_r : s.dE, *const U = decays ? s.U_end : s.U;
  float* const to = dkeys.in_place() ? dkeys.at<float>() : s.dX;
  const index_t ld = dkeys.in_place() ? p.dk.token : dkp;
  fill_zero(s.error_sums, cp);
  sweep(c, dkp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> y;
    y.add(Rows{dE + i * dvp, dvp}, s.A_plain + j, dkp, 0, task.dv);
    if (decays) y.dot_rows(s.K + i * dkp + j, dkp, s.error_sums + i);
    y.subtract(Rows{s.F + i * cp, cp}, s.K + j, dkp, 0, i + R);
    y.subtract(Cols{s.F + i, cp}, s.K + j, dkp, i, c);
    y.subtract(Cols{s.N + i, cp}, s.Q + j, dkp, i, c);
    y.subtract(Rows{U + i * dvp, dvp}, s.J_plain + j, dkp, 0, task.dv, soon);
    y.store_to(to + i * ld + j, ld);
  });
  if (!dkeys.in_place()) dkeys.write(c, s.dX, dkp);
}

void BlockBackwardTask::decay_gradients(int64_t block, const float* A) {
  const int c = tokens(block);
  for (int t = 0; t < c; ++t)
    if (const int before = s.weights.before(t); before >= 0) s.read_sums[before] += s.error_sums[t];
  const float through = *s.gates.end(c) * inner_product(s.J, A, state);
  decay_gradient(c, s.X, cp, s.read_sums, s.write_sums, through, s.dlog);
  write_gate(part(p.dlog_decay, p.gate_part), b, token(block), h, c, s.dlog);
}

// J of the block's start, in place of that of its end
void BlockBackwardTask::state_gradient(int c, ReadSoon soon) {
  const float *const dO = decays ? s.dO_gamma : s.dO, *const dE = decays ? s.dE_r : s.dE;
  sweep(dk, dvp, [&]<int R, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<R, N> y;
    y.add(Cols{s.Q + i, dkp}, dO + j, dvp, 0, c, soon);
    y.add(Cols{s.K + i, dkp}, dE + j, dvp, 0, c);
    y.add_scaled(s.J + index_t(i) * dvp + j, dvp, s.gates.end(c));
    y.store_to(s.J + index_t(i) * dvp + j, dvp);
  });
}

void BlockBackwardTask::block_backward(int64_t block, int64_t i) {
  const int c = tokens(block);
  const float *const A = s.A + i * state, *const E = s.E + i * p.C * dvp, *const G = s.G + i * p.C * cp;
  const TokenTensor dq_part = part(p.dq, p.key_part, p.grad_dtype), dk_part = part(p.dk, p.key_part, p.grad_dtype);
  const ChunkView dq = keys(dq_part, p.grad_dtype, block), dkeys = keys(dk_part, p.grad_dtype, block);
  const int next = block > 0 ? p.C : 0;  // tokens of the block to come, the one before
  const ReadSoon q_soon(keys(p.q, p.dtype, block - 1), next), dO_soon(values(p.grad_out, block - 1), next);

  keys(p.k, p.dtype, block).read(c, s.K, dkp);
  keys(p.q, p.dtype, block).read(c, s.Q, dkp);
  values(p.grad_out, block).read(c, s.dO, dvp);
  weigh_rows(c, dvp, s.gates.eta, E, s.U);
  if (decays) weigh_rows(c, dvp, s.gates.to_end, s.U, s.U_end), weigh_rows(c, dvp, s.gates.gamma, s.dO, s.dO_gamma);

  scores(c, WriteSoon(values(p.dv, block), c), WriteSoon(dq, c));
  errors_backward(c, E, G, WriteSoon(dkeys, c));
  key_pairs(c, G, decays);
  transpose(s.J, dvp, dk, task.dv, s.J_plain, dkp);
  transpose(A, dvp, dk, task.dv, s.A_plain, dkp);

  write_gate(part(p.dlr, p.gate_part), b, token(block), h, c, s.deta);
  float* const dV = s.V;
  for (index_t i = 0; i < index_t(c) * dvp; i += kLanes) store(dV + i, -load(s.dE + i));
  values(p.dv, block).write(c, dV, dvp);
  query_gradient(block, dq);
  key_gradient(block, dkeys, q_soon);
  if (p.dlog_decay) decay_gradients(block, A);
  state_gradient(c, dO_soon);
}

void BlockBackwardTask::run() {
  s.weights.clear(p.C);
  const int64_t square = int64_t(p.C) * cp;  // zero in the tiles that are not visited, where nothing is written
  fill_zero(s.P, square), fill_zero(s.N, square), fill_zero(s.X, square), fill_zero(s.F, square);
  fill_zero(s.G, square * p.segment);
  backwards(*this, s.J, s.J_plain);
}

static void block_backward(const LinearBackward& p, int64_t first, int64_t last) {
  with_scratch<BlockBackwardScratch>(p, [&](const BlockBackwardScratch& s) MIRAS_LAMBDA {
    for (int64_t i = first; i < last; ++i) BlockBackwardTask(p, s, i).run();
  });
}

}  // namespace miras::cpu::MIRAS_LEVEL
