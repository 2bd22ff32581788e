// Convolution operators: check, allocate, call.
#include <tuple>

#include "torch/conv_check.h"

namespace fmk::ops {
namespace {

// What conv_forward saves for the backward.
struct Saved {
  OptionalTensor preactivation, argmax;
};

// conv_forward; `saved` is null where only the output is wanted.
Tensor run_forward(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& scale, const OptionalTensor& shift,
                   const OptionalTensor& residual, const OptionalTensor& packed_weight,
                   const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups,
                   bool transposed, const std::string& padding_mode,
                   const std::optional<std::string>& activation,
                   const std::optional<std::string>& pool, const Ints& window, bool exact,
                   Saved* saved) {
  const Conv c = check_conv(image_of(input), weight, stride, padding, dilation, groups, transposed,
                            padding_mode, pool, window);
  const bool channels_last = c.shape.channels_last;
  check_parameter(bias, "bias", input, {c.output_channels});
  check_vector(scale, "scale", input, c.output_channels);
  check_vector(shift, "shift", input, c.output_channels);
  if (residual) check_image(*residual, "residual", input.scalar_type(), c.conv_size, channels_last);
  ConvForward p = bare_forward(c, weight, bias, packed_weight, exact);
  p.input = data_of(input);
  p.scale = data_of(scale);
  p.shift = data_of(shift);
  p.residual = data_of(residual);
  p.activation = activation_from(activation);
  Tensor output = allocate_image(input, c.output_size, channels_last);
  p.output = mutable_data_of(output);
  if (saved && needs_preactivation(p.activation)) {
    saved->preactivation = allocate_image(input, c.conv_size, channels_last);
    p.preactivation = mutable_data_of(*saved->preactivation);
  }
  // Of an average after relu, which values relu let through; else the positions of the maxima.
  const bool mask = pool && *pool == "avg";
  if (saved && pool && (!mask || p.activation == Activation::kRelu)) {
    saved->argmax =
        allocate_image(input, mask ? c.conv_size : c.output_size, channels_last, ScalarType::Byte);
    p.argmax = static_cast<uint8_t*>(mutable_data_of(*saved->argmax));
  }
  conv_kernels().forward(p, torch_pool());
  return output;
}

std::tuple<Tensor, Tensor, Tensor> conv_forward(
    const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& residual,
    const OptionalTensor& packed_weight, const Ints& stride, const Ints& padding,
    const Ints& dilation, int64_t groups, bool transposed, const std::string& padding_mode,
    const std::optional<std::string>& activation, const std::optional<std::string>& pool,
    const Ints& window, bool save_for_backward, bool exact) {
  Saved saved;
  Tensor output = run_forward(input, weight, bias, scale, shift, residual, packed_weight, stride,
                              padding, dilation, groups, transposed, padding_mode, activation, pool,
                              window, exact, save_for_backward ? &saved : nullptr);
  return {output, saved.preactivation ? *saved.preactivation : nothing(input),
          saved.argmax ? *saved.argmax : allocate(input, {0}, ScalarType::Byte)};
}

Tensor conv_inference(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& scale, const OptionalTensor& shift,
                      const OptionalTensor& residual, const OptionalTensor& packed_weight,
                      const std::string& options, bool exact) {
  OptionFields fields(options);
  const Options o(fields);
  fields.finish();
  return run_forward(input, weight, bias, scale, shift, residual, packed_weight, o.stride,
                     o.padding, o.dilation, o.groups, o.transposed, o.padding_mode, o.activation,
                     o.pool, o.window, exact, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> conv_statistics(const Tensor& input, const Tensor& weight,
                                                   const OptionalTensor& bias,
                                                   const OptionalTensor& packed_weight,
                                                   const Ints& stride, const Ints& padding,
                                                   const Ints& dilation, int64_t groups,
                                                   const std::string& padding_mode, bool exact) {
  const Conv c = check_conv(image_of(input), weight, stride, padding, dilation, groups, false,
                            padding_mode, std::nullopt, {});
  check_parameter(bias, "bias", input, {c.output_channels});
  const Parallel pool = torch_pool();
  Tensor output = allocate_image(input, c.output_size, c.shape.channels_last);
  Tensor mean = allocate(input, {c.output_channels}, accumulated_as(input));
  Tensor variance = allocate(input, {c.output_channels}, accumulated_as(input));
  Tensor moments = allocate(input, {3 * pool.threads * c.output_channels}, ScalarType::Double);
  ConvForward p = bare_forward(c, weight, bias, packed_weight, exact);
  p.input = data_of(input);
  p.output = mutable_data_of(output);
  p.mean = mutable_data_of(mean);
  p.variance = mutable_data_of(variance);
  p.moments = static_cast<double*>(mutable_data_of(moments));
  conv_kernels().forward(p, pool);
  return {output, mean, variance};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& scale, const Tensor& output,
    const Tensor& saved, const Tensor& argmax, const Ints& stride, const Ints& padding,
    const Ints& dilation, int64_t groups, bool transposed, const std::string& padding_mode,
    const std::optional<std::string>& activation, const std::optional<std::string>& pool,
    const Ints& window, bool need_input, bool need_weight, bool need_bias, bool need_scale,
    bool need_shift, bool need_residual, bool exact) {
  check_contiguous(weight, "weight");
  const Conv c = check_conv(image_of(input), weight, stride, padding, dilation, groups, transposed,
                            padding_mode, pool, window);
  const bool channels_last = c.shape.channels_last;
  const ScalarType dtype = input.scalar_type();
  check_image(grad_output, "grad_output", dtype, c.output_size, channels_last);
  check_parameter(bias, "bias", input, {c.output_channels});
  check_vector(scale, "scale", input, c.output_channels);

  ConvBackward p{};
  p.shape = c.shape;
  p.pool = c.pool;
  p.exact = exact;
  p.activation = activation_from(activation);
  if (needs_preactivation(p.activation)) {
    check_image(saved, "saved", dtype, c.conv_size, channels_last);
    p.saved = data_of(saved);
  } else if (p.activation != Activation::kNone && !pool) {
    check_image(output, "output", dtype, c.output_size, channels_last);
    p.saved = data_of(output);
  }
  const bool mask = pool && *pool == "avg";
  if (pool && (!mask || p.activation == Activation::kRelu)) {
    check_image(argmax, "argmax", ScalarType::Byte, mask ? c.conv_size : c.output_size,
                channels_last);
    p.argmax = static_cast<const uint8_t*>(data_of(argmax));
  }
  p.grad_output = data_of(grad_output);
  p.input = data_of(input);
  p.weight = data_of(weight);
  p.scale = data_of(scale);
  const bool changed = p.activation != Activation::kNone || pool;
  Tensor grad_preactivation =
      changed ? allocate_image(input, c.conv_size, channels_last) : nothing(input);
  Tensor grad_input =
      need_input ? allocate_image(input, shape_of(input), channels_last) : nothing(input);
  Tensor grad_weight = allocate_if(need_weight, input, shape_of(weight));
  Tensor grad_bias = allocate_if(need_bias, input, {c.output_channels});
  const ScalarType accumulated = accumulated_as(input);
  Tensor grad_scale = allocate(input, {need_scale ? c.output_channels : 0}, accumulated);
  Tensor grad_shift = allocate(input, {need_shift ? c.output_channels : 0}, accumulated);
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
  check_contiguous(weight, "weight");
  AllOptions options;
  const ConvShape shape =
      check_weight(weight, stride, padding, dilation, groups, transposed, padding_mode, &options);
  const ConvKernels& kernels = conv_kernels();
  const ConvAlgorithm algorithm = kernels.choose_algorithm(shape, exact);
  void* panels;
  Tensor packed = new_packed(weight, header_of(shape, algorithm),
                             kernels.packed_bytes(shape, algorithm), &panels);
  kernels.pack_weight(shape, algorithm, data_of(weight), panels, torch_pool());
  return packed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CPU, m) {
  m.impl("conv_forward", TORCH_BOX(&conv_forward));
  m.impl("conv_inference", TORCH_BOX(&conv_inference));
  m.impl("conv_statistics", TORCH_BOX(&conv_statistics));
  m.impl("conv_backward", TORCH_BOX(&conv_backward));
  m.impl("conv_pack_weight", TORCH_BOX(&conv_pack_weight));
}

}  // namespace fmk::ops
