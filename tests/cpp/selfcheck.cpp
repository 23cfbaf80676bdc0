// The C++ kernels against the definition in double precision; needs only a compiler: for machines without torch or Python.
//
//   g++ -O2 -std=c++20 -Icsrc tests/cpp/selfcheck.cpp csrc/cpu/*.cpp -o selfcheck && ./selfcheck
//
// Every kernel at every instruction set level that this machine has: forward, backward against central differences, and steps. One bias
// and one gate suffice: the rest is the same on every machine and has its own tests.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/capability.h"

using namespace miras;
using Floats = std::vector<float>;
using Doubles = std::vector<double>;

namespace {

constexpr int kTokens = 21, kHeads = 2, kChunk = 8, kEvery = 2;
// Limits well above rounding after some hundred float32 operations, and well below the effect of a mistake. bfloat16 has 8 bits.
constexpr double kFloatLimit = 1e-4, kBfloatLimit = 2e-2;

// Numbers in (-scale, scale), plus offset
Floats draw(int count, float scale, float offset = 0.0f) {
  static uint32_t seed = 1;
  Floats x(count);
  for (float& y : x) seed = seed * 1664525u + 1013904223u, y = offset + scale * (float(seed >> 8) / float(1 << 23) - 1.0f);
  return x;
}

// ---- the definition, in double precision: bias L2, no gate but decay ----

// One call: a linear memory [V, K], or an MLP with W1 [V, hidden] and W2 [hidden, K = V].
struct Problem {
  int K, V, hidden;  // hidden is 0 for a linear memory
  Doubles q, k, v, lr, decay, first, second, ln_weight, ln_bias;

  Doubles& tensor(int i) { return *std::vector{&q, &k, &v, &lr, &decay, &first, &second, &ln_weight, &ln_bias}[i]; }
};

Doubles product(const double* a, const double* x, int rows, int columns) {
  Doubles y(rows);
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) y[i] += a[i * columns + j] * x[j];
  return y;
}
double gelu(double x) { return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }
double gelu_slope(double x) {
  const double t = std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x));
  return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * std::sqrt(2 / M_PI) * (1 + 3 * 0.044715 * x * x);
}
constexpr double kEps = 1e-6;
double spread(const Doubles& u, double& mean) {
  mean = 0;
  for (const double x : u) mean += x / double(u.size());
  double square = kEps;
  for (const double x : u) square += (x - mean) * (x - mean) / double(u.size());
  return std::sqrt(square);
}

// M(x) of one head, and the gradients of |M(x) - wanted|^2 / 2 if requested
Doubles recall(const Problem& p, int h, const Doubles& first, const Doubles& second, const double* x, const double* wanted = nullptr,
               Doubles* d_first = nullptr, Doubles* d_second = nullptr) {
  if (!p.hidden) {
    Doubles y = product(first.data(), x, p.V, p.K);
    if (wanted)
      for (int i = 0; i < p.V; ++i)
        for (int j = 0; j < p.K; ++j) (*d_first)[i * p.K + j] = (y[i] - wanted[i]) * x[j];
    return y;
  }
  const int d = p.V, hd = p.hidden;
  const double *weight = &p.ln_weight[h * d], *bias = &p.ln_bias[h * d];
  const Doubles z = product(second.data(), x, hd, d);
  Doubles a(hd), y(d);
  for (int i = 0; i < hd; ++i) a[i] = gelu(z[i]);
  const Doubles u = product(first.data(), a.data(), d, hd);
  double mean;
  const double deviation = spread(u, mean);
  for (int i = 0; i < d; ++i) y[i] = x[i] + (u[i] - mean) / deviation * weight[i] + bias[i];
  if (!wanted) return y;
  double sum = 0, along = 0;
  for (int i = 0; i < d; ++i) {
    const double g = (y[i] - wanted[i]) * weight[i];
    sum += g / d, along += g * (u[i] - mean) / deviation / d;
  }
  Doubles du(d), dz(hd);
  for (int i = 0; i < d; ++i) du[i] = ((y[i] - wanted[i]) * weight[i] - sum - along * (u[i] - mean) / deviation) / deviation;
  for (int j = 0; j < hd; ++j)
    for (int i = 0; i < d; ++i) (*d_first)[i * hd + j] = du[i] * a[j], dz[j] += first[i * hd + j] * du[i] * gelu_slope(z[j]);
  for (int j = 0; j < hd; ++j)
    for (int i = 0; i < d; ++i) (*d_second)[j * d + i] = dz[j] * x[i];
  return y;
}

Doubles define(const Problem& p) {
  Doubles out(kTokens * kHeads * p.V);
  const size_t size1 = p.first.size() / kHeads, size2 = p.second.size() / kHeads;
  for (int h = 0; h < kHeads; ++h) {
    Doubles first(p.first.begin() + h * size1, p.first.begin() + (h + 1) * size1);
    Doubles second(p.second.begin() + h * size2, p.second.begin() + (h + 1) * size2);
    Doubles first0, second0, d_first(size1), d_second(size2);
    for (int t = 0; t < kTokens; ++t) {
      if (t % kChunk == 0) first0 = first, second0 = second;
      const int at = t * kHeads + h;
      recall(p, h, first0, second0, &p.k[at * p.K], &p.v[at * p.V], &d_first, &d_second);
      const double alpha = std::exp(p.decay[at]);
      for (size_t i = 0; i < size1; ++i) first[i] = alpha * first[i] - p.lr[at] * d_first[i];
      for (size_t i = 0; i < size2; ++i) second[i] = alpha * second[i] - p.lr[at] * d_second[i];
      const Doubles y = recall(p, h, first, second, &p.q[at * p.K]);
      std::copy(y.begin(), y.end(), &out[at * p.V]);
    }
  }
  return out;
}

// ---- the comparison ----

int wrong = 0;
void compare(const std::string& what, const Floats& got, const Doubles& wanted, double limit) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < wanted.size(); ++i) difference += std::pow(got[i] - wanted[i], 2), norm += std::pow(wanted[i], 2);
  const double error = std::sqrt(difference / norm);
  const bool right = got.size() == wanted.size() && error <= limit;  // a NaN is wrong
  std::printf("%-34s %.1e%s\n", what.c_str(), error, right ? "" : "  WRONG");
  wrong += !right;
}
// Against central differences of sum(out o grad_out), at some entries
void compare_gradient(const std::string& what, const Floats& got, Problem p, int which, const Floats& grad_out) {
  Floats some;
  Doubles wanted;
  for (size_t i = 0; i < got.size(); i += 1 + got.size() / 40) {
    double& x = p.tensor(which)[i];
    const double before = x, step = 1e-5;
    double change = 0;
    for (const double sign : {1.0, -1.0}) {
      x = before + sign * step;
      const Doubles out = define(p);
      for (size_t j = 0; j < out.size(); ++j) change += sign * out[j] * grad_out[j];
    }
    x = before, some.push_back(got[i]), wanted.push_back(change / (2 * step));
  }
  compare(what, some, wanted, kFloatLimit);
}

// ---- the kernels' arguments ----

TokenTensor tokens(void* x, int width) { return {x, kTokens * kHeads * width, kHeads * width, width, 1}; }
TokenTensor gate(Floats& x) { return {x.data(), kTokens * kHeads, kHeads, 1, 0}; }
StateTensor state(Floats& x, int rows, int columns) { return {x.data(), kHeads * rows * columns, rows * columns, columns, 1}; }
Doubles wide(const Floats& x) { return {x.begin(), x.end()}; }

std::vector<uint16_t> bfloat16(Floats& x) {  // truncates, in x too
  std::vector<uint16_t> bits(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    uint32_t y;
    std::memcpy(&y, &x[i], 4);
    bits[i] = uint16_t(y >> 16), y &= 0xffff0000u;
    std::memcpy(&x[i], &y, 4);
  }
  return bits;
}

// The buffers of a decoder with `m` matrices [K, V], W1 and linear duals transposed
struct Room {
  Floats start, written, left, right, weights, open_log_decay;
  int64_t position = 0;
  Room(int m, int K, int V)
      : start(kHeads * m * K * V), written(start.size()), left(kHeads * m * kChunk * K), right(kHeads * m * kChunk * V),
        weights(kHeads * (2 + kChunk)), open_log_decay(kHeads) {}
  void fill(StepBuffers& to) {
    to.start = start.data(), to.written = written.data(), to.left = left.data(), to.right = right.data(), to.weights = weights.data();
    to.open_log_decay = open_log_decay.data(), to.position = &position, to.rows = kChunk;
  }
};

struct Inputs {
  Floats q, k, v, lr, decay, grad_out;
  Inputs(int K, int V)
      : q(draw(kTokens * kHeads * K, 0.4f)), k(draw(kTokens * kHeads * K, 0.4f)), v(draw(kTokens * kHeads * V, 1.0f)),
        lr(draw(kTokens * kHeads, 0.1f, 0.2f)), decay(draw(kTokens * kHeads, 0.05f, -0.1f)), grad_out(draw(kTokens * kHeads * V, 1.0f)) {}
  void fill(MemoryParams& p, int K, int V) {
    p.B = p.N = 1, p.T = kTokens, p.H = kHeads, p.C = kChunk;
    p.q = tokens(q.data(), K), p.k = tokens(k.data(), K), p.v = tokens(v.data(), V), p.lr = gate(lr), p.log_decay = gate(decay);
  }
};

// One token at a time
template <class Params> Floats steps(void (*kernel)(const Params&, int64_t, int64_t), Params p, Inputs& in, int K, int V) {
  Floats out(kTokens * kHeads * V);
  p.T = 1;
  for (int t = 0; t < kTokens; ++t) {
    p.q.data = &in.q[t * kHeads * K], p.k.data = &in.k[t * kHeads * K], p.v.data = &in.v[t * kHeads * V];
    p.lr.data = &in.lr[t * kHeads], p.log_decay.data = &in.decay[t * kHeads];
    p.out = tokens(&out[t * kHeads * V], V);
    kernel(p, 0, kHeads);
    *p.state.position = (t + 1) % kChunk;
  }
  return out;
}

// Chunks of one token with the decay in every key channel against those of the block kernels with one decay
void keyed(const cpu::Kernels& kernels, const std::string& level, LinearForward p, LinearBackward b, const Floats& out,
           std::vector<const Floats*> gradients, const Floats& decay, int K) {
  const auto run = [&](auto forward, auto backward) {
    forward(p, 0, p.tasks()), backward(b, 0, b.tasks());
    std::vector<Floats> found{out};
    for (const Floats* gradient : gradients) found.push_back(*gradient);
    return found;
  };
  p.chunk = b.chunk = 1;
  const std::vector<Floats> wanted = run(kernels.block_forward, kernels.block_backward);
  Floats channels(decay.size() * K), gradient(channels.size());
  for (size_t i = 0; i < channels.size(); ++i) channels[i] = decay[i / K];
  p.log_decay = b.log_decay = {}, p.key_log_decay = b.key_log_decay = tokens(channels.data(), K);
  b.dlog_decay = {}, b.dkey_log_decay = tokens(gradient.data(), K);
  const std::vector<Floats> found = run(kernels.keyed_forward, kernels.keyed_backward);
  const char* names[] = {"forward", "backward dq", "backward dk", "backward dv", "backward dlr", "backward ddual"};
  for (int i = 0; i < 6; ++i) compare(level + " keyed_" + names[i], found[i], wide(wanted[i]), kFloatLimit);
}

void linear(const cpu::Kernels& kernels, const std::string& level) {
  const int K = 20, V = 13;
  Inputs in(K, V);
  Floats dual = draw(kHeads * V * K, 0.5f), out(kTokens * kHeads * V);
  const auto problem = [&] {
    return Problem{K, V, 0, wide(in.q), wide(in.k), wide(in.v), wide(in.lr), wide(in.decay), wide(dual), {}, {}, {}};
  };
  const auto fill = [&](LinearParams& p) {
    in.fill(p, K, V);
    p.Dk = K, p.Dv = V, p.panel_width = V, p.dual = state(dual, V, K);
  };
  LinearForward p;
  fill(p);
  p.out = tokens(out.data(), V), p.checkpoint_every = kEvery;
  Floats checkpoints(p.slots() * kHeads * K * V);
  p.checkpoints = checkpoints.data();

  LinearBackward b;
  fill(b);
  Floats dq(in.q.size()), dk(dq), dv(in.v.size()), dlr(in.lr.size()), ddecay(dlr), d_dual(dual.size());
  b.checkpoints = checkpoints.data(), b.checkpoint_every = b.segment = kEvery, b.grad_out = tokens(in.grad_out.data(), V);
  b.dq = tokens(dq.data(), K), b.dk = tokens(dk.data(), K), b.dv = tokens(dv.data(), V), b.dlr = gate(dlr), b.dlog_decay = gate(ddecay);
  b.d_dual = state(d_dual, V, K);
  const Floats* gradients[] = {&dq, &dk, &dv, &dlr, &ddecay, &d_dual};
  const char* names[] = {"q", "k", "v", "lr", "log_decay", "dual"};
  const auto check = [&](const std::string& kernel, auto forward, auto backward) {
    forward(p, 0, p.tasks());
    compare(kernel + "_forward", out, define(problem()), kFloatLimit);
    backward(b, 0, b.tasks());
    for (int i = 0; i < 6; ++i) compare_gradient(kernel + "_backward d" + names[i], *gradients[i], problem(), i, in.grad_out);
  };
  p.chunk = b.chunk = kChunk, p.C = b.C = 2 * kChunk;
  check(level + " block", kernels.block_forward, kernels.block_backward);
  keyed(kernels, level, p, b, out, {&dq, &dk, &dv, &dlr, &d_dual}, in.decay, K);
  p.chunk = b.chunk = 0, p.C = b.C = kChunk;
  check(level + " linear", kernels.linear_forward, kernels.linear_backward);

  LinearStep s;
  fill(s);
  Room room(1, K, V);
  for (int h = 0; h < kHeads; ++h)
    for (int i = 0; i < V; ++i)
      for (int j = 0; j < K; ++j) room.start[(h * K + j) * V + i] = dual[(h * V + i) * K + j];
  room.fill(s.state);
  compare(level + " linear_step", steps(kernels.linear_step, s, in, K, V), define(problem()), kFloatLimit);

  auto q = bfloat16(in.q), k = bfloat16(in.k), v = bfloat16(in.v);
  std::vector<uint16_t> half(out.size());
  p.dtype = Dtype::bf16, p.checkpoints = nullptr, p.checkpoint_every = 0;
  p.q.data = q.data(), p.k.data = k.data(), p.v.data = v.data(), p.out.data = half.data();
  kernels.linear_forward(p, 0, p.tasks());
  for (size_t i = 0; i < half.size(); ++i) {
    const uint32_t bits = uint32_t(half[i]) << 16;
    std::memcpy(&out[i], &bits, 4);
  }
  compare(level + " linear_forward, bfloat16", out, define(problem()), kBfloatLimit);
}

void mlp(const cpu::Kernels& kernels, const std::string& level) {
  const int D = 12, Hd = 20;
  Inputs in(D, D);
  Floats w1 = draw(kHeads * D * Hd, 0.5f), w2 = draw(kHeads * Hd * D, 0.5f), out(kTokens * kHeads * D);
  Floats weight = draw(kHeads * D, 0.2f, 1.0f), bias = draw(kHeads * D, 0.2f);
  const Problem problem{D,        D,        Hd,           wide(in.q), wide(in.k), wide(in.v), wide(in.lr), wide(in.decay),
                        wide(w1), wide(w2), wide(weight), wide(bias)};
  const auto fill = [&](MlpParams& p) {
    in.fill(p, D, D);
    p.D = D, p.Hd = Hd, p.ln_weight = weight.data(), p.ln_bias = bias.data(), p.ln_eps = float(kEps);
    p.dual[0] = state(w1, D, Hd), p.dual[1] = state(w2, Hd, D);
  };
  MlpForward p;
  fill(p);
  p.out = tokens(out.data(), D), p.checkpoint_every = kEvery;
  Floats checkpoints(p.slots() * kHeads * 2 * Hd * D), products(2 * out.size()), scores(kHeads * kTokens * kChunk);
  p.checkpoints = checkpoints.data(), p.products = products.data(), p.scores = scores.data();
  kernels.mlp_forward(p, 0, p.tasks());
  compare(level + " mlp_forward", out, define(problem), kFloatLimit);

  MlpBackward b;
  fill(b);
  Floats dq(in.q.size()), dk(dq), dv(dq), dlr(in.lr.size()), ddecay(dlr);
  Floats d_w1(w1.size()), d_w2(w2.size()), d_weight(weight.size()), d_bias(d_weight);
  b.checkpoints = checkpoints.data(), b.products = products.data(), b.scores = scores.data();
  b.checkpoint_every = b.segment = kEvery, b.grad_out = tokens(in.grad_out.data(), D);
  b.dq = tokens(dq.data(), D), b.dk = tokens(dk.data(), D), b.dv = tokens(dv.data(), D), b.dlr = gate(dlr), b.dlog_decay = gate(ddecay);
  b.d_dual[0] = state(d_w1, D, Hd), b.d_dual[1] = state(d_w2, Hd, D), b.dln_weight = d_weight.data(), b.dln_bias = d_bias.data();
  kernels.mlp_backward(b, 0, b.tasks());
  const Floats* gradients[] = {&dq, &dk, &dv, &dlr, &ddecay, &d_w1, &d_w2, &d_weight, &d_bias};
  const char* names[] = {"q", "k", "v", "lr", "log_decay", "w1", "w2", "ln_weight", "ln_bias"};
  for (int i = 0; i < 9; ++i) compare_gradient(level + " mlp_backward d" + names[i], *gradients[i], problem, i, in.grad_out);

  MlpStep s;
  fill(s);
  Room room(2, Hd, D);
  for (int h = 0; h < kHeads; ++h)
    for (int j = 0; j < Hd; ++j)
      for (int i = 0; i < D; ++i) {
        room.start[((h * 2 + 0) * Hd + j) * D + i] = w1[(h * D + i) * Hd + j];
        room.start[((h * 2 + 1) * Hd + j) * D + i] = w2[(h * Hd + j) * D + i];
      }
  room.fill(s.state);
  compare(level + " mlp_step", steps(kernels.mlp_step, s, in, D, D), define(problem), kFloatLimit);
}

}  // namespace

int main() {
  for (const std::string& level : cpu::capabilities()) {
    setenv("MIRAS_CPU_CAPABILITY", level.c_str(), 1);
    linear(cpu::kernels(), level);
    mlp(cpu::kernels(), level);
  }
  std::printf(wrong ? "%d WRONG\n" : "right\n", wrong);
  return wrong != 0;
}
