// The correlation kernel: an implicit GEMM over blocks of output rows (or, for depthwise weights, a
// product per channel), each block finished while it is in the cache.
//
// The rows of A are the pixels under the taps, reached through pointers. NHWC input of a type the
// micro-kernel reads is used where it lies, taps in the padding pointing at zeros. Other input is
// staged: the rows that a block needs are copied as NHWC words with the padding in place, so that
// the taps of a kernel row, being adjacent, become one long reduction; that is why images of few
// channels are staged, too.

#include <optional>
#include <type_traits>

#include "cpu/conv_by_rows.h"
#include "cpu/conv_dense.h"
#include "cpu/conv_parts.h"
#include "cpu/conv_plan.h"
#include "cpu/conv_small_groups.h"

namespace fmk::FMK_ISA {
namespace {

constexpr int64_t kPanelsBytes = 384 << 10;  // panels that are used strip by strip: from L2

template <class T, class D, bool kDepthwise>
struct Correlator : CorrelationPlan<T, D, kDepthwise> {
  using V = Vec<T>;
  using A = Acc<T>;
  using Plan = CorrelationPlan<T, D, kDepthwise>;
  using Plan::output_epilogue, Plan::panel_epilogue, Plan::tile_epilogue, Plan::finish_rows;
  using Plan::p, Plan::placed, Plan::groups, Plan::channels, Plan::out_channels, Plan::in_place,
      Plan::dense, Plan::direct, Plan::scattered, Plan::fetches_output, Plan::finished,
      Plan::by_rows, Plan::streams, Plan::stage, Plan::pixel_words, Plan::group_words,
      Plan::elements, Plan::element_taps, Plan::words, Plan::strip_tiles, Plan::split,
      Plan::image_rows, Plan::blocks, Plan::panel_parts, Plan::shards;
  using Plan::Plan;

  int64_t units() const { return blocks * panel_parts; }

  void run(const Parallel& pool) const {
    WorkShares work(shards, units(), p.moments.sharing());
    parallel_for(pool, work.count(), [&](int64_t shard) { run_shard(shard, &work); });
  }

  void run_shard(int64_t shard, WorkShares* work) const {
    for (int64_t unit; work->take(shard, &unit);) run_unit(shard, unit);
    if (streams) stream_end();
  }

  void run_unit(int64_t shard, int64_t unit) const {
    const int64_t rows = p.batch * image_rows, panels = groups * split.count;
    const int64_t block = unit / panel_parts, part = unit % panel_parts;
    run_block(shard, rows * block / blocks, rows * (block + 1) / blocks,
              panels * part / panel_parts, panels * (part + 1) / panel_parts);
  }

  void run_block(int64_t shard, int64_t row0, int64_t row1, int64_t panel0, int64_t panel1) const {
    Block<D> block;
    block.shard = shard;
    find_pieces(p, image_rows, row0, row1, &block);
    gather_rows(p.input, p.z, p.y, stage, in_place, 2 * (elements * kMaxTileRows * strip_tiles + 8),
                &block);
    const int64_t pixels = block.rows * p.x.out_size;
    if constexpr (!kDepthwise && kFusedEpilogue<T>) {
      if (by_rows)
        return RowMultiplier<T, D>{*this}.run(block, panel0, panel1, row0 * p.x.out_size);
    }
    if constexpr (kDepthwise) {
      if (direct) {
        const int64_t begin = split.column(panel0), first_pixel = row0 * p.x.out_size;
        const int64_t end = split.column(panel1 - 1) + split.width_vecs(panel1 - 1) * V::W;
        multiply_channels(block, begin, end, first_pixel, nullptr);
        if (p.moments.wanted())
          p.moments.add(shard, 0, first_pixel, first_pixel + pixels, begin,
                        min_of(end, out_channels));
        return;
      }
    }
    if constexpr (!kDepthwise) {
      if (direct) {
        for (int64_t index = panel0, end; index < panel1; index = end) {
          const int64_t group = index / split.count, first = group * split.count;
          end = min_of(panel1, first + split.count);
          multiply(block, group, index - first, end - first, row0 * p.x.out_size, nullptr);
        }
        return;
      }
    }
    for (int64_t index = panel0; index < panel1; ++index) {
      const int64_t group = index / split.count, panel = index % split.count;
      const int64_t column = split.column(panel), width = split.width_vecs(panel) * V::W;
      auto* rows = static_cast<A*>(
          scratch_bytes(Scratch::kTile, pixels * p.residues.count * width * sizeof(A)));
      if constexpr (kDepthwise) {
        multiply_channels(block, column, column + width, 0, rows);
      } else {
        for (int64_t residue = 0; residue < p.residues.count; ++residue)
          multiply(block, group, panel, panel + 1, row0 * p.x.out_size, rows, residue);
      }
      finish_rows(block, group, column, width, rows);
    }
  }

  // to[(e - e0) * n + i]: the words of element e under pixel `pixel` + i of the block. There may be
  // as many pointers as a tile has short reductions, so they are found eight at a time; what is
  // written past n is overwritten by the next element.
  void find_pointers(const Block<D>& block, int64_t group, int64_t pixel, int n, int64_t e0,
                     int64_t e1, int64_t word, const D** to) const {
    if (e0 == e1) return;
    // Whole images follow one another, too.
    const bool whole = p.y.in_size == p.y.out_size && p.pool.kernel_h == 0;
    if (dense && (block.piece_count == 1 || whole)) {
      const D* from = block.table[0] + pixel * pixel_words + group * group_words + word;
      for (int i = 0; i < n; ++i) to[i] = from + i * pixel_words;
      return;
    }
    const int64_t taps = p.row_taps(), row_elements = p.x.taps / element_taps;
    const D* const* rows[kMaxTileRows];
    int64_t x[kMaxTileRows];
    const int64_t start = in_place ? p.x.offset : 0;
    int64_t row = quotient(pixel, p.x.out_size), out = pixel - row * p.x.out_size;
    for (int i = 0; i < n; ++i) {
      rows[i] = block.table + row * taps;
      x[i] = out * p.x.stride + start;
      if (++out == p.x.out_size) out = 0, ++row;
    }
    const int64_t offset = group * group_words + word;
    const int64_t last = (p.x.taps - 1) * p.x.step;
    bool inside = true;  // no tap of any pixel lies left or right of the image
    if (in_place)
      for (int i = 0; i < n; ++i) inside &= x[i] >= 0 && x[i] + last < p.x.in_size;
    const int64_t tap_words = p.x.step * element_taps * pixel_words;
    int64_t ty = quotient(e0, row_elements), tx = e0 - ty * row_elements;
    const D* base[16] = {};
    for (int64_t e = e0; e < e1; ++ty, tx = 0) {
      const int64_t count = min_of(row_elements - tx, e1 - e);
      bool plain = inside;
      for (int i = 0; i < n; ++i) {
        const D* from = rows[i][ty];
        plain &= !in_place || from != block.zeros;
        base[i] = from + x[i] * pixel_words + offset;
      }
      for (int64_t j = 0; j < count; ++j, to += n) {
        const int64_t shift = (tx + j) * tap_words;
        if (plain) {
          add_to_addresses(base, shift * static_cast<int64_t>(sizeof(D)), n, to);
        } else {
          const int64_t dx = (tx + j) * p.x.step;
          for (int i = 0; i < n; ++i) {
            const bool there =
                rows[i][ty] != block.zeros && x[i] + dx >= 0 && x[i] + dx < p.x.in_size;
            to[i] = there ? base[i] + shift : block.zeros;
          }
        }
      }
      e += count;
    }
  }

  // A part of the reduction of a residue: elements [e0, e1), of each the words [w0, w1).
  struct Range {
    int64_t residue, e0, e1, w0, w1;
    bool first, last;
  };

  // Asks for a share of what lies under a coming tile and under none before it, the rows and
  // columns that a step of the stride uncovers: several pixels by turns are no stream to the
  // hardware, and all at once would hold up the tile that is being computed.
  void prefetch_pixels(const D* const* pointers, int n, const Range& range, int64_t share,
                       int64_t shares) const {
    const int64_t length = range.w1 - range.w0, step = 64 / static_cast<int64_t>(sizeof(D));
    const int64_t begin = length * share / shares, end = length * (share + 1) / shares;
    const int64_t last_rows = p.row_taps() - min_of(p.y.taps, p.y.stride);
    const int64_t last_columns = p.x.taps - min_of(p.x.taps, p.x.stride);
    if (range.e0 == range.e1) return;
    int64_t ty = quotient(range.e0, p.x.taps), tx = range.e0 - ty * p.x.taps;
    for (int64_t e = range.e0; e < range.e1; ++e, pointers += n) {
      if (ty >= last_rows && tx >= last_columns) {
        for (int i = 0; i < n; ++i)
          for (int64_t word = begin; word < end; word += step)
            __builtin_prefetch(pointers[i] + word, 0, 2);
      }
      if (++tx == p.x.taps) tx = 0, ++ty;
    }
  }
  // Where the results of the tile after the next will go: few lines of each of several pixels are
  // no stream either, and to fetch them takes longer than one tile of a short reduction.
  void prefetch_output(const Epilogue<T>& epilogue, int n) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int i = 2 * n; i < 3 * n; ++i)
      for (int64_t column = 0; column < epilogue.columns; column += kLine)
        __builtin_prefetch(epilogue.out + i * epilogue.ld_out + column, 1, 2);
  }

  // to[i] = from[i] + bytes for i < n, rounded up to 8.
  FMK_INLINE void add_to_addresses(const D* const* from, int64_t bytes, int n, const D** to) {
    typedef int64_t Addresses __attribute__((vector_size(64)));
    for (int i = 0; i < n; i += 8) {
      Addresses addresses;
      std::memcpy(&addresses, from + i, sizeof addresses);
      addresses += bytes;
      std::memcpy(to + i, &addresses, sizeof addresses);
    }
  }

  // Panels [panel0, panel1) of a group for the block's pixels, to the output or (one panel) to
  // the residue's lines of rows[pixels][residues][width].
  void multiply(const Block<D>& block, int64_t group, int64_t panel0, int64_t panel1,
                int64_t first_pixel, A* rows, int64_t residue = 0) const {
    // The reduction is cut so that a chunk of a panel stays in L2 while all tiles pass over it:
    // into runs of whole elements, or elements into parts.
    const int64_t limit = kChunkWords + kChunkWords / 4;
    const int64_t parts = words > limit ? ceil_div(words, kChunkWords) : 1;
    const int64_t total = max_of<int64_t>(1, elements);
    const int64_t runs = parts > 1 ? total
                         : elements * words > limit
                             ? min_of(total, ceil_div(elements * words, kChunkWords))
                             : 1;
    const int64_t chunks = runs * parts;
    // Several panels take turns strip by strip if L2 holds them all the while: the pixels' pointers
    // are found once, and the output is written in whole pixels.
    const int64_t panel_bytes =
        max_of<int64_t>(1, elements * words) * kPanelVecs * V::W * sizeof(D);
    const int64_t together = chunks > 1 ? 1 : max_of<int64_t>(1, kPanelsBytes / panel_bytes);
    if (rows) rows += residue * split.width_vecs(panel0) * V::W;
    A* partial = rows;
    if (!partial && chunks > 1)
      partial = static_cast<A*>(scratch_bytes(
          Scratch::kAccumulator, block.rows * p.x.out_size * kPanelVecs * V::W * sizeof(A)));
    for (int64_t panel = panel0; panel < panel1; panel += together)
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t run = chunk / parts, part = chunk % parts;
        const Range range{residue,
                          elements * run / runs,
                          elements * (run + 1) / runs,
                          words * part / parts,
                          words * (part + 1) / parts,
                          chunk == 0,
                          chunk + 1 == chunks};
        multiply_range(block, group, panel, min_of(panel1, panel + together), range, first_pixel,
                       rows, partial);
      }
  }

  // partial[pixels][residues][width]: sums of a panel that go on.
  void multiply_range(const Block<D>& block, int64_t group, int64_t panel0, int64_t panel1,
                      const Range& range, int64_t first_pixel, A* rows, A* partial) const {
    int vecs = 1;
    for (int64_t panel = panel0; panel < panel1; ++panel)
      vecs = max_of(vecs, split.width_vecs(panel));
    const BlockTiles tiles = scattered ? BlockTiles(block.rows, p.x.out_size, vecs)
                                       : BlockTiles(1, block.rows * p.x.out_size, vecs);
    const int64_t count = range.e1 - range.e0, tile_pointers = count * kMaxTileRows;
    const D **pointers = block.pointers, **soon = pointers + strip_tiles * tile_pointers + 8;
    const auto find_strip = [&](int64_t tile0, const D** to) {
      for (int64_t t = tile0; t < min_of(tiles.tiles, tile0 + strip_tiles);
           ++t, to += tile_pointers)
        find_pointers(block, group, tiles.begin(t), tiles.rows(t), range.e0, range.e1,
                      range.w0 + p.residues.taps_shift(range.residue) * pixel_words, to);
    };
    find_strip(0, pointers);
    const bool fetching = in_place && group == 0 && panel0 == 0;
    TileOperands<Mac<T>> in;
    in.batch = count;
    in.words = range.w1 - range.w0;
    for (int64_t tile0 = 0; tile0 < tiles.tiles; tile0 += strip_tiles) {
      const int64_t tile1 = min_of(tiles.tiles, tile0 + strip_tiles);
      find_strip(tile1, soon);
      for (int64_t panel = panel0; panel < panel1; ++panel) {
        const int panel_vecs = split.width_vecs(panel);
        const int64_t column = split.column(panel), width = panel_vecs * V::W;
        const int64_t ld = p.residues.count * width;
        const Epilogue<T> epilogue = panel_epilogue(group, column, width, first_pixel, rows, ld);
        in.b = reinterpret_cast<const Word<T>*>(static_cast<const char*>(p.weight) +
                                                p.residues.weight_offset(range.residue)) +
               (group * split.padded_columns() + column) * elements * words +
               (range.e0 * words + range.w0) * width;
        in.ld_init = ld;
        // What is read next of the weight lies behind this, and comes from beyond L2 unless these
        // panels have taken turns before.
        const bool alone = panel1 - panel0 == 1;
        const bool last_turn = panel + 1 == panel1 && tile1 == tiles.tiles;
        const bool fetches = alone || tile0 == 0 || last_turn;
        const int64_t fetched = alone ? 0 : tile0, shares = alone ? tiles.tiles : tile1 - tile0;
        const char* next = reinterpret_cast<const char*>(in.b + count * in.words * width);
        in.ahead_step = fetches ? ceil_div(width * int64_t(sizeof(Word<T>)), shares) : 0;
        for (int64_t t = tile0; t < tile1; ++t) {
          in.ahead = fetches ? next + (t - fetched) * count * in.words * in.ahead_step : nullptr;
          const int64_t pixel = tiles.begin(t), at_pointer = (t - tile0) * tile_pointers;
          const int n = tiles.rows(t);
          in.rows = pointers + at_pointer;
          if (fetching && t + strip_tiles < tiles.tiles)
            prefetch_pixels(soon + at_pointer, tiles.rows(t + strip_tiles), range, panel - panel0,
                            panel1 - panel0);
          if (!range.first) in.init = partial + pixel * ld;
          if (finished && range.last) {
            finish_tile(n, panel_vecs, in, tile_epilogue(epilogue, first_pixel, pixel));
          } else {
            const StoreAccumulators<V> keep{partial + pixel * ld, ld};
            run_tile<Mac<T>, false>(n, panel_vecs, in, keep);
          }
        }
      }
      if (p.moments.wanted() && direct && range.last) {
        const int64_t last =
            group * out_channels +
            min_of(out_channels, split.column(panel1 - 1) + split.width_vecs(panel1 - 1) * V::W);
        p.moments.add(block.shard, 0, first_pixel + tiles.begin(tile0),
                      first_pixel + tiles.begin(tile1), group * out_channels + split.column(panel0),
                      last);
      }
      const D** const done = pointers;
      pointers = soon;
      soon = done;
    }
  }

  void finish_tile(int rows, int vecs, const TileOperands<Mac<T>>& in,
                   const Epilogue<T>& epilogue) const {
    if (fetches_output) prefetch_output(epilogue, rows);
    run_tile_with_epilogue<T, false>(rows, vecs, in, epilogue);
  }

  // Depthwise, channels [begin, end) of the block's pixels: sum over taps of input[pixel + tap] *
  // weight[tap], to the output or, raw, to rows[pixels][end - begin].
  void multiply_channels(const Block<D>& block, int64_t begin, int64_t end, int64_t first_pixel,
                         A* rows) const {
    constexpr int kPixels = 4;
    const int64_t pixels = block.rows * p.x.out_size;
    Epilogue<T> epilogue;
    if (direct) epilogue = output_epilogue().at_row(first_pixel);
    for (int64_t pixel = 0; pixel < pixels; pixel += kPixels) {
      const int n = static_cast<int>(min_of<int64_t>(kPixels, pixels - pixel));
      find_pointers(block, 0, pixel, n, 0, elements, 0, block.pointers);
      for (int64_t channel = begin; channel < end; channel += V::W) {
        const auto at =
            epilogue.at_panel(channel, min_of<int64_t>(V::W, out_channels - channel)).at_row(pixel);
        A* raw = rows + pixel * (end - begin) + channel - begin;
        if (n == kPixels) {
          multiply_pixels<kPixels>(block.pointers, n, channel, at, raw, end - begin);
        } else {
          for (int i = 0; i < n; ++i)
            multiply_pixels<1>(block.pointers + i, n, channel, at.at_row(i),
                               raw + i * (end - begin), 0);
        }
      }
    }
  }

  // kPixels pixels, one vector of channels. pointers: [elements][n].
  template <int kPixels>
  FMK_LAMBDA void multiply_pixels(const D* const* pointers, int n, int64_t channel,
                                  const Epilogue<T>& epilogue, A* raw, int64_t ld_raw) const {
    V sum[kPixels][1];
    FMK_FOR (i, kPixels) sum[i][0] = zero<V>();
    const A* weight = static_cast<const A*>(p.weight) + channel;
    for (int64_t e = 0; e < elements; ++e, weight += split.padded_columns(), pointers += n) {
      const V factor = load(weight);
      FMK_FOR (i, kPixels)
        sum[i][0] = fma(load(reinterpret_cast<const A*>(pointers[i]) + channel), factor, sum[i][0]);
    }
    // The pixels after the next under the last tap: nothing else has touched them, and the lines
    // of several pixels by turns are no stream to the hardware.
    if constexpr (kPixels > 1) {
      const int64_t ahead = 2 * kPixels * p.x.stride * pixel_words + channel;
      FMK_FOR (i, kPixels) __builtin_prefetch(pointers[i - kPixels] + ahead);
    }
    if (direct) {
      epilogue.run(sum);
    } else {
      FMK_FOR (i, kPixels) store(raw + i * ld_raw, sum[i][0]);
    }
  }
};

// A single long row per image (one axis) is cut: its pieces stay in the cache, and there is
// something to share out.
constexpr int64_t kMostSegmentPixels = 512, kFewestSegmentPixels = 64;

template <class T>
int64_t segment_pixels(const Correlation<T>& p) {
  const int64_t pixel_bytes = p.groups * p.channels * static_cast<int64_t>(sizeof(Acc<T>));
  const int64_t fitting = kBlockInputBytes / max_of<int64_t>(1, p.x.stride * pixel_bytes);
  return max_of(kFewestSegmentPixels, min_of(kMostSegmentPixels / p.residues.count, fitting));
}

template <class T>
Correlation<T> segment_of(const Correlation<T>& p, int64_t begin, int64_t end) {
  Correlation<T> segment = p;
  segment.x.out_size = end - begin;
  segment.x.offset += begin * p.x.stride;
  segment.place_x.first += begin * p.place_x.step;
  return segment;
}

template <class T, class D, bool kDepthwise>
void run(const Correlation<T>& p, const Parallel& pool) {
  const int64_t most = segment_pixels(p);
  if (p.out_rows() == 1 && p.x.out_size >= 2 * most && p.pool.kernel_h == 0) {
    const int64_t length = p.x.out_size, segments = length / most;
    const Parallel alone{};
    share_out(pool, min_of<int64_t>(pool.threads, segments), segments, p.moments.sharing(),
              [&](int64_t shard, int64_t i) {
                auto part = segment_of(p, length * i / segments, length * (i + 1) / segments);
                part.moments = p.moments.from_shard(shard);
                Correlator<T, D, kDepthwise>(part, alone).run(alone);
              });
    return;
  }
  Correlator<T, D, kDepthwise>(p, pool).run(pool);
}

template <class T>
bool is_empty(const Correlation<T>& p) {
  const int64_t image_rows = p.pool.kernel_h ? p.pool.out_height : p.out_rows();
  return p.batch * image_rows * p.x.out_size * p.groups * p.out_channels == 0;
}
template <class T>
bool is_depthwise(const Correlation<T>& p) {
  return p.channels == 1 && p.out_channels == 1 && p.groups > 1;
}

// Block by block, all parts of a block one after the other.
template <class T, class D, bool kDepthwise>
void run_together(const Correlation<T>* parts, int64_t count, const Parallel& pool) {
  std::optional<Correlator<T, D, kDepthwise>> plans[kMostParts];
  int64_t units = 0, shards = 1;
  for (int64_t i = 0; i < count; ++i) {
    if (is_empty(parts[i])) continue;
    plans[i].emplace(parts[i], pool);
    units = max_of(units, plans[i]->units());
    shards = max_of(shards, plans[i]->shards);
  }
  if (units == 0) return;
  share_out(pool, min_of(shards, units * count), units * count, WorkShares::kStealing,
            [&](int64_t shard, int64_t unit) {
              const auto& plan = plans[unit % count];
              if (plan && unit / count < plan->units()) plan->run_unit(shard, unit / count);
            });
}

}  // namespace

template <class T>
void correlate_parts(const Correlation<T>* parts, int64_t count, const Parallel& pool) {
  // Parts that other kernels are there for, or that are cut, are computed one by one.
  bool together = count > 1;
  for (int64_t i = 0; i < count; ++i)
    together &= !parts[i].in_order() && parts[i].out_rows() > 1 && !parts[i].moments.wanted();
  if (!together) {
    for (int64_t i = 0; i < count; ++i) correlate(parts[i], pool);
  } else if (is_depthwise(parts[0])) {
    run_together<T, Acc<T>, true>(parts, count, pool);
  } else {
    run_together<T, Word<T>, false>(parts, count, pool);
  }
}

template <class T>
void correlate(const Correlation<T>& p, const Parallel& pool) {
  if (is_empty(p)) return;
  const bool planar = p.z.in_size == 1 && p.z.taps == 1 && p.in_order() && !p.turns;
  if (planar && p.padding == PaddingMode::kZeros && correlate_small_groups(p, pool)) return;
  if (correlate_dense(p, pool)) return;
  if (is_depthwise(p))
    run<T, Acc<T>, true>(p, pool);
  else
    run<T, Word<T>, false>(p, pool);
}

#define FMK_INSTANTIATE(T)                                         \
  template void correlate(const Correlation<T>&, const Parallel&); \
  template void correlate_parts(const Correlation<T>*, int64_t, const Parallel&);
FMK_INSTANTIATE(float)
FMK_INSTANTIATE(bf16)
FMK_INSTANTIATE(f16)
FMK_INSTANTIATE(double)
#undef FMK_INSTANTIATE

}  // namespace fmk::FMK_ISA
