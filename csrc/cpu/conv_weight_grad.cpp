// The gradient of a convolution's weight: a GEMM whose reduction runs over pixels.
//
//   grad_weight[tap, c][k] = sum over pixels of input[pixel + tap][c] * grad[pixel][k]
//
// Blocks of output rows: the gradient's pixels are packed as panels of channels k, and the staged
// input rows are read reduction-major, a row of the tile being one (tap, c). Every thread adds up
// its share of the pixels in a buffer of its own; the buffers are added in a fixed order. 16-bit
// types are widened to float.

#include "cpu/conv_internal.h"
#include "cpu/conv_rows.h"

namespace fmk::FMK_ISA {
namespace {

constexpr int64_t kBlockPixels = 256;
constexpr int64_t kMaxBufferBytes = 256 << 20;  // for the threads' buffers together

template <class A>
struct MacOfAcc {
  using Type = MacF32;
};
template <>
struct MacOfAcc<double> {
  using Type = MacF64;
};

template <class T>
struct WeightGrad {
  using V = Vec<T>;
  using A = Acc<T>;
  using M = typename MacOfAcc<A>::Type;
  const WeightGradient<T>& p;
  bool depthwise;
  int64_t groups, channels, out_channels;  // depthwise counts as one group of all channels
  RowStage<T, A> stage;
  PanelSplit<V> split;  // of out_channels
  int64_t rows, blocks, shards;
  int64_t run_rows, runs;  // rows of the result per (kernel row, run): taps * channels of the
                           // taps that lie side by side in a staged row
  int64_t panel_rows;      // of the result: taps * channels
  int64_t buffer;          // numbers in a thread's buffer: the products, then the sums
  A* buffers;

  WeightGrad(const WeightGradient<T>& problem, const Parallel& pool) : p(problem) {
    depthwise = p.channels == 1 && p.out_channels == 1 && p.groups > 1;
    groups = depthwise ? 1 : p.groups;
    channels = depthwise ? p.groups : p.channels;
    out_channels = depthwise ? p.groups : p.out_channels;
    stage = {p.channels_last, groups,     channels,   p.z.in_size * p.y.in_size,
             p.x.in_size,     p.x.offset, p.x.span(), p.padding};
    split = PanelSplit<V>::of(out_channels);
    const bool joined = p.x.step == 1 || p.x.taps == 1;
    run_rows = joined ? p.x.taps * channels : channels;
    runs = joined ? 1 : p.x.taps;
    panel_rows = depthwise ? p.row_taps() * p.x.taps : p.row_taps() * p.x.taps * channels;
    const int64_t sums = groups * split.padded_columns();
    buffer = sums * panel_rows + sums;
    rows = p.batch * p.out_rows();
    int64_t per_block = max_of<int64_t>(1, kBlockPixels / max_of<int64_t>(1, p.x.out_size));
    per_block = min_of(per_block, (kMaxPieces - 2) * max_of<int64_t>(1, p.out_rows()));
    blocks = ceil_div(rows, per_block);
    const double flops =
        2.0 * static_cast<double>(rows * p.x.out_size) * static_cast<double>(buffer);
    shards = flops < kSerialFlops ? 1 : pool.threads;
    shards = min_of(shards, max_of<int64_t>(1, kMaxBufferBytes / (buffer * int64_t(sizeof(A)))));
    shards = max_of<int64_t>(1, min_of(shards, blocks));
    blocks = ceil_div(blocks, shards) * shards;
    buffers = static_cast<A*>(scratch_bytes(Scratch::kCall, shards * buffer * sizeof(A)));
  }

  void run_shard(int64_t shard) const {
    A* products = buffers + shard * buffer;
    std::memset(static_cast<void*>(products), 0, buffer * sizeof(A));
    for (int64_t block = blocks * shard / shards; block < blocks * (shard + 1) / shards; ++block)
      run_block(rows * block / blocks, rows * (block + 1) / blocks, products,
                products + buffer - groups * split.padded_columns());
  }

  void run_block(int64_t row0, int64_t row1, A* products, A* sums) const {
    if (row0 == row1) return;
    Block<A> block;
    for (int64_t row = row0; row < row1;) {
      Piece piece{};
      piece.image = row / p.out_rows();
      piece.begin = piece.out_begin = row - piece.image * p.out_rows();
      piece.end = piece.out_end = min_of(p.out_rows(), piece.begin + row1 - row);
      piece.first_row = block.rows;
      block.rows += piece.end - piece.begin;
      block.pieces[block.piece_count++] = piece;
      row += piece.end - piece.begin;
    }
    if (p.grad_weight) gather_rows(p.input, p.z, p.y, stage, false, block.rows, &block);
    for (int64_t index = 0; index < groups * split.count; ++index) {
      const int64_t group = index / split.count, panel = index % split.count;
      const int64_t column = split.column(panel), width = split.width_vecs(panel) * V::W;
      const int64_t channel = group * out_channels + column;
      const int64_t padded = group * split.padded_columns() + column;
      const A* grads = pack_grads(block, channel, min_of(width, out_channels - column), width);
      add_sums(grads, block.rows * p.x.out_size, width, sums + padded);
      if (!p.grad_weight) continue;
      if (depthwise)
        multiply_channels(block, grads, column, width, products);
      else
        multiply(block, grads, group, panel, products + padded * panel_rows);
    }
  }

  // The block's pixels of the gradient as a panel [pixels][width].
  const A* pack_grads(const Block<A>& block, int64_t channel, int64_t columns,
                      int64_t width) const {
    const int64_t total = groups * out_channels, image = p.out_rows() * p.x.out_size;
    if constexpr (sizeof(T) == sizeof(A)) {
      const Piece& first = block.pieces[0];
      if (p.channels_last && groups == 1 && width == total)
        return p.grad + (first.image * image + first.begin * p.x.out_size) * total;
    }
    const int64_t pixels = block.rows * p.x.out_size;
    auto* panel = static_cast<A*>(scratch_bytes(Scratch::kPanel, pixels * width * sizeof(A)));
    if (columns < width) std::memset(static_cast<void*>(panel), 0, pixels * width * sizeof(A));
    for (int i = 0; i < block.piece_count; ++i) {
      const Piece& piece = block.pieces[i];
      const int64_t n = (piece.end - piece.begin) * p.x.out_size;
      const int64_t first = piece.begin * p.x.out_size;
      A* to = panel + piece.first_row * p.x.out_size * width;
      if (!p.channels_last) {
        const T* from = p.grad + (piece.image * total + channel) * image + first;
        planes_to_pixels(from, image, n, columns, to, width);
      } else {
        const T* from = p.grad + (piece.image * image + first) * total + channel;
        for (int64_t pixel = 0; pixel < n; ++pixel, from += total, to += width)
          convert(from, to, columns);
      }
    }
    return panel;
  }

  static void add_sums(const A* grads, int64_t pixels, int64_t width, A* sums) {
    for (int64_t j = 0; j < width; j += V::W) {
      V even = zero<V>(), odd = zero<V>();
      int64_t pixel = 0;
      for (; pixel + 2 <= pixels; pixel += 2) {
        even = even + load(grads + pixel * width + j);
        odd = odd + load(grads + (pixel + 1) * width + j);
      }
      if (pixel < pixels) even = even + load(grads + pixel * width + j);
      store(sums + j, load(sums + j) + (even + odd));
    }
  }

  void multiply(const Block<A>& block, const A* grads, int64_t group, int64_t panel,
                A* products) const {
    const int vecs = split.width_vecs(panel);
    const int64_t width = vecs * V::W;
    TileOperands<M> in;
    in.rows = block.pointers;
    in.lda = p.x.stride * channels;
    in.batch = block.rows;
    in.words = p.x.out_size;
    in.b = grads;
    in.ld_init = width;
    const auto tiles = RowTiles::of(run_rows, vecs);
    // Tiles outermost: the taps of a tile's channels find them in L1.
    for (int64_t t = 0; t < tiles.tiles; ++t)
      for (int64_t ty = 0; ty < p.row_taps(); ++ty)
        for (int64_t run = 0; run < runs; ++run) {
          const int64_t offset =
              group * stage.group_words() + run * p.x.step * channels + tiles.begin(t);
          for (int64_t row = 0; row < block.rows; ++row)
            block.pointers[row] = block.table[row * p.row_taps() + ty] + offset;
          A* to = products + ((ty * runs + run) * run_rows + tiles.begin(t)) * width;
          in.init = to;
          run_tile<M, true>(tiles.rows(t), vecs, in, StoreAccumulators<V>{to, width});
        }
  }

  // Depthwise: products[tap][channel] += input[pixel + tap][channel] * grad[pixel][channel].
  void multiply_channels(const Block<A>& block, const A* grads, int64_t column, int64_t width,
                         A* products) const {
    constexpr int64_t kTaps = 4;  // taps of a kernel row that share the loads of the gradient
    const int64_t padded = split.padded_columns();
    for (int64_t j = 0; j < width; j += V::W)
      for (int64_t ty = 0; ty < p.row_taps(); ++ty)
        for (int64_t tx = 0; tx < p.x.taps; tx += kTaps) {
          const int64_t taps = min_of(kTaps, p.x.taps - tx);
          V sum[kTaps] = {zero<V>(), zero<V>(), zero<V>(), zero<V>()};
          for (int64_t row = 0; row < block.rows; ++row) {
            const A* from =
                block.table[row * p.row_taps() + ty] + tx * p.x.step * channels + column + j;
            const A* grad = grads + row * p.x.out_size * width + j;
            const int64_t tap_step = p.x.step * channels;
            for (int64_t x = 0; x < p.x.out_size;
                 ++x, from += p.x.stride * channels, grad += width) {
              const V factor = load(grad);
              if (taps == 3) {
                FMK_FOR (i, 3) sum[i] = fma(load(from + i * tap_step), factor, sum[i]);
              } else {
                for (int64_t i = 0; i < taps; ++i)
                  sum[i] = fma(load(from + i * tap_step), factor, sum[i]);
              }
            }
          }
          for (int64_t i = 0; i < taps; ++i) {
            A* to = products + (ty * p.x.taps + tx + i) * padded + column + j;
            store(to, load(to) + sum[i]);
          }
        }
  }

  // The buffers' total at `offset`.
  V total(int64_t offset) const {
    V sum = load(buffers + offset);
    for (int64_t shard = 1; shard < shards; ++shard)
      sum = sum + load(buffers + shard * buffer + offset);
    return sum;
  }

  // One vector of output channels of the result.
  void finish(int64_t group, int64_t vec) const {
    int64_t panel = 0;
    while (split.first_vec(panel + 1) <= vec) ++panel;
    const int64_t width = split.width_vecs(panel) * V::W;
    const int64_t column = vec * V::W, valid = min_of<int64_t>(V::W, out_channels - column);
    const int64_t channel = group * out_channels + column;
    const V scale = p.scale ? load(p.scale + channel, static_cast<int>(valid)) : splat_as<V>(1);
    const V sum =
        total(buffer - groups * split.padded_columns() + group * split.padded_columns() + column);
    if (p.grad_shift) store(p.grad_shift + channel, sum, static_cast<int>(valid));
    if (p.grad_bias) store(p.grad_bias + channel, sum * scale, static_cast<int>(valid));
    if (!p.grad_weight) return;
    const int64_t taps = p.row_taps() * p.x.taps;
    if (depthwise) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        A values[V::W];
        store(values, total(tap * split.padded_columns() + column) * scale);
        for (int64_t i = 0; i < valid; ++i)
          narrow(p.grad_weight + (channel + i) * taps + tap, values[i]);
      }
      return;
    }
    const int64_t first = (group * split.padded_columns() + split.column(panel)) * panel_rows +
                          column - split.column(panel);
    // Sixteen numbers of every channel's row at a time, so that stores are not scattered one by
    // one.
    constexpr int64_t kRun = 16;
    A values[kRun][V::W];
    for (int64_t i = 0; i < panel_rows; i += kRun) {
      const int64_t n = min_of(kRun, panel_rows - i);
      for (int64_t j = 0; j < n; ++j) {
        const int64_t c = (i + j) / taps, tap = (i + j) % taps;
        store(values[j], total(first + (tap * channels + c) * width) * scale);
      }
      for (int64_t k = 0; k < valid; ++k) {
        T* to = p.grad_weight + (channel + k) * panel_rows + i;
        for (int64_t j = 0; j < n; ++j) narrow(to + j, values[j][k]);
      }
    }
  }
};

}  // namespace

template <class T>
void weight_gradient(const WeightGradient<T>& p, const Parallel& pool) {
  const WeightGrad<T> work(p, pool);
  parallel_for(pool, work.shards, [&](int64_t shard) { work.run_shard(shard); });
  const int64_t units = work.groups * work.split.vecs;
  const int64_t shards = work.buffer < 16384 ? 1 : min_of<int64_t>(pool.threads, units);
  parallel_for(pool, shards, [&](int64_t shard) {
    for (int64_t unit = units * shard / shards; unit < units * (shard + 1) / shards; ++unit)
      work.finish(unit / work.split.vecs, unit % work.split.vecs);
  });
}

template void weight_gradient(const WeightGradient<float>&, const Parallel&);
template void weight_gradient(const WeightGradient<bf16>&, const Parallel&);
template void weight_gradient(const WeightGradient<f16>&, const Parallel&);
template void weight_gradient(const WeightGradient<double>&, const Parallel&);

}  // namespace fmk::FMK_ISA
