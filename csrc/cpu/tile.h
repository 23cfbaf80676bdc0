// Small matrix products on register tiles: the micro-kernels under every memory.
//
//   Tile<R, N>     R rows by N vectors of accumulators; all operations on a result happen while it is in registers
//   sweep          visits a matrix, or ranges of its rows and columns, by tiles: sweep(rows, cols, [&]<int R, int N>(int i, int j) { ... })
//   sweep_lower    the same for a lower triangle (by rows, columns to the next multiple of kLanes)
//
// A product accumulates A(i, k) B(k, j) with A read one element at a time and broadcast, so that A may lie in memory by rows
// (`Rows`: A(i, k) = p[i ld + k]) or by columns (`Cols`: A(i, k) = p[k ld + i]) at the same cost; B is read in vectors, its
// rows are padded to kPad. With pairs (operand.h) an element of A or B is two numbers along k; k counts numbers, from an even one on.
#pragma once

#include <type_traits>

#include "vec.h"

namespace miras::cpu::MIRAS_LEVEL {

struct Rows {
  const float* p;
  index_t ld;
  MIRAS_FN Rows at(index_t i) const { return {p + i * ld, ld}; }

  // Iterates along k over R rows. Three or four share a pointer: one for each, as the compiler would make them, would not fit the general
  // registers, and loading them from vector registers takes the ports that multiply.
  template <int R> struct Walk {
    static constexpr int kShare = R % 3 == 0 ? 3 : 4, kPointers = (R + kShare - 1) / kShare;
    const float* p[kPointers];
    index_t ld;

    MIRAS_FN Walk(Rows a, index_t k) : ld(a.ld) {
      MIRAS_UNROLL
      for (int i = 0; i < kPointers; ++i) p[i] = a.p + kShare * i * ld + k;
    }
    MIRAS_FN float operator[](int r) const { return p[r / kShare][r % kShare * ld]; }
    MIRAS_FN void next() {
      MIRAS_UNROLL
      for (int i = 0; i < kPointers; ++i) asm("" : "+r"(++p[i]));
    }
  };
};

struct Cols {
  const float* p;
  index_t ld;
  MIRAS_FN Cols at(index_t i) const { return {p + i, ld}; }

  template <int R> struct Walk {
    const float* p;
    index_t ld;
    MIRAS_FN Walk(Cols a, index_t k) : p(a.p + k * a.ld), ld(a.ld) {}
    MIRAS_FN float operator[](int r) const { return p[r]; }
    MIRAS_FN void next() { asm("" : "+r"(p += ld)); }
  };
};

// What a product calls beside its multiplications at every kSteps-th element along k (a prefetch). With vectors of 8 lanes an element takes
// 6 cycles, in which a core that runs two threads decodes 18 instructions: too few for the 25 of the product and the 14 of a prefetch.
constexpr int kSteps = kLanes == 8 ? 4 : 1;

struct Nothing {
  MIRAS_FN void operator()(index_t) const {}
};

template <int R, int N> struct Tile {
  Vec acc[R][N];

  template <class Function> MIRAS_FN void each(Function&& f) {
    MIRAS_UNROLL
    for (int r = 0; r < R; ++r) {
      MIRAS_UNROLL
      for (int n = 0; n < N; ++n) f(r, n, acc[r][n]);
    }
  }

  MIRAS_FN Tile() {
    each([](int, int, Vec& x) MIRAS_LAMBDA { x = zeros(); });
  }

  // Prefetches the elements of x that belong to the result's, for what follows the product.
  MIRAS_FN static void prefetch(const float* x, index_t ld) {
    MIRAS_UNROLL
    for (int r = 0; r < R; ++r) {
      MIRAS_UNROLL
      for (int n = 0; n < N; n += (16 + kLanes - 1) / kLanes) __builtin_prefetch(x + r * ld + n * kLanes);
    }
  }

  // += sign * A[:, k0:k1] B[k0:k1, :]
  template <int kSign, class A, class Beside>
  MIRAS_FN void product(A a, const float* b, index_t ldb, index_t k0, index_t k1, Beside&& beside) {
    if constexpr (kPairs) k0 /= 2, k1 = (k1 + 1) / 2;
    b += k0 * ldb;
    typename A::template Walk<R> column(a, k0);
    const auto step = [&]() MIRAS_LAMBDA {
      Vec row[N];
      MIRAS_UNROLL
      for (int n = 0; n < N; ++n) row[n] = load(b + n * kLanes);
      MIRAS_UNROLL
      for (int r = 0; r < R; ++r) {
        const Vec x = broadcast_element(column[r]);
        MIRAS_UNROLL
        for (int n = 0; n < N; ++n) multiply_add<kSign>(acc[r][n], x, row[n]);
      }
      column.next();
      asm("" : "+r"(b += ldb));
    };
    constexpr int steps = std::is_same_v<std::decay_t<Beside>, Nothing> ? 1 : kSteps;
    index_t k = k0;
    for (; k1 - k >= steps; k += steps) {
      beside(k);
#ifndef __SANITIZE_ADDRESS__  // whose checks of four steps would take minutes to compile
      MIRAS_UNROLL
#endif
      for (int i = 0; i < steps; ++i) step();
    }
    if constexpr (steps > 1) {
      for (; k < k1; ++k) step();
    }
  }
  template <class A, class Beside = Nothing>
  MIRAS_FN void add(A a, const float* b, index_t ldb, index_t k0, index_t k1, Beside&& beside = {}) {
    product<1>(a, b, ldb, k0, k1, beside);
  }
  template <class A, class Beside = Nothing>
  MIRAS_FN void subtract(A a, const float* b, index_t ldb, index_t k0, index_t k1, Beside&& beside = {}) {
    if constexpr (!kPairs) return product<-1>(a, b, ldb, k0, k1, beside);
    negate();
    product<1>(a, b, ldb, k0, k1, beside);
    negate();
  }
  template <int kSign, class A> MIRAS_FN void accumulate(A a, const float* b, index_t ldb, index_t k0, index_t k1) {
    if constexpr (kSign > 0) add(a, b, ldb, k0, k1);
    else subtract(a, b, ldb, k0, k1);
  }
  MIRAS_FN void negate() {
    each([](int, int, Vec& x) MIRAS_LAMBDA { x = -x; });
  }

  // row r *= x[r]
  MIRAS_FN void scale_rows(const float* x) {
    each([&](int r, int, Vec& y) MIRAS_LAMBDA { y *= broadcast(x[r]), round_now(y); });
  }

  // *= x, element by element
  MIRAS_FN void multiply(const float* x, index_t ld) {
    each([&](int r, int n, Vec& y) MIRAS_LAMBDA { y *= load(x + r * ld + n * kLanes); });
  }

  // x *= this, element by element
  MIRAS_FN void multiply_into(float* x, index_t ld) {
    each([&](int r, int n, Vec& y) MIRAS_LAMBDA { store(x + r * ld + n * kLanes, load(x + r * ld + n * kLanes) * y); });
  }

  // column n *= x[n]
  MIRAS_FN void scale_cols(const float* x) {
    each([&](int, int n, Vec& y) MIRAS_LAMBDA { y *= load(x + n * kLanes), round_now(y); });
  }

  // sums[r] += <row r, x's row r>
  template <class T> MIRAS_FN void dot_rows(const T* x, index_t ld, float* sums) {
    MIRAS_UNROLL
    for (int r = 0; r < R; ++r) {
      Vec s = acc[r][0] * load(x + r * ld);
      MIRAS_UNROLL
      for (int n = 1; n < N; ++n) s += acc[r][n] * load(x + r * ld + n * kLanes);
      sums[r] += sum(s);
    }
  }

  // sums[n] += <column n, x's column n>
  MIRAS_FN void dot_cols(const float* x, index_t ld, float* sums) {
    MIRAS_UNROLL
    for (int n = 0; n < N; ++n) {
      Vec s = load(sums + n * kLanes);
      MIRAS_UNROLL
      for (int r = 0; r < R; ++r) s += acc[r][n] * load(x + r * ld + n * kLanes);
      store(sums + n * kLanes, s);
    }
  }

  // += x, -= x
  MIRAS_FN void add_matrix(const float* x, index_t ld) {
    each([&](int r, int n, Vec& y) MIRAS_LAMBDA { y += load(x + r * ld + n * kLanes); });
  }
  MIRAS_FN void subtract_matrix(const float* x, index_t ld) {
    each([&](int r, int n, Vec& y) MIRAS_LAMBDA { y -= load(x + r * ld + n * kLanes); });
  }

  // += scale * x; the scale is left in memory: in a register it would live through the products and displace a row of B
  MIRAS_FN void add_scaled(const float* x, index_t ld, const float* scale) {
    each([&](int r, int n, Vec& y) MIRAS_LAMBDA { y += load(x + r * ld + n * kLanes) * broadcast(*scale); });
  }
  // +=, -= x, row r times scale[r]
  MIRAS_FN void add_scaled_rows(const float* x, index_t ld, const float* scale) {
    each([&](int r, int n, Vec& y) MIRAS_LAMBDA { y += load(x + r * ld + n * kLanes) * broadcast(scale[r]); });
  }
  MIRAS_FN void subtract_scaled_rows(const float* x, index_t ld, const float* scale) {
    each([&](int r, int n, Vec& y) MIRAS_LAMBDA { y -= load(x + r * ld + n * kLanes) * broadcast(scale[r]); });
  }
  // +=, -= x, column n times scale[n]
  MIRAS_FN void add_scaled_cols(const float* x, index_t ld, const float* scale) {
    each([&](int r, int n, Vec& y) MIRAS_LAMBDA { y += load(x + r * ld + n * kLanes) * load(scale + n * kLanes); });
  }
  MIRAS_FN void subtract_scaled_cols(const float* x, index_t ld, const float* scale) {
    each([&](int r, int n, Vec& y) MIRAS_LAMBDA { y -= load(x + r * ld + n * kLanes) * load(scale + n * kLanes); });
  }
  template <class T> MIRAS_FN void store_to(T* x, index_t ld) {
    each([&](int r, int n, Vec& y) MIRAS_LAMBDA { store(x + r * ld + n * kLanes, y); });
  }
};

// Tile heights for N vectors of width: as many accumulators as the registers hold beside B's row.
template <int N> constexpr int kTileRows = kLanes == 16 ? (N == 4 ? 6 : N == 2 ? 8 : 16) : kLanes == 8 ? 6 : 4;
constexpr int kTileVectors = kLanes == 16 ? 4 : 2;

template <int N, class Function> MIRAS_INLINE void sweep_rows(Range rows, int j, Function& visit) {
  constexpr int R = kTileRows<N>;
  const int end = rows.last;
  int i = rows.first;
  while (end - i >= R && !(R == 6 && end - i == 8)) visit.template operator()<R, N>(i, j), i += R;
  if constexpr (R == 16) {
    if (end - i >= 8) visit.template operator()<8, N>(i, j), i += 8;
  }
  if constexpr (R != 4) {
    while (end - i >= 4) visit.template operator()<4, N>(i, j), i += 4;
  }
  while (i < end) visit.template operator()<1, N>(i, j), i += 1;
}

// Columns outside: a panel of B, N vectors wide, stays in the first-level cache while the rows pass by. A range of columns begins and
// ends at multiples of kPad.
template <int N = kTileVectors, class Function> MIRAS_INLINE void sweep(Range rows, Range cols, Function visit) {
  const int end = cols.last;
  int j = cols.first;
  for (; end - j >= N * kLanes; j += N * kLanes) sweep_rows<N>(rows, j, visit);
  if constexpr (N == 4) {
    if (end - j >= 2 * kLanes) sweep_rows<2>(rows, j, visit), j += 2 * kLanes;
  }
  if constexpr (N * kLanes > kPad) {
    if (end - j >= kLanes) sweep_rows<1>(rows, j, visit);
  }
}

// The lower triangle of a square matrix, by rows. Vectors right of the diagonal's are not visited.
template <class Function> MIRAS_INLINE void sweep_lower(Range rows, Function visit) {
  constexpr int R = kTileRows<2>, step = 2 * kLanes;
  const auto row_block = [&]<int r>(int i) MIRAS_LAMBDA {
    const int cols = round_up(i + r, kLanes);
    int j = 0;
    for (; cols - j >= step; j += step) visit.template operator()<r, 2>(i, j);
    if (j < cols) visit.template operator()<r, 1>(i, j);
  };
  const int end = rows.last;
  int i = rows.first;
  for (; end - i >= R; i += R) row_block.template operator()<R>(i);
  if constexpr (R != 4) {
    for (; end - i >= 4; i += 4) row_block.template operator()<4>(i);
  }
  for (; i < end; ++i) row_block.template operator()<1>(i);
}

}  // namespace miras::cpu::MIRAS_LEVEL
