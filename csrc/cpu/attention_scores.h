// The block of scores S^T = K Q^T: products, the mask, and what else modifies a score; and which
// of the weights dropout keeps.
#pragma once

#include "cpu/attention_blocks.h"
#include "cpu/dropout.h"

namespace fmk::FMK_ISA {
namespace {

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

  // to[k] = value(k) for k < count; false if all of them hide their key.
  template <class Value>
  FMK_INLINE bool expand_values(const Value& value, int64_t count, E* to) {
    const E hidden = -__builtin_inf();
    bool any = false;
    for (int64_t k = 0; k < count; ++k) {
      to[k] = value(k);
      any |= to[k] != hidden;
    }
    return any;
  }
  template <class Number>
  FMK_INLINE bool expand_numbers(const Number* from, int64_t stride, int64_t count, E* to) {
    const E unit = static_cast<E>(kLog2E);
    if (stride != 1)
      return expand_values(
          [&](int64_t k) { return static_cast<E>(widen(from[k * stride])) * unit; }, count, to);
    if constexpr (std::is_same_v<Number, float> && std::is_same_v<E, double>) {
      for (int64_t k = 0; k < count; ++k) to[k] = from[k];
    } else {
      convert(from, to, count);
    }
    return expand_values([&](int64_t k) { return to[k] * unit; }, count, to);
  }

  // One query's values for `count` keys; false if all of them are hidden.
  static bool expand(const AttentionMask& mask, int64_t offset, int64_t count, E* to) {
    using Kind = AttentionMask::Kind;
    if (mask.kind == Kind::kFloat)
      return expand_numbers(static_cast<const float*>(mask.data) + offset, mask.key, count, to);
    if (mask.kind == Kind::kStorage)
      return expand_numbers(static_cast<const T*>(mask.data) + offset, mask.key, count, to);
    const E hidden = -__builtin_inf();
    const auto* from = static_cast<const uint8_t*>(mask.data) + offset;
    // The branch on the stride lets the compiler vectorise the common case.
    if (mask.key == 1)
      return expand_values([&](int64_t k) { return from[k] ? E(0) : hidden; }, count, to);
    return expand_values([&](int64_t k) { return from[k * mask.key] ? E(0) : hidden; }, count, to);
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
template <class M, Prefetch kPrefetch, class Finish>
FMK_INLINE void run_full_tile(int vecs, const TileOperands<M>& in, const Finish& finish) {
  switch (vecs) {
    case 1: return tile<M, kTileRows[1], 1, false, Finish, kPrefetch>(in, finish);
    case 2: return tile<M, kTileRows[2], 2, false, Finish, kPrefetch>(in, finish);
#if defined(__AVX512F__)
    case 3: return tile<M, kTileRows[3], 3, false, Finish, kPrefetch>(in, finish);
    case 4: return tile<M, kTileRows[4], 4, false, Finish, kPrefetch>(in, finish);
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
  const bool in_l1 = stays_in_l1<O>(words, block.vecs * W);
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
    if (in_l1)
      run_full_tile<M, Prefetch::kNothing>(vecs, in, finish_of(k, hidden));
    else
      run_full_tile<M, Prefetch::kPanel>(vecs, in, finish_of(k, hidden));
    k += kTileRows[vecs];
  }
}

// How scores become exponents of 2: exponent = unit * adjusted score. Adjusting takes a pass over
// the stored scores, in which they are scaled, capped, biased and masked.
template <class E>
struct Scaling {
  bool adjust;
  E factor, unit;
  E cap;  // bound of the adjusted score, factor then being relative to it; 0: none
  FMK_INLINE Scaling of(const AttentionProblem& p) {
    if (p.softcap > 0)
      return {true, static_cast<E>(p.scale / p.softcap), E(1), static_cast<E>(p.softcap * kLog2E)};
    const E scale = static_cast<E>(p.scale * kLog2E);
    // The running maximum of unscaled scores is of use only if scaling keeps their order.
    if (p.mask.data || p.slopes || !(p.scale > 0)) return {true, scale, E(1), E(0)};
    return {false, E(1), scale, E(0)};
  }
};

// What the adjusting pass needs to know of the lanes; keys count from the block's first one.
template <class V>
struct alignas(64) Lanes {
  using E = typename V::Elem;
  bool bounded, biased;
  E begin[kMaxLanes<V>], end[kMaxLanes<V>];  // keys that are visible
  E slope[kMaxLanes<V>], position[kMaxLanes<V>];

  void read(const AttentionProblem& p, const Queries<V>& queries, const QueryBlock& block,
            int64_t key0, int64_t count) {
    bounded = key0 < block.all_begin || key0 + count > block.all_end;
    biased = p.slopes != nullptr;
    if (!bounded && !biased) return;
    for (int64_t lane = 0; lane < block.vecs * V::W; ++lane) {
      const int64_t row = min_of<int64_t>(lane, block.rows - 1);
      const int64_t query = block.position_of(row);
      begin[lane] = static_cast<E>(max_of<int64_t>(0, queries.begin(query) - key0));
      end[lane] = static_cast<E>(max_of<int64_t>(0, min_of(queries.end(query) - key0, count)));
      if (!biased) continue;
      position[lane] = static_cast<E>(p.first_position + query - key0);
      slope[lane] =
          static_cast<const E*>(p.slopes)[block.batch * p.slopes_batch + block.head_of(row)] *
          static_cast<E>(kLog2E);
    }
  }
};

// scores[k][lane] for k in [from, to): adjusted, and -inf where hidden; then the running maximum.
// derivative: of the capped score by the uncapped one, or null.
template <class T>
FMK_NOINLINE void adjust_scores(Acc<T>* scores, int64_t from, int64_t to, int vecs,
                                const Scaling<Acc<T>>& scaling, const MaskBlock<T>& mask,
                                bool boolean, const Lanes<Vec<T>>& lanes_info, Acc<T>* derivative,
                                Acc<T>* maximum) {
  using V = Vec<T>;
  using E = Acc<T>;
  const int64_t lanes = vecs * V::W;
  const V hidden = splat(E(-__builtin_inf())), factor = splat(scaling.factor);
  const V cap = splat(scaling.cap);
  for (int j = 0; j < vecs; ++j) {
    const int column = j * V::W;
    V largest = load(maximum + column);
    for (int64_t k = from; k < to; ++k) {
      E* at = scores + k * lanes + column;
      V x = load(at);
      if (scaling.adjust) {
        x = x * factor;
        if (scaling.cap > 0) {
          x = tanh(x);
          if (derivative) store(derivative + k * lanes + column, fnma(x, x, splat(E(1))));
          x = x * cap;
        }
        if (lanes_info.biased)
          x = fnma(load(lanes_info.slope + column),
                   abs(load(lanes_info.position + column) - splat(static_cast<E>(k))), x);
        if (mask.by_lane || mask.by_key) {
          const V bias =
              mask.by_key ? splat(mask.by_key[k]) : load(mask.by_lane + k * lanes + column);
          // A boolean mask hides a NaN, an added -inf does not.
          x = boolean ? select(less(bias, zero<V>()), hidden, x) : x + bias;
        }
      }
      if (lanes_info.bounded) {
        const V key = splat(static_cast<E>(k));
        x = select(less(key, load(lanes_info.end + column)), x, hidden);
        x = select(less(key, load(lanes_info.begin + column)), hidden, x);
      }
      largest = max(largest, x);
      store(at, x);
    }
    store(maximum + column, largest);
  }
}

// Scales, masks and hides the scores of keys [key0 + from, key0 + count) in memory, and raises the
// maxima.
template <class T>
FMK_INLINE void finish_scores(const AttentionProblem& p, const Queries<Vec<T>>& queries,
                              int64_t key0, int64_t from, int64_t count, const QueryBlock& block,
                              const Scaling<Acc<T>>& scaling, const MaskBlock<T>& mask,
                              Acc<T>* scores, Acc<T>* derivative, Acc<T>* maximum) {
  if (from == count) return;
  Lanes<Vec<T>> lanes;
  lanes.read(p, queries, block, key0, count);
  adjust_scores<T>(scores, from, count, block.vecs, scaling, mask,
                   p.mask.kind == AttentionMask::Kind::kBytes, lanes, derivative, maximum);
}

// The block of scores of keys [key0, key0 + count) into scores[count + kMaxTileRows][lanes], and
// its maxima. Where whole vectors of queries see none of the keys, scores are left undefined.
template <class T>
FMK_INLINE void score_block(const AttentionProblem& p, const Queries<Vec<T>>& queries,
                            const WordRows& keys, int64_t key0, int64_t count,
                            const QueryBlock& block, const Word<Operand<T>>* panel,
                            const Scaling<Acc<T>>& scaling, const MaskBlock<T>& mask,
                            Acc<T>* scores, Acc<T>* derivative, Acc<T>* maximum) {
  using V = Vec<T>;
  using E = Acc<T>;
  using O = Operand<T>;
  const int64_t lanes = block.vecs * V::W;
  alignas(64) E unused[kMaxLanes<V>] = {};
  // Rows from `from` on are adjusted in memory: everything, or what the window may hide.
  int64_t from = scaling.adjust || key0 < block.all_begin ? 0 : count;
  keys_times_queries<O>(keys, key0, count, block, panel, words_of<O>(p.head_dim),
                        [&](int64_t k, int j) {
                          const int rows = kTileRows[block.vecs - j];
                          if (key0 + min_of(k + rows, count) > block.all_end)
                            from = min_of(from, k);
                          return ScoreFinish<V>{scores + k * lanes + j * V::W, lanes,
                                                (k < from ? maximum : unused) + j * V::W};
                        });
  finish_scores<T>(p, queries, key0, from, count, block, scaling, mask, scores, derivative,
                   maximum);
}

// --- dropout ---

// factors[k][lane] for keys [key0, key0 + count), key0 a multiple of four: 0, or what a kept weight
// is multiplied by. Writes up to a whole number of fours.
template <class V>
FMK_NOINLINE void dropout_factors(const AttentionProblem& p, const QueryBlock& block, int64_t key0,
                                  int64_t count, typename V::Elem* factors) {
  using E = typename V::Elem;
  constexpr int W = V::W;
  const E kept = static_cast<E>(p.dropout.factor);
  const int64_t lanes = block.vecs * W;
  for (int j = 0; j < block.vecs; ++j) {
    uint32_t low[W], high[W];
    for (int i = 0; i < W; ++i) {
      const int64_t row = min_of<int64_t>(j * W + i, block.rows - 1);
      const auto index = static_cast<uint64_t>(
          row_index(p, block.batch, block.head_of(row), block.position_of(row)));
      low[i] = static_cast<uint32_t>(index);
      high[i] = static_cast<uint32_t>(index >> 32);
    }
    for (int64_t k = 0; k < count; k += 4) {
      uint32_t words[4][W];
      for (int i = 0; i < W; ++i) {
        words[0][i] = low[i];
        words[1][i] = high[i];
        words[2][i] = static_cast<uint32_t>((key0 + k) >> 2);
        words[3][i] = 0;
      }
      philox(words, p.dropout.seed);
      for (int word = 0; word < 4; ++word)
        for (int i = 0; i < W; ++i)
          factors[(k + word) * lanes + j * W + i] =
              words[word][i] >= p.dropout.threshold ? kept : E(0);
    }
  }
}

}  // namespace
}  // namespace fmk::FMK_ISA
