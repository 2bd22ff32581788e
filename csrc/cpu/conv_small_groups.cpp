#include "cpu/conv_small_groups.h"

#include <type_traits>

#include "cpu/conv_pixel_rows.h"
#include "cpu/conv_plane_rows.h"

namespace fmk::FMK_ISA {
namespace {

constexpr int64_t kMaxImageChannels = 4;   // of a first layer, which is a single group
constexpr int64_t kBandBytes = 512 << 10;  // of the input under a band of rows: half of L2
constexpr int64_t kFewestBandRows = 4;
constexpr double kSerialProducts = 2.5e5;  // about 20 us of one core, as for kSerialFlops

template <class T, bool kDepthwise, int kTaps>
void run_pixels(const Correlation<T>& p, const Parallel& pool, int64_t threads) {
  const PixelRows<T, kDepthwise> work(p);
  const int64_t height = p.y.out_size, rows = p.batch * height, shards = min_of(threads, rows);
  const int64_t row_bytes =
      p.x.in_size * p.x.stride * work.channels * static_cast<int64_t>(sizeof(T));
  const int64_t band = max_of(kFewestBandRows, kBandBytes / max_of<int64_t>(1, row_bytes));
  parallel_for(pool, shards, [&](int64_t shard) {
    const int64_t end = rows * (shard + 1) / shards;
    for (int64_t row = rows * shard / shards, next; row < end; row = next) {
      const int64_t image = row / height, first = row - image * height;
      next = min_of(end, row + min_of(band, height - first));
      if (p.x.stride == 1)
        work.template run<kTaps, 1>(image, first, first + next - row);
      else
        work.template run<kTaps, 2>(image, first, first + next - row);
      if (p.moments.wanted())
        p.moments.add(shard, 0, row * p.x.out_size, next * p.x.out_size, 0,
                      p.groups * p.out_channels);
    }
    if (work.streams) stream_end();
  });
}

template <class T>
using MacOfAcc = std::conditional_t<std::is_same_v<Acc<T>, double>, MacF64, MacF32>;

template <class T, class M>
void run_planes(const Correlation<T>& p, int64_t threads, const Parallel& pool) {
  const PlaneRows<T, M> rows(p);
  // Where there are few images of one group, their rows are shared out.
  constexpr int64_t kRows = 8, kUnits = 8;
  const int64_t planes = p.batch * p.groups, height = p.y.out_size;
  const int64_t parts = planes >= kUnits * threads
                            ? 1
                            : max_of<int64_t>(1, min_of(height / kRows, kUnits * threads / planes));
  const int64_t units = planes * parts;
  share_out(pool, min_of(threads, units), units, p.moments.sharing(),
            [&](int64_t shard, int64_t unit) {
              const int64_t plane = unit / parts, part = unit % parts;
              const int64_t image = plane / p.groups, group = plane % p.groups;
              const int64_t y0 = height * part / parts, y1 = height * (part + 1) / parts;
              rows.run(image, group, y0, y1);
              if (p.moments.wanted())
                p.moments.add(shard, image, y0 * p.x.out_size, y1 * p.x.out_size,
                              group * p.out_channels, (group + 1) * p.out_channels);
            });
}

}  // namespace

template <class T>
bool correlate_small_groups(const Correlation<T>& p, const Parallel& pool) {
  using V = Vec<T>;
  const bool depthwise = p.channels == 1 && p.out_channels == 1;
  if (p.pool.kernel_h || p.place_y.step != 1 || p.place_x.step != 1 || p.x.stride > 2 ||
      p.y.taps == 0 || p.x.taps == 0 || p.x.offset > 0 || p.y.in_size == 0 || p.x.in_size == 0)
    return false;
  if (p.groups == 1) {
    // Dot products of pairs are faster.
    if (Mac<T>::kPair != 1 || p.channels_last || p.channels > kMaxImageChannels ||
        sizeof(Acc<T>) != sizeof(float) || p.out_channels < 8 || p.x.out_size < V::W)
      return false;
  } else if (p.channels > kMaxGroupChannels ||
             p.out_channels > min_of<int64_t>(kMaxGroupChannels, kPanelVecs * V::W)) {
    return false;
  }
  const double products = static_cast<double>(p.batch * p.y.out_size * p.x.out_size * p.groups) *
                          static_cast<double>(p.channels * p.out_channels * p.y.taps * p.x.taps);
  const int64_t threads = products < kSerialProducts ? 1 : pool.threads;
  if (!p.channels_last) {
    // Pairs of channels where dot products of pairs are there.
    if (p.channels > 1)
      run_planes<T, Mac<T>>(p, threads, pool);
    else
      run_planes<T, MacOfAcc<T>>(p, threads, pool);
    return true;
  }
  // Wide filters and groups of several channels are worth their code in the types that are used.
  constexpr bool kCommon = sizeof(T) <= 4 && !std::is_same_v<T, f16>;
  if (p.x.step != 1 || p.groups * p.channels < V::W) return false;
  if (depthwise) {
    if (p.x.taps == 3) return run_pixels<T, true, 3>(p, pool, threads), true;
    if constexpr (kCommon) {
      if (p.x.taps == 5) return run_pixels<T, true, 5>(p, pool, threads), true;
      if (p.x.taps == 7) return run_pixels<T, true, 7>(p, pool, threads), true;
    }
  } else if constexpr (kCommon) {
    if (p.channels == p.out_channels && V::W % p.channels == 0 && p.channels % Mac<T>::kPair == 0 &&
        p.x.taps == 3)
      return run_pixels<T, false, 3>(p, pool, threads), true;
  }
  return false;
}

template bool correlate_small_groups(const Correlation<float>&, const Parallel&);
template bool correlate_small_groups(const Correlation<bf16>&, const Parallel&);
template bool correlate_small_groups(const Correlation<f16>&, const Parallel&);
template bool correlate_small_groups(const Correlation<double>&, const Parallel&);

}  // namespace fmk::FMK_ISA
