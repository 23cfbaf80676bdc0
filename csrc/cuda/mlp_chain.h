// The forward of the MLP memory with its state on chip: what Python passes, how the work is shared out, and where everything lies in shared
// memory.
#pragma once

#include "fast.h"
#include "step.h"
#include "tiles.h"

extern "C" {

// One block, or a cluster of two, computes a sequence of one head, chunk by chunk. All tensors but q, k, v, out are contiguous, gates
// float32 [B, T, H].
struct MirasMlpChain {
  MirasTokens q, k, v, out;             // [B, T, H, 64], aligned to 16 bytes
  const float *lr, *log_decay, *delta, *momentum;  // all but lr may be null
  const float *ln_weight, *ln_bias;     // [H, 64]
  const int64_t* cu_seqlens;            // [N + 1], or null
  const int64_t* first_slot;            // [N], of packed sequences' checkpoints
  float* state;                         // [N, H, 2, Hd, 64]: S1 = W1' and W2; before the first token, then after the last. With momentum
                                        // [N, H, 4, Hd, 64]: also the momentum matrices
  float* start;                         // null, or [N, H, 2, Hd, 64]: before the chunk that the sequence ends in, or the end if it is whole
  float* open_log_decay;                // [N, H], with start: the sum of the log-decays of that chunk
  float* checkpoints;                   // null, or [slots, H, 2 or 4, Hd, 64]: before chunks 0, every, 2 every, ...
  float ln_eps;
  float bias_params[miras::kBiasParams], retention_params[miras::kRetentionParams];
  int32_t bias, retention, token_type, N, T, H, Hd, C, every, slots_per_sequence;
  int32_t blocks;  // of a head, in the forward: 1, or 2 where it may have so many (kBlocksOf) and has no retention gate
};

// 0, or a cudaError_t. It does not synchronise.
int miras_mlp_chain(const MirasMlpChain* chain, cudaStream_t stream);
// see the function
int miras_mlp_chain_layout(int64_t* layout, int room);
// bytes of shared memory that the only block of a head needs; 0 if the sizes are not served
int miras_mlp_chain_shared(int Hd, int C);
// likewise of each of two blocks, with momentum
int miras_mlp_momentum_shared(int Hd, int C);
}

namespace miras::cuda {

constexpr int kD = 64;

// How the work is shared out. Every warp owns 16 kStrips hidden units: rows of S1 and W2 that lie in its registers. For U and Uq, [C, D],
// warp w takes 16 tokens, tile w / kParts, and one of kParts parts of the hidden units; of the sums of all parts it then finishes kRows
// whole rows, kLanes lanes a row. Two blocks may share the rows out (kRowBlocks).
template <int C, int Hd, int kRowBlocks = 1> struct Shape {
  static constexpr int kWarps = Hd / 16 < 8 ? Hd / 16 : 8, kThreads = 32 * kWarps;
  static constexpr int kStrips = Hd / (16 * kWarps), kUnits = 16 * kStrips;
  static constexpr int kEights = C / 8, kTiles = C / 16;  // tiles of 8 and of 16 tokens
  static constexpr int kParts = kWarps / kTiles, kPartUnits = Hd / kParts;
  static constexpr int kRows = 16 / kParts / kRowBlocks, kLanes = 32 / kRows, kChannels = kD / kLanes;
  static_assert(kWarps % kTiles == 0 && kStrips * kUnits >= 16);
};

// The most blocks of a head. Two form a cluster (sm_90 and later), with half of the hidden units each: always in the backward, where one
// has neither the registers nor the shared memory, and in the forward where heads are few.
template <int C, int Hd> constexpr int kBlocksOf = C == 64 && Hd == 256 ? 2 : 1;

// Whether the weights of all pairs of tokens lie in shared memory: by rows [C, kWeightRow], or the tiles of 16 x 8 up to the diagonal's as
// lanes have them in fragments, 16 bytes each
enum class KeptWeights { none, rows, fragments };

// Byte offsets. Rows of 16-bit tiles are stored in pieces of 16 bytes, see `place`. K, V, Q have one or two buffers, the gates two. kMore
// columns more are exchanged than channels.
template <int C, int Hd, int kMore = 0, int kTokenBuffers = 2> struct Shared {
  static constexpr bool kGates = false, kSplit = false, kMomentum = false;  // what it has room for: retention gates, rows that are split
  static constexpr KeptWeights kKeeps = KeptWeights::none;
  static constexpr int kBuffers = kTokenBuffers, kGateBuffers = 2;
  static constexpr int kMostTiles = 4;                 // of 8 tokens whose Z is in registers at once
  static constexpr int kExchangeRow = kD + kMore + 8;  // floats
  static constexpr uint32_t kTile = C * kD * 2;
  static constexpr uint32_t kK = 0, kV = kK + kBuffers * kTile, kQ = kV + kBuffers * kTile;
  static constexpr uint32_t kA = kQ + kBuffers * kTile, kAq = kA + Hd * C * 2;  // [Hd, C]
  static constexpr uint32_t kS1 = kAq + Hd * C * 2;                             // [Hd, D]
  static constexpr uint32_t kP = kS1 + Hd * kD * 2;                             // [C, C]   -L o (Q K')
  static constexpr uint32_t kU1 = kP + C * C * 2;                               // [C, D]
  static constexpr uint32_t kU1End = kU1 + kTile, kKEnd = kU1End + kTile;       // -dec U1, -dec K
  static constexpr uint32_t kExchange = kKEnd + kTile;
  static constexpr uint32_t kRows = kExchange + Shape<C, Hd>::kWarps * 16 * kExchangeRow * 4;  // [C] float4: eta, -dec, delta, -dec eta
  static constexpr uint32_t kLogs = kRows + C * 16;  // [C] float2: the sum of log-decays, in two parts
  static constexpr uint32_t kGamma = kLogs + C * 8;  // [C]
  static constexpr uint32_t kGateBuffer = C * 28;
  static constexpr uint32_t kRaw = kRows + kGateBuffers * kGateBuffer;  // lr, log_decay, delta [3, C] of the next chunk
  static constexpr uint32_t kNorm = kRaw + 3 * C * 4;                   // weight and bias [2, D]
  static constexpr uint32_t kBytes = kNorm + 2 * kD * 4;
};

// Of a block of two, which share out rows and pairs of tokens too, and have room for the weights of all pairs.
template <int C, int Hd> struct ClusterShared : Shared<C, Hd> {
  static constexpr bool kSplit = true;
  static constexpr KeptWeights kKeeps = KeptWeights::rows;
  static constexpr int kWeightRow = C + 8;                                                             // floats
  static constexpr uint32_t kWeights = Shared<C, Hd>::kBytes, kBytes = kWeights + C * kWeightRow * 4;  // [C, C] float32: -L
};

// of the forward
template <int C, int Hd> struct ChainShared : Shared<C, Hd> {
  static constexpr bool kGates = true;
  static constexpr uint32_t kSums = Shared<C, Hd>::kBytes;                // [warps] or [warps, D] float2: see mlp_primal.h
  static constexpr uint32_t kMap = kSums + Shape<C, Hd>::kWarps * kD * 8;  // [D] float2, or 4 floats
  static constexpr uint32_t kBytes = kMap + kD * 8;
};

// ------------------------------------------------------------------------------------------------------------------ launches

// f(integral constants C, Hd) if the kernels have such a size, else 0
template <int C, class Function> int with_hidden(int Hd, Function&& f) {
  constexpr std::integral_constant<int, C> c;
  if (Hd == 64) return f(c, std::integral_constant<int, 64>());
  if (Hd == 128) return f(c, std::integral_constant<int, 128>());
  if (Hd == 256) return f(c, std::integral_constant<int, 256>());
  return 0;
}

template <class T> struct OfType {
  using type = T;
};
// f(OfType<token type>), or an error if it is not served
template <class Function> int with_token_type(int token_type, Function&& f) {
  if (token_type == MIRAS_BF16) return f(OfType<Bf16>());
  if (token_type == MIRAS_F16) return f(OfType<Fp16>());
  return int(cudaErrorInvalidValue);
}

}  // namespace miras::cuda
