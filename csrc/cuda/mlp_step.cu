// Decoding steps of the MLP memory S1 = W1' [Hd, D], W2 [Hd, D], a token at a time; kappa: `weights`, mu: `momentum_weights`.
//
//     z = W2 k;  a = gelu(z);  u = S1' a;  e = k + LN(u) - v;  g = psi(e)                   both matrices at the chunk's start
//     gu = LN-vjp(w g);  gz = gelu'(z) o (S1 gu)                                            the inner gradients
//     mu <- theta mu;  kappa <- alpha kappa + mu                                        of what the chunk has written
//     zq = R2 q;  aq = gelu(zq);  o = q + LN(R1' aq)                                        (a, -eta gu), (-eta gz, k) get the weight 1
//     R x = gamma phi(A_0) x + rho (kappa_0 D x + kappa_1 S_0 x + sum_i left_i kappa_i (right_i . x))   the other way round for R1'
//
// Each block takes kUnits hidden units, a part of both matrices; what needs all units is left to the next launch:
//
//     mlp_predict   z and W2 q of its units, and its part of u
//     mlp_write     gz of its units; the factors; aq of its units, its part of R1' aq without the factors, and of a_i . aq for them
//     mlp_finish    the output; where the chunk closes, its part of both matrices, which start the next one
//
// Threads form groups of kLanes, one group a hidden unit: a row of both matrices. A thread has kVec neighbouring columns in each of
// kStrips strips, of the rows and of k, q and gu. The first warp takes the D channels, so that LayerNorm needs no barrier. With a gate
// that couples columns of S1 or a whole matrix, the block of the first part handles the end of a chunk.
#include "step.h"

namespace miras::cuda {
namespace {

constexpr int kMaxChannels = kMaxMlpHead, kUnits = 64, kChannels = kMaxChannels / 32;  // kChannels: of a lane of the first warp

// x = (u - m(u)) / deviation over D channels distributed over a warp, and what its derivative needs. x[j] is channel lane + 32 j.
struct LayerNorm {
  int D;
  float x[kChannels], inverse;

  __device__ bool has(int j) const { return thread() + 32 * j < D; }
  __device__ float mean(const float* y) const {
    float sum = 0.0f;
    for (int j = 0; j < kChannels; ++j) sum += has(j) ? y[j] : 0.0f;
    return warp_sum(sum) / float(D);
  }
  __device__ LayerNorm(int D, float eps, const float* u) : D(D) {
    const float centre = mean(u);
    float square[kChannels];
    for (int j = 0; j < kChannels; ++j) x[j] = u[j] - centre, square[j] = x[j] * x[j];
    inverse = 1.0f / sqrtf(mean(square) + eps);
    for (int j = 0; j < kChannels; ++j) x[j] *= inverse;
  }
  // y, the gradient in x, becomes that in u
  __device__ void pull_back(float* y) const {
    float along[kChannels];
    for (int j = 0; j < kChannels; ++j) along[j] = y[j] * x[j];
    const float my = mean(y), mx = mean(along);
    for (int j = 0; j < kChannels; ++j) y[j] = inverse * (y[j] - my - x[j] * mx);
  }
};

// What the three kernels share: which units of which head a block has, and rows of D channels.
template <int kVec> struct Part {
  static constexpr int kLanes = kVec == 4 ? 16 : 32, kStride = kLanes * kVec, kStrips = kMaxChannels / kStride;
  static constexpr int kGroups = kThreads / kLanes;
  struct Row {
    Pack<kVec> strip[kStrips];
  };

  const Step& p;
  int t, parts, part, n, h, first, last;  // hidden units
  int64_t head, matrix;                   // of S1 in [N, H, 2, Hd, D]; W2 follows it
  int group, lane_column;
  float *channels, *partial;  // shared [D], [kWarps][kMaxChannels]

  __device__ Part(const Step& p, int t, int parts, float* channels, float* partial)
      : p(p), t(t), parts(parts), part(blockIdx.x % parts), first(part * kUnits), last(min(first + kUnits, p.K)), head(blockIdx.x / parts),
        group(thread() / kLanes), lane_column(thread() % kLanes * kVec), channels(channels), partial(partial) {
    n = int(head / p.H), h = int(head % p.H);
    matrix = head * 2 * p.K * p.V;
  }
  __device__ int64_t size() const { return int64_t(p.K) * p.V; }
  // the workspace: [N, H, 2, Hd], [N, H, 2, parts, D], [N, H, parts, C], [N, H, 2 (2 + C) + 1]
  __device__ float* hidden(int i) const { return p.hidden + (head * 2 + i) * p.K; }
  __device__ float* sums(int i, int of_part) const { return p.partial + ((head * 2 + i) * parts + of_part) * p.V; }
  __device__ float* scores(int of_part) const { return p.scores + (head * parts + of_part) * p.C; }
  __device__ Weights after() const {
    const float* weights = p.after + head * (2 * (2 + p.C) + 1);
    return {weights, weights + 2 + p.C, weights + 2 * (2 + p.C)};
  }
  // row `row` of factors of matrix i
  __device__ float* left(int i, int row) const { return p.left + ((head * 2 + i) * p.C + row) * p.K; }
  __device__ float* right(int i, int row) const { return p.right + ((head * 2 + i) * p.C + row) * p.V; }

  // f(strip, column)
  template <class Function> __device__ void each(Function&& f) const {
#pragma unroll
    for (int s = 0; s < kStrips; ++s)
      if (lane_column + s * kStride < p.V) f(s, lane_column + s * kStride);
  }
  __device__ Row zeros() const {
    Row x;
    for (int s = 0; s < kStrips; ++s) x.strip[s] = zero<kVec>();
    return x;
  }
  __device__ Row read(const float* from) const {
    Row x = zeros();
    each([&](int s, int column) { x.strip[s] = load<kVec>(from + column); });
    return x;
  }
  __device__ Row token(const MirasTokens& from) const {
    Row x = zeros();
    each([&](int s, int column) {
      for (int c = 0; c < kVec; ++c) x.strip[s][c] = load_token(from, p.token_type, n, t, h, column + c);
    });
    return x;
  }
  // x += factor y
  __device__ static void add(Row& x, float factor, const Row& y) {
#pragma unroll
    for (int s = 0; s < kStrips; ++s)
      for (int c = 0; c < kVec; ++c) x.strip[s][c] += factor * y.strip[s][c];
  }
  __device__ static void scale(Row& x, float factor) {
#pragma unroll
    for (int s = 0; s < kStrips; ++s)
      for (int c = 0; c < kVec; ++c) x.strip[s][c] *= factor;
  }
  // x . y of a group
  __device__ static float dot(const Row& x, const Row& y) {
    float sum = 0.0f;
    for (int s = 0; s < kStrips; ++s)
      for (int c = 0; c < kVec; ++c) sum += x.strip[s][c] * y.strip[s][c];
    return over_lanes(sum, 1, kLanes, Add{});
  }
  // to = the sum of the rows of all groups
  __device__ void over_groups(const Row& x, float* to) const {
    float* mine = partial + thread() / 32 * kMaxChannels;
    for (int s = 0; s < kStrips; ++s)
      for (int c = 0; c < kVec; ++c) {
        const float sum = over_lanes(x.strip[s][c], kLanes, 32, Add{});
        if (thread() % 32 < kLanes) mine[lane_column + s * kStride + c] = sum;
      }
    __syncthreads();
    for (int d = thread(); d < p.V; d += kThreads) {
      float sum = 0.0f;
      for (int w = 0; w < kWarps; ++w) sum += partial[w * kMaxChannels + d];
      to[d] = sum;
    }
  }
  // channels: the sum of all parts' sums
  __device__ void over_parts(int i) const {
    for (int d = thread(); d < p.V; d += kThreads) {
      float sum = 0.0f;
      for (int of_part = 0; of_part < parts; ++of_part) sum += sums(i, of_part)[d];
      channels[d] = sum;
    }
    __syncthreads();
  }
  // f(hidden unit, whether it exists, offset of its row), whole warps at a time: groups beyond the last unit read the first row
  template <class Function> __device__ void units(Function&& f) const {
#pragma unroll 1
    for (int i = first + group; i - group < last; i += kGroups) f(i, i < last, int64_t(i < last ? i : first) * p.V);
  }
  // f(d) of the first warp's j-th channel, 0 beyond the last
  template <class Function> __device__ float channel(int j, Function&& f) const {
    const int d = thread() + 32 * j;
    return d < p.V ? f(d) : 0.0f;
  }
  // channels: u becomes gu
  __device__ void inner_gradient() const {
    const float *weight = p.ln_weight + int64_t(h) * p.V, *bias = p.ln_bias + int64_t(h) * p.V;
    if (thread() < 32) {
      const int64_t gate = p.gate_of(n, t, h);
      float y[kChannels], e[kChannels], square = 0.0f;
      for (int j = 0; j < kChannels; ++j) y[j] = channel(j, [&](int d) { return channels[d]; });
      const LayerNorm norm(p.V, p.ln_eps, y);
      for (int j = 0; j < kChannels; ++j) {
        e[j] = channel(j, [&](int d) {
          const float v = load_token(p.v, p.token_type, n, t, h, d);
          if (!p.predicts) return -v;
          return load_token(p.k, p.token_type, n, t, h, d) + (norm.x[j] * weight[d] + bias[d]) - v;
        });
        square += e[j] * e[j];
      }
      if (p.couples_row) square = warp_sum(square);
      const float delta = p.delta ? p.delta[gate] : 0.0f;
#pragma unroll
      for (int j = 0; j < kChannels; ++j) y[j] = channel(j, [&](int d) { return psi(p, e[j], square, delta) * weight[d]; });
      norm.pull_back(y);
      for (int j = 0; j < kChannels; ++j) channel(j, [&](int d) { return channels[d] = y[j]; });
    }
    __syncthreads();
  }

  // q + LN of the channels
  __device__ void give_out() const {
    const float *weight = p.ln_weight + int64_t(h) * p.V, *bias = p.ln_bias + int64_t(h) * p.V;
    if (thread() >= 32) return;
    float u[kChannels];
    for (int j = 0; j < kChannels; ++j) u[j] = channel(j, [&](int d) { return channels[d]; });
    const LayerNorm norm(p.V, p.ln_eps, u);
    for (int j = 0; j < kChannels; ++j)
      channel(j, [&](int d) {
        const float o = load_token(p.q, p.token_type, n, t, h, d) + (norm.x[j] * weight[d] + bias[d]);
        store_token(p.out, p.token_type, n, t, h, d, o);
        return o;
      });
  }
};

template <int kVec> __global__ void __launch_bounds__(kThreads, 1) mlp_predict(const Step p, int t, int parts) {
  __shared__ float partial[kWarps * kMaxChannels];
  const Part<kVec> x(p, t, parts, nullptr, partial);
  using Row = typename Part<kVec>::Row;
  const Row k = x.token(p.k), q = x.token(p.q);
  const float* const from = p.predicting() + x.matrix;
  Row u = x.zeros();
  x.units([&](int i, bool exists, int64_t at) {
    const Row s1 = x.read(from + at), w2 = x.read(from + x.size() + at);
    const float z = x.dot(w2, k), zq = x.dot(w2, q);
    if (!exists) return;
    if (x.lane_column == 0) x.hidden(0)[i] = z, x.hidden(1)[i] = zq;
    x.add(u, Gelu(z).value(), s1);
  });
  x.over_groups(u, x.sums(0, x.part));
  if (x.h == 0 && x.part == 0 && thread() == 0) move_on(p, x.n);
}

template <int kVec> __global__ void __launch_bounds__(kThreads, 1) mlp_write(const Step p, int t, int parts) {
  __shared__ float score[kRows], a[kUnits], aq[kUnits], written[kUnits], token[kMaxChannels], partial[kWarps * kMaxChannels];
  __shared__ __align__(16) float channels[kMaxChannels];
  const Part<kVec> x(p, t, parts, channels, partial);
  using Row = typename Part<kVec>::Row;
  const int row = row_of(p, x.n);
  const int64_t gate = p.gate_of(x.n, t, x.h);
  const Row k = x.token(p.k), q = x.token(p.q);
  for (int d = thread(); d < p.V; d += kThreads) token[d] = load_token(p.q, p.token_type, x.n, t, x.h, d);
  for (int i = thread(); i < kUnits; i += kThreads) written[i] = 0.0f;
  x.over_parts(0);
  x.inner_gradient();
  const Row gu = x.read(channels);
  const float rate = p.lr[gate], kq = x.dot(k, q);

  // the weights after the token; the product of the chunk's writes with q
  const float* const weights = p.weights + x.head * (2 + p.C);
  const float* const moves = p.momentum_weights ? p.momentum_weights + x.head * (2 + p.C) : nullptr;
  float* const after = const_cast<float*>(x.after().weights);
  float* const moves_after = after + 2 + p.C;
  const float log_alpha = p.log_decay ? p.log_decay[gate] : 0.0f, alpha = expf(log_alpha), open = p.open_log_decay[x.head] + log_alpha;
  const float momentum = moves ? p.momentum[gate] : 0.0f, moves_1 = moves ? momentum * moves[1] : 0.0f;
  const float weight_0 = alpha * weights[0], weight_1 = alpha * weights[1] + moves_1, gamma = expf(open);
  const bool writes = x.part == 0;  // writes what is the same in every part
  if (writes && thread() == 0) {
    after[0] = weight_0, after[1] = weight_1, after[2 + row] = 1.0f;
    moves_after[0] = 0.0f, moves_after[1] = moves_1, moves_after[2 + row] = 1.0f;
    after[2 * (2 + p.C)] = open;
  }
  for (int first = 0; first < row; first += kRows) {
    const int count = min(kRows, row - first);
    row_dots(x.right(1, first), p.V, count, token, p.V, [&](int i, float dot) {
      const float s = moves ? momentum * moves[2 + first + i] : 0.0f, w = alpha * weights[2 + first + i] + s;
      if (writes) after[2 + first + i] = w, moves_after[2 + first + i] = s;
      score[i] = w * dot;
    });
    __syncthreads();
    if (x.first + thread() < x.last) {
      float sum = 0.0f;
      const auto load_left = [&](int i) { return x.left(1, first + i)[x.first + thread()]; };
      loaded_together(count, load_left, [&](int i, float left) { sum += score[i] * left; });
      written[thread()] += sum;
    }
    __syncthreads();
  }

  // store the token's factors, and read
  const float rho_1 = p.rho ? p.rho[2 * x.head] : 1.0f, rho_2 = p.rho ? p.rho[2 * x.head + 1] : 1.0f;
  const float* const from = p.predicting() + x.matrix;
  Row uq = x.zeros();
  x.units([&](int i, bool exists, int64_t at) {
    Row r1 = x.read(from + at);
    const Gelu unit(exists ? x.hidden(0)[i] : 0.0f);
    const float u2 = -rate * x.dot(r1, gu) * unit.slope();
    float wq = (exists ? written[i - x.first] : 0.0f) + u2 * kq;
    x.scale(r1, gamma);
    if (p.written && weight_0 > 0.0f) {
      wq += weight_0 * x.dot(x.read(p.written + x.matrix + x.size() + at), q);
      x.add(r1, rho_1 * weight_0, x.read(p.written + x.matrix + at));
    }
    if (p.momenta) {
      wq += weight_1 * x.dot(x.read(p.momenta + x.matrix + x.size() + at), q);
      x.add(r1, rho_1 * weight_1, x.read(p.momenta + x.matrix + at));
    }
    if (!exists) return;
    const float of_q = Gelu(gamma * x.hidden(1)[i] + rho_2 * wq).value();
    if (x.lane_column == 0) {
      a[i - x.first] = unit.value(), aq[i - x.first] = of_q;
      x.left(0, row)[i] = unit.value(), x.left(1, row)[i] = u2;
    }
    x.add(uq, of_q, r1);
  });
  x.over_groups(uq, x.sums(1, x.part));
  if (writes)
    x.each([&](int s, int column) {
      if (x.group != 0) return;
      for (int c = 0; c < kVec; ++c) x.right(0, row)[column + c] = -rate * gu.strip[s][c], x.right(1, row)[column + c] = k.strip[s][c];
    });
  __syncthreads();
  float* const scores = x.scores(x.part);
  row_dots(x.left(0, 0) + x.first, p.K, row, aq, x.last - x.first, [&](int i, float dot) { scores[i] = dot; });
  row_dots(a, 0, 1, aq, x.last - x.first, [&](int, float dot) { scores[row] = dot; });
}

template <int kVec> __global__ void __launch_bounds__(kThreads, 1) mlp_finish(const Step p, int t, int parts) {
  __shared__ float score[kRows], channels[kMaxChannels];
  const Part<kVec> x(p, t, parts, channels, nullptr);
  const int row = row_of(p, x.n);
  const bool closes = row + 1 == p.C;
  const Weights after = x.after();
  if (x.part == 0) {
    const float rho_1 = p.rho ? p.rho[2 * x.head] : 1.0f;
    x.over_parts(1);
    for (int first = 0; first <= row; first += kRows) {
      const int count = min(kRows, row + 1 - first);
      if (thread() < count) {
        float sum = 0.0f;
        for (int of_part = 0; of_part < parts; ++of_part) sum += x.scores(of_part)[first + thread()];
        score[thread()] = rho_1 * sum * after.weights[2 + first + thread()];
      }
      __syncthreads();
      for (int d = thread(); d < p.V; d += kThreads) {
        float sum = 0.0f;
        loaded_together(count, [&](int i) { return x.right(0, first + i)[d]; }, [&](int i, float right) { sum += score[i] * right; });
        channels[d] += sum;
      }
      __syncthreads();
    }
    x.give_out();
    for (int i = thread(); i < row + 3; i += kThreads) {
      const bool begins = closes && i < 2;
      p.weights[x.head * (2 + p.C) + i] = begins ? 0.0f : after.weights[i];
      if (p.momentum_weights) p.momentum_weights[x.head * (2 + p.C) + i] = begins ? float(i) : after.momentum_weights[i];
    }
    if (thread() == 0) p.open_log_decay[x.head] = closes ? 0.0f : *after.open_log_decay;
  }
  const bool whole = p.coupling != Coupling::none;
  if (!closes || (whole && x.part != 0)) return;
  const int first = whole ? 0 : x.first, last = whole ? p.K : x.last;
  for (int i = 0; i < 2; ++i) {
    const Matrix matrix(p, x.head, i, 2);
    end_chunk<kVec>(p, matrix, after, first, last);
    if (!p.primal) continue;
    const float rho = map(p, matrix, i == 0, first, last);
    if (p.rho && thread() == 0) p.rho[2 * x.head + i] = rho;
  }
}

template <int kVec> int launch_mlp(const Step& p, cudaStream_t stream) {
  const int parts = (p.K + kUnits - 1) / kUnits;
  const int64_t blocks = int64_t(p.N) * p.H * parts;
  int error = cudaSuccess;
  for (int t = 0; t < p.T && !error; ++t) {
    error = launch(mlp_predict<kVec>, blocks, stream, p, t, parts);
    if (!error) error = launch(mlp_write<kVec>, blocks, stream, p, t, parts);
    if (!error) error = launch(mlp_finish<kVec>, blocks, stream, p, t, parts);
  }
  return error;
}

}  // namespace
}  // namespace miras::cuda

extern "C" int miras_mlp_step(const MirasStep* step, cudaStream_t stream) {
  using namespace miras::cuda;
  const Step p(*step);
  if (p.V > kMaxChannels || p.K > kMaxHidden) return cudaErrorInvalidValue;
  return p.V % 4 ? launch_mlp<1>(p, stream) : launch_mlp<4>(p, stream);
}

// Hidden units of a part, by which the caller allocates the workspace.
extern "C" int miras_mlp_units() { return miras::cuda::kUnits; }
