#include "cpu/conv_winograd.h"

#include <type_traits>

#include "cpu/conv_finish.h"
#include "cpu/conv_stream.h"
#include "cpu/winograd_multiply.h"
#include "cpu/winograd_transforms.h"

namespace fmk::FMK_ISA {
namespace {

using F = WinogradF4;
constexpr int kTile = F::kOutputs, kWindow = F::kPoints, kPointCount = kWindow * kWindow;
constexpr int W = VecF::W;
// Tiles transformed together. Few: the packed weight is read too often for the work done with it.
// Many: the transformed inputs fall out of L2. What pays depends on which of the two is larger.
constexpr int64_t kMaxBlockTiles = 96;
FMK_INLINE int64_t block_tiles(int64_t channels) {
  return channels <= 64 ? 32 : channels <= 128 ? 64 : kMaxBlockTiles;
}
constexpr int64_t kMaxPieces = kMaxBlockTiles;
// Channels that are multiplied together: their part of a panel takes half of L1.
constexpr int64_t kSlice = 16384 / (kPanelVecs * W * sizeof(float));

// Planes of the output in all images, and the numbers that each of their pixels is a sum over: of
// all channels of the planes under the kernel.
template <class T>
FMK_INLINE int64_t plane_count(const Correlation<T>& p) {
  return p.batch * p.z.out_size;
}
template <class T>
FMK_INLINE int64_t reduction(const Correlation<T>& p) {
  return p.z.taps * p.channels;
}

// A cut of the output into pieces of rows and of the pieces into blocks of about kBlockTiles tiles.
// Pieces of one plane lie one after the other; a block is a run of pieces. Piece::image is a plane
// here, its rows are counted from the plane's first.
struct Plan {
  int64_t tile_columns;  // per row of tiles
  int64_t pieces_per_plane, out_rows, piece_count, pieces_per_block, blocks;

  template <class T>
  FMK_INLINE Plan of(const Correlation<T>& p, int64_t threads) {
    Plan plan;
    plan.tile_columns = ceil_div(p.x.out_size, kTile);
    plan.out_rows = p.pool.kernel_h ? p.pool.out_height : p.y.out_size;
    const int64_t plane_tiles = ceil_div(p.y.out_size, kTile) * plan.tile_columns;
    const int64_t total = plane_tiles * plane_count(p);
    // As many blocks as the threads can share evenly; but of few tiles the threads share the output
    // channels, lest each of them read the whole weight.
    constexpr int64_t kMinShare = 24;
    const bool share_channels =
        total < kMinShare * threads && PanelSplit<VecF>::of(p.out_channels).count >= threads;
    const int64_t even = share_channels ? 1 : threads;
    const int64_t blocks = ceil_div(ceil_div(total, block_tiles(reduction(p))), even) * even;
    const int64_t tiles = max_of<int64_t>(1, ceil_div(total, blocks));
    if (plane_tiles <= tiles) {
      plan.pieces_per_plane = 1;
      plan.pieces_per_block = min_of(kMaxPieces, tiles / plane_tiles);
    } else {
      const int64_t tile_rows = max_of<int64_t>(1, tiles / plan.tile_columns);
      const int64_t step = out_row_step(p), rows = tile_rows * kTile / pool_stride(p) / step * step;
      plan.pieces_per_plane = ceil_div(plan.out_rows, max_of(step, rows));
      plan.pieces_per_block = 1;
    }
    plan.piece_count = plan.pieces_per_plane * plane_count(p);
    plan.blocks = ceil_div(plan.piece_count, plan.pieces_per_block);
    return plan;
  }

  template <class T>
  Piece piece(const Correlation<T>& p, int64_t index) const {
    Piece piece;
    piece.image = index / pieces_per_plane;
    const int64_t part = index % pieces_per_plane;
    const int64_t step = out_row_step(p), units = ceil_div(out_rows, step);
    piece.out_begin = min_of(out_rows, units * part / pieces_per_plane * step);
    piece.out_end = min_of(out_rows, units * (part + 1) / pieces_per_plane * step);
    piece.begin = conv_begin(p, piece.out_begin);
    piece.end = conv_end(p, piece.out_end);
    piece.own_begin = part == 0 ? 0 : conv_end(p, piece.out_begin);
    // Rows that no window needs still belong to the pre-activation.
    if (p.preactivation && part == 0) piece.begin = 0;
    if (p.preactivation && part + 1 == pieces_per_plane) piece.end = p.y.out_size;
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

// One row of tiles of a piece: conv rows [y, y + rows), rows <= kTile, which are rows block_row,
// ... of the block. `index` counts the short rows and the whole ones apart.
struct TileRow {
  int64_t plane, y;
  int rows;
  int64_t block_row, index;
};

// The order of a block's tiles in the transformed operands: short rows of tiles, whole tiles, short
// columns, and what is both. Tiles that have a product at a point are then neighbours.
struct Slots {
  int64_t short_rows, whole_rows, whole_columns;  // rows and columns of tiles
  int rows, columns;                              // outputs of a short row, of a short column

  int64_t count() const {
    return (short_rows + whole_rows) * (whole_columns + (columns < kTile ? 1 : 0));
  }
  int64_t of(const TileRow& row, int64_t column) const {
    const bool short_row = row.rows < kTile;
    if (column < whole_columns)
      return ((short_row ? 0 : short_rows) + row.index) * whole_columns + column;
    return (short_rows + whole_rows) * whole_columns + (short_row ? whole_rows : 0) + row.index;
  }
  // The tiles with a product at row y, column x of the points.
  void range(int y, int x, int64_t* begin, int64_t* end) const {
    const bool in_short_rows = edge_has_point(rows, y);
    *begin = in_short_rows ? 0 : short_rows * whole_columns;
    *end = (short_rows + whole_rows) * whole_columns;
    if (columns < kTile && edge_has_point(columns, x))
      *end += whole_rows + (in_short_rows ? short_rows : 0);
  }
};

// Where the outputs of a tile go and what happens to them on the way: clamp(scale * y + shift +
// residual). `pool`: only the maxima of 2 x 2 outputs are stored.
template <class S>
struct TileSink {
  VecF scale, shift, low, high;
  S* out;
  const S* residual;  // laid out as out, or null
  int64_t row_step, column_step;
  int lanes;  // channels that exist
  bool pool, streams;

  FMK_LAMBDA VecF finished(int i, int j, VecF y) const {
    VecF z = fma(y, scale, shift);
    if (residual) z = z + load(residual + i * row_step + j * column_step, lanes);
    return min(high, max(low, z));
  }
  FMK_LAMBDA void put(int i, int j, VecF z) const {
    S* to = out + i * row_step + j * column_step;
    if (streams)
      stream(to, z);
    else if (lanes == W)
      store(to, z);
    else
      store(to, z, lanes);
  }
};
// max that propagates NaN from either side.
FMK_INLINE VecF larger(VecF a, VecF b) { return select(is_nan(a), a, max(a, b)); }

template <int RY, int RX, class Put>
FMK_INLINE void output_of_size(const float* m, const Put& put) {
  if constexpr (RY == kTile && RX == kTile)
    transform_output<F>(m, put);
  else
    transform_edge_output<RY, RX>(m, put);
}
// noinline: as for the transform of the input.
template <int RY, int RX, class S>
FMK_NOINLINE void finish_tile(const float* m, const TileSink<S>& sink) {
  if (!sink.pool)
    return output_of_size<RY, RX>(
        m, [&](int i, int j, VecF y) FMK_LAMBDA { sink.put(i, j, sink.finished(i, j, y)); });
  VecF z[RY][RX];
  output_of_size<RY, RX>(
      m, [&](int i, int j, VecF y) FMK_LAMBDA { z[i][j] = sink.finished(i, j, y); });
  FMK_FOR (i, RY / 2)
    FMK_FOR (j, RX / 2) {
      const VecF top = larger(z[2 * i][2 * j], z[2 * i][2 * j + 1]);
      const VecF bottom = larger(z[2 * i + 1][2 * j], z[2 * i + 1][2 * j + 1]);
      sink.put(i, j, larger(top, bottom));
    }
}

// body(Constant<n>) for n in [1, kTile].
template <int N = 1, class Body>
FMK_INLINE void with_size(int n, const Body& body) {
  if constexpr (N < kTile) {
    if (n != N) return with_size<N + 1>(n, body);
  }
  body(Constant<N>{});
}

template <class T>
class BlockRunner {
 public:
  BlockRunner(const Correlation<T>& p, const Plan& plan) : p_(p), plan_(plan) {
    const PoolShape& q = p.pool;
    const bool average = q.kernel_h && q.kind == PoolKind::kAverage;
    const bool clamps =
        p.activation <= Activation::kRelu6 && !p.preactivation && !(average && p.argmax);
    const bool halves = q.kernel_h == 2 && q.kernel_w == 2 && q.stride_h == 2 && q.stride_w == 2 &&
                        !q.padding_h && !q.padding_w && !average && !p.argmax && !p.residual;
    pooled_ = halves && clamps && p.channels_last;
    direct_ = clamps && p.channels_last && (!q.kernel_h || pooled_);
    finished_ = direct_ || (clamps && !p.residual);
    const int64_t pixels = pooled_ ? q.out_height * q.out_width : p.y.out_size * p.x.out_size;
    streams_ = direct_ && !p.moments.wanted() &&
               streamed(p.output, plane_count(p) * pixels, p.out_channels);
  }
  bool streams() const { return streams_; }

  // Pieces [first, last) of the plan and panels [panel_begin, panel_end).
  void run(int64_t shard, int64_t first, int64_t last, int64_t panel_begin, int64_t panel_end) {
    collect(first, last);
    const int64_t tiles = slots_.count();
    if (tiles == 0) return;
    // One more line per tile: tiles whose size is a multiple of 4 KB would share L1 sets.
    const int64_t ld_input = reduction(p_) * kPointCount + 16;
    auto* inputs =
        static_cast<float*>(scratch_bytes(Scratch::kRows, tiles * ld_input * sizeof(float)));
    if (p_.reads_pixels())
      transform_inputs<T>(inputs, ld_input);
    else
      transform_inputs<float>(inputs, ld_input);

    const auto split = PanelSplit<VecF>::of(p_.out_channels);
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const int vecs = split.width_vecs(panel);
      const int64_t width = vecs * W, column = split.column(panel);
      const int64_t ld_product = width * kPointCount + 16;
      auto* products = static_cast<float*>(
          scratch_bytes(Scratch::kAccumulator, tiles * ld_product * sizeof(float)));
      multiply(inputs, ld_input,
               static_cast<const float*>(p_.weight) + column * kPointCount * reduction(p_), vecs,
               products, ld_product);
      if (direct_) {
        const int64_t step = pooled_ ? 2 : 1;
        const int64_t height = p_.y.out_size / step, image_width = p_.x.out_size / step;
        finish_tiles<T>(
            products, ld_product, column, vecs, p_.out_channels, image_width, step,
            [&](const TileRow& row) {
              const int64_t at =
                  (row.plane * height + row.y / step) * image_width * p_.out_channels + column;
              return Target<T>{p_.output + at, p_.residual ? p_.residual + at : nullptr};
            });
        add_moments(shard, column, min_of(p_.out_channels, column + width));
        continue;
      }
      auto* rows = static_cast<float*>(
          scratch_bytes(Scratch::kTile, block_rows_ * p_.x.out_size * width * sizeof(float)));
      finish_tiles<float>(products, ld_product, column, vecs, width, p_.x.out_size, 1,
                          [&](const TileRow& row) {
                            const int64_t at = row.block_row * p_.x.out_size * width;
                            return Target<float>{rows + at, nullptr};
                          });
      const Finisher<T> finisher{p_, column, min_of(width, p_.out_channels - column), width,
                                 finished_};
      for (int i = 0; i < piece_count_; ++i) finisher.run(in_image(pieces_[i]), rows);
      add_moments(shard, column, min_of(p_.out_channels, column + width));
    }
  }

 private:
  // A piece of a plane as one of its image, whose rows are those of all planes.
  Piece in_image(const Piece& of_plane) const {
    Piece piece = of_plane;
    piece.image = of_plane.image / p_.z.out_size;
    const int64_t rows = of_plane.image % p_.z.out_size * p_.y.out_size;
    for (int64_t* row :
         {&piece.out_begin, &piece.out_end, &piece.begin, &piece.end, &piece.own_begin})
      *row += rows;
    return piece;
  }
  void add_moments(int64_t shard, int64_t first, int64_t last) const {
    if (!p_.moments.wanted()) return;
    for (int i = 0; i < piece_count_; ++i) {
      const Piece piece = in_image(pieces_[i]);
      p_.moments.add(shard, piece.image, piece.begin * p_.x.out_size, piece.end * p_.x.out_size,
                     first, last);
    }
  }

  void collect(int64_t first, int64_t last) {
    piece_count_ = 0;
    tile_row_count_ = block_rows_ = 0;
    const int columns = static_cast<int>(p_.x.out_size % kTile);
    slots_ = {0, 0, p_.x.out_size / kTile, kTile, columns ? columns : kTile};
    for (int64_t index = first; index < last; ++index) {
      Piece& piece = pieces_[piece_count_++];
      piece = plan_.piece(p_, index);
      piece.first_row = block_rows_;
      for (int64_t y = piece.begin; y < piece.end; y += kTile) {
        const int rows = static_cast<int>(min_of<int64_t>(kTile, piece.end - y));
        const bool is_short = rows < kTile;
        // Only whole planes come several to a block, so all its short rows are equal.
        if (is_short) slots_.rows = rows;
        int64_t& count = is_short ? slots_.short_rows : slots_.whole_rows;
        tile_rows_[tile_row_count_++] = {piece.image, y, rows, block_rows_ + y - piece.begin,
                                         count++};
      }
      block_rows_ += piece.end - piece.begin;
    }
  }

  // inputs[slot][tap_z][channels / W][point][W], from pixels of type S: NHWC where they lie, or
  // staged.
  template <class S>
  void transform_inputs(float* inputs, int64_t ld) {
    const int64_t channels = p_.channels, columns = plan_.tile_columns;
    // A staged row starts where the first tile's window does and ends with the last tile's.
    const int64_t staged_pixels = columns * kTile + kWindow - kTile;
    const int64_t staged_words = p_.reads_pixels() ? 0 : staged_pixels * channels;
    auto* zero_row = static_cast<S*>(
        scratch_bytes(Scratch::kExtra, (channels + kWindow * staged_words) * sizeof(S)));
    std::memset(static_cast<void*>(zero_row), 0, channels * sizeof(S));
    for (int64_t tap = 0; tap < p_.z.taps; ++tap)
      transform_planes(tap, zero_row, staged_pixels, staged_words,
                       inputs + tap * channels * kPointCount, ld);
  }
  // Those of the planes under one tap along the depth. zero_row: zeros for a pixel, and behind it
  // the ring of kWindow staged rows.
  template <class S>
  void transform_planes(int64_t tap, S* zero_row, int64_t staged_pixels, int64_t staged_words,
                        float* inputs, int64_t ld) {
    const int64_t channels = p_.channels, columns = plan_.tile_columns;
    S* staged = zero_row + channels;
    // Input rows [staged_from, staged_to) of a plane are in the ring.
    int64_t staged_from = 0, staged_to = 0, staged_plane = -1;

    for (int64_t r = 0; r < tile_row_count_; ++r) {
      const TileRow& row = tile_rows_[r];
      const T* image = p_.input + row.plane / p_.z.out_size * channels * p_.z.in_size *
                                      p_.y.in_size * p_.x.in_size;
      const int64_t z = p_.z.position(row.plane % p_.z.out_size, tap);
      const bool plane_inside = z >= 0 && z < p_.z.in_size;
      const int64_t top = row.y + p_.y.offset;
      if (!p_.reads_pixels() && plane_inside) {
        if constexpr (std::is_same_v<S, float>) {
          const RowStage<T, float> stage{
              false,        1,           channels,     p_.z.in_size * p_.y.in_size,
              p_.x.in_size, p_.x.offset, staged_pixels};
          if (staged_plane != row.plane || top < staged_from) staged_to = top;
          for (int64_t y = max_of(top, staged_to); y < top + kWindow; ++y)
            if (y >= 0 && y < p_.y.in_size)
              stage.run(image, z * p_.y.in_size + y, staged + wrapped(y) * staged_words);
          staged_from = top;
          staged_to = top + kWindow;
          staged_plane = row.plane;
        }
      }
      const auto find_window = [&](int64_t tile, const S** window) {
        for (int i = 0; i < kWindow; ++i) {
          const int64_t y = top + i, x0 = tile * kTile + p_.x.offset;
          const bool row_inside = plane_inside && y >= 0 && y < p_.y.in_size;
          const S* from = p_.reads_pixels()
                              ? reinterpret_cast<const S*>(image) +
                                    ((z * p_.y.in_size + y) * p_.x.in_size + x0) * channels
                              : staged + wrapped(y) * staged_words + tile * kTile * channels;
          for (int j = 0; j < kWindow; ++j) {
            const bool inside = row_inside && x0 + j >= 0 && x0 + j < p_.x.in_size;
            window[j * kWindow + i] = inside ? from + j * channels : zero_row;
          }
        }
      };
      const S* windows[2][kPointCount];
      find_window(0, windows[0]);
      for (int64_t tile = 0; tile < columns; ++tile) {
        const S** window = windows[tile % 2];
        const S** next = windows[(tile + 1) % 2];
        find_window(min_of(tile + 1, columns - 1), next);
        const int width = tile < slots_.whole_columns ? kTile : slots_.columns;
        float* out = inputs + slots_.of(row, tile) * ld;
        if (row.rows == kTile && width == kTile) {
          transform_input<F>(window, next, channels, out);
        } else {
          with_size(row.rows, [&](auto ry) {
            with_size(width, [&](auto rx) {
              transform_edge_input<decltype(ry)::value, decltype(rx)::value>(window, channels, out);
            });
          });
        }
      }
    }
  }
  static int64_t wrapped(int64_t y) { return (y % kWindow + kWindow) % kWindow; }

  // products[slot][vec][point][W] of one panel.
  void multiply(const float* inputs, int64_t ld_input, const float* panel, int vecs,
                float* products, int64_t ld_product) {
    const int64_t width = vecs * W;
    // Long reductions are cut so that a slice of the panel stays in L1 while all tiles pass over
    // it: a panel of any width comes from L2 once, and not once per row tile.
    const int64_t numbers = reduction(p_);
    // Planes are summed apart: a sum of sums keeps the rounding error near that of one plane.
    const int64_t fitting = numbers <= kSlice + kSlice / 2 ? 1 : ceil_div(numbers, kSlice);
    const int64_t slices = max_of(fitting, p_.z.taps);
    for (int point = 0; point < kPointCount; ++point, panel += numbers * width) {
      int64_t begin, end;
      slots_.range(point / kWindow, point % kWindow, &begin, &end);
      const int64_t tiles = ceil_div(end - begin, int64_t{kTileRows[vecs]});
      if (tiles == 0) continue;
      const int64_t rows = (end - begin) / tiles, longer = (end - begin) % tiles;  // by one row
      for (int64_t slice = 0; slice < slices; ++slice) {
        const int64_t vec0 = numbers / W * slice / slices,
                      vec1 = numbers / W * (slice + 1) / slices;
        PointProduct in;
        in.a = inputs + begin * ld_input + (vec0 * kPointCount + point) * W;
        in.lda = ld_input;
        in.b = panel + vec0 * W * width;
        in.vecs = vec1 - vec0;
        in.out = products + begin * ld_product + point * W;
        in.ld_out = ld_product;
        in.vec_step = kPointCount * W;
        in.add = slice > 0;
        // The next slice of the panel lies behind this one.
        in.soon = panel + vec1 * W * width;
        in.fetched = ceil_div(width, 16) - tiles;
        in.tiles = longer;
        if (longer > 0) multiply_point(static_cast<int>(rows + 1), vecs, in);
        in.a += longer * (rows + 1) * in.lda;
        in.out += longer * (rows + 1) * in.ld_out;
        in.fetched += longer;
        in.tiles = tiles - longer;
        multiply_point(static_cast<int>(rows), vecs, in);
      }
    }
  }

  template <class S>
  struct Target {
    S* out;
    const S* residual;
  };
  // The outputs of one panel, pixels `ld` apart in rows of `image_width`; `step`: conv pixels per
  // pixel of the target. target(row) is the first pixel of a row of tiles.
  template <class S, class FindTarget>
  void finish_tiles(const float* products, int64_t ld_product, int64_t column, int vecs, int64_t ld,
                    int64_t image_width, int64_t step, const FindTarget& target) const {
    constexpr float kInfinity = __builtin_inff();
    const bool clamp = finished_ && p_.activation != Activation::kNone;
    TileSink<S> sink;
    sink.low = splat(clamp ? 0.0f : -kInfinity);
    sink.high = splat(clamp && p_.activation == Activation::kRelu6 ? 6.0f : kInfinity);
    sink.row_step = image_width * ld;
    sink.column_step = ld;
    sink.pool = pooled_;
    sink.streams = streams_;
    for (int vec = 0; vec < vecs; ++vec) {
      const int64_t channel = column + vec * W;
      sink.scale = finished_ && p_.scale ? load(p_.scale + channel) : splat(1.0f);
      sink.shift = finished_ && p_.shift ? load(p_.shift + channel) : zero<VecF>();
      sink.lanes = direct_ ? static_cast<int>(min_of<int64_t>(W, p_.out_channels - channel)) : W;
      for (int64_t r = 0; r < tile_row_count_; ++r) {
        const TileRow& row = tile_rows_[r];
        const Target<S> first = target(row);
        for (int64_t tile = 0; tile < plan_.tile_columns; ++tile) {
          const int64_t at = tile * kTile / step * ld + vec * W;
          const int width = tile < slots_.whole_columns ? kTile : slots_.columns;
          const float* m = products + slots_.of(row, tile) * ld_product + vec * kPointCount * W;
          sink.out = first.out + at;
          sink.residual = first.residual ? first.residual + at : nullptr;
          if (row.rows == kTile && width == kTile) {
            finish_tile<kTile, kTile>(m, sink);
          } else {
            with_size(row.rows, [&](auto ry) {
              with_size(width, [&](auto rx) {
                finish_tile<decltype(ry)::value, decltype(rx)::value>(m, sink);
              });
            });
          }
        }
      }
    }
  }

  const Correlation<T>& p_;
  const Plan& plan_;
  bool pooled_;    // the 2 x 2 maxima go straight to the output
  bool direct_;    // the outputs, too
  bool streams_;   // past the caches
  bool finished_;  // tiles leave their transform with the whole epilogue but the pool done
  Piece pieces_[kMaxPieces];
  int piece_count_ = 0;
  TileRow tile_rows_[4 * kMaxBlockTiles];
  int64_t tile_row_count_ = 0, block_rows_ = 0;
  Slots slots_{};
};

}  // namespace

template <class T>
void correlate_winograd(const Correlation<T>& p, const Parallel& pool) {
  const auto split = PanelSplit<VecF>::of(p.out_channels);
  const Plan plan = Plan::of(p, pool.threads);
  // Where there is less than a block per thread, the threads share the output channels of each
  // instead.
  const int64_t parts =
      plan.blocks >= pool.threads ? 1 : min_of<int64_t>(pool.threads, split.count);
  const int64_t units = plan.blocks * parts;
  WorkShares work(min_of<int64_t>(pool.threads, units), units, p.moments.sharing());
  parallel_for(pool, work.count(), [&](int64_t shard) {
    BlockRunner<T> runner(p, plan);
    for (int64_t unit; work.take(shard, &unit);) {
      const int64_t block = unit / parts, part = unit % parts;
      const int64_t first = block * plan.pieces_per_block;
      runner.run(shard, first, min_of(plan.piece_count, first + plan.pieces_per_block),
                 split.count * part / parts, split.count * (part + 1) / parts);
    }
    if (runner.streams()) stream_end();
  });
}

#define FMK_INSTANTIATE(T) template void correlate_winograd(const Correlation<T>&, const Parallel&);
FMK_INSTANTIATE(float)
FMK_INSTANTIATE(bf16)
FMK_INSTANTIATE(f16)
#undef FMK_INSTANTIATE

}  // namespace fmk::FMK_ISA
