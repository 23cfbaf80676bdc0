// The backward of the MLP memory with its state on chip: what Python passes, what the two kernels hand over, and where it lies in shared
// memory. A group of segments at a time, the last first: `replay` reruns them, all at once, with the read-out's backward; `reverse` then
// walks their chunks from last to first.
#pragma once

#include "mlp_stages.h"

extern "C" {

// All gradients are contiguous; of q, k and v in the inputs' type, of gates float32 [B, T, H].
struct MirasMlpBackward {
  MirasMlpChain chain;                           // state: the gradient after the group's last chunk, then before its first; out: unused
  MirasTokens grad_out, grad_q, grad_k, grad_v;  // grad_out aligned to 16 bytes
  float *grad_lr, *grad_log_decay, *grad_delta;  // the last two are null where the gates are
  const int64_t* segments;                       // [places, 2], aligned to 16: sequence and number of a segment, beyond its last: unused
  const int64_t* slots;                          // [places]: of their checkpoints
  const int64_t* sequence_places;                // [N, 2]: the places of a sequence's segments: the first, and that after the last
  char* handed;                                  // [places, every, H] times miras_mlp_handed bytes, aligned to 16
  float* norm_shares;                            // [places, H, 2, 64]
  float* grad_norm;                              // [N, H, 2, 64]: of LayerNorm's weight and bias, added to
  int32_t places, zero;
};

int miras_mlp_replay(const MirasMlpBackward* backward, cudaStream_t stream);
int miras_mlp_reverse(const MirasMlpBackward* backward, cudaStream_t stream);
// see miras_mlp_chain_layout
int miras_mlp_backward_layout(int64_t* layout, int room);
// bytes that `replay` hands over per chunk and head, and bytes of shared memory that a block needs of either kernel; 0: not served
int miras_mlp_handed(int Hd, int C);
int miras_mlp_backward_shared(int Hd, int C);
}

namespace miras::cuda {

// Byte offsets of what `replay` hands over. Tiles as they lie in shared memory; fragments as registers have them, 16 bytes a lane.
template <int C, int Hd> struct Handed {
  static constexpr uint32_t kTile = C * kD * 2, kSquare = C * C * 2;
  static constexpr uint32_t kS1 = 0, kW2 = kS1 + Hd * kD * 2;              // [Hd, D]: before the chunk, in 16 bits
  static constexpr uint32_t kGu = kW2 + Hd * kD * 2, kDUq = kGu + kTile;   // [C, D]: Gu, gamma dUq
  static constexpr uint32_t kP = kDUq + kTile, kN1 = kP + kSquare;         // [C, C]: -L o (Q K'), -L o (dUq U1')
  static constexpr uint32_t kN2 = kN1 + kSquare;                           // [C, C]: -L o (dZq U2')
  static constexpr uint32_t kAq = kN2 + kSquare, kDZq = kAq + Hd * C * 2;  // fragments of Aq', dZq'
  static constexpr uint32_t kX = kDZq + Hd * C * 2;                        // [C, D] float32: LN(U)
  static constexpr uint32_t kR1 = kX + C * kD * 4;                         // [C, D] float32: -(L o Aq A')' dUq
  static constexpr uint32_t kInverse = kR1 + C * kD * 4;                   // [C] float32: 1 / deviation of U
  static constexpr uint32_t kGates = kInverse + C * 4;                     // [C] float4 as in `Shared`; [C] float32: gamma
  static constexpr uint32_t kBytes = kGates + C * 20;
  static_assert(kGates % 16 == 0 && kBytes % 16 == 0);
};

constexpr uint32_t whole_lines(uint32_t bytes) { return (bytes + 127) / 128 * 128; }

template <int C, int Hd> struct ReplayShared : Shared<C, Hd, C, C == 64 ? 1 : 2> {
  using Base = Shared<C, Hd, C, C == 64 ? 1 : 2>;
  static constexpr bool kSplit = C == 64;
  static constexpr KeptWeights kKeeps = C == 64 ? KeptWeights::fragments : KeptWeights::none;
  static constexpr int kMostTiles = 8;
  static constexpr uint32_t kDZq = Base::kAq;                                         // in the place of Aq, by each warp
  static constexpr uint32_t kU2 = whole_lines(Base::kBytes), kN1 = kU2 + Hd * C * 2;  // [Hd, C]; [C, C] as handed over
  static constexpr bool kOneBuffer = Base::kBuffers == 1;
  static constexpr uint32_t kDUq = kOneBuffer ? Base::kV : kN1 + C * C * 2;             // [C, D]
  static constexpr uint32_t kScores = kN1 + C * C * 2 + (kOneBuffer ? 0 : C * kD * 2);  // [C, C]: -L o (Aq A')
  static constexpr uint32_t kReads = kScores + C * C * 2;                               // [warps, C] float32
  static constexpr uint32_t kCrossed = kReads + Shape<C, Hd>::kWarps * C * 4;           // likewise
  static constexpr uint32_t kWeights = kCrossed + Shape<C, Hd>::kWarps * C * 4;
  static constexpr uint32_t kBytes = kWeights + (kKeeps == KeptWeights::fragments ? C / 16 * (C / 16 + 1) * 512 : 0);
};

template <int C, int Hd> struct ReverseShared {
  static constexpr bool kGates = false, kSplit = true, kMomentum = false;
  static constexpr int kMostTiles = 8, kExchangeRow = kD + 8;
  static constexpr int kWarps = Shape<C, Hd>::kWarps, kMostBlocks = C == 64 ? 2 : 1;
  static constexpr uint32_t kTile = C * kD * 2, kState = Hd * kD * 2, kHidden = Hd * C * 2, kSquare = C * C * 2;
  static constexpr uint32_t kK = 0;                                 // two tiles, which take turns: K, and gamma dUq
  static constexpr uint32_t kV = kK + 2 * kTile, kQ = kV + kTile;   // in V's place dU, then gamma Q
  static constexpr uint32_t kGu = kQ + kTile, kS1 = kGu + kTile, kW2 = kS1 + kState;
  static constexpr uint32_t kJ = kW2 + kState;                      // J1, then J2, in 16 bits
  static constexpr uint32_t kA = kJ + kState, kB = kA + kHidden;    // [Hd, C]: A'; dGa', then dZ'
  static constexpr uint32_t kP = kB + kHidden, kN1 = kP + kSquare, kN2 = kN1 + kSquare;
  static constexpr uint32_t kExchange = kN2 + kSquare;
  static constexpr uint32_t kRows = kExchange + kWarps * 16 * kExchangeRow * 4, kGamma = kRows + C * 16;  // twice, as handed over
  static constexpr uint32_t kGateBuffer = C * 20, kNorm = kRows + 2 * kGateBuffer;
  static constexpr uint32_t kLr = kNorm + 2 * kD * 4;                                   // [warps, C] float32
  static constexpr uint32_t kReads = kLr + kWarps * C * 4;                              // [blocks, warps, 16]: A J1 . Gu
  static constexpr uint32_t kEnds = kReads + kMostBlocks * kWarps * 64;                 // likewise -dec U2 J2 . K
  static constexpr uint32_t kToEnd = kEnds + kMostBlocks * kWarps * 64;                 // [C]: -dec eta A J1 . Gu
  static constexpr uint32_t kInner = kToEnd + C * 4, kMore = whole_lines(kInner + C * 4);  // [C]: shares of <J, S>
  // (-dec U2)' where there is room, else in the place of A' and computed again
  static constexpr bool kKeeps = Hd < 256;
  static constexpr uint32_t kU2 = kKeeps ? kMore : kA;
  // where registers are short: gelu'(Z') by threads, and the sums for LayerNorm's weight and bias [2, C, D] float32
  static constexpr bool kParks = Hd == 256 && C > 16;
  static constexpr uint32_t kSlopes = kMore, kSums = kSlopes + kHidden;
  static constexpr uint32_t kBytes = kParks ? kSums + 2 * C * kD * 4 : kKeeps ? kU2 + kHidden : kMore;
};

template <int C, int Hd> constexpr uint32_t backward_shared() {
  constexpr int kUnits = Hd / kBlocksOf<C, Hd>;
  constexpr uint32_t replay = ReplayShared<C, kUnits>::kBytes, reverse = ReverseShared<C, kUnits>::kBytes;
  return replay > reverse ? replay : reverse;
}

// f(integral constants C, Hd) if the backward serves these sizes
template <class Function> int with_backward_sizes(int C, int Hd, Function&& f) {
  if (C == 16) return with_hidden<16>(Hd, f);
  if (C == 32) return with_hidden<32>(Hd, f);
  constexpr std::integral_constant<int, 64> tall;
  if (C == 64 && Hd == 128) return f(tall, std::integral_constant<int, 128>());
  if (C == 64 && Hd == 256) return f(tall, std::integral_constant<int, 256>());
  return 0;
}

// f(integral constants C, Hd, OfType<token type>), or an error if they are not served
template <class Function> int with_backward_sizes(const MirasMlpBackward& b, Function&& f) {
  if (!miras_mlp_handed(b.chain.Hd, b.chain.C)) return cudaErrorInvalidValue;
  return with_backward_sizes(b.chain.C, b.chain.Hd, [&](auto c, auto hd) {
    return with_token_type(b.chain.token_type, [&](auto token) { return f(c, hd, token); });
  });
}

// sums over the rows of fragments [units, tokens], from all lanes of a warp to its row of [warps, C]
template <int kEights> __device__ __forceinline__ void put_sums(uint32_t row, const float (&sums)[kEights][2], int lane) {
  constexpr int kCount = 2 * kEights;
  float x[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = sums[i / 2][i % 2];
  const int first = share_sums<4>(x, lane);
  if (keeps_sum<4, kCount>(lane))
#pragma unroll
    for (int i = 0; i < kLeft<4, kCount>; ++i) at<float>(row + 4 * ((first + i) / 2 * 8 + lane % 4 * 2 + (first + i) % 2)) = x[i];
}

// f(channel, the sum over kTokens rows of kRow floats in shared memory), by the first threads
template <int kTokens, int kRow, class Function> __device__ __forceinline__ void sum_rows(uint32_t from, Function&& f) {
  for (int i = threadIdx.x; i < kD; i += blockDim.x) {
    float sum = 0.0f;
    for (int r = 0; r < kTokens; ++r) sum += at<float>(from + 4 * (r * kRow + i));
    f(i, sum);
  }
}

}  // namespace miras::cuda
