// What the stages of `replay` (mlp_replay.h) are made of: what is handed over, rows of square matrices, sums.
#pragma once

#include "mlp_backward.h"

namespace miras::cuda {

template <int C, int Hd, class T, int kBlocks> struct ReplayBlock : Chain<C, Hd, T, ReplayShared<C, Hd>, kBlocks> {
  using Base = Chain<C, Hd, T, ReplayShared<C, Hd>, kBlocks>;
  using To = Handed<C, kBlocks * Hd>;
  using Base::each_four, Base::kStrips, Base::kEights, Base::kTiles, Base::kPieces, Base::kPass;
  using Base::lane, Base::warp, Base::tile, Base::row, Base::piece, Base::h, Base::batch, Base::begin, Base::tokens;
  using typename Base::S;
  using typename Base::X;
  static_assert(kPass == kEights && (kBlocks == 1 || Base::kSplit));
  static constexpr int kColumns = C / X::kLanes;  // of a square matrix that a thread has of its row
  static constexpr int kFours = X::kChannels / 4;

  const MirasMlpBackward& b;
  char* to;  // what is handed over of this chunk

  __device__ __forceinline__ ReplayBlock(const MirasMlpBackward& b, int n, int h) : Base(b.chain, n, h), b(b) {}

  // the gates' weights of this block's tokens: 16 bytes a thread
  __device__ __forceinline__ void hand_gates(uint32_t rows, uint32_t gammas) {
    constexpr int kOwn = C / kBlocks;
    const int i = threadIdx.x, token = Base::rank() * kOwn + i, four = Base::rank() * (kOwn / 4) + i - kOwn;
    char* const gates = to + To::kGates;
    if (i < kOwn) *reinterpret_cast<uint4*>(gates + 16 * token) = at<uint4>(rows + 16 * token);
    else if (i < kOwn + kOwn / 4) *reinterpret_cast<uint4*>(gates + 16 * (C + four)) = at<uint4>(gammas + 16 * four);
  }
  // of a tile of the head's hidden units this block's share, from shared memory
  template <uint32_t kSize> __device__ __forceinline__ void hand(uint32_t offset, uint32_t tile) {
    constexpr uint32_t kStep = 16 * X::kThreads, kAtOnce = kSize < 4 * kStep ? kSize / kStep : 4;
    offset += Base::rank() * kSize + 16 * threadIdx.x, tile += 16 * threadIdx.x;
#pragma unroll
    for (uint32_t first = 0; first < kSize; first += kAtOnce * kStep) {
      uint4 x[kAtOnce];
#pragma unroll
      for (uint32_t i = 0; i < kAtOnce; ++i) x[i] = at<uint4>(tile + first + i * kStep);
#pragma unroll
      for (uint32_t i = 0; i < kAtOnce; ++i) *reinterpret_cast<uint4*>(to + offset + first + i * kStep) = x[i];
    }
  }
  // of [C, C] the pieces up to the diagonal's tile of 16; of two blocks each those that it computed
  __device__ __forceinline__ void hand_pairs(uint32_t offset, uint32_t square) {
#pragma unroll
    for (int first = 0; first < C * kPieces; first += X::kThreads) {
      const int i = first + threadIdx.x, r = i / kPieces, ch = i % kPieces;
      if (i < C * kPieces && ch / 2 <= r / 16 && ch / 2 % kBlocks == Base::rank())
        *reinterpret_cast<uint4*>(to + offset + place<kPieces>(r, ch)) = at<uint4>(square + place<kPieces>(r, ch));
    }
  }
  template <class Fragment> __device__ __forceinline__ void hand_fragment(uint32_t offset, int m, int k, const Fragment& a) {
    const int strip = (Base::rank() * X::kWarps + warp) * kStrips + m;
    *reinterpret_cast<uint4*>(to + offset + ((strip * kTiles + k) * 32 + lane) * 16) = make_uint4(a[0], a[1], a[2], a[3]);
  }
  // this thread's channels and its columns of its row of a square matrix, whose shares lie beside each other
  __device__ __forceinline__ void collect(float (&y)[X::kChannels], float (&x)[kColumns]) {
    typename Base::template Shares<X::kChannels> of_y;
    Base::template load_shares<4 * X::kLanes>(of_y, 4 * piece);
    if constexpr (kColumns % 4 == 0) {
      typename Base::template Shares<kColumns> of_x;
      Base::template load_shares<4>(of_x, kD + piece * kColumns);
      Base::sum_shares(y, of_y), Base::sum_shares(x, of_x);
    } else {
      Base::sum_shares(y, of_y);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        x[i] = 0.0f;
#pragma unroll
        for (int j = 0; j < X::kParts; ++j)
          x[i] += at<float>(Base::exchange_row(tile * X::kParts + j, row % 16) + 4 * (kD + piece * kColumns + i));
      }
    }
  }
  // The columns in 16 bits lie in one or two pieces of a tile's row. f(number of the piece, its place)
  using Piece = std::conditional_t<(kColumns > 4), uint4,
                                   std::conditional_t<kColumns == 4, uint2, std::conditional_t<kColumns == 2, uint32_t, uint16_t>>>;
  static constexpr int kPerPiece = sizeof(Piece) / 2, kOwnPieces = kColumns / kPerPiece;
  template <class Function> __device__ __forceinline__ void each_piece(Function&& f) {
#pragma unroll
    for (int i = 0; i < kOwnPieces; ++i) {
      const int column = piece * kColumns + i * kPerPiece;
      f(i, place<kPieces>(row, column / 8) + column % 8 * 2);
    }
  }
  __device__ __forceinline__ static Piece packed_piece(const float (&x)[kColumns], int piece) {
    uint32_t words[(kPerPiece + 1) / 2];
#pragma unroll
    for (int i = 0; i < kPerPiece; i += 2) {
      const float* from = &x[piece * kPerPiece + i];
      words[i / 2] = pack<T>(from[0], kPerPiece > 1 ? from[1] : 0.0f);
    }
    Piece y;
    memcpy(&y, words, sizeof y);
    return y;
  }
  __device__ __forceinline__ static void unpack_piece(float (&x)[kColumns], int piece, const Piece& from) {
    uint32_t words[(kPerPiece + 1) / 2] = {};
    memcpy(words, &from, sizeof from);
#pragma unroll
    for (int i = 0; i < kPerPiece; ++i) {
      const float2 both = unpack<T>(words[i / 2]);
      x[piece * kPerPiece + i] = i % 2 ? both.y : both.x;
    }
  }
  // x times -L of this thread's row and columns
  __device__ __forceinline__ void weigh_row(float (&y)[kColumns], const float (&x)[kColumns], uint32_t logs) {
    const float2 of_row = at<float2>(logs + 8 * row);
    float2 of_column[kColumns];
    if constexpr (kColumns == 1) {
      of_column[0] = at<float2>(logs + 8 * piece);
    } else {
#pragma unroll
      for (int i = 0; i < kColumns; i += 2) {
        const float4 both = at<float4>(logs + 8 * (piece * kColumns + i));
        of_column[i] = make_float2(both.x, both.y), of_column[i + 1] = make_float2(both.z, both.w);
      }
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) y[i] = Base::exponent(of_row, of_column[i].x, of_column[i].y);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) y[i] = exp2_approx(y[i]);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) y[i] = piece * kColumns + i <= row ? -y[i] * x[i] : 0.0f;
  }

  // the output's gradient at this thread's row and channels
  __device__ __forceinline__ void load_output_grad(uint2 (&x)[kFours], int first_token) {
    const MirasTokens& of = b.grad_out;
    const T* from = static_cast<const T*>(of.data) + batch * of.batch + (begin + first_token + row) * of.token + h * of.head;
    const bool in = first_token + row < tokens;
    each_four([&](int i, int channel) { x[i / 4] = in ? *reinterpret_cast<const uint2*>(from + channel) : make_uint2(0, 0); });
  }
  __device__ __forceinline__ static void unpack_four(float (&x)[4], uint2 both) {
    const float2 low = unpack<T>(both.x), high = unpack<T>(both.y);
    x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
  }
  // the sum over the warps of all blocks: numbers `stride` apart
  __device__ __forceinline__ static float sum_warps(uint32_t from, int stride) {
    constexpr int kCount = X::kWarps;
    float x[kCount], away[kCount], sum = 0.0f, sum_away = 0.0f;
    const uint32_t other = Base::other();
#pragma unroll
    for (int w = 0; w < kCount; ++w)
      if constexpr (kBlocks > 1) away[w] = load_cluster(other + from + 4 * w * stride);
#pragma unroll
    for (int w = 0; w < kCount; ++w) x[w] = at<float>(from + 4 * w * stride);
#pragma unroll
    for (int w = 0; w < kCount; ++w) sum += x[w];
#pragma unroll
    for (int w = 0; w < kCount; ++w)
      if constexpr (kBlocks > 1) sum_away += away[w];
    return sum + sum_away;
  }
};

}  // namespace miras::cuda
