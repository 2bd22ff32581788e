// Batch and group norm with residual, activation and pool: check, allocate, call.
#include "cpu/channel_norm.h"

#include <tuple>

#include "torch/images.h"

namespace fmk::ops {
namespace {

struct Problem {
  ChannelNorm norm;
  Ints size, output_size, statistics;
};

Problem check_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& residual, int64_t groups, double eps,
                   const std::optional<std::string>& activation,
                   const std::optional<std::string>& pool, const Ints& window) {
  Problem c{};
  ChannelNorm& p = c.norm;
  p.channels_last = image_layout(input, "input");
  p.dtype = dtype_of(input, "input");
  c.size = shape_of(input);
  p.batch = c.size[0];
  p.channels = c.size[1];
  p.width = c.size.back();
  p.height = 1;
  for (size_t i = 2; i + 1 < c.size.size(); ++i) p.height *= c.size[i];
  FMK_CHECK(groups >= 0 && (groups == 0 || p.channels % groups == 0),
            "groups: expected 0 or a divisor of the channels, got ", groups);
  p.groups = groups;
  p.eps = eps;
  p.activation = activation_from(activation);
  check_vector(weight, "weight", input, p.channels);
  check_vector(bias, "bias", input, p.channels);
  if (residual) check_image(*residual, "residual", input.scalar_type(), c.size, p.channels_last);
  p.pool = check_pool(pool, window, c.size, &c.output_size);
  c.statistics = groups ? Ints{p.batch, groups} : Ints{p.channels};
  return c;
}

void check_statistics(const Tensor& statistics, const char* name, const Tensor& input,
                      const Ints& shape) {
  check_cpu(statistics, name);
  FMK_CHECK(statistics.scalar_type() == accumulated_as(input), name, ": unexpected dtype");
  check_shape(statistics, name, shape);
  check_contiguous(statistics, name);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> channel_norm_forward(
    const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, int64_t groups, double eps,
    const std::optional<std::string>& activation, const std::optional<std::string>& pool,
    const Ints& window, bool save_for_backward, const OptionalTensor& given_mean,
    const OptionalTensor& given_variance) {
  const Problem c =
      check_norm(input, weight, bias, residual, groups, eps, activation, pool, window);
  const bool channels_last = c.norm.channels_last;
  const bool save_argmax = save_for_backward && pool && *pool == "max";
  FMK_CHECK(given_mean.has_value() == given_variance.has_value(),
            "mean: expected with variance, and without it");
  const bool given = given_mean.has_value();
  if (given) {
    check_statistics(*given_mean, "mean", input, c.statistics);
    check_statistics(*given_variance, "variance", input, c.statistics);
  }
  Tensor output = allocate_image(input, c.output_size, channels_last);
  Tensor mean = allocate(input, c.statistics, accumulated_as(input));
  Tensor variance = allocate(input, c.statistics, accumulated_as(input));
  Tensor argmax = save_argmax
                      ? allocate_image(input, c.output_size, channels_last, ScalarType::Byte)
                      : allocate(input, {0}, ScalarType::Byte);
  if (given) {
    torch::stable::copy_(mean, *given_mean);
    torch::stable::copy_(variance, *given_variance);
  }
  ChannelNormForward f{};
  f.norm = c.norm;
  f.input = data_of(input);
  f.weight = data_of(weight);
  f.bias = data_of(bias);
  f.residual = data_of(residual);
  f.output = mutable_data_of(output);
  f.mean = mutable_data_of(mean);
  f.variance = mutable_data_of(variance);
  f.given = given;
  f.argmax = static_cast<uint8_t*>(mutable_data_if(save_argmax, argmax));
  channel_norm_kernels().forward(f, torch_pool());
  return {output, mean, variance, argmax};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> channel_norm_backward(
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& residual, const Tensor& mean,
    const Tensor& variance, const Tensor& argmax, int64_t groups, double eps,
    const std::optional<std::string>& activation, const std::optional<std::string>& pool,
    const Ints& window, bool need_input, bool need_weight, bool need_bias, bool need_residual) {
  const Problem c =
      check_norm(input, weight, bias, residual, groups, eps, activation, pool, window);
  const bool channels_last = c.norm.channels_last;
  check_image(grad_output, "grad_output", input.scalar_type(), c.output_size, channels_last);
  check_statistics(mean, "mean", input, c.statistics);
  check_statistics(variance, "variance", input, c.statistics);
  if (pool && *pool == "max")
    check_image(argmax, "argmax", ScalarType::Byte, c.output_size, channels_last);
  const auto image = [&](bool wanted) {
    return wanted ? allocate_image(input, c.size, channels_last) : nothing(input);
  };
  const auto vector = [&](bool wanted) {
    return allocate(input, {wanted ? c.norm.channels : 0}, accumulated_as(input));
  };
  Tensor grad_input = image(need_input), grad_residual = image(need_residual);
  Tensor grad_weight = vector(need_weight), grad_bias = vector(need_bias);
  Tensor room = image(!need_input && !need_residual);
  ChannelNormBackward b{};
  b.norm = c.norm;
  b.grad_output = data_of(grad_output);
  b.input = data_of(input);
  b.weight = data_of(weight);
  b.bias = data_of(bias);
  b.residual = data_of(residual);
  b.mean = data_of(mean);
  b.variance = data_of(variance);
  b.argmax = pool && *pool == "max" ? static_cast<const uint8_t*>(data_of(argmax)) : nullptr;
  b.grad_preactivation = mutable_data_of(need_residual ? grad_residual
                                         : need_input  ? grad_input
                                                       : room);
  b.grad_input = mutable_data_if(need_input, grad_input);
  b.grad_weight = mutable_data_if(need_weight, grad_weight);
  b.grad_bias = mutable_data_if(need_bias, grad_bias);
  channel_norm_kernels().backward(b, torch_pool());
  return {grad_input, grad_weight, grad_bias, grad_residual};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CPU, m) {
  m.impl("channel_norm_forward", TORCH_BOX(&channel_norm_forward));
  m.impl("channel_norm_backward", TORCH_BOX(&channel_norm_backward));
}

}  // namespace fmk::ops
