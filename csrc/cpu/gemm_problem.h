// What a matrix product is, apart from how it is computed.
#pragma once

#include "core/parallel.h"
#include "cpu/epilogue.h"
#include "cpu/pack.h"

namespace fmk::FMK_ISA {

// C[m][n] = epilogue(A B). B is either packed beforehand (panels of PanelSplit::of(n), each
// [words_of(k)][width]) or a plain matrix that every thread packs panel by panel.
template <class T>
struct GemmProblem {
  int64_t m = 0, n = 0, k = 0;
  const T* a = nullptr;
  int64_t lda = 0;
  bool a_reduction_major = false;  // A[m][k] at a[k * lda + m] instead of a[m * lda + k]
  const Word<T>* packed_b = nullptr;
  const T* b = nullptr;
  int64_t ldb = 0;
  bool b_transposed =
      false;  // B[k][n] at b[n * ldb + k] (a weight matrix) instead of b[k * ldb + n]
  // Two products at once, for an epilogue with a step that combines them: with the transposed
  // matrices b_first and b, which share ldb. Panels are paired (PanelSplit), b_first before b, and
  // so is packed_b.
  bool paired = false;
  const T* b_first = nullptr;
  // For column 0; scale and shift of PanelSplit::padded_columns() elements. Of a paired product the
  // columns that count are those of one matrix, and column numbers those of the pair.
  Epilogue<T> epilogue;

  PanelSplit<Vec<T>> split() const {
    return paired ? PanelSplit<Vec<T>>::paired(n) : PanelSplit<Vec<T>>::of(n);
  }
};

// Below this much arithmetic (about 10 us of one core), on an operand of less than kSerialBytes, a
// fork gives little: it costs 1 to 2 us while the threads are awake, and many times that otherwise.
constexpr double kSerialFlops = 1e6;
constexpr int64_t kSerialBytes = 256 * 1024;

template <class T>
FMK_INLINE int64_t packed_words(int64_t n, int64_t k) {
  return PanelSplit<Vec<T>>::of(n).padded_columns() * words_of<T>(k);
}

// One panel of C: its columns in the padded product, and those of its (or each of its two)
// matrices.
struct PanelPlace {
  int vecs;
  int64_t column, width;       // with padding
  int64_t first, part, valid;  // of a matrix: first column, columns in the panel, without padding
  template <class T>
  FMK_INLINE PanelPlace of(const GemmProblem<T>& p, int64_t panel) {
    const auto split = p.split();
    const int vecs = split.width_vecs(panel);
    const int64_t column = split.column(panel), width = vecs * Vec<T>::W;
    const int64_t halves = p.paired ? 2 : 1, first = column / halves, part = width / halves;
    return {vecs, column, width, first, part, min_of<int64_t>(p.n - first, part)};
  }
};

// Words [word0, word1) of a panel of B, packed.
template <class T>
FMK_INLINE void pack_panel(const GemmProblem<T>& p, const PanelPlace& at, int64_t k0, int64_t k,
                           Word<T>* to) {
  if (p.paired)
    pack_columns_into_panel(p.b_first + at.first * p.ldb + k0, p.ldb, k, at.valid, at.part, to,
                            at.width);
  if (p.b_transposed)
    pack_columns_into_panel(p.b + at.first * p.ldb + k0, p.ldb, k, at.valid, at.part,
                            to + (at.width - at.part), at.width);
  else
    pack_rows_as_panel(p.b + k0 * p.ldb + at.first, p.ldb, k, at.valid, at.width, to);
}

}  // namespace fmk::FMK_ISA
