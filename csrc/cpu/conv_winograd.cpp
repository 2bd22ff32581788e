#include "cpu/conv_winograd.h"

#include "cpu/conv_finish.h"
#include "cpu/winograd_transforms.h"

namespace fmk::FMK_ISA {
namespace {

using F = WinogradF4;
constexpr int kTile = F::kOutputs, kWindow = F::kPoints, kPointCount = kWindow * kWindow;
constexpr int W = VecF::W;
// Tiles transformed together. Few: the packed weight is read too often for the work done with it.
// Many: the transformed inputs fall out of L2, which costs little, since they are read in order.
constexpr int64_t kBlockTiles = 64;
constexpr int64_t kMaxPieces = kBlockTiles;

// Products of a panel: column vector j of tile row i at out + i * ld + j * vec_step.
struct StorePoints {
  float* out;
  int64_t ld, vec_step;
  template <int MR, int NV>
  FMK_LAMBDA void run(VecF (&acc)[MR][NV]) const {
    FMK_FOR (i, MR)
      FMK_FOR (j, NV) store(out + i * ld + j * vec_step, acc[i][j]);
  }
};

// A cut of the output into pieces of rows and of the pieces into blocks of about kBlockTiles tiles.
// Pieces of one image lie one after the other; a block is a run of pieces.
struct Plan {
  int64_t tile_columns;  // per row of tiles
  int64_t pieces_per_image, out_rows, piece_count, pieces_per_block, blocks;

  template <class T>
  FMK_INLINE Plan of(const Correlation<T>& p, int64_t threads) {
    Plan plan;
    plan.tile_columns = ceil_div(p.x.out_size, kTile);
    plan.out_rows = p.pool.kernel_h ? p.pool.out_height : p.y.out_size;
    const int64_t image_tiles = ceil_div(p.y.out_size, kTile) * plan.tile_columns;
    const int64_t total = image_tiles * p.batch;
    // As many blocks as the threads can share evenly.
    const int64_t blocks = ceil_div(ceil_div(total, kBlockTiles), threads) * threads;
    const int64_t block_tiles = max_of<int64_t>(1, ceil_div(total, blocks));
    if (image_tiles <= block_tiles) {
      plan.pieces_per_image = 1;
      plan.pieces_per_block = min_of(kMaxPieces, block_tiles / image_tiles);
    } else {
      const int64_t tile_rows = max_of<int64_t>(1, block_tiles / plan.tile_columns);
      const int64_t step = out_row_step(p), rows = tile_rows * kTile / pool_stride(p) / step * step;
      plan.pieces_per_image = ceil_div(plan.out_rows, max_of(step, rows));
      plan.pieces_per_block = 1;
    }
    plan.piece_count = plan.pieces_per_image * p.batch;
    plan.blocks = ceil_div(plan.piece_count, plan.pieces_per_block);
    return plan;
  }

  template <class T>
  Piece piece(const Correlation<T>& p, int64_t index) const {
    Piece piece;
    piece.image = index / pieces_per_image;
    const int64_t part = index % pieces_per_image;
    const int64_t step = out_row_step(p), units = ceil_div(out_rows, step);
    piece.out_begin = min_of(out_rows, units * part / pieces_per_image * step);
    piece.out_end = min_of(out_rows, units * (part + 1) / pieces_per_image * step);
    piece.begin = conv_begin(p, piece.out_begin);
    piece.end = conv_end(p, piece.out_end);
    piece.own_begin = part == 0 ? 0 : conv_end(p, piece.out_begin);
    // Rows that no window needs still belong to the pre-activation.
    if (p.preactivation && part == 0) piece.begin = 0;
    if (p.preactivation && part + 1 == pieces_per_image) piece.end = p.y.out_size;
    if (p.preactivation) piece.begin = min_of(piece.begin, piece.own_begin);
    piece.end = max_of(piece.begin, piece.end);
    piece.first_row = 0;
    return piece;
  }

 private:
  template <class T>
  static int64_t pool_stride(const Correlation<T>& p) {
    return p.pool.kernel_h ? p.pool.stride_h : 1;
  }
  // Output rows that take up whole rows of tiles.
  template <class T>
  static int64_t out_row_step(const Correlation<T>& p) {
    return max_of<int64_t>(1, kTile / pool_stride(p));
  }
  template <class T>
  static int64_t conv_begin(const Correlation<T>& p, int64_t out) {
    if (!p.pool.kernel_h) return out;
    return min_of(p.y.out_size, max_of<int64_t>(0, out * p.pool.stride_h - p.pool.padding_h));
  }
  // One past the last row that the outputs before `out` need.
  template <class T>
  static int64_t conv_end(const Correlation<T>& p, int64_t out) {
    if (!p.pool.kernel_h) return out;
    if (out == 0) return 0;
    return max_of<int64_t>(
        0, min_of(p.y.out_size, (out - 1) * p.pool.stride_h - p.pool.padding_h + p.pool.kernel_h));
  }
};

// One row of tiles of a piece.
struct TileRow {
  int64_t image, y, rows;  // conv rows [y, y + rows), rows <= kTile
  int64_t block_row;       // of the block's conv rows
};

template <class T>
class BlockRunner {
 public:
  BlockRunner(const Correlation<T>& p, const Plan& plan) : p_(p), plan_(plan) {}

  // Pieces [first, last) of the plan and panels [panel_begin, panel_end).
  void run(int64_t first, int64_t last, int64_t panel_begin, int64_t panel_end) {
    collect(first, last);
    if (tile_row_count_ == 0) return;
    const int64_t tiles = tile_row_count_ * plan_.tile_columns;
    // One more line per tile: tiles whose size is a multiple of 4 KB would share L1 sets.
    const int64_t ld_input = p_.channels * kPointCount + 16;
    auto* inputs =
        static_cast<float*>(scratch_bytes(Scratch::kRows, tiles * ld_input * sizeof(float)));
    transform_inputs(inputs, ld_input);

    const auto split = PanelSplit<VecF>::of(p_.out_channels);
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const int vecs = split.width_vecs(panel);
      const int64_t width = vecs * W, column = split.column(panel);
      const int64_t ld_product = width * kPointCount + 16;
      auto* products = static_cast<float*>(
          scratch_bytes(Scratch::kAccumulator, tiles * ld_product * sizeof(float)));
      multiply(inputs, ld_input, tiles,
               static_cast<const float*>(p_.weight) + column * kPointCount * p_.channels, vecs,
               products, ld_product);
      const int64_t pixels = block_rows_ * p_.x.out_size;
      auto* rows =
          static_cast<float*>(scratch_bytes(Scratch::kTile, pixels * width * sizeof(float)));
      for (int64_t t = 0; t < tiles; ++t) {
        const TileRow& row = tile_rows_[t / plan_.tile_columns];
        const int64_t x = t % plan_.tile_columns * kTile;
        const int columns = static_cast<int>(min_of<int64_t>(kTile, p_.x.out_size - x));
        for (int j = 0; j < vecs; ++j)
          transform_output<F>(products + t * ld_product + j * kPointCount * W,
                              rows + (row.block_row * p_.x.out_size + x) * width + j * W,
                              p_.x.out_size * width, width, static_cast<int>(row.rows), columns);
      }
      const Finisher<T> finisher{p_, column, min_of(width, p_.out_channels - column), width};
      for (int i = 0; i < piece_count_; ++i) finisher.run(pieces_[i], rows);
    }
  }

 private:
  void collect(int64_t first, int64_t last) {
    piece_count_ = 0;
    tile_row_count_ = block_rows_ = 0;
    for (int64_t index = first; index < last; ++index) {
      Piece& piece = pieces_[piece_count_++];
      piece = plan_.piece(p_, index);
      piece.first_row = block_rows_;
      for (int64_t y = piece.begin; y < piece.end; y += kTile)
        tile_rows_[tile_row_count_++] = {piece.image, y, min_of<int64_t>(kTile, piece.end - y),
                                         block_rows_ + y - piece.begin};
      block_rows_ += piece.end - piece.begin;
    }
  }

  // inputs[tile][channels / W][point][W].
  void transform_inputs(float* inputs, int64_t ld) {
    constexpr bool in_place = sizeof(T) == sizeof(float) && sizeof(Acc<T>) == sizeof(float);
    const int64_t channels = p_.channels, columns = plan_.tile_columns;
    // A staged row starts where the first tile's window does and ends with the last tile's.
    const int64_t staged_pixels = columns * kTile + kWindow - kTile;
    const int64_t staged_words = staged_pixels * channels;
    auto* zero_row = static_cast<float*>(
        scratch_bytes(Scratch::kExtra, (channels + kWindow * staged_words) * sizeof(float)));
    std::memset(zero_row, 0, channels * sizeof(float));
    float* staged = zero_row + channels;
    const RowStage<T, float> stage{p_.channels_last, 1,           channels,     p_.y.in_size,
                                   p_.x.in_size,     p_.x.offset, staged_pixels};
    const bool direct = in_place && p_.channels_last;
    int64_t staged_from = 0, staged_to = 0,
            staged_image = -1;  // input rows in the ring of kWindow rows

    for (int64_t r = 0; r < tile_row_count_; ++r) {
      const TileRow& row = tile_rows_[r];
      const T* image = p_.input + row.image * channels * p_.y.in_size * p_.x.in_size;
      const int64_t top = row.y + p_.y.offset;
      if (!direct) {
        if (staged_image != row.image || top < staged_from) staged_to = top;
        for (int64_t y = max_of(top, staged_to); y < top + kWindow; ++y)
          if (y >= 0 && y < p_.y.in_size) stage.run(image, y, staged + wrapped(y) * staged_words);
        staged_from = top;
        staged_to = top + kWindow;
        staged_image = row.image;
      }
      const float* pixels[kPointCount];
      for (int64_t tile = 0; tile < columns; ++tile) {
        for (int i = 0; i < kWindow; ++i) {
          const int64_t y = top + i;
          const bool row_inside = y >= 0 && y < p_.y.in_size;
          for (int j = 0; j < kWindow; ++j) {
            const int64_t x = tile * kTile + j + p_.x.offset;
            const float*& pixel = pixels[j * kWindow + i];
            if (!row_inside || x < 0 || x >= p_.x.in_size)
              pixel = zero_row;
            else if (direct)
              pixel = reinterpret_cast<const float*>(image) + (y * p_.x.in_size + x) * channels;
            else
              pixel = staged + wrapped(y) * staged_words + (tile * kTile + j) * channels;
          }
        }
        transform_input<F>(pixels, channels, inputs + (r * columns + tile) * ld);
      }
    }
  }
  static int64_t wrapped(int64_t y) { return (y % kWindow + kWindow) % kWindow; }

  // products[tile][vec][point][W] of one panel: for every point a GEMM of tiles x channels x width.
  void multiply(const float* inputs, int64_t ld_input, int64_t tiles, const float* panel, int vecs,
                float* products, int64_t ld_product) {
    const int64_t width = vecs * W;
    const auto row_tiles = RowTiles::of(tiles, vecs);
    // Long reductions are cut so that a slice of the panel stays in L1 while all tiles pass over
    // it.
    constexpr int64_t kSlice = 128;
    const int64_t slices = p_.channels <= 3 * kSlice ? 1 : ceil_div(p_.channels, kSlice);
    for (int point = 0; point < kPointCount; ++point, panel += p_.channels * width) {
      for (int64_t slice = 0; slice < slices; ++slice) {
        const int64_t vec0 = p_.channels / W * slice / slices,
                      vec1 = p_.channels / W * (slice + 1) / slices;
        for (int64_t t = 0; t < row_tiles.tiles; ++t) {
          const int64_t first = row_tiles.begin(t);
          const int rows = row_tiles.rows(t);
          const float* row_pointers[kMaxTileRows];
          for (int i = 0; i < rows; ++i)
            row_pointers[i] = inputs + (first + i) * ld_input + (vec0 * kPointCount + point) * W;
          TileOperands<MacF32> in;
          in.rows = row_pointers;
          in.batch_step = kPointCount * W;
          in.batch = vec1 - vec0;
          in.words = W;
          in.b = panel + vec0 * W * width;
          float* out = products + first * ld_product + point * W;
          if (slice > 0) {
            in.init = out;
            in.ld_init = ld_product;
            in.init_vec_step = kPointCount * W;
          }
          run_tile<MacF32, false>(rows, vecs, in, StorePoints{out, ld_product, kPointCount * W});
        }
      }
    }
  }

  const Correlation<T>& p_;
  const Plan& plan_;
  Piece pieces_[kMaxPieces];
  int piece_count_ = 0;
  TileRow tile_rows_[4 * kBlockTiles];
  int64_t tile_row_count_ = 0, block_rows_ = 0;
};

// The 36 points of one input channel and one vector of output channels, `ld` floats apart.
template <class T>
void transform_weight(const WeightView<T>& w, int64_t column, int64_t lanes, int64_t channel,
                      float* out, int64_t ld) {
  const T* src = w.data + column * w.column_stride + channel * w.reduction_stride;
  alignas(64) float taps[9][W] = {};
  for (int64_t i = 0; i < lanes; ++i)
    for (int y = 0; y < 3; ++y)
      for (int x = 0; x < 3; ++x) {
        const int64_t tap = (w.y.first + y * w.y.step) * w.kernel_w + w.x.first + x * w.x.step;
        taps[y * 3 + x][i] = static_cast<float>(widen(src[i * w.column_stride + tap]));
      }
  const VecF scale =
      splat(w.reduction_scale ? static_cast<float>(w.reduction_scale[channel]) : 1.0f);
  VecF columns[3][kWindow];  // [tap x][point y]
  for (int x = 0; x < 3; ++x) {
    const VecF g[3] = {load(taps[x]) * scale, load(taps[3 + x]) * scale, load(taps[6 + x]) * scale};
    F::weights(g, columns[x]);
  }
  for (int y = 0; y < kWindow; ++y) {
    const VecF g[3] = {columns[0][y], columns[1][y], columns[2][y]};
    VecF u[kWindow];
    F::weights(g, u);
    for (int x = 0; x < kWindow; ++x) store(out + (y * kWindow + x) * ld, u[x]);
  }
}

}  // namespace

template <class T>
size_t packed_winograd_bytes(const WeightView<T>& w) {
  return static_cast<size_t>(PanelSplit<VecF>::of(w.columns).padded_columns() * w.reduction *
                             kPointCount) *
         sizeof(float);
}

template <class T>
void pack_winograd_weight(const WeightView<T>& w, void* packed, const Parallel& pool) {
  const auto split = PanelSplit<VecF>::of(w.columns);
  // Runs of channels of one panel: the points of a panel are then written as 36 streams.
  constexpr int64_t kRun = 16;
  const int64_t runs = ceil_div(w.reduction, kRun), units = split.count * runs;
  const int64_t shards = w.columns * w.reduction < 2048 ? 1 : min_of<int64_t>(pool.threads, units);
  parallel_for(pool, shards, [&](int64_t shard) {
    for (int64_t unit = units * shard / shards; unit < units * (shard + 1) / shards; ++unit) {
      const int64_t panel = unit / runs, first = unit % runs * kRun;
      const int vecs = split.width_vecs(panel);
      const int64_t width = vecs * W, column = split.column(panel);
      float* points = static_cast<float*>(packed) + column * kPointCount * w.reduction;
      for (int64_t channel = first; channel < min_of(w.reduction, first + kRun); ++channel)
        for (int vec = 0; vec < vecs; ++vec) {
          const int64_t lanes = min_of<int64_t>(W, w.columns - column - vec * W);
          transform_weight(w, column + vec * W, lanes, channel, points + channel * width + vec * W,
                           w.reduction * width);
        }
    }
  });
}

template <class T>
void correlate_winograd(const Correlation<T>& p, const Parallel& pool) {
  const auto split = PanelSplit<VecF>::of(p.out_channels);
  const Plan plan = Plan::of(p, pool.threads);
  // Where there is less than a block per thread, the threads share the output channels of each
  // instead.
  const int64_t parts =
      plan.blocks >= pool.threads ? 1 : min_of<int64_t>(pool.threads, split.count);
  const int64_t units = plan.blocks * parts, shards = min_of<int64_t>(pool.threads, units);
  parallel_for(pool, shards, [&](int64_t shard) {
    BlockRunner<T> runner(p, plan);
    for (int64_t unit = units * shard / shards; unit < units * (shard + 1) / shards; ++unit) {
      const int64_t block = unit / parts, part = unit % parts;
      const int64_t first = block * plan.pieces_per_block;
      runner.run(first, min_of(plan.piece_count, first + plan.pieces_per_block),
                 split.count * part / parts, split.count * (part + 1) / parts);
    }
  });
}

#define FMK_INSTANTIATE(T)                                                          \
  template size_t packed_winograd_bytes(const WeightView<T>&);                      \
  template void pack_winograd_weight(const WeightView<T>&, void*, const Parallel&); \
  template void correlate_winograd(const Correlation<T>&, const Parallel&);
FMK_INSTANTIATE(float)
FMK_INSTANTIATE(bf16)
FMK_INSTANTIATE(f16)
#undef FMK_INSTANTIATE

}  // namespace fmk::FMK_ISA
