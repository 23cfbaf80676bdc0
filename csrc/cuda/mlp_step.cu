// Decoding steps of the MLP memory: S1 = W1' [Hd, D] and W2 [Hd, D] in place, one block a head.
//
//     z = W2 k;  a = gelu(z);  u = S1' a;  e = k + LN(u) - v;  g = psi(e)                   both matrices at the chunk's start
//     gu = LN-vjp(w g);  gz = gelu'(z) o (S1 gu)                                            the inner gradients
//     M1 <- theta M1 - a (eta gu)';  M2 <- theta M2 - (eta gz) k';  A1 <- alpha A1 + M1;  A2 <- alpha A2 + M2
//     zq = gamma W_0 q + rho (A2 q - gamma A_0 q);  aq = gelu(zq)                           without a gate: zq = A2 q
//     o = q + LN(R1' aq),   R1 = gamma S1_0 + rho (A1 - gamma A1_0)                         without a gate: R1 = A1
//
// Threads stand in groups of kLanes, a group to a hidden unit: a row of both matrices. A thread has kVec neighbouring columns in each of
// kStrips strips, of k, q and gu as of the rows. Two passes over the hidden units: predict, then write and read. A chunk's first token has
// passes before them where the gate couples columns of S1 or a whole matrix. Between the passes the first warp takes the
// D channels, so that LayerNorm needs no barrier.
#include "step.h"

namespace miras::cuda {
namespace {

constexpr int kMaxChannels = 128, kMaxHidden = 1024, kChannels = kMaxChannels / 32;  // of a lane of the first warp

// x = (u - m(u)) / deviation over the D channels that a warp shares out, and what its derivative needs. Channel lane + 32 j is x[j].
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
  // y, the gradient of x, becomes that of u
  __device__ void pull_back(float* y) const {
    float along[kChannels];
    for (int j = 0; j < kChannels; ++j) along[j] = y[j] * x[j];
    const float my = mean(y), mx = mean(along);
    for (int j = 0; j < kChannels; ++j) y[j] = inverse * (y[j] - my - x[j] * mx);
  }
};

template <int kVec, bool kGated, bool kMomentum> struct MlpStep {
  static constexpr int kLanes = kVec == 4 ? 16 : 32, kStride = kLanes * kVec, kStrips = kMaxChannels / kStride;
  static constexpr int kGroups = kThreads / kLanes;
  struct Row {
    Pack<kVec> strip[kStrips];
  };

  const Step& p;
  float *z, *base, *channels, *partial;  // shared [Hd], [Hd], [D], [kWarps][D]
  int n, h, group, lane_column;
  int64_t first, second;  // of the head's matrices in [N, H, 2, Hd, D]
  Row k, q;
  float rho[2];

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
  __device__ void write(float* to, const Row& x) const {
    each([&](int s, int column) { store<kVec>(to + column, x.strip[s]); });
  }
  // f(x, y) of the thread's elements of two rows; padding included
  template <class Function> __device__ static void pairs(Row& x, const Row& y, Function&& f) {
#pragma unroll
    for (int s = 0; s < kStrips; ++s)
      for (int c = 0; c < kVec; ++c) f(x.strip[s].x[c], y.strip[s].x[c]);
  }
  // x . y of a group
  __device__ static float dot(const Row& x, const Row& y) {
    float sum = 0.0f;
    for (int s = 0; s < kStrips; ++s)
      for (int c = 0; c < kVec; ++c) sum += x.strip[s][c] * y.strip[s][c];
    return over_lanes(sum, 1, kLanes, Add{});
  }
  // The rows of all groups to one in `channels`, which every thread may read when it returns.
  template <class Op> __device__ void over_groups(const Row& x, Op op) const {
    float* mine = partial + thread() / 32 * kMaxChannels;
    for (int s = 0; s < kStrips; ++s)
      for (int c = 0; c < kVec; ++c) {
        const float sum = over_lanes(x.strip[s][c], kLanes, 32, op);
        if (thread() % 32 < kLanes) mine[lane_column + s * kStride + c] = sum;
      }
    __syncthreads();
    for (int d = thread(); d < p.V; d += kThreads) {
      float sum = partial[d];
      for (int w = 1; w < kWarps; ++w) sum = op(sum, partial[w * kMaxChannels + d]);
      channels[d] = sum;
    }
    __syncthreads();
  }
  // f(hidden unit, offset of its row) for every unit of this thread's group
  template <class Function> __device__ void units(Function&& f) const {
#pragma unroll 1
    for (int i = group; i < p.K; i += kGroups) f(i, int64_t(i) * p.V);
  }

  // ------------------------------------------------------------------------------------------------- a chunk's first token

  // rho of both matrices, which are a chunk's start
  __device__ void scale() {
    float total[2] = {0.0f, 0.0f};
    units([&](int, int64_t at) {
      each([&](int, int column) {
        const Pack<kVec> a1 = load<kVec>(p.dual + first + at + column), a2 = load<kVec>(p.dual + second + at + column);
        for (int c = 0; c < kVec; ++c) total[0] += matrix_term(p, a1[c]), total[1] += matrix_term(p, a2[c]);
      });
    });
    rho[0] = matrix_scale(p, block_sum(total[0]));
    rho[1] = matrix_scale(p, block_sum(total[1]));
  }

  // The largest element and the factor of every column of S1, a row of W1.
  __device__ void normalise_columns(Row& max, Row& factor) const {
    for (int s = 0; s < kStrips; ++s)
      for (int c = 0; c < kVec; ++c) max.strip[s][c] = -INFINITY;
    units([&](int, int64_t at) { pairs(max, read(p.dual + first + at), [](float& x, float a) { x = fmaxf(x, a); }); });
    over_groups(max, Max{});
    each([&](int s, int column) {
      for (int c = 0; c < kVec; ++c) max.strip[s][c] = channels[column + c];
    });
    factor = zeros();
    units([&](int, int64_t at) {
      each([&](int s, int column) {
        const Pack<kVec> a = load<kVec>(p.dual + first + at + column);
        for (int c = 0; c < kVec; ++c) factor.strip[s][c] += row_term(p, a[c], max.strip[s][c]);
      });
    });
    over_groups(factor, Add{});
    each([&](int s, int column) {
      for (int c = 0; c < kVec; ++c) factor.strip[s][c] = row_factor(p, channels[column + c]);
    });
  }

  // the same of a row of W2
  __device__ void normalise_row(const Row& a, float& max, float& factor) const {
    max = -INFINITY;
    each([&](int s, int) {
      for (int c = 0; c < kVec; ++c) max = fmaxf(max, a.strip[s][c]);
    });
    max = over_lanes(max, 1, kLanes, Max{});
    float sum = 0.0f;
    each([&](int s, int) {
      for (int c = 0; c < kVec; ++c) sum += row_term(p, a.strip[s][c], max);
    });
    factor = row_factor(p, over_lanes(sum, 1, kLanes, Add{}));
  }

  // Keeps a chunk's start, and finds its primal; rows of both matrices are shared out as ever.
  __device__ void begin() const {
    Row max, factor;
    const bool rows = kGated && p.coupling == Coupling::row;
    if (rows) normalise_columns(max, factor);
    rounds([&](int, bool exists, int64_t at) {
      const Row a1 = read(p.dual + first + at), a2 = read(p.dual + second + at);
      float row_max = 0.0f, row_scale = rho[1];
      if (rows) normalise_row(a2, row_max, row_scale);
      if (!exists) return;
      write(p.start + first + at, a1), write(p.start + second + at, a2);
      if constexpr (kGated) {
        Row w1 = zeros(), w2 = zeros();
        each([&](int s, int) {
          for (int c = 0; c < kVec; ++c) {
            w1.strip[s][c] = phi(p, a1.strip[s][c], rows ? max.strip[s][c] : 0.0f, rows ? factor.strip[s][c] : rho[0]);
            w2.strip[s][c] = phi(p, a2.strip[s][c], row_max, row_scale);
          }
        });
        write(p.primal + first + at, w1), write(p.primal + second + at, w2);
      }
    });
  }

  // -------------------------------------------------------------------------------------------------------------- the passes

  __device__ const float* predicting() const { return kGated ? p.primal : p.start ? p.start : p.dual; }

  // channels: u. Keeps z, and with a gate what zq owes the chunk's start.
  __device__ void predict(float gamma) const {
    const float* from = predicting();
    Row u = zeros();
    rounds([&](int i, bool exists, int64_t at) {
      const Row s1 = read(from + first + at), w2 = read(from + second + at);
      const float zk = dot(w2, k);
      if constexpr (kGated) {
        const float owed = gamma * (dot(w2, q) - rho[1] * dot(read(p.start + second + at), q));
        if (exists && lane_column == 0) base[i] = owed;
      }
      if (!exists) return;
      if (lane_column == 0) z[i] = zk;
      const float a = Gelu(zk).value();
      pairs(u, s1, [&](float& sum, float w) { sum += a * w; });
    });
    over_groups(u, Add{});
  }

  // channels: eta gu, in place of u
  __device__ void inner_gradient(int t, const float* weight, const float* bias) const {
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
      for (int j = 0; j < kChannels; ++j) y[j] = channel(j, [&](int d) { return psi(p, e[j], square, delta) * weight[d]; });
      norm.pull_back(y);
      for (int j = 0; j < kChannels; ++j) channel(j, [&](int d) { return channels[d] = y[j]; });
    }
    __syncthreads();
  }

  // Moves one row of a matrix on by the write -rate y; `a` is its new dual.
  __device__ Row moved(int64_t at, float alpha, float theta, float rate, const Row& y) const {
    Row a = read(p.dual + at), s = zeros();
    if constexpr (kMomentum) s = read(p.carried + at);
    pairs(s, y, [&](float& x, float write) { x = theta * x - rate * write; });
    pairs(a, s, [&](float& x, float write) { x = alpha * x + write; });
    if constexpr (kMomentum) write(p.carried + at, s);
    write(p.dual + at, a);
    return a;
  }

  // channels: R1' aq
  __device__ void write_and_read(float rate, float alpha, float theta, float gamma) const {
    const float* from = predicting();
    const Row gu = read(channels);
    Row uq = zeros();
    rounds([&](int i, bool exists, int64_t at) {
      Row s1 = read(from + first + at);
      const float back = dot(s1, gu);
      const Gelu unit(exists ? z[i] : 0.0f);
      Row a1 = zeros(), a2 = zeros();
      if (exists) {
        a1 = moved(first + at, alpha, theta, rate * unit.value(), gu);
        a2 = moved(second + at, alpha, theta, rate * back * unit.slope(), k);
      }
      float zq = dot(a2, q);
      if (!exists) return;
      if constexpr (kGated) zq = base[i] + rho[1] * zq;
      const float aq = Gelu(zq).value();
      if constexpr (kGated) {  // a1 becomes a row of R1
        pairs(a1, read(p.start + first + at), [&](float& a, float start) { a = rho[0] * (a - gamma * start); });
        pairs(a1, s1, [&](float& a, float w) { a += gamma * w; });
      }
      pairs(uq, a1, [&](float& sum, float r) { sum += aq * r; });
    });
    over_groups(uq, Add{});
  }

  __device__ void give_out(int t, const float* weight, const float* bias) const {
    if (thread() < 32) {
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
    __syncthreads();  // channels, z and base are the next token's
  }

  __device__ void run() {
    const float *weight = p.ln_weight + int64_t(h) * p.V, *bias = p.ln_bias + int64_t(h) * p.V;
    Place place(p, n, h);
    for (int t = 0; t < p.T; ++t) {
      const int64_t gate = p.gate_of(n, t, h);
      const float log_alpha = p.log_decay ? p.log_decay[gate] : 0.0f;
      place.go(p, t, log_alpha);
      k = q = zeros();
      each([&](int s, int column) {
        for (int c = 0; c < kVec; ++c) {
          k.strip[s][c] = load_token(p.k, p.token_type, n, t, h, column + c);
          q.strip[s][c] = load_token(p.q, p.token_type, n, t, h, column + c);
        }
      });
      rho[0] = rho[1] = 1.0f;
      if (kGated && p.coupling == Coupling::matrix) {
        float* kept = p.rho + 2 * p.head_of(n, h);
        if (place.fresh) {
          scale();
          if (thread() == 0) kept[0] = rho[0], kept[1] = rho[1];
        } else {
          rho[0] = kept[0], rho[1] = kept[1];
        }
      }
      if (place.fresh && p.start) begin();
      const float gamma = expf(place.open);
      predict(gamma);
      inner_gradient(t, weight, bias);
      write_and_read(p.lr[gate], expf(log_alpha), kMomentum ? p.momentum[gate] : 0.0f, gamma);
      give_out(t, weight, bias);
    }
  }

 private:
  // f(hidden unit, whether there is one, offset of its row), whole warps at a time: groups beyond the last unit take the first row along
  template <class Function> __device__ void rounds(Function&& f) const {
#pragma unroll 1
    for (int i = group; i - group < p.K; i += kGroups) f(i, i < p.K, int64_t(i < p.K ? i : 0) * p.V);
  }
  // f(d) of the first warp's j-th channel, 0 beyond the last
  template <class Function> __device__ float channel(int j, Function&& f) const {
    const int d = thread() + 32 * j;
    return d < p.V ? f(d) : 0.0f;
  }
};

template <int kVec, bool kGated, bool kMomentum> __global__ void __launch_bounds__(kThreads, 1) mlp_step(const Step p) {
  __shared__ float z[kMaxHidden], base[kMaxHidden];
  __shared__ __align__(16) float channels[kMaxChannels];
  __shared__ float partial[kWarps * kMaxChannels];
  using Kernel = MlpStep<kVec, kGated, kMomentum>;
  const int64_t head = blockIdx.x, size = int64_t(p.K) * p.V;
  Kernel kernel = {p, z, base, channels, partial, int(head / p.H), int(head % p.H), thread() / Kernel::kLanes,
                   thread() % Kernel::kLanes * kVec, 2 * head * size, (2 * head + 1) * size, {}, {}, {}};
  kernel.run();
}

template <int kVec> int launch_mlp(const Step& p, cudaStream_t stream) {
  auto* const kernel = p.primal ? (p.carried ? mlp_step<kVec, true, true> : mlp_step<kVec, true, false>)
                                : (p.carried ? mlp_step<kVec, false, true> : mlp_step<kVec, false, false>);
  return launch(kernel, int64_t(p.N) * p.H, stream, p);
}

}  // namespace
}  // namespace miras::cuda

extern "C" int miras_mlp_step(const MirasStep* step, cudaStream_t stream) {
  using namespace miras::cuda;
  const Step p(*step);
  if (p.V > kMaxChannels || p.K > kMaxHidden) return cudaErrorInvalidValue;
  const int error = p.V % 4 ? launch_mlp<1>(p, stream) : launch_mlp<4>(p, stream);
  return error ? error : launch_advance(p, stream);
}
