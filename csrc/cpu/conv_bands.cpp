// Convolutions one after the other without the whole images between them, which would leave the
// cache before they are read: a thread computes a band of the last layer's rows after the other,
// and of the layers before it just the rows under that band. Rows that the next band needs, too,
// stay in the buffer.

#include <cstring>
#include <type_traits>

#include "cpu/conv_forward.h"
#include "cpu/reduce.h"

namespace fmk::FMK_ISA {
namespace {

constexpr int kMaxBanded = 8;  // layers that are computed band by band together
// The rows that a thread holds between the layers should stay in L2, and so should the weights,
// which every band reads.
constexpr int64_t kBandBytes = 384 << 10;
constexpr int64_t kBandedWeights = 512 << 10;
// Images between the layers that stay in L2 anyway.
constexpr int64_t kSmallImages = 512 << 10;
// With fewer pixels per thread the layers' own ways to share out their work are better.
constexpr int64_t kFewPixels = 128;

int64_t element_bytes(DType dtype) {
  return dtype == DType::kF64 ? 8 : dtype == DType::kF32 ? 4 : 2;
}
int64_t output_bytes(const ConvForward& p) {
  return p.shape.batch * p.shape.out_channels * p.shape.out_pixels() * element_bytes(p.shape.dtype);
}
double flops(const ConvShape& s) {
  return 2.0 * static_cast<double>(s.batch * s.out_pixels() * s.out_channels) *
         static_cast<double>(s.channels / s.groups * s.taps());
}
int64_t weight_bytes(const ConvShape& s) {
  return s.out_channels * (s.channels / s.groups) * s.taps() * element_bytes(s.dtype);
}

// Whether rows of this layer can be computed apart from the others.
bool has_bands(const ConvForward& p) {
  const ConvShape& s = p.shape;
  const ReadWeight weight = weight_read_by(p);
  return s.axes == 2 && !s.transposed && s.padding_mode == PaddingMode::kZeros &&
         p.pool.kernel_h == 0 && weight.packed && weight.algorithm == ConvAlgorithm::kDirect;
}

struct Rows {
  int64_t begin, end;
};
// The rows of the input under output rows.
Rows rows_under(const Axis& y, Rows out) {
  const int64_t begin = max_of<int64_t>(0, min_of(y.in_size, y.position(out.begin, 0)));
  const int64_t end = min_of(y.in_size, y.position(out.end - 1, y.taps - 1) + 1);
  return {begin, max_of(begin, end)};
}

template <class T>
struct Banded {
  const Correlation<T>* layers;
  int64_t count, band_rows;         // of the last layer
  int64_t capacity[kMaxBanded];     // rows of a layer's output that a thread holds
  int64_t row_numbers[kMaxBanded];  // of that output

  Banded(const Correlation<T>* correlations, int64_t n, int64_t threads)
      : layers(correlations), count(n) {
    const int64_t height = layers[n - 1].y.out_size;
    for (int64_t i = 0; i < n; ++i)
      row_numbers[i] = layers[i].x.out_size * layers[i].groups * layers[i].out_channels;
    for (band_rows = height; set_capacities() > kBandBytes && band_rows > 1;)
      band_rows = ceil_div(band_rows, int64_t{2});
    // Something for every thread.
    const int64_t images = layers[n - 1].batch;
    while (images * ceil_div(height, band_rows) < threads && band_rows > 1)
      band_rows = ceil_div(band_rows, int64_t{2});
    set_capacities();
  }

  int64_t bands() const { return ceil_div(layers[count - 1].y.out_size, band_rows); }

  // The bands of all images.
  void run(const Parallel& pool, int64_t threads) const {
    const int64_t per_image = bands();
    WorkShares work(threads, layers[0].batch * per_image);
    parallel_for(pool, work.count(), [&](int64_t shard) {
      Held held[kMaxBanded];
      auto* memory = static_cast<T*>(scratch_bytes(Scratch::kCall, held_bytes()));
      for (int64_t i = 0; i + 1 < count; ++i) {
        held[i].rows = memory;
        memory += capacity[i] * row_numbers[i];
      }
      for (int64_t unit; work.take(shard, &unit);) {
        const int64_t image = unit / per_image, begin = unit % per_image * band_rows;
        run_band(image, {begin, min_of(layers[count - 1].y.out_size, begin + band_rows)}, held);
      }
    });
  }

 private:
  // What a thread holds of a layer's output.
  struct Held {
    int64_t image = -1;
    Rows range = {0, 0};
    T* rows = nullptr;
  };

  int64_t held_bytes() const {
    int64_t numbers = 0;
    for (int64_t i = 0; i + 1 < count; ++i) numbers += capacity[i] * row_numbers[i];
    return numbers * static_cast<int64_t>(sizeof(T));
  }
  int64_t set_capacities() {
    capacity[count - 1] = band_rows;
    for (int64_t i = count - 1; i > 0; --i) {
      const Axis& y = layers[i].y;
      const int64_t rows = (capacity[i] - 1) * y.stride + (y.taps - 1) * y.step + 1;
      capacity[i - 1] = min_of(rows, y.in_size);
    }
    return held_bytes();
  }

  void run_band(int64_t image, Rows band, Held* held) const {
    Rows fresh[kMaxBanded];  // rows that each layer computes for this band
    fresh[count - 1] = band;
    int64_t first = count - 1;
    for (; first > 0; --first) {
      const Rows needed = rows_under(layers[first].y, fresh[first]);
      fresh[first - 1] = slide(image, needed, row_numbers[first - 1], &held[first - 1]);
      if (fresh[first - 1].begin == fresh[first - 1].end) break;
    }
    for (int64_t i = first; i < count; ++i) {
      const Held* under = i > 0 ? &held[i - 1] : nullptr;
      compute(i, image, fresh[i], under, i + 1 < count ? &held[i] : nullptr);
    }
  }

  // Moves what is held so that it begins with the rows that are needed, and returns those among
  // them that are still to be computed.
  static Rows slide(int64_t image, Rows needed, int64_t numbers, Held* held) {
    int64_t known = needed.begin;
    if (held->image == image && held->range.begin <= needed.begin)
      known = max_of(needed.begin, min_of(needed.end, held->range.end));
    if (known > needed.begin)
      std::memmove(static_cast<void*>(held->rows),
                   held->rows + (needed.begin - held->range.begin) * numbers,
                   (known - needed.begin) * numbers * sizeof(T));
    held->image = image;
    held->range = needed;
    return {known, needed.end};
  }

  // Rows of a layer's output, to what a thread holds of it or, of the last layer, to the image.
  void compute(int64_t i, int64_t image, Rows rows, const Held* under, Held* to) const {
    Correlation<T> part = layers[i];
    part.batch = 1;
    part.y.offset += rows.begin * part.y.stride;
    if (under) {
      part.input = under->rows;
      part.y.in_size = under->range.end - under->range.begin;
      part.y.offset -= under->range.begin;
    } else {
      part.input += image * part.y.in_size * part.x.in_size * part.groups * part.channels;
    }
    const int64_t height = part.y.out_size;
    part.y.out_size = rows.end - rows.begin;
    int64_t offset = image * height * row_numbers[i];
    if (to) {
      part.output = to->rows + (rows.begin - to->range.begin) * row_numbers[i];
      part.place_y = {part.y.out_size, 0, 1};
    } else if (part.channels_last) {
      offset += rows.begin * row_numbers[i];
      part.output += offset;
      if (part.residual) part.residual += offset;
      part.place_y = {part.y.out_size, 0, 1};
    } else {
      part.output += offset;
      if (part.residual) part.residual += offset;
      part.place_y = {height, rows.begin, 1};
    }
    correlate(part, Parallel{});
  }
};

template <class T>
void run_banded(const ConvForward* layers, int64_t count, const Parallel& pool) {
  int64_t numbers = 0;
  double work = 0;
  for (int64_t i = 0; i < count; ++i) {
    numbers += affine_numbers<T>(layers[i]);
    work += flops(layers[i].shape);
  }
  auto* room = static_cast<Acc<T>*>(scratch_bytes(Scratch::kCall2, numbers * sizeof(Acc<T>)));
  Correlation<T> correlations[kMaxBanded];
  for (int64_t i = 0; i < count; ++i) {
    Correlation<T>& c = correlations[i];
    c = correlation_of<T>(layers[i], weight_read_by(layers[i]).packed, room);
    room += affine_numbers<T>(layers[i]);
    // Between the layers lie pixels.
    const bool reads_pixels = i > 0 || c.reads_pixels();
    c.channels_last |= i + 1 < count;
    c.turns = reads_pixels != c.channels_last;
  }
  const int64_t threads = work < kSerialFlops ? 1 : pool.threads;
  Banded<T>(correlations, count, threads).run(pool, threads);
}

}  // namespace

int64_t banded_layers(const ConvForward* layers, int64_t count) {
  int64_t n = 0, between = 0, weights = 0;
  while (n < count && n < kMaxBanded && has_bands(layers[n])) {
    weights += weight_bytes(layers[n].shape);
    if (weights > kBandedWeights) break;
    if (n > 0) between += output_bytes(layers[n - 1]);
    ++n;
  }
  if (n < 2 || between <= kSmallImages) return 1;
  const ConvShape& last = layers[n - 1].shape;
  return last.batch * last.out_pixels() < kFewPixels ? 1 : n;
}

void banded_forward(const ConvForward* layers, int64_t count, const Parallel& pool) {
  with_type(layers[0].shape.dtype, [&](auto* type) {
    run_banded<std::remove_pointer_t<decltype(type)>>(layers, count, pool);
  });
}

}  // namespace fmk::FMK_ISA
