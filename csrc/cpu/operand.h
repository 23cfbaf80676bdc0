// Matrices in scratch as products read them (tile.h). In float32 a product reads the matrix itself, and everything here does nothing. At a
// level that multiplies in pairs (MIRAS_PAIRS) it reads copies that are rounded to bfloat16, two numbers along k in the place of a float:
//
//   along   k along the rows of x: A by rows                [rows x ld] bfloat16 numbers
//   down    k down the columns of x: B, or A by columns     [rows / 2 x ld] pairs: x(2 i, j) and x(2 i + 1, j)
//
// An odd last number is paired with zero. Ranges of rows begin at even ones.
#pragma once

#include "pack.h"

namespace miras::cpu::MIRAS_LEVEL {

MIRAS_INLINE Element* elements(float* x) { return reinterpret_cast<Element*>(x); }
MIRAS_INLINE index_t half(index_t rows) { return (rows + 1) / 2; }

// A by rows, from `along`
MIRAS_INLINE Rows by_rows(const Element* along, index_t ld) { return {reinterpret_cast<const float*>(along), ld / kPair}; }

// Columns of matrices with rows of so many floats: all, or a range of them
struct ColumnRange {
  index_t ld;
  Range range;
  MIRAS_FN ColumnRange(int ld) : ld(ld), range(ld) {}
  MIRAS_FN ColumnRange(int ld, Range range) : ld(ld), range(range) {}
};

// Pairs of rows of a matrix, float32 or rounded, to `down`, and if wanted the rows to `along`, an even number. Rows have at most as many
// numbers as a head.
template <class T> static void pair_rows(const T* x, Range rows, ColumnRange cols, float* down, Element* along = nullptr) {
  if constexpr (kPairs) {
    alignas(64) static constexpr T none[kMaxHead] = {};
    for (int i = rows.first; i < rows.last; i += 2) {
      const T* first = x + i * cols.ld;
      const T* second = i + 1 < rows.last ? first + cols.ld : none;
      float* to = down + i / 2 * cols.ld;
      for (int j = cols.range.first; j < cols.range.last; j += kLanes) {
        const auto both = side_by_side(first + j, second + j);
        store(to + j, pairs(both));
        if (along) store_sides(along + i * cols.ld + j, along + (i + 1) * cols.ld + j, both);
      }
    }
  }
}
// x as B, if need be in `space`
MIRAS_INLINE const float* packed_down(const float* x, Range rows, ColumnRange cols, float* space) {
  pair_rows(x, rows, cols, space);
  return kPairs ? space : x;
}

// A matrix and its copies. Without pairs the three are one; with them an operand has those that it was made with.
enum Forms { kFloat = 1, kAlong = 2, kDown = 4 };
struct Operand {
#ifdef MIRAS_PAIRS
  float* x;
  Element* along;
  float* down;
#else
  union {
    float *x, *along, *down;
  };
#endif

  Operand() = default;
  // Of a matrix, or of several, which share `down`
  MIRAS_FN Operand(Arena& a, int64_t rows, int64_t ld, int forms, int64_t matrices = 1) {
    if constexpr (kPairs) {
      x = forms & kFloat ? a.take(matrices * rows, ld) : nullptr;
      along = forms & kAlong ? elements(a.take(half(matrices * rows), ld)) : nullptr;
      down = forms & kDown ? a.take(half(rows), ld) : nullptr;
    } else {
      x = a.take(matrices * rows, ld);
    }
  }
  // The same copies of another matrix
  MIRAS_FN Operand of(float* matrix) const {
    Operand other = *this;
    other.x = matrix;
    return other;
  }
  // Matrix i of several, of n numbers each
  MIRAS_FN Operand matrix(index_t i, index_t n) const {
    Operand other = of(x ? x + i * n : nullptr);
    if constexpr (kPairs) other.along += i * n;
    return other;
  }
  MIRAS_FN operator float*() const { return x; }  // for everything but products

  MIRAS_FN void clear(int64_t rows, int64_t ld) const {
    if (x) fill_zero(x, rows * ld);
    if (kPairs && along) __builtin_memset(along, 0, size_t(rows * ld) * sizeof(Element));
  }

  MIRAS_FN void pack_along(Range rows, ColumnRange cols) const {
    if constexpr (kPairs) {
      for (int i = rows.first; i < rows.last; ++i)
        for (int j = cols.range.first; j < cols.range.last; j += kLanes) store(along + i * cols.ld + j, load(x + i * cols.ld + j));
    }
  }
  MIRAS_FN void pack_down(Range rows, ColumnRange cols) const { pair_rows(x, rows, cols, down); }
  MIRAS_FN void pack(Range rows, ColumnRange cols) const {
    if (down) pair_rows(x, rows, cols, down, along);
    else pack_along(rows, cols);
  }
  // `down` from `along`
  MIRAS_FN void pair_along(Range rows, ColumnRange cols) const { pair_rows(along, rows, cols, down); }
};

// dst = the transpose of columns of x, for products that sum over them: [cols x ld_dst], or, from x.along, [cols / 2 x ld_dst] pairs
static void transpose_operand(const Operand& x, Range rows, Range cols, index_t ld, float* dst, index_t ld_dst) {
  const float* from = by_rows(x.along + cols.first, ld).at(rows.first).p;
  transpose(from, ld / kPair, rows.count(), kPairs ? int(half(cols.count())) : cols.count(), dst + cols.first / kPair * ld_dst + rows.first,
            ld_dst);
}

// Of a chunk's keys [c x Dk]: the transpose [Dk x Cp] and, with pairs, `along` and `down`
static void read_keys(const ChunkView& k, Range tokens, const Operand& K, int dkp, float* KT, index_t cp) {
  if constexpr (!kPairs) return k.from(tokens.first).transpose_in(tokens.count(), KT + tokens.first, cp);
  k.from(tokens.first).read(tokens.count(), K.along + index_t(tokens.first) * dkp, dkp);
  K.pair_along(tokens, dkp);
  transpose_operand(K, tokens, k.cols, dkp, KT, cp);
}
// K' as A: sums over tokens
MIRAS_INLINE auto over_tokens(const Operand& K, int dkp, const float* KT, index_t cp) {
  if constexpr (kPairs) return Cols{K.down, dkp};
  else return Rows{KT, cp};
}

}  // namespace miras::cpu::MIRAS_LEVEL
