// How the scores of a chunk of linear_chain_kernel.h, decayed and rounded, get to shared memory, beside other work.
#pragma once

#include "linear_chain_tools.h"

namespace miras::cuda {
namespace {

// A tile's scores in units of 8 x 8: of a group of tokens t the groups 0 to `group` of s; zeros stay in the others. Of the tile's groups
// low < high, unit i belongs to `high` for i <= kGroups / 2, the next one to `low`, each of the rest to that one which lacks it.
template <class Chain> struct ScoreUnits {
  using T = typename Chain::T;
  static constexpr int kGroups = Chain::kGroups, kSixteens = Chain::kSixteens, kSteps = Chain::kSteps;
  static constexpr int kCount = kGroups + 1, kAtOnce = Chain::kHelped ? kCount : (kCount + kSteps - 3) / (kSteps - 2);
  const Chain& chain;
  const Gates<Chain::kChunk>& x;
  int tile;
  bool has;  // a tile that there is
  float2 of_low, of_high;
  uint32_t *low_words, *high_words;
  float4 earlier_gates[kAtOnce];
  float2 decays[kAtOnce];

  __device__ __forceinline__ ScoreUnits(const Chain& chain, const Gates<Chain::kChunk>& x, int tile)
      : chain(chain), x(x), tile(tile % kSixteens), has(tile < kSixteens), of_low(x.log_gamma[8 * this->tile + chain.lane / 4]),
        of_high(x.log_gamma[8 * (kGroups - 1 - this->tile) + chain.lane / 4]), low_words(chain.score_word(this->tile, 0)),
        high_words(chain.score_word(kGroups - 1 - this->tile, 0)) {}
  __device__ __forceinline__ bool is_low(int i) const { return i > kSixteens && tile >= i - kSixteens - 1; }
  __device__ __forceinline__ int earlier(int i) const {
    return i <= kSixteens ? i : is_low(i) ? i - kSixteens - 1 : kGroups - (i - kSixteens - 1);
  }
  // Step kStep of kSteps, beside other work: gates are loaded, decays computed and scores stored, each for kAtOnce units, a step apart.
  template <int kStep> __device__ __forceinline__ void step(const float (&scores)[kGroups][4]) {
    store<kStep - 2>(scores);
    decay<kStep - 1>();
    units_of<kStep>([&](auto i, auto j) { earlier_gates[j] = chain.pair(x.log_gamma, earlier(i)); });
  }
  template <int kStep, class Function> __device__ __forceinline__ static void units_of(Function&& f) {
    each<kAtOnce>([&](auto j) {
      if constexpr (kStep >= 0 && kStep * kAtOnce + j < kCount) f(Index<kStep * kAtOnce + j>{}, j);
    });
  }
  // Here and in `store` an operation is done for all units before the next one: no instruction waits for the one before it.
  template <int kStep> __device__ __forceinline__ void decay() {
    float2 apart[2 * kAtOnce];
    units_of<kStep>([&](auto i, auto j) {
      const float2 later = is_low(i) ? of_low : of_high;
      const float4 of = earlier_gates[j];
      apart[2 * j] = make_float2(later.x - of.x, later.y - of.y), apart[2 * j + 1] = make_float2(later.x - of.z, later.y - of.w);
    });
    units_of<kStep>([&](auto, auto j) { decays[j] = make_float2(exponent_of(apart[2 * j]), exponent_of(apart[2 * j + 1])); });
    units_of<kStep>([&](auto, auto j) { decays[j] = make_float2(exp2_approx(decays[j].x), exp2_approx(decays[j].y)); });
  }
  template <int kStep> __device__ __forceinline__ void store(const float (&scores)[kGroups][4]) const {
    constexpr auto kPlace = [](int n) { return n / 2 * 64 + n % 2; };
    float2 of[kAtOnce];
    uint32_t words[kAtOnce];
    units_of<kStep>([&](auto i, auto j) {
      constexpr int kOther = i - kSixteens - 1;
      const float (&low)[4] = scores[i <= kSixteens ? i : kOther], (&high)[4] = scores[i <= kSixteens ? i : (kGroups - kOther) % kGroups];
      of[j] = make_float2(decays[j].x * (is_low(i) ? low[0] : high[2]), decays[j].y * (is_low(i) ? low[1] : high[3]));
    });
    units_of<kStep>([&](auto i, auto j) {
      if constexpr (i < kSixteens) return;  // else it may lie on the diagonal
      const int group = is_low(i) ? tile : kGroups - 1 - tile;
      const int before = 8 * (group - earlier(i)) + chain.lane / 4 - 2 * (chain.lane & 3);  // tokens from s to t
      of[j] = make_float2(before >= 0 ? of[j].x : 0.0f, before >= 1 ? of[j].y : 0.0f);
    });
    units_of<kStep>([&](auto, auto j) { words[j] = pack<T>(of[j].x, of[j].y); });
    units_of<kStep>([&](auto i, auto j) {
      constexpr int kOther = i - kSixteens - 1;
      uint32_t* const either = is_low(i) ? low_words + kPlace(kOther) : high_words + kPlace(kGroups - kOther);
      uint32_t* const to = i <= kSixteens ? high_words + kPlace(i) : either;
      if (Chain::kAllHaveTiles || has) *to = words[j];
    });
  }
};

}  // namespace
}  // namespace miras::cuda
