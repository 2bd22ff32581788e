#include "cpu/channel_moments.h"

#include "cpu/vmath.h"

namespace fmk::FMK_ISA {
namespace {

constexpr int64_t kFlush = 512;  // vectors gathered in the compute type

template <class T>
struct Gatherer {
  using V = Vec<T>;
  using A = Acc<T>;
  // Vectors that are held in registers: they are read once, and their deviations are those from
  // their own mean. So that no digits are lost where means are far from zero, everything is
  // relative to one of the values until it is joined in double.
  static constexpr int kRun = sizeof(V) == 64 ? 16 : 8;
  int64_t channels, pixels;  // of an image

  // Lane by lane, of `count` vectors that lie `step` numbers apart; the mean relative to the pivot.
  template <bool kWhole>
  FMK_NOINLINE void gather(const T* from, int64_t step, int64_t count, int lanes, V pivot, V* mean,
                           V* squares) {
    const auto value = [&](int64_t i) FMK_LAMBDA {
      return (kWhole ? load(from + i * step) : load(from + i * step, lanes)) - pivot;
    };
    V all_mean = zero<V>(), all_squares = zero<V>();
    const auto join = [&](int64_t before, int64_t n, V centre, V deviations) FMK_LAMBDA {
      const A share = static_cast<A>(n) / static_cast<A>(before + n);
      const V delta = centre - all_mean;
      all_mean = fma(delta, splat(share), all_mean);
      all_squares =
          all_squares + fma(delta * delta, splat(share * static_cast<A>(before)), deviations);
    };
    int64_t i = 0;
    for (; i + kRun <= count; i += kRun) {
      V x[kRun], sum[4];
      FMK_FOR (k, kRun) {
        x[k] = value(i + k);
        sum[k % 4] = k < 4 ? x[k] : sum[k % 4] + x[k];
      }
      const V centre = ((sum[0] + sum[1]) + (sum[2] + sum[3])) * splat_as<V>(1.0 / kRun);
      V deviations[4] = {zero<V>(), zero<V>(), zero<V>(), zero<V>()};
      FMK_FOR (k, kRun) {
        const V d = x[k] - centre;
        deviations[k % 4] = fma(d, d, deviations[k % 4]);
      }
      join(i, kRun, centre, (deviations[0] + deviations[1]) + (deviations[2] + deviations[3]));
    }
    if (i < count) {
      V sum = zero<V>(), deviations = zero<V>();
      for (int64_t k = i; k < count; ++k) sum = sum + value(k);
      const V centre = sum * splat(A(1) / static_cast<A>(count - i));
      for (int64_t k = i; k < count; ++k) {
        const V d = value(k) - centre;
        deviations = fma(d, d, deviations);
      }
      join(i, count - i, centre, deviations);
    }
    *mean = all_mean;
    *squares = all_squares;
  }

  // `count` channels, side by side in each of n pixels.
  void add_pixels(const T* from, int64_t n, int count, double* of) const {
    V mean, squares;
    const V pivot = count == V::W ? load(from) : load(from, count);
    if (count == V::W)
      gather<true>(from, channels, n, count, pivot, &mean, &squares);
    else
      gather<false>(from, channels, n, count, pivot, &mean, &squares);
    alignas(64) A pivots[V::W], means[V::W], sums[V::W];
    store(pivots, pivot);
    store(means, mean);
    store(sums, squares);
    join(pivots, means, sums, n, count, of);
  }

  // `count` channels, n pixels of each plane.
  void add_planes(const T* from, int64_t n, int count, double* of) const {
    alignas(64) A pivots[V::W], means[V::W], sums[V::W];
    const int64_t vectors = n / V::W, rest = n - vectors * V::W;
    for (int j = 0; j < count; ++j, from += pixels) {
      Moments plane;
      pivots[j] = widen(from[0]);
      const V pivot = splat(pivots[j]);
      if (vectors > 0) {
        V mean, squares;
        gather<true>(from, V::W, vectors, V::W, pivot, &mean, &squares);
        const A centre = reduce_add(mean) * A(1.0 / V::W);
        const V delta = mean - splat(centre);
        squares = fma(delta * delta, splat(static_cast<A>(vectors)), squares);
        plane = {static_cast<double>(vectors * V::W), centre, reduce_add(squares)};
      }
      if (rest > 0) {
        const int lanes = static_cast<int>(rest);
        const V tail = there(load(from + n - rest, lanes) - pivot, lanes);
        const A centre = reduce_add(tail) / static_cast<A>(rest);
        const V d = there(tail - splat(centre), lanes);
        plane.add(static_cast<double>(rest), centre, reduce_add(d * d));
      }
      means[j] = static_cast<A>(plane.mean);
      sums[j] = static_cast<A>(plane.squares);
    }
    join(pivots, means, sums, n, count, of);
  }

  // Nothing from the lanes that are not there.
  static V there(V x, int lanes) {
    alignas(64) A values[V::W];
    store(values, x);
    return load(values, lanes);
  }

  // Channels that are added together have been so from the start: they share their count.
  void join(const A* pivots, const A* means, const A* sums, int64_t n, int count,
            double* of) const {
    const double before = of[0], total = before + static_cast<double>(n);
    const double share = static_cast<double>(n) / total, weight = before * share;
    double *mean = of + channels, *squares = mean + channels;
    for (int j = 0; j < count; ++j) {
      const double delta =
          (static_cast<double>(pivots[j]) - mean[j]) + static_cast<double>(means[j]);
      mean[j] += delta * share;
      squares[j] += static_cast<double>(sums[j]) + delta * delta * weight;
      of[j] = total;
    }
  }
};

}  // namespace

template <class T>
void ChannelMoments<T>::add(int64_t shard, int64_t image, int64_t begin, int64_t end, int64_t first,
                            int64_t last) const {
  using V = Vec<T>;
  const Gatherer<T> gatherer{channels, pixels};
  double* of = shards + shard * shard_size();
  const T* from = images + image * channels * pixels;
  for (int64_t c = first; c < last; c += V::W) {
    const int count = static_cast<int>(min_of<int64_t>(V::W, last - c));
    if (channels_last) {
      for (int64_t i = begin; i < end; i += kFlush)
        gatherer.add_pixels(from + i * channels + c, min_of(kFlush, end - i), count, of + c);
    } else {
      for (int64_t i = begin; i < end; i += kFlush * V::W)
        gatherer.add_planes(from + c * pixels + i, min_of(kFlush * V::W, end - i), count, of + c);
    }
  }
}

template void ChannelMoments<float>::add(int64_t, int64_t, int64_t, int64_t, int64_t,
                                         int64_t) const;
template void ChannelMoments<bf16>::add(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t) const;
template void ChannelMoments<f16>::add(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t) const;
template void ChannelMoments<double>::add(int64_t, int64_t, int64_t, int64_t, int64_t,
                                          int64_t) const;

}  // namespace fmk::FMK_ISA
