// Decoding steps of the linear memory W' [Dk, Dv], a token at a time; kappa: `weights`, mu: `momentum_weights`.
//
//     e = W_0' k - v;  u = eta psi(e)                                          W_0 = phi(A_0) at the start of the chunk
//     mu <- theta mu;  kappa <- alpha kappa + mu                           of what the chunk has written; (k, -u) gets the weight 1
//     o = gamma W_0' q + rho (kappa_0 D' q + kappa_1 S_0' q + sum_i (k_i . q) kappa_i o -u_i)
//
// linear_predict computes the matrices' products with k and q; a block takes all keys of a tile of kTile values. Its threads form rows of
// kLanes, each thread with kVec neighbouring values of every kRowStep-th key. linear_write does the rest, one block a head and one thread
// a value, and where the chunk closes writes A and S as the start of the next one.
#include "step.h"

namespace miras::cuda {
namespace {

constexpr int kTile = 32;
static_assert(kMaxHead <= kThreads, "a thread to a value");

// [N, H, kProducts, V]
enum { kPredicted, kRead, kWritten, kMomenta, kProducts };

template <int kVec> __global__ void __launch_bounds__(kThreads, 1) linear_predict(const Step p, int t, int tiles) {
  constexpr int kLanes = kTile / kVec, kRowStep = kThreads / kLanes;
  __shared__ float k[kMaxHead], q[kMaxHead], partial[kProducts][kWarps][kTile];
  const int head = blockIdx.x / tiles, tile = blockIdx.x % tiles, n = head / p.H, h = head % p.H;
  const int column = thread() % kLanes * kVec, v0 = tile * kTile, v = v0 + column;
  for (int r = thread(); r < p.K; r += kThreads) {
    k[r] = load_token(p.k, p.token_type, n, t, h, r);
    q[r] = load_token(p.q, p.token_type, n, t, h, r);
  }
  __syncthreads();
  Pack<kVec> sums[kProducts];
  for (auto& x : sums) x = zero<kVec>();
  if (v < p.V) {
    const int64_t matrix = int64_t(head) * p.K * p.V + v;
    const int width = p.decay_per_channel ? p.V : 1;
    const bool written = p.written && any(load_channels<kVec>(p, p.weights + int64_t(head) * (2 + p.C) * width, v));
    const float* const from = p.predicting();
#pragma unroll 4
    for (int r = thread() / kLanes; r < p.K; r += kRowStep) {
      const int64_t at = matrix + int64_t(r) * p.V;
      const Pack<kVec> w = load<kVec>(from + at);
      for (int c = 0; c < kVec; ++c) sums[kPredicted][c] += w[c] * k[r], sums[kRead][c] += w[c] * q[r];
      if (written) {
        const Pack<kVec> d = load<kVec>(p.written + at);
        for (int c = 0; c < kVec; ++c) sums[kWritten][c] += d[c] * q[r];
      }
      if (p.momenta) {
        const Pack<kVec> s = load<kVec>(p.momenta + at);
        for (int c = 0; c < kVec; ++c) sums[kMomenta][c] += s[c] * q[r];
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kProducts; ++j)
    for (int c = 0; c < kVec; ++c) {
      const float sum = over_lanes(sums[j][c], kLanes, 32, Add{});
      if (thread() % 32 < kLanes) partial[j][thread() / 32][column + c] = sum;
    }
  __syncthreads();
  const int j = thread() / kTile, c = thread() % kTile;
  if (j < kProducts && v0 + c < p.V) {
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += partial[j][w][c];
    p.products[(int64_t(head) * kProducts + j) * p.V + v0 + c] = sum;
  }
  if (h == 0 && tile == 0 && thread() == 0) move_on(p, n);
}

template <int kVec> __global__ void __launch_bounds__(kThreads, 1) linear_write(const Step p, int t) {
  __shared__ float q[kMaxHead], score[kRows], weight[kRows];
  const int head = blockIdx.x, n = head / p.H, h = head % p.H, v = thread(), row = row_of(p, n);
  const int64_t gate = p.gate_of(n, t, h);
  const bool has = v < p.V, channels = p.decay_per_channel;
  const int width = channels ? p.V : 1, mine = channels && has ? v : 0;  // column of `weights` and of `open_log_decay`
  const float* const products = p.products + int64_t(head) * kProducts * p.V + (has ? v : 0);
  float* const left = p.left + int64_t(head) * p.C * p.K;
  float* const right = p.right + int64_t(head) * p.C * p.V;
  float* const weights = p.weights + int64_t(head) * (2 + p.C) * width + mine;
  float* const moves = p.momentum_weights ? p.momentum_weights + int64_t(head) * (2 + p.C) : nullptr;
  float* const open_log_decay = p.open_log_decay + int64_t(head) * width + mine;
  const bool owns = channels ? has : thread() == 0;  // writes `weights` and `open_log_decay`

  // the token's write
  const float k_of = v < p.K ? load_token(p.k, p.token_type, n, t, h, v) : 0.0f;
  const float q_of = v < p.K ? load_token(p.q, p.token_type, n, t, h, v) : 0.0f;
  q[thread()] = q_of;
  const float kq = block_sum(k_of * q_of);
  const float e = has ? (p.predicts ? products[kPredicted * p.V] : 0.0f) - load_token(p.v, p.token_type, n, t, h, v) : 0.0f;
  const float square = p.couples_row ? block_sum(e * e) : 0.0f;
  float u = 0.0f;
  if (has) {
    const float delta = p.delta ? load_gate(p.delta, p.delta_per_channel, gate, p.V, v) : 0.0f;
    u = load_gate(p.lr, p.lr_per_channel, gate, p.V, v) * psi(p, e, square, delta);
  }

  // the weights after it, and what it reads of the chunk's writes
  const float log_alpha = p.log_decay ? load_gate(p.log_decay, channels, gate, p.V, mine) : 0.0f, alpha = expf(log_alpha);
  const float momentum = moves ? p.momentum[gate] : 0.0f, moves_1 = moves ? momentum * moves[1] : 0.0f;
  const float open = *open_log_decay + log_alpha;
  const float weight_0 = alpha * weights[0], weight_1 = alpha * weights[width] + moves_1;
  float read = -kq * u;
  if (p.written && has) read += weight_0 * products[kWritten * p.V];
  if (moves && has) read += weight_1 * products[kMomenta * p.V];
  __syncthreads();  // every thread has read them
  if (owns) weights[0] = weight_0, weights[width] = weight_1, *open_log_decay = open;
  if (moves && thread() == 0) moves[1] = moves_1;
  for (int first = 0; first < row; first += kRows) {
    const int count = min(kRows, row - first);
    row_dots(left + int64_t(first) * p.K, p.K, count, q, p.K, [&](int i, float dot) { score[i] = dot; });
    if (thread() < count) {
      const int i = 2 + first + thread();
      float x = moves ? momentum * moves[i] : 0.0f;
      if (moves) moves[i] = x;
      if (!channels) x += alpha * weights[i], weights[i] = x;
      weight[thread()] = x;
    }
    __syncthreads();
    if (has) {
      struct Row {
        float right, weight;
      };
      const auto load_row = [&](int i) {
        return Row{right[int64_t(first + i) * p.V + v], channels ? weights[int64_t(2 + first + i) * width] : 0.0f};
      };
      loaded_together(count, load_row, [&](int i, const Row& x) {
        const float w = weight[i] + alpha * x.weight;
        if (channels) weights[int64_t(2 + first + i) * width] = w;
        read += score[i] * w * x.right;
      });
    }
    __syncthreads();  // before score and weight are overwritten
  }
  if (has) {
    const float rho = p.rho ? p.rho[head] : 1.0f;
    store_token(p.out, p.token_type, n, t, h, v, expf(open) * products[kRead * p.V] + rho * read);
  }

  // store the token's factors
  if (v < p.K) left[int64_t(row) * p.K + v] = k_of;
  if (has) right[int64_t(row) * p.V + v] = -u;
  if (owns) weights[int64_t(2 + row) * width] = 1.0f;
  if (moves && thread() == 0) moves[2 + row] = 1.0f;
  if (row + 1 < p.C) return;
  __syncthreads();
  const Matrix matrix(p, head, 0, 1);
  end_chunk<kVec>(p, matrix, {weights - mine, moves, open_log_decay - mine}, 0, p.K);
  if (p.primal) {
    const float rho = map(p, matrix, true, 0, p.K);
    if (p.rho && thread() == 0) p.rho[head] = rho;
  }
  if (owns) weights[0] = weights[width] = *open_log_decay = 0.0f;
  if (moves && thread() == 0) moves[1] = 1.0f;
}

template <int kVec> int launch_linear(const Step& p, cudaStream_t stream) {
  const int tiles = (p.V + kTile - 1) / kTile;
  int error = cudaSuccess;
  for (int t = 0; t < p.T && !error; ++t) {
    error = launch(linear_predict<kVec>, int64_t(p.N) * p.H * tiles, stream, p, t, tiles);
    if (!error) error = launch(linear_write<kVec>, int64_t(p.N) * p.H, stream, p, t);
  }
  return error;
}

}  // namespace
}  // namespace miras::cuda

extern "C" int miras_linear_step(const MirasStep* step, cudaStream_t stream) {
  using namespace miras::cuda;
  const Step p(*step);
  if (p.K > kMaxHead || p.V > kMaxHead) return cudaErrorInvalidValue;
  return p.V % 4 ? launch_linear<1>(p, stream) : launch_linear<4>(p, stream);
}
