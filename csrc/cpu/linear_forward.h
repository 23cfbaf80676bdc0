// Forward of the linear memory, chunk by chunk (docs/mathematics.md, section 2), with W0 = phi(A_0) and the retention gate's rho, mostly 1:
//
//   E = K W0' - V    U = eta psi(E)    O = gamma * (Q W0') - rho (L o Q K') U    A_C = gamma_C A_0 - sum_s (gamma_C / gamma_s) U_s k_s'
//
// and with momentum, M in L's place (see Gates):
//
//   O += rho b * (Q S_0')    A_C = gamma_C A_0 + b_C S_0 - sum_s M_Cs U_s k_s'    S_C = pi_C S_0 - sum_s Theta_Cs U_s k_s'
//
// A task is one head of one sequence, which threads may share (parts.h), or a panel of its value rows. Functions that take a Part do its
// share: of the tokens or of the value channels, as their comments say.
//
//   c tokens of the chunk (C at most, Cp padded)   Dk key channels   Dv value channels of the task (Dvp padded)
//   T after a name: transposed. States are held transposed: A, S, W [Dk x Dvp].
#pragma once

#include "channel_decay.h"

namespace miras::cpu::MIRAS_LEVEL {

struct ForwardScratch {
  float *A, *A0;                    // [Dk x Dvp]  current dual; that of an open chunk's start
  float *W, *R;                     // [Dk x Dvp]  primal; what an open chunk reads. Unless W = A
  float* S;                         // [Dk x Dvp]  momenta
  float *W_down, *R_down, *S_down;  // [Dk x Dvp] their copies for products, with pairs
  Operand K;                        // [C x Dkp]   with pairs
  float* KT;                        // [Dk x Cp]
  Operand Q;                        // [C x Dkp]   if q cannot be read in place
  float *V, *O;                     // [C x Dvp]   if v and out cannot be used in place
  Operand U, U_end;                 // [C x Dvp]   K W0' at first, then eta psi(E), for the read-outs times rho; U_end_s = to_end_s U_s
  Operand U_step;                   // [C x Dvp]   Theta_Cs U_s
  float* O_own;                     // [C x Dvp]   rho b * (Q S_0'); if decays are channel-wise, also what is read of the chunk's own writes
  Operand P;                        // [C x Cp]    M o Q K', or Q K' if decays are channel-wise
  float* last_rows;                 // [2 x Cp] of each part
  float* delta;                     // [C] or [C x Dvp]
  float* open_log_decay;            // [1] or [Dvp], padded
  float* spare;                     // [Dv x Dkp]
  LinearGates gates;

  MIRAS_FN ForwardScratch(Arena& a, const LinearForward& p) : gates(a, p) {
    const int cp = round_up(p.C, kPad), dkp = round_up(p.Dk, kPad), dvp = round_up(p.panel_width, kPad);
    const int primal = retention_traits(p.retention).identity ? 0 : dvp, momenta = p.momentum ? dvp : 0;
    A = a.take(p.Dk, dvp), A0 = a.take(p.Dk, p.start ? dvp : 0);
    W = a.take(p.Dk, primal), R = a.take(p.Dk, p.start ? primal : 0);
    S = a.take(p.Dk, momenta);
    const int copied = kPairs ? int(half(p.Dk)) : 0;
    W_down = a.take(copied, dvp), R_down = a.take(copied, p.start ? dvp : 0), S_down = a.take(copied, momenta);
    K = Operand(a, kPairs ? p.C : 0, dkp, kAlong | kDown), KT = a.take(p.Dk, cp);
    Q = Operand(a, p.C, dkp, kAlong);
    V = a.take(p.C, dvp), O = a.take(p.C, dvp);
    U = Operand(a, p.C, dvp, kFloat | kDown), U_end = Operand(a, p.C, dvp, kFloat | kDown);
    U_step = Operand(a, p.C, momenta, kFloat | kDown), O_own = a.take(p.C, p.decay_per_channel ? dvp : momenta);
    P = Operand(a, p.C, cp, kFloat | kAlong);
    last_rows = a.take(2 * p.parts, cp), delta = a.take(p.C, dvp), open_log_decay = a.take(1, dvp);
    spare = a.take(dvp, dkp);
  }
};

struct ForwardTask {
  const LinearForward& p;
  const BiasTable& bias;
  const Retention& retention;
  ForwardScratch s;
  Task task;
  int64_t n, h, b, length;
  int dk, dkp, dvp, cp;
  bool momentum;

  // Of the current chunk
  int64_t token;
  int c;
  const float* open_start;  // the dual at its start if it was open before the call, else null
  const float *W, *R, *S;   // the primal for its predictions; what it reads; the momenta: as products read them
  Rho rho;

  MIRAS_FN ForwardTask(const LinearForward& params, const BiasTable& table, const Retention& gate, const ForwardScratch& scratch, int64_t i)
      : p(params), bias(table), retention(gate), s(scratch), task(params, i), momentum(s.gates.momentum) {
    n = task.n, h = task.h, b = p.batch(n), length = p.length(n);
    dk = p.Dk, dkp = round_up(dk, kPad), dvp = task.dvp, cp = round_up(p.C, kPad);
  }

  MIRAS_FN ChunkView keys(const TokenTensor& x) const { return {x, p.dtype, b, token, h, 0, dk}; }
  MIRAS_FN ChunkView values(const TokenTensor& x) const { return {x, p.dtype, b, token, h, task.first, task.dv}; }
  MIRAS_FN StateShape shape() const { return {dk, task.dv, dvp, LastAxis::down}; }
  MIRAS_FN bool ends_differ() const { return s.gates.fades() || retention.scales_reads; }  // U_end is not U
  MIRAS_FN int64_t products() const { return int64_t(c) * dk * dvp; }                      // of a chunk and a state
  MIRAS_FN Rows queries() const { return p.dtype == Dtype::f32 ? Rows{keys(p.q).at<float>(), p.q.token} : by_rows(s.Q.along, dkp); }
  void put(const StateTensor& to, const float* state) { write_state(to, n, h, task.first, task.dv, dk, state, dvp, s.spare); }

  void read_open_chunk(int position);
  void save(int64_t chunk) const;
  void open_primal();
  void pack_states();
  void write(const Part& mine, ReadSoon soon);
  void read_within(const Part& mine, WriteSoon soon);
  void read_out(const Part& mine, ReadSoon soon);
  void advance_state(const Part& mine, ReadSoon soon);
  void pass_decays(bool closes);
  void run();
};

// An open chunk: predictions use the state at its start, reads and writes go on from the current state.
void ForwardTask::read_open_chunk(int position) {
  open_start = nullptr;
  fill_zero(s.open_log_decay, round_up(s.gates.channel.on ? dvp : 1, kPad));
  if (position == 0) return;
  read_state(p.start, n, h, task.first, task.dv, dk, s.A0, dvp);
  open_start = s.A0;
  if (!p.open_log_decay) return;
  const bool channels = s.gates.channel.on;
  const float* from = p.open_log_decay + (channels ? (n * p.H + h) * p.Dv + task.first : n * p.H + h);
  for (int j = 0; j < (channels ? task.dv : 1); ++j) s.open_log_decay[j] = from[j];
}

// The checkpoint of a chunk: A, then S
void ForwardTask::save(int64_t chunk) const {
  const int64_t slot = p.slot(n) + chunk / p.checkpoint_every, matrix = int64_t(dk) * p.Dv;
  float* to = p.checkpoints + (slot * p.H + h) * (momentum ? 2 : 1) * matrix + task.first;
  copy_out(s.A, dvp, dk, task.dv, to, p.Dv);
  if (momentum) copy_out(s.S, dvp, dk, task.dv, to + matrix, p.Dv);
}

// W = phi(A_0), rho. Token t of an open chunk, its pos-th so far, reads gamma_t R with R = gamma_pos W + rho (A_pos - gamma_pos A_0).
void ForwardTask::open_primal() {
  W = open_start ? open_start : s.A, R = s.A;
  if (retention.identity) return;
  rho = retention.primal(shape(), W, s.W, ChannelsInParts{p, dvp});
  W = R = s.W;
  if (!open_start) return;
  shape().each([&](index_t at, int j) MIRAS_LAMBDA {
    const Vec gamma = exp_nonpositive(s.gates.channel.on ? load(s.open_log_decay + j) : broadcast(s.open_log_decay[0]));
    store(s.R + at, gamma * load(s.W + at) + rho.value * (load(s.A + at) - gamma * load(open_start + at)));
  });
  R = s.R;
}

// W, R and S as products read them
void ForwardTask::pack_states() {
  const bool same = R == W;
  W = packed_down(W, dk, dvp, s.W_down);
  R = same ? W : packed_down(R, dk, dvp, s.R_down);
  S = momentum ? packed_down(s.S, dk, dvp, s.S_down) : nullptr;
}

// Tokens: U, U_end, U_step
void ForwardTask::write(const Part& mine, ReadSoon soon) {
  const LinearGates& gates = s.gates;
  const Range tokens = mine.tokens;
  const int count = tokens.count();
  const index_t first = index_t(tokens.first) * dvp;
  if (count == 0) return;
  if (!values(p.v).in_place()) values(p.v).from(tokens.first).read(count, s.V + first, dvp);
  MIRAS_STAGE("predict", 2 * count * dk * dvp, dk * count + dk * dvp + count * dvp);
  if (bias.predicts) predict(tokens, dk, s.KT, cp, W, dvp, s.U, soon);
  MIRAS_STAGE("row pass", 0, 4 * count * dvp);
  const float* to_end = gates.fades() && !gates.channel.on ? gates.to_end + tokens.first : nullptr;
  bias.write(bias_rows(p, values(p.v), tokens, gates.eta, s.delta, s.V, dvp), s.U + first, to_end, s.U_end + first);
  if (gates.channel.on) weigh(tokens, dvp, gates.until_end(), s.U, s.U_end);
  if (momentum) weigh_rows(tokens, dvp, gates.step_end, s.U, s.U_step);
  if (retention.scales_reads) {
    for (index_t i = first; i < first + index_t(count) * dvp; i += kLanes) {
      const Vec u = load(s.U + i);
      if (!gates.fades()) store(s.U_end + i, u);
      store(s.U + i, rho.value * u);
    }
  }
  s.U.pack_down(tokens, dvp);
  if (ends_differ()) s.U_end.pack_down(tokens, dvp);
  if (momentum) s.U_step.pack_down(tokens, dvp);
}

// Tokens: P, and O_own of the momenta
void ForwardTask::read_within(const Part& mine, WriteSoon soon) {
  const LinearGates& gates = s.gates;
  const Range tokens = mine.tokens;
  const int count = tokens.count();
  const Rows Q = queries();
  MIRAS_STAGE("pairs", count * (count + 1) * dk, count * dk + dk * cp + count * (count + 1) / 2);
  if (p.dtype != Dtype::f32) keys(p.q).from(tokens.first).read(count, s.Q.along + index_t(tokens.first) * dkp, dkp);
  float* const own = s.O_own + index_t(tokens.first) * dvp;
  if (momentum) {
    times_state(tokens, dk, Q, S, dvp, s.O_own);
    weigh(tokens, dvp, gates.of_momenta(), s.O_own, s.O_own);
    if (retention.scales_reads) scale(rho.value, index_t(count) * dvp, own);
  }
  float* const last = s.last_rows + index_t(mine.index) * 2 * cp;
  if (gates.channel.on) {
    if (!momentum) fill_zero(own, int64_t(count) * dvp);
    plain_scores(tokens, dk, Q, s.KT, cp, s.P.x, soon);
  } else if (momentum) {
    momentum_scores<false>(gates, tokens, dk, Q, s.KT, cp, last, s.P.along, nullptr, nullptr, nullptr, soon);
  } else {
    decayed_scores<false>(gates, tokens, dk, Q, s.KT, cp, last, s.P.along, nullptr, nullptr, soon);
  }
}

// Value channels: O = gamma * (Q R') + O_own - P U
void ForwardTask::read_out(const Part& mine, ReadSoon soon) {
  const Range cols = mine.channels;
  [[maybe_unused]] const int width = cols.count();
  MIRAS_STAGE("read-out", 2 * c * dk * width + c * (c + 1) * width, c * dk + dk * width + c * (c + 1) / 2 + 2 * c * width);
  const LinearGates& gates = s.gates;
  const Rows Q = queries();
  const ChunkView out = values(p.out);
  const bool channels = gates.channel.on, own = channels || momentum;
  if (channels) gates.channel.subtract_writes(c, cols, s.P, s.U, momentum, s.O_own);
  float* O = out.in_place() ? out.at<float>() : s.O;
  const index_t ldo = out.in_place() ? p.out.token : dvp;
  sweep(c, cols, [&]<int Height, int N>(int i, int j) MIRAS_LAMBDA {
    Tile<Height, N> o;
    o.add(Q.at(i), R + j, dvp, 0, dk, soon);
    if (channels) o.multiply(gates.channel.gamma + index_t(i) * dvp + j, dvp);
    else o.scale_rows(gates.gamma + i);
    if (own) o.add_matrix(s.O_own + index_t(i) * dvp + j, dvp);
    if (!channels) o.subtract(by_rows(s.P.along, cp).at(i), s.U.down + j, dvp, 0, i + Height);
    o.store_to(O + i * ldo + j, ldo);
  });
  if (out.in_place()) return;
  const int dv = minimum(cols.last, task.dv) - cols.first;
  ChunkView{p.out, p.dtype, b, token, h, task.first + cols.first, dv}.write(c, s.O + cols.first, dvp);
}

// Value channels: A, S
void ForwardTask::advance_state(const Part& mine, ReadSoon soon) {
  [[maybe_unused]] const int width = mine.channels.count();
  MIRAS_STAGE("update", 2 * c * dk * width, dk * cp + c * width + 2 * dk * width);
  const LinearGates& gates = s.gates;
  const ColumnRange cols(dvp, mine.channels);
  const auto K = over_tokens(s.K, dkp, s.KT, cp);
  gates.advance_dual(c, dk, K, ends_differ() ? s.U_end.down : s.U.down, cols, s.A, s.S, s.A, soon);
  gates.advance_momenta(c, dk, K, s.U_step.down, cols, s.S, s.S);
}

// The open chunk's log-decay after the chunk's tokens
void ForwardTask::pass_decays(bool closes) {
  const ChannelDecay& channel = s.gates.channel;
  if (channel.on) {
    for (int t = 0; t < c; ++t)
      for (int j = 0; j < dvp; ++j) s.open_log_decay[j] += channel.log_decay[t * dvp + j];
  } else if (s.gates.decays) {
    for (int t = 0; t < c; ++t) s.open_log_decay[0] += s.gates.log_decay[t];
  }
  if (closes) fill_zero(s.open_log_decay, channel.on ? dvp : 1);
}

void ForwardTask::run() {
  s.P.clear(p.C, cp);  // nothing is written right of the diagonal
  if (p.dual) read_state(p.dual, n, h, task.first, task.dv, dk, s.A, dvp);
  else fill_zero(s.A, int64_t(dk) * dvp);
  if (momentum) read_state(p.momenta, n, h, task.first, task.dv, dk, s.S, dvp);
  int position = p.position ? int(p.position[n]) : 0;
  read_open_chunk(position);
  bool start_written = false;

  int64_t chunk = 0;
  for (int64_t t = 0; t < length; ++chunk) {
    const int64_t left = length - t;
    c = int(left < p.C - position ? left : p.C - position);
    token = p.begin(n) + t;
    const bool closes = position + c == p.C;

    MIRAS_STAGE("read", 0, c * dk + dk * cp);
    if (p.checkpoints && chunk % p.checkpoint_every == 0) save(chunk);
    if (!closes && p.final_start) {  // this chunk stays open: return the state at its start
      put(p.final_start, open_start ? open_start : s.A);
      start_written = true;
    }

    s.gates.read(p, task, b, token, c);
    read_delta(p, task, b, token, c, s.delta);
    read_keys(keys(p.k), c, s.K, dkp, s.KT, cp);

    const int next = int(left - c < p.C ? left - c : p.C);
    const ReadSoon k_soon({p.k, p.dtype, b, token + c, h, 0, dk}, next, products());
    const ReadSoon v_soon({p.v, p.dtype, b, token + c, h, task.first, task.dv}, next, products());
    open_primal();
    pack_states();
    in_parts(p, {0, c, dvp}, [&](const Part& mine) {
      write(mine, mine.once(ReadSoon(keys(p.q), c, products())));
      read_within(mine, mine.once(WriteSoon(values(p.out), c, int64_t(c) * c / 2 * dk)));
    });
    in_parts(p, {0, c, dvp}, [&](const Part& mine) {
      read_out(mine, mine.once(k_soon));
      advance_state(mine, mine.once(v_soon));
    });
    pass_decays(closes);
    t += c;
    position = 0, open_start = nullptr;
  }

  if (p.final_dual) put(p.final_dual, s.A);
  if (p.final_momenta) put(p.final_momenta, s.S);
  if (p.final_start && !start_written) put(p.final_start, open_start ? open_start : s.A);  // no token, or a chunk boundary
  if (!p.final_log_decay) return;
  if (s.gates.channel.on) {
    float* to = p.final_log_decay + (n * p.H + h) * p.Dv + task.first;
    for (int j = 0; j < task.dv; ++j) to[j] = s.open_log_decay[j];
  } else if (task.panel == 0) {
    p.final_log_decay[n * p.H + h] = s.open_log_decay[0];
  }
}

static void linear_forward(const LinearForward& p, int64_t first, int64_t last) {
  MIRAS_PASS("forward");
  const BiasTable bias = bias_table(p, p.lr_per_channel);
  const Retention retention(p);
  with_scratch<ForwardScratch>(p, [&](const ForwardScratch& s) MIRAS_LAMBDA {
    for (int64_t i = first; i < last; ++i) ForwardTask(p, bias, retention, s, i).run();
  });
  MIRAS_PASS(nullptr);
}

}  // namespace miras::cpu::MIRAS_LEVEL
