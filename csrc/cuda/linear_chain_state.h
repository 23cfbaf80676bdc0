// What a block of linear_chain_kernel.h holds, and how it copies, loads and stores; the steps of a chunk are defined there.
#pragma once

#include "linear_chain_scores.h"

namespace miras::cuda {
namespace {

template <class S> struct Chain {
  using T = typename S::T;
  static constexpr int kKeys = S::kKeys, kChunk = S::kChunk, kGroups = S::kGroups;
  static constexpr int kEach = kChunk < 32 ? 1 : kChunk / 32;               // tokens of a lane that computes decays
  static constexpr int kPieces = kKeys / 8, kValuePieces = S::kValues / 8;  // of 16 bytes
  static constexpr int kRows = S::kThreads / kPieces;
  static constexpr int kValueRows = S::kThreads / kValuePieces < kChunk ? S::kThreads / kValuePieces : kChunk;
  static constexpr int kSixteens = kGroups / 2;  // of a chunk's tokens
  static constexpr int kSteps = kKeys / 16;
  static constexpr int kNever = 1 << 30;
  static constexpr bool kHelped = S::kHelped;
  static constexpr bool kAllHaveTiles = kSixteens == S::kWarps && !S::kHelped;  // of the scores

  const MirasLinearChain& p;
  const Sequence s;
  unsigned char* const shared;
  const uint32_t base;  // the address of `shared`
  const int warp, lane, first_value;
  const bool couples;  // the bias, a row of E
  const bool active;   // the warp has values; the others compute scores
  float w[kKeys / 8][4];
  Copies<kRows, S::kRow> keys, queries;
  Copies<kValueRows, S::kValueRow> values;
  const int64_t first_gate;  // of the sequence's first token and the head
  char* out;                 // of the thread's first token of the chunk

  __device__ __forceinline__ Chain(const MirasLinearChain& p, unsigned char* shared, int head, int tile)
      : p(p), s(p, head, kChunk), shared(shared), base(shared_address(shared)), warp(thread() / 32), lane(thread() % 32),
        first_value(tile * S::kValues + warp * kWarpValues), couples(bias_traits(BiasTag(p.bias)).couples_row),
        active(warp * kWarpValues < S::kValues && first_value < p.V), keys(rows_of(p.k, 0)), queries(rows_of(p.q, S::kQ)),
        values(values_of(tile * S::kValues)), first_gate((s.batch * p.T + s.begin) * p.H + s.h),
        out(s.token(p.out, 2 * (lane & 3)) + 2 * (first_value + 2 * (lane / 4))) {}

  __device__ __forceinline__ Gates<kChunk>& gates(int chunk) const {
    return reinterpret_cast<Gates<kChunk>*>(shared + S::kGates)[chunk & 1];
  }
  // the chunk's tokens that there are; at most 0 beyond the last chunk
  __device__ __forceinline__ int tokens_of(int chunk) const { return min(s.length - chunk * kChunk, kChunk); }

  // ---------------------------------------------------------------------------------------------------------------- copies

  // a piece lies at its place ^ (row % 8), so that 8 rows of a matrix are in different banks
  __device__ __forceinline__ Copies<kRows, S::kRow> rows_of(const MirasTokens& x, int place) const {
    const int piece = thread() % kPieces, row = thread() / kPieces;
    const auto at = [&](int odd) { return base + place + row * S::kRow + ((piece ^ ((row + odd * kRows) & 7)) << 4); };
    return {s.token(x, row) + 16 * piece, {at(0), at(1)}, row};
  }
  __device__ __forceinline__ Copies<kValueRows, S::kValueRow> values_of(int first) const {
    const int piece = thread() % kValuePieces, row = thread() / kValuePieces;
    const bool has = first + 8 * piece < p.V;
    const uint32_t at = base + S::kV + row * S::kValueRow + 16 * piece;
    return {s.token(p.v, row) + 2 * (has ? first + 8 * piece : 0), {at, at}, has ? row : kNever};
  }
  // part kPart of kParts of a chunk's copies; a chunk beyond the last one has none
  template <int kPart, int kParts> __device__ __forceinline__ void copy(int chunk) {
    const uint32_t stage = (chunk & 1) * S::kStage;
    const int count = tokens_of(chunk);
    constexpr int kRowsOf = kChunk / kRows, kValuesOf = kChunk / kValueRows;
    each<kRowsOf>([&](auto i) {
      if constexpr (i * kParts / kRowsOf == kPart) {
        keys.template copy<i>(p.k, stage, count - keys.row);
        queries.template copy<i>(p.q, stage, count - keys.row);
      }
    });
    each<kValuesOf>([&](auto i) {
      if constexpr (i * kParts / kValuesOf == kPart)
        if (S::kThreads <= kValueRows * kValuePieces || values.row < kChunk) values.template copy<i>(p.v, stage, count - values.row);
    });
    if constexpr (kPart + 1 == kParts) cp_async_commit();
  }

  // ----------------------------------------------------------------------------------------------------------------- gates

  struct Raw {
    float lr[kEach], log_decay[kEach], delta[kEach];
  };
  // a chunk beyond the last one gets those of the last token
  __device__ __forceinline__ Raw load_gates(int chunk) const {
    Raw x;
    const float* const log_decay = p.log_decay ? p.log_decay : p.lr;  // loads without branches
    const float* const delta = p.delta && !p.delta_per_channel ? p.delta : p.lr;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int64_t at = first_gate + int64_t(min(chunk * kChunk + lane * kEach + i, s.length - 1)) * p.H;
      x.lr[i] = p.lr[at], x.log_decay[i] = log_decay[at], x.delta[i] = delta[at];
    }
    return x;
  }
  // Decays of a chunk, a step at a time, so that other work comes between a shuffle and its result. All warps do it, or the last.
  struct Scan {
    static constexpr int kSteps = 8;
    const Chain& chain;
    Raw x;
    int chunk;
    float2 sums[kEach], end, own;
    uint32_t moved[2];  // words: nothing but the next step waits for a shuffle

    template <int kStep> __device__ __forceinline__ void step() {
      if constexpr (kStep == 0) {
        const int first = fresh_thread() % 32 * kEach, count = chain.tokens_of(chunk);  // fresh: not before the loads have come
        end = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          const bool has = first + i < count;
          x.lr[i] = has ? -x.lr[i] : 0.0f, x.delta[i] = has ? x.delta[i] : 0.0f;
          const float g = max_nan(has && chain.p.log_decay ? x.log_decay[i] : 0.0f, kLowest), units = floorf(fmaf(g, kUnit, 0.5f));
          end.x += units, end.y += (g - units * (1 / kUnit)) * kLog2;
          sums[i] = end;
        }
        own = end;
      }
      constexpr int kBefore = kStep < 1 || kStep > 5 ? 0 : 1 << (kStep - 1), kNext = kStep < 5 ? 1 << kStep : 0;
      if constexpr (kBefore > 0) {
        end.x += chain.lane >= kBefore ? __uint_as_float(moved[0]) : 0.0f;
        end.y += chain.lane >= kBefore ? __uint_as_float(moved[1]) : 0.0f;
      }
      if constexpr (kStep < 6) {
        const uint32_t x = __float_as_uint(end.x), y = __float_as_uint(end.y);
        moved[0] = kStep < 5 ? __shfl_up_sync(kWholeWarp, x, kNext) : __shfl_sync(kWholeWarp, x, 31);
        moved[1] = kStep < 5 ? __shfl_up_sync(kWholeWarp, y, kNext) : __shfl_sync(kWholeWarp, y, 31);
      }
      if constexpr (kStep == 7) store();
    }
    __device__ __forceinline__ void store() const {
      if (chain.warp != (S::kHelped ? S::kWarps - 1 : 0) || chain.lane * kEach >= kChunk) return;
      Gates<kChunk>& to = chain.gates(chunk);
      const float2 zero = make_float2(0.0f, 0.0f), all = make_float2(__uint_as_float(moved[0]), __uint_as_float(moved[1]));
      const float2 before = make_float2(end.x - own.x, end.y - own.y);
      float2 of[kEach];
      float gamma[kEach], to_end[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) of[i] = make_float2(sums[i].x + before.x, sums[i].y + before.y);
#pragma unroll
      for (int i = 0; i < kEach; ++i) gamma[i] = decay_of(of[i], zero), to_end[i] = decay_of(all, of[i]);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int row = chain.lane * kEach + i;
        to.log_gamma[row] = of[i], to.eta[row] = make_float2(x.lr[i], x.lr[i] * to_end[i]);
        to.gamma[row] = gamma[i], to.delta[row] = x.delta[i];
      }
      if (chain.lane == 31 || (kEach == 1 && chain.lane == kChunk - 1)) to.total = gamma[kEach - 1];
    }
  };
  __device__ __forceinline__ void prepare(Raw x, int chunk) const {
    Scan scan{*this, x, chunk};
    each<Scan::kSteps>([&](auto i) { scan.template step<i>(); });
  }
  // of the thread's two tokens in each group
  __device__ __forceinline__ float2 pair(const float (&of)[kChunk], int n) const {
    return *reinterpret_cast<const float2*>(of + 8 * n + 2 * (lane & 3));
  }
  __device__ __forceinline__ float4 pair(const float2 (&of)[kChunk], int n) const {
    return *reinterpret_cast<const float4*>(of + 8 * n + 2 * (lane & 3));
  }

  // ---------------------------------------------------------------------------------------------------------------- states

  // visit(W of value, key; the same of value + 1)
  template <class Function> __device__ __forceinline__ void each_pair(Function&& visit) {
    const int lane = fresh_thread() % 32, value = first_value + 2 * (lane / 4), key = 2 * (lane % 4);
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
      visit(value, key + 8 * n, w[n][0], w[n][2]);
      visit(value, key + 8 * n + 1, w[n][1], w[n][3]);
    }
  }
  __device__ __forceinline__ void load_initial() {
    const float* const from = p.initial + s.n * p.initial_sequence + s.h * p.initial_head;
    each_pair([&](int value, int key, float& a, float& b) {
      const float* const at = from + value * p.initial_value + key * p.initial_key;
      a = at[0], b = at[p.initial_value];
    });
  }
  // [V, K]
  __device__ __forceinline__ void store_state(float* to) {
    if (to == nullptr) return;
    to += (int64_t(s.n) * p.H + s.h) * p.V * kKeys;
    each_pair([&](int value, int key, float a, float b) { to[value * kKeys + key] = a, to[(value + 1) * kKeys + key] = b; });
  }
  // [K, V], where the chunk's state is kept
  __device__ __forceinline__ void store_checkpoint(int chunk) {
    if (p.checkpoints == nullptr || chunk % p.every) return;
    const int64_t slot = (p.first_slot ? p.first_slot[s.n] : int64_t(s.n) * p.slots) + chunk / p.every;
    float* const to = p.checkpoints + (slot * p.H + s.h) * kKeys * p.V;
    each_pair([&](int value, int key, float a, float b) { *reinterpret_cast<float2*>(to + key * p.V + value) = make_float2(a, b); });
  }

  // -------------------------------------------------------------------------------------------------------------- products

  // c += a b, or = for the first of a sum
  template <bool kFirst> __device__ __forceinline__ static void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (kFirst) mma_first(c, a, b0, b1);
    else mma_m16n8k16<T>(c, a, b0, b1);
  }
  __device__ __forceinline__ static void mma_first(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<T, Bf16>)
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
                   : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
    else
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
                   : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
  }
  // an A operand: W, rounded, for 16 keys
  __device__ __forceinline__ void operand(uint32_t (&a)[4], int i, float factor) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float* const x = &w[2 * i + j / 2][2 * (j % 2)];
      a[j] = std::is_same_v<T, Bf16> ? pack<T>(x[0], x[1]) : pack<T>(x[0] * factor, x[1] * factor);
    }
  }
  // the first address of a lane for B operands of 16 keys: lanes 8 to 15 and 24 to 31 have the later keys, 16 to 31 the later tokens
  __device__ __forceinline__ uint32_t lane_rows() const {
    return ((lane >> 4) * 8 + (lane & 7)) * S::kRow + ((((lane >> 3) & 1) ^ (lane & 7)) << 4);
  }

  // This warp's tiles of K Q', whose queries it reads as A operands, and E'. The tensor cores are busy: `work(i)` is done beside step i.
  template <bool kErrors, bool kScores, class Work>
  __device__ __forceinline__ void errors_and_scores(float (&e)[kGroups][4], float (&scores)[S::kTiles][kGroups][4], uint32_t stage,
                                                    float factor, Work&& work) const;
  // W Q', likewise
  template <class Work> __device__ __forceinline__ void read_out(float (&o)[kGroups][4], uint32_t stage, float factor, Work&& work) const;

  // ---------------------------------------------------------------------------------------------------------------- scores

  // the first tile of the scores that the warp computes. Where half of the warps do that, numbers from kSixteens on are left for the others
  __device__ __forceinline__ int first_tile() const { return S::kHelped ? (warp + S::kWarps / 2) % S::kWarps * S::kTiles : warp; }
  // the word of a thread's two pairs: group of 8 tokens t, group n of 8 tokens s
  __device__ __forceinline__ uint32_t* score_word(int group, int n) const {
    return reinterpret_cast<uint32_t*>(shared + S::kScores) + ((group * kSixteens + n / 2) * 32 + lane) * 2 + (n & 1);
  }
  using Units = ScoreUnits<Chain>;
  __device__ __forceinline__ void clear_scores() const {
    uint2* const words = reinterpret_cast<uint2*>(shared + S::kScores);
    for (int i = thread(); i < S::kScoresBytes / 8; i += S::kThreads) words[i] = make_uint2(0, 0);
  }

  // --------------------------------------------------------------------------------------------------------------- updates

  // |e|^2 of each of a thread's tokens: the sum of this warp's values, then of all. A barrier must be between.
  __device__ __forceinline__ float* squares_of(int warp) const { return reinterpret_cast<float*>(shared + S::kSquares) + warp * kChunk; }
  __device__ __forceinline__ void store_squares(const float (&e)[kGroups][4]) const {
#pragma unroll
    for (int n = 0; n < kGroups; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float sum = over_lanes(e[n][i] * e[n][i] + e[n][i + 2] * e[n][i + 2], 4, 32, Add{});
        if (lane < 4) squares_of(warp)[8 * n + 2 * lane + i] = sum;
      }
  }
  __device__ __forceinline__ float square(int token) const {
    float sum = 0.0f;
    for (int i = 0; i < S::kValues / kWarpValues && i * kWarpValues < p.V; ++i) sum += squares_of(i)[token];
    return sum;
  }
  // thresholds by channel; those of values 2g and 2g + 1 for each of a thread's tokens
  __device__ __forceinline__ float2 channel_delta(int chunk, int count, int token) const {
    if (token >= count) return make_float2(0.0f, 0.0f);
    const int64_t row = first_gate + int64_t(chunk * kChunk + token) * p.H;
    return *reinterpret_cast<const float2*>(p.delta + row * p.V + first_value + 2 * (lane / 4));
  }
  __device__ __forceinline__ void load_values(uint32_t (&v)[kGroups][2], int chunk) const {
    const unsigned char* const at = shared + (chunk & 1) * S::kStage + S::kV + 2 * kWarpValues * warp + 4 * (lane / 4);
#pragma unroll
    for (int n = 0; n < kGroups; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) v[n][i] = *reinterpret_cast<const uint32_t*>(at + (8 * n + 2 * (lane & 3) + i) * S::kValueRow);
  }

  // U' from scale e - v
  __device__ __forceinline__ float updates(uint32_t (&u)[kSixteens][4], uint32_t (&to_end)[kSixteens][4], float (&e)[kGroups][4],
                                           const uint32_t (&v)[kGroups][2], int chunk, int count, float scale) const;

  // U', rounded, in the order of A operands of 16 tokens: what reads add, and what states add. Returns what both are divided by.
  __device__ __forceinline__ float weigh(uint32_t (&u)[kSixteens][4], uint32_t (&to_end)[kSixteens][4], const float (&psi)[kGroups][4],
                                         const float4 (&eta)[kGroups]) const;

  // W <- gamma_C W + (U' dec) K; `work(i)` beside its kSixteens * kKeys / 64 steps
  template <class Work>
  __device__ __forceinline__ void write(const uint32_t (&to_end)[kSixteens][4], uint32_t stage, float total, float scale, Work&& work);

  // gamma O', and what of the scores is added to it: groups n of t with 16 tokens s, those of `i`
  __device__ __forceinline__ void decay_output(float (&o)[kGroups][4], const float2 (&gamma)[kGroups], float factor) const {
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      float2 of = gamma[n];
      if constexpr (!std::is_same_v<T, Bf16>) of.x *= factor, of.y *= factor;
      o[n][0] *= of.x, o[n][1] *= of.y, o[n][2] *= of.x, o[n][3] *= of.y;
    }
  }
  __device__ __forceinline__ void load_scores(uint2 (&b)[kGroups], int i) const {
#pragma unroll
    for (int n = 2 * i; n < kGroups; ++n) b[n] = *reinterpret_cast<const uint2*>(score_word(n, 2 * i));
  }
  __device__ __forceinline__ void store_output(const float (&o)[kGroups][4], int count, float scale);

  // ----------------------------------------------------------------------------------------------------------------- chunk

  __device__ __forceinline__ float largest() const {
    float found = 0.0f;
    if constexpr (!std::is_same_v<T, Bf16>)
      for (const auto& x : w)
        for (float y : x) found = fmaxf(found, fabsf(y));
    return found;
  }
  // A warp with values goes one way through a chunk, a warp without values the other; they meet at the same barriers.
  template <bool kActive> __device__ __forceinline__ void read_chunk(int chunk);
  __device__ __forceinline__ void run() {
    clear_scores();
    if (s.chunks > 0) {
      copy<0, 1>(0);
      if (!S::kHelped || warp == S::kWarps - 1) prepare(load_gates(0), 0);
    }
    if (active) {
      load_initial();
#pragma unroll 1
      for (int chunk = 0; chunk < s.chunks; ++chunk) {
        store_checkpoint(chunk);
        if (chunk == s.whole) store_state(p.start);
        read_chunk<true>(chunk);
      }
      if (s.chunks == s.whole) store_state(p.start);
      store_state(p.final);
    } else {
#pragma unroll 1
      for (int chunk = 0; chunk < s.chunks; ++chunk) read_chunk<false>(chunk);
    }
    cp_async_wait<0>();
  }
};

}  // namespace
}  // namespace miras::cuda
