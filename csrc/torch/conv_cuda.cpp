// Depthwise convolution on CUDA tensors: see csrc/cuda/depthwise_conv.h.
#include <tuple>

#include "cuda/depthwise_conv.h"
#include "torch/cuda.h"

namespace fmk::ops {
namespace {

struct Depthwise {
  cuda::DepthwiseShape shape;
  std::vector<int64_t> input, output, state;
};

// Sizes from those of the operands. The dtype is left to the caller.
Depthwise depthwise_sizes(const std::vector<int64_t>& input, const std::vector<int64_t>& weight,
                          int64_t state_w, const std::vector<int64_t>& stride,
                          const std::vector<int64_t>& padding,
                          const std::vector<int64_t>& dilation) {
  FMK_CHECK(input.size() == 4, "input: expected four dimensions, got ", input.size());
  FMK_CHECK(weight.size() == 4, "weight: expected four dimensions, got ", weight.size());
  FMK_CHECK(stride.size() == 2 && dilation.size() == 2 && padding.size() == 4,
            "stride, dilation: expected two numbers, padding four");
  constexpr int64_t kMost = 1 << 30;
  const int64_t channels = weight[0], input_channels = input[1];
  FMK_CHECK(channels < kMost, "weight: too many channels");
  FMK_CHECK(input_channels > 0 && channels % input_channels == 0, "weight: expected a multiple of ",
            input_channels, " channels, got ", channels);
  int64_t size[2];
  for (size_t axis = 0; axis < 2; ++axis) {
    FMK_CHECK(stride[axis] > 0 && stride[axis] < kMost, "stride: expected positive numbers");
    FMK_CHECK(dilation[axis] > 0 && dilation[axis] < kMost, "dilation: expected positive numbers");
    const int64_t before = padding[2 * axis], after = padding[2 * axis + 1];
    FMK_CHECK(before >= 0 && before < kMost && after >= 0 && after < kMost,
              "padding: expected numbers that are not negative");
    FMK_CHECK(input[2 + axis] < kMost && weight[2 + axis] > 0 && weight[2 + axis] < kMost,
              "input, weight: too large");
    const int64_t room =
        input[2 + axis] + before + after - dilation[axis] * (weight[2 + axis] - 1) - 1;
    FMK_CHECK(room >= 0 && room < kMost, "weight: the kernel does not fit the padded input");
    size[axis] = room / stride[axis] + 1;
  }
  Depthwise d{};
  d.input = input;
  d.output = {input[0], channels, size[0], size[1]};
  d.state = {input[0], input_channels, input[2], state_w};
  FMK_CHECK(state_w <= padding[2], "state: expected at most ", padding[2], " columns, got ",
            state_w);
  const auto narrow = [](int64_t value) { return static_cast<int>(value); };
  cuda::DepthwiseShape& s = d.shape;
  s.batch = input[0];
  s.channels = channels;
  s.multiplier = narrow(channels / input_channels);
  s.input_h = narrow(input[2]), s.input_w = narrow(input[3]);
  s.output_h = narrow(size[0]), s.output_w = narrow(size[1]);
  s.kernel_h = narrow(weight[2]), s.kernel_w = narrow(weight[3]);
  s.stride_h = narrow(stride[0]), s.stride_w = narrow(stride[1]);
  s.dilation_h = narrow(dilation[0]), s.dilation_w = narrow(dilation[1]);
  s.padding_h = narrow(padding[0]), s.padding_w = narrow(padding[2]);
  s.state_w = narrow(state_w);
  return d;
}

Depthwise check_depthwise(const Tensor& input, const Tensor& weight, const OptionalTensor& state,
                          const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                          const std::vector<int64_t>& dilation) {
  FMK_CHECK(!state || state->dim() == 4, "state: expected four dimensions");
  Depthwise d = depthwise_sizes(shape_of(input), shape_of(weight), state ? state->size(3) : 0,
                                stride, padding, dilation);
  d.shape.dtype = dtype_of(input, "input");
  check_operand(input, "input", input, d.input);
  check_operand(weight, "weight", input, {d.shape.channels, 1, d.shape.kernel_h, d.shape.kernel_w});
  if (state) check_operand(*state, "state", input, d.state);
  const char* problem = cuda::depthwise_problem(d.shape, cuda::device_limits());
  FMK_CHECK(*problem == '\0', problem);
  return d;
}

// Why the device cannot take such a convolution; empty if it can.
std::string depthwise_problem(int64_t device, std::string dtype, std::vector<int64_t> input,
                              std::vector<int64_t> weight, std::vector<int64_t> stride,
                              std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  const OnDeviceOf guard(device);
  Depthwise d = depthwise_sizes(input, weight, 0, stride, padding, dilation);
  d.shape.dtype = dtype_named(dtype);
  return cuda::depthwise_problem(d.shape, cuda::device_limits());
}

bool is_empty(const std::vector<int64_t>& shape) {
  for (int64_t size : shape)
    if (size == 0) return true;
  return false;
}

std::tuple<Tensor, Tensor> depthwise_forward(
    const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& state, std::vector<int64_t> stride, std::vector<int64_t> padding,
    std::vector<int64_t> dilation, std::optional<std::string> activation, bool save_for_backward) {
  FMK_CHECK(on_device(input), "input: expected a tensor on the device");
  const OnDeviceOf device(input);
  const Depthwise d = check_depthwise(input, weight, state, stride, padding, dilation);
  if (bias) check_operand(*bias, "bias", input, {d.shape.channels});
  cuda::DepthwiseForward p{};
  p.shape = d.shape;
  p.activation = activation_from(activation);
  const bool save = save_for_backward && needs_preactivation(p.activation);
  Tensor output = allocate(input, d.output), saved = allocate_if(save, input, d.output);
  if (is_empty(d.output)) return {output, saved};
  p.input = data_of(input);
  p.state = data_of(state);
  p.weight = data_of(weight);
  p.bias = data_of(bias);
  p.output = mutable_data_of(output);
  p.preactivation = mutable_data_if(save, saved);
  cuda::depthwise_forward(p, device.stream());
  return {output, saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> depthwise_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight,
    const OptionalTensor& state, const OptionalTensor& saved, std::vector<int64_t> stride,
    std::vector<int64_t> padding, std::vector<int64_t> dilation,
    std::optional<std::string> activation, bool need_input, bool need_state, bool need_weight,
    bool need_bias) {
  FMK_CHECK(on_device(input), "input: expected a tensor on the device");
  const OnDeviceOf device(input);
  const Depthwise d = check_depthwise(input, weight, state, stride, padding, dilation);
  check_operand(grad_output, "grad_output", input, d.output);
  cuda::DepthwiseBackward p{};
  p.shape = d.shape;
  p.activation = activation_from(activation);
  FMK_CHECK(saved.has_value() == (p.activation != Activation::kNone),
            "saved: expected with an activation, and only then");
  if (saved) check_operand(*saved, "saved", input, d.output);
  const bool sums = need_weight || need_bias;
  need_state = need_state && state.has_value();
  Tensor grad_input = allocate_if(need_input, input, d.input);
  Tensor grad_state = allocate_if(need_state, input, d.state);
  Tensor grad_weight = allocate_if(sums, weight, shape_of(weight));
  Tensor grad_bias = allocate_if(need_bias, weight, {d.shape.channels});
  p.splits = cuda::depthwise_splits(d.shape, cuda::device_limits());
  Tensor partials =
      allocate(input, {sums ? cuda::depthwise_partials(d.shape, p.splits) : 0}, ScalarType::Float);
  p.grad_output = data_of(grad_output);
  p.saved = data_of(saved);
  p.input = data_of(input);
  p.state = data_of(state);
  p.weight = data_of(weight);
  const bool has_input = !is_empty(d.input) || (need_state && !is_empty(d.state));
  p.grad_input = mutable_data_if(need_input && has_input, grad_input);
  p.grad_state = mutable_data_if(need_state && has_input, grad_state);
  p.grad_weight = mutable_data_if(sums, grad_weight);
  p.grad_bias = mutable_data_if(need_bias, grad_bias);
  p.partials = static_cast<float*>(mutable_data_of(partials));
  cuda::depthwise_backward(p, device.stream());
  return {grad_input, grad_state, grad_weight, grad_bias};
}

}  // namespace
}  // namespace fmk::ops

STABLE_TORCH_LIBRARY_IMPL(fmkernels, FMK_CUDA_KEY, m) {
  m.impl("depthwise_forward", TORCH_BOX(&fmk::ops::depthwise_forward));
  m.impl("depthwise_backward", TORCH_BOX(&fmk::ops::depthwise_backward));
}

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CompositeExplicitAutograd, m) {
  m.impl("depthwise_problem", TORCH_BOX(&fmk::ops::depthwise_problem));
}
