#include "cpu/norm.h"

#include <tuple>

#include "torch/dropout.h"

namespace fmk::ops {
namespace {

struct Shapes {
  int64_t rows, features;
  std::vector<int64_t> all, leading;
};

Shapes check_input(const Tensor& input, const char* name) {
  dtype_of(input, name);
  check_cpu(input, name);
  check_contiguous(input, name);
  FMK_CHECK(input.dim() >= 1, name, ": expected at least one dimension");
  Shapes shapes{1, 0, shape_of(input), shape_of(input)};
  shapes.features = shapes.all.back();
  FMK_CHECK(shapes.features > 0, name, ": expected at least one feature");
  shapes.leading.pop_back();
  for (int64_t size : shapes.leading) shapes.rows *= size;
  return shapes;
}

ScalarType compute_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The forward pass on checked operands, without its results.
NormForward problem_of(const Shapes& shapes, const Tensor& input, const OptionalTensor& residual,
                       const OptionalTensor& weight, const OptionalTensor& bias, bool rms,
                       double eps) {
  check_parameter(residual, "residual", input, shapes.all);
  check_parameter(weight, "weight", input, {shapes.features});
  check_parameter(bias, "bias", input, {shapes.features});
  NormForward p{};
  p.dtype = dtype_of(input, "input");
  p.rows = shapes.rows;
  p.features = shapes.features;
  p.input = data_of(input);
  p.residual = data_of(residual);
  p.weight = data_of(weight);
  p.bias = data_of(bias);
  p.rms = rms;
  p.eps = eps;
  return p;
}

Tensor norm_inference(const Tensor& input, const OptionalTensor& residual,
                      const OptionalTensor& weight, const OptionalTensor& bias, bool rms,
                      double eps) {
  const Shapes shapes = check_input(input, "input");
  NormForward p = problem_of(shapes, input, residual, weight, bias, rms, eps);
  Tensor output = allocate(input, shapes.all);
  p.output = mutable_data_of(output);
  norm_kernels().forward(p, torch_pool());
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_forward(
    const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
    const OptionalTensor& bias, bool rms, double eps, double dropout_p, const OptionalTensor& seed,
    bool save_for_backward, bool return_sum) {
  const Shapes shapes = check_input(input, "input");
  FMK_CHECK(residual || dropout_p == 0, "dropout_p: expected 0 without a residual, got ",
            dropout_p);
  NormForward p = problem_of(shapes, input, residual, weight, bias, rms, eps);
  p.dropout = dropout_of(dropout_p, seed);
  const bool keep_sum = residual && (save_for_backward || return_sum);
  const bool keep_mean = save_for_backward && !rms;
  const std::vector<int64_t> none{0};
  Tensor output = allocate(input, shapes.all);
  Tensor sum = allocate_if(keep_sum, input, shapes.all);
  Tensor mean = allocate(input, keep_mean ? shapes.leading : none, compute_type(input));
  Tensor rstd = allocate(input, save_for_backward ? shapes.leading : none, compute_type(input));
  p.output = mutable_data_of(output);
  p.sum = mutable_data_if(keep_sum, sum);
  p.mean = mutable_data_if(keep_mean, mean);
  p.rstd = mutable_data_if(save_for_backward, rstd);
  norm_kernels().forward(p, torch_pool());
  return {output, sum, mean, rstd};
}

void check_statistic(const Tensor& statistic, const char* name, const Tensor& sum,
                     const std::vector<int64_t>& shape) {
  check_cpu(statistic, name);
  FMK_CHECK(statistic.scalar_type() == compute_type(sum), name,
            ": expected float32, or float64 for float64");
  check_shape(statistic, name, shape);
  check_contiguous(statistic, name);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_backward(
    const Tensor& grad_output, const OptionalTensor& grad_sum, const Tensor& sum,
    const OptionalTensor& weight, const Tensor& mean, const Tensor& rstd, bool rms,
    double dropout_p, const OptionalTensor& seed, bool need_input, bool need_residual,
    bool need_weight, bool need_bias) {
  const Shapes shapes = check_input(sum, "sum");
  check_parameter(grad_output, "grad_output", sum, shapes.all);
  check_parameter(grad_sum, "grad_sum", sum, shapes.all);
  check_parameter(weight, "weight", sum, {shapes.features});
  if (!rms) check_statistic(mean, "mean", sum, shapes.leading);
  check_statistic(rstd, "rstd", sum, shapes.leading);

  NormBackward p{};
  p.dtype = dtype_of(sum, "sum");
  p.rows = shapes.rows;
  p.features = shapes.features;
  p.grad_output = data_of(grad_output);
  p.grad_sum = data_of(grad_sum);
  p.sum = data_of(sum);
  p.weight = data_of(weight);
  p.mean = rms ? nullptr : data_of(mean);
  p.rstd = data_of(rstd);
  p.rms = rms;
  p.dropout = dropout_of(dropout_p, seed);
  Tensor grad_input = allocate_if(need_input, sum, shapes.all);
  Tensor grad_residual = allocate_if(need_residual, sum, shapes.all);
  Tensor grad_weight = allocate_if(need_weight, sum, {shapes.features});
  Tensor grad_bias = allocate_if(need_bias, sum, {shapes.features});
  p.grad_input = mutable_data_if(need_input, grad_input);
  p.grad_residual = mutable_data_if(need_residual, grad_residual);
  p.grad_weight = mutable_data_if(need_weight, grad_weight);
  p.grad_bias = mutable_data_if(need_bias, grad_bias);
  norm_kernels().backward(p, torch_pool());
  return {grad_input, grad_residual, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CPU, m) {
  m.impl("norm_inference", TORCH_BOX(&norm_inference));
  m.impl("norm_forward", TORCH_BOX(&norm_forward));
  m.impl("norm_backward", TORCH_BOX(&norm_backward));
}

}  // namespace fmk::ops
