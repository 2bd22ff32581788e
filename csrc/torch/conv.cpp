#include "cpu/conv.h"

#include <torch/headeronly/core/MemoryFormat.h>

#include <tuple>

#include "torch/common.h"

namespace fmk::ops {
namespace {

using torch::headeronly::MemoryFormat;
using Ints = std::vector<int64_t>;

ScalarType accumulated_as(const Tensor& model) {
  return model.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Whether the elements of a 4-D tensor lie in memory as NHWC (channels_last) or NCHW without gaps.
bool dense_in(const Tensor& tensor, bool channels_last) {
  if (tensor.numel() == 0) return true;
  const std::array<int, 4> order = channels_last ? std::array{1, 3, 2, 0} : std::array{3, 2, 1, 0};
  int64_t step = 1;
  for (int dim : order) {
    if (tensor.size(dim) != 1 && tensor.stride(dim) != step) return false;
    step *= tensor.size(dim);
  }
  return true;
}

// True for channels_last, false for contiguous (also if it is both), an error for anything else.
bool image_layout(const Tensor& image, const char* name) {
  check_cpu(image, name);
  FMK_CHECK(image.dim() == 4, name, ": expected four dimensions, got ", image.dim());
  if (image.is_contiguous()) return false;
  FMK_CHECK(dense_in(image, true), name, ": expected a contiguous or channels_last tensor");
  return true;
}

void check_image(const Tensor& image, const char* name, ScalarType dtype, const Ints& shape,
                 bool channels_last) {
  check_cpu(image, name);
  FMK_CHECK(image.scalar_type() == dtype, name, ": unexpected dtype");
  check_shape(image, name, shape);
  FMK_CHECK(dense_in(image, channels_last), name, ": expected the memory format of input");
}

Tensor allocate_image(const Tensor& like, const Ints& shape, bool channels_last,
                      std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::empty(
      torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()),
      dtype ? *dtype : like.scalar_type(), std::nullopt, like.device(), std::nullopt,
      channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

void check_values(const Ints& values, const char* name, size_t count, int64_t lowest) {
  FMK_CHECK(values.size() == count, name, ": expected ", count, " values, got ", values.size());
  for (int64_t value : values)
    FMK_CHECK(value >= lowest && value <= INT32_MAX, name, ": expected values from ", lowest,
              " on, got ", value);
}

// A vector per channel in the type that `model` is accumulated in.
void check_vector(const OptionalTensor& vector, const char* name, const Tensor& model,
                  int64_t channels) {
  if (!vector) return;
  check_cpu(*vector, name);
  FMK_CHECK(vector->scalar_type() == accumulated_as(model), name,
            ": expected float32, or float64 for a float64 input");
  check_shape(*vector, name, {channels});
  check_contiguous(*vector, name);
}

struct Conv {
  ConvShape shape;
  PoolShape pool;
  Ints conv_size, output_size;
};

ConvShape check_weight(const Tensor& weight, const Ints& stride, const Ints& padding,
                       const Ints& dilation, int64_t groups) {
  check_cpu(weight, "weight");
  check_contiguous(weight, "weight");
  FMK_CHECK(weight.dim() == 4 && weight.numel() > 0,
            "weight: expected four dimensions, none of them empty");
  check_values(stride, "stride", 2, 1);
  check_values(padding, "padding", 4, 0);
  check_values(dilation, "dilation", 2, 1);
  FMK_CHECK(groups >= 1 && weight.size(0) % groups == 0,
            "groups: expected a divisor of the output channels, got ", groups);
  ConvShape s{};
  s.dtype = dtype_of(weight, "weight");
  s.channels = weight.size(1) * groups;
  s.out_channels = weight.size(0);
  s.groups = groups;
  s.kernel_h = weight.size(2);
  s.kernel_w = weight.size(3);
  s.stride_h = stride[0];
  s.stride_w = stride[1];
  s.padding_h = padding[0];
  s.padding_w = padding[2];
  s.dilation_h = dilation[0];
  s.dilation_w = dilation[1];
  return s;
}

// Number of places a dilated kernel fits in.
int64_t places(int64_t size, int64_t kernel, int64_t stride, int64_t before, int64_t after,
               int64_t dilation) {
  const int64_t room = size + before + after - dilation * (kernel - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}

Conv check_conv(const Tensor& input, const Tensor& weight, const Ints& stride, const Ints& padding,
                const Ints& dilation, int64_t groups, const Ints& pool) {
  Conv c{};
  c.shape = check_weight(weight, stride, padding, dilation, groups);
  ConvShape& s = c.shape;
  s.channels_last = image_layout(input, "input");
  check_like(weight, "weight", input, "input");
  FMK_CHECK(input.size(1) == s.channels, "input: expected ", s.channels, " channels, got ",
            input.size(1));
  s.batch = input.size(0);
  s.height = input.size(2);
  s.width = input.size(3);
  s.out_height = places(s.height, s.kernel_h, s.stride_h, padding[0], padding[1], s.dilation_h);
  s.out_width = places(s.width, s.kernel_w, s.stride_w, padding[2], padding[3], s.dilation_w);
  FMK_CHECK(s.out_height > 0 && s.out_width > 0, "input: smaller than the kernel");
  c.conv_size = {s.batch, s.out_channels, s.out_height, s.out_width};
  c.output_size = c.conv_size;
  if (pool.empty()) return c;
  check_values(pool, "pool", 6, 0);
  c.pool = {pool[0], pool[1], pool[2], pool[3], pool[4], pool[5], 1, 1, 0, 0};
  PoolShape& q = c.pool;
  FMK_CHECK(q.kernel_h >= 1 && q.kernel_w >= 1 && q.kernel_h <= 3 && q.kernel_w <= 3 &&
                q.stride_h >= 1 && q.stride_w >= 1 && 2 * q.padding_h <= q.kernel_h &&
                2 * q.padding_w <= q.kernel_w,
            "pool: expected windows of at most 3x3 and paddings of at most half of that");
  q.out_height = places(s.out_height, q.kernel_h, q.stride_h, q.padding_h, q.padding_h, 1);
  q.out_width = places(s.out_width, q.kernel_w, q.stride_w, q.padding_w, q.padding_w, 1);
  FMK_CHECK(q.out_height > 0 && q.out_width > 0, "pool: larger than the convolution's output");
  c.output_size = {s.batch, s.out_channels, q.out_height, q.out_width};
  return c;
}

PackedHeader header_of(const ConvShape& s, ConvAlgorithm algorithm) {
  return packed_header(PackedKind::kConv2d, s.dtype,
                       {s.out_channels, s.channels, s.kernel_h, s.kernel_w, s.groups},
                       static_cast<int32_t>(algorithm));
}

// The algorithm that a packed weight was packed for. panels_of checks everything else.
ConvAlgorithm packed_algorithm(const Tensor& packed) {
  PackedHeader header;
  check_cpu(packed, "packed_weight");
  FMK_CHECK(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() &&
                packed.numel() >= static_cast<int64_t>(sizeof header),
            "packed_weight: expected the result of conv_pack_weight");
  std::memcpy(&header, packed.const_data_ptr(), sizeof header);
  FMK_CHECK(header.algorithm >= 0 && header.algorithm <= 1, "packed_weight: damaged");
  return static_cast<ConvAlgorithm>(header.algorithm);
}

// What this version of the kernels does not compute.
Ints check_options(const Ints& padding, bool transposed, const std::string& padding_mode,
                   const std::optional<std::string>& pool) {
  FMK_CHECK(padding.size() == 4, "padding: expected 4 values, got ", padding.size());
  FMK_CHECK(!transposed, "transposed: not supported");
  FMK_CHECK(padding_mode == "zeros", "padding_mode: only zeros are supported");
  FMK_CHECK(!pool || *pool == "max", "pool: only max is supported");
  return padding;
}

std::tuple<Tensor, Tensor, Tensor> conv_forward(
    const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& residual,
    const OptionalTensor& packed_weight, const Ints& stride, const Ints& padding,
    const Ints& dilation, int64_t groups, bool transposed, const std::string& padding_mode,
    const std::optional<std::string>& activation, const std::optional<std::string>& pool_kind,
    const Ints& pool, bool save_for_backward, bool exact) {
  const Conv c =
      check_conv(input, weight, stride, check_options(padding, transposed, padding_mode, pool_kind),
                 dilation, groups, pool);
  const bool channels_last = c.shape.channels_last;
  check_parameter(bias, "bias", input, {c.shape.out_channels});
  check_vector(scale, "scale", input, c.shape.out_channels);
  check_vector(shift, "shift", input, c.shape.out_channels);
  if (residual) check_image(*residual, "residual", input.scalar_type(), c.conv_size, channels_last);
  const ConvKernels& kernels = conv_kernels();

  ConvForward p{};
  p.shape = c.shape;
  p.pool = c.pool;
  p.algorithm = kernels.choose_algorithm(c.shape, exact);
  if (packed_weight) {
    const ConvAlgorithm packed = packed_algorithm(*packed_weight);
    // What was packed for Winograd fits its form only, and is of no use to an exact call.
    ConvShape any_size = c.shape;
    any_size.batch = 0;
    const bool usable =
        packed == ConvAlgorithm::kDirect || kernels.choose_algorithm(any_size, exact) == packed;
    const void* panels =
        panels_of(packed_weight, header_of(c.shape, packed), kernels.packed_bytes(c.shape, packed));
    if (usable) {
      p.algorithm = packed;
      p.packed_weight = panels;
    }
  }
  p.input = data_of(input);
  p.weight = data_of(weight);
  p.bias = data_of(bias);
  p.scale = data_of(scale);
  p.shift = data_of(shift);
  p.residual = data_of(residual);
  p.activation = activation_from(activation);
  const bool save = save_for_backward && needs_preactivation(p.activation);
  const bool save_argmax = save_for_backward && !pool.empty();
  Tensor output = allocate_image(input, c.output_size, channels_last);
  Tensor saved = save ? allocate_image(input, c.conv_size, channels_last) : nothing(input);
  Tensor argmax = save_argmax
                      ? allocate_image(input, c.output_size, channels_last, ScalarType::Byte)
                      : allocate(input, {0}, ScalarType::Byte);
  p.output = mutable_data_of(output);
  p.preactivation = mutable_data_if(save, saved);
  p.argmax = static_cast<uint8_t*>(mutable_data_if(save_argmax, argmax));
  kernels.forward(p, torch_pool());
  return {output, saved, argmax};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& scale, const Tensor& output,
    const Tensor& saved, const Tensor& argmax, const Ints& stride, const Ints& padding,
    const Ints& dilation, int64_t groups, bool transposed, const std::string& padding_mode,
    const std::optional<std::string>& activation, const std::optional<std::string>& pool_kind,
    const Ints& pool, bool need_input, bool need_weight, bool need_bias, bool need_scale,
    bool need_shift, bool need_residual, bool exact) {
  const Conv c =
      check_conv(input, weight, stride, check_options(padding, transposed, padding_mode, pool_kind),
                 dilation, groups, pool);
  const bool channels_last = c.shape.channels_last;
  const ScalarType dtype = input.scalar_type();
  check_image(grad_output, "grad_output", dtype, c.output_size, channels_last);
  check_parameter(bias, "bias", input, {c.shape.out_channels});
  check_vector(scale, "scale", input, c.shape.out_channels);

  ConvBackward p{};
  p.shape = c.shape;
  p.pool = c.pool;
  p.exact = exact;
  p.activation = activation_from(activation);
  if (needs_preactivation(p.activation)) {
    check_image(saved, "saved", dtype, c.conv_size, channels_last);
    p.saved = data_of(saved);
  } else if (p.activation != Activation::kNone && pool.empty()) {
    check_image(output, "output", dtype, c.output_size, channels_last);
    p.saved = data_of(output);
  }
  if (!pool.empty()) {
    check_image(argmax, "argmax", ScalarType::Byte, c.output_size, channels_last);
    p.argmax = static_cast<const uint8_t*>(data_of(argmax));
  }
  p.grad_output = data_of(grad_output);
  p.input = data_of(input);
  p.weight = data_of(weight);
  p.scale = data_of(scale);
  const bool changed = p.activation != Activation::kNone || !pool.empty();
  Tensor grad_preactivation =
      changed ? allocate_image(input, c.conv_size, channels_last) : nothing(input);
  Tensor grad_input =
      need_input ? allocate_image(input, shape_of(input), channels_last) : nothing(input);
  Tensor grad_weight = allocate_if(need_weight, input, shape_of(weight));
  Tensor grad_bias = allocate_if(need_bias, input, {c.shape.out_channels});
  const ScalarType accumulated = accumulated_as(input);
  Tensor grad_scale = allocate(input, {need_scale ? c.shape.out_channels : 0}, accumulated);
  Tensor grad_shift = allocate(input, {need_shift ? c.shape.out_channels : 0}, accumulated);
  p.grad_preactivation = mutable_data_if(changed, grad_preactivation);
  p.grad_input = mutable_data_if(need_input, grad_input);
  p.grad_weight = mutable_data_if(need_weight, grad_weight);
  p.grad_bias = mutable_data_if(need_bias, grad_bias);
  p.bias = data_of(bias);
  p.grad_scale = mutable_data_if(need_scale, grad_scale);
  p.grad_shift = mutable_data_if(need_shift, grad_shift);
  conv_kernels().backward(p, torch_pool());
  // An operator may not return an argument: with nothing after the convolution the residual's
  // gradient is a copy of grad_output.
  Tensor grad_residual = nothing(input);
  if (need_residual) {
    grad_residual = grad_preactivation;
    if (!changed) {
      grad_residual = allocate_image(input, c.conv_size, channels_last);
      torch::stable::copy_(grad_residual, grad_output);
    }
  }
  return {grad_input, grad_weight, grad_bias, grad_scale, grad_shift, grad_residual};
}

Tensor conv_pack_weight(const Tensor& weight, const Ints& stride, const Ints& padding,
                        const Ints& dilation, int64_t groups, bool transposed,
                        const std::string& padding_mode, bool exact) {
  const ConvShape shape =
      check_weight(weight, stride, check_options(padding, transposed, padding_mode, std::nullopt),
                   dilation, groups);
  const ConvKernels& kernels = conv_kernels();
  const ConvAlgorithm algorithm = kernels.choose_algorithm(shape, exact);
  void* panels;
  Tensor packed = new_packed(weight, header_of(shape, algorithm),
                             kernels.packed_bytes(shape, algorithm), &panels);
  kernels.pack_weight(shape, algorithm, data_of(weight), panels, torch_pool());
  return packed;
}

PoolShape check_window(const Ints& kernel, const Ints& stride, const Ints& padding,
                       const Ints& dilation) {
  check_values(kernel, "kernel_size", 2, 1);
  check_values(stride, "stride", 2, 1);
  check_values(padding, "padding", 2, 0);
  check_values(dilation, "dilation", 2, 1);
  FMK_CHECK(kernel[0] <= 256 && kernel[1] <= 256 && kernel[0] * kernel[1] <= 256,
            "kernel_size: a window holds at most 256 elements");
  return {kernel[0],  kernel[1],   stride[0],   stride[1], padding[0],
          padding[1], dilation[0], dilation[1], 0,         0};
}

// As places(); with ceil_mode a window that starts inside and reaches over the end counts, too.
int64_t pooled_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                    bool ceil_mode) {
  const int64_t room = size + 2 * padding - dilation * (kernel - 1) - 1;
  if (!ceil_mode || room < 0) return places(size, kernel, stride, padding, padding, dilation);
  const int64_t count = (room + stride - 1) / stride + 1;
  return (count - 1) * stride >= size + padding ? count - 1 : count;
}

MaxPool describe(const Tensor& like, bool channels_last, const Ints& size,
                 const PoolShape& window) {
  return {dtype_of(like, "input"), channels_last, size[0], size[1], size[2], size[3], window};
}

std::tuple<Tensor, Tensor> max_pool_forward(const Tensor& input, const Ints& kernel_size,
                                            const Ints& stride, const Ints& padding,
                                            const Ints& dilation, bool ceil_mode) {
  const bool channels_last = image_layout(input, "input");
  MaxPool m = describe(input, channels_last, shape_of(input),
                       check_window(kernel_size, stride, padding, dilation));
  PoolShape& q = m.pool;
  q.out_height =
      pooled_size(m.height, q.kernel_h, q.stride_h, q.padding_h, q.dilation_h, ceil_mode);
  q.out_width = pooled_size(m.width, q.kernel_w, q.stride_w, q.padding_w, q.dilation_w, ceil_mode);
  FMK_CHECK(q.out_height > 0 && q.out_width > 0, "input: smaller than the window");
  const Ints size{m.batch, m.channels, q.out_height, q.out_width};
  Tensor output = allocate_image(input, size, channels_last);
  Tensor argmax = allocate_image(input, size, channels_last, ScalarType::Byte);
  conv_kernels().max_pool_forward(m, data_of(input), mutable_data_of(output),
                                  static_cast<uint8_t*>(mutable_data_of(argmax)), torch_pool());
  return {output, argmax};
}

Tensor max_pool_backward(const Tensor& grad_output, const Tensor& argmax, const Ints& input_size,
                         const Ints& kernel_size, const Ints& stride, const Ints& padding,
                         const Ints& dilation) {
  const bool channels_last = image_layout(grad_output, "grad_output");
  check_values(input_size, "input_size", 4, 0);
  FMK_CHECK(input_size[0] == grad_output.size(0) && input_size[1] == grad_output.size(1),
            "input_size: expected the batch and channels of grad_output");
  check_image(argmax, "argmax", ScalarType::Byte, shape_of(grad_output), channels_last);
  MaxPool m = describe(grad_output, channels_last, input_size,
                       check_window(kernel_size, stride, padding, dilation));
  m.pool.out_height = grad_output.size(2);
  m.pool.out_width = grad_output.size(3);
  Tensor grad_input = allocate_image(grad_output, input_size, channels_last);
  conv_kernels().max_pool_backward(m, data_of(grad_output),
                                   static_cast<const uint8_t*>(data_of(argmax)),
                                   mutable_data_of(grad_input), torch_pool());
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CPU, m) {
  m.impl("conv_forward", TORCH_BOX(&conv_forward));
  m.impl("conv_backward", TORCH_BOX(&conv_backward));
  m.impl("conv_pack_weight", TORCH_BOX(&conv_pack_weight));
  m.impl("max_pool_forward", TORCH_BOX(&max_pool_forward));
  m.impl("max_pool_backward", TORCH_BOX(&max_pool_backward));
}

}  // namespace fmk::ops
