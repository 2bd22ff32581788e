// The backward pass: from the gradient of the output to that of the pre-activation, and on to the
// input (a correlation of that gradient with the turned weight) and the weight.

#include <type_traits>

#include "cpu/conv_winograd.h"
#include "cpu/reduce.h"

namespace fmk::FMK_ISA {
namespace {

FMK_INLINE int64_t common_divisor(int64_t a, int64_t b) {
  while (b) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

// d loss / d (scale * (conv + bias) + shift + residual)
template <class T>
const T* grad_of_preactivation(const ConvBackward& p, const Parallel& pool) {
  const ConvShape& s = p.shape;
  auto* grad = static_cast<T*>(p.grad_preactivation);
  const auto* from = static_cast<const T*>(p.grad_output);
  const bool relu = p.activation == Activation::kRelu, pooled = p.pool.kernel_h > 0;
  if (pooled) {
    const MaxPool pooling{s.dtype,      s.channels_last, s.batch, s.out_channels,
                          s.out_height, s.out_width,     p.pool};
    max_pool_backward(pooling, from, p.argmax, grad, pool);  // and through relu, see argmax
    from = grad;
  }
  if (p.activation != Activation::kNone && !(pooled && relu)) {
    const int64_t n = s.batch * s.out_channels * s.out_height * s.out_width;
    activation_backward(p.activation, from, static_cast<const T*>(p.saved), n, grad, pool);
    from = grad;
  }
  return from;
}

// The input positions first, first + stride, ... of one axis are reached from the output by the
// taps t with (first + padding - t * dilation) a multiple of the stride, in steps of one position.
struct ResidueClass {
  TapRange taps;  // turned: last tap first
  Axis axis;
  Placement place;

  static ResidueClass of(int64_t first, int64_t in_size, int64_t out_size, int64_t kernel,
                         int64_t stride, int64_t padding, int64_t dilation) {
    const int64_t divisor = common_divisor(stride, dilation), tap_step = stride / divisor;
    int64_t last = -1, count = 0;
    for (int64_t tap = 0; tap < kernel; ++tap)
      if ((first + padding - tap * dilation) % stride == 0) last = tap, ++count;
    ResidueClass c;
    c.taps = {last, -tap_step, count};
    c.axis = {out_size,
              ceil_div(in_size - first, stride),
              count,
              1,
              count ? (first + padding - last * dilation) / stride : 0,
              dilation / divisor};
    c.place = {in_size, first, stride};
    return c;
  }
};

template <class T>
void grad_of_input(const ConvBackward& p, const T* grad, const Parallel& pool) {
  const ConvShape& s = p.shape;
  const int64_t taps = s.kernel_h * s.kernel_w;
  WeightView<T> view{};
  view.data = static_cast<const T*>(p.weight);
  view.groups = s.groups;
  view.columns = s.channels / s.groups;
  view.reduction = s.out_channels / s.groups;
  view.column_stride = taps;
  view.reduction_stride = view.columns * taps;
  view.group_stride = view.reduction * view.reduction_stride;
  view.kernel_w = s.kernel_w;
  view.reduction_scale = static_cast<const Acc<T>*>(p.scale);
  Correlation<T> c{};
  c.channels_last = s.channels_last;
  c.batch = s.batch;
  c.groups = s.groups;
  c.channels = view.reduction;
  c.out_channels = view.columns;
  c.input = grad;
  c.activation = Activation::kNone;
  c.output = static_cast<T*>(p.grad_input);
  if constexpr (sizeof(T) <= 4) {
    // The same convolution seen from the other side.
    ConvShape turned = s;
    turned.channels = s.out_channels;
    turned.out_channels = s.channels;
    turned.out_height = s.height;
    turned.out_width = s.width;
    if (!p.exact && winograd_pays(turned)) {
      view.y = view.x = {2, -1, 3};
      c.y = {s.out_height, s.height, 3, 1, s.padding_h - 2, 1};
      c.x = {s.out_width, s.width, 3, 1, s.padding_w - 2, 1};
      c.place_y = {s.height, 0, 1};
      c.place_x = {s.width, 0, 1};
      void* packed = scratch_bytes(Scratch::kCall, packed_winograd_bytes(view));
      pack_winograd_weight(view, packed, pool);
      c.weight = packed;
      return correlate_winograd(c, pool);
    }
  }
  for (int64_t y = 0; y < min_of(s.stride_h, s.height); ++y)
    for (int64_t x = 0; x < min_of(s.stride_w, s.width); ++x) {
      const auto rows = ResidueClass::of(y, s.height, s.out_height, s.kernel_h, s.stride_h,
                                         s.padding_h, s.dilation_h);
      const auto columns = ResidueClass::of(x, s.width, s.out_width, s.kernel_w, s.stride_w,
                                            s.padding_w, s.dilation_w);
      view.y = rows.taps;
      view.x = columns.taps;
      void* packed = scratch_bytes(Scratch::kCall, packed_correlation_bytes(view));
      pack_correlation_weight(view, packed, pool);
      c.weight = packed;
      c.y = rows.axis;
      c.x = columns.axis;
      c.place_y = rows.place;
      c.place_x = columns.place;
      correlate(c, pool);
    }
}

// d loss / d scale[k] = sum over pixels of grad[k] * (conv[k] + bias[k]). The convolution is linear
// in its weight, so the sum of grad * conv is the product of the weight and its gradient (without
// the scale): the convolution's output is not needed. Then the weight's gradient gets its scale.
template <class T>
void finish_scale(const ConvBackward& p, const T* grad_weight, const Acc<T>* grad_sums) {
  const ConvShape& s = p.shape;
  const int64_t length = s.channels / s.groups * s.kernel_h * s.kernel_w;
  const auto* scale = static_cast<const Acc<T>*>(p.scale);
  const auto* bias = static_cast<const T*>(p.bias);
  for (int64_t k = 0; k < s.out_channels; ++k) {
    const T* weight = static_cast<const T*>(p.weight) + k * length;
    const T* grad = grad_weight + k * length;
    double sum = bias ? static_cast<double>(widen(bias[k])) * static_cast<double>(grad_sums[k]) : 0;
    for (int64_t i = 0; i < length; ++i)
      sum += static_cast<double>(widen(weight[i])) * static_cast<double>(widen(grad[i]));
    static_cast<Acc<T>*>(p.grad_scale)[k] = static_cast<Acc<T>>(sum);
    if (p.grad_weight) {
      T* to = static_cast<T*>(p.grad_weight) + k * length;
      for (int64_t i = 0; i < length; ++i) narrow(to + i, widen(grad[i]) * scale[k]);
    }
    if (p.grad_bias) narrow(static_cast<T*>(p.grad_bias) + k, grad_sums[k] * scale[k]);
  }
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
void backward_typed(const ConvBackward& p, const Parallel& pool) {
  const ConvShape& s = p.shape;
  const T* grad = grad_of_preactivation<T>(p, pool);
  if (p.grad_input) grad_of_input(p, grad, pool);
  if (!p.grad_weight && !p.grad_bias && !p.grad_scale && !p.grad_shift) return;
  WeightGradient<T> w{};
  w.channels_last = s.channels_last;
  w.batch = s.batch;
  w.groups = s.groups;
  w.channels = s.channels / s.groups;
  w.out_channels = s.out_channels / s.groups;
  w.y = {s.height, s.out_height, s.kernel_h, s.stride_h, -s.padding_h, s.dilation_h};
  w.x = {s.width, s.out_width, s.kernel_w, s.stride_w, -s.padding_w, s.dilation_w};
  w.input = static_cast<const T*>(p.input);
  w.grad = grad;
  w.grad_weight = static_cast<T*>(p.grad_weight);
  w.grad_shift = static_cast<Acc<T>*>(p.grad_shift);
  if (!p.grad_scale) {
    w.scale = static_cast<const Acc<T>*>(p.scale);
    w.grad_bias = static_cast<T*>(p.grad_bias);
    return grad_of_weight(p, w, pool);
  }
  const int64_t weights = s.out_channels * s.channels / s.groups * s.kernel_h * s.kernel_w;
  const int64_t sums_bytes = s.out_channels * static_cast<int64_t>(sizeof(Acc<T>));
  auto* room = static_cast<char*>(
      scratch_bytes(Scratch::kCall2, sums_bytes + weights * static_cast<int64_t>(sizeof(T))));
  if (!w.grad_shift) w.grad_shift = reinterpret_cast<Acc<T>*>(room);
  if (!w.grad_weight) w.grad_weight = reinterpret_cast<T*>(room + sums_bytes);
  grad_of_weight(p, w, pool);
  finish_scale(p, w.grad_weight, w.grad_shift);
}

}  // namespace

void conv_backward(const ConvBackward& p, const Parallel& pool) {
  with_type(p.shape.dtype,
            [&](auto* type) { backward_typed<std::remove_pointer_t<decltype(type)>>(p, pool); });
}

}  // namespace fmk::FMK_ISA
