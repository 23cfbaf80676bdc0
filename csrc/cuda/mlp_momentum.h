// Momentum in the MLP memory's forward (docs/mathematics.md, sections 3 and 9), by clusters of two blocks: where its tensors lie, and the
// weights of a chunk.
#pragma once

#include "mlp_chain.h"

namespace miras::cuda {

// the weights are -M
template <int C, int Hd> struct MomentumShared : ClusterShared<C, Hd> {
  using Base = ClusterShared<C, Hd>;
  static constexpr bool kMomentum = true;
  static constexpr uint32_t kM1 = Base::kBytes;                               // [Hd, D]: M1' before the chunk, in 16 bits
  static constexpr uint32_t kU1Step = kM1 + Hd * kD * 2;                      // [C, D]: -Theta_C U1
  static constexpr uint32_t kKStep = kU1Step + Base::kTile;                   // [C, D]: -Theta_C K
  static constexpr uint32_t kCarry = kKStep + Base::kTile;                    // [C] b
  static constexpr uint32_t kPi = kCarry + C * 4, kMoves = kPi + 16;          // pi_C; [C] momentum of the next chunk
  static constexpr uint32_t kBytes = kMoves + C * 4;
  static_assert(kM1 % 128 == 0);
};

// The weights are products, token by token, since they cannot be divided: rows of M and Theta, b and pi, of chunk c with `in` tokens, by
// the warp that has copied its gates; columns lane, lane + 32, ... by each lane.
template <class Block> __device__ __forceinline__ void weigh_moves(int lane, int c, int in) {
  using S = typename Block::S;
  constexpr int C = 8 * Block::kEights, kPer = (C + 31) / 32;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int r = lane * kPer + i;  // whose gates this lane has copied
    float& log_decay = at<float>(S::kRaw + 4 * (C + r));
    log_decay = exp2_approx(Math<float>::max(log_decay, Block::kLowest) * Block::kLog2e);
    if (r >= in) at<float>(S::kMoves + 4 * r) = 1.0f;
  }
  __syncwarp();
  float pair[kPer] = {}, step[kPer] = {}, carry = 0.0f, pi = 1.0f;
#pragma unroll 2
  for (int first = 0; first < C; first += 4) {
    float alpha[4], theta[4], carries[4];
    Block::floats(alpha, at<float4>(S::kRaw + 4 * (C + first))), Block::floats(theta, at<float4>(S::kMoves + 4 * first));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int r = first + j;
      pi *= theta[j], carries[j] = carry = alpha[j] * carry + (r < in ? pi : 0.0f);
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        const int s = lane + 32 * i;
        step[i] = s == r ? 1.0f : step[i] * theta[j];
        pair[i] = alpha[j] * pair[i] + (r < in ? step[i] : 0.0f);
        at<float>(S::kWeights + 4 * (r * S::kWeightRow + s)) = -pair[i];
      }
    }
    if (lane == 0) at<float4>(S::kCarry + 4 * first) = make_float4(carries[0], carries[1], carries[2], carries[3]);
  }
  if (lane == 0) at<float>(S::kPi) = pi;
  const uint32_t rows = (c & (S::kGateBuffers - 1)) * S::kGateBuffer + S::kRows;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    float4& row = at<float4>(rows + 16 * (lane + 32 * i));
    row.y = -pair[i], row.w = -step[i];
  }
}

}  // namespace miras::cuda
