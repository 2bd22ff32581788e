// The gradient of a depthwise convolution's weight, NHWC: both images are read where they lie.
//
//   grad_weight[channel][tap] = sum over pixels of input[pixel + tap][channel] *
//   grad[pixel][channel]
//
// A run of channels keeps the sums of all taps in registers for a strip of columns through a band
// of rows; in memory sums of bands are added up, so that rounding errors do not grow with one long
// chain.

#include <type_traits>

#include "cpu/conv_pixel_rows.h"
#include "cpu/conv_weight_grad_depthwise.h"

namespace fmk::FMK_ISA {
namespace {

constexpr int kTaps = 3;  // in both directions
constexpr int64_t kBandRows = 8;

template <class T>
struct DepthwiseWeightGrad {
  using V = Vec<T>;
  using A = Acc<T>;
  static constexpr int kSums = kTaps * kTaps + 1;  // of the taps, and of the gradient
  // Columns of a strip: as many as leave registers for the sums.
  static constexpr int kColumns = 8, kWideColumns = 4;
  const WeightGradient<T>& p;
  int64_t channels, rows, shards;
  A* buffers;  // [shard][kSums][channels]

  DepthwiseWeightGrad(const WeightGradient<T>& problem, const Parallel& pool) : p(problem) {
    channels = p.groups;
    rows = p.batch * p.y.out_size;
    const double flops =
        2.0 * static_cast<double>(rows * p.x.out_size) * static_cast<double>(kSums * channels);
    shards = max_of<int64_t>(1, min_of<int64_t>(flops < kSerialFlops ? 1 : pool.threads, rows));
    buffers = static_cast<A*>(scratch_bytes(Scratch::kCall, shards * kSums * channels * sizeof(A)));
  }

  template <int kStride>
  void run(int64_t shard) const {
    A* sums = buffers + shard * kSums * channels;
    std::memset(static_cast<void*>(sums), 0, kSums * channels * sizeof(A));
    const int64_t end = rows * (shard + 1) / shards;
    for (int64_t row = rows * shard / shards, next; row < end; row = next) {
      const int64_t image = row / p.y.out_size, y0 = row - image * p.y.out_size;
      next = min_of(end, row + min_of(kBandRows, p.y.out_size - y0));
      const Band band{p.input + image * p.y.in_size * p.x.in_size * channels,
                      p.grad + image * p.y.out_size * p.x.out_size * channels, y0, y0 + next - row};
      int64_t channel = 0;
      if constexpr (kHasWideRuns<T>) {
        channel = channels / (2 * V::W) * (2 * V::W);
        strips<kWideColumns, 2, kStride>(band, 0, channel, sums);
      }
      if (channel == channels) continue;
      if (p.x.out_size % (kColumns - 1) == 0)
        strips<kColumns - 1, 1, kStride>(band, channel, channels, sums);
      else
        strips<kColumns, 1, kStride>(band, channel, channels, sums);
    }
  }

  // Of channels [channel, channel + W).
  void finish(int64_t channel) const {
    const V scale = p.scale ? load(p.scale + channel) : splat_as<V>(1);
    const V sum = total((kSums - 1) * channels + channel);
    if (p.grad_shift) store(p.grad_shift + channel, sum);
    if (p.grad_bias) store(p.grad_bias + channel, sum * scale);
    for (int tap = 0; tap < kTaps * kTaps; ++tap) {
      A values[V::W];
      store(values, total(tap * channels + channel) * scale);
      for (int64_t i = 0; i < V::W; ++i)
        narrow(p.grad_weight + (channel + i) * kTaps * kTaps + tap, values[i]);
    }
  }

 private:
  // Output rows [y0, y1) of an image.
  struct Band {
    const T *input, *grad;
    int64_t y0, y1;
  };

  // P columns at a time, and what is left over one by one.
  template <int P, int N, int kStride>
  void strips(const Band& band, int64_t begin, int64_t end, A* sums) const {
    int64_t x = 0;
    for (; x + P <= p.x.out_size; x += P) {
      const int64_t first = x * kStride + p.x.offset;
      if (first >= 0 && first + (P - 1) * kStride + kTaps <= p.x.in_size)
        strip<P, N, kStride, true>(band, x, begin, end, sums);
      else
        strip<P, N, kStride, false>(band, x, begin, end, sums);
    }
    for (; x < p.x.out_size; ++x) strip<1, N, kStride, false>(band, x, begin, end, sums);
  }

  template <int P, int N, int kStride, bool kInside>
  void strip(const Band& band, int64_t x, int64_t begin, int64_t end, A* sums) const {
    constexpr int64_t kRun = N * V::W;
    for (int64_t channel = begin; channel < end; channel += kRun) {
      V sum[kSums][N];
      FMK_FOR (i, kSums)
        FMK_FOR (n, N) sum[i][n] = zero<V>();
      for (int64_t y = band.y0; y < band.y1; ++y)
        add_row<P, N, kStride, kInside>(band, y, x, channel, sum);
      FMK_FOR (i, kSums) {
        if constexpr (N == 2) interleave(sum[i]);
        FMK_FOR (n, N) {
          A* to = sums + i * channels + channel + n * V::W;
          store(to, load(to) + sum[i][n]);
        }
      }
    }
  }

  template <int P, int N, int kStride, bool kInside>
  FMK_LAMBDA void add_row(const Band& band, int64_t y, int64_t x, int64_t channel,
                          V (&sum)[kSums][N]) const {
    constexpr int64_t kRun = N * V::W;
    const int64_t first = x * kStride + p.x.offset;
    const T* grads = band.grad + (y * p.x.out_size + x) * channels + channel;
    V grad[P][N];
    FMK_FOR (i, P) {
      load_run(grads + i * channels, grad[i]);
      FMK_FOR (n, N) sum[kSums - 1][n] = sum[kSums - 1][n] + grad[i][n];
      // The next run's part: columns by turns are no stream to the hardware.
      __builtin_prefetch(grads + i * channels + kRun, 0, 2);
    }
    FMK_FOR (ty, kTaps) {
      const int64_t in_y = p.y.position(y, ty);
      if (in_y < 0 || in_y >= p.y.in_size) continue;
      const T* row = band.input + (in_y * p.x.in_size + first) * channels + channel;
      FMK_FOR (column, (P - 1) * kStride + kTaps) {
        if (!kInside && (first + column < 0 || first + column >= p.x.in_size)) continue;
        V value[N];
        load_run(row + column * channels, value);
        if (ty >= kTaps - kStride) __builtin_prefetch(row + column * channels + kRun, 0, 2);
        FMK_FOR (i, P) {
          const int tap = column - i * kStride;
          if (tap >= 0 && tap < kTaps)
            FMK_FOR (n, N)
              sum[ty * kTaps + tap][n] = fma(value[n], grad[i][n], sum[ty * kTaps + tap][n]);
        }
      }
    }
  }

  // The buffers' total at `offset`.
  V total(int64_t offset) const {
    V sum = load(buffers + offset);
    for (int64_t shard = 1; shard < shards; ++shard)
      sum = sum + load(buffers + shard * kSums * channels + offset);
    return sum;
  }
};

}  // namespace

template <class T>
bool depthwise_weight_gradient(const WeightGradient<T>& p, const Parallel& pool) {
  const bool planar = p.z.in_size == 1 && p.z.out_size == 1 && p.z.taps == 1;
  if (!p.channels_last || !planar || p.padding != PaddingMode::kZeros || !p.grad_weight ||
      p.channels != 1 || p.out_channels != 1 || p.groups == 1 || p.groups % Vec<T>::W != 0 ||
      p.y.taps != kTaps || p.x.taps != kTaps || p.x.step != 1 || p.x.stride > 2)
    return false;
  const DepthwiseWeightGrad<T> work(p, pool);
  parallel_for(pool, work.shards, [&](int64_t shard) {
    if (p.x.stride == 1)
      work.template run<1>(shard);
    else
      work.template run<2>(shard);
  });
  for (int64_t channel = 0; channel < work.channels; channel += Vec<T>::W) work.finish(channel);
  return true;
}

template bool depthwise_weight_gradient(const WeightGradient<float>&, const Parallel&);
template bool depthwise_weight_gradient(const WeightGradient<bf16>&, const Parallel&);
template bool depthwise_weight_gradient(const WeightGradient<f16>&, const Parallel&);

}  // namespace fmk::FMK_ISA
