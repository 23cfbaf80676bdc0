// Decoding steps of the linear memory: S = W' [Dk, Dv] in place.
//
//     e = S_0' k - v;  u = eta psi(e)                      S_0 = phi(A_0) at the start of the chunk
//     M <- theta M - k u';  A <- alpha A + M               (without momentum: A <- alpha A - k u')
//     o = gamma S_0' q + rho (A' q - gamma A_0' q)         without a gate: o = A' q
//
// A block takes all keys of a tile of kTile values. Its threads stand in rows of kLanes, each with kVec neighbouring values of every
// kRowStep-th key. They hold their elements of A in registers while one pass over S_0 (and A_0) finds S_0' k, S_0' q and A_0' q at
// once, so that S_0 is loaded once and A is loaded once and stored once.
//
// A bias that couples a row of the error, or a gate that couples the matrix, leaves one block to a head, which goes over its tiles
// once more beforehand: for |e|^2, and at a chunk's start for the sum of the gate.
#include "step.h"

namespace miras::cuda {
namespace {

constexpr int kTile = 32, kMaxKeys = 256;

template <int kVec, bool kGated, bool kMomentum> struct LinearStep {
  static constexpr int kLanes = kTile / kVec, kRowStep = kThreads / kLanes, kRows = kMaxKeys / kRowStep;

  const Step& p;
  float *k, *q;                          // shared [Dk]: the token
  float *partial, *u, *alpha, *columns;  // shared [kWarps][3][kTile], [kTile], [kTile], [3][kTile]
  int n, h, row, lane_column;
  int64_t head;  // of the head's first element in a matrix
  float factor;  // rho of the chunk's start

  // of the columns from v0 on
  __device__ bool valid(int v0) const { return v0 + lane_column < p.V; }

  // f(i, row, offset) for this thread's rows of the tile
  template <class Function> __device__ void each(int v0, Function&& f) const {
    if (!valid(v0)) return;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int r = row + i * kRowStep;
      if (r < p.K) f(i, r, head + int64_t(r) * p.V + v0 + lane_column);
    }
  }

  // The same one after the other, for what only the first token of a chunk does: f(offset, this thread's elements of A).
  template <class Function> __device__ void each_of_start(int v0, Function&& f) const {
    if (!valid(v0)) return;
#pragma unroll 1
    for (int r = row; r < p.K; r += kRowStep) {
      const int64_t at = head + int64_t(r) * p.V + v0 + lane_column;
      f(at, load<kVec>(p.dual + at));
    }
  }

  // kCount sums by columns over all rows: into columns[kCount][kTile], which every thread may read when it returns
  template <int kCount, class Op> __device__ void over_rows(Pack<kVec> (&x)[kCount], Op op) const {
    const int warp = thread() / 32;
#pragma unroll
    for (int j = 0; j < kCount; ++j)
#pragma unroll
      for (int c = 0; c < kVec; ++c) {
        const float sum = over_lanes(x[j][c], kLanes, 32, op);
        if (thread() % 32 < kLanes) partial[(warp * 3 + j) * kTile + lane_column + c] = sum;
      }
    __syncthreads();
    if (thread() < kCount * kTile) {
      const int j = thread() / kTile, c = thread() % kTile;
      float sum = partial[j * kTile + c];
      for (int w = 1; w < kWarps; ++w) sum = op(sum, partial[(w * 3 + j) * kTile + c]);
      columns[j * kTile + c] = sum;
    }
    __syncthreads();
  }

  // rho of the whole matrix, which is a chunk's start
  __device__ float scale() const {
    float total = 0.0f;
    for (int v0 = 0; v0 < p.V; v0 += kTile)
      each_of_start(v0, [&](int64_t, const Pack<kVec>& a) {
        for (int c = 0; c < kVec; ++c) total += matrix_term(p, a[c]);
      });
    return matrix_scale(p, block_sum(total));
  }

  // The first token of a chunk keeps its start, and finds its primal.
  __device__ void begin(int v0) const {
    Pack<kVec> max, of;
    for (int c = 0; c < kVec; ++c) max[c] = 0.0f, of[c] = factor;
    if (kGated && p.coupling == Coupling::row) {
      Pack<kVec> x[1];
      for (int c = 0; c < kVec; ++c) x[0][c] = -INFINITY;
      each_of_start(v0, [&](int64_t, const Pack<kVec>& a) {
        for (int c = 0; c < kVec; ++c) x[0][c] = fmaxf(x[0][c], a[c]);
      });
      over_rows(x, Max{});
      for (int c = 0; c < kVec; ++c) max[c] = columns[lane_column + c], x[0][c] = 0.0f;
      each_of_start(v0, [&](int64_t, const Pack<kVec>& a) {
        for (int c = 0; c < kVec; ++c) x[0][c] += row_term(p, a[c], max[c]);
      });
      over_rows(x, Add{});
      for (int c = 0; c < kVec; ++c) of[c] = row_factor(p, columns[lane_column + c]);
    }
    each_of_start(v0, [&](int64_t at, const Pack<kVec>& a) {
      store<kVec>(p.start + at, a);
      if constexpr (kGated) {
        Pack<kVec> w;
        for (int c = 0; c < kVec; ++c) w[c] = phi(p, a[c], max[c], of[c]);
        store<kVec>(p.primal + at, w);
      }
    });
  }

  // columns: S_0' k; with a gate S_0' q and A_0' q, too. `a`: this thread's elements of A.
  __device__ void predict(int v0, bool fresh, Pack<kVec> (&a)[kRows]) const {
    if (fresh && p.start) begin(v0);
    each(v0, [&](int i, int, int64_t at) { a[i] = load<kVec>(p.dual + at); });
    Pack<kVec> sums[kGated ? 3 : 1];
    for (auto& x : sums) x = zero<kVec>();
    each(v0, [&](int i, int r, int64_t at) {
      const float *from = kGated ? p.primal : p.start;
      const Pack<kVec> w = from ? load<kVec>(from + at) : a[i];
      for (int c = 0; c < kVec; ++c) sums[0][c] += w[c] * k[r];
      if constexpr (kGated) {
        const Pack<kVec> start = load<kVec>(p.start + at);
        for (int c = 0; c < kVec; ++c) sums[1][c] += w[c] * q[r], sums[2][c] += start[c] * q[r];
      }
    });
    over_rows(sums, Add{});
  }

  __device__ float error(int t, int v) const {
    return (p.predicts ? columns[v % kTile] : 0.0f) - load_token(p.v, p.token_type, n, t, h, v);
  }

  // One token and tile.
  __device__ void tile(int v0, int t, const Place& place, bool fresh, float square) {
    Pack<kVec> a[kRows];
    predict(v0, fresh, a);
    const int v = v0 + thread();  // of the first warp
    const int64_t gate = p.gate_of(n, t, h);
    float gamma = 1.0f, base = 0.0f;
    if (thread() < kTile && v < p.V) {
      const float delta = p.delta ? load_gate(p.delta, p.delta_per_channel, gate, p.V, v) : 0.0f;
      u[thread()] = load_gate(p.lr, p.lr_per_channel, gate, p.V, v) * psi(p, error(t, v), square, delta);
      const float log_alpha = p.log_decay ? load_gate(p.log_decay, p.decay_per_channel, gate, p.V, v) : 0.0f;
      alpha[thread()] = expf(log_alpha);
      float open = place.open;
      if (p.decay_per_channel) {
        float* sum = p.sums + p.head_of(n, h) * p.V + v;
        open = (place.fresh ? 0.0f : *sum) + log_alpha;
        *sum = place.ends ? 0.0f : open;
      }
      if constexpr (kGated) {
        gamma = expf(open);
        base = gamma * (columns[kTile + thread()] - factor * columns[2 * kTile + thread()]);
      }
    }
    __syncthreads();

    const float theta = kMomentum ? p.momentum[gate] : 0.0f;
    Pack<kVec> read[1] = {zero<kVec>()};
    each(v0, [&](int i, int r, int64_t at) {
      Pack<kVec> s = zero<kVec>();
      if constexpr (kMomentum) s = load<kVec>(p.carried + at);
      for (int c = 0; c < kVec; ++c) {
        s[c] = theta * s[c] - k[r] * u[lane_column + c];
        a[i][c] = alpha[lane_column + c] * a[i][c] + s[c];
        read[0][c] += a[i][c] * q[r];
      }
      if constexpr (kMomentum) store<kVec>(p.carried + at, s);
      store<kVec>(p.dual + at, a[i]);
    });
    over_rows(read, Add{});
    if (thread() < kTile && v < p.V)
      store_token(p.out, p.token_type, n, t, h, v, kGated ? base + factor * columns[thread()] : columns[thread()]);
    __syncthreads();  // columns, u and alpha are the next tile's
  }

  // |e|^2 of a token, over all tiles
  __device__ float error_square(int t, bool fresh) const {
    float square = 0.0f;
    for (int v0 = 0; v0 < p.V; v0 += kTile) {
      Pack<kVec> a[kRows];
      predict(v0, fresh, a);
      if (thread() < kTile && v0 + thread() < p.V) {
        const float e = error(t, v0 + thread());
        square += e * e;
      }
      __syncthreads();
    }
    return block_sum(square);
  }

  __device__ void run(int first, int last) {
    Place place(p, n, h);
    for (int t = 0; t < p.T; ++t) {
      for (int r = thread(); r < p.K; r += kThreads) {
        k[r] = load_token(p.k, p.token_type, n, t, h, r);
        q[r] = load_token(p.q, p.token_type, n, t, h, r);
      }
      __syncthreads();
      place.go(p, t, p.log_decay && !p.decay_per_channel ? p.log_decay[p.gate_of(n, t, h)] : 0.0f);
      factor = 1.0f;
      if (kGated && p.coupling == Coupling::matrix) {
        float* rho = p.rho + p.head_of(n, h);
        factor = place.fresh ? scale() : *rho;
        if (place.fresh && thread() == 0) *rho = factor;
      }
      bool fresh = place.fresh;
      float square = 0.0f;
      if (p.couples_row) square = error_square(t, fresh), fresh = false;  // what begins has begun
      for (int v0 = first; v0 < last; v0 += kTile) tile(v0, t, place, fresh, square);
      __syncthreads();  // k, q and rho are the next token's
    }
  }
};

template <int kVec, bool kGated, bool kMomentum> __global__ void __launch_bounds__(kThreads, 1) linear_step(const Step p, int blocks_per_head) {
  __shared__ float k[kMaxKeys], q[kMaxKeys], partial[kWarps * 3 * kTile], u[kTile], alpha[kTile], columns[3 * kTile];
  using Kernel = LinearStep<kVec, kGated, kMomentum>;
  const int head = blockIdx.x / blocks_per_head, part = blockIdx.x % blocks_per_head;
  Kernel kernel = {
      p,    k, q, partial, u, alpha, columns, head / p.H, head % p.H, thread() / Kernel::kLanes,
      thread() % Kernel::kLanes * kVec, int64_t(head) * p.K * p.V, 1.0f};
  const int first = part * kTile;
  kernel.run(first, blocks_per_head == 1 ? p.V : first + kTile);
}

template <int kVec> int launch_linear(const Step& p, cudaStream_t stream) {
  const bool entire = p.couples_row || p.coupling == Coupling::matrix;
  const int blocks_per_head = entire ? 1 : (p.V + kTile - 1) / kTile;
  const int64_t blocks = int64_t(p.N) * p.H * blocks_per_head;
  auto* const kernel = p.primal ? (p.carried ? linear_step<kVec, true, true> : linear_step<kVec, true, false>)
                                : (p.carried ? linear_step<kVec, false, true> : linear_step<kVec, false, false>);
  return launch(kernel, blocks, stream, p, blocks_per_head);
}

}  // namespace
}  // namespace miras::cuda

extern "C" int miras_linear_step(const MirasStep* step, cudaStream_t stream) {
  using namespace miras::cuda;
  const Step p(*step);
  if (p.K > kMaxKeys) return cudaErrorInvalidValue;
  const int error = p.V % 4 ? launch_linear<1>(p, stream) : launch_linear<4>(p, stream);
  return error ? error : launch_advance(p, stream);
}
