// Copies matrices between tensors and scratch: float32 or bfloat16 outside, float32 inside, plain or transposed.
//
//   c tokens   D channels   Cp, Dp the same, rounded up to kPad
//
// Scratch matrices have padded rows, the padding is zero: products run over whole vectors and need no masks.
#pragma once

#include "../params.h"
#include "scratch.h"
#include "tile.h"

namespace miras::cpu::MIRAS_LEVEL {

// Hands out parts of the thread's scratch. Run once with a null base to measure the size, then again with memory.
class Arena {
 public:
  MIRAS_FN explicit Arena(float* base) : base_(base) {}
  MIRAS_FN float* take(int64_t rows, int64_t ld) {
    const int64_t at = used_;
    used_ += (rows * ld + kPad - 1) / kPad * kPad + kSkew;
    if (!base_) return nullptr;
    allow(base_ + at, size_t(rows * ld));
    return base_ + at;
  }
  MIRAS_FN int64_t used() const { return used_; }

 private:
  static constexpr int64_t kSkew = 5 * kPad;  // equal offsets into pages would make loads wait for unrelated stores
  float* base_;
  int64_t used_ = 0;
};

// run(scratch) with a Scratch in the thread's own memory, which it lays out by an Arena; denormals are zero meanwhile.
template <class Scratch, class Params, class Run> static void with_scratch(const Params& p, Run run) {
  FlushDenormals flush;
  Arena measure(nullptr);
  Scratch(measure, p);
  Arena arena(thread_scratch(size_t(measure.used())));
  run(Scratch(arena, p));
}

MIRAS_INLINE void fill_zero(float* x, int64_t n) { __builtin_memset(x, 0, size_t(n) * sizeof(float)); }

// Four columns of kLanes rows: the loads put rows 0, 4, 8, ... side by side, which leaves 4 x 4 in every 128 bits.
MIRAS_INLINE void transpose_quads(const float* src, index_t ld, Vec (&x)[4]) {
  const Vec a = load_quads(src, ld), b = load_quads(src + ld, ld);
  const Vec c = load_quads(src + 2 * ld, ld), d = load_quads(src + 3 * ld, ld);
  const Vec ab = zip_low(a, b), ab_high = zip_high(a, b), cd = zip_low(c, d), cd_high = zip_high(c, d);
  x[0] = join_low(ab, cd), x[1] = join_high(ab, cd), x[2] = join_low(ab_high, cd_high), x[3] = join_high(ab_high, cd_high);
}

// dst [cols x ld_dst] = transpose of src [rows x cols]; dst's columns from `rows` to the next multiple of kPad become zero.
template <class T> static void transpose(const T* src, index_t ld_src, int rows, int cols, float* dst, index_t ld_dst) {
  for (int i = 0; i < round_up(rows, kPad); i += kLanes) {
    for (int j = 0; j < cols; j += kLanes) {
      const int height = minimum(kLanes, rows - i), width = minimum(kLanes, cols - j);
      const T* block = src + i * ld_src + j;
      const float* from = reinterpret_cast<const float*>(block);
      index_t ld = ld_src;
      alignas(64) float whole[kLanes * kLanes];
      if (sizeof(T) != sizeof(float) || height < kLanes || width < kLanes) {  // widen, or pad with zeros
        for (int r = 0; r < kLanes; ++r) {
          const Vec row = r >= height ? zeros() : width < kLanes ? load_first(block + r * ld_src, width) : load(block + r * ld_src);
          store(whole + r * kLanes, row);
        }
        from = whole, ld = kLanes;
      }
      float* to = dst + j * ld_dst + i;
      for (int quad = 0; quad < width; quad += 4) {
        Vec x[4];
        transpose_quads(from + quad, ld, x);
        float* const rows = to + quad * ld_dst;
        MIRAS_UNROLL
        for (int r = 0; r < 4; ++r)
          if (quad + r < width) store(rows + r * ld_dst, x[r]);
      }
    }
  }
}

// dst [rows x ld_dst] = src [rows x cols]; columns up to the next multiple of kPad become zero.
template <class T, class To> static void copy_in(const T* src, index_t ld_src, int rows, int cols, To* dst, index_t ld_dst) {
  const int padded = round_up(cols, kPad);
  for (int i = 0; i < rows; ++i, src += ld_src, dst += ld_dst) {
    int j = 0;
    for (; cols - j >= kLanes; j += kLanes) store(dst + j, load(src + j));
    if (j < cols) store(dst + j, load_first(src + j, cols - j)), j += kLanes;
    for (; j < padded; j += kLanes) store(dst + j, zeros());
  }
}

template <class T> static void copy_out(const float* src, index_t ld_src, int rows, int cols, T* dst, index_t ld_dst) {
  for (int i = 0; i < rows; ++i, src += ld_src, dst += ld_dst) {
    int j = 0;
    for (; cols - j >= kLanes; j += kLanes) store(dst + j, load(src + j));
    if (j < cols) store_first(dst + j, load(src + j), cols - j);
  }
}

// ---- one chunk of one head of a [B, T, H, D] tensor ----
// Its address; `token` counts from the batch row's start.
template <class T> MIRAS_INLINE T* address(const TokenTensor& x, int64_t b, int64_t token, int64_t h) {
  return static_cast<T*>(x.data) + b * x.batch + token * x.token + h * x.head;
}

// The channels [first, first + cols) of c tokens, in place or copied.
struct ChunkView {
  const TokenTensor& x;
  Dtype dtype;
  int64_t b, token, h;
  int first, cols;

  MIRAS_FN bool in_place() const { return dtype == Dtype::f32 && cols % kPad == 0; }
  template <class T> MIRAS_FN T* at() const { return address<T>(x, b, token, h) + first; }
  // The same channels from the t-th token on
  MIRAS_FN ChunkView from(int t) const { return {x, dtype, b, token + t, h, first, cols}; }

  MIRAS_FN void transpose_in(int c, float* dst, index_t ld) const {
    if (dtype == Dtype::f32) transpose(at<float>(), x.token, c, cols, dst, ld);
    else transpose(at<uint16_t>(), x.token, c, cols, dst, ld);
  }
  template <class To> MIRAS_FN void read(int c, To* dst, index_t ld) const {
    if (dtype == Dtype::f32) copy_in(at<float>(), x.token, c, cols, dst, ld);
    else copy_in(at<uint16_t>(), x.token, c, cols, dst, ld);
  }
  MIRAS_FN void write(int c, const float* src, index_t ld) const {
    if (dtype == Dtype::f32) copy_out(src, ld, c, cols, at<float>(), x.token);
    else copy_out(src, ld, c, cols, at<uint16_t>(), x.token);
  }
};

// Prefetches a chunk of a tensor while a product of so many multiply-adds runs, evenly: a line at every 2nd, 4th, ... of its inner steps.
// Tokens are often a page apart, which the hardware does not predict. Prefetching all at once would fill the load buffers, for which the
// product would wait; prefetching too early would let the rows, whose low address bits are equal, evict each other.
template <bool kWrite> class Prefetch {
 public:
  Prefetch() = default;
  MIRAS_FN Prefetch(const ChunkView& x, int c, int64_t products = 0) {
    const int size = x.dtype == Dtype::f32 ? 4 : 2;
    at_ = x.dtype == Dtype::f32 ? (const char*)x.at<float>() : (const char*)x.at<uint16_t>();
    row_ = left_in_row_ = (x.cols * size + 63) / 64;
    skip_ = x.x.token * size - 64 * row_;
    left_ = c * row_;
    constexpr int kStep = kTileRows<kTileVectors> * kTileVectors * kLanes * kPair;
    while (left_ * kStep * 2 * (mask_ + kSteps) <= products && left_ > 0) mask_ = 2 * mask_ + kSteps;
  }

  // n floats in a row
  MIRAS_FN Prefetch(const float* x, index_t n) : at_((const char*)x), row_(int(n / 16)), left_in_row_(row_), left_(row_) {}

  MIRAS_FN void operator()(index_t k) {
    if ((k & mask_) || left_ <= 0) return;
    __builtin_prefetch(at_, kWrite);
    at_ += 64, --left_;
    if (--left_in_row_ == 0) at_ += skip_, left_in_row_ = row_;
  }

 private:
  const char* at_ = nullptr;
  index_t skip_ = 0;
  index_t mask_ = kSteps > 1 ? 0 : 1;  // one at every 2nd step, or at every call
  int row_ = 0, left_in_row_ = 0, left_ = 0;
};
using ReadSoon = Prefetch<false>;
using WriteSoon = Prefetch<true>;

// c values of a gate [B, T, H], padded with zeros
MIRAS_INLINE void read_gate(const TokenTensor& x, int64_t b, int64_t token, int64_t h, int c, float* dst) {
  const float* from = address<float>(x, b, token, h);
  for (int t = 0; t < c; ++t) dst[t] = from[t * x.token];
  for (int t = c; t < round_up(c, kPad); ++t) dst[t] = 0.0f;
}
MIRAS_INLINE void write_gate(const TokenTensor& x, int64_t b, int64_t token, int64_t h, int c, const float* src) {
  float* to = address<float>(x, b, token, h);
  for (int t = 0; t < c; ++t) to[t * x.token] = src[t];
}

// ---- states: [Dv, Dk] outside with any strides, transposed [Dk x Dvp] inside ----
static void read_state(const StateTensor& x, int64_t n, int64_t h, int first_row, int dv, int dk, float* dst, index_t ld) {
  const float* from = x.data + n * x.seq + h * x.head + first_row * x.row;
  if (x.col == 1) return transpose(from, x.row, dv, dk, dst, ld);
  if (x.row == 1) return copy_in(from, x.col, dk, dv, dst, ld);
  fill_zero(dst, dk * ld);
  for (int d = 0; d < dk; ++d)
    for (int v = 0; v < dv; ++v) dst[d * ld + v] = from[v * x.row + d * x.col];
}

// to contiguous rows; `spare` [dv x round_up(dk)] is overwritten
static void write_state(const StateTensor& x, int64_t n, int64_t h, int first_row, int dv, int dk, const float* src, index_t ld,
                        float* spare) {
  const int ld_spare = round_up(dk, kPad);
  transpose(src, ld, dk, dv, spare, ld_spare);
  copy_out(spare, ld_spare, dv, dk, x.data + n * x.seq + h * x.head + first_row * x.row, x.row);
}

}  // namespace miras::cpu::MIRAS_LEVEL
