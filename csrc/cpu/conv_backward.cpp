// The backward pass: from the gradient of the output to that of the pre-activation, and on to the
// input (of a convolution its adjoint, and the other way round) and the parameters.

#include <type_traits>

#include "cpu/conv_depthwise_adjoint.h"
#include "cpu/conv_winograd.h"
#include "cpu/reduce.h"

namespace fmk::FMK_ISA {
namespace {

FMK_INLINE int64_t output_channels(const ConvShape& s) {
  return s.transposed ? s.channels : s.out_channels;
}

// grad[i] = 0 where relu let nothing through.
template <class T>
void mask_gradient(const uint8_t* mask, int64_t n, T* grad, const Parallel& pool) {
  const int64_t shards = n < 65536 ? 1 : pool.threads;
  parallel_for(pool, shards, [&](int64_t shard) {
    for (int64_t i = n * shard / shards; i < n * (shard + 1) / shards; ++i)
      if (!mask[i]) grad[i] = T{};
  });
}

// d loss / d (scale * (conv + bias) + shift + residual)
template <class T>
const T* grad_of_preactivation(const ConvBackward& p, const Parallel& pool) {
  const ConvShape& s = p.shape;
  auto* grad = static_cast<T*>(p.grad_preactivation);
  const auto* from = static_cast<const T*>(p.grad_output);
  const int64_t pixels = s.transposed ? s.pixels() : s.out_pixels();
  const int64_t n = s.batch * output_channels(s) * pixels;
  const bool relu = p.activation == Activation::kRelu, pooled = p.pool.kernel_h > 0;
  if (pooled) {
    const Pooling pooling{s.dtype,
                          s.channels_last,
                          s.batch,
                          output_channels(s),
                          s.transposed ? s.height : s.out_height,
                          s.transposed ? s.width : s.out_width,
                          p.pool};
    if (p.pool.kind == PoolKind::kMax) {
      max_pool_backward(pooling, from, p.argmax, grad, pool);  // and through relu, see argmax
    } else {
      avg_pool_backward(pooling, from, grad, pool);
      if (relu) mask_gradient(p.argmax, n, grad, pool);
    }
    from = grad;
  }
  if (p.activation != Activation::kNone && !(pooled && relu)) {
    activation_backward(p.activation, from, static_cast<const T*>(p.saved), n, grad, pool);
    from = grad;
  }
  return from;
}

// The gradient of positions in the padding is handed to those that they repeat. Regions of the
// padded image outside the image itself, along each axis before, in, or after it.
template <class T>
void add_padding(const ConvShape& s, const WeightView<T>& view, const void* packed,
                 const Correlation<T>& inner, const Parallel& pool) {
  struct Span {
    int64_t size, after;
    PositionRange ranges[3];
    Span(int64_t size_, int64_t out, int64_t kernel, int64_t stride, int64_t before,
         int64_t dilation)
        : size(size_) {
      after = max_of<int64_t>(0, (out - 1) * stride + dilation * (kernel - 1) + 1 - before - size);
      ranges[0] = {-before, 0};
      ranges[1] = {0, size};
      ranges[2] = {size, size + after};
    }
  };
  const Span z{s.depth, s.out_depth, s.kernel_d, s.stride_d, s.padding_d, s.dilation_d};
  const Span y{s.height, s.out_height, s.kernel_h, s.stride_h, s.padding_h, s.dilation_h};
  const Span x{s.width, s.out_width, s.kernel_w, s.stride_w, s.padding_w, s.dilation_w};
  const int64_t channels = s.channels;
  for (int part = 0; part < 27; ++part) {
    const PositionRange rz = z.ranges[part / 9], ry = y.ranges[part / 3 % 3],
                        rx = x.ranges[part % 3];
    const int64_t nz = rz.end - rz.begin, ny = ry.end - ry.begin, nx = rx.end - rx.begin;
    if (part == 13 || nz * ny * nx == 0) continue;
    const int64_t count = s.batch * channels * nz * ny * nx;
    auto* region =
        static_cast<T*>(scratch_bytes(Scratch::kCall2, static_cast<size_t>(count) * sizeof(T)));
    Correlation<T> c = inner;
    c.output = region;
    correlate_adjoint(s, view, packed, rz, ry, rx, c, pool);
    // The fastest axis of the layout that is no pixel's: channels last, or a whole image in planes.
    const int64_t run = s.channels_last ? channels : 1;
    const int64_t planes = s.channels_last ? s.batch : s.batch * channels;
    const int64_t shards = count < 16384 ? 1 : min_of<int64_t>(pool.threads, planes);
    parallel_for(pool, shards, [&](int64_t shard) {
      for (int64_t plane = planes * shard / shards; plane < planes * (shard + 1) / shards;
           ++plane) {
        const T* from = region + plane * nz * ny * nx * run;
        T* image = inner.output + plane * s.pixels() * run;
        for (int64_t i = rz.begin; i < rz.end; ++i)
          for (int64_t j = ry.begin; j < ry.end; ++j)
            for (int64_t k = rx.begin; k < rx.end; ++k, from += run) {
              const int64_t iz = padded_position(s.padding_mode, i, s.depth);
              const int64_t iy = padded_position(s.padding_mode, j, s.height);
              const int64_t ix = padded_position(s.padding_mode, k, s.width);
              T* to = image + ((iz * s.height + iy) * s.width + ix) * run;
              for (int64_t c = 0; c < run; ++c) narrow(to + c, widen(to[c]) + widen(from[c]));
            }
      }
    });
  }
}

// Of a convolution, by its adjoint.
template <class T>
void grad_of_input(const ConvBackward& p, const T* grad, const Parallel& pool) {
  const ConvShape& s = p.shape;
  WeightView<T> view = adjoint_view<T>(s, p.weight, static_cast<const Acc<T>*>(p.scale));
  Correlation<T> c{};
  c.channels_last = s.channels_last;
  c.batch = s.batch;
  c.groups = s.groups;
  c.input = grad;
  c.output = static_cast<T*>(p.grad_input);
  if constexpr (sizeof(T) <= 4) {
    // The same convolution seen from the other side.
    if (!p.exact && winograd_pays_once(turned(s))) {
      turn(s, &view);
      turn(s, &c);
      void* packed = scratch_bytes(Scratch::kCall, packed_winograd_bytes(view));
      pack_winograd_weight(view, packed, pool);
      c.weight = packed;
      return correlate_winograd(c, pool);
    }
  }
  if constexpr (sizeof(T) <= 4) {
    if (depthwise_adjoint(s, view, grad, c.output, pool)) return;
  }
  const size_t bytes = packed_adjoint_bytes<T>(s);
  void* packed = bytes ? scratch_bytes(Scratch::kCall, bytes) : nullptr;
  if (bytes) pack_adjoint_weight(s, view, packed, pool);
  correlate_adjoint(s, view, packed, {0, s.depth}, {0, s.height}, {0, s.width}, c, pool);
  if (s.padding_mode != PaddingMode::kZeros) add_padding(s, view, packed, c, pool);
}

// Of a transposed convolution: the convolution.
template <class T>
void grad_of_transposed_input(const ConvBackward& p, const T* grad, const Parallel& pool) {
  const ConvShape& s = p.shape;
  WeightView<T> view = weight_view(s, static_cast<const T*>(p.weight));
  view.reduction_scale = static_cast<const Acc<T>*>(p.scale);
  Correlation<T> c{};
  c.channels_last = s.channels_last;
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
  c.input = grad;
  c.output = static_cast<T*>(p.grad_input);
  if constexpr (sizeof(T) <= 4) {
    if (!p.exact && winograd_pays_once(s)) {
      void* packed = scratch_bytes(Scratch::kCall, packed_winograd_bytes(view));
      pack_winograd_weight(view, packed, pool);
      c.weight = packed;
      return correlate_winograd(c, pool);
    }
  }
  void* packed = scratch_bytes(Scratch::kCall, packed_correlation_bytes(view));
  pack_correlation_weight(view, packed, pool);
  c.weight = packed;
  correlate(c, pool);
}

template <class T>
void grad_of_weight(const ConvBackward& p, const WeightGradient<T>& w, const Parallel& pool) {
  if constexpr (sizeof(T) <= 4) {
    if (!p.exact && w.grad_weight && winograd_gradient_pays(p.shape))
      return winograd_weight_gradient(w, pool);
  }
  weight_gradient(w, pool);
}

template <class T>
WeightGradient<T> weight_problem(const ConvShape& s, const void* input, const void* grad) {
  WeightGradient<T> w{};
  w.channels_last = s.channels_last;
  w.padding = s.padding_mode;
  w.batch = s.batch;
  w.groups = s.groups;
  w.channels = s.channels / s.groups;
  w.out_channels = s.out_channels / s.groups;
  w.z = {s.depth, s.out_depth, s.kernel_d, s.stride_d, -s.padding_d, s.dilation_d};
  w.y = {s.height, s.out_height, s.kernel_h, s.stride_h, -s.padding_h, s.dilation_h};
  w.x = {s.width, s.out_width, s.kernel_w, s.stride_w, -s.padding_w, s.dilation_w};
  w.input = static_cast<const T*>(input);
  w.grad = static_cast<const T*>(grad);
  return w;
}

// The parameters' gradients from that of the weight without the scale, and the sums of the
// pre-activation's gradient per channel:
//
//   d loss / d scale[k] = sum over pixels of grad[k] * (conv[k] + bias[k])
//
// The convolution is linear in its weight, so the sum of grad * conv is the product of the weight
// and its gradient: the convolution's output is not needed.
template <class T>
void finish_parameters(const ConvBackward& p, const T* grad_weight, const Acc<T>* sums) {
  const ConvShape& s = p.shape;
  const auto* scale = static_cast<const Acc<T>*>(p.scale);
  const auto* bias = static_cast<const T*>(p.bias);
  const auto* weight = static_cast<const T*>(p.weight);
  const int64_t taps = s.taps(), columns = s.channels / s.groups, rows = s.out_channels / s.groups;
  // Elements of output channel k: `parts` runs of `run`, `step` apart.
  const int64_t parts = s.transposed ? rows : 1;
  const int64_t run = s.transposed ? taps : columns * taps, step = columns * taps;
  for (int64_t k = 0; k < output_channels(s); ++k) {
    const Acc<T> factor = scale ? scale[k] : Acc<T>(1);
    const int64_t first =
        s.transposed ? (k / columns * rows * columns + k % columns) * taps : k * run;
    double dot = bias && p.grad_scale ? static_cast<double>(widen(bias[k])) * sums[k] : 0;
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t i = 0; i < run; ++i) {
        const int64_t at = first + part * step + i;
        const Acc<T> value = grad_weight ? widen(grad_weight[at]) : Acc<T>(0);
        if (p.grad_scale)
          dot += static_cast<double>(widen(weight[at])) * static_cast<double>(value);
        if (p.grad_weight && scale) narrow(static_cast<T*>(p.grad_weight) + at, value * factor);
      }
    if (p.grad_scale) static_cast<Acc<T>*>(p.grad_scale)[k] = static_cast<Acc<T>>(dot);
    if (p.grad_bias) narrow(static_cast<T*>(p.grad_bias) + k, sums[k] * factor);
  }
}

template <class T>
void grad_of_parameters(const ConvBackward& p, const T* grad, const Parallel& pool) {
  const ConvShape& s = p.shape;
  auto w = s.transposed ? weight_problem<T>(s, grad, p.input) : weight_problem<T>(s, p.input, grad);
  w.grad_weight = static_cast<T*>(p.grad_weight);
  if (!s.transposed && !p.grad_scale) {
    w.scale = static_cast<const Acc<T>*>(p.scale);
    w.grad_shift = static_cast<Acc<T>*>(p.grad_shift);
    w.grad_bias = static_cast<T*>(p.grad_bias);
    return grad_of_weight(p, w, pool);
  }
  const int64_t outputs = output_channels(s);
  const int64_t weights = s.out_channels * s.channels / s.groups * s.taps();
  const int64_t sums_bytes = (outputs + kVectorSlack<T>)*static_cast<int64_t>(sizeof(Acc<T>));
  auto* room = static_cast<char*>(
      scratch_bytes(Scratch::kCall2, sums_bytes + weights * static_cast<int64_t>(sizeof(T))));
  auto* sums = reinterpret_cast<Acc<T>*>(room);
  if (p.grad_scale && !w.grad_weight) w.grad_weight = reinterpret_cast<T*>(room + sums_bytes);
  if (!s.transposed)
    w.grad_shift = sums;
  else
    channel_sums(grad, s.channels_last, s.batch, outputs, s.pixels(), sums, pool);
  if (!s.transposed || w.grad_weight) grad_of_weight(p, w, pool);
  if (p.grad_shift) convert(sums, static_cast<Acc<T>*>(p.grad_shift), outputs);
  finish_parameters(p, static_cast<const T*>(w.grad_weight), sums);
}

template <class T>
void backward_typed(const ConvBackward& p, const Parallel& pool) {
  const T* grad = grad_of_preactivation<T>(p, pool);
  if (p.grad_input) {
    if (p.shape.transposed)
      grad_of_transposed_input(p, grad, pool);
    else
      grad_of_input(p, grad, pool);
  }
  if (p.grad_weight || p.grad_bias || p.grad_scale || p.grad_shift)
    grad_of_parameters(p, grad, pool);
}

}  // namespace

void conv_backward(const ConvBackward& p, const Parallel& pool) {
  with_type(p.shape.dtype,
            [&](auto* type) { backward_typed<std::remove_pointer_t<decltype(type)>>(p, pool); });
}

}  // namespace fmk::FMK_ISA
