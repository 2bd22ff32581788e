// The transformed weights of Winograd F(4x4, 3x3).

#include "cpu/conv_winograd.h"
#include "cpu/winograd_transforms.h"

namespace fmk::FMK_ISA {
namespace {

using F = WinogradF4;
constexpr int kWindow = F::kPoints, kPointCount = kWindow * kWindow;
constexpr int W = VecF::W;

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

#define FMK_INSTANTIATE(T)                                     \
  template size_t packed_winograd_bytes(const WeightView<T>&); \
  template void pack_winograd_weight(const WeightView<T>&, void*, const Parallel&);
FMK_INSTANTIATE(float)
FMK_INSTANTIATE(bf16)
FMK_INSTANTIATE(f16)
#undef FMK_INSTANTIATE

}  // namespace fmk::FMK_ISA
