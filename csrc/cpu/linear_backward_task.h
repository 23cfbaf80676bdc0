// A task of the linear memory's backward (linear_backward.h): its memory, and the recomputation of its chunks.
//
// There is a checkpoint of every `checkpoint_every`-th chunk. The chunks of a segment are first recomputed forward from its checkpoint,
// storing their states, errors and inner gradients, then differentiated backward.
//
// Threads may share a task (parts.h). Functions that take a Part do its share: of the tokens or of the value channels, as their comments
// say.
//
//   c tokens of the chunk (Cp padded)   Dk key channels (Dkp)   Dv value channels of the task (Dvp)
//   T after a name: transposed. States are held transposed: A, S, W, J, JS [Dk x Dvp].
#pragma once

#include "channel_decay.h"

namespace miras::cpu::MIRAS_LEVEL {

struct BackwardScratch {
  // Of a segment: [segment][Dk x Dvp], W and S only if they are needed; [segment][C x Dvp] twice; [segment] twice
  float *A, *W, *S, *E, *G;
  float *rho, *rho_slope;
  float* W_down;                   // [Dk x Dvp]  with pairs
  Operand J, JS;                   // [Dk x Dvp]
  Operand W_copy, S_copy;          // [Dk x Dvp]  with pairs
  float* dW;                       // [Dk x Dvp]  unless W = A
  float *W_plain, *J_plain;        // [Dv x Dkp]  not transposed
  float *S_plain, *JS_plain;       // [Dv x Dkp]
  float* KT;                       // [Dk x Cp]
  Operand K, Q;                    // [C x Dkp]
  float* V;                        // [C x Dvp]   if v cannot be read in place
  Operand dO, dO_gamma, dO_b;      // [C x Dvp]   rho dO_t, gamma_t dO_t, rho b_t dO_t
  Operand U, U_end, U_step;        // [C x Dvp]
  float* UT;                       // [Dv x Cp]
  Operand P, N;                    // [C x Cp]
  float *M, *X;                    // [C x Cp]    X with momentum: gM
  float *QK, *Theta;               // [C x Cp]    with momentum
  Operand dE;                      // [C x Dvp]   dU at first
  float *KJ, *KJS, *QW, *QS;       // [C x Dvp]   products of K and Q with states; all but KJS if decays are channel-wise
  float* dQ_b;                     // [C x Dkp]   rho b_t S_0' dO_t
  float* dX;                       // [C x Dkp]   dQ, dK if they cannot be written in place
  float *delta, *ddelta;           // [C] or [C x Dvp]
  float *deta, *dlog;              // [Cp] or [C x Dvp]
  float *read_sums, *write_sums;   // [Cp]  gamma_t (W0 q_t).dO_t and (gamma_C/gamma_s) U_s.(J k_s), with momentum -gM_Cs's share of it
  float *gTheta, *gb, *dmomentum;  // [Cp]
  float* last_rows;                // [2 x Cp] of each part
  float* columns;                  // [Dvp]
  float *m, *sums;                 // of ChannelDecay::Backward
  LinearGates gates;

  MIRAS_FN BackwardScratch(Arena& a, const LinearBackward& p) : gates(a, p) {
    const int cp = round_up(p.C, kPad), dkp = round_up(p.Dk, kPad), dvp = round_up(p.panel_width, kPad);
    const bool momentum(p.momentum), channels = p.decay_per_channel;
    const int primal = retention_traits(p.retention).identity ? 0 : dvp, momenta = momentum ? dvp : 0, wide = channels ? dvp : 0;
    const int64_t states = int64_t(p.segment) * p.Dk, tokens = int64_t(p.segment) * p.C;
    A = a.take(states, dvp), W = a.take(states, primal), S = a.take(states, momenta);
    E = a.take(tokens, dvp), G = a.take(tokens, dvp);
    rho = a.take(1, p.segment), rho_slope = a.take(1, p.segment);
    constexpr int kAll = kFloat | kAlong | kDown, kCopies = kAlong | kDown;
    W_down = a.take(kPairs ? half(p.Dk) : 0, dvp);
    J = Operand(a, p.Dk, dvp, kAll), JS = Operand(a, p.Dk, momenta, kAll), dW = a.take(p.Dk, primal);
    W_copy = Operand(a, kPairs ? p.Dk : 0, dvp, kCopies), S_copy = Operand(a, kPairs ? p.Dk : 0, momenta, kCopies);
    W_plain = a.take(p.panel_width, dkp), J_plain = a.take(p.panel_width, dkp);
    S_plain = a.take(momenta, dkp), JS_plain = a.take(momenta, dkp);
    KT = a.take(p.Dk, cp);
    K = Operand(a, p.C, dkp, kCopies), Q = Operand(a, p.C, dkp, kCopies);
    V = a.take(p.C, dvp);
    dO = Operand(a, p.C, dvp, kAll), dO_gamma = Operand(a, p.C, dvp, kAll), dO_b = Operand(a, p.C, momenta, kAll);
    U = Operand(a, p.C, dvp, kFloat | kAlong), U_end = Operand(a, p.C, dvp, kAll), U_step = Operand(a, p.C, momenta, kAll);
    UT = a.take(p.panel_width, cp);
    P = Operand(a, p.C, cp, kFloat | kDown), M = a.take(p.C, cp), N = Operand(a, p.C, cp, kAll), X = a.take(p.C, cp);
    QK = a.take(momentum ? p.C : 0, cp), Theta = a.take(momentum ? p.C : 0, cp);
    dE = Operand(a, p.C, dvp, kAll);
    KJ = a.take(p.C, wide), KJS = a.take(p.C, momenta), QW = a.take(p.C, wide), QS = a.take(p.C, momentum ? wide : 0);
    dQ_b = a.take(momentum ? p.C : 0, dkp), dX = a.take(p.C, dkp);
    delta = a.take(p.C, dvp), ddelta = a.take(p.C, dvp);
    deta = p.lr_per_channel ? a.take(p.C, dvp) : a.take(1, cp), dlog = channels ? a.take(p.C, dvp) : a.take(1, cp);
    read_sums = a.take(1, cp), write_sums = a.take(1, cp);
    gTheta = a.take(1, cp), gb = a.take(1, cp), dmomentum = a.take(1, cp);
    last_rows = a.take(2 * p.parts, cp), columns = a.take(1, dvp);
    m = a.take(channels ? p.C : 0, kPad), sums = a.take(channels ? 2 * p.C : 0, kPad);
  }
};

// The states at a chunk's start and what was computed from them.
struct ChunkStart {
  float *A, *W, *S;  // W and A share memory if they are equal
  float *E, *G;
  Rho rho;
};

// One head of one sequence, or a panel of its value rows.
struct BackwardTask {
  const LinearBackward& p;
  const BiasTable& bias;
  const Retention& retention;
  BackwardScratch s;
  Task task;
  int64_t n, h, b, length;
  int dk, dkp, dvp, cp;
  index_t state;  // floats of [Dk x Dvp]
  bool momentum, channels;

  MIRAS_FN BackwardTask(const LinearBackward& params, const BiasTable& table, const Retention& gate, const BackwardScratch& scratch,
                        int64_t i)
      : p(params), bias(table), retention(gate), s(scratch), task(params, i), momentum(s.gates.momentum), channels(s.gates.channel.on) {
    n = task.n, h = task.h, b = p.batch(n), length = p.length(n);
    dk = p.Dk, dkp = round_up(dk, kPad), dvp = task.dvp, cp = round_up(p.C, kPad);
    state = index_t(dk) * dvp;
  }

  MIRAS_FN int tokens(int64_t chunk) const {
    const int64_t left = length - chunk * p.C;
    return int(left < p.C ? left : p.C);
  }
  MIRAS_FN int64_t token(int64_t chunk) const { return p.begin(n) + chunk * p.C; }
  MIRAS_FN StateShape shape() const { return {dk, task.dv, dvp, LastAxis::down}; }
  MIRAS_FN int64_t products(int c) const { return int64_t(c) * dk * dvp; }  // of a chunk and a state

  MIRAS_FN ChunkView keys(const TokenTensor& x, Dtype dtype, int64_t chunk) const { return {x, dtype, b, token(chunk), h, 0, dk}; }
  MIRAS_FN ChunkView values(const TokenTensor& x, int64_t chunk) const { return {x, p.dtype, b, token(chunk), h, task.first, task.dv}; }
  // This panel's share of a gradient that all panels add to.
  MIRAS_FN TokenTensor part(TokenTensor x, int64_t stride, Dtype dtype = Dtype::f32) const {
    x.data = static_cast<char*>(x.data) + task.panel * stride * (dtype == Dtype::f32 ? 4 : 2);
    return x;
  }
  // The gradient of a gate, [c] or the task's channels [c x Dvp]
  void put(const TokenTensor& x, bool per_channel, int64_t chunk, const float* src) const {
    const int c = tokens(chunk);
    if (!per_channel) write_gate(part(x, p.gate_part), b, token(chunk), h, c, src);
    else copy_out(src, dvp, c, task.dv, address<float>(x, b, token(chunk), h) + task.first, x.token);
  }

  MIRAS_FN ChunkStart start(int64_t i) const {
    float* const A = s.A + i * state;
    return {
        A, retention.identity ? A : s.W + i * state, s.S + i * state, s.E + i * p.C * dvp, s.G + i * p.C * dvp, {s.rho[i], s.rho_slope[i]}};
  }

  BiasRows rows(int64_t chunk, Range mine) const { return bias_rows(p, values(p.v, chunk), mine, s.gates.eta, s.delta, s.V, dvp); }

  // Gates of a chunk.
  void begin(int64_t chunk) {
    s.gates.read(p, task, b, token(chunk), tokens(chunk));
    read_delta(p, task, b, token(chunk), tokens(chunk), s.delta);
  }
  // Tokens: K transposed, with pairs also K
  void read_keys(int64_t chunk, Range mine) const { MIRAS_LEVEL::read_keys(keys(p.k, p.dtype, chunk), mine, s.K, dkp, s.KT, cp); }

  void writes(Range tokens, const float* g);
  void predict_errors(int64_t chunk, const ChunkStart& x, const float* W, const Part& mine);
  void advance_state(int64_t chunk, const ChunkStart& x, const Part& mine);
  void rerun(int64_t first, int64_t last);
  void read_chunk(int64_t chunk, const ChunkStart& x, bool recomputed, const Part& mine);
  void scores_backward(int c, const Part& mine, WriteSoon soon);
  void writes_backward(int c, Range tokens, WriteSoon soon);
  void channels_backward(int c, const ChunkStart& x);
  void momenta_reads(Range tokens, const ChunkStart& x);
  void errors_backward(int64_t chunk, const ChunkStart& x, const Part& mine);
  void query_gradient(int64_t chunk, const Part& mine);
  void key_gradient(int64_t chunk, const Part& mine);
  void gate_gradients(int64_t chunk, const ChunkStart& x);
  float rho_gradient(int c, const ChunkStart& x) const;
  template <bool kChannels> void momenta_gradient(int c, Range columns);
  template <bool kIdentity, bool kChannels> void primal_gradient(int c, Range columns, ReadSoon soon);
  void state_gradients(int c, const ChunkStart& x, float drho, ReadSoon soon);
  void chunk_backward(int64_t chunk, const ChunkStart& x, bool recomputed);
  void run();
};

// Tokens: U = eta g,  U_end = to_end * U,  U_step = Theta_C * U
void BackwardTask::writes(Range tokens, const float* g) {
  const LinearGates& gates = s.gates;
  if (gates.channel_eta || channels) {
    weigh(tokens, dvp, {gates.eta, gates.channel_eta}, g, s.U);
    weigh(tokens, dvp, gates.until_end(), s.U, s.U_end);
  } else {
    for (int t = tokens.first; t < tokens.last; ++t) {
      const Vec eta = broadcast(gates.eta[t]), end = broadcast(gates.to_end[t]);
      for (int j = 0; j < dvp; j += kLanes) {
        const Vec u = eta * load(g + t * dvp + j);
        store(s.U + t * dvp + j, u);
        store(s.U_end + t * dvp + j, end * u);
      }
    }
  }
  if (momentum) weigh_rows(tokens, dvp, gates.step_end, s.U, s.U_step);
}

// Tokens: K transposed, errors, inner gradients, what is written to the state. W: the primal as products read it
void BackwardTask::predict_errors(int64_t chunk, const ChunkStart& x, const float* W, const Part& mine) {
  const Range own = mine.tokens;
  const int count = own.count();
  const index_t first = index_t(own.first) * dvp;
  if (count == 0) return;
  MIRAS_STAGE("read", 0, 2 * count * dk);
  read_keys(chunk, own);
  MIRAS_STAGE("predict", 2 * count * dk * dvp, dk * count + dk * dvp + count * dvp);
  const ReadSoon v_soon(values(p.v, chunk), tokens(chunk), products(tokens(chunk)));
  if (bias.predicts) predict(own, dk, s.KT, cp, W, dvp, x.E, mine.once(v_soon));
  MIRAS_STAGE("row pass", 0, 7 * count * dvp);
  if (!values(p.v, chunk).in_place()) values(p.v, chunk).from(own.first).read(count, s.V + first, dvp);
  bias.grade(rows(chunk, own), x.E + first, x.G + first);
  writes(own, x.G);
  s.U_end.pack_down(own, dvp);
  if (momentum) s.U_step.pack_down(own, dvp);
}

// Value channels: the states at the start of the next chunk
void BackwardTask::advance_state(int64_t chunk, const ChunkStart& x, const Part& mine) {
  [[maybe_unused]] const int c = tokens(chunk), width = mine.channels.count();
  MIRAS_STAGE("update", 2 * c * dk * width, dk * cp + c * width + 2 * dk * width);
  const ColumnRange cols(dvp, mine.channels);
  const ReadSoon k_soon(keys(p.k, p.dtype, chunk + 1), tokens(chunk + 1), products(c));
  const auto K = over_tokens(s.K, dkp, s.KT, cp);
  s.gates.advance_dual(c, dk, K, s.U_end.down, cols, x.A, x.S, x.A + state, mine.once(k_soon));
  s.gates.advance_momenta(c, dk, K, s.U_step.down, cols, x.S, x.S + state);
}

// Recompute chunks [first, last): states, errors, inner gradients.
void BackwardTask::rerun(int64_t first, int64_t last) {
  const int64_t slot = p.slot(n) + first / p.checkpoint_every, matrix = int64_t(dk) * p.Dv;
  const float* from = p.checkpoints + (slot * p.H + h) * (momentum ? 2 : 1) * matrix + task.first;
  copy_in(from, p.Dv, dk, task.dv, s.A, dvp);
  if (momentum) copy_in(from + matrix, p.Dv, dk, task.dv, s.S, dvp);
  for (int64_t chunk = first; chunk < last; ++chunk) {
    const int64_t i = chunk - first;
    const Extent all{0, tokens(chunk), dvp};
    const ChunkStart x = start(i);
    if (!retention.identity) {
      const Rho rho = retention.primal(shape(), x.A, x.W, ChannelsInParts{p, dvp});
      s.rho[i] = rho.value, s.rho_slope[i] = rho.slope;
    }
    begin(chunk);
    const float* const W = packed_down(x.W, dk, dvp, s.W_down);
    in_parts(p, all, [&](const Part& mine) { predict_errors(chunk, x, W, mine); });
    if (chunk + 1 < last) in_parts(p, all, [&](const Part& mine) { advance_state(chunk, x, mine); });
  }
}

}  // namespace miras::cpu::MIRAS_LEVEL
