// Operand layouts of the micro-kernel (gemm.h) and the copies that produce them.
//
// A `Mac` says what one multiply-accumulate lane consumes: a Word holds Mac::kPair numbers that are
// adjacent along the reduction (1 for float and double, 2 for bf16 on machines with vdpbf16ps), so
// one loop over words serves every type.
//
// B is stored in panels: word[reduction][width], width a multiple of the vector length, padded with
// zeros. An operand of N columns is cut into panels of equal width as far as possible (PanelSplit),
// one after the other in memory.
#pragma once

#include <cstddef>

#include "core/scratch.h"
#include "cpu/simd.h"

namespace fmk::FMK_ISA {

struct MacF32 {
  using Word = float;
  using V = VecF;
  static constexpr int kPair = 1;
  FMK_INLINE V mac(V acc, V a, V b) { return fma(a, b, acc); }
  FMK_INLINE V load_words(const Word* p) { return load(p); }
  FMK_INLINE V splat_word(const Word* p) { return splat(*p); }
};
struct MacF64 {
  using Word = double;
  using V = VecD;
  static constexpr int kPair = 1;
  FMK_INLINE V mac(V acc, V a, V b) { return fma(a, b, acc); }
  FMK_INLINE V load_words(const Word* p) { return load(p); }
  FMK_INLINE V splat_word(const Word* p) { return splat(*p); }
};
// Two bf16 numbers per word. Words are read with memcpy semantics: rows of bf16 need not be aligned
// to 4 bytes.
struct Bf16Pair {
  bf16 low, high;
};
#if FMK_BF16_DOT
struct MacBf16 {
  using Word = Bf16Pair;
  using V = VecF;
  static constexpr int kPair = 2;
  FMK_INLINE V mac(V acc, V a, V b) { return dot2(acc, a, b); }
  FMK_INLINE V load_words(const Word* p) { return {_mm512_loadu_ps(p)}; }
  FMK_INLINE V splat_word(const Word* p) {
    int32_t bits;
    std::memcpy(&bits, p, 4);
    return {_mm512_castsi512_ps(_mm512_set1_epi32(bits))};
  }
};
#endif

// The Mac in which a storage type is computed. Types without one of their own are widened to float
// when packed.
template <class T>
struct MacOf {
  using Type = MacF32;
};
template <>
struct MacOf<double> {
  using Type = MacF64;
};
#if FMK_BF16_DOT
template <>
struct MacOf<bf16> {
  using Type = MacBf16;
};
#endif
template <class T>
using Mac = typename MacOf<T>::Type;
template <class T>
using Word = typename Mac<T>::Word;

// Whether memory holding T can be read as words without a copy (given an even reduction length for
// pairs).
template <class T>
constexpr bool kWordsInPlace = sizeof(Word<T>) == sizeof(T) * Mac<T>::kPair;

template <class T>
FMK_INLINE int64_t words_of(int64_t k) {
  return ceil_div(k, Mac<T>::kPair);
}

#if defined(__AVX512F__)
constexpr int kPanelVecs = 4;  // 6 x 4 accumulators: 4 loads and 6 broadcasts for 24 FMAs
constexpr int kTileRows[5] = {0, 14, 12, 8, 6};
#else
constexpr int kPanelVecs = 2;  // sixteen registers: 6 x 2 accumulators
constexpr int kTileRows[5] = {0, 8, 6, 4, 2};
#endif

// Cuts `count` things into `parts` parts as equal as possible, the larger ones first. Divides once:
// inner loops ask for parts, and a 64-bit division takes up to 90 cycles.
struct EvenSplit {
  int64_t each, larger;  // size of the smaller parts, number of parts with one more
  FMK_INLINE EvenSplit of(int64_t count, int64_t parts) {
    if (parts == 0) return {0, 0};
    // Almost always within 32 bits, where the division is three times as fast.
    if ((count | parts) >> 32 == 0) {
      const auto n = static_cast<uint32_t>(count), by = static_cast<uint32_t>(parts);
      return {n / by, n % by};
    }
    return {count / parts, count % parts};
  }
  int64_t begin(int64_t part) const { return part * each + (part < larger ? part : larger); }
  int64_t size(int64_t part) const { return each + (part < larger ? 1 : 0); }
};

// Cuts n columns into `count` panels of at most kPanelVecs vectors, their widths as equal as
// possible. Paired: two matrices of n columns side by side, each panel holding as many vectors of
// the one as, after them, of the other.
template <class V>
struct PanelSplit {
  int64_t vecs, count;
  int64_t unit;  // vectors that a panel may not part
  EvenSplit split;
  FMK_INLINE PanelSplit of(int64_t n) { return of_units(ceil_div(n, V::W), 1); }
  FMK_INLINE PanelSplit paired(int64_t n) { return of_units(ceil_div(n, V::W), 2); }
  FMK_INLINE PanelSplit of_units(int64_t units, int64_t unit) {
    const int64_t count = ceil_div(units * unit, kPanelVecs);
    return {units * unit, count, unit, EvenSplit::of(units, count)};
  }
  int64_t first_vec(int64_t panel) const { return split.begin(panel) * unit; }
  int64_t column(int64_t panel) const { return first_vec(panel) * V::W; }
  int width_vecs(int64_t panel) const { return static_cast<int>(split.size(panel) * unit); }
  int64_t padded_columns() const { return vecs * V::W; }
};

// A word from up to two numbers; the second is zero past the end of the reduction.
FMK_INLINE void make_word(float* word, float x, float) { *word = x; }
FMK_INLINE void make_word(double* word, double x, double) { *word = x; }
FMK_INLINE void make_word(Bf16Pair* word, float x, float y) { *word = {to_bf16(x), to_bf16(y)}; }

// dst[kw][width] from k rows of numbers, row_at(k) being the first of `columns`; the rest of the
// width is zero.
template <class T, class RowAt>
FMK_INLINE void pack_rows_at(const RowAt& row_at, int64_t k, int64_t columns, int64_t width,
                             Word<T>* dst) {
  if constexpr (Mac<T>::kPair == 1) {
    // Rows may be pages apart, where no prefetcher follows.
    constexpr int64_t kAhead = 8, kLine = 64 / sizeof(T);
    for (int64_t row = 0; row < k; ++row, dst += width) {
      const T* later = row_at(min_of(row + kAhead, k - 1));
      for (int64_t column = 0; column < columns; column += kLine)
        __builtin_prefetch(later + column);
      convert(row_at(row), dst, columns);
      for (int64_t column = columns; column < width; ++column) dst[column] = 0;
    }
  } else {
    const T nothing{};
    for (int64_t row = 0; row < k; row += 2, dst += width) {
      const bool both = row + 1 < k;
      const T* first = row_at(row);
      const T* second = both ? row_at(row + 1) : first;
      int64_t column = 0;
#if FMK_BF16_DOT
      for (; column + 16 <= columns; column += 16) {
        const __m256i zeros = _mm256_setzero_si256();
        const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first + column));
        const __m256i high =
            both ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second + column)) : zeros;
        const __m512i pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                                              _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
        _mm512_storeu_si512(dst + column, pairs);
      }
#endif
      for (; column < columns; ++column)
        dst[column] = {first[column], both ? second[column] : nothing};
      for (; column < width; ++column) dst[column] = {nothing, nothing};
    }
  }
}

// The same for the rows of a matrix, `ld` apart, and for rows that lie anywhere.
template <class T>
FMK_NOINLINE void pack_rows_as_panel(const T* src, int64_t ld, int64_t k, int64_t columns,
                                     int64_t width, Word<T>* dst) {
  pack_rows_at<T>([&](int64_t row) FMK_LAMBDA { return src + row * ld; }, k, columns, width, dst);
}
template <class T>
FMK_NOINLINE void pack_row_pointers_as_panel(const T* const* rows, int64_t first_column, int64_t k,
                                             int64_t columns, int64_t width, Word<T>* dst) {
  pack_rows_at<T>([&](int64_t row) FMK_LAMBDA { return rows[row] + first_column; }, k, columns,
                  width, dst);
}

#if defined(__AVX512F__)
// dst[c][r] = src[r][c] for a 16 x 16 block of 32-bit words. Loading quarters of rows r, r+4, r+8,
// r+12 into one register does half of the transposition, two rounds of shuffles within 128-bit
// lanes the rest.
FMK_INLINE void transpose_16x16(const float* src, int64_t ld, float* dst, int64_t ld_dst) {
  FMK_FOR (quarter, 4) {
    __m512 row[4];
    FMK_FOR (i, 4) {
      const float* p = src + i * ld + 4 * quarter;
      __m512 x = _mm512_castps128_ps512(_mm_loadu_ps(p));
      x = _mm512_insertf32x4(x, _mm_loadu_ps(p + 4 * ld), 1);
      x = _mm512_insertf32x4(x, _mm_loadu_ps(p + 8 * ld), 2);
      row[i] = _mm512_insertf32x4(x, _mm_loadu_ps(p + 12 * ld), 3);
    }
    // Lane q of row[i] holds elements 4*quarter .. +3 of source row i + 4*q.
    const __m512 a = _mm512_unpacklo_ps(row[0], row[1]), b = _mm512_unpackhi_ps(row[0], row[1]);
    const __m512 c = _mm512_unpacklo_ps(row[2], row[3]), d = _mm512_unpackhi_ps(row[2], row[3]);
    float* out = dst + 4 * quarter * ld_dst;
    _mm512_storeu_ps(out, _mm512_shuffle_ps(a, c, 0x44));
    _mm512_storeu_ps(out + ld_dst, _mm512_shuffle_ps(a, c, 0xee));
    _mm512_storeu_ps(out + 2 * ld_dst, _mm512_shuffle_ps(b, d, 0x44));
    _mm512_storeu_ps(out + 3 * ld_dst, _mm512_shuffle_ps(b, d, 0xee));
  }
}
#endif

// dst[kw][width] from src[n][k] (rows `ld` apart, one per column of the panel): the transposing
// pack of a weight matrix. Rows of dst are ld_dst words apart: more than `width` where several
// matrices share a panel.
template <class T>
FMK_NOINLINE void pack_columns_into_panel(const T* src, int64_t ld, int64_t k, int64_t columns,
                                          int64_t width, Word<T>* dst, int64_t ld_dst) {
  constexpr int kPair = Mac<T>::kPair;
  const int64_t words = words_of<T>(k);
  int64_t done_columns = 0;
#if defined(__AVX512F__)
  if constexpr (kWordsInPlace<T> && sizeof(Word<T>) == 4) {
    const int64_t whole_words = k / kPair;
    for (; done_columns + 16 <= columns; done_columns += 16) {
      const T* block = src + done_columns * ld;
      int64_t word = 0;
      // Rows are ld numbers apart, which is ld / kPair words only when ld is even; else the loop
      // below does it all.
      if (ld % kPair == 0) {
        for (; word + 16 <= whole_words; word += 16)
          transpose_16x16(reinterpret_cast<const float*>(block + word * kPair), ld / kPair,
                          reinterpret_cast<float*>(dst + word * ld_dst + done_columns), ld_dst);
      }
      for (; word < words; ++word)
        for (int column = 0; column < 16; ++column) {
          const T* p = block + column * ld + word * kPair;
          Word<T>& to = dst[word * ld_dst + done_columns + column];
          if constexpr (kPair == 2)
            to = {p[0], word < whole_words ? p[1] : T{}};
          else
            to = *p;
        }
    }
  }
#endif
  // Blocks of words keep the strided stores within a few cache lines per column.
  constexpr int64_t kBlock = 16;
  for (int64_t first = 0; first < words; first += kBlock) {
    const int64_t last = min_of(words, first + kBlock);
    for (int64_t column = done_columns; column < width; ++column) {
      const T* p = src + column * ld;
      for (int64_t word = first; word < last; ++word) {
        const int64_t i = word * kPair;
        if (column >= columns)
          make_word(dst + word * ld_dst + column, 0, 0);
        else
          make_word(dst + word * ld_dst + column, widen(p[i]),
                    kPair == 2 && i + 1 < k ? widen(p[i + 1]) : 0);
      }
    }
  }
}

template <class T>
FMK_INLINE void pack_columns_as_panel(const T* src, int64_t ld, int64_t k, int64_t columns,
                                      int64_t width, Word<T>* dst) {
  pack_columns_into_panel(src, ld, k, columns, width, dst, width);
}

// Rows of A as words: dst[row][words_of(k)] from src[row][k], for types or lengths that cannot be
// read in place.
template <class T>
FMK_NOINLINE void pack_rows(const T* src, int64_t ld, int64_t rows, int64_t k, Word<T>* dst) {
  const int64_t words = words_of<T>(k);
  for (int64_t row = 0; row < rows; ++row, src += ld, dst += words) {
    if constexpr (Mac<T>::kPair == 1) {
      convert(src, dst, k);
    } else {
      std::memcpy(static_cast<void*>(dst), src, k * sizeof(T));
      if (k % 2) dst[words - 1].high = T{};
    }
  }
}

}  // namespace fmk::FMK_ISA
