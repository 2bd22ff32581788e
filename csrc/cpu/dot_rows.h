// Products of a few rows with a matrix whose rows are reduced where they lie: dot products.
#pragma once

#include <cstring>
#include <type_traits>

#include "cpu/pack.h"

namespace fmk::FMK_ISA {

// Products of at most so many rows read each number of B once: packing would double the traffic.
constexpr int64_t kUnpackedRows = 4;
// Up to so many rows are quicker without packing what is not packed already: a tile's rows of B
// stay in L1 for all rows of A. Narrow types are widened by every load, which costs more than
// packing does; smaller register files hold tiles that load too much for their multiply-adds.
#if defined(__AVX512F__)
template <class T>
constexpr int64_t kDotRows = std::is_same_v<T, Acc<T>> ? 16 : kUnpackedRows;
#else
template <class T>
constexpr int64_t kDotRows = kUnpackedRows;
#endif

// Rows of A and of a transposed B, k elements each.
template <class T>
struct DotPart {
  const T* a;
  int64_t lda;
  const T* b;
  int64_t ldb;
  int64_t k;

  DotPart at(int64_t row, int64_t column) const {
    return {a + row * lda, lda, b + column * ldb, ldb, k};
  }
};

// z[i][j] = the sum over the parts of a[i] . b[j].
template <class T, int MR, int kColumns, int kParts>
FMK_NOINLINE void dot_tile(const DotPart<T> (&parts)[kParts], int64_t row, int64_t column,
                           Acc<T>* z, int64_t ld_z) {
  using V = Vec<T>;
  V acc[MR * kColumns];
  FMK_FOR (i, MR * kColumns) acc[i] = zero<V>();
  for (const auto& whole : parts) {
    const DotPart<T> part = whole.at(row, column);
    const auto step = [&](int64_t at, int lanes) FMK_LAMBDA {
      V x[MR];
      FMK_FOR (i, MR) x[i] = pin(load_lanes(part.a + i * part.lda + at, lanes));
      FMK_FOR (j, kColumns) {
        const V y = pin(load_lanes(part.b + j * part.ldb + at, lanes));
        FMK_FOR (i, MR) acc[i * kColumns + j] = fma(x[i], y, acc[i * kColumns + j]);
      }
    };
    int64_t at = 0;
    for (; at + V::W <= part.k; at += V::W) step(at, V::W);
    if (at < part.k) step(at, static_cast<int>(part.k - at));
  }
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, VecF> && MR * kColumns > 4 && MR * kColumns <= 16) {
    V all[16];
    FMK_FOR (i, 16) all[i] = i < MR * kColumns ? acc[i] : zero<V>();
    alignas(64) float sums[16];
    store(sums, reduce_add(all));
    FMK_FOR (i, MR) std::memcpy(z + i * ld_z, sums + i * kColumns, kColumns * sizeof(float));
    return;
  }
#endif
  FMK_FOR (i, MR)
    FMK_FOR (j, kColumns) z[i * ld_z + j] = reduce_add(acc[i * kColumns + j]);
}

// A few of the rows (at most four) with columns [column, column + kColumns).
template <int kColumns, class T, int kParts>
FMK_INLINE void dot_tiles(const DotPart<T> (&parts)[kParts], int64_t rows, int64_t column,
                          Acc<T>* z, int64_t ld_z) {
  // Even groups: a tile of one row would wait for its own sums.
  const int64_t groups = ceil_div(rows, int64_t{4});
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t row = rows * group / groups, count = rows * (group + 1) / groups - row;
    Acc<T>* to = z + row * ld_z + column;
    switch (count) {
      case 1: dot_tile<T, 1, kColumns>(parts, row, column, to, ld_z); break;
      case 2: dot_tile<T, 2, kColumns>(parts, row, column, to, ld_z); break;
      case 3: dot_tile<T, 3, kColumns>(parts, row, column, to, ld_z); break;
      case 4: dot_tile<T, 4, kColumns>(parts, row, column, to, ld_z); break;
    }
  }
}

// z[rows][columns] for up to kDotRows rows.
template <class T, int kParts>
FMK_NOINLINE void dot_rows(const DotPart<T> (&parts)[kParts], int64_t rows, int64_t columns,
                           Acc<T>* z, int64_t ld_z) {
#if defined(__AVX512F__)
  constexpr int kFew = 4, kMany = 8;
#else
  constexpr int kFew = 2, kMany = 4;
#endif
  int64_t column = 0;
  if (rows <= 2)
    for (; column + kMany <= columns; column += kMany) {
      if (rows == 1)
        dot_tile<T, 1, kMany>(parts, 0, column, z + column, ld_z);
      else
        dot_tile<T, 2, kMany>(parts, 0, column, z + column, ld_z);
    }
  for (; column + kFew <= columns; column += kFew) dot_tiles<kFew>(parts, rows, column, z, ld_z);
  for (; column < columns; ++column) dot_tiles<1>(parts, rows, column, z, ld_z);
}

}  // namespace fmk::FMK_ISA
