// How a correlation is computed: decided before anything is.
#pragma once

#include <type_traits>

#include "cpu/conv_finish.h"
#include "cpu/conv_internal.h"
#include "cpu/conv_row_tiles.h"

namespace fmk::FMK_ISA {

constexpr int64_t kDepthwiseBlockPixels = 112;  // little reuse: what counts is staying in L1
constexpr int64_t kBlockPixels = 224;  // to use each weight in L2 often, and many to share out
constexpr int64_t kBlockInputBytes = 320 << 10;  // what a block reads should stay in L2
constexpr int64_t kMinJoinedWords = 16;          // shorter reductions per tap are worth staging
constexpr int64_t kStreamedNumbers = 8 << 20;    // an output that L3 does not hold
constexpr int64_t kCachedNumbers = 96 << 10;     // an output that L2 may hold
constexpr int64_t kFewestRowPixels = 6;          // of an output row, to be computed by rows
constexpr int64_t kFewestScatteredPixels = 4;    // for tiles that keep within a row
constexpr int64_t kStripTiles = 8;               // tiles that the panels take turns with,
constexpr int64_t kStripPointers = 3072;         // fewer if they have very many pointers

// a / b, not negative: almost always within 32 bits, where the division is three times as fast.
FMK_INLINE int64_t quotient(int64_t a, int64_t b) {
  if ((a | b) >> 32 == 0)
    return static_cast<int64_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b));
  return a / b;
}

// The tiles of a block's pixels: of all together, or of each row.
struct BlockTiles {
  int64_t row_pixels;
  RowTiles row;
  int64_t tiles;
  BlockTiles(int64_t rows, int64_t pixels, int vecs)
      : row_pixels(pixels), row(RowTiles::of(pixels, vecs)), tiles(rows * row.tiles) {}

  int64_t begin(int64_t tile) const {
    const int64_t above = quotient(tile, row.tiles);
    return above * row_pixels + row.begin(tile - above * row.tiles);
  }
  int rows(int64_t tile) const { return row.rows(tile - quotient(tile, row.tiles) * row.tiles); }
};

// D: what A consists of, words of the micro-kernel, or numbers of the compute type (depthwise).
template <class T, class D, bool kDepthwise>
struct CorrelationPlan {
  using V = Vec<T>;
  using A = Acc<T>;
  const Correlation<T>& p;
  Correlation<T> placed;  // the same, to those who finish rows in which residues lie side by side
  // As computed: depthwise is one group of all channels.
  int64_t groups, channels, out_channels;
  bool in_place;   // the input is read where it lies
  bool dense;      // a row's pixels, and one row's and the next's, are read side by side, one each
  bool direct;     // tiles store to the output
  bool scattered;  // whose pixels lie apart: a tile keeps within a row
  bool finished;   // what tiles store has been through the whole epilogue
  bool fetches_output;  // which is asked for some tiles ahead
  bool by_rows;         // tiles are pixels of one staged row, and panels stay in L1
  bool streams;         // such tiles store past the caches
  RowStage<T, D> stage;
  int64_t pixel_words, group_words;       // steps of the (staged) input
  int64_t elements, element_taps, words;  // the reduction: `elements` runs of `words` words, each
                                          // run covering element_taps taps of a kernel row
  int64_t strip_tiles;
  PanelSplit<V> split;
  int64_t image_rows, blocks, panel_parts, shards;

  explicit CorrelationPlan(const Correlation<T>& problem, const Parallel& pool)
      : p(problem), placed(problem) {
    if (p.residues.count > 1) {
      placed.x.out_size *= p.residues.count;
      placed.place_x.step = 1;
    }
    groups = kDepthwise ? 1 : p.groups;
    channels = kDepthwise ? p.groups : p.channels;
    out_channels = kDepthwise ? p.groups : p.out_channels;
    split = panel_split<T>(groups, out_channels, channels, p.row_taps() * p.x.taps);
    const int64_t channel_words = ceil_div(channels, kPairOf<D>);
    const bool readable = sizeof(D) == sizeof(T) * kPairOf<D> && channels % kPairOf<D> == 0;
    const bool vectors = !kDepthwise || channels % V::W == 0;
    const bool joinable = !kDepthwise && p.x.taps > 1 && p.x.step == 1;
    // Pointers into the padding of a row can say zeros only.
    const bool repeats = p.padding != PaddingMode::kZeros &&
                         (p.x.offset < 0 || p.x.offset + p.x.span() > p.x.in_size);
    const bool shifts = p.residues.first > 0;  // taps of some residues
    in_place = !shifts && p.reads_pixels() && readable && vectors && !repeats &&
               !(joinable && channel_words < kMinJoinedWords);
    stage = {p.reads_pixels(),
             groups,
             channels,
             p.z.in_size * p.y.in_size,
             p.x.in_size,
             p.x.offset,
             p.x.span() + (shifts ? 1 : 0),
             p.padding};
    const bool joined = joinable && !in_place;
    element_taps = joined ? p.x.taps : 1;
    elements = p.row_taps() * (p.x.taps / max_of<int64_t>(1, element_taps));
    words = channel_words * element_taps;
    strip_tiles = max_of<int64_t>(
        1, min_of(kStripTiles, kStripPointers / max_of<int64_t>(1, elements * kMaxTileRows)));
    pixel_words = in_place ? groups * channel_words : channel_words;
    group_words = in_place ? channel_words : stage.group_words();
    dense = in_place && elements == 1 && p.z.in_size == 1 && p.z.out_size == 1 && p.z.offset == 0 &&
            p.y.stride == 1 && p.y.offset >= 0 && p.y.offset + p.y.out_size <= p.y.in_size &&
            p.x.stride == 1 && p.x.offset == 0 && p.x.in_size == p.x.out_size;
    by_rows = kFusedEpilogue<T> && joined && groups == 1 && split.width_vecs(0) <= kNarrowVecs &&
              p.residues.count == 1 && p.x.out_size >= kFewestRowPixels;
    scattered = p.channels_last && !p.in_order() && !kDepthwise && !by_rows &&
                !p.moments.wanted() && p.residues.count == 1 &&
                p.x.out_size >= kFewestScatteredPixels;
    direct = p.channels_last && p.pool.kernel_h == 0 && (p.in_order() || scattered);
    fetches_output =
        direct && p.batch * p.out_rows() * p.x.out_size * groups * out_channels > kCachedNumbers;
    finished = direct || (!kDepthwise && (by_rows || std::is_same_v<T, A>) && kFusedEpilogue<T> &&
                          !p.residual && !p.preactivation &&
                          !(p.argmax && p.pool.kind == PoolKind::kAverage));
    streams = by_rows && direct && p.activation <= Activation::kRelu6 && !p.residual &&
              !p.preactivation && !p.moments.wanted() &&
              p.batch * p.out_rows() * p.x.out_size * groups * out_channels > kStreamedNumbers &&
              streamed(p.output, p.batch * p.out_rows() * p.x.out_size, groups * out_channels);
    divide(pool);
  }

  Epilogue<T> output_epilogue() const {
    Epilogue<T> epilogue;
    epilogue.out = p.output;
    epilogue.ld_out = epilogue.ld_residual = groups * out_channels;
    epilogue.scale = p.scale;
    epilogue.shift = p.shift;
    epilogue.residual = p.residual;
    epilogue.preactivation = p.preactivation;
    epilogue.activation = p.activation;
    return epilogue;
  }

  // The epilogue of a panel, if tiles go through it: to the output or to rows[pixels][ld].
  Epilogue<T> panel_epilogue(int64_t group, int64_t column, int64_t width, int64_t first_pixel,
                             A* rows, int64_t ld) const {
    Epilogue<T> epilogue;
    if (!finished) return epilogue;
    epilogue = output_epilogue().at_panel(group * out_channels + column,
                                          min_of(width, out_channels - column));
    if (direct) {
      if (!scattered) epilogue = epilogue.at_row(first_pixel);
    } else if constexpr (std::is_same_v<T, A>) {
      epilogue.out = rows;
      epilogue.ld_out = ld;
      epilogue.columns = static_cast<int>(width);
    }
    return epilogue;
  }

  // By rows: the epilogue of a panel to rows[pixels][width] in the compute type, if tiles go
  // through it, and no more than the stores otherwise.
  Epilogue<A> rows_epilogue(int64_t column, int64_t width, A* rows) const {
    Epilogue<A> epilogue;
    if (finished) {
      epilogue.scale = p.scale;
      epilogue.shift = p.shift;
      epilogue.activation = p.activation;
    }
    epilogue = epilogue.at_panel(column, width);
    epilogue.out = rows;
    epilogue.ld_out = width;
    return epilogue;
  }
  // Of the tile that starts at pixel `pixel` of a block.
  Epilogue<T> tile_epilogue(const Epilogue<T>& of_panel, int64_t first_pixel, int64_t pixel) const {
    if (!scattered) return of_panel.at_row(pixel);
    const int64_t row = quotient(first_pixel + pixel, p.x.out_size);
    const int64_t x = first_pixel + pixel - row * p.x.out_size, plane = quotient(row, p.y.out_size);
    const int64_t image = quotient(plane, p.z.out_size);
    const auto placed = [](const Placement& place, int64_t index) {
      return place.first + index * place.step;
    };
    const int64_t z = placed(p.place_z, plane - image * p.z.out_size);
    const int64_t y = placed(p.place_y, row - plane * p.y.out_size);
    const int64_t line = (image * p.place_z.size + z) * p.place_y.size + y;
    Epilogue<T> epilogue = of_panel.at_row(line * p.place_x.size + placed(p.place_x, x));
    epilogue.ld_out *= p.place_x.step;
    epilogue.ld_residual *= p.place_x.step;
    return epilogue;
  }

  // From rows[pixels][residues][width], the accumulators of a block's channels from `column` of a
  // group on.
  void finish_rows(const Block<D>& block, int64_t group, int64_t column, int64_t width,
                   A* rows) const {
    const int64_t columns = min_of(width, out_channels - column);
    const int64_t channel = group * out_channels + column;
    const Finisher<T> finisher{placed, channel, columns, width, finished};
    for (int i = 0; i < block.piece_count; ++i) {
      const Piece& piece = block.pieces[i];
      finisher.run(piece, rows);
      const int64_t begin = piece.begin * p.x.out_size + p.place_x.first;
      if (p.moments.wanted())
        p.moments.add(block.shard, piece.image, begin,
                      begin + (piece.end - piece.begin) * p.x.out_size, channel, channel + columns);
    }
  }

 private:
  // Blocks of output rows; where there are too few pixels for that, panels are shared out instead.
  void divide(const Parallel& pool) {
    const bool pooled = p.pool.kernel_h > 0;
    image_rows = pooled ? p.pool.out_height : p.out_rows();
    const int64_t rows = p.batch * image_rows, conv_rows = pooled ? p.pool.stride_h : 1;
    const int64_t row_pixels = conv_rows * p.x.out_size;
    const int64_t read_words =  // of an input row
        in_place ? p.x.out_size * min_of(p.x.stride, p.x.taps) * pixel_words : stage.row_words();
    const int64_t row_bytes = conv_rows * min_of(p.y.stride, p.y.taps) * read_words * sizeof(D);
    int64_t per_block = max_of<int64_t>(1, (kDepthwise ? kDepthwiseBlockPixels : kBlockPixels) /
                                               max_of<int64_t>(1, row_pixels * p.residues.count));
    // Rows that windows share are computed again in the next block.
    if (p.pool.kernel_h > p.pool.stride_h) per_block = max_of<int64_t>(4, 2 * per_block);
    const int64_t fitting = max_of<int64_t>(2, kBlockInputBytes / max_of<int64_t>(1, row_bytes));
    // By rows they are pooled as they come: as few windows as may be are cut.
    if (by_rows && finished && pooled)
      per_block = max_of(per_block, min_of(image_rows, rows / (2 * pool.threads)));
    per_block = min_of(per_block, fitting);
    per_block = min_of(per_block, (kMaxPieces - 2) * max_of<int64_t>(1, image_rows));
    blocks = ceil_div(rows, per_block);
    const double flops = 2.0 * static_cast<double>(p.batch * p.out_rows() * placed.x.out_size) *
                         static_cast<double>(groups * out_channels * elements * element_taps) *
                         static_cast<double>(kDepthwise ? 16 : channels);
    const int64_t threads = flops < kSerialFlops ? 1 : pool.threads;
    panel_parts = 1;
    if (threads > 1 && rows * row_pixels < threads * 64)
      panel_parts = min_of(threads, groups * split.count);
    else if (threads > 1 && blocks < 8 * threads)
      blocks = min_of(rows, ceil_div(blocks, threads) * threads);
    shards = min_of(threads, blocks * panel_parts);
  }
};

}  // namespace fmk::FMK_ISA
