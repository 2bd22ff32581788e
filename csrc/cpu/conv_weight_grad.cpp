// The gradient of a convolution's weight: a GEMM whose reduction runs over pixels.
//
//   grad_weight[tap, c][k] = sum over pixels of input[pixel + tap][c] * grad[pixel][k]
//
// Blocks of output rows: the gradient's pixels are packed as panels of channels k, and the staged
// input rows are read reduction-major, a row of the tile being one (tap, c). Every thread adds up
// its share of the pixels in a buffer of its own, and the buffers are added in a fixed order; or,
// where pixels are few for the size of the result, its share of the result over all pixels.
//
// 16-bit types are widened to float, but for pairs of bf16: a word holds the same pixel of two
// output rows, those of the first and the second half of a thread's rows, so that taps of any
// alignment find their pairs side by side.

#include "cpu/conv_internal.h"
#include "cpu/conv_rows.h"
#include "cpu/conv_weight_grad_depthwise.h"

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

template <class T, class M>
struct WeightGrad {
  using V = Vec<T>;
  using A = Acc<T>;
  using D = typename M::Word;  // of staged rows and of panels
  static constexpr int kPair = M::kPair;
  const WeightGradient<T>& p;
  bool depthwise;
  int64_t groups, channels, out_channels;  // depthwise counts as one group of all channels
  RowStage<T, A> stage;
  PanelSplit<V> split;  // of out_channels
  int64_t rows, block_rows;
  int64_t shards, parts;   // of the pixels, and of the result's panels
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
    const double flops =
        2.0 * static_cast<double>(rows * p.x.out_size) * static_cast<double>(buffer);
    const int64_t threads = flops < kSerialFlops ? 1 : pool.threads;
    block_rows = max_of<int64_t>(1, kBlockPixels / max_of<int64_t>(1, p.x.out_size));
    block_rows = min_of(block_rows, (kMaxPieces - 2) * max_of<int64_t>(1, p.out_rows()));
    // A share of the result costs staging all pixels of all channels once more, a share of the
    // pixels another buffer to clear and to add up.
    const int64_t panels = groups * split.count;
    const bool even = panels % threads == 0 || panels >= 4 * threads;
    const bool few_pixels = rows * p.x.out_size < p.row_taps() * p.x.taps * out_channels;
    parts = even && few_pixels && !depthwise ? threads : 1;
    shards = parts > 1 ? 1 : threads;
    shards = min_of(shards, max_of<int64_t>(1, kMaxBufferBytes / (buffer * int64_t(sizeof(A)))));
    shards = max_of<int64_t>(1, min_of(shards, rows));
    buffers = static_cast<A*>(scratch_bytes(Scratch::kCall, shards * buffer * sizeof(A)));
  }

  // Unit `unit` of shards * parts.
  void run(int64_t unit) const {
    const int64_t shard = unit / parts, part = unit % parts, panels = groups * split.count;
    const int64_t panel0 = panels * part / parts, panel1 = panels * (part + 1) / parts;
    A* products = buffers + shard * buffer;
    A* sums = products + buffer - groups * split.padded_columns();
    const int64_t row0 = rows * shard / shards, row1 = rows * (shard + 1) / shards;
    const int64_t word_rows = ceil_div(row1 - row0, kPair);
    const int64_t blocks = ceil_div(word_rows, block_rows);
    clear(products, sums, panel0, panel1, depthwise || blocks == 0);
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = word_rows * i / blocks, last = word_rows * (i + 1) / blocks;
      Block<D> block;
      block.rows = last - first;
#if FMK_BF16_DOT
      if constexpr (kPair == 2) {
        const int64_t second = row0 + word_rows + first;
        const RowPairs pairs{row0 + first, second, max_of<int64_t>(0, row1 - second)};
        if (p.grad_weight) gather_pairs(pairs, &block);
        run_block(
            block,
            [&](int64_t channel, int64_t columns, int64_t width) {
              return pack_pairs(pairs, block.rows, channel, columns, width);
            },
            panel0, panel1, i == 0, products, sums);
        continue;
      }
#endif
      if constexpr (kPair == 1) {
        find_pieces(row0 + first, &block);
        if (p.grad_weight) gather_rows(p.input, p.z, p.y, stage, false, block.rows, &block);
        run_block(
            block,
            [&](int64_t channel, int64_t columns, int64_t width) {
              return pack_grads(block, channel, columns, width);
            },
            panel0, panel1, i == 0, products, sums);
      }
    }
  }

  int64_t padded_column(int64_t panel) const {
    return panel / split.count * split.padded_columns() + split.column(panel % split.count);
  }
  // Clears what is added to: but for depthwise, the first block's products are stored.
  void clear(A* products, A* sums, int64_t panel0, int64_t panel1, bool all) const {
    const int64_t end = groups * split.padded_columns();
    const int64_t first = padded_column(panel0);
    const int64_t last = panel1 == groups * split.count ? end : padded_column(panel1);
    if (all)
      std::memset(static_cast<void*>(products + first * panel_rows), 0,
                  (last - first) * panel_rows * sizeof(A));
    std::memset(static_cast<void*>(sums + first), 0, (last - first) * sizeof(A));
  }

  // Rows from `first` on as pieces, block->rows of them.
  void find_pieces(int64_t first, Block<D>* block) const {
    const int64_t last = first + block->rows;
    int64_t found = 0;
    for (int64_t row = first; row < last;) {
      Piece piece{};
      piece.image = row / p.out_rows();
      piece.begin = piece.out_begin = row - piece.image * p.out_rows();
      piece.end = piece.out_end = min_of(p.out_rows(), piece.begin + last - row);
      piece.first_row = found;
      found += piece.end - piece.begin;
      block->pieces[block->piece_count++] = piece;
      row += piece.end - piece.begin;
    }
  }

  template <class PackGrads>
  void run_block(const Block<D>& block, const PackGrads& pack, int64_t panel0, int64_t panel1,
                 bool first, A* products, A* sums) const {
    for (int64_t index = panel0; index < panel1; ++index) {
      const int64_t group = index / split.count, panel = index % split.count;
      const int64_t column = split.column(panel), width = split.width_vecs(panel) * V::W;
      const int64_t channel = group * out_channels + column;
      const int64_t padded = padded_column(index);
      const D* grads = pack(channel, min_of(width, out_channels - column), width);
      add_sums(grads, block.rows * p.x.out_size, width, sums + padded);
      if (!p.grad_weight) continue;
      if constexpr (kPair == 1) {
        if (depthwise) {
          multiply_channels(block, grads, column, width, products);
          continue;
        }
      }
      multiply(block, grads, group, panel, first, products + padded * panel_rows);
    }
  }

  // The block's pixels of the gradient as a panel [pixels][width].
  const A* pack_grads(const Block<D>& block, int64_t channel, int64_t columns,
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

#if FMK_BF16_DOT
  // Word row i: the outputs' rows first + i and second + i, as many of the latter as there are.
  struct RowPairs {
    int64_t first, second, seconds;
  };

  // words[i] = (words[i], later[i]): two rows that were widened to float.
  static void pair_up(Bf16Pair* words, const float* later, int64_t n) {
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    for (int64_t i = 0; i < n; i += V::W) {
      const __mmask16 lanes = lanes16(static_cast<int>(min_of<int64_t>(V::W, n - i)));
      const __m512i a = _mm512_maskz_loadu_epi32(lanes, words + i);
      const __m512i b = _mm512_maskz_loadu_epi32(lanes, later + i);
      _mm512_mask_storeu_epi32(
          words + i, lanes, _mm512_or_si512(_mm512_srli_epi32(a, 16), _mm512_and_si512(b, high)));
    }
  }
  // words[i] = (a[i], b[i]); null: zeros.
  static void pair_up(const bf16* a, const bf16* b, int64_t n, Bf16Pair* words) {
    for (int64_t i = 0; i < n; i += V::W) {
      const __mmask16 lanes = lanes16(static_cast<int>(min_of<int64_t>(V::W, n - i)));
      const auto read = [&](const bf16* from) FMK_LAMBDA {
        return from ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from + i))
                    : _mm512_setzero_si512();
      };
      _mm512_mask_storeu_epi32(words + i, lanes,
                               _mm512_or_si512(read(a), _mm512_slli_epi32(read(b), 16)));
    }
  }

  // As gather_rows(), for the input rows under pairs of output rows.
  void gather_pairs(const RowPairs& pairs, Block<D>* block) const {
    const int64_t taps = p.row_taps(), table = block->rows * taps, words = stage.row_words();
    auto* memory = static_cast<char*>(
        scratch_bytes(Scratch::kExtra, (table + block->rows) * sizeof(void*) + words * sizeof(D)));
    block->table = reinterpret_cast<const D**>(memory);
    block->pointers = block->table + table;
    auto* zeros = reinterpret_cast<D*>(block->pointers + block->rows);
    std::memset(static_cast<void*>(zeros), 0, words * sizeof(D));
    auto* staged = static_cast<D*>(scratch_bytes(Scratch::kRows, table * words * sizeof(D)));
    auto* later = static_cast<float*>(scratch_bytes(Scratch::kTile, words * sizeof(float)));
    struct Rows {
      int64_t first, second;
    };
    auto* found = static_cast<Rows*>(scratch_bytes(Scratch::kAccumulator, table * sizeof(Rows)));
    int64_t count = 0;
    for (int64_t i = 0; i < block->rows; ++i)
      for (int64_t tap = 0; tap < taps; ++tap) {
        const Rows rows{input_row_of(pairs.first + i, tap),
                        i < pairs.seconds ? input_row_of(pairs.second + i, tap) : -1};
        const D*& entry = block->table[i * taps + tap];
        if (rows.first < 0 && rows.second < 0) {
          entry = zeros;
          continue;
        }
        // Taps of the rows before are where the same pair occurs.
        int64_t at = count - 1;
        const int64_t oldest = max_of<int64_t>(0, count - 4 * taps);
        while (at >= oldest && (found[at].first != rows.first || found[at].second != rows.second))
          --at;
        if (at < oldest) {
          at = count++;
          found[at] = rows;
          stage_pair(rows.first, rows.second, later, staged + at * words);
        }
        entry = staged + at * words;
      }
  }
  // The input row, counted over all images, under a tap of an output row; -1: zeros.
  int64_t input_row_of(int64_t row, int64_t tap) const {
    const int64_t image = row / p.out_rows();
    const int64_t at = input_row(p.z, p.y, p.padding, row - image * p.out_rows(), tap);
    return at < 0 ? -1 : image * stage.height + at;
  }
  void stage_pair(int64_t first, int64_t second, float* later, D* to) const {
    const auto stage_row = [&](int64_t row, float* at) {
      if (row < 0) {
        std::memset(at, 0, stage.row_words() * sizeof(float));
        return;
      }
      const int64_t image = row / stage.height;
      stage.run(p.input + image * stage.height * stage.width * groups * channels,
                row - image * stage.height, at);
    };
    stage_row(first, reinterpret_cast<float*>(to));
    stage_row(second, later);
    pair_up(to, later, stage.row_words());
  }

  // As pack_grads(), for pairs of rows.
  const D* pack_pairs(const RowPairs& pairs, int64_t word_rows, int64_t channel, int64_t columns,
                      int64_t width) const {
    const int64_t total = groups * out_channels, row_pixels = p.x.out_size;
    const int64_t n = word_rows * row_pixels;
    auto* panel = static_cast<D*>(scratch_bytes(Scratch::kPanel, n * width * sizeof(D)));
    if (columns < width) std::memset(static_cast<void*>(panel), 0, n * width * sizeof(D));
    if (p.channels_last) {
      const auto pixel_of = [&](int64_t row) {
        return p.grad + row * row_pixels * total + channel;
      };
      D* to = panel;
      for (int64_t i = 0; i < word_rows; ++i) {
        const bf16* first = pixel_of(pairs.first + i);
        const bf16* second = i < pairs.seconds ? pixel_of(pairs.second + i) : nullptr;
        for (int64_t x = 0; x < row_pixels; ++x, to += width)
          pair_up(first + x * total, second ? second + x * total : nullptr, columns, to);
      }
      return panel;
    }
    // Pixels of the two halves of the rows, then their pairs.
    auto* later = static_cast<float*>(scratch_bytes(Scratch::kTile, n * width * sizeof(float)));
    std::memset(static_cast<void*>(later), 0, n * width * sizeof(float));
    turn_planes(pairs.first, word_rows, channel, columns, reinterpret_cast<float*>(panel), width);
    turn_planes(pairs.second, min_of(pairs.seconds, word_rows), channel, columns, later, width);
    pair_up(panel, later, n * width);
    return panel;
  }
  // Rows [row0, row0 + count) of planes of the gradient as pixels.
  void turn_planes(int64_t row0, int64_t count, int64_t channel, int64_t columns, float* to,
                   int64_t width) const {
    const int64_t image_pixels = p.out_rows() * p.x.out_size, total = groups * out_channels;
    for (int64_t row = row0; row < row0 + count;) {
      const int64_t image = row / p.out_rows(), at = row - image * p.out_rows();
      const int64_t n = min_of(p.out_rows() - at, row0 + count - row);
      planes_to_pixels(p.grad + (image * total + channel) * image_pixels + at * p.x.out_size,
                       image_pixels, n * p.x.out_size, columns, to, width);
      to += n * p.x.out_size * width;
      row += n;
    }
  }

  static void add_sums(const Bf16Pair* grads, int64_t pixels, int64_t width, A* sums) {
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    for (int64_t j = 0; j < width; j += V::W) {
      V first = zero<V>(), second = zero<V>();
      for (int64_t pixel = 0; pixel < pixels; ++pixel) {
        const __m512i words = _mm512_loadu_si512(grads + pixel * width + j);
        first = first + V{_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))};
        second = second + V{_mm512_castsi512_ps(_mm512_and_si512(words, high))};
      }
      store(sums + j, load(sums + j) + (first + second));
    }
  }
#endif
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

  void multiply(const Block<D>& block, const D* grads, int64_t group, int64_t panel, bool first,
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
          in.init = first ? nullptr : to;
          run_tile<M, true>(tiles.rows(t), vecs, in, StoreAccumulators<V>{to, width});
        }
  }

  // Depthwise: products[tap][channel] += input[pixel + tap][channel] * grad[pixel][channel].
  void multiply_channels(const Block<D>& block, const A* grads, int64_t column, int64_t width,
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
    alignas(64) A values[kRun][V::W] = {};
    for (int64_t i = 0; i < panel_rows; i += kRun) {
      const int64_t n = min_of(kRun, panel_rows - i);
      for (int64_t j = 0; j < n; ++j) {
        const int64_t c = (i + j) / taps, tap = (i + j) % taps;
        store(values[j], total(first + (tap * channels + c) * width) * scale);
      }
      T* to = p.grad_weight + channel * panel_rows + i;
#if defined(__AVX512F__)
      if constexpr (V::W == kRun) {
        alignas(64) A turned[V::W][kRun];
        transpose_16x16(&values[0][0], V::W, &turned[0][0], kRun);
        for (int64_t k = 0; k < valid; ++k)
          store(to + k * panel_rows, load(turned[k]), static_cast<int>(n));
        continue;
      }
#endif
      for (int64_t k = 0; k < valid; ++k)
        for (int64_t j = 0; j < n; ++j) narrow(to + k * panel_rows + j, values[j][k]);
    }
  }
};

}  // namespace

namespace {

template <class T, class M>
void run_weight_gradient(const WeightGradient<T>& p, const Parallel& pool) {
  const WeightGrad<T, M> work(p, pool);
  parallel_for(pool, work.shards * work.parts, [&](int64_t unit) { work.run(unit); });
  const int64_t units = work.groups * work.split.vecs;
  const int64_t shards = work.buffer < 16384 ? 1 : min_of<int64_t>(pool.threads, units);
  parallel_for(pool, shards, [&](int64_t shard) {
    for (int64_t unit = units * shard / shards; unit < units * (shard + 1) / shards; ++unit)
      work.finish(unit / work.split.vecs, unit % work.split.vecs);
  });
}

}  // namespace

template <class T>
void weight_gradient(const WeightGradient<T>& p, const Parallel& pool) {
  if constexpr (sizeof(T) <= 4) {
    if (depthwise_weight_gradient(p, pool)) return;
  }
  if constexpr (Mac<T>::kPair == 2) {
    const bool depthwise = p.channels == 1 && p.out_channels == 1 && p.groups > 1;
    if (!depthwise) return run_weight_gradient<T, Mac<T>>(p, pool);
  }
  run_weight_gradient<T, typename MacOfAcc<Acc<T>>::Type>(p, pool);
}

template void weight_gradient(const WeightGradient<float>&, const Parallel&);
template void weight_gradient(const WeightGradient<bf16>&, const Parallel&);
template void weight_gradient(const WeightGradient<f16>&, const Parallel&);
template void weight_gradient(const WeightGradient<double>&, const Parallel&);

}  // namespace fmk::FMK_ISA
