// Of each pair of neighbouring columns, the first lies under taps 0 and 2 of two outputs, the
// second under tap 1 of one; the same is true of rows. As a correlation per residue of positions,
// every pixel of the result would be written in a pass of its own.

#include "cpu/conv_depthwise_adjoint.h"

#include "cpu/conv_pixel_rows.h"

namespace fmk::FMK_ISA {
namespace {

constexpr int kTaps = 3;

template <class T>
struct DepthwiseAdjoint {
  using V = Vec<T>;
  using A = Acc<T>;
  static constexpr int kPairs = 4;  // of columns, in a block
  const ConvShape& s;
  const T* grad;
  T* result;
  int64_t channels, padded;
  const A* weights;  // [tap_y][tap_x][padded]
  bool streams;

  // Row `row` of all images.
  void run(int64_t row) const {
    if constexpr (kHasWideRuns<T>) {
      if (channels >= 2 * V::W) return run_blocks<2>(row);
    }
    run_blocks<1>(row);
  }

 private:
  // Pair i consists of columns 2 i - padding and the next; outputs i and i - 1 reach the first.
  template <int N>
  void run_blocks(int64_t row) const {
    const int64_t image = row / s.height, y = row - image * s.height;
    const T* from = grad + image * s.out_height * s.out_width * channels;
    T* to = result + row * s.width * channels;
    const int64_t begin = s.padding_w / 2, end = (s.width - 1 + s.padding_w) / 2 + 1;
    if (end - begin < kPairs) {
      for (int64_t i = begin; i < end; ++i) block<1, N, false>(from, y, i, to);
      return;
    }
    for (int64_t i = begin; i < end; i += kPairs) {
      const int64_t first = min_of(i, end - kPairs);  // the last block overlaps the one before
      const int64_t x = 2 * first - s.padding_w;
      if (first > 0 && first + kPairs <= s.out_width && x >= 0 && x + 2 * kPairs <= s.width)
        block<kPairs, N, true>(from, y, first, to);
      else
        block<kPairs, N, false>(from, y, first, to);
    }
  }

  template <int P, int N, bool kInside>
  void block(const T* image, int64_t y, int64_t first, T* to) const {
    constexpr int64_t kRun = N * V::W;
    for (int64_t i = 0; i < channels; i += kRun) {
      const int64_t channel = min_of(i, channels - kRun);  // the last run overlaps the one before
      V sum[2 * P][N];
      FMK_FOR (k, 2 * P)
        FMK_FOR (n, N) sum[k][n] = zero<V>();
      for (int64_t ty = (y + s.padding_h) % 2; ty < kTaps; ty += 2) {
        const int64_t out_y = (y + s.padding_h - ty) / 2;
        if (y + s.padding_h < ty || out_y >= s.out_height) continue;
        const A* weight = weights + ty * kTaps * padded + channel;
        V factor[kTaps][N];
        FMK_FOR (tap, kTaps) load_run_of_factors(weight + tap * padded, factor[tap]);
        const T* row = image + (out_y * s.out_width + first) * channels + channel;
        FMK_FOR (column, P + 1) {
          const int64_t x = first + column - 1;
          if (!kInside && (x < 0 || x >= s.out_width)) continue;
          V value[N];
          load_run(row + (column - 1) * channels, value);
          if (kInside) __builtin_prefetch(row + (column - 1 + P) * channels);
          FMK_FOR (n, N) {
            if (column < P) sum[2 * column][n] = fma(value[n], factor[2][n], sum[2 * column][n]);
            if (column > 0) {
              const int k = column > 0 ? 2 * (column - 1) : 0;
              sum[k][n] = fma(value[n], factor[0][n], sum[k][n]);
              sum[k + 1][n] = fma(value[n], factor[1][n], sum[k + 1][n]);
            }
          }
        }
      }
      FMK_FOR (k, 2 * P) {
        const int64_t x = 2 * first - s.padding_w + k;
        if (!kInside && (x < 0 || x >= s.width)) continue;
        if (N == 1 && streams)
          stream(to + x * channels + channel, sum[k][0]);
        else
          store_run(to + x * channels + channel, sum[k]);
      }
    }
  }
};

}  // namespace

template <class T>
bool depthwise_adjoint(const ConvShape& s, const WeightView<T>& weight, const T* grad,
                       T* grad_input, const Parallel& pool) {
  using V = Vec<T>;
  const bool planar = s.depth == 1 && s.out_depth == 1 && s.kernel_d == 1 && s.padding_d == 0;
  if (!s.channels_last || !planar || s.padding_mode != PaddingMode::kZeros || !weight.depthwise() ||
      s.channels < V::W || s.kernel_h != kTaps || s.kernel_w != kTaps || s.stride_h != 2 ||
      s.stride_w != 2 || s.dilation_h != 1 || s.dilation_w != 1 || s.width == 0)
    return false;
  WeightView<T> view = weight;
  view.z = {0, 1, 1};
  view.y = view.x = {0, 1, kTaps};
  void* packed = scratch_bytes(Scratch::kCall, packed_correlation_bytes(view));
  pack_correlation_weight(view, packed, pool);
  const int64_t rows = s.batch * s.height, pixels = rows * s.width;
  const DepthwiseAdjoint<T> work{s,
                                 grad,
                                 grad_input,
                                 s.channels,
                                 ceil_div(s.channels, int64_t{V::W}) * V::W,
                                 static_cast<const Acc<T>*>(packed),
                                 streamed(grad_input, pixels, s.channels)};
  constexpr int64_t kSerialNumbers = 1 << 16;
  const int64_t shards =
      pixels * s.channels < kSerialNumbers ? 1 : min_of<int64_t>(pool.threads, rows);
  parallel_for(pool, shards, [&](int64_t shard) {
    for (int64_t row = rows * shard / shards; row < rows * (shard + 1) / shards; ++row)
      work.run(row);
    if (work.streams) stream_end();
  });
  return true;
}

template bool depthwise_adjoint(const ConvShape&, const WeightView<float>&, const float*, float*,
                                const Parallel&);
template bool depthwise_adjoint(const ConvShape&, const WeightView<bf16>&, const bf16*, bf16*,
                                const Parallel&);
template bool depthwise_adjoint(const ConvShape&, const WeightView<f16>&, const f16*, f16*,
                                const Parallel&);

}  // namespace fmk::FMK_ISA
