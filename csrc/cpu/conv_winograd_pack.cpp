// The transformed weights of Winograd F(4x4, 3x3).

#include "cpu/conv_turn.h"
#include "cpu/conv_winograd.h"
#include "cpu/winograd_transforms.h"

namespace fmk::FMK_ISA {
namespace {

using F = WinogradF4;
constexpr int kWindow = F::kPoints, kPointCount = kWindow * kWindow, kTaps = 9;
constexpr int W = VecF::W;
// Input channels transformed at a time. Their points go through a buffer: the 36 planes of a packed
// weight are often a multiple of 4 KB apart, and stored one vector by one they would share the sets
// of every cache.
constexpr int kRun = 16;
// One more line per plane of the buffer, for the same reason.
constexpr int64_t kPlane = kRun * kPanelVecs * W + 16;

// taps[channel * kTaps + tap]: of `run` channels and one vector of columns, `lanes` of which exist,
// from `src` on.
template <class T>
void gather_taps(const WeightView<T>& w, const T* src, int64_t lanes, int run, float (*taps)[W]) {
#if defined(__AVX512F__)
  turn_columns(w, src, kTaps, run, lanes, taps);
#else
  std::memset(taps, 0, run * kTaps * sizeof taps[0]);
  for (int i = 0; i < run; ++i, src += w.reduction_stride)
    for (int64_t lane = 0; lane < lanes; ++lane)
      for (int tap = 0; tap < kTaps; ++tap)
        taps[i * kTaps + tap][lane] = static_cast<float>(widen(src[lane * w.column_stride + tap]));
#endif
}

// The points of one channel, `ld` apart. tap[3 * y + x] is where tap (y, x) lies.
void transform_weight(const float (*taps)[W], const int* tap, float scale, float* out, int64_t ld) {
  const VecF factor = splat(scale);
  VecF columns[3][kWindow];  // [tap x][point y]
  for (int x = 0; x < 3; ++x) {
    const VecF g[3] = {load(taps[tap[x]]) * factor, load(taps[tap[3 + x]]) * factor,
                       load(taps[tap[6 + x]]) * factor};
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
  return static_cast<size_t>(PanelSplit<VecF>::of(w.columns).padded_columns() * w.z.count *
                             w.reduction * kPointCount) *
         sizeof(float);
}

template <class T>
void pack_winograd_weight(const WeightView<T>& w, void* packed, const Parallel& pool) {
  const auto split = PanelSplit<VecF>::of(w.columns);
  int tap[kTaps];
  for (int y = 0; y < 3; ++y)
    for (int x = 0; x < 3; ++x)
      tap[3 * y + x] =
          static_cast<int>((w.y.first + y * w.y.step) * w.kernel_w + w.x.first + x * w.x.step);
  const int64_t tap_runs = ceil_div(w.reduction, int64_t{kRun}), runs = w.z.count * tap_runs;
  const int64_t units = split.count * runs, rows = w.z.count * w.reduction;
  const int64_t shards = w.columns * rows < 2048 ? 1 : min_of<int64_t>(pool.threads, units);
  parallel_for(pool, shards, [&](int64_t shard) {
    // Turning takes whole blocks.
    alignas(64) float taps[kRun * kTaps + W][W];
    auto* points =
        static_cast<float*>(scratch_bytes(Scratch::kTile, kPointCount * kPlane * sizeof(float)));
    for (int64_t unit = units * shard / shards; unit < units * (shard + 1) / shards; ++unit) {
      const int64_t panel = unit / runs, tap_z = unit % runs / tap_runs;
      const int64_t first = unit % runs % tap_runs * kRun;
      const int run = static_cast<int>(min_of<int64_t>(kRun, w.reduction - first));
      const int vecs = split.width_vecs(panel);
      const int64_t width = vecs * W, column = split.column(panel);
      for (int vec = 0; vec < vecs; ++vec) {
        const int64_t lanes = min_of<int64_t>(W, w.columns - column - vec * W);
        const int64_t at = (w.z.first + tap_z * w.z.step) * w.kernel_h * w.kernel_w;
        gather_taps(w,
                    w.data + at + (column + vec * W) * w.column_stride + first * w.reduction_stride,
                    lanes, run, taps);
        for (int i = 0; i < run; ++i) {
          const float scale =
              w.reduction_scale ? static_cast<float>(w.reduction_scale[first + i]) : 1.0f;
          transform_weight(taps + i * kTaps, tap, scale, points + i * width + vec * W, kPlane);
        }
      }
      float* to = static_cast<float*>(packed) + column * kPointCount * rows +
                  (tap_z * w.reduction + first) * width;
      for (int point = 0; point < kPointCount; ++point)
        std::memcpy(to + point * rows * width, points + point * kPlane,
                    run * width * sizeof(float));
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
