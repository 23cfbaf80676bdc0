// Products of a matrix with one or two vectors, each element of the matrix read once: most of a step's time.
//
// A matrix [rows x cols] has rows without padding. Scratch rows have it, zero.
#pragma once

#include "chunk.h"

namespace miras::cpu::MIRAS_LEVEL {

// A part of every row of a matrix: kVectors whole vectors from column `first` on, or the last `left` columns in one vector.
template <int N, bool kWhole> struct Columns {
  static constexpr int kVectors = N;
  int first, left;

  MIRAS_FN Vec load(const float* row, int n) const {
    if constexpr (kWhole) return MIRAS_LEVEL::load(row + first + n * kLanes);
    else return load_first(row + first, left);
  }
  MIRAS_FN void store(float* row, int n, Vec x) const {
    if constexpr (kWhole) MIRAS_LEVEL::store(row + first + n * kLanes, x);
    else store_first(row + first, x, left);
  }
  MIRAS_FN void prefetch(const float* row) const {
    MIRAS_UNROLL
    for (int n = 0; n < N; ++n) __builtin_prefetch(row + first + n * kLanes);
  }
  // Rows of scratch are padded.
  MIRAS_FN Vec padded(const float* row, int n) const { return MIRAS_LEVEL::load(row + first + n * kLanes); }
  MIRAS_FN void pad(float* row, int n, Vec x) const { MIRAS_LEVEL::store(row + first + n * kLanes, x); }
};

// f(columns) for parts that cover V columns; vectors along a row should stay in registers meanwhile
template <class Function> MIRAS_FN void each_columns(int V, Function&& f) {
  constexpr int kWide = kLanes == 16 ? 8 : 4;
  int j = 0;
  for (; V - j >= kWide * kLanes; j += kWide * kLanes) f(Columns<kWide, true>{j, 0});
  for (; V - j >= kWide / 2 * kLanes; j += kWide / 2 * kLanes) f(Columns<kWide / 2, true>{j, 0});
  for (; V - j >= kLanes; j += kLanes) f(Columns<1, true>{j, 0});
  if (j < V) f(Columns<1, false>{j, V - j});
}

// The part of a row of scratch for some columns, to stay in registers
template <class C> struct Held {
  Vec x[C::kVectors];
  MIRAS_FN Held(const C& c, const float* row) {
    MIRAS_UNROLL
    for (int n = 0; n < C::kVectors; ++n) x[n] = c.padded(row, n);
  }
  MIRAS_FN Vec operator[](int n) const { return x[n]; }
};

// Rows, as long as its own, that are prefetched while a product runs
struct Soon {
  const float* first = nullptr;
  int rows = 0;
};

// y = M' x and, if kTwo, y2 = M' x2, of M [rows x cols]
template <bool kTwo>
static void products(const float* M, int rows, int cols, const float* x, float* y, const float* x2 = nullptr, float* y2 = nullptr,
                     Soon soon = {}) {
  each_columns(cols, [&]<class C>(const C& c) MIRAS_LAMBDA {
    constexpr int N = C::kVectors;
    Vec sum[N] = {}, sum2[N] = {};
    const auto run = [&]<bool kSoon>(int from, int to) MIRAS_LAMBDA {
      for (int d = from; d < to; ++d) {
        if constexpr (kSoon) c.prefetch(soon.first + index_t(d) * cols);
        const float* row = M + index_t(d) * cols;
        const Vec xd = broadcast(x[d]), x2d = kTwo ? broadcast(x2[d]) : zeros();
        MIRAS_UNROLL
        for (int n = 0; n < N; ++n) {
          const Vec w = c.load(row, n);
          sum[n] += xd * w;
          if constexpr (kTwo) sum2[n] += x2d * w;
        }
      }
    };
    const int together = minimum(rows, soon.rows);
    run.template operator()<true>(0, together);
    run.template operator()<false>(together, rows);
    MIRAS_UNROLL
    for (int n = 0; n < N; ++n) {
      c.pad(y, n, sum[n]);
      if constexpr (kTwo) c.pad(y2, n, sum2[n]);
    }
  });
}

// Four vectors' sums over every fourth lane: in lane 4 i + j that of x_j, of what it has in lanes 4 i to 4 i + 3
MIRAS_INLINE Vec quad_sums(const Vec (&x)[4]) {
  const Vec first = zip_low(x[0], x[1]) + zip_high(x[0], x[1]), second = zip_low(x[2], x[3]) + zip_high(x[2], x[3]);
  return join_low(first, second) + join_high(first, second);
}

// kLanes / 4 vectors of such sums to those of all lanes: in lane 4 i + j the sum over i' of x_i's lanes 4 i' + j
MIRAS_INLINE Vec block_sums(const Vec (&x)[kLanes / 4]) {
#if MIRAS_LANES == 16
  const Vec a = MIRAS_SHUFFLE(x[0], x[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                MIRAS_SHUFFLE(x[0], x[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  const Vec b = MIRAS_SHUFFLE(x[2], x[3], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                MIRAS_SHUFFLE(x[2], x[3], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  return MIRAS_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         MIRAS_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
#elif MIRAS_LANES == 8
  return MIRAS_SHUFFLE(x[0], x[1], 0, 1, 2, 3, 8, 9, 10, 11) + MIRAS_SHUFFLE(x[0], x[1], 4, 5, 6, 7, 12, 13, 14, 15);
#else
  return x[0];
#endif
}

// An element for each of the first `rows` <= kLanes rows of M and zeros after them: M x and, if kTwo, M x2. As many rows from `soon`
// on are prefetched, if it is given; the hardware prefetches those of M itself.
struct RowProducts {
  Vec x, x2;
};
template <bool kTwo>
static RowProducts row_products(const float* M, int rows, int cols, const float* x, const float* x2 = nullptr,
                                const float* soon = nullptr) {
  RowProducts y{zeros(), zeros()};
  each_columns(cols, [&]<class C>(const C c) MIRAS_LAMBDA {
    const Held<C> held(c, x), held2(c, kTwo ? x2 : x);
    Vec four[kLanes / 4] = {}, four2[kLanes / 4] = {};
    const float* row = M;
    for (int i = 0; i < rows; i += 4) {
      Vec sum[4] = {}, sum2[4] = {};
      MIRAS_UNROLL
      for (int j = 0; j < 4; ++j) {
        if (soon) c.prefetch(soon + index_t(i + j) * cols);
        MIRAS_UNROLL
        for (int n = 0; n < C::kVectors; ++n) {
          const Vec w = c.load(row, n);
          sum[j] += w * held[n];
          if constexpr (kTwo) sum2[j] += w * held2[n];
        }
        if (i + j + 1 < rows) row += cols;  // else the last row once more
      }
      four[i / 4] = quad_sums(sum);
      if constexpr (kTwo) four2[i / 4] = quad_sums(sum2);
    }
    y.x += block_sums(four);
    if constexpr (kTwo) y.x2 += block_sums(four2);
  });
  return {first_lanes(y.x, rows), first_lanes(y.x2, rows)};
}

}  // namespace miras::cpu::MIRAS_LEVEL
