// The building block: a batch-reduce GEMM micro-kernel (Georganas et al., "High-Performance Deep
// Learning via a Single Building Block", arXiv:1906.06440). One tile of MR x NV vectors accumulates
//
//   acc[i][:] = init[i][:] + sum over batch b, word k of  A_b[i][k] * B_b[k][:]
//
// in registers and hands it to a `Finish` (epilogue.h, or a kernel's own). A is read in place, one
// word broadcast at a time: by rows, each given by a pointer (a pixel of a convolution, a row of a
// matrix), or reduction-major, where word k of rows i, i+1, ... lie side by side. B is a packed
// panel (pack.h), read once, in order, through the whole batch.
#pragma once

#include "cpu/gemm_few_rows.h"
#include "cpu/work_shares.h"

namespace fmk::FMK_ISA {

template <class Mac>
struct TileOperands {
  using Word = typename Mac::Word;
  using Elem = typename Mac::V::Elem;

  // Row-major A: the rows of every batch element, [batch][MR]; with a batch_step those of the first
  // element, [MR], each next one lying batch_step words on.
  const Word* const* rows = nullptr;
  int64_t batch_step = 0;
  // Reduction-major A: word k of row i at a[k * lda + i], a single batch element; with `rows`,
  // batch element b has its own, rows[b] instead of a.
  const Word* a = nullptr;
  int64_t lda = 0;
  int64_t batch = 1;
  int64_t words = 0;           // reduction length of one batch element
  const Word* b = nullptr;     // the panel: [batch][words][NV * W], or with rows ldb words apart
  int64_t ldb = 0;             // 0: NV * W, a dense panel
  const Elem* init = nullptr;  // [MR][ld_init] added to the sums; null: zero
  int64_t ld_init = 0;
  int64_t init_vec_step = Mac::V::W;  // from one vector of a row of init to the next
  // What is read after this tile and lies far away: asked for bit by bit, ahead_step bytes per word
  // of the reduction. Null: nothing.
  const void* ahead = nullptr;
  int64_t ahead_step = 0;
};

// A fused multiply-add takes several cycles, so a tile of few accumulators would wait for itself:
// such tiles keep kPartialSums sets of accumulators, one for every kPartialSums-th word, added up
// at the end.
#if defined(__AVX512F__)
constexpr int kWantedChains = 16;
#else
constexpr int kWantedChains = 8;
#endif
template <int MR, int NV>
constexpr int kPartialSums =
    MR * NV >= kWantedChains ? 1 : (MR * NV * 4 >= kWantedChains ? kWantedChains / (MR * NV) : 4);

// Steps ahead of the reduction at which the panel is asked for: where it comes from L2, the
// hardware alone does not keep up on every processor. A line more than is read does no harm.
constexpr int64_t kPanelPrefetchSteps = 4;
template <class Mac, int NV>
FMK_INLINE void prefetch_panel(const typename Mac::Word* panel_ahead) {
  FMK_FOR (j, NV) __builtin_prefetch(panel_ahead + j * Mac::V::W);
}
// What a tile asks for in its loop. The widest tile issues nearly four instructions a cycle, which
// is all there is, so each of these costs time where the memory would have come by itself.
enum class Prefetch {
  kNothing,        // the panel is in L1
  kPanel,          // the steps to come of the panel
  kPanelAndAhead,  // and TileOperands::ahead
};
// `pointer`, to the compiler a value of its own: as sums of another pointer and constants, one per
// vector, a loop's addresses would take more registers than there are.
template <class T>
FMK_INLINE T* opaque(T* pointer) {
  asm("" : "+r"(pointer));
  return pointer;
}

// acc += A B over `words` words of MR rows, from word `first` of each on; the accumulators of a
// tile, in kPartialSums sets.
template <class Mac, Prefetch kPrefetch = Prefetch::kPanelAndAhead, int MR, int NV, int kSums>
FMK_INLINE void accumulate_rows(typename Mac::V (&acc)[kSums][MR][NV],
                                const typename Mac::Word* const* rows, int64_t words,
                                const typename Mac::Word* b, int64_t ldb, int64_t first = 0,
                                const char* ahead = nullptr, int64_t ahead_step = 0) {
  using V = typename Mac::V;
  if (!ahead) ahead = reinterpret_cast<const char*>(b);
  const typename Mac::Word* row[MR];
  FMK_FOR (i, MR) row[i] = rows[i] + first;
  const typename Mac::Word* panel_ahead = opaque(b + kPanelPrefetchSteps * ldb);
  const auto step = [&](V(&set)[MR][NV], int64_t k) FMK_LAMBDA {
    V panel[NV];
    FMK_FOR (j, NV) panel[j] = pin(Mac::load_words(b + j * V::W));
    if constexpr (kPrefetch >= Prefetch::kPanel) {
      prefetch_panel<Mac, NV>(panel_ahead);
      panel_ahead = opaque(panel_ahead + ldb);
    }
    if constexpr (kPrefetch == Prefetch::kPanelAndAhead) {
      __builtin_prefetch(ahead, 0, 2);
      ahead += ahead_step;
    }
    FMK_FOR (i, MR) {
      const V x = Mac::splat_word(row[i] + k);
      FMK_FOR (j, NV) set[i][j] = Mac::mac(set[i][j], x, panel[j]);
    }
    b += ldb;
  };
  int64_t k = 0;
  if constexpr (kSums > 1) {
    for (; k + kSums <= words; k += kSums)
      FMK_FOR (s, kSums) step(acc[s], k + s);
  }
  for (; k < words; ++k) step(acc[0], k);
}

template <class V, int kSums, int MR, int NV>
FMK_INLINE void clear_sums(V (&acc)[kSums][MR][NV]) {
  FMK_FOR (s, kSums)
    FMK_FOR (i, MR)
      FMK_FOR (j, NV) acc[s][i][j] = zero<V>();
}
// acc[0] += the other sets, and what is added to the reduction; null: nothing. Added last: a long
// reduction cut into chunks is then a sum of sums, whose rounding error is that of a chunk, and not
// one long chain.
template <class V, int kSums, int MR, int NV>
FMK_INLINE void add_sums(V (&acc)[kSums][MR][NV], const typename V::Elem* init, int64_t ld_init,
                         int64_t init_vec_step = V::W) {
  FMK_FOR (s, kSums - 1)
    FMK_FOR (i, MR)
      FMK_FOR (j, NV) acc[0][i][j] = acc[0][i][j] + acc[s + 1][i][j];
  if (init) {
    FMK_FOR (i, MR)
      FMK_FOR (j, NV) acc[0][i][j] = acc[0][i][j] + load(init + i * ld_init + j * init_vec_step);
  }
}

template <class Mac, int MR, int NV, bool kReductionMajor, class Finish,
          Prefetch kPrefetch = Prefetch::kPanelAndAhead>
FMK_NOINLINE void tile(const TileOperands<Mac>& in, const Finish& finish) {
  using V = typename Mac::V;
  using Word = typename Mac::Word;
  constexpr int kSums = kReductionMajor ? 1 : kPartialSums<MR, NV>;
  V acc[kSums][MR][NV];
  clear_sums(acc);
  if constexpr (requires { finish.template prefetch<MR, NV>(); })
    finish.template prefetch<MR, NV>();
  if (in.init) {
    FMK_FOR (i, MR)
      FMK_FOR (j, NV) __builtin_prefetch(in.init + i * in.ld_init + j * in.init_vec_step);
  }
  const Word* b = in.b;
  const int64_t words = in.words, ldb = in.ldb ? in.ldb : NV * V::W;
  if constexpr (kReductionMajor) {
    const int64_t lda = in.lda, ahead_step = in.ahead ? in.ahead_step : 0;
    const char* ahead = reinterpret_cast<const char*>(in.ahead ? in.ahead : b);
    const Word* panel_ahead = opaque(b + kPanelPrefetchSteps * ldb);
    for (int64_t element = 0; element < in.batch; ++element) {
      const Word* a = in.rows ? in.rows[element] : in.a;
      for (int64_t k = 0; k < words; ++k, b += ldb, a += lda) {
        V panel[NV];
        FMK_FOR (j, NV) panel[j] = pin(Mac::load_words(b + j * V::W));
        if constexpr (kPrefetch >= Prefetch::kPanel) {
          prefetch_panel<Mac, NV>(panel_ahead);
          panel_ahead = opaque(panel_ahead + ldb);
        }
        if constexpr (kPrefetch == Prefetch::kPanelAndAhead) {
          __builtin_prefetch(ahead, 0, 2);
          ahead += ahead_step;
        }
        FMK_FOR (i, MR) {
          const V x = Mac::splat_word(a + i);
          FMK_FOR (j, NV) acc[0][i][j] = Mac::mac(acc[0][i][j], x, panel[j]);
        }
      }
    }
  } else {
    const Word* const* rows = in.rows;
    const int64_t rows_step = in.batch_step ? 0 : MR;
    const char* ahead = static_cast<const char*>(in.ahead);
    const int64_t ahead_element = in.ahead ? words * in.ahead_step : 0;
    for (int64_t element = 0; element < in.batch; ++element, rows += rows_step, b += words * ldb)
      accumulate_rows<Mac, kPrefetch>(acc, rows, words, b, ldb, element * in.batch_step,
                                      ahead + element * ahead_element, in.ahead_step);
  }
  add_sums(acc, in.init, in.ld_init, in.init_vec_step);
  finish.template run<MR, NV>(acc[0]);
}

constexpr int kMaxTileRows = 14;
template <class V>
constexpr int kMaxTileElems = 24 * V::W;  // rows x vectors of the largest tile

// tile<...> for run-time sizes: rows in [1, kTileRows[vecs]], vecs in [1, 4].
template <class Mac, bool kReductionMajor, class Finish, int NV, int MR = kTileRows[NV],
          Prefetch kPrefetch = Prefetch::kPanelAndAhead>
FMK_INLINE void tile_of_width(int rows, const TileOperands<Mac>& in, const Finish& finish) {
  if constexpr (MR > 1) {
    if (rows < MR)
      return tile_of_width<Mac, kReductionMajor, Finish, NV, MR - 1, kPrefetch>(rows, in, finish);
  }
  tile<Mac, MR, NV, kReductionMajor, Finish, kPrefetch>(in, finish);
}
template <class Mac, bool kReductionMajor, class Finish>
FMK_INLINE void run_tile(int rows, int vecs, const TileOperands<Mac>& in, const Finish& finish) {
  switch (vecs) {
    case 1: return tile_of_width<Mac, kReductionMajor, Finish, 1>(rows, in, finish);
    case 2: return tile_of_width<Mac, kReductionMajor, Finish, 2>(rows, in, finish);
#if defined(__AVX512F__)
    case 3: return tile_of_width<Mac, kReductionMajor, Finish, 3>(rows, in, finish);
    case 4: return tile_of_width<Mac, kReductionMajor, Finish, 4>(rows, in, finish);
#endif
  }
}

// Types whose epilogue is compiled into the tile. The others (double, and 16-bit types without
// arithmetic of their own) finish from a buffer in L1: they need not be the fastest, and every tile
// is a function of its own in the binary.
template <class T>
constexpr bool kFusedEpilogue = kWordsInPlace<T> && sizeof(T) <= 4;

template <class T, bool kReductionMajor>
FMK_INLINE void run_tile_with_epilogue(int rows, int vecs, const TileOperands<Mac<T>>& in,
                                       const Epilogue<T>& epilogue) {
  if constexpr (kFusedEpilogue<T>) {
    run_tile<Mac<T>, kReductionMajor>(rows, vecs, in, epilogue);
  } else {
    using V = Vec<T>;
    alignas(64) Acc<T> accumulators[kMaxTileElems<V>];
    const StoreAccumulators<V> keep{accumulators, vecs * V::W};
    run_tile<Mac<T>, kReductionMajor>(rows, vecs, in, keep);
    epilogue.run_rows(accumulators, keep.ld, rows);
  }
}

// Splits `count` rows into tiles as equal as possible: sixes and a remainder of one would waste the
// last tile.
struct RowTiles {
  int64_t tiles;
  EvenSplit split;
  FMK_INLINE RowTiles of(int64_t rows, int vecs) {
    const int64_t tiles = ceil_div(rows, kTileRows[vecs]);
    return {tiles, EvenSplit::of(rows, tiles)};
  }
  int64_t begin(int64_t tile) const { return split.begin(tile); }
  int rows(int64_t tile) const { return static_cast<int>(split.size(tile)); }
};

// Reduction steps after which a tile's accumulators go through memory: a chunk of B (256 KB) then
// stays in L2 while all row tiles pass over it, and of a reduction-major A the touched lines stay
// in L1.
constexpr int64_t kChunkWords = 1024, kReductionMajorChunkWords = 256;
// Neighbouring panels are computed together, row tile by row tile, where A is larger than
// kSmallOperandBytes: A then comes from beyond L2 once per group instead of once per panel. A
// group's chunks of B and its partial sums each stay below kGroupBytes, half of an L2 cache.
#if defined(__AVX512F__)
constexpr int64_t kGroupBytes = 512 * 1024;
#else
constexpr int64_t kGroupBytes = 128 * 1024;
#endif
constexpr int64_t kSmallOperandBytes = kGroupBytes / 2, kMaxGroup = 8;
// The number of reduction chunks.
template <class T>
FMK_INLINE int64_t chunk_count(const GemmProblem<T>& p) {
  const int64_t limit = p.a_reduction_major ? kReductionMajorChunkWords : kChunkWords;
  return max_of<int64_t>(1, ceil_div(words_of<T>(p.k), limit + limit / 4));
}

// Rows [row0, row0 + rows) of `group` neighbouring panels of C.
template <class T>
FMK_NOINLINE void gemm_block(const GemmProblem<T>& p, int64_t panel, int64_t group, int64_t row0,
                             int64_t rows) {
  using M = Mac<T>;
  using V = Vec<T>;
  constexpr int kPair = M::kPair;
  const int64_t words = words_of<T>(p.k), chunks = chunk_count(p);
  PanelPlace at[kMaxGroup];
  int vecs = 1;
  for (int64_t g = 0; g < group; ++g) {
    at[g] = PanelPlace::of(p, panel + g);
    vecs = max_of(vecs, at[g].vecs);
  }
  const int64_t first_column = at[0].column;
  const int64_t group_width = at[group - 1].column + at[group - 1].width - first_column;
  const auto tiles = RowTiles::of(rows, vecs);
  // Reduction-major words are usable in place only if a word is one number: pairs lie on two
  // different rows.
  const bool a_in_place = kWordsInPlace<T> && (p.a_reduction_major ? kPair == 1 : p.k % kPair == 0);

  Acc<T>* partial = nullptr;
  if (chunks > 1)
    partial = static_cast<Acc<T>*>(
        scratch_bytes(Scratch::kAccumulator, rows * group_width * sizeof(Acc<T>)));
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t word0 = words * chunk / chunks, word1 = words * (chunk + 1) / chunks;
    const int64_t k0 = word0 * kPair, k1 = min_of(p.k, word1 * kPair);
    Word<T>* packed = nullptr;
    if (!p.packed_b) {
      packed = static_cast<Word<T>*>(
          scratch_bytes(Scratch::kPanel, (word1 - word0) * group_width * sizeof(Word<T>)));
      for (int64_t g = 0; g < group; ++g)
        pack_panel(p, at[g], k0, k1 - k0, packed + (at[g].column - first_column) * (word1 - word0));
    }
    // The rows of A as words: in place, or copied for this chunk.
    const Word<T>* a;
    int64_t lda;
    if (a_in_place) {
      const T* first = p.a_reduction_major ? p.a + k0 * p.lda + row0 : p.a + row0 * p.lda + k0;
      a = reinterpret_cast<const Word<T>*>(first);
      lda = p.lda;  // in numbers; a row-major pair operand steps through bytes below
    } else {
      lda = p.a_reduction_major ? rows : word1 - word0;
      auto* copy = static_cast<Word<T>*>(
          scratch_bytes(Scratch::kRows, rows * (word1 - word0) * sizeof(Word<T>)));
      if (p.a_reduction_major)
        pack_rows_as_panel(p.a + k0 * p.lda + row0, p.lda, k1 - k0, rows, rows, copy);
      else
        pack_rows(p.a + row0 * p.lda + k0, p.lda, rows, k1 - k0, copy);
      a = copy;
    }
    const int64_t row_bytes =
        a_in_place ? p.lda * static_cast<int64_t>(sizeof(T)) : lda * sizeof(Word<T>);
    const bool last = chunk + 1 == chunks;
    for (int64_t t = 0; t < tiles.tiles; ++t) {
      const int64_t row = tiles.begin(t);
      const int tile_rows = tiles.rows(t);
      TileOperands<M> in;
      const Word<T>* row_pointers[kMaxTileRows];
      in.words = word1 - word0;
      if (p.a_reduction_major) {
        in.a = a + row;
        in.lda = lda;
      } else {
        for (int i = 0; i < tile_rows; ++i)
          row_pointers[i] = reinterpret_cast<const Word<T>*>(reinterpret_cast<const char*>(a) +
                                                             (row + i) * row_bytes);
        in.rows = row_pointers;
        // The rows of the next tile: all of them, a share with each panel, where A is dense and
        // they lie side by side; else how they begin, and a prefetcher follows.
        if (a_in_place && t + 1 < tiles.tiles) {
          const char* next = reinterpret_cast<const char*>(a) + (row + tile_rows) * row_bytes;
          if (chunks == 1 && p.lda == p.k) {
            in.ahead = next;
            in.ahead_step = tile_rows * static_cast<int>(sizeof(Word<T>)) / static_cast<int>(group);
          } else {
            for (int i = 0; i < tiles.rows(t + 1); ++i)
              FMK_FOR (line, 2) __builtin_prefetch(next + i * row_bytes + 64 * line, 0, 2);
          }
        }
      }
      for (int64_t g = 0; g < group; ++g) {
        const PanelPlace& to = at[g];
        if (in.ahead && g > 0)
          in.ahead = static_cast<const char*>(in.ahead) + in.words * in.ahead_step;
        if (p.packed_b) {
          in.b = p.packed_b + to.column * words + word0 * to.width;
        } else {
          in.b = packed + (to.column - first_column) * (word1 - word0);
        }
        Acc<T>* sums = partial + (to.column - first_column) * rows + row * to.width;
        if (chunk > 0) in.init = sums, in.ld_init = to.width;
        if (last) {
          const Epilogue<T> epilogue = p.epilogue.at_panel(to.column, to.valid).at_row(row0 + row);
          if (p.a_reduction_major)
            run_tile_with_epilogue<T, true>(tile_rows, to.vecs, in, epilogue);
          else
            run_tile_with_epilogue<T, false>(tile_rows, to.vecs, in, epilogue);
        } else {
          const StoreAccumulators<V> keep{sums, to.width};
          if (p.a_reduction_major)
            run_tile<M, true>(tile_rows, to.vecs, in, keep);
          else
            run_tile<M, false>(tile_rows, to.vecs, in, keep);
        }
      }
    }
  }
}

// How C is shared out: units of one panel and a block of rows, the panels of a block side by side,
// so that a thread may group them. Every unit packs its panel; rows are blocked finer than
// necessary only where there are too few panels to keep the threads equally busy.
struct GemmUnits {
  int64_t panels, row_blocks, rows;
  template <class T>
  FMK_INLINE GemmUnits of(const GemmProblem<T>& p, int64_t threads) {
    constexpr int64_t kMaxRows = 1024;  // bounds the scratch of a unit
    const int64_t panels = p.split().count;
    int64_t blocks = ceil_div(p.m, kMaxRows);
    if (threads > 1 && panels % threads != 0 && panels < 8 * threads)
      blocks = max_of(
          blocks, min_of(ceil_div(4 * threads, panels), ceil_div(p.m, 2 * kTileRows[kPanelVecs])));
    return {panels, blocks, p.m};
  }
  int64_t count() const { return panels * row_blocks; }
  int64_t first_row(int64_t block) const { return rows * block / row_blocks; }
};

// How many neighbouring panels a thread computes together.
template <class T>
FMK_INLINE int64_t group_size(const GemmProblem<T>& p, int64_t rows) {
  const int64_t chunks = chunk_count(p), words = ceil_div(words_of<T>(p.k), chunks);
  constexpr int64_t kWidth = kPanelVecs * Vec<T>::W;
  if (rows * words * static_cast<int64_t>(sizeof(Word<T>)) <= kSmallOperandBytes) return 1;
  int64_t group = kGroupBytes / max_of<int64_t>(1, words * kWidth * sizeof(Word<T>));
  if (chunks > 1) group = min_of<int64_t>(group, kGroupBytes / (rows * kWidth * sizeof(Acc<T>)));
  return max_of<int64_t>(1, min_of(group, kMaxGroup));
}

template <class T>
FMK_INLINE void gemm(const GemmProblem<T>& p, const Parallel& pool) {
  if (p.m == 0 || p.n == 0) return;
  const bool serial =
      2.0 * static_cast<double>(p.m) * static_cast<double>(p.n) * static_cast<double>(p.k) <
          kSerialFlops &&
      p.n * p.k * static_cast<int64_t>(sizeof(T)) < kSerialBytes;
  const int64_t threads = serial ? 1 : pool.threads;
  if (has_few_rows(p)) return few_rows_gemm(p, threads, pool);
  const GemmUnits units = GemmUnits::of(p, threads);
  const int64_t most = group_size(p, ceil_div(p.m, units.row_blocks));
  WorkShares work(min_of(threads, units.count()), units.count());
  parallel_for(pool, work.count(), [&](int64_t shard) {
    for (int64_t unit, end; work.take(shard, most, &unit, &end);) {
      for (int64_t group; unit < end; unit += group) {
        const int64_t block = unit / units.panels, panel = unit % units.panels;
        const int64_t row0 = units.first_row(block), rows = units.first_row(block + 1) - row0;
        group = min_of(end - unit, units.panels - panel);
        gemm_block(p, panel, group, row0, rows);
      }
    }
  });
}

}  // namespace fmk::FMK_ISA
