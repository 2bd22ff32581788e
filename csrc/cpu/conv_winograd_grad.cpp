// The gradient of a 3x3 weight in Winograd form, the adjoint of the forward pass:
//
//   grad_weight = G^T [ sum over tiles of (B^T d B) . (A g A^T) ] G
//
// with d a tile's input and g its 4x4 outputs' gradient; with several taps along the depth, d lies
// in another plane for each. Per point the sum is a GEMM whose reduction runs over tiles: a fourth
// of the multiplications of the direct sum. Every thread computes its share of the result from all
// tiles; or, where the result's panels do not come out even, adds up its share of the tiles in a
// buffer of its own, and the buffers are added in a fixed order.

#include <type_traits>

#include "cpu/conv_stage.h"
#include "cpu/conv_winograd.h"
#include "cpu/gemm.h"
#include "cpu/winograd_transforms.h"

namespace fmk::FMK_ISA {
namespace {

using F = WinogradF4;
constexpr int kTile = F::kOutputs, kWindow = F::kPoints, kPointCount = kWindow * kWindow;
constexpr int W = VecF::W, kTaps = 9;
constexpr int64_t kBlockTiles = 64;
// Accumulators of a product: channels of the input x vectors of channels of the output. The rows
// divide a vector, and there are enough of them to hide the latency of a multiply-add.
constexpr int kRows = 4;

// out[kRows][NV * W] = (or, unless `first`, +=) the sum over tiles of a[tile * W][kRows] *
// b[tile][NV * W].
template <int NV>
FMK_NOINLINE void multiply_tiles(const float* a, const float* b, int64_t tiles, bool first,
                                 float* out) {
  VecF acc[kRows][NV];
  FMK_FOR (i, kRows)
    FMK_FOR (j, NV) acc[i][j] = first ? zero<VecF>() : load(out + (i * NV + j) * W);
  for (int64_t tile = 0; tile < tiles; ++tile, a += W, b += NV * W) {
    VecF panel[NV];
    FMK_FOR (j, NV) panel[j] = pin(load(b + j * W));
    FMK_FOR (i, kRows) {
      const VecF x = splat(a[i]);
      FMK_FOR (j, NV) acc[i][j] = fma(x, panel[j], acc[i][j]);
    }
  }
  FMK_FOR (i, kRows)
    FMK_FOR (j, NV) store(out + (i * NV + j) * W, acc[i][j]);
}

// Rows of a plane as pixels of type S: NHWC where they lie, or staged as NHWC in a ring. Planes are
// counted through all images.
template <class T, class S>
struct RowSource {
  const T* tensor;
  bool channels_last;
  int64_t channels, planes, height, width;  // of an image
  int64_t offset, pixels;                   // pixels [offset, offset + pixels) of a row
  int ring;
  S* memory;  // zeros for a pixel, then the ring
  int64_t plane = -1, from = 0, to = 0;

  static size_t bytes(bool channels_last, int64_t channels, int64_t pixels, int ring) {
    return (channels + W + (channels_last ? 0 : ring * pixels * channels)) * sizeof(S);
  }
  void clear_zeros() const {
    std::memset(static_cast<void*>(memory), 0, (channels + W) * sizeof(S));
  }
  // Rows [first, first + ring) of a plane are wanted next.
  void seek(int64_t wanted, int64_t first) {
    if (channels_last) {
      plane = wanted;
      return;
    }
    if constexpr (std::is_same_v<S, float>) {
      const RowStage<T, float> stage{false, 1, channels, planes * height, width, offset, pixels};
      const T* image = tensor + wanted / planes * planes * channels * height * width;
      const int64_t above = wanted % planes * height;
      if (plane != wanted || first < from) to = first;
      plane = wanted;
      for (int64_t y = max_of(first, to); y < first + ring; ++y)
        if (y >= 0 && y < height) stage.run(image, above + y, row(y));
      from = first;
      to = first + ring;
    }
  }
  // Row y, pixel offset + x.
  const S* at(int64_t y, int64_t x) const {
    const int64_t column = offset + x;
    if (y < 0 || y >= height || column < 0 || column >= width) return memory;
    if (channels_last)
      return reinterpret_cast<const S*>(tensor) +
             ((plane * height + y) * width + column) * channels;
    return row(y) + x * channels;
  }

 private:
  S* row(int64_t y) const {
    return memory + channels + W + (y % ring + ring) % ring * pixels * channels;
  }
};

template <class T>
class TileGradient {
 public:
  TileGradient(const WeightGradient<T>& p, const Parallel& pool)
      : p_(p), split_(PanelSplit<VecF>::of(p.out_channels)) {
    reduction_ = p.z.taps * p.channels;
    tile_rows_ = p.batch * p.z.out_size * ceil_div(p.y.out_size, kTile);
    tile_columns_ = ceil_div(p.x.out_size, kTile);
    products_ = split_.padded_columns() * reduction_ * kPointCount;
    buffer_ = products_ + split_.padded_columns();
    // A share of the result costs transforming the input's tiles once more, a share of the tiles
    // another buffer to add up.
    const bool even = split_.count % pool.threads == 0 || split_.count >= 4 * pool.threads;
    const bool many_columns = split_.padded_columns() >= 32 * (pool.threads - 1);
    parts = even && many_columns ? pool.threads : 1;
    shards = parts > 1 ? 1 : min_of<int64_t>(pool.threads, tile_rows_);
    buffers_ = static_cast<float*>(scratch_bytes(Scratch::kCall, shards * buffer_ * sizeof(float)));
  }

  // The products of unit `unit` of shards * parts.
  void run(int64_t unit) const {
    if (p_.channels_last)
      accumulate<T>(unit / parts, unit % parts);
    else
      accumulate<float>(unit / parts, unit % parts);
  }

  // Vectors of input channels of every tap along the depth x panels of output channels.
  int64_t result_blocks() const { return reduction_ / W * split_.count; }

  // G^T u G of one block, to grad_weight[k][c][tap_z][tap].
  void finish_weight(int64_t block) const {
    const int64_t vec = block / split_.count, panel = block % split_.count;
    const int64_t tap_z = vec / (p_.channels / W), first_channel = vec % (p_.channels / W) * W;
    const int64_t channel_taps = p_.z.taps * kTaps;
    const int vecs = split_.width_vecs(panel);
    const int64_t width = vecs * W, column = split_.column(panel);
    const float* sums = buffers_ + block_offset(panel, vec);
    alignas(64) float values[W * kTaps][W];  // [channel][tap][output channel]
    for (int j = 0; j < vecs; ++j) {
      const int64_t first = column + j * W;
      const int lanes = static_cast<int>(min_of<int64_t>(W, p_.out_channels - first));
      const VecF scale = p_.scale ? load(p_.scale + first, lanes) : splat(1.0f);
      for (int channel = 0; channel < W; ++channel)
        taps_of(sums + channel * width + j * W, width * W, scale, values + channel * kTaps);
      T* to = p_.grad_weight + (first * p_.channels + first_channel) * channel_taps + tap_z * kTaps;
      for (int lane = 0; lane < lanes; ++lane, to += p_.channels * channel_taps)
        for (int i = 0; i < W * kTaps; ++i)
          narrow(to + i / kTaps * channel_taps + i % kTaps, values[i][lane]);
    }
  }
  void finish_sums() const {
    for (int64_t channel = 0; channel < p_.out_channels; channel += W) {
      const int lanes = static_cast<int>(min_of<int64_t>(W, p_.out_channels - channel));
      const VecF sum = total(buffers_ + products_ + channel);
      const VecF scale = p_.scale ? load(p_.scale + channel, lanes) : splat(1.0f);
      if (p_.grad_shift) store(p_.grad_shift + channel, sum, lanes);
      if (p_.grad_bias) store(p_.grad_bias + channel, sum * scale, lanes);
    }
  }

  int64_t shards, parts;  // of the rows of tiles, and of the result's panels

 private:
  // A buffer is [panel][vector of channels][point][W][width], then the gradient's sums.
  int64_t block_offset(int64_t panel, int64_t vec) const {
    return (split_.column(panel) * reduction_ + vec * W * split_.width_vecs(panel) * W) *
           kPointCount;
  }
  VecF total(const float* at) const {
    VecF sum = load(at);
    for (int64_t shard = 1; shard < shards; ++shard) sum = sum + load(at + shard * buffer_);
    return sum;
  }
  void taps_of(const float* u, int64_t point_step, VecF scale, float (*taps)[W]) const {
    VecF rows[3][kWindow];
    for (int x = 0; x < kWindow; ++x) {
      VecF column[kWindow], g[3];
      for (int y = 0; y < kWindow; ++y) column[y] = total(u + (y * kWindow + x) * point_step);
      F::weights_adjoint(column, g);
      for (int y = 0; y < 3; ++y) rows[y][x] = g[y];
    }
    for (int y = 0; y < 3; ++y) {
      VecF g[3];
      F::weights_adjoint(rows[y], g);
      for (int x = 0; x < 3; ++x) store(taps[y * 3 + x], g[x] * scale);
    }
  }

  template <class S>
  void accumulate(int64_t shard, int64_t part) const {
    const int64_t panel0 = split_.count * part / parts, panel1 = split_.count * (part + 1) / parts;
    const int64_t channel0 = split_.column(panel0);
    const int64_t columns =
        (panel1 == split_.count ? split_.padded_columns() : split_.column(panel1)) - channel0;
    const int64_t channels = min_of(columns, p_.out_channels - channel0);
    float* products = buffers_ + shard * buffer_;
    float* sums = products + products_ + channel0;
    std::memset(sums, 0, columns * sizeof(float));
    const int64_t plane_rows = ceil_div(p_.y.out_size, kTile);
    const int64_t first = tile_rows_ * shard / shards, last = tile_rows_ * (shard + 1) / shards;
    // One more line per tile, as in the forward pass.
    const int64_t ld_input = reduction_ * kPointCount + 16;
    const int64_t ld_grad = columns * kPointCount + 16;
    auto* inputs =
        static_cast<float*>(scratch_bytes(Scratch::kRows, kBlockTiles * ld_input * sizeof(float)));
    auto* grads =
        static_cast<float*>(scratch_bytes(Scratch::kPanel, kBlockTiles * ld_grad * sizeof(float)));
    RowSource<T, S> input{
        p_.input,     p_.channels_last, p_.channels, p_.z.in_size,
        p_.y.in_size, p_.x.in_size,     p_.x.offset, tile_columns_ * kTile + kWindow - kTile,
        kWindow,      nullptr};
    RowSource<T, S> grad{p_.grad,
                         p_.channels_last,
                         p_.out_channels,
                         p_.z.out_size,
                         p_.y.out_size,
                         p_.x.out_size,
                         0,
                         tile_columns_ * kTile,
                         kTile,
                         nullptr};
    input.memory = static_cast<S*>(scratch_bytes(
        Scratch::kExtra, input.bytes(p_.channels_last, p_.channels, input.pixels, kWindow)));
    grad.memory = static_cast<S*>(scratch_bytes(
        Scratch::kTile, grad.bytes(p_.channels_last, p_.out_channels, grad.pixels, kTile)));
    input.clear_zeros();
    grad.clear_zeros();
    int64_t tiles = 0;
    bool started = false;
    const auto flush = [&] {
      multiply(inputs, ld_input, grads, ld_grad, tiles, !started, panel0, panel1, products);
      tiles = 0;
      started = true;
    };
    for (int64_t row = first; row < last; ++row) {
      const int64_t plane = row / plane_rows, y = row % plane_rows * kTile;
      grad.seek(plane, y);
      for (int64_t column = 0; column < tile_columns_;) {
        const int64_t end = min_of(tile_columns_, column + kBlockTiles - tiles);
        for (int64_t tap = 0; tap < p_.z.taps; ++tap)
          transform_windows(input, plane, tap, y, column, end,
                            inputs + tiles * ld_input + tap * p_.channels * kPointCount, ld_input);
        for (; column < end; ++column, ++tiles) {
          const S* pixels[kTile * kTile];
          for (int x = 0; x < kTile; ++x)
            for (int i = 0; i < kTile; ++i)
              pixels[x * kTile + i] = grad.at(y + i, column * kTile + x) + channel0;
          transform_gradient<F>(pixels, channels, grads + tiles * ld_grad, sums);
        }
        if (tiles == kBlockTiles) flush();
      }
    }
    if (tiles > 0) flush();
  }
  // Tiles [begin, end) of a row of tiles: the input under one tap along the depth.
  template <class S>
  void transform_windows(RowSource<T, S>& input, int64_t plane, int64_t tap, int64_t row,
                         int64_t begin, int64_t end, float* inputs, int64_t ld) const {
    const int64_t z = p_.z.position(plane % p_.z.out_size, tap), top = row + p_.y.offset;
    const bool inside = z >= 0 && z < p_.z.in_size;
    if (inside) input.seek(plane / p_.z.out_size * p_.z.in_size + z, top);
    const S* windows[2][kPointCount];
    const auto find_window = [&](int64_t column, const S** window) {
      for (int x = 0; x < kWindow; ++x)
        for (int y = 0; y < kWindow; ++y)
          window[x * kWindow + y] = inside ? input.at(top + y, column * kTile + x) : input.memory;
    };
    for (int64_t column = begin; column < end; ++column, inputs += ld) {
      find_window(column, windows[0]);
      find_window(min_of(column + 1, tile_columns_ - 1), windows[1]);
      transform_input<F>(windows[0], windows[1], p_.channels, inputs);
    }
  }

  void multiply(const float* inputs, int64_t ld_input, const float* grads, int64_t ld_grad,
                int64_t tiles, bool first, int64_t panel0, int64_t panel1, float* products) const {
    // One point's numbers of all tiles, side by side: where the transforms leave them every line
    // lies in a page of its own, and each is read many times.
    alignas(64) float input[kBlockTiles * W], grad[kBlockTiles * kPanelVecs * W];
    const int64_t channel0 = split_.column(panel0), vecs_in = reduction_ / W;
    for (int64_t panel = panel0; panel < panel1; ++panel) {
      const int vecs = split_.width_vecs(panel);
      const int64_t width = vecs * W;
      for (int point = 0; point < kPointCount; ++point) {
        const float* b = grads + (split_.column(panel) - channel0) * kPointCount + point * W;
        for (int64_t tile = 0; tile < tiles; ++tile)
          for (int j = 0; j < vecs; ++j)
            store(grad + tile * width + j * W, load(b + tile * ld_grad + j * kPointCount * W));
        for (int64_t vec = 0; vec < vecs_in; ++vec) {
          const float* a = inputs + (vec * kPointCount + point) * W;
          float* out = products + block_offset(panel, vec) + point * W * width;
          // The next vector's sums come from beyond L2, 36 blocks on.
          const float* next = first || vec + 1 == vecs_in ? a : out + kPointCount * W * width;
          const int64_t next_step = next == a ? 0 : vecs * W * W / kBlockTiles;
          for (int64_t tile = 0; tile < tiles; ++tile) {
            store(input + tile * W, load(a + tile * ld_input));
            __builtin_prefetch(a + tile * ld_input + kPointCount * W);  // the next vector
            __builtin_prefetch(next + tile * next_step);
          }
          for (int i = 0; i < W; i += kRows)
            multiply_panel(vecs, input + i, grad, tiles, first, out + i * width);
        }
      }
    }
  }
  static void multiply_panel(int vecs, const float* a, const float* b, int64_t tiles, bool first,
                             float* out) {
    switch (vecs) {
      case 1: return multiply_tiles<1>(a, b, tiles, first, out);
      case 2: return multiply_tiles<2>(a, b, tiles, first, out);
#if defined(__AVX512F__)
      case 3: return multiply_tiles<3>(a, b, tiles, first, out);
      case 4: return multiply_tiles<4>(a, b, tiles, first, out);
#endif
    }
  }

  const WeightGradient<T>& p_;
  PanelSplit<VecF> split_;
  int64_t reduction_;  // rows of a product: input channels under all taps along the depth
  int64_t tile_rows_, tile_columns_;
  int64_t products_, buffer_;  // floats of the products, and of a whole buffer
  float* buffers_;
};

}  // namespace

template <class T>
void winograd_weight_gradient(const WeightGradient<T>& p, const Parallel& pool) {
  const TileGradient<T> work(p, pool);
  parallel_for(pool, work.shards * work.parts, [&](int64_t unit) { work.run(unit); });
  work.finish_sums();
  if (!p.grad_weight) return;
  const int64_t blocks = work.result_blocks(), shards = min_of<int64_t>(pool.threads, blocks);
  parallel_for(pool, shards, [&](int64_t shard) {
    for (int64_t block = blocks * shard / shards; block < blocks * (shard + 1) / shards; ++block)
      work.finish_weight(block);
  });
}

template void winograd_weight_gradient(const WeightGradient<float>&, const Parallel&);
template void winograd_weight_gradient(const WeightGradient<bf16>&, const Parallel&);
template void winograd_weight_gradient(const WeightGradient<f16>&, const Parallel&);

}  // namespace fmk::FMK_ISA
