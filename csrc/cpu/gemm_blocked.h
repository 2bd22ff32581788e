// Large products: C = epilogue(A B) in blocks that suit the caches (Goto and van de Geijn, "Anatomy
// of High-Performance Matrix Multiplication", 2008).
//
// gemm() reads A where it lies, which for a reduction-major A (the gradient of a weight) is a line
// per step of the reduction: where rows are far apart, each in a page of its own, and a power of
// two apart at that, lines come late and fall on few sets of the caches. Here A is copied once,
// tile by tile, and streams past a group of panels that stays in L2.
#pragma once

#include "cpu/gemm.h"

namespace fmk::FMK_ISA {

// A block of A, copied: 384 KB of fp32, which with a panel of B stays in L2.
constexpr int64_t kBlockedRows = 192, kBlockedWords = 512;
// Panels and rows of C that are worked on at once: bounds of the work space.
constexpr int64_t kMostPanels = 16, kMostRows = 1024;

// Whether the words of A lie so far apart that the copy pays.
template <class T>
FMK_INLINE bool suits_blocks(const GemmProblem<T>& p) {
  constexpr int64_t kMinRowBytes = 1024, kMinDepth = 32;
  return p.m > 0 && p.a_reduction_major && !p.paired && !p.packed_b && p.k >= kMinDepth &&
         p.lda * static_cast<int64_t>(sizeof(T)) >= kMinRowBytes && p.split().count > 1;
}

// Columns [row0, row0 + rows) of k rows of a reduction-major A as tiles one after the other, each
// [words_of(k)][rows of the tile], `stride` words apart.
template <class T>
FMK_NOINLINE void pack_tiles(const GemmProblem<T>& p, int64_t k0, int64_t k, int64_t row0,
                             const RowTiles& tiles, int64_t stride, Word<T>* to) {
  // A few rows and tiles at a time go through L1: rows a power of two apart share its sets, and a
  // tile is written in runs of whole lines.
  constexpr int64_t kStrip = 16, kTilesAtOnce = 16, kLine = 64 / sizeof(T);
  // Too short a piece of each row for a prefetcher to follow.
  const bool far = p.k * p.lda * static_cast<int64_t>(sizeof(T)) > kSmallOperandBytes;
  alignas(64) T stage[kStrip * kTilesAtOnce * kMaxTileRows];
  for (int64_t strip = 0; strip < k; strip += kStrip) {
    const int64_t rows = min_of(kStrip, k - strip);
    for (int64_t t0 = 0; t0 < tiles.tiles; t0 += kTilesAtOnce) {
      const int64_t t1 = min_of(tiles.tiles, t0 + kTilesAtOnce);
      const int64_t first = tiles.begin(t0), columns = tiles.begin(t1) - first;
      const T* from = p.a + (k0 + strip) * p.lda + row0 + first;
      const int64_t next_rows = far ? min_of(kStrip, k - strip - kStrip) : 0;
      for (int64_t row = 0; row < rows; ++row) {
        if (row < next_rows)
          for (int64_t column = 0; column < columns; column += kLine)
            __builtin_prefetch(from + (kStrip + row) * p.lda + column, 0, 2);
        convert(from + row * p.lda, stage + row * columns, columns);
      }
      const T* staged = stage;
      for (int64_t t = t0; t < t1; ++t) {
        const int width = tiles.rows(t);
        Word<T>* tile = to + t * stride + words_of<T>(strip) * width;
        if constexpr (std::is_same_v<T, Word<T>> && sizeof(T) == 4) {
          for (int64_t row = 0; row < rows; ++row)
            store(tile + row * width, load(staged + row * columns, width), width);
        } else {
          pack_rows_as_panel(staged, columns, rows, width, width, tile);
        }
        staged += width;
      }
    }
  }
}

// Rows [row0, row0 + rows) of C in the panels [panel0, panel1).
template <class T>
FMK_NOINLINE void blocked_part(const GemmProblem<T>& p, int64_t row0, int64_t rows, int64_t panel0,
                               int64_t panel1) {
  using M = Mac<T>;
  using V = Vec<T>;
  constexpr int64_t kPair = M::kPair, kWordBytes = sizeof(Word<T>);
  const auto split = p.split();
  const int64_t words = words_of<T>(p.k);
  const int64_t chunks = ceil_div(words, kBlockedWords + kBlockedWords / 4);
  const int64_t chunk_words = ceil_div(words, chunks);
  const int64_t first_column = split.column(panel0);
  const int64_t columns = split.first_vec(panel1) * V::W - first_column;
  const int64_t blocks = ceil_div(rows, kBlockedRows);
  const int64_t stride = kTileRows[kPanelVecs] * chunk_words + 16;  // no power of two
  const int64_t most_tiles = ceil_div(kBlockedRows, kTileRows[kPanelVecs]);
  auto* b =
      static_cast<Word<T>*>(scratch_bytes(Scratch::kPanel, chunk_words * columns * kWordBytes));
  auto* a =
      static_cast<Word<T>*>(scratch_bytes(Scratch::kRows, (most_tiles * stride + 16) * kWordBytes));
  auto* partial = chunks == 1 ? nullptr
                              : static_cast<Acc<T>*>(scratch_bytes(
                                    Scratch::kAccumulator, rows * columns * sizeof(Acc<T>)));
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t word0 = words * chunk / chunks, count = words * (chunk + 1) / chunks - word0;
    const int64_t k0 = word0 * kPair, k = min_of(p.k - k0, count * kPair);
    for (int64_t panel = panel0; panel < panel1; ++panel) {
      const PanelPlace at = PanelPlace::of(p, panel);
      pack_panel(p, at, k0, k, b + (at.column - first_column) * count);
    }
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = rows * block / blocks, block_rows = rows * (block + 1) / blocks - first;
      const auto tiles = RowTiles::of(block_rows, kPanelVecs);
      pack_tiles(p, k0, k, row0 + first, tiles, stride, a);
      // The next panel comes from beyond L2 while this one is used.
      const int64_t ahead_step = ceil_div(kPanelVecs * V::W * kWordBytes, tiles.tiles);
      for (int64_t panel = panel0; panel < panel1; ++panel) {
        const PanelPlace at = PanelPlace::of(p, panel);
        const Word<T>* here = b + (at.column - first_column) * count;
        const char* next = reinterpret_cast<const char*>(here + at.width * count);
        const Epilogue<T> epilogue = p.epilogue.at_panel(at.column, at.valid);
        for (int64_t t = 0; t < tiles.tiles; ++t) {
          const int64_t row = first + tiles.begin(t);
          TileOperands<M> in;
          in.words = count;
          in.a = a + t * stride;
          in.lda = tiles.rows(t);
          in.b = here;
          if (panel + 1 < panel1) {
            in.ahead = next + t * count * ahead_step;
            in.ahead_step = ahead_step;
          }
          Acc<T>* sums = partial + (at.column - first_column) * rows + row * at.width;
          if (chunk > 0) in.init = sums, in.ld_init = at.width;
          if (chunk + 1 == chunks)
            run_tile_with_epilogue<T, true>(tiles.rows(t), at.vecs, in,
                                            epilogue.at_row(row0 + row));
          else
            run_tile<M, true>(tiles.rows(t), at.vecs, in, StoreAccumulators<V>{sums, at.width});
        }
      }
    }
  }
}

// C is cut into a grid of one part per thread, and those into pieces that bound the work space.
template <class T>
FMK_INLINE void blocked_gemm(const GemmProblem<T>& p, const Parallel& pool) {
  const int64_t panels = p.split().count;
  int64_t across = 1, down = 1;
  double least = 1e300;
  for (int64_t c = 1; c <= min_of<int64_t>(pool.threads, panels); ++c) {
    const int64_t r = min_of<int64_t>(pool.threads / c, ceil_div(p.m, 48));
    // Arithmetic of the largest part, and what is copied for it.
    const double part_rows = static_cast<double>(ceil_div(p.m, r));
    const double part_panels = static_cast<double>(ceil_div(panels, c));
    const double cost = part_rows * part_panels + 16 * (part_rows / 64 + part_panels);
    if (cost < least) least = cost, across = c, down = r;
  }
  parallel_for(pool, across * down, [&](int64_t shard) {
    const int64_t c = shard % across, r = shard / across;
    const int64_t panel0 = panels * c / across, panel1 = panels * (c + 1) / across;
    const int64_t row0 = p.m * r / down, row1 = p.m * (r + 1) / down;
    for (int64_t panel = panel0; panel < panel1; panel += kMostPanels)
      for (int64_t row = row0; row < row1; row += kMostRows)
        blocked_part(p, row, min_of(kMostRows, row1 - row), panel,
                     min_of(panel1, panel + kMostPanels));
  });
}

}  // namespace fmk::FMK_ISA
