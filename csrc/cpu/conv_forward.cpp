// The forward pass: which algorithm, and what it is given.

#include <cstring>
#include <type_traits>

#include "cpu/conv_forward.h"
#include "cpu/conv_pointwise.h"
#include "cpu/conv_winograd.h"
#include "cpu/reduce.h"

namespace fmk::FMK_ISA {
namespace {

ConvAlgorithm choose_algorithm(const ConvShape& s, bool exact) {
  const ConvShape& as_winograd = s.transposed ? turned(s) : s;
  const bool for_many = s.batch == 0;  // the weight is being packed
  const bool pays = for_many ? winograd_pays(as_winograd) : winograd_pays_once(as_winograd);
  return !exact && pays ? ConvAlgorithm::kWinograd4 : ConvAlgorithm::kDirect;
}

// Whether there may be rows of the convolution that no window covers: they are not computed.
bool leaves_rows(const PoolShape& pool, int64_t rows) {
  return pool.stride_h > pool.kernel_h ||
         (pool.out_height - 1) * pool.stride_h - pool.padding_h + pool.kernel_h < rows;
}

// Calls body with a null pointer of a type that Winograd is compiled for: all but double.
template <class Body>
FMK_INLINE void with_winograd_type(DType dtype, const Body& body) {
  with_type(dtype, [&](auto* type) {
    if constexpr (sizeof(*type) <= 4) body(type);
  });
}

// The weight as Winograd reads it: of a transposed convolution with its taps turned.
template <class T>
WeightView<T> winograd_view(const ConvShape& s, const T* weight) {
  if (!s.transposed) return weight_view(s, weight);
  WeightView<T> view = adjoint_view<T>(s, weight, nullptr);
  turn(s, &view);
  return view;
}

size_t bytes_for(const ConvShape& s, ConvAlgorithm algorithm) {
  size_t bytes = 0;
  if (algorithm == ConvAlgorithm::kWinograd4) {
    with_winograd_type(s.dtype,
                       [&](auto* type) { bytes = packed_winograd_bytes(winograd_view(s, type)); });
  } else {
    with_type(s.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      bytes = s.transposed ? packed_adjoint_bytes<T>(s)
                           : packed_correlation_bytes(weight_view<T>(s, nullptr));
    });
  }
  return bytes;
}

void pack_for(const ConvShape& s, ConvAlgorithm algorithm, const void* weight, void* packed,
              const Parallel& pool) {
  if (algorithm == ConvAlgorithm::kWinograd4) {
    with_winograd_type(s.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      pack_winograd_weight(winograd_view(s, static_cast<const T*>(weight)), packed, pool);
    });
  } else {
    with_type(s.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      if (s.transposed)
        pack_adjoint_weight(s, adjoint_view<T>(s, weight, nullptr), packed, pool);
      else
        pack_correlation_weight(weight_view(s, static_cast<const T*>(weight)), packed, pool);
    });
  }
}

// Where a transformed weight is large, a few tiles are computed sooner by direct sums than it is
// read. A weight packed for Winograd and images of any size is followed by the same for direct sums
// then.
bool packs_for_both(const ConvShape& s, ConvAlgorithm algorithm) {
  constexpr int64_t kLargeWeight = 256 * 256;
  return algorithm == ConvAlgorithm::kWinograd4 &&
         s.kernel_d * s.channels * s.out_channels > kLargeWeight;
}
bool few_tiles(const ConvShape& s) {
  constexpr int64_t kFewTiles = 10;
  return winograd_tiles(s) < kFewTiles;
}
size_t packed_bytes(const ConvShape& s, ConvAlgorithm algorithm) {
  const size_t direct = packs_for_both(s, algorithm) ? bytes_for(s, ConvAlgorithm::kDirect) : 0;
  return bytes_for(s, algorithm) + direct;
}
void pack_weight(const ConvShape& s, ConvAlgorithm algorithm, const void* weight, void* packed,
                 const Parallel& pool) {
  pack_for(s, algorithm, weight, packed, pool);
  if (packs_for_both(s, algorithm))
    pack_for(s, ConvAlgorithm::kDirect, weight,
             static_cast<char*>(packed) + bytes_for(s, algorithm), pool);
}

// scale * (conv + bias) + shift as one factor and one term per channel, null where there is nothing
// to do. `room`: affine_numbers(p) of them.
template <class T>
void fold_affine(const ConvForward& p, Acc<T>* room, const Acc<T>** scale, const Acc<T>** shift) {
  *scale = *shift = nullptr;
  if (!p.bias && !p.scale && !p.shift) return;
  const int64_t n = output_channels(p.shape), padded = n + kVectorSlack<T>;
  Acc<T>*terms = room, *factors = terms + padded, *bias = factors + padded;
  widen_padded(static_cast<const Acc<T>*>(p.shift), n, padded, Acc<T>(0), terms);
  widen_padded(static_cast<const Acc<T>*>(p.scale), n, padded, Acc<T>(1), factors);
  widen_padded(static_cast<const T*>(p.bias), n, padded, Acc<T>(0), bias);
  for (int64_t i = 0; i < n; ++i) terms[i] += factors[i] * bias[i];
  *shift = terms;
  if (p.scale) *scale = factors;
}
template <class T>
Acc<T>* affine_room(const ConvForward& p) {
  const size_t bytes = static_cast<size_t>(affine_numbers<T>(p)) * sizeof(Acc<T>);
  return static_cast<Acc<T>*>(scratch_bytes(Scratch::kCall2, bytes));
}

template <class T>
ChannelMoments<T> moments_of(const ConvForward& p, const Parallel& pool) {
  const ConvShape& s = p.shape;
  ChannelMoments<T> moments{s.channels_last, s.out_channels, s.out_pixels(),
                            static_cast<const T*>(p.output), p.mean ? p.moments : nullptr};
  if (moments.wanted()) moments.clear(pool.threads);
  return moments;
}
template <class T>
void store_moments(const ConvForward& p, const ChannelMoments<T>& moments, const Parallel& pool) {
  if (!moments.wanted()) return;
  for (int64_t c = 0; c < moments.channels; ++c) {
    const Moments total = moments.total(pool.threads, c);
    static_cast<Acc<T>*>(p.mean)[c] = static_cast<Acc<T>>(total.mean);
    static_cast<Acc<T>*>(p.variance)[c] = static_cast<Acc<T>>(total.squares / total.count);
  }
}

template <class T>
void forward_pointwise(const ConvForward& p, const Parallel& pool) {
  const ConvShape& s = p.shape;
  Pointwise<T> c{};
  c.batch = s.batch;
  c.channels = s.channels;
  c.out_channels = s.out_channels;
  c.pixels = s.height * s.width;
  c.input = static_cast<const T*>(p.input);
  c.weight = static_cast<const T*>(p.weight);
  fold_affine<T>(p, affine_room<T>(p), &c.scale, &c.shift);
  c.residual = static_cast<const T*>(p.residual);
  c.activation = p.activation;
  c.output = static_cast<T*>(p.output);
  c.preactivation = static_cast<T*>(p.preactivation);
  c.moments = moments_of<T>(p, pool);
  correlate_pointwise(c, pool);
  store_moments(p, c.moments, pool);
}

template <class T>
void forward_typed(const ConvForward& p, const Parallel& pool) {
  const ConvShape& s = p.shape;
  if constexpr (kFusedEpilogue<T>) {
    if (s.axes < 3 && !s.transposed && !p.turns && is_pointwise<T>(s, p.pool))
      return forward_pointwise<T>(p, pool);
  }
  const ReadWeight weight = weight_read_by(p);
  auto c = correlation_of<T>(p, weight.packed, affine_room<T>(p));
  if (!c.weight) {
    void* packed = scratch_bytes(Scratch::kCall, bytes_for(s, weight.algorithm));
    pack_for(s, weight.algorithm, p.weight, packed, pool);
    c.weight = packed;
  }
  if (p.argmax && p.pool.kind == PoolKind::kAverage && leaves_rows(p.pool, s.out_height))
    std::memset(p.argmax, 0, s.batch * s.out_channels * s.out_depth * s.out_height * s.out_width);
  c.moments = moments_of<T>(p, pool);
  if constexpr (sizeof(T) <= 4) {
    if (weight.algorithm == ConvAlgorithm::kWinograd4) {
      if (s.transposed) turn(s, &c);
      correlate_winograd(c, pool);
      return store_moments(p, c.moments, pool);
    }
  }
  if (s.transposed)
    return correlate_adjoint(s, adjoint_view<T>(s, p.weight, nullptr), c.weight, {0, s.depth},
                             {0, s.height}, {0, s.width}, c, pool);
  correlate(c, pool);
  store_moments(p, c.moments, pool);
}

}  // namespace

ReadWeight weight_read_by(const ConvForward& p) {
  const ConvShape& s = p.shape;
  const bool pool_fits = p.pool.kernel_h == 0 || p.pool.stride_h <= kWinogradMaxPoolStride;
  if (p.packed_weight && packs_for_both(s, p.algorithm) && (!pool_fits || few_tiles(s)))
    return {ConvAlgorithm::kDirect,
            static_cast<const char*>(p.packed_weight) + bytes_for(s, p.algorithm)};
  if (!pool_fits && p.algorithm != ConvAlgorithm::kDirect) return {ConvAlgorithm::kDirect, nullptr};
  return {p.algorithm, p.packed_weight};
}

template <class T>
Correlation<T> correlation_of(const ConvForward& p, const void* weight, Acc<T>* room) {
  const ConvShape& s = p.shape;
  Correlation<T> c{};
  c.channels_last = s.channels_last;
  c.turns = p.turns;
  c.padding = s.padding_mode;
  c.batch = s.batch;
  c.groups = s.groups;
  c.channels = s.channels / s.groups;
  c.out_channels = s.out_channels / s.groups;
  c.z = {s.depth, s.out_depth, s.kernel_d, s.stride_d, -s.padding_d, s.dilation_d};
  c.y = {s.height, s.out_height, s.kernel_h, s.stride_h, -s.padding_h, s.dilation_h};
  c.x = {s.width, s.out_width, s.kernel_w, s.stride_w, -s.padding_w, s.dilation_w};
  c.place_z = {s.out_depth, 0, 1};
  c.place_y = {s.out_height, 0, 1};
  c.place_x = {s.out_width, 0, 1};
  c.input = static_cast<const T*>(p.input);
  c.weight = weight;
  fold_affine<T>(p, room, &c.scale, &c.shift);
  c.residual = static_cast<const T*>(p.residual);
  c.activation = p.activation;
  c.output = static_cast<T*>(p.output);
  c.preactivation = static_cast<T*>(p.preactivation);
  c.pool = p.pool;
  c.argmax = p.argmax;
  return c;
}
template Correlation<float> correlation_of(const ConvForward&, const void*, float*);
template Correlation<bf16> correlation_of(const ConvForward&, const void*, float*);
template Correlation<f16> correlation_of(const ConvForward&, const void*, float*);
template Correlation<double> correlation_of(const ConvForward&, const void*, double*);

void conv_forward(const ConvForward& p, const Parallel& pool) {
  with_type(p.shape.dtype,
            [&](auto* type) { forward_typed<std::remove_pointer_t<decltype(type)>>(p, pool); });
}

const ConvKernels& conv_kernels() {
  static constexpr ConvKernels table{&choose_algorithm, &packed_bytes,     &pack_weight,
                                     &conv_forward,     &banded_layers,    &banded_forward,
                                     &conv_backward,    &max_pool_forward, &max_pool_backward,
                                     &avg_pool_forward, &avg_pool_backward};
  return table;
}

}  // namespace fmk::FMK_ISA
