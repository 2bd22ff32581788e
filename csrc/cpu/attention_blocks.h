// What the two passes of attention share: how queries are cut into blocks, how operands become
// words of the micro-kernel, and the block of scores S^T = K Q^T.
//
// Scores are kept transposed, a row per key and a lane per query: the queries of a block are packed
// once as a panel, keys are broadcast from where they lie, softmax needs no sums across lanes, and
// P^T is the reduction-major operand of P V, whose panel are the rows of V.
#pragma once

#include <type_traits>

#include "cpu/attention.h"
#include "cpu/gemm.h"

namespace fmk::FMK_ISA {

void attention_backward(const AttentionBackward& p, const Parallel& pool);

namespace {

constexpr double kLog2E = 1.44269504088896340736, kLn2 = 0.69314718055994530942;

// What a storage type is multiplied as: itself, or float where the machine has no arithmetic for
// it.
template <class T>
using Operand = std::conditional_t<kWordsInPlace<T>, T, float>;

template <class V>
constexpr int kMaxLanes = kPanelVecs * V::W;
// Rows of the tiles whose height is free: six fill the registers beside the widest panel.
constexpr int kRowsPerTile = 6;

template <class V>
FMK_INLINE int64_t whole_vectors(int64_t n) {
  return ceil_div(n, V::W) * V::W;
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

// A block of queries: consecutive rows of a list (see Queries), one per lane.
struct QueryBlock {
  int64_t batch, kv_head, head, position;  // of the first row
  int64_t queries;                         // rows per head
  int rows, vecs;
  bool one_head;
  bool ordered;           // causal and of one head: each row sees one key more than the row before
  int64_t first_visible;  // keys that every row may see
  int64_t last_visible;   // keys that any row may see

  int64_t head_of(int64_t row) const { return one_head ? head : head + (position + row) / queries; }
  int64_t position_of(int64_t row) const {
    return one_head ? position + row : (position + row) % queries;
  }
  // Words of a reduction over keys [key0, key0 + count) that the rows before row_end may see.
  template <class O>
  int64_t words_seen(int64_t key0, int64_t count, int64_t row_end) const {
    if (ordered) count = max_of<int64_t>(0, min_of(count, position + row_end - key0));
    return words_of<O>(count);
  }
  // Whole vectors of queries that come before key `key` and so must not see it.
  int hidden_vecs(int64_t key, int width) const {
    if (!ordered || key <= position) return 0;
    return static_cast<int>(min_of<int64_t>((key - position) / width, vecs));
  }
};

// The queries that share a key head are walked as lists of rows: each head its own, or, where heads
// have few queries (decoding), all the group's heads in one, so that keys and values are read once.
template <class V>
struct Queries {
  const AttentionProblem& problem;
  int64_t group, heads_per_list, lists, rows;
  PanelSplit<V> split;

  FMK_INLINE Queries of(const AttentionProblem& p) {
    constexpr int64_t kFew = 32;
    const int64_t group = p.kv_heads ? p.heads / p.kv_heads : 1;
    const int64_t heads = p.queries < kFew ? group : 1;
    const int64_t rows = heads * p.queries;
    return {p, group, heads, heads ? p.batch * p.heads / heads : 0, rows, PanelSplit<V>::of(rows)};
  }
  int64_t blocks() const { return split.count; }
  int64_t visible(int64_t position) const {
    return problem.causal ? min_of(problem.keys, position + 1) : problem.keys;
  }
  QueryBlock block(int64_t list, int64_t index) const {
    const int64_t lists_per_batch = problem.heads / heads_per_list;
    const int64_t first = split.column(index);
    QueryBlock b;
    b.batch = list / lists_per_batch;
    const int64_t head = list % lists_per_batch * heads_per_list;
    b.kv_head = head / group;
    b.head = head;
    b.position = first;
    b.queries = problem.queries;
    b.vecs = split.width_vecs(index);
    b.rows = static_cast<int>(min_of<int64_t>(rows - first, b.vecs * V::W));
    b.one_head = heads_per_list == 1;
    b.ordered = problem.causal && b.one_head;
    b.first_visible = visible(b.one_head ? first : 0);
    b.last_visible = visible(b.one_head ? first + b.rows - 1 : problem.queries - 1);
    return b;
  }
  // Work of a block, in arbitrary units.
  int64_t cost(int64_t index) const {
    const int64_t last = min_of(rows, split.column(index + 1)) - 1;
    const int64_t keys = heads_per_list == 1 ? visible(last) : problem.keys;
    return (keys + 32) * split.width_vecs(index);
  }
  // Units are (list, block), lists outermost. The first unit of share `part` of `parts` equal
  // amounts of work.
  int64_t unit_at(int64_t part, int64_t parts) const {
    int64_t per_list = 0;
    for (int64_t i = 0; i < blocks(); ++i) per_list += cost(i);
    if (part == parts || per_list == 0) return part == parts ? lists * blocks() : 0;
    const int64_t target = static_cast<int64_t>(static_cast<double>(per_list) *
                                                static_cast<double>(lists) * part / parts);
    const int64_t list = min_of(target / per_list, lists), rest = target - list * per_list;
    int64_t unit = list * blocks();
    for (int64_t i = 0, done = 0; list < lists && i < blocks() && done + cost(i) / 2 < rest; ++i) {
      done += cost(i);
      ++unit;
    }
    return unit;
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

// --- the mask ---

// The mask's values for one block of scores, as numbers to add: 0 or -inf for a boolean mask, else
// its values times log2(e).
template <class T>
struct MaskBlock {
  using V = Vec<T>;
  using E = Acc<T>;
  const E* by_lane = nullptr;  // [keys][lanes]
  const E* by_key = nullptr;   // [keys], where all queries share a row

  struct Buffers {
    E *rows, *by_lane;
    void carve(Carver& carver, int64_t keys) {
      rows = carver.take<E>(kMaxLanes<V> * keys);
      by_lane = carver.take<E>(kMaxLanes<V> * keys);
    }
  };

  // One query's values for `count` keys; false if all of them are hidden.
  static bool expand(const AttentionMask& mask, int64_t offset, int64_t count, E* to) {
    const E hidden = -__builtin_inf();
    bool any = false;
    if (mask.boolean) {
      const auto* from = static_cast<const uint8_t*>(mask.data) + offset;
      for (int64_t k = 0; k < count; ++k) {
        const bool seen = from[k * mask.key] != 0;
        to[k] = seen ? E(0) : hidden;
        any |= seen;
      }
    } else {
      const T* from = static_cast<const T*>(mask.data) + offset;
      const E unit = static_cast<E>(kLog2E);
      if (mask.key == 1) {
        convert(from, to, count);
      } else {
        for (int64_t k = 0; k < count; ++k) to[k] = widen(from[k * mask.key]);
      }
      for (int64_t k = 0; k < count; ++k) {
        to[k] *= unit;
        any |= to[k] != hidden;
      }
    }
    return any;
  }

  // Reads the mask for keys [key0, key0 + count); false if every score of the block is hidden.
  bool read(const AttentionMask& mask, const QueryBlock& block, int64_t key0, int64_t count,
            const Buffers& buffers) {
    const auto offset = [&](int row) {
      return block.batch * mask.batch + block.head_of(row) * mask.head +
             block.position_of(row) * mask.query + key0 * mask.key;
    };
    by_lane = by_key = nullptr;
    if (mask.query == 0 && (mask.head == 0 || block.one_head)) {
      by_key = buffers.rows;
      return expand(mask, offset(0), count, buffers.rows);
    }
    bool any = false;
    for (int row = 0; row < block.rows; ++row)
      any |= expand(mask, offset(row), count, buffers.rows + row * count);
    if (!any) return false;
    pack_columns_as_panel(buffers.rows, count, count, block.rows, block.vecs * V::W,
                          buffers.by_lane);
    by_lane = buffers.by_lane;
    return true;
  }
};

// --- scores ---

// Finish of a tile of scores: stores them and raises the running maximum of each lane.
template <class V>
struct ScoreFinish {
  typename V::Elem* scores;
  int64_t ld;
  typename V::Elem* maximum;

  template <int MR, int NV>
  FMK_LAMBDA void run(V (&acc)[MR][NV]) const {
    FMK_FOR (j, NV) {
      V largest = load(maximum + j * V::W);
      FMK_FOR (i, MR) {
        largest = max(largest, acc[i][j]);
        store(scores + i * ld + j * V::W, acc[i][j]);
      }
      store(maximum + j * V::W, largest);
    }
  }
};

// The tile of `vecs` vectors and the most rows that fit beside them.
template <class M, class Finish>
FMK_INLINE void run_full_tile(int vecs, const TileOperands<M>& in, const Finish& finish) {
  switch (vecs) {
    case 1: return tile<M, kTileRows[1], 1, false>(in, finish);
    case 2: return tile<M, kTileRows[2], 2, false>(in, finish);
#if defined(__AVX512F__)
    case 3: return tile<M, kTileRows[3], 3, false>(in, finish);
    case 4: return tile<M, kTileRows[4], 4, false>(in, finish);
#endif
  }
}

// For keys [key0, key0 + count) of `rows`: finish_of(k, j) gets the tile whose first key is key0 +
// k and whose first vector of queries is j, products of rows with the panel [words][lanes]. Vectors
// of queries that come before all keys of a tile are left out. The last tile may run over the end:
// it repeats the last key, and the finish needs room for kMaxTileRows more rows.
template <class O, class FinishOf>
FMK_INLINE void keys_times_queries(const WordRows& rows, int64_t key0, int64_t count,
                                   const QueryBlock& block, const Word<O>* panel, int64_t words,
                                   const FinishOf& finish_of) {
  using M = Mac<O>;
  constexpr int W = Vec<O>::W;
  for (int64_t k = 0; k < count;) {
    const int hidden = block.hidden_vecs(key0 + k, W), vecs = block.vecs - hidden;
    const Word<O>* row_pointers[kMaxTileRows];
    for (int i = 0; i < kTileRows[vecs]; ++i)
      row_pointers[i] = reinterpret_cast<const Word<O>*>(
          rows.first + (key0 + min_of(k + i, count - 1)) * rows.row_bytes);
    TileOperands<M> in;
    in.rows = row_pointers;
    in.words = words;
    in.b = panel + hidden * W;
    in.ldb = block.vecs * W;
    run_full_tile<M>(vecs, in, finish_of(k, hidden));
    k += kTileRows[vecs];
  }
}

// How scores become exponents of 2: exponent = unit * (factor * q.k + mask), factor applied (with
// the mask) to the stored scores only if `adjust`.
template <class E>
struct Scaling {
  bool adjust;
  E factor, unit;
  FMK_INLINE Scaling of(const AttentionProblem& p) {
    const E scale = static_cast<E>(p.scale * kLog2E);
    // The running maximum of unscaled scores is of use only if scaling keeps their order.
    if (p.mask.data || !(p.scale > 0)) return {true, scale, E(1)};
    return {false, E(1), scale};
  }
};

// scores[k][lane] for k in [from, to): scaled, masked, hidden where k >= visible[lane]; then the
// running maximum.
template <class T>
FMK_NOINLINE void adjust_scores(Acc<T>* scores, int64_t from, int64_t to, int vecs,
                                const Scaling<Acc<T>>& scaling, const MaskBlock<T>& mask,
                                bool boolean, const Acc<T>* visible, Acc<T>* maximum) {
  using V = Vec<T>;
  using E = Acc<T>;
  const int64_t lanes = vecs * V::W;
  const V hidden = splat(E(-__builtin_inf())), factor = splat(scaling.factor);
  for (int j = 0; j < vecs; ++j) {
    V largest = load(maximum + j * V::W);
    const V end = visible ? load(visible + j * V::W) : zero<V>();
    for (int64_t k = from; k < to; ++k) {
      E* at = scores + k * lanes + j * V::W;
      V x = load(at);
      if (scaling.adjust) {
        x = x * factor;
        if (mask.by_lane || mask.by_key) {
          const V bias =
              mask.by_key ? splat(mask.by_key[k]) : load(mask.by_lane + k * lanes + j * V::W);
          // A boolean mask hides a NaN, an added -inf does not.
          x = boolean ? select(less(bias, zero<V>()), hidden, x) : x + bias;
        }
      }
      if (visible) x = select(less(splat(static_cast<E>(k)), end), x, hidden);
      largest = max(largest, x);
      store(at, x);
    }
    store(maximum + j * V::W, largest);
  }
}

// Scales, masks and hides the scores of keys [key0 + from, key0 + count) in memory, and raises the
// maxima.
template <class T>
FMK_INLINE void finish_scores(const AttentionProblem& p, int64_t key0, int64_t from, int64_t count,
                              const QueryBlock& block, const Scaling<Acc<T>>& scaling,
                              const MaskBlock<T>& mask, Acc<T>* scores, Acc<T>* maximum) {
  using V = Vec<T>;
  using E = Acc<T>;
  const int64_t lanes = block.vecs * V::W;
  if (from == count) return;
  alignas(64) E visible[kMaxLanes<V>];
  const bool hides = key0 + count > block.first_visible;
  if (hides)
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t row = min_of<int64_t>(lane, block.rows - 1);
      const int64_t end = min_of(p.keys, block.position_of(row) + 1) - key0;
      visible[lane] = static_cast<E>(max_of<int64_t>(0, min_of(end, count)));
    }
  adjust_scores<T>(scores, from, count, block.vecs, scaling, mask, p.mask.boolean,
                   hides ? visible : nullptr, maximum);
}

// The block of scores of keys [key0, key0 + count) into scores[count + kMaxTileRows][lanes], and
// its maxima. Where whole vectors of queries see none of the keys, scores are left undefined.
template <class T>
FMK_INLINE void score_block(const AttentionProblem& p, const WordRows& keys, int64_t key0,
                            int64_t count, const QueryBlock& block, const Word<Operand<T>>* queries,
                            const Scaling<Acc<T>>& scaling, const MaskBlock<T>& mask,
                            Acc<T>* scores, Acc<T>* maximum) {
  using V = Vec<T>;
  using E = Acc<T>;
  using O = Operand<T>;
  const int64_t lanes = block.vecs * V::W;
  alignas(64) E unused[kMaxLanes<V>] = {};
  // Rows from `from` on are adjusted in memory: everything, or what causality may hide.
  int64_t from = scaling.adjust ? 0 : count;
  keys_times_queries<O>(keys, key0, count, block, queries, words_of<O>(p.head_dim),
                        [&](int64_t k, int j) {
                          const int rows = kTileRows[block.vecs - j];
                          if (key0 + min_of(k + rows, count) > block.first_visible)
                            from = min_of(from, k);
                          return ScoreFinish<V>{scores + k * lanes + j * V::W, lanes,
                                                (k < from ? maximum : unused) + j * V::W};
                        });
  finish_scores<T>(p, key0, from, count, block, scaling, mask, scores, maximum);
}

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
  const auto split = PanelSplit<V>::of(width);
  const int64_t ld = split.padded_columns(), tiles = ceil_div(rows, kRowsPerTile);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t row = rows * t / tiles, end = rows * (t + 1) / tiles;
    const int tile_rows = static_cast<int>(end - row);
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
        case 1: tile_of_width<M, true, Finish, 1, kRowsPerTile>(tile_rows, in, finish); break;
        case 2: tile_of_width<M, true, Finish, 2, kRowsPerTile>(tile_rows, in, finish); break;
#if defined(__AVX512F__)
        case 3: tile_of_width<M, true, Finish, 3, kRowsPerTile>(tile_rows, in, finish); break;
        case 4: tile_of_width<M, true, Finish, 4, kRowsPerTile>(tile_rows, in, finish); break;
#endif
      }
    }
  }
}

}  // namespace
}  // namespace fmk::FMK_ISA
