// Mean and variance per channel of images, gathered part by part: by a pass over all of them, or by
// a convolution, of each block of its output right after that was stored, while it is in the cache.
#pragma once

#include <cstring>

#include "cpu/simd.h"
#include "cpu/work_shares.h"

namespace fmk::FMK_ISA {

// Counts, means and summed squares of deviations of two sets make those of their union (Chan, Golub
// and LeVeque 1979).
struct Moments {
  double count = 0, mean = 0, squares = 0;
  void add(double n, double m, double s) {
    if (n == 0) return;
    const double total = count + n, delta = m - mean;
    mean += delta * (n / total);
    squares += s + delta * delta * (count * n / total);
    count = total;
  }
};

// Of dense images, N[D]HWC if channels_last, else NC[D]HW. Shards gather each for itself.
template <class T>
struct ChannelMoments {
  bool channels_last;
  int64_t channels, pixels;  // of an image
  const T* images;
  double* shards;  // [shard][count, mean, squares][channels]; null: nothing is gathered

  bool wanted() const { return shards != nullptr; }
  // How the units are shared out whose results are gathered: sums depend on who adds what.
  WorkShares::Kind sharing() const { return wanted() ? WorkShares::kFixed : WorkShares::kStealing; }
  int64_t shard_size() const { return 3 * channels; }
  // Such that shard 0 is that one.
  ChannelMoments from_shard(int64_t shard) const {
    ChannelMoments moved = *this;
    if (shards) moved.shards += shard * shard_size();
    return moved;
  }
  void clear(int64_t count) const {
    std::memset(shards, 0, static_cast<size_t>(count * shard_size()) * sizeof(double));
  }

  // What has been stored in pixels [begin, end) of an image, channels [first, last). Channels last,
  // the pixels may go on into the images that follow.
  void add(int64_t shard, int64_t image, int64_t begin, int64_t end, int64_t first,
           int64_t last) const;

  // Of a channel, in all of `count` shards.
  Moments total(int64_t count, int64_t channel) const {
    Moments sum;
    for (int64_t shard = 0; shard < count; ++shard) add_to(&sum, shard, channel);
    return sum;
  }
  void add_to(Moments* sum, int64_t shard, int64_t channel) const {
    const double* of = shards + shard * shard_size() + channel;
    sum->add(of[0], of[channels], of[2 * channels]);
  }
};

}  // namespace fmk::FMK_ISA
