// What the stages of the MLP memory's forward are made of: a block's state in registers, its copies of tokens and gates, products with the
// state, and sums over the hidden units.
#pragma once

#include "cluster.h"
#include "mlp_momentum.h"

namespace miras::cuda {

// Hd: the hidden units of this block. A head has kBlocks times as many, in a cluster of 1 or 2 blocks; what is summed over all of them, and
// all that follows from it, both blocks compute, with the same bits. If rows are split, each computes half of the rows and of the pairs of
// tokens, for both.
template <int C, int Hd, class T, class Layout, int kBlocks = 1> struct Block {
  using S = Layout;
  static constexpr bool kSplit = S::kSplit && kBlocks > 1;
  using X = Shape<C, Hd, kSplit ? kBlocks : 1>;
  static constexpr int kStrips = X::kStrips, kEights = X::kEights, kTiles = X::kTiles, kPieces = C / 8;
  static constexpr int kPass = kEights < S::kMostTiles ? kEights : S::kMostTiles;
  static constexpr int kParked = kStrips == 2 && C > 16 ? kEights / 2 : 0;  // quadruples of slopes that lie in Aq's place for a while
  static constexpr int kUnroll = C / 16;                                    // of the loops over hidden units, as registers allow
  static constexpr bool kGates = S::kGates && kBlocks == 1;                 // retention gates
  static constexpr int64_t kDuals = 2 * kBlocks * Hd * kD;                  // numbers of a head's matrices
  static constexpr int64_t kState = S::kMomentum ? 2 * kDuals : kDuals;     // and of its momentum matrices
  static constexpr float kLog2e = 1.442695041f, kUnit = kLog2e / 1024.0f, kLowest = -110.0f;

  const MirasMlpChain& p;
  const BiasTraits traits;
  const bool gated;  // whether a retention gate maps the duals, s1 and w2, to primals
  const int n, h;
  int64_t batch, begin;  // row of q, k, v, and first token
  int tokens;
  int lane, warp, g, t, tile, part, row, piece;  // of this thread: see `fresh`
  float s1[kStrips][8][4], w2[kStrips][8][4];
  float m1[kStrips][8][4], m2[kStrips][8][4];  // their momentum, if there is any
  uint32_t u2[kStrips][kEights][2];            // gelu'(Z'), then U2'

  // of a sequence and head
  __device__ __forceinline__ Block(const MirasMlpChain& p, int n, int h)
      : p(p), traits(bias_traits(BiasTag(p.bias))), gated(kGates && p.retention != int(RetentionTag::l2)), n(n), h(h) {
    batch = p.cu_seqlens ? 0 : n;
    begin = p.cu_seqlens ? p.cu_seqlens[n] : 0;
    tokens = p.cu_seqlens ? int(p.cu_seqlens[n + 1] - begin) : p.T;
  }

  // Where this thread works, computed anew: kept from stage to stage, such numbers and the addresses made of them would be spilled.
  // Four lanes a row: even rows before odd ones, since neighbouring rows have the same banks there.
  __device__ __forceinline__ void fresh() {
    const int id = fresh_thread();
    lane = id & 31, warp = id >> 5, g = lane >> 2, t = lane & 3, tile = warp / X::kParts, part = warp % X::kParts;
    row = (kSplit ? rank() * (C / kBlocks) + warp * X::kRows : 16 * tile + part * X::kRows) +
          (X::kLanes == 4 ? 2 * g % 8 + g / 4 : lane / X::kLanes),
    piece = lane % X::kLanes;
  }

  // which of the head's blocks this is
  __device__ __forceinline__ static int rank() {
    if constexpr (kBlocks == 1) return 0;
    else return cluster_rank();
  }
  // Whether this block writes a row of [C, D] to global memory
  __device__ __forceinline__ static bool writes(int row) { return kBlocks == 1 || kSplit || row / (C / kBlocks) == rank(); }

  // f(strip, tile of 8 columns, half, place in a head's matrix) for each pair of this thread's elements of a matrix
  template <class Function> __device__ __forceinline__ void each_pair(Function&& f) {
#pragma unroll
    for (int m = 0; m < kStrips; ++m)
#pragma unroll
      for (int x = 0; x < 8; ++x)
#pragma unroll
        for (int e = 0; e < 2; ++e) f(m, x, e, (rank() * Hd + X::kUnits * warp + 16 * m + 8 * e + g) * kD + 8 * x + 2 * t);
  }
  using Matrix = float[kStrips][8][4];
  __device__ __forceinline__ void load_state(const float* from) {
    const auto load = [&](Matrix& first, Matrix& second, const float* from) {
      each_pair([&](int m, int x, int e, int place) {
        const float2 a = *reinterpret_cast<const float2*>(from + place), b = *reinterpret_cast<const float2*>(from + kDuals / 2 + place);
        first[m][x][2 * e] = a.x, first[m][x][2 * e + 1] = a.y, second[m][x][2 * e] = b.x, second[m][x][2 * e + 1] = b.y;
      });
    };
    load(s1, w2, from);
    if constexpr (S::kMomentum) load(m1, m2, from + kDuals);
  }
  __device__ __forceinline__ void store(float* to, const Matrix& first, const Matrix& second) {
    each_pair([&](int m, int x, int e, int place) {
      *reinterpret_cast<float2*>(to + place) = make_float2(first[m][x][2 * e], first[m][x][2 * e + 1]);
      *reinterpret_cast<float2*>(to + kDuals / 2 + place) = make_float2(second[m][x][2 * e], second[m][x][2 * e + 1]);
    });
  }
  __device__ __forceinline__ void store_duals(float* to) { store(to, s1, w2); }
  __device__ __forceinline__ void store_state(float* to) {
    store_duals(to);
    if constexpr (S::kMomentum) store(to + kDuals, m1, m2);
  }

  // -------------------------------------------------------------------------------------------------------- inputs of a chunk

  // Starts the copies of chunk c. The gates are copied by the first warp, which alone reads them.
  __device__ __forceinline__ void fetch(int c) {
    fetch_tokens(c), fetch_gates(c);
    cp_async_commit();
  }
  __device__ __forceinline__ void fetch_tokens(int c) {
    fresh();
    const int id = 32 * warp + lane, ch = id % 8;
    const uint32_t buffer = (c & (S::kBuffers - 1)) * S::kTile;
#pragma unroll
    for (int first = 0; first < C; first += X::kThreads / 8) {
      const int r = first + id / 8, token = c * C + r;
      if (X::kThreads / 8 > C && r >= C) break;
      const bool in = token < tokens;
      const int64_t at_token = begin + (in ? token : 0);
      const uint32_t to = address(buffer + place<8>(r, ch));
      const auto of = [&](const MirasTokens& x) {
        return static_cast<const T*>(x.data) + batch * x.batch + at_token * x.token + h * x.head + 8 * ch;
      };
      cp_async_16(to + S::kK, of(p.k), in), cp_async_16(to + S::kV, of(p.v), in), cp_async_16(to + S::kQ, of(p.q), in);
    }
  }
  __device__ __forceinline__ void fetch_gates(int c) {
    if (warp == 0)
#pragma unroll
      for (int i = 0; i < (C + 31) / 32; ++i) {
        const int r = lane * ((C + 31) / 32) + i, token = c * C + r;
        if (r >= C) break;
        const bool in = token < tokens;
        const int64_t at_token = (batch * p.T + begin + (in ? token : 0)) * p.H + h;
        const uint32_t to = address(S::kRaw + 4 * r);
        cp_async_4(to, p.lr + at_token, in);
        cp_async_4(to + 4 * C, (p.log_decay ? p.log_decay : p.lr) + at_token, in && p.log_decay);
        cp_async_4(to + 8 * C, (p.delta ? p.delta : p.lr) + at_token, in && p.delta);
        if constexpr (S::kMomentum) cp_async_4(address(S::kMoves + 4 * r), p.momentum + at_token, in);
      }
  }

  // The weights of chunk c from its gates, by the first warp, after its copies have arrived. Log-decays are summed in two parts, multiples
  // of 2^-10 and remainders (kernels/common/decays.py), so that their differences keep their digits.
  __device__ __forceinline__ void weigh(int c) {
    constexpr int kPer = (C + 31) / 32, kActive = C / kPer;
    const uint32_t buffer = (c & (S::kGateBuffers - 1)) * S::kGateBuffer;
    float units[kPer], rest[kPer];
    float all_units = 0.0f, all_rest = 0.0f, open = 0.0f;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const float given = lane < kActive ? at<float>(S::kRaw + 4 * (C + lane * kPer + i)) : 0.0f;
      const float log_decay = Math<float>::max(given, kLowest);
      const float unit = floorf(log_decay * 1024.0f + 0.5f);
      units[i] = all_units += unit, rest[i] = all_rest += (log_decay - unit * (1.0f / 1024.0f)) * kLog2e;
      open += given;
    }
    if (p.start && (c + 1) * C > tokens) {
      open = row_sum<32>(open);
      if (lane == 0 && rank() == 0) p.open_log_decay[int64_t(n) * p.H + h] = open;
    }
    float up_units = all_units, up_rest = all_rest;  // up to and including this lane's tokens
#pragma unroll
    for (int m = 1; m < kActive; m *= 2) {
      const float a = __shfl_up_sync(kWholeWarp, up_units, m), b = __shfl_up_sync(kWholeWarp, up_rest, m);
      if (lane >= m) up_units += a, up_rest += b;
    }
    const float end_units = __shfl_sync(kWholeWarp, up_units, kActive - 1), end_rest = __shfl_sync(kWholeWarp, up_rest, kActive - 1);
    if (lane < kActive)
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        const int r = lane * kPer + i;
        const float u = units[i] + (up_units - all_units), x = rest[i] + (up_rest - all_rest);
        const float dec = exp2_approx((end_units - u) * kUnit + (end_rest - x));
        at<float2>(buffer + S::kLogs + 8 * r) = make_float2(u, x);
        at<float>(buffer + S::kGamma + 4 * r) = exp2_approx(u * kUnit + x);
        const float delta = at<float>(S::kRaw + 4 * (2 * C + r)), both = -dec * at<float>(S::kRaw + 4 * r);
        at<float4>(buffer + S::kRows + 16 * r) = make_float4(at<float>(S::kRaw + 4 * r), -dec, delta, both);
      }
    if constexpr (S::kMomentum) weigh_moves<Block>(lane, c, tokens - c * C);
  }

  // ------------------------------------------------------------------------------------------------------------------ products

  // z += a x', x [tokens, D] in shared memory; operand(a, strip, k) gives the tile of a's columns from 16 k on. Operands are read some time
  // before the products that use them, here and below.
  template <class Operand> __device__ __forceinline__ void add_times(float (&z)[kStrips][kPass][4], uint32_t x, Operand&& operand) {
    constexpr int kAtOnce = kStrips == 1 && kPass < 8 ? 8 / kPass : 1;
#pragma unroll
    for (int first = 0; first < 4; first += kAtOnce) {
      uint32_t a[kAtOnce][kStrips][4], b[kAtOnce][kPass / 2][4];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k)
#pragma unroll
        for (int i = 0; i < kPass / 2; ++i) ldmatrix_x4(b[k][i], address(x + by_columns<8>(16 * i, 16 * (first + k), lane)));
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k)
#pragma unroll
        for (int m = 0; m < kStrips; ++m) operand(a[k][m], m, first + k);
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k)
#pragma unroll
        for (int i = 0; i < kPass; ++i)
#pragma unroll
          for (int m = 0; m < kStrips; ++m) mma_m16n8k16<T>(z[m][i], a[k][m], b[k][i / 2][i % 2 * 2], b[k][i / 2][i % 2 * 2 + 1]);
    }
  }
  // z = state [units of the warp, D] x'; of a gated state its primal, which lies in shared memory
  __device__ __forceinline__ void state_times(float (&z)[kStrips][kPass][4], const float (&state)[kStrips][8][4], uint32_t x,
                                              uint32_t primal = 0) {
#pragma unroll
    for (int m = 0; m < kStrips; ++m)
#pragma unroll
      for (int i = 0; i < kPass; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) z[m][i][e] = 0.0f;
    add_times(z, x, [&](uint32_t (&a)[4], int m, int k) {
      if (gated) return ldmatrix_x4(a, address(primal + by_rows<8>(X::kUnits * warp + 16 * m, 16 * k, lane)));
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float (&x)[4] = state[m][2 * k + (e >> 1)];
        a[e] = pack_again<T>(x[2 * (e & 1)], x[2 * (e & 1) + 1]);
      }
    });
  }
  // z += matrix [units of the warp, D] x', both in shared memory
  __device__ __forceinline__ void slice_times(float (&z)[kStrips][kPass][4], uint32_t matrix, uint32_t x) {
    add_times(z, x, [&](uint32_t (&a)[4], int m, int k) {
      ldmatrix_x4(a, address(matrix + by_rows<8>(X::kUnits * warp + 16 * m, 16 * k, lane)));
    });
  }
  // z's columns, tokens, times factors, float32 in shared memory
  __device__ __forceinline__ void scale_tokens(float (&z)[kStrips][kPass][4], uint32_t factors) {
    float2 of[kPass];
#pragma unroll
    for (int x = 0; x < kPass; ++x) of[x] = at<float2>(factors + 4 * (8 * x + 2 * t));
#pragma unroll
    for (int m = 0; m < kStrips; ++m)
#pragma unroll
      for (int x = 0; x < kPass; ++x) z[m][x][0] *= of[x].x, z[m][x][1] *= of[x].y, z[m][x][2] *= of[x].x, z[m][x][3] *= of[x].y;
  }
  // two packed tiles of the warp's units, 8 columns each from tile x on, of a matrix of rows of kRowPieces pieces
  template <int kRowPieces> __device__ __forceinline__ void put_fragment(uint32_t to, int m, int x, const uint32_t (&a)[4]) {
    store_fragment<kRowPieces>(to, X::kUnits * warp + 16 * m, x, lane, a);
  }
  // a matrix in registers, in 16 bits, to shared memory
  __device__ __forceinline__ void put_state(uint32_t to, const float (&state)[kStrips][8][4]) {
#pragma unroll
    for (int m = 0; m < kStrips; ++m)
#pragma unroll
      for (int x = 0; x < 8; x += 2) {
        uint32_t a[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) a[e] = pack<T>(state[m][x + (e >> 1)][2 * (e & 1)], state[m][x + (e >> 1)][2 * (e & 1) + 1]);
        put_fragment<8>(to, m, x, a);
      }
  }
  // u [16, D] += a [16, 16] b, b [16, D] from row r0 of a tile in shared memory on
  __device__ __forceinline__ void add_rows(float (&u)[8][4], const uint32_t (&a)[4], uint32_t tile, int r0) {
    uint32_t b[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) ldmatrix_x4_trans(b[i], address(tile + by_rows<8>(r0, 16 * i, lane)));
#pragma unroll
    for (int i = 0; i < 8; ++i) mma_m16n8k16<T>(u[i], a, b[i / 2][i % 2 * 2], b[i / 2][i % 2 * 2 + 1]);
  }
  // the same for the warp's rows of a matrix: each operand b is read once for all strips
  __device__ __forceinline__ void add_strips(float (&state)[kStrips][8][4], const uint32_t (&a)[kStrips][4], uint32_t tile, int r0) {
    uint32_t b[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) ldmatrix_x4_trans(b[i], address(tile + by_rows<8>(r0, 16 * i, lane)));
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int m = 0; m < kStrips; ++m) mma_m16n8k16<T>(state[m][i], a[m], b[i / 2][i % 2 * 2], b[i / 2][i % 2 * 2 + 1]);
  }
  // u += left' state over this part's hidden units, which are the rows of both, for 16 tokens; also(operand of left, its first unit)
  template <class Function> __device__ __forceinline__ void add_units(float (&u)[8][4], uint32_t left, uint32_t state, Function&& also) {
#pragma unroll kUnroll
    for (int k = part * X::kPartUnits; k < (part + 1) * X::kPartUnits; k += 16) {
      uint32_t a[4];
      ldmatrix_x4_trans(a, address(left + by_columns<kPieces>(k, 16 * tile, lane)));
      add_rows(u, a, state, k);
      also(a, k);
    }
  }

  // --------------------------------------------------------------------------------------------------------- sums over all parts

  __device__ __forceinline__ static uint32_t exchange_row(int warp, int row) {
    return S::kExchange + (warp * 16 + row) * S::kExchangeRow * 4;
  }
  // a warp's share of [16, 8 kColumns], from a column on
  template <int kColumns> __device__ __forceinline__ void hand_over(const float (&u)[kColumns][4], int column = 0) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      at<float2>(exchange_row(warp, g) + 4 * (column + 8 * i + 2 * t)) = make_float2(u[i][0], u[i][1]);
      at<float2>(exchange_row(warp, g + 8) + 4 * (column + 8 * i + 2 * t)) = make_float2(u[i][2], u[i][3]);
    }
  }
  // The barrier between hand_over and collect. Before a block hands over again, the other one must have read: it says so by `release`, for
  // which `await` waits. They take turns with `meet`; the first `release` is at the kernel's start, the last `await` at its end.
  __device__ __forceinline__ static void meet() { release(), join(); }
  __device__ __forceinline__ static void release() {
    if constexpr (kBlocks > 1) cluster_arrive();
  }
  __device__ __forceinline__ static void await() {
    if constexpr (kBlocks > 1) cluster_wait();
  }
  // what is left of `meet` after `release`
  __device__ __forceinline__ static void join() {
    if constexpr (kBlocks == 1) __syncthreads();
    else cluster_wait();
  }
  // the address of the other block's shared memory
  __device__ __forceinline__ static uint32_t other() {
    if constexpr (kBlocks == 1) return 0;
    else return address_in(1 - rank(), 0);
  }
  // to shared memory, if rows are split of both blocks
  template <class V> __device__ __forceinline__ static void put_both(uint32_t offset, V x) {
    at<V>(offset) = x;
    if constexpr (kSplit) store_cluster(other() + offset, x);
  }
  // the sum over the blocks of a number in shared memory
  __device__ __forceinline__ static float of_blocks(uint32_t offset, uint32_t other) {
    static_assert(kBlocks <= 2);
    float x = at<float>(offset);
    if constexpr (kBlocks == 2) x += load_cluster(other + offset);
    return x;
  }
  // what all parts and blocks have of this thread's row: four columns from `first` on, and every kStride columns
  template <int kColumns> using Shares = float4[kColumns / 4][kBlocks][X::kParts];
  template <int kStride, int kFours> __device__ __forceinline__ void load_shares(float4 (&x)[kFours][kBlocks][X::kParts], int first) {
    const auto load = [&](int block, auto&& from) {
#pragma unroll
      for (int i = 0; i < kFours; ++i)
#pragma unroll
        for (int j = 0; j < X::kParts; ++j)
          x[i][block][j] = from(exchange_row(row / 16 * X::kParts + j, row % 16) + 4 * (first + i * kStride));
    };
    if constexpr (kBlocks == 2) {  // the other block's first, since they come last
      const uint32_t other = Block::other();
      load(1, [&](uint32_t place) { return load_cluster_4(other + place); });
    }
    load(0, [](uint32_t place) { return at<float4>(place); });
  }
  template <int kColumns> __device__ __forceinline__ static void sum_shares(float (&y)[kColumns], const Shares<kColumns>& x) {
    const auto add = [](float4& s, float4 x) { s.x += x.x, s.y += x.y, s.z += x.z, s.w += x.w; };
#pragma unroll
    for (int i = 0; i < kColumns; i += 4) {
      float4 s[kBlocks];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        s[b] = x[i / 4][b][0];
#pragma unroll
        for (int j = 1; j < X::kParts; ++j) add(s[b], x[i / 4][b][j]);
      }
      if constexpr (kBlocks == 2) add(s[0], s[1]);  // in either block the same
      y[i] = s[0].x, y[i + 1] = s[0].y, y[i + 2] = s[0].z, y[i + 3] = s[0].w;
    }
  }
  // this thread's channels of its row (see each_four)
  __device__ __forceinline__ void collect(float (&y)[X::kChannels]) {
    Shares<X::kChannels> x;
    load_shares<4 * X::kLanes>(x, 4 * piece), sum_shares(y, x);
  }
  // gives 1 / deviation
  __device__ __forceinline__ float normalise(float (&y)[X::kChannels]) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < X::kChannels; i += 4) sum += (y[i] + y[i + 1]) + (y[i + 2] + y[i + 3]);
    const float mean = row_sum<X::kLanes>(sum) * (1.0f / kD);
    float square = 0.0f;
#pragma unroll
    for (int i = 0; i < X::kChannels; ++i) y[i] -= mean, square += y[i] * y[i];
    const float inverse = 1.0f / sqrtf(row_sum<X::kLanes>(square) * (1.0f / kD) + p.ln_eps);
#pragma unroll
    for (int i = 0; i < X::kChannels; ++i) y[i] *= inverse;
    return inverse;
  }
  // Hands u over; then y: this thread's channels of its row, normalised. Gives 1 / deviation. If rows are split, the blocks meet between
  // two exchanges: only the first one awaits, and the second one releases.
  template <bool kAwaits, bool kReleases> __device__ __forceinline__ float exchange(const float (&u)[8][4], float (&y)[X::kChannels]) {
    if constexpr (kAwaits || !kSplit) await();
    hand_over(u);
    meet();
    collect(y);
    if constexpr (kReleases || !kSplit) release();
    return normalise(y);
  }
  // f(i, channel) for this thread's channels of its row, four at a time
  template <class Function> __device__ __forceinline__ void each_four(Function&& f) {
#pragma unroll
    for (int i = 0; i < X::kChannels; i += 4) f(i, 4 * piece + X::kLanes * i);
  }
  __device__ __forceinline__ static void floats(float (&x)[4], float4 y) { x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w; }
  __device__ __forceinline__ static void load_tokens(float (&x)[4], uint32_t from) {
    const uint2 packed = at<uint2>(from);
    const float2 a = unpack<T>(packed.x), b = unpack<T>(packed.y);
    x[0] = a.x, x[1] = a.y, x[2] = b.x, x[3] = b.y;
  }
  __device__ __forceinline__ static uint2 packed(const float (&x)[4], float factor) {
    return make_uint2(pack<T>(x[0] * factor, x[1] * factor), pack<T>(x[2] * factor, x[3] * factor));
  }
};

}  // namespace miras::cuda
