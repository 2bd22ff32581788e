// Products of a few rows: bound by reading B, which is read once, where it lies, in whole rows.
#pragma once

#include "cpu/dot_rows.h"
#include "cpu/gemm_problem.h"

namespace fmk::FMK_ISA {

// All rows of one panel of C, for at most kDotRows rows and a transposed B.
template <class T>
FMK_NOINLINE void dot_block(const GemmProblem<T>& p, int64_t panel) {
  const PanelPlace at = PanelPlace::of(p, panel);
  alignas(64) Acc<T> z[kDotRows<T> * kPanelVecs * Vec<T>::W] = {};
  const auto columns_of = [&](const T* matrix, Acc<T>* to) FMK_LAMBDA {
    const DotPart<T> part[]{{p.a, p.lda, matrix + at.first * p.ldb, p.ldb, p.k}};
    dot_rows(part, p.m, at.valid, to, at.width);
  };
  if (p.paired) columns_of(p.b_first, z);
  columns_of(p.b, z + (at.width - at.part));
  p.epilogue.at_panel(at.column, at.valid).run_rows(z, at.width, p.m);
}

// sums[MR][ld] of `columns` columns of C from `column` on, for a B that is not transposed. A few
// rows of B are added at a time; runs of them have sums of their own, which keeps rounding errors
// from growing with the length of the reduction.
constexpr int64_t kMostSums = 2048;
template <class T, int MR>
FMK_NOINLINE void add_rows(const GemmProblem<T>& p, int64_t column, int64_t columns, Acc<T>* sums,
                           int64_t ld) {
  using V = Vec<T>;
  constexpr int kSteps = MR <= 2 ? 8 : 4;
  constexpr int64_t kRun = 256;
  alignas(64) Acc<T> run[kMostSums];
  const auto add = [&]<int kCount>(int64_t k) FMK_LAMBDA {
    V x[MR][kCount];
    FMK_FOR (i, MR)
      FMK_FOR (s, kCount) x[i][s] = splat(static_cast<Acc<T>>(widen(p.a[i * p.lda + k + s])));
    const T* b = p.b + k * p.ldb + column;
    for (int64_t c = 0; c < columns; c += V::W) {
      const int lanes = static_cast<int>(min_of<int64_t>(V::W, columns - c));
      V acc[MR];
      FMK_FOR (i, MR) acc[i] = load(run + i * ld + c);
      FMK_FOR (s, kCount) {
        const T* from = b + s * p.ldb + c;
        const V y = pin(lanes == V::W ? load(from) : load(from, lanes));
        FMK_FOR (i, MR) acc[i] = fma(x[i][s], y, acc[i]);
      }
      FMK_FOR (i, MR) store(run + i * ld + c, acc[i]);
    }
  };
  for (int64_t i = 0; i < MR * ld; ++i) sums[i] = 0;
  for (int64_t k0 = 0; k0 < p.k; k0 += kRun) {
    const int64_t end = min_of(p.k, k0 + kRun);
    for (int64_t i = 0; i < MR * ld; ++i) run[i] = 0;
    int64_t k = k0;
    for (; k + kSteps <= end; k += kSteps) add.template operator()<kSteps>(k);
    for (; k < end; ++k) add.template operator()<1>(k);
    for (int64_t i = 0; i < MR * ld; ++i) sums[i] += run[i];
  }
}

// Columns [column, column + columns) of C, at most kMostSums / kUnpackedRows of them.
template <class T>
FMK_NOINLINE void add_rows_block(const GemmProblem<T>& p, int64_t column, int64_t columns) {
  using V = Vec<T>;
  alignas(64) Acc<T> sums[kMostSums];
  const int64_t ld = ceil_div(columns, V::W) * V::W;
  switch (p.m) {
    case 1: add_rows<T, 1>(p, column, columns, sums, ld); break;
    case 2: add_rows<T, 2>(p, column, columns, sums, ld); break;
    case 3: add_rows<T, 3>(p, column, columns, sums, ld); break;
    case 4: add_rows<T, 4>(p, column, columns, sums, ld); break;
  }
  // An epilogue expects at most a panel.
  constexpr int64_t kWidth = kPanelVecs * V::W;
  for (int64_t c = 0; c < columns; c += kWidth)
    p.epilogue.at_panel(column + c, min_of(kWidth, columns - c)).run_rows(sums + c, ld, p.m);
}

// Whether few_rows_gemm takes the product.
template <class T>
FMK_INLINE bool has_few_rows(const GemmProblem<T>& p) {
  const int64_t most = p.b_transposed ? kDotRows<T> : kUnpackedRows;
  return p.m <= most && !p.packed_b && !p.a_reduction_major;
}
template <class T>
FMK_INLINE void few_rows_gemm(const GemmProblem<T>& p, int64_t threads, const Parallel& pool) {
  if (p.b_transposed) {
    const int64_t panels = p.split().count, shards = min_of(threads, panels);
    return parallel_for(pool, shards, [&](int64_t shard) {
      const int64_t end = panels * (shard + 1) / shards;
      for (int64_t panel = panels * shard / shards; panel < end; ++panel) dot_block(p, panel);
    });
  }
  constexpr int64_t kMostColumns = kMostSums / kUnpackedRows;
  const int64_t vecs = ceil_div(p.n, Vec<T>::W), shards = min_of(threads, vecs);
  parallel_for(pool, shards, [&](int64_t shard) {
    const int64_t end = min_of(p.n, vecs * (shard + 1) / shards * Vec<T>::W);
    int64_t column = vecs * shard / shards * Vec<T>::W;
    for (; column < end; column += kMostColumns)
      add_rows_block(p, column, min_of(kMostColumns, end - column));
  });
}

}  // namespace fmk::FMK_ISA
