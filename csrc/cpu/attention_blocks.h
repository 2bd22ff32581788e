// What the passes of attention share: how operands become words of the micro-kernel, and products
// of a block.
//
// Scores are kept transposed, a row per key and a lane per query: the queries of a block are packed
// once as a panel, keys are broadcast from where they lie, softmax needs no sums across lanes, and
// P^T is the reduction-major operand of P V, whose panel are the rows of V.
#pragma once

#include "cpu/attention_queries.h"

namespace fmk::FMK_ISA {
namespace {

// Rows of the tiles whose height is free: six fill the registers beside the widest panel.
constexpr int kRowsPerTile = 6;

// Whether a panel of that many words and columns stays in L1 while other operands stream past it.
template <class O>
FMK_INLINE bool stays_in_l1(int64_t words, int64_t columns) {
  constexpr int64_t kHalfOfL1 = 16 << 10;
  return words * columns * static_cast<int64_t>(sizeof(Word<O>)) <= kHalfOfL1;
}

// Hands out pieces of one scratch buffer. Built twice: without memory to learn the size, then with
// it.
struct Carver {
  char* base = nullptr;
  size_t used = 0;
  template <class E>
  E* take(int64_t count) {
    E* piece = base ? reinterpret_cast<E*>(base + used) : nullptr;
    used += (static_cast<size_t>(count) * sizeof(E) + 63) / 64 * 64;
    return piece;
  }
};

template <class T>
FMK_INLINE const T* row_of(const AttentionOperand& x, int64_t batch, int64_t head, int64_t row) {
  return static_cast<const T*>(x.data) + batch * x.batch + head * x.head + row * x.row;
}
template <class T>
FMK_INLINE T* row_of(const AttentionResult& x, int64_t batch, int64_t head, int64_t row) {
  return static_cast<T*>(x.data) + batch * x.batch + head * x.head + row * x.row;
}

// --- operands as words ---

// Rows that are broadcast, word by word (A of the micro-kernel).
struct WordRows {
  const char* first;
  int64_t row_bytes;
};

template <class T>
FMK_INLINE bool rows_need_copy(int64_t width) {
  return !kWordsInPlace<T> || width % Mac<T>::kPair != 0;
}
// All rows of one head; `copy` has room for [rows][words_of(width)] if rows_need_copy.
template <class T>
FMK_INLINE WordRows head_as_words(const AttentionOperand& x, int64_t batch, int64_t head,
                                  int64_t rows, int64_t width, Word<T>* copy) {
  const T* first = row_of<T>(x, batch, head, 0);
  if (!rows_need_copy<T>(width))
    return {reinterpret_cast<const char*>(first), x.row * static_cast<int64_t>(sizeof(T))};
  pack_rows(first, x.row, rows, width, copy);
  return {reinterpret_cast<const char*>(copy),
          words_of<T>(width) * static_cast<int64_t>(sizeof(Word<T>))};
}

// Rows that are a panel, reduced over (B of the micro-kernel).
template <class T>
struct PanelRows {
  const Word<T>* first;
  int64_t ld;  // words from one step of the reduction to the next
};

template <class T>
FMK_INLINE bool panel_needs_copy(int64_t row_stride, int64_t width) {
  // Dense rows only: rows apart by a multiple of 4 KB fall on the same cache sets.
  return !kWordsInPlace<T> || Mac<T>::kPair != 1 || width % Vec<T>::W != 0 || row_stride != width;
}
// `copy` has room for [words_of(rows)][whole_vectors(width)] if panel_needs_copy.
template <class T>
FMK_INLINE PanelRows<T> head_as_panel(const AttentionOperand& x, int64_t batch, int64_t head,
                                      int64_t rows, int64_t width, Word<T>* copy) {
  const T* first = row_of<T>(x, batch, head, 0);
  if (!panel_needs_copy<T>(x.row, width)) return {reinterpret_cast<const Word<T>*>(first), width};
  const int64_t padded = whole_vectors<Vec<T>>(width);
  pack_rows_as_panel(first, x.row, rows, width, padded, copy);
  return {copy, padded};
}

// The rows of a block, side by side as operands: in place if possible, else in `copy`,
// [lanes][width].
template <class T>
struct BlockRows {
  const Operand<T>* first;
  int64_t ld;
};
template <class T>
FMK_INLINE BlockRows<T> block_rows(const AttentionOperand& x, const QueryBlock& block,
                                   int64_t width, Operand<T>* copy) {
  if constexpr (std::is_same_v<T, Operand<T>>) {
    if (block.one_head) return {row_of<T>(x, block.batch, block.head, block.position), x.row};
  }
  for (int row = 0; row < block.rows; ++row) {
    const T* from = row_of<T>(x, block.batch, block.head_of(row), block.position_of(row));
    if constexpr (std::is_same_v<T, Operand<T>>)
      std::memcpy(static_cast<void*>(copy + row * width), from, width * sizeof(T));
    else
      convert(from, copy + row * width, width);
  }
  return {copy, width};
}

// A row of `out` from accumulators, times `factor`.
template <class T>
FMK_INLINE void store_row(const Acc<T>* from, Acc<T> factor, int64_t width, T* out) {
  using V = Vec<T>;
  for (int64_t column = 0; column < width; column += V::W) {
    const V x = load(from + column) * splat(factor);
    const int64_t left = width - column;
    if (left >= V::W)
      store(out + column, x);
    else
      store(out + column, x, static_cast<int>(left));
  }
}

// --- probabilities ---

// The compute type's p as words: one number, or a pair of neighbours along the keys.
FMK_INLINE void store_words(float* to, VecF p, VecF) { store(to, p); }
FMK_INLINE void store_words(double* to, VecD p, VecD) { store(to, p); }
#if FMK_BF16_DOT
FMK_INLINE void store_words(Bf16Pair* to, VecF low, VecF high) {
  const __m512i interleave =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                       21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i halves = narrow_bf16(high, low);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(interleave, halves));
}
#endif

// How many keys of the next block to take: as equal blocks as possible, of at most `limit`, which
// is a multiple of 24 (of every tile's height but the narrowest's, and of the pairs of a word).
FMK_INLINE int64_t key_block_size(int64_t keys, int64_t limit) {
  const int64_t blocks = max_of<int64_t>(1, ceil_div(keys, limit));
  return ceil_div(ceil_div(keys, blocks), 24) * 24;
}

// out[rows][width] (+)= A^T panel: A reduction-major [words][lda], the accumulators of
// [rows][padded width] in `out`. words_for(row_end) gives the length of the reduction of a tile.
template <class O, class WordsFor>
FMK_INLINE void queries_from_keys(const Word<O>* a, int64_t lda, int rows,
                                  const PanelRows<O>& panel, int64_t width, Acc<O>* out,
                                  bool accumulate, const WordsFor& words_for) {
  using M = Mac<O>;
  using V = Vec<O>;
  using Finish = StoreAccumulators<V>;
  constexpr auto kPrefetch = Prefetch::kPanel;
  const auto split = PanelSplit<V>::of(width);
  const int64_t ld = split.padded_columns();
  const int tiles = (rows + kRowsPerTile - 1) / kRowsPerTile;
  const auto parts = EvenSplit::of(rows, tiles);
  for (int t = 0; t < tiles; ++t) {
    const int64_t row = parts.begin(t), end = parts.begin(t + 1);
    const int tile_rows = static_cast<int>(parts.size(t));
    TileOperands<M> in;
    in.words = words_for(end);
    if (accumulate && in.words == 0) continue;
    in.a = a + row;
    in.lda = lda;
    in.ldb = panel.ld;
    in.ld_init = ld;
    for (int64_t i = 0; i < split.count; ++i) {
      const int64_t column = split.column(i);
      in.b = panel.first + column;
      Acc<O>* to = out + row * ld + column;
      in.init = accumulate ? to : nullptr;
      const Finish finish{to, ld};
      switch (split.width_vecs(i)) {
        case 1:
          tile_of_width<M, true, Finish, 1, kRowsPerTile, kPrefetch>(tile_rows, in, finish);
          break;
        case 2:
          tile_of_width<M, true, Finish, 2, kRowsPerTile, kPrefetch>(tile_rows, in, finish);
          break;
#if defined(__AVX512F__)
        case 3:
          tile_of_width<M, true, Finish, 3, kRowsPerTile, kPrefetch>(tile_rows, in, finish);
          break;
        case 4:
          tile_of_width<M, true, Finish, 4, kRowsPerTile, kPrefetch>(tile_rows, in, finish);
          break;
#endif
      }
    }
  }
}

}  // namespace
}  // namespace fmk::FMK_ISA
