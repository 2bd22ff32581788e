// Pooling operators: check, allocate, call.
#include <tuple>

#include "torch/images.h"

namespace fmk::ops {
namespace {

// As places(); with ceil_mode a window that starts inside and reaches over the end counts, too.
int64_t pooled_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                    bool ceil_mode) {
  const int64_t room = size + 2 * padding - dilation * (kernel - 1) - 1;
  if (!ceil_mode || room < 0) return places(size, kernel, stride, padding, padding, dilation);
  const int64_t count = (room + stride - 1) / stride + 1;
  return (count - 1) * stride >= size + padding ? count - 1 : count;
}

// Images of one or two axes; `size` is that of the pool's input.
Pooling check_window(const Tensor& like, const char* name, const Ints& size, const Ints& kernel,
                     const Ints& stride, const Ints& padding, const Ints& dilation) {
  const bool channels_last = image_layout(like, name);
  const auto axes = static_cast<size_t>(like.dim() - 2);
  FMK_CHECK(axes <= 2, name, ": expected one or two axes");
  FMK_CHECK(size.size() == axes + 2, "input_size: expected ", axes + 2, " values");
  check_values(size, "input_size", axes + 2, 0);
  check_values(kernel, "kernel_size", axes, 1);
  check_values(stride, "stride", axes, 1);
  check_values(padding, "padding", axes, 0);
  check_values(dilation, "dilation", axes, 1);
  for (size_t i = 0; i < axes; ++i)
    FMK_CHECK(2 * padding[i] <= kernel[i], "padding: expected at most half of kernel_size");
  Pooling m{};
  m.dtype = dtype_of(like, name);
  m.channels_last = channels_last;
  m.batch = size[0];
  m.channels = size[1];
  const bool plane = axes == 2;
  m.height = plane ? size[2] : 1;
  m.width = size.back();
  PoolShape& q = m.pool;
  q.kernel_h = plane ? kernel[0] : 1, q.kernel_w = kernel.back();
  q.stride_h = plane ? stride[0] : 1, q.stride_w = stride.back();
  q.padding_h = plane ? padding[0] : 0, q.padding_w = padding.back();
  q.dilation_h = plane ? dilation[0] : 1, q.dilation_w = dilation.back();
  return m;
}

Ints set_output_size(bool ceil_mode, size_t axes, Pooling* m) {
  PoolShape& q = m->pool;
  q.out_height = axes == 1 ? 1
                           : pooled_size(m->height, q.kernel_h, q.stride_h, q.padding_h,
                                         q.dilation_h, ceil_mode);
  q.out_width = pooled_size(m->width, q.kernel_w, q.stride_w, q.padding_w, q.dilation_w, ceil_mode);
  FMK_CHECK(q.out_height > 0 && q.out_width > 0, "input: smaller than the window");
  if (axes == 1) return {m->batch, m->channels, q.out_width};
  return {m->batch, m->channels, q.out_height, q.out_width};
}

void take_output_size(const Tensor& grad_output, const Ints& input_size, Pooling* m) {
  FMK_CHECK(input_size[0] == grad_output.size(0) && input_size[1] == grad_output.size(1),
            "input_size: expected the batch and channels of grad_output");
  PoolShape& q = m->pool;
  q.out_height = grad_output.dim() == 4 ? grad_output.size(2) : 1;
  q.out_width = grad_output.size(grad_output.dim() - 1);
  const int64_t highest =
      pooled_size(m->height, q.kernel_h, q.stride_h, q.padding_h, q.dilation_h, true);
  const int64_t widest =
      pooled_size(m->width, q.kernel_w, q.stride_w, q.padding_w, q.dilation_w, true);
  FMK_CHECK(q.out_height <= highest && q.out_width <= widest,
            "grad_output: larger than the pool of such an input");
}

void check_area(const PoolShape& q) {
  FMK_CHECK(q.kernel_h <= 256 && q.kernel_w <= 256 && q.kernel_h * q.kernel_w <= 256,
            "kernel_size: a window holds at most 256 elements");
}

std::tuple<Tensor, Tensor> max_pool_forward(const Tensor& input, const Ints& kernel_size,
                                            const Ints& stride, const Ints& padding,
                                            const Ints& dilation, bool ceil_mode) {
  Pooling m = check_window(input, "input", shape_of(input), kernel_size, stride, padding, dilation);
  check_area(m.pool);
  const Ints size = set_output_size(ceil_mode, kernel_size.size(), &m);
  Tensor output = allocate_image(input, size, m.channels_last);
  Tensor argmax = allocate_image(input, size, m.channels_last, ScalarType::Byte);
  conv_kernels().max_pool_forward(m, data_of(input), mutable_data_of(output),
                                  static_cast<uint8_t*>(mutable_data_of(argmax)), torch_pool());
  return {output, argmax};
}

Tensor max_pool_backward(const Tensor& grad_output, const Tensor& argmax, const Ints& input_size,
                         const Ints& kernel_size, const Ints& stride, const Ints& padding,
                         const Ints& dilation) {
  Pooling m =
      check_window(grad_output, "grad_output", input_size, kernel_size, stride, padding, dilation);
  check_area(m.pool);
  check_image(argmax, "argmax", ScalarType::Byte, shape_of(grad_output), m.channels_last);
  take_output_size(grad_output, input_size, &m);
  Tensor grad_input = allocate_image(grad_output, input_size, m.channels_last);
  conv_kernels().max_pool_backward(m, data_of(grad_output),
                                   static_cast<const uint8_t*>(data_of(argmax)),
                                   mutable_data_of(grad_input), torch_pool());
  return grad_input;
}

Pooling check_average(const Tensor& like, const char* name, const Ints& size, const Ints& kernel,
                      const Ints& stride, const Ints& padding, bool count_include_pad,
                      const std::optional<int64_t>& divisor_override) {
  Pooling m =
      check_window(like, name, size, kernel, stride, padding, Ints(kernel.size(), int64_t(1)));
  m.pool.kind = PoolKind::kAverage;
  m.pool.count_padding = count_include_pad;
  m.pool.divisor = divisor_override ? *divisor_override : 0;
  FMK_CHECK(!divisor_override || *divisor_override != 0, "divisor_override: must not be 0");
  return m;
}

Tensor avg_pool_forward(const Tensor& input, const Ints& kernel_size, const Ints& stride,
                        const Ints& padding, bool ceil_mode, bool count_include_pad,
                        std::optional<int64_t> divisor_override) {
  Pooling m = check_average(input, "input", shape_of(input), kernel_size, stride, padding,
                            count_include_pad, divisor_override);
  const Ints size = set_output_size(ceil_mode, kernel_size.size(), &m);
  Tensor output = allocate_image(input, size, m.channels_last);
  conv_kernels().avg_pool_forward(m, data_of(input), mutable_data_of(output), torch_pool());
  return output;
}

Tensor avg_pool_backward(const Tensor& grad_output, const Ints& input_size, const Ints& kernel_size,
                         const Ints& stride, const Ints& padding, bool count_include_pad,
                         std::optional<int64_t> divisor_override) {
  Pooling m = check_average(grad_output, "grad_output", input_size, kernel_size, stride, padding,
                            count_include_pad, divisor_override);
  take_output_size(grad_output, input_size, &m);
  Tensor grad_input = allocate_image(grad_output, input_size, m.channels_last);
  conv_kernels().avg_pool_backward(m, data_of(grad_output), mutable_data_of(grad_input),
                                   torch_pool());
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CPU, m) {
  m.impl("max_pool_forward", TORCH_BOX(&max_pool_forward));
  m.impl("max_pool_backward", TORCH_BOX(&max_pool_backward));
  m.impl("avg_pool_forward", TORCH_BOX(&avg_pool_forward));
  m.impl("avg_pool_backward", TORCH_BOX(&avg_pool_backward));
}

}  // namespace fmk::ops
