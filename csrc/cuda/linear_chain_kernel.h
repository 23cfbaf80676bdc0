// The kernel of linear_chain.h, for one type of token.
//
// A warp holds 16 values of W, all keys, as float32 accumulators of mma.m16n8k16 through all chunks of a sequence. Rounded and packed they
// are the A operand of W K' and W Q'; U' is the A operand of both products that it enters: so no element of W, E, U or O goes from one
// thread to another. Row g of a warp's tile is its value 2g and row g + 8 its value 2g + 1, so that a thread has neighbouring values of a
// token, which lie in one word of v and of the output.
//
// Of the scores L o K Q', 8 tokens t are a B operand, whose k runs over the earlier tokens s. A tile of them has the tokens of groups w and
// G - 1 - w of the chunk's G groups of 8: every tile then has the same number of pairs s <= t. Each is computed by one warp, from the keys
// that it reads for E' anyway, and handed over through shared memory.
//
// A chunk: tokens have arrived [barrier]; copies of the next chunk's tokens begin; E' and scores; W Q'; scores to shared memory; U'
// [barrier]; W; O'. One warp computes the next chunk's decays.
#pragma once

#include "linear_chain.h"
#include "mma.h"

namespace miras::cuda {
namespace {

// Gates of a chunk's tokens as the products take them
template <int kChunk> struct Gates {
  float units[kChunk], rest[kChunk];     // log2 of gamma_t in two parts, whose differences keep their digits
  float gamma[kChunk];                   // gamma_t
  float eta[kChunk], eta_to_end[kChunk]; // -eta_t, -eta_t gamma_C / gamma_t
  float delta[kChunk];
  float total, padding[3];               // gamma_C
};

// Sizes, and the places in shared memory
template <class T_, int kKeys_, int kChunk_, int kWarps_> struct ChainShape {
  using T = T_;
  static constexpr int kKeys = kKeys_, kChunk = kChunk_, kWarps = kWarps_;
  static constexpr int kThreads = 32 * kWarps, kValues = kWarpValues * kWarps, kGroups = kChunk / 8;
  static constexpr int kTiles = (kGroups / 2 + kWarps - 1) / kWarps;  // of the scores, that a warp computes
  static constexpr int kRow = 2 * kKeys, kValueRow = 2 * kValues + 16;  // bytes of a token; with the padding no banks conflict
  static constexpr int kTokens = kChunk * kRow, kStage = 2 * kTokens + kChunk * kValueRow;
  static constexpr int kQ = kTokens, kV = 2 * kTokens;
  static constexpr int kScores = 2 * kStage, kScoresBytes = kGroups * (kGroups / 2) * 32 * 8;
  static constexpr int kGates = kScores + kScoresBytes;
  static constexpr int kSquares = kGates + 2 * int(sizeof(Gates<kChunk>));
  static constexpr int kBytes = kSquares + kWarps * kChunk * 4;
  static_assert(kStage % 256 == 0 && kScores % 256 == 0);
};

constexpr float kLog2 = 1.44269504f, kUnit = 1024.0f, kLowest = -110.0f;  // exp of anything lower is 0

__device__ __forceinline__ float min_nan(float a, float b) {
  float c;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}
__device__ __forceinline__ float max_nan(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}
// the decay whose log2 has these two parts
__device__ __forceinline__ float decay_of(float units, float rest) {
  return exp2_approx(min_nan(fmaf(units, kLog2 / kUnit, rest), 0.0f));
}

// A power of two, 1 unless numbers up to `largest` exceed float16's range: what they are divided by before they are rounded.
template <class T> __device__ __forceinline__ float fitting(float largest) {
  if constexpr (std::is_same_v<T, Bf16>) return 1.0f;
  const int more = max((__float_as_int(over_lanes(largest, 1, 32, Max{})) >> 23) - 127 - 14, 0);
  return __int_as_float((127 + more) << 23);
}
template <class T> __device__ __forceinline__ float inverse(float power) {
  if constexpr (std::is_same_v<T, Bf16>) return 1.0f;
  return __int_as_float((254 << 23) - __float_as_int(power));
}

// The tokens of one sequence and head.
struct Sequence {
  int64_t batch, begin, length;
  int n, h, chunks, whole;

  __device__ Sequence(const MirasLinearChain& p, int head, int chunk) : n(head / p.H), h(head % p.H) {
    batch = p.cu_seqlens ? 0 : n;
    begin = p.cu_seqlens ? p.cu_seqlens[n] : 0;
    length = p.cu_seqlens ? p.cu_seqlens[n + 1] - begin : p.T;
    chunks = int((length + chunk - 1) / chunk), whole = int(length / chunk);
  }
  // where the token `t` of the sequence begins
  __device__ const char* token(const MirasTokens& x, int64_t t) const {
    return static_cast<const char*>(x.data) + 2 * (batch * x.batch + (begin + t) * x.token + h * x.head);
  }
};

template <class S> struct Chain {
  using T = typename S::T;
  static constexpr int kKeys = S::kKeys, kChunk = S::kChunk, kGroups = S::kGroups;
  static constexpr int kEach = kChunk < 32 ? 1 : kChunk / 32;  // tokens of a lane that computes decays

  const MirasLinearChain& p;
  const Sequence s;
  unsigned char* const shared;
  const uint32_t base;  // the address of `shared`
  const int warp, lane, first_value;
  const bool active;  // the warp has values
  float w[kKeys / 8][4];

  __device__ Chain(const MirasLinearChain& p, unsigned char* shared, int head, int tile)
      : p(p), s(p, head, kChunk), shared(shared), base(shared_address(shared)), warp(thread() / 32), lane(thread() % 32),
        first_value(tile * S::kValues + warp * kWarpValues), active(first_value < p.V) {}

  __device__ Gates<kChunk>& gates(int chunk) const { return reinterpret_cast<Gates<kChunk>*>(shared + S::kGates)[chunk & 1]; }
  // the chunk's tokens that there are
  __device__ int tokens_of(int chunk) const { return int(min(s.length - int64_t(chunk) * kChunk, int64_t(kChunk))); }

  // ---------------------------------------------------------------------------------------------------------------- copies

  // rows of q or k: pieces of 16 bytes, each at its place ^ (row % 8), so that 8 rows of a matrix lie in different banks
  __device__ void copy_rows(uint32_t to, const MirasTokens& x, int chunk, int count) const {
    constexpr int kPieces = kKeys / 8, kRows = S::kThreads / kPieces;
    const int piece = thread() % kPieces, first = thread() / kPieces;
    const char* from = s.token(x, int64_t(chunk) * kChunk + first) + 16 * piece;
#pragma unroll
    for (int i = 0; i < kChunk / kRows; ++i) {
      const int row = first + i * kRows;
      cp_async_16(to + row * S::kRow + ((piece ^ (row & 7)) << 4), from + int64_t(2 * i * kRows) * x.token, row < count);
    }
  }
  __device__ void copy(int chunk) const {
    constexpr int kPieces = S::kValues / 8, kRows = S::kThreads / kPieces;
    const uint32_t stage = base + (chunk & 1) * S::kStage;
    const int count = tokens_of(chunk), piece = thread() % kPieces, value = first_value - warp * kWarpValues + 8 * piece;
    copy_rows(stage, p.k, chunk, count);
    copy_rows(stage + S::kQ, p.q, chunk, count);
    const bool has = value < p.V;
    const char* from = s.token(p.v, int64_t(chunk) * kChunk + thread() / kPieces) + 2 * (has ? value : 0);
#pragma unroll
    for (int i = 0; i < kChunk / kRows; ++i) {
      const int row = thread() / kPieces + i * kRows;
      cp_async_16(stage + S::kV + row * S::kValueRow + 16 * piece, from + int64_t(2 * i * kRows) * p.v.token, has && row < count);
    }
    cp_async_commit();
  }

  // ----------------------------------------------------------------------------------------------------------------- gates

  struct Raw {
    float lr[kEach], log_decay[kEach], delta[kEach];
  };
  __device__ Raw load_gates(int chunk) const {
    Raw x;
    const int count = tokens_of(chunk);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int row = lane * kEach + i;
      const int64_t at = (s.batch * p.T + s.begin + int64_t(chunk) * kChunk + row) * p.H + s.h;
      const bool has = row < count;
      x.lr[i] = has ? p.lr[at] : 0.0f;
      x.log_decay[i] = has && p.log_decay ? p.log_decay[at] : 0.0f;
      x.delta[i] = has && p.delta && !p.delta_per_channel ? p.delta[at] : 0.0f;
    }
    return x;
  }
  __device__ void prepare(const Raw& x, int chunk) const {
    float units[kEach], rest[kEach], units_end = 0.0f, rest_end = 0.0f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const float g = max_nan(x.log_decay[i], kLowest), whole = floorf(fmaf(g, kUnit, 0.5f));
      units_end += whole, rest_end += (g - whole / kUnit) * kLog2;
      units[i] = units_end, rest[i] = rest_end;
    }
    const float own_units = units_end, own_rest = rest_end;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const float u = __shfl_up_sync(kWholeWarp, units_end, step), r = __shfl_up_sync(kWholeWarp, rest_end, step);
      if (lane >= step) units_end += u, rest_end += r;
    }
    const float all_units = __shfl_sync(kWholeWarp, units_end, 31), all_rest = __shfl_sync(kWholeWarp, rest_end, 31);
    Gates<kChunk>& to = gates(chunk);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int row = lane * kEach + i;
      const float u = units[i] + (units_end - own_units), r = rest[i] + (rest_end - own_rest);
      if (row >= kChunk) break;
      to.units[row] = u, to.rest[row] = r, to.gamma[row] = decay_of(u, r);
      to.eta[row] = -x.lr[i], to.eta_to_end[row] = -(x.lr[i] * decay_of(all_units - u, all_rest - r)), to.delta[row] = x.delta[i];
    }
    if (lane == 0) to.total = decay_of(all_units, all_rest);
  }
  __device__ float2 pair(const float (&of)[kChunk], int n) const {
    return *reinterpret_cast<const float2*>(of + 8 * n + 2 * (lane & 3));
  }

  // ---------------------------------------------------------------------------------------------------------------- states

  // visit(W of value, key; the same of value + 1)
  template <class Function> __device__ void each_pair(Function&& visit) {
    const int lane = fresh_thread() % 32, value = first_value + 2 * (lane / 4), key = 2 * (lane % 4);
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
      visit(value, key + 8 * n, w[n][0], w[n][2]);
      visit(value, key + 8 * n + 1, w[n][1], w[n][3]);
    }
  }
  __device__ void load_initial() {
    const float* const from = p.initial + s.n * p.initial_sequence + s.h * p.initial_head;
    each_pair([&](int value, int key, float& a, float& b) {
      const float* const at = from + value * p.initial_value + key * p.initial_key;
      a = active ? at[0] : 0.0f, b = active ? at[p.initial_value] : 0.0f;
    });
  }
  // [V, K]
  __device__ void store_state(float* to) {
    if (to == nullptr || !active) return;
    to += (int64_t(s.n) * p.H + s.h) * p.V * kKeys;
    each_pair([&](int value, int key, float a, float b) { to[value * kKeys + key] = a, to[(value + 1) * kKeys + key] = b; });
  }
  // [K, V], where the chunk's state is kept
  __device__ void store_checkpoint(int chunk) {
    if (p.checkpoints == nullptr || chunk >= s.chunks || chunk % p.every || !active) return;
    const int64_t slot = (p.first_slot ? p.first_slot[s.n] : int64_t(s.n) * p.slots) + chunk / p.every;
    float* const to = p.checkpoints + (slot * p.H + s.h) * kKeys * p.V;
    each_pair([&](int value, int key, float a, float b) { *reinterpret_cast<float2*>(to + key * p.V + value) = make_float2(a, b); });
  }

  // -------------------------------------------------------------------------------------------------------------- products

  // an A operand: W, rounded, for 16 keys
  __device__ void operand(uint32_t (&a)[4], int i, float factor) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float *const x = &w[2 * i + j / 2][2 * (j % 2)];
      a[j] = std::is_same_v<T, Bf16> ? pack<T>(x[0], x[1]) : pack<T>(x[0] * factor, x[1] * factor);
    }
  }
  // B operands of 16 keys and all tokens, from rows at `rows`
  __device__ void keys_of(uint32_t (&b)[kGroups / 2][4], uint32_t rows, int i) const {
#pragma unroll
    for (int n = 0; n < kGroups / 2; ++n) ldmatrix_x4(b[n], (rows ^ (i << 5)) + n * 16 * S::kRow);
  }
  // the first address of a lane for `keys_of`: lanes 8 to 15 and 24 to 31 have the later keys, lanes 16 to 31 the later tokens
  __device__ uint32_t lane_rows() const {
    return ((lane >> 4) * 8 + (lane & 7)) * S::kRow + ((((lane >> 3) & 1) ^ (lane & 7)) << 4);
  }

  // E' and this warp's tiles of K Q', of which it reads the queries
  __device__ void errors_and_scores(float (&e)[kGroups][4], float (&scores)[S::kTiles][kGroups][4], uint32_t stage, float factor) const {
    const uint32_t keys = stage + lane_rows();
    uint32_t queries[S::kTiles];
#pragma unroll
    for (int j = 0; j < S::kTiles; ++j) {
      const int tile = (warp + j * S::kWarps) % (kGroups / 2), group = (lane >> 3) & 1 ? kGroups - 1 - tile : tile;
      queries[j] = stage + S::kQ + (8 * group + (lane & 7)) * S::kRow + (((lane >> 4) ^ (lane & 7)) << 4);
    }
    uint32_t b[2][kGroups / 2][4], q[2][S::kTiles][4];
    const auto load = [&](int i) {
      keys_of(b[i & 1], keys, i);
#pragma unroll
      for (int j = 0; j < S::kTiles; ++j) ldmatrix_x4(q[i & 1][j], queries[j] ^ (i << 5));
    };
    load(0);
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      if (i + 1 < kKeys / 16) load(i + 1);
      uint32_t a[4];
      operand(a, i, factor);
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
        const uint32_t(&x)[4] = b[i & 1][n / 2];
        mma_m16n8k16<T>(e[n], a, x[n % 2 * 2], x[n % 2 * 2 + 1]);
#pragma unroll
        for (int j = 0; j < S::kTiles; ++j) mma_m16n8k16<T>(scores[j][n], q[i & 1][j], x[n % 2 * 2], x[n % 2 * 2 + 1]);
      }
    }
  }

  // W Q'
  __device__ void read_out(float (&o)[kGroups][4], uint32_t stage, float factor) const {
    const uint32_t queries = stage + S::kQ + lane_rows();
    uint32_t b[2][kGroups / 2][4];
    keys_of(b[0], queries, 0);
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      if (i + 1 < kKeys / 16) keys_of(b[(i + 1) & 1], queries, i + 1);
      uint32_t a[4];
      operand(a, i, factor);
#pragma unroll
      for (int n = 0; n < kGroups; ++n) mma_m16n8k16<T>(o[n], a, b[i & 1][n / 2][n % 2 * 2], b[i & 1][n / 2][n % 2 * 2 + 1]);
    }
  }

  // ---------------------------------------------------------------------------------------------------------------- scores

  // the word of a thread's two pairs: group of 8 tokens t, group n of 8 tokens s
  __device__ uint32_t* score_word(int group, int n) const {
    return reinterpret_cast<uint32_t*>(shared + S::kScores) + ((group * (kGroups / 2) + n / 2) * 32 + lane) * 2 + (n & 1);
  }
  // Of a group of tokens t the groups 0 to `group` of s; zeros stay in the others. Of the tile's groups `low` < `high`, groups n of s up to
  // kGroups / 2 belong to `high`, and as many of the rest as lack in `low`.
  __device__ void store_scores(const float (&scores)[kGroups][4], int tile, const Gates<kChunk>& x) const {
    const int low = tile, high = kGroups - 1 - tile, in_group = lane / 4;
    const float low_units = x.units[8 * low + in_group], low_rest = x.rest[8 * low + in_group];
    const float high_units = x.units[8 * high + in_group], high_rest = x.rest[8 * high + in_group];
    const auto store = [&](bool is_low, int n, float a, float b) {
      const float units = is_low ? low_units : high_units, rest = is_low ? low_rest : high_rest;
      const int group = is_low ? low : high, t = 8 * group + in_group, first = 8 * n + 2 * (lane & 3);
      const float2 u = pair(x.units, n), r = pair(x.rest, n);
      a = first <= t ? a * decay_of(units - u.x, rest - r.x) : 0.0f;
      b = first + 1 <= t ? b * decay_of(units - u.y, rest - r.y) : 0.0f;
      *score_word(group, n) = pack<T>(a, b);
    };
#pragma unroll
    for (int n = 0; n <= kGroups / 2; ++n) store(false, n, scores[n][2], scores[n][3]);
    store(true, 0, scores[0][0], scores[0][1]);
#pragma unroll
    for (int i = 1; i < kGroups / 2; ++i) {
      const bool is_low = tile >= i;
      const int other = kGroups - i;
      store(is_low, is_low ? i : other, is_low ? scores[i][0] : scores[other][2], is_low ? scores[i][1] : scores[other][3]);
    }
  }
  __device__ void clear_scores() const {
    uint2* const words = reinterpret_cast<uint2*>(shared + S::kScores);
    for (int i = thread(); i < S::kScoresBytes / 8; i += S::kThreads) words[i] = make_uint2(0, 0);
  }

  // --------------------------------------------------------------------------------------------------------------- updates

  // |e|^2 of each of a thread's tokens, of all values
  __device__ void squares(float (&square)[kGroups][2], const float (&e)[kGroups][4]) const {
    float* const of_warps = reinterpret_cast<float*>(shared + S::kSquares);
#pragma unroll
    for (int n = 0; n < kGroups; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float sum = over_lanes(e[n][i] * e[n][i] + e[n][i + 2] * e[n][i + 2], 4, 32, Add{});
        if (lane < 4) of_warps[warp * kChunk + 8 * n + 2 * lane + i] = sum;
      }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kGroups; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        square[n][i] = 0.0f;
        for (int j = 0; j < S::kWarps; ++j) square[n][i] += of_warps[j * kChunk + 8 * n + 2 * (lane & 3) + i];
      }
  }
  // thresholds by channel; those of values 2g and 2g + 1 for each of a thread's tokens
  __device__ float2 channel_delta(int chunk, int count, int token) const {
    if (!active || token >= count) return make_float2(0.0f, 0.0f);
    const int64_t row = (s.batch * p.T + s.begin + int64_t(chunk) * kChunk + token) * p.H + s.h;
    return *reinterpret_cast<const float2*>(p.delta + row * p.V + first_value + 2 * (lane / 4));
  }

  // e becomes psi(scale e - v)
  __device__ void gradients(float (&e)[kGroups][4], uint32_t stage, int chunk, int count, float scale) const {
    const unsigned char* const v = shared + (stage - base) + S::kV + 2 * kWarpValues * warp + 4 * (lane / 4);
    const bool predicts = BiasTag(p.bias) != BiasTag::dot;
#pragma unroll
    for (int n = 0; n < kGroups; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 of = unpack<T>(*reinterpret_cast<const uint32_t*>(v + (8 * n + 2 * (lane & 3) + i) * S::kValueRow));
        e[n][i] = (predicts ? e[n][i] * scale : 0.0f) - of.x, e[n][i + 2] = (predicts ? e[n][i + 2] * scale : 0.0f) - of.y;
      }
    const Gates<kChunk>& x = gates(chunk);
    with_bias(BiasTag(p.bias), p.bias_params, [&](auto bias) {
      using Bias = decltype(bias);
      float square[kGroups][2] = {};
      if constexpr (Bias::kCouplesRow) squares(square, e);
#pragma unroll
      for (int n = 0; n < kGroups; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float2 delta = make_float2(0.0f, 0.0f);
          if constexpr (Bias::kUsesDelta) {
            if (!Bias::kCouplesRow && p.delta_per_channel) delta = channel_delta(chunk, count, 8 * n + 2 * (lane & 3) + i);
            else delta.x = delta.y = x.delta[8 * n + 2 * (lane & 3) + i];
          }
          e[n][i] = bias.value(e[n][i], bias.row(square[n][i], delta.x));
          e[n][i + 2] = bias.value(e[n][i + 2], bias.row(square[n][i], delta.y));
        }
      return 0;
    });
  }

  // U', rounded, in the order of A operands of 16 tokens: what reads add, and what states add. Returns what both are divided by.
  __device__ float updates(uint32_t (&u)[kGroups / 2][4], uint32_t (&to_end)[kGroups / 2][4], const float (&psi)[kGroups][4],
                           const Gates<kChunk>& x) const {
    float largest = 0.0f;
    if constexpr (!std::is_same_v<T, Bf16>)
#pragma unroll
      for (int n = 0; n < kGroups; ++n)
        for (int j = 0; j < 4; ++j) largest = fmaxf(largest, fabsf(psi[n][j] * x.eta[8 * n + 2 * (lane & 3) + j % 2]));
    const float scale = fitting<T>(largest), factor = inverse<T>(scale);
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      float2 eta = pair(x.eta, n), end = pair(x.eta_to_end, n);
      if constexpr (!std::is_same_v<T, Bf16>) eta.x *= factor, eta.y *= factor, end.x *= factor, end.y *= factor;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        u[n / 2][n % 2 * 2 + i] = pack<T>(psi[n][2 * i] * eta.x, psi[n][2 * i + 1] * eta.y);
        to_end[n / 2][n % 2 * 2 + i] = pack<T>(psi[n][2 * i] * end.x, psi[n][2 * i + 1] * end.y);
      }
    }
    return scale;
  }

  // W <- gamma_C W + (U' dec) K
  __device__ void write(const uint32_t (&to_end)[kGroups / 2][4], uint32_t stage, float total, float scale) {
    const float factor = total * inverse<T>(scale);
    // lanes 8 to 15 and 24 to 31 have the later tokens, lanes 16 to 31 the later keys
    const uint32_t rows = stage + (((lane >> 3) & 1) * 8 + (lane & 7)) * S::kRow + (((lane >> 4) ^ (lane & 7)) << 4);
    constexpr int kAtOnce = 4;  // pairs of key tiles
    uint32_t b[2][kAtOnce][4];
    const auto load = [&](int step) {
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int keys = step % (kKeys / 16 / kAtOnce) * kAtOnce + n;
        ldmatrix_x4_trans(b[step & 1][n], (rows ^ (keys << 5)) + step / (kKeys / 16 / kAtOnce) * 16 * S::kRow);
      }
    };
    constexpr int kSteps = kGroups / 2 * (kKeys / 16 / kAtOnce);
    load(0);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step + 1 < kSteps) load(step + 1);
      const int i = step / (kKeys / 16 / kAtOnce), first = step % (kKeys / 16 / kAtOnce) * kAtOnce * 2;
#pragma unroll
      for (int n = 0; n < 2 * kAtOnce; ++n) {
        if (i == 0)
#pragma unroll
          for (int j = 0; j < 4; ++j) w[first + n][j] *= factor;
        mma_m16n8k16<T>(w[first + n], to_end[i], b[step & 1][n / 2][n % 2 * 2], b[step & 1][n / 2][n % 2 * 2 + 1]);
      }
    }
    if constexpr (!std::is_same_v<T, Bf16>)
      if (scale != 1.0f)
        for (auto& x : w)
          for (float& y : x) y *= scale;
  }

  // O' <- gamma O' + U' (L o K Q'), and stores it
  __device__ void output(float (&o)[kGroups][4], const uint32_t (&u)[kGroups / 2][4], int chunk, int count, float w_scale, float u_scale) const {
    const Gates<kChunk>& x = gates(chunk);
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      float2 gamma = pair(x.gamma, n);
      if constexpr (!std::is_same_v<T, Bf16>) gamma.x *= w_scale * inverse<T>(u_scale), gamma.y *= w_scale * inverse<T>(u_scale);
      o[n][0] *= gamma.x, o[n][1] *= gamma.y, o[n][2] *= gamma.x, o[n][3] *= gamma.y;
    }
#pragma unroll
    for (int i = 0; i < kGroups / 2; ++i) {
      uint2 b[kGroups];
#pragma unroll
      for (int n = 2 * i; n < kGroups; ++n) b[n] = *reinterpret_cast<const uint2*>(score_word(n, 2 * i));
#pragma unroll
      for (int n = 2 * i; n < kGroups; ++n) mma_m16n8k16<T>(o[n], u[i], b[n].x, b[n].y);
    }
    if (!active) return;
    const int lane = fresh_thread() % 32;
    char* const to = const_cast<char*>(s.token(p.out, int64_t(chunk) * kChunk)) + 2 * (first_value + 2 * (lane / 4));
#pragma unroll
    for (int n = 0; n < kGroups; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = 8 * n + 2 * (lane & 3) + i;
        float a = o[n][i], b = o[n][i + 2];
        if constexpr (!std::is_same_v<T, Bf16>) a *= u_scale, b *= u_scale;
        if (token < count) *reinterpret_cast<uint32_t*>(to + 2 * token * p.out.token) = pack<T>(a, b);
      }
  }

  // ----------------------------------------------------------------------------------------------------------------- chunk

  __device__ float largest() const {
    float found = 0.0f;
    if constexpr (!std::is_same_v<T, Bf16>)
      for (const auto& x : w)
        for (float y : x) found = fmaxf(found, fabsf(y));
    return found;
  }
  __device__ void read_chunk(int chunk) {
    const uint32_t stage = base + (chunk & 1) * S::kStage;
    const int count = tokens_of(chunk);
    const bool more = chunk + 1 < s.chunks;
    cp_async_wait<0>();
    __syncthreads();  // the tokens and gates of the chunk are here, and those before it have been read
    Raw next;
    if (more) {
      copy(chunk + 1);
      if (warp == 0) next = load_gates(chunk + 1);
    }
    const float w_scale = fitting<T>(largest()), factor = inverse<T>(w_scale);
    float e[kGroups][4] = {};
    {
      float scores[S::kTiles][kGroups][4] = {};
      errors_and_scores(e, scores, stage, factor);
#pragma unroll
      for (int j = 0; j < S::kTiles; ++j)
        if (warp + j * S::kWarps < kGroups / 2) store_scores(scores[j], warp + j * S::kWarps, gates(chunk));
    }
    gradients(e, stage, chunk, count, w_scale);
    uint32_t u[kGroups / 2][4], to_end[kGroups / 2][4];
    const float u_scale = updates(u, to_end, e, gates(chunk));
    float o[kGroups][4] = {};
    read_out(o, stage, factor);
    write(to_end, stage, gates(chunk).total, u_scale);
    if (more && warp == 0) prepare(next, chunk + 1);
    __syncthreads();  // all scores are here
    output(o, u, chunk, count, w_scale, u_scale);
  }
  __device__ void run() {
    clear_scores();
    if (s.chunks > 0) {
      copy(0);
      if (warp == 0) prepare(load_gates(0), 0);
    }
    load_initial();
#pragma unroll 1
    for (int chunk = 0; chunk < s.chunks; ++chunk) {
      store_checkpoint(chunk);
      if (chunk == s.whole) store_state(p.start);
      read_chunk(chunk);
    }
    if (s.chunks == s.whole) store_state(p.start);
    store_state(p.final);
  }
};

template <class S> __global__ void __launch_bounds__(S::kThreads, 2) linear_chain(const __grid_constant__ MirasLinearChain p, const int tiles) {
  extern __shared__ __align__(1024) unsigned char shared[];
  Chain<S>(p, shared, blockIdx.x / tiles, blockIdx.x % tiles).run();
}

template <class S> int launch_chain(const MirasLinearChain& p, cudaStream_t stream) {
  const int tiles = (p.V + S::kValues - 1) / S::kValues;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(int64_t(p.N) * p.H * tiles));
  config.blockDim = dim3(S::kThreads);
  config.dynamicSmemBytes = S::kBytes;
  config.stream = stream;
  const auto kernel = linear_chain<S>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes);
  return error ? error : cudaLaunchKernelEx(&config, kernel, p, tiles);
}
template <class T, int kKeys, int kChunk> int launch_warps(const MirasLinearChain& p, cudaStream_t stream) {
  switch (p.warps) {
    case 2: return launch_chain<ChainShape<T, kKeys, kChunk, 2>>(p, stream);
    case 4: return launch_chain<ChainShape<T, kKeys, kChunk, 4>>(p, stream);
    default: return cudaErrorInvalidValue;
  }
}
template <class T, int kKeys> int launch_chunks(const MirasLinearChain& p, cudaStream_t stream) {
  switch (p.C) {
    case 16: return launch_warps<T, kKeys, 16>(p, stream);
    case 32: return launch_warps<T, kKeys, 32>(p, stream);
    case 64: return launch_warps<T, kKeys, 64>(p, stream);
    default: return cudaErrorInvalidValue;
  }
}
template <class T> int launch_keys(const MirasLinearChain& p, cudaStream_t stream) {
  if (p.V % kWarpValues || int64_t(p.N) * p.H == 0) return p.V % kWarpValues ? cudaErrorInvalidValue : cudaSuccess;
  switch (p.K) {
    case 64: return launch_chunks<T, 64>(p, stream);
    case 128: return launch_chunks<T, 128>(p, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace miras::cuda
