#include "cpu/linear.h"

#include <tuple>

#include "torch/common.h"

namespace fmk::ops {
namespace {

struct Shapes {
  int64_t rows, in_features, out_features;
  std::vector<int64_t> output;
  bool weight_transposed;
};

// Whether the weight is the transpose of a contiguous matrix; refuses any other strides but its own
// contiguous ones.
bool is_transposed(const Tensor& weight) {
  FMK_CHECK(weight.dim() == 2, "weight: expected two dimensions, got ", weight.dim());
  if (weight.is_contiguous()) return false;
  FMK_CHECK(weight.stride(0) == 1 && weight.stride(1) == weight.size(0),
            "weight: expected a contiguous matrix or the transpose of one");
  return true;
}

Shapes check_operands(const Tensor& input, const Tensor& weight) {
  dtype_of(input, "input");
  check_cpu(input, "input");
  check_contiguous(input, "input");
  FMK_CHECK(input.dim() >= 1, "input: expected at least one dimension");
  check_like(weight, "weight", input, "input");
  const bool transposed = is_transposed(weight);
  FMK_CHECK(weight.size(1) == input.size(input.dim() - 1), "weight: expected ",
            input.size(input.dim() - 1), " input features as in input, got ", weight.size(1));
  FMK_CHECK(weight.numel() > 0, "weight: expected at least one element");
  Shapes shapes{1, weight.size(1), weight.size(0), shape_of(input), transposed};
  for (size_t i = 0; i + 1 < shapes.output.size(); ++i) shapes.rows *= shapes.output[i];
  shapes.output.back() = shapes.out_features;
  return shapes;
}

PackedHeader header_of(DType dtype, const Shapes& shapes) {
  return packed_header(PackedKind::kLinear, dtype,
                       {shapes.out_features, shapes.in_features, 0, 0, 0});
}

// The forward pass, without its results.
LinearForward problem_of(const Shapes& shapes, const Tensor& input, const Tensor& weight,
                         const OptionalTensor& bias, const OptionalTensor& residual,
                         const OptionalTensor& packed_weight,
                         const std::optional<std::string>& activation) {
  check_parameter(bias, "bias", input, {shapes.out_features});
  check_parameter(residual, "residual", input, shapes.output);
  const LinearKernels& kernels = linear_kernels();

  LinearForward p{};
  p.dtype = dtype_of(input, "input");
  p.rows = shapes.rows;
  p.in_features = shapes.in_features;
  p.out_features = shapes.out_features;
  p.weight_transposed = shapes.weight_transposed;
  p.input = data_of(input);
  p.weight = data_of(weight);
  p.packed_weight =
      panels_of(packed_weight, header_of(p.dtype, shapes),
                kernels.packed_bytes(p.dtype, shapes.out_features, shapes.in_features));
  p.bias = data_of(bias);
  p.residual = data_of(residual);
  p.activation = activation_from(activation);
  return p;
}

Tensor linear_inference(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& residual, const OptionalTensor& packed_weight,
                        const std::optional<std::string>& activation) {
  const Shapes shapes = check_operands(input, weight);
  LinearForward p = problem_of(shapes, input, weight, bias, residual, packed_weight, activation);
  Tensor output = allocate(input, shapes.output);
  p.output = mutable_data_of(output);
  linear_kernels().forward(p, torch_pool());
  return output;
}

std::tuple<Tensor, Tensor> linear_forward(const Tensor& input, const Tensor& weight,
                                          const OptionalTensor& bias,
                                          const OptionalTensor& residual,
                                          const OptionalTensor& packed_weight,
                                          const std::optional<std::string>& activation,
                                          bool save_for_backward) {
  const Shapes shapes = check_operands(input, weight);
  LinearForward p = problem_of(shapes, input, weight, bias, residual, packed_weight, activation);
  const bool save = save_for_backward && needs_preactivation(p.activation);
  Tensor output = allocate(input, shapes.output);
  Tensor saved = allocate_if(save, input, shapes.output);
  p.output = mutable_data_of(output);
  p.preactivation = mutable_data_if(save, saved);
  linear_kernels().forward(p, torch_pool());
  return {output, saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight, const Tensor& output,
    const Tensor& saved, const std::optional<std::string>& activation, bool need_input,
    bool need_weight, bool need_bias, bool need_residual) {
  const Shapes shapes = check_operands(input, weight);
  check_parameter(grad_output, "grad_output", input, shapes.output);

  LinearBackward p{};
  p.activation = activation_from(activation);
  const bool activated = p.activation != Activation::kNone;
  if (activated) {
    const bool preactivation = needs_preactivation(p.activation);
    check_parameter(preactivation ? saved : output, preactivation ? "saved" : "output", input,
                    shapes.output);
    p.saved = data_of(preactivation ? saved : output);
  }
  p.dtype = dtype_of(input, "input");
  p.rows = shapes.rows;
  p.in_features = shapes.in_features;
  p.out_features = shapes.out_features;
  p.weight_transposed = shapes.weight_transposed;
  p.grad_output = data_of(grad_output);
  p.input = data_of(input);
  p.weight = data_of(weight);
  Tensor grad_preactivation = allocate_if(activated, input, shapes.output);
  Tensor grad_input = allocate_if(need_input, input, shape_of(input));
  std::vector<int64_t> weight_shape = shape_of(weight);
  if (shapes.weight_transposed) std::swap(weight_shape[0], weight_shape[1]);
  Tensor grad_weight = allocate_if(need_weight, input, weight_shape);
  Tensor grad_bias = allocate_if(need_bias, input, {shapes.out_features});
  p.grad_preactivation = mutable_data_if(activated, grad_preactivation);
  p.grad_input = mutable_data_if(need_input, grad_input);
  p.grad_weight = mutable_data_if(need_weight, grad_weight);
  p.grad_bias = mutable_data_if(need_bias, grad_bias);
  linear_kernels().backward(p, torch_pool());
  // The gradient has the strides of the weight.
  if (need_weight && shapes.weight_transposed)
    grad_weight = torch::stable::transpose(grad_weight, 0, 1);
  // An operator may not return an argument: without an activation the residual's gradient is a copy
  // of grad_output.
  Tensor grad_residual = nothing(input);
  if (need_residual)
    grad_residual = activated ? grad_preactivation : torch::stable::clone(grad_output);
  return {grad_input, grad_weight, grad_bias, grad_residual};
}

Tensor linear_pack_weight(const Tensor& weight) {
  const DType dtype = dtype_of(weight, "weight");
  check_cpu(weight, "weight");
  const bool transposed = is_transposed(weight);
  const Shapes shapes{0, weight.size(1), weight.size(0), {}, transposed};
  const LinearKernels& kernels = linear_kernels();
  void* panels;
  Tensor packed =
      new_packed(weight, header_of(dtype, shapes),
                 kernels.packed_bytes(dtype, shapes.out_features, shapes.in_features), &panels);
  kernels.pack_weight(dtype, data_of(weight), transposed, shapes.out_features, shapes.in_features,
                      panels, torch_pool());
  return packed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CPU, m) {
  m.impl("linear_inference", TORCH_BOX(&linear_inference));
  m.impl("linear_forward", TORCH_BOX(&linear_forward));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
  m.impl("linear_pack_weight", TORCH_BOX(&linear_pack_weight));
}

}  // namespace fmk::ops
