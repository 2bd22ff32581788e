#include "cpu/channel_norm.h"

#include <cmath>
#include <type_traits>

#include "cpu/channel_moments.h"
#include "cpu/conv_internal.h"
#include "cpu/reduce.h"

namespace fmk::FMK_ISA {
namespace {

constexpr int64_t kSerialElements = 32768;
constexpr int64_t kRun = 256;             // values per lane that are summed before they join a sum
constexpr int64_t kBandElements = 32768;  // of an image: what a thread takes at a time
constexpr int64_t kPixelsAtOnce = 4;      // NHWC: pixels that share what is loaded per channel

// A lane is a channel (channels last) or a pixel. Work is shared out as parts of an image that
// visit its pixels once: bands of NHWC pixels, or units, a vector of channels or a channel.
template <class T>
struct Worker {
  using V = Vec<T>;
  using A = Acc<T>;
  const ChannelNorm& p;
  int64_t pixels, units_per_image;

  explicit Worker(const ChannelNorm& norm) : p(norm) {
    pixels = p.height * p.width;
    units_per_image = p.channels_last ? ceil_div(p.channels, V::W) : p.channels;
  }
  static int64_t padded(int64_t channels) { return channels + V::W; }
  int64_t image_size() const { return p.channels * pixels; }
  int64_t first_channel(int64_t unit) const { return p.channels_last ? unit * V::W : unit; }

  // body(i) for `count` parts of all images, whose results do not depend on each other.
  template <class Body>
  void for_parts(const Parallel& pool, int64_t count, const Body& body) const {
    const int64_t shards =
        p.batch * image_size() < kSerialElements ? 1 : min_of<int64_t>(pool.threads, count);
    share_out(pool, shards, count, WorkShares::kStealing, [&](int64_t, int64_t i) { body(i); });
  }
  template <class Body>
  void for_units(const Parallel& pool, const Body& body) const {
    for_parts(pool, p.batch * units_per_image,
              [&](int64_t u) { body(u / units_per_image, u % units_per_image); });
  }

  // body(offset in the image, lanes) for pixels [begin, end) of an NCHW channel.
  template <class Body>
  FMK_LAMBDA void visit_plane(int64_t channel, int64_t begin, int64_t end, const Body& body) const {
    int64_t i = begin;
    for (; i + V::W <= end; i += V::W) body(channel * pixels + i, int(V::W));
    if (i < end) body(channel * pixels + i, static_cast<int>(end - i));
  }
  // NHWC pixels in the order in which they lie: a stream to the hardware, which a vector of each
  // pixel by turns is not. body(offset, channel, lanes, n) for a vector of channels of n pixels.
  template <class Body>
  FMK_LAMBDA void visit_pixels(int64_t begin, int64_t end, const Body& body) const {
    for (int64_t pixel = begin; pixel < end; pixel += kPixelsAtOnce) {
      const int64_t n = min_of(kPixelsAtOnce, end - pixel);
      for (int64_t c = 0; c < p.channels; c += V::W)
        body(pixel * p.channels + c, c, static_cast<int>(min_of<int64_t>(V::W, p.channels - c)), n);
    }
  }
  static V read(const T* from, int lanes) { return lanes == V::W ? load(from) : load(from, lanes); }
  static void write(T* to, V value, int lanes) {
    if (lanes == V::W)
      store(to, value);
    else
      store(to, value, lanes);
  }
};

// One shard per image.
template <class T>
ChannelMoments<T> image_moments(const Worker<T>& w, const T* input, const Parallel& pool) {
  const ChannelNorm& p = w.p;
  ChannelMoments<T> moments{p.channels_last, p.channels, w.pixels, input, nullptr};
  moments.shards = static_cast<double*>(scratch_bytes(
      Scratch::kCall, static_cast<size_t>(p.batch * moments.shard_size()) * sizeof(double)));
  moments.clear(p.batch);
  w.for_units(pool, [&](int64_t image, int64_t unit) {
    const int64_t first = w.first_channel(unit);
    const int64_t last = p.channels_last ? min_of(p.channels, first + Vec<T>::W) : first + 1;
    moments.add(image, image, 0, w.pixels, first, last);
  });
  return moments;
}

// From each image's channels to the statistics that are asked for.
template <class T>
void combine_moments(const ChannelNorm& p, const ChannelMoments<T>& moments, Acc<T>* mean,
                     Acc<T>* variance) {
  for (int64_t i = 0; i < p.statistics(); ++i) {
    Moments total;
    if (p.groups == 0) {
      total = moments.total(p.batch, i);
    } else {
      const int64_t size = p.channels / p.groups, n = i / p.groups, group = i % p.groups;
      for (int64_t c = group * size; c < (group + 1) * size; ++c) moments.add_to(&total, n, c);
    }
    mean[i] = static_cast<Acc<T>>(total.mean);
    variance[i] = static_cast<Acc<T>>(total.squares / total.count);
  }
}

// The affine form of the norm: factors[rows][channels] and terms; one row for all images or one per
// image.
template <class A>
struct AffineRows {
  const A *factors, *terms;
  int64_t step;  // from one image's row to the next
};

template <class A>
A inverse_deviation(const ChannelNorm& p, const A* variance, int64_t image, int64_t channel) {
  const int64_t i = p.groups ? image * p.groups + channel / (p.channels / p.groups) : channel;
  return static_cast<A>(1 / std::sqrt(static_cast<double>(variance[i]) + p.eps));
}
template <class A>
A mean_of(const ChannelNorm& p, const A* mean, int64_t image, int64_t channel) {
  return mean[p.groups ? image * p.groups + channel / (p.channels / p.groups) : channel];
}

template <class A>
AffineRows<A> fold(const ChannelNorm& p, const A* mean, const A* variance, const A* weight,
                   const A* bias, int64_t padded, A* room) {
  const int64_t rows = p.groups ? p.batch : 1;
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t c = 0; c < padded; ++c) {
      const bool there = c < p.channels;
      const A factor =
          there ? inverse_deviation(p, variance, n, c) * (weight ? weight[c] : A(1)) : 0;
      room[n * padded + c] = factor;
      room[(rows + n) * padded + c] =
          there ? (bias ? bias[c] : A(0)) - mean_of(p, mean, n, c) * factor : 0;
    }
  return {room, room + rows * padded, p.groups ? padded : 0};
}
template <class T>
size_t affine_bytes(const ChannelNorm& p) {
  return static_cast<size_t>(2 * (p.groups ? p.batch : 1) * Worker<T>::padded(p.channels)) *
         sizeof(Acc<T>);
}

// Normalised, added and activated: pixels [begin, end) of an NCHW unit, to `out`, where pixel
// `begin` lies where the image's first pixel would.
template <class T>
void apply(const Worker<T>& w, const AffineRows<Acc<T>>& affine, const T* input, const T* residual,
           int64_t image, int64_t unit, int64_t begin, int64_t end, T* out, int64_t out_pixels) {
  using V = Vec<T>;
  const ChannelNorm& p = w.p;
  const V factor = splat(affine.factors[image * affine.step + unit]);
  const V term = splat(affine.terms[image * affine.step + unit]);
  const T* from = input + image * w.image_size();
  const T* add = residual ? residual + image * w.image_size() : nullptr;
  const int64_t back = begin + unit * (w.pixels - out_pixels);
  w.visit_plane(unit, begin, end, [&](int64_t at, int lanes) {
    V z = fma(w.read(from + at, lanes), factor, term);
    if (add) z = z + w.read(add + at, lanes);
    w.write(out + at - back, activate(p.activation, z), lanes);
  });
}

// The same for all channels of NHWC pixels [begin, end), to `out`.
template <class T>
void apply_pixels(const Worker<T>& w, const AffineRows<Acc<T>>& affine, const T* input,
                  const T* residual, int64_t image, int64_t begin, int64_t end, T* out) {
  using V = Vec<T>;
  const ChannelNorm& p = w.p;
  const int64_t first = image * w.image_size() + begin * p.channels;
  w.visit_pixels(0, end - begin, [&](int64_t at, int64_t c, int lanes, int64_t n) {
    const V factor = load(affine.factors + image * affine.step + c);
    const V term = load(affine.terms + image * affine.step + c);
    for (; n > 0; --n, at += p.channels) {
      V z = fma(w.read(input + first + at, lanes), factor, term);
      if (residual) z = z + w.read(residual + first + at, lanes);
      w.write(out + at, activate(p.activation, z), lanes);
    }
  });
}

template <class T>
void forward_typed(const ChannelNormForward& f, const Parallel& pool) {
  using A = Acc<T>;
  const ChannelNorm& p = f.norm;
  const Worker<T> w(p);
  if (p.batch * w.image_size() == 0) return;
  const int64_t padded = Worker<T>::padded(p.channels);
  const auto* input = static_cast<const T*>(f.input);
  const auto* residual = static_cast<const T*>(f.residual);
  auto *mean = static_cast<A*>(f.mean), *variance = static_cast<A*>(f.variance);
  if (!f.given) combine_moments(p, image_moments(w, input, pool), mean, variance);
  auto* room = static_cast<A*>(scratch_bytes(Scratch::kCall2, affine_bytes<T>(p)));
  const auto affine = fold(p, mean, variance, static_cast<const A*>(f.weight),
                           static_cast<const A*>(f.bias), padded, room);
  auto* output = static_cast<T*>(f.output);
  if (p.pool.kernel_h == 0 && p.channels_last) {
    const int64_t band = max_of<int64_t>(1, kBandElements / p.channels);
    const int64_t bands = ceil_div(w.pixels, band);
    w.for_parts(pool, p.batch * bands, [&](int64_t i) {
      const int64_t image = i / bands, begin = i % bands * band;
      apply_pixels(w, affine, input, residual, image, begin, min_of(w.pixels, begin + band),
                   output + image * w.image_size() + begin * p.channels);
    });
    return;
  }
  if (p.pool.kernel_h == 0) {
    w.for_units(pool, [&](int64_t image, int64_t unit) {
      apply(w, affine, input, residual, image, unit, 0, w.pixels, output + image * w.image_size(),
            w.pixels);
    });
    return;
  }
  // Bands of pooled rows: of all channels (channels last) or of one.
  const PoolShape& q = p.pool;
  const int64_t run = p.channels_last ? p.channels : 1;
  const int64_t planes = p.channels_last ? p.batch : p.batch * p.channels;
  const int64_t band =
      max_of<int64_t>(1, kBandElements / max_of<int64_t>(1, q.stride_h * p.width * run));
  const int64_t bands = ceil_div(q.out_height, band);
  const Parallel alone{};
  w.for_parts(pool, planes * bands, [&](int64_t i) {
    const int64_t plane = i / bands, first = i % bands * band;
    const int64_t last = min_of(q.out_height, first + band);
    const int64_t top = first * q.stride_h - q.padding_h;
    const int64_t y0 = max_of<int64_t>(0, top);
    const int64_t y1 =
        max_of(y0, min_of(p.height, (last - 1) * q.stride_h - q.padding_h + q.kernel_h));
    const int64_t rows = y1 - y0;
    auto* values = static_cast<T*>(scratch_bytes(
        Scratch::kExtra, static_cast<size_t>(rows * p.width * run + Vec<T>::W) * sizeof(T)));
    const int64_t image = p.channels_last ? plane : plane / p.channels;
    if (p.channels_last) {
      apply_pixels(w, affine, input, residual, image, y0 * p.width, y1 * p.width, values);
    } else {
      const int64_t channel = plane % p.channels;
      apply(w, affine, input, residual, image, channel, y0 * p.width, y1 * p.width,
            values - channel * rows * p.width, rows * p.width);
    }
    Pooling m{p.dtype, p.channels_last, 1, run, rows, p.width, q};
    m.pool.padding_h = y0 - top;
    m.pool.out_height = last - first;
    const int64_t at = (plane * q.out_height + first) * q.out_width * run;
    if (q.kind == PoolKind::kAverage)
      avg_pool_forward(m, values, output + at, alone);
    else
      max_pool_forward(m, values, output + at, f.argmax ? f.argmax + at : nullptr, alone);
  });
}

// The pre-activation's gradient g, which is kept, and its sums.
template <class T>
struct GradientSums {
  using V = Vec<T>;
  using A = Acc<T>;
  const Worker<T>& w;
  const AffineRows<A>&affine, &normalise;
  const T *input, *residual, *grad;
  T* kept;
  int64_t padded;  // channels, from one row of sums to the next

  // What of an image's rows of numbers per channel a vector of values needs.
  struct Lanes {
    V factor, term, inverse, offset;
  };
  // Keeps g of the values at `at`; adds it to `sum`, and g times the normalised values to
  // `products`.
  FMK_LAMBDA void add(int64_t at, int lanes, const Lanes& of, V* sum, V* products) const {
    const V x = w.read(input + at, lanes);
    V g = w.read(grad + at, lanes);
    if (w.p.activation != Activation::kNone) {
      V z = fma(x, of.factor, of.term);
      if (residual) z = z + w.read(residual + at, lanes);
      g = g * activate_grad(w.p.activation, z);
    }
    w.write(kept + at, g, lanes);
    if (lanes < V::W) {
      alignas(64) A values[V::W];
      store(values, g);
      g = load(values, lanes);
    }
    *sum = *sum + g;
    *products = fma(g, fma(x, of.inverse, of.offset), *products);
  }

  // sums[image][2][channels].
  void planes(A* sums, const Parallel& pool) const {
    w.for_units(pool, [&](int64_t image, int64_t unit) {
      const int64_t base = image * w.image_size(), run = kRun * V::W;
      const Lanes of{splat(affine.factors[image * affine.step + unit]),
                     splat(affine.terms[image * affine.step + unit]),
                     splat(normalise.factors[image * normalise.step + unit]),
                     splat(normalise.terms[image * normalise.step + unit])};
      V total = zero<V>(), total_products = zero<V>();
      for (int64_t begin = 0; begin < w.pixels; begin += run) {
        V sum = zero<V>(), products = zero<V>();
        w.visit_plane(unit, begin, min_of(w.pixels, begin + run),
                      [&](int64_t at, int lanes) { add(base + at, lanes, of, &sum, &products); });
        total = total + sum;
        total_products = total_products + products;
      }
      sums[image * 2 * padded + unit] = reduce_add(total);
      sums[image * 2 * padded + padded + unit] = reduce_add(total_products);
    });
  }

  // The same of NHWC images, and part_sums[image][bands][2][channels], zero at first.
  void pixels(int64_t band, int64_t bands, A* part_sums, A* sums, const Parallel& pool) const {
    w.for_parts(pool, w.p.batch * bands, [&](int64_t i) {
      const int64_t image = i / bands, begin = i % bands * band, base = image * w.image_size();
      const A *factors = affine.factors + image * affine.step,
              *terms = affine.terms + image * affine.step,
              *inverses = normalise.factors + image * normalise.step,
              *offsets = normalise.terms + image * normalise.step;
      A* part = part_sums + i * 2 * padded;
      w.visit_pixels(begin, min_of(w.pixels, begin + band),
                     [&](int64_t at, int64_t c, int lanes, int64_t n) {
                       const Lanes of{load(factors + c), load(terms + c), load(inverses + c),
                                      load(offsets + c)};
                       V sum = load(part + c), products = load(part + padded + c);
                       for (; n > 0; --n, at += w.p.channels)
                         add(base + at, lanes, of, &sum, &products);
                       store(part + c, sum);
                       store(part + padded + c, products);
                     });
    });
    for (int64_t i = 0; i < w.p.batch * bands; ++i) {
      A* total = sums + i / bands * 2 * padded;
      for (int64_t c = 0; c < 2 * padded; ++c) total[c] += part_sums[i * 2 * padded + c];
    }
  }
};

// averages[rows][2][channels]: of the normalised values' gradient, and of its product with them.
template <class A>
void average_gradients(const ChannelNorm& p, const A* sums, const A* weight, int64_t padded,
                       A* averages) {
  const auto pixels = static_cast<double>(p.height * p.width);
  const int64_t rows = p.groups ? p.batch : 1, size = p.groups ? p.channels / p.groups : 1;
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t first = 0; first < p.channels; first += size)
      for (int part = 0; part < 2; ++part) {
        double total = 0;
        for (int64_t c = first; c < first + size; ++c) {
          const double factor = weight ? weight[c] : 1;
          for (int64_t i = p.groups ? n : 0; i < (p.groups ? n + 1 : p.batch); ++i)
            total += factor * static_cast<double>(sums[(2 * i + part) * padded + c]);
        }
        const double count = pixels * static_cast<double>(p.groups ? size : p.batch);
        for (int64_t c = first; c < first + size; ++c)
          averages[(2 * n + part) * padded + c] = static_cast<A>(total / count);
      }
}

template <class T>
void backward_typed(const ChannelNormBackward& b, const Parallel& pool) {
  using V = Vec<T>;
  using A = Acc<T>;
  const ChannelNorm& p = b.norm;
  const Worker<T> w(p);
  const int64_t padded = Worker<T>::padded(p.channels), rows = p.groups ? p.batch : 1;
  const auto* weight = static_cast<const A*>(b.weight);
  const auto* mean = static_cast<const A*>(b.mean);
  const auto* variance = static_cast<const A*>(b.variance);
  auto* kept = static_cast<T*>(b.grad_preactivation);
  const T* grad = static_cast<const T*>(b.grad_output);
  if (p.pool.kernel_h) {
    const Pooling m{p.dtype, p.channels_last, p.batch, p.channels, p.height, p.width, p.pool};
    if (p.pool.kind == PoolKind::kAverage)
      avg_pool_backward(m, grad, kept, pool);
    else
      max_pool_backward(m, grad, b.argmax, kept, pool);
    grad = kept;
  }
  const size_t affine_size = affine_bytes<T>(p);
  // What a thread takes at a time: a channel of an image, or a band of its pixels.
  const int64_t band =
      min_of(kRun, max_of<int64_t>(64, kBandElements / max_of<int64_t>(1, p.channels)));
  const int64_t parts = p.channels_last ? ceil_div(w.pixels, band) : p.channels;
  const int64_t part_sums = p.channels_last ? p.batch * parts : 0;
  const size_t sums_size =
      static_cast<size_t>((p.batch + rows + part_sums) * 2 * padded) * sizeof(A);
  auto* room = static_cast<char*>(scratch_bytes(Scratch::kCall, 2 * affine_size + sums_size));
  auto* sums = reinterpret_cast<A*>(room + 2 * affine_size);
  std::memset(room + 2 * affine_size, 0, sums_size);
  A* averages = sums + p.batch * 2 * padded;
  const auto affine = fold(p, mean, variance, weight, static_cast<const A*>(b.bias), padded,
                           reinterpret_cast<A*>(room));
  const auto normalise = fold<A>(p, mean, variance, nullptr, nullptr, padded,
                                 reinterpret_cast<A*>(room + affine_size));
  const GradientSums<T> gradients{
      w,    affine, normalise, static_cast<const T*>(b.input), static_cast<const T*>(b.residual),
      grad, kept,   padded};
  if (p.channels_last)
    gradients.pixels(band, parts, averages + rows * 2 * padded, sums, pool);
  else
    gradients.planes(sums, pool);
  for (int part = 0; part < 2; ++part) {
    auto* result = static_cast<A*>(part == 0 ? b.grad_bias : b.grad_weight);
    for (int64_t c = 0; result && c < p.channels; ++c) {
      double total = 0;
      for (int64_t n = 0; n < p.batch; ++n)
        total += static_cast<double>(sums[(2 * n + part) * padded + c]);
      result[c] = static_cast<A>(total);
    }
  }
  if (!b.grad_input || p.batch * w.image_size() == 0) return;
  average_gradients(p, sums, weight, padded, averages);
  // Per row, in place of its averages: what they take off the gradient of the input.
  for (int64_t n = 0; n < rows; ++n)
    for (int part = 0; part < 2; ++part)
      for (int64_t c = 0; c < p.channels; ++c)
        averages[(2 * n + part) * padded + c] *= normalise.factors[n * padded + c];
  const auto* input = static_cast<const T*>(b.input);
  auto* grad_input = static_cast<T*>(b.grad_input);
  const auto write_gradient = [&](int64_t at, int lanes, V factor, V inverse, V offset, V first,
                                  V second) FMK_LAMBDA {
    const V normalised = fma(w.read(input + at, lanes), inverse, offset);
    const V g = fma(w.read(kept + at, lanes), factor, zero<V>() - first);
    w.write(grad_input + at, fnma(normalised, second, g), lanes);
  };
  w.for_parts(pool, p.batch * parts, [&](int64_t i) {
    const int64_t image = i / parts, base = image * w.image_size();
    const A *average = averages + (p.groups ? image : 0) * 2 * padded,
            *inverses = normalise.factors + image * normalise.step,
            *offsets = normalise.terms + image * normalise.step,
            *factors = affine.factors + image * affine.step;
    if (p.channels_last) {
      const int64_t begin = i % parts * band;
      w.visit_pixels(begin, min_of(w.pixels, begin + band),
                     [&](int64_t at, int64_t c, int lanes, int64_t n) {
                       const V factor = load(factors + c), inverse = load(inverses + c),
                               offset = load(offsets + c), first = load(average + c),
                               second = load(average + padded + c);
                       for (; n > 0; --n, at += p.channels)
                         write_gradient(base + at, lanes, factor, inverse, offset, first, second);
                     });
    } else {
      const int64_t c = i % parts;
      const V factor = splat(factors[c]), inverse = splat(inverses[c]), offset = splat(offsets[c]),
              first = splat(average[c]), second = splat(average[padded + c]);
      w.visit_plane(c, 0, w.pixels, [&](int64_t at, int lanes) {
        write_gradient(base + at, lanes, factor, inverse, offset, first, second);
      });
    }
  });
}

void forward(const ChannelNormForward& f, const Parallel& pool) {
  with_type(f.norm.dtype,
            [&](auto* type) { forward_typed<std::remove_pointer_t<decltype(type)>>(f, pool); });
}
void backward(const ChannelNormBackward& b, const Parallel& pool) {
  with_type(b.norm.dtype,
            [&](auto* type) { backward_typed<std::remove_pointer_t<decltype(type)>>(b, pool); });
}

}  // namespace

const ChannelNormKernels& channel_norm_kernels() {
  static constexpr ChannelNormKernels table{&forward, &backward};
  return table;
}

}  // namespace fmk::FMK_ISA
