#include "cpu/conv_pointwise.h"

namespace fmk::FMK_ISA {
namespace {

// Epilogue (epilogue.h) for a tile whose rows are channels and whose columns are pixels of a plane.
template <class T>
struct PlaneEpilogue {
  using V = Vec<T>;
  using A = Acc<T>;
  T* out;
  int64_t plane;           // from one row to the next
  int columns;             // pixels that exist
  const A *scale, *shift;  // of the rows, or null
  const T* residual;
  T* preactivation;
  Activation activation;

  template <int MR, int NV>
  FMK_LAMBDA void run(V (&acc)[MR][NV]) const {
    FMK_FOR (i, MR) {
      const V factor = scale ? splat(scale[i]) : splat_as<V>(1);
      const V add = shift ? splat(shift[i]) : zero<V>();
      FMK_FOR (j, NV) acc[i][j] = fma(acc[i][j], factor, add);
    }
    if (residual) {
      FMK_FOR (i, MR)
        FMK_FOR (j, NV) {
          const int lanes = lanes_of(j);
          if (lanes > 0) acc[i][j] = acc[i][j] + load(residual + i * plane + j * V::W, lanes);
        }
    }
    if (preactivation) put(preactivation, acc);
    if (activation == Activation::kRelu || activation == Activation::kRelu6) {
      const V low = zero<V>(), high = splat_as<V>(6);
      FMK_FOR (i, MR)
        FMK_FOR (j, NV) {
          acc[i][j] = max(low, acc[i][j]);
          if (activation == Activation::kRelu6) acc[i][j] = min(high, acc[i][j]);
        }
    } else if (activation != Activation::kNone) {
      A z[MR][NV * V::W];
      FMK_FOR (i, MR)
        FMK_FOR (j, NV) store(&z[i][j * V::W], acc[i][j]);
      return activate_rows(activation, &z[0][0], NV * V::W, MR, columns, out, plane);
    }
    put(out, acc);
  }

 private:
  int lanes_of(int vec) const { return min_of(V::W, columns - vec * V::W); }
  template <int MR, int NV>
  FMK_LAMBDA void put(T* to, V (&acc)[MR][NV]) const {
    FMK_FOR (i, MR)
      FMK_FOR (j, NV) {
        const int lanes = lanes_of(j);
        if (lanes == V::W)
          store(to + i * plane + j * V::W, acc[i][j]);
        else if (lanes > 0)
          store(to + i * plane + j * V::W, acc[i][j], lanes);
      }
  }
};

// One panel of an image's pixels, through all channels of the output.
template <class T>
void run_panel(const Pointwise<T>& p, int64_t shard, int64_t image, int64_t panel) {
  using V = Vec<T>;
  using M = Mac<T>;
  const auto split = PanelSplit<V>::of(p.pixels);
  const int vecs = split.width_vecs(panel);
  const int64_t pixel = split.column(panel), width = vecs * V::W, words = words_of<T>(p.channels);
  const int64_t columns = min_of(width, p.pixels - pixel);
  auto* packed =
      static_cast<Word<T>*>(scratch_bytes(Scratch::kPanel, words * width * sizeof(Word<T>)));
  pack_rows_as_panel(p.input + image * p.channels * p.pixels + pixel, p.pixels, p.channels, columns,
                     width, packed);
  const auto tiles = RowTiles::of(p.out_channels, vecs);
  for (int64_t t = 0; t < tiles.tiles; ++t) {
    const int64_t channel = tiles.begin(t);
    const int rows = tiles.rows(t);
    const Word<T>* row_pointers[kMaxTileRows];
    for (int i = 0; i < rows; ++i)
      row_pointers[i] = reinterpret_cast<const Word<T>*>(p.weight + (channel + i) * p.channels);
    TileOperands<M> in;
    in.rows = row_pointers;
    in.words = words;
    in.b = packed;
    const int64_t at = (image * p.out_channels + channel) * p.pixels + pixel;
    const PlaneEpilogue<T> epilogue{p.output + at,
                                    p.pixels,
                                    static_cast<int>(columns),
                                    p.scale ? p.scale + channel : nullptr,
                                    p.shift ? p.shift + channel : nullptr,
                                    p.residual ? p.residual + at : nullptr,
                                    p.preactivation ? p.preactivation + at : nullptr,
                                    p.activation};
    run_tile<M, false>(rows, vecs, in, epilogue);
  }
  if (p.moments.wanted()) p.moments.add(shard, image, pixel, pixel + columns, 0, p.out_channels);
}

}  // namespace

template <class T>
void correlate_pointwise(const Pointwise<T>& p, const Parallel& pool) {
  const int64_t panels = PanelSplit<Vec<T>>::of(p.pixels).count, units = p.batch * panels;
  const double flops = 2.0 * static_cast<double>(p.batch * p.pixels) *
                       static_cast<double>(p.channels * p.out_channels);
  const int64_t shards = flops < kSerialFlops ? 1 : min_of<int64_t>(pool.threads, units);
  share_out(pool, shards, units, p.moments.sharing(), [&](int64_t shard, int64_t unit) {
    run_panel(p, shard, unit / panels, unit % panels);
  });
}

template void correlate_pointwise(const Pointwise<float>&, const Parallel&);
#if FMK_BF16_DOT
template void correlate_pointwise(const Pointwise<bf16>&, const Parallel&);
#endif

}  // namespace fmk::FMK_ISA
