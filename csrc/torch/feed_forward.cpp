#include "cpu/feed_forward.h"

#include <tuple>

#include "cpu/linear.h"
#include "torch/dropout.h"

namespace fmk::ops {
namespace {

struct Problem {
  FeedForwardShape shape;
  std::vector<int64_t> hidden, output;
};

Problem check_operands(const Tensor& input, const Tensor& weight1,
                       const OptionalTensor& gate_weight, const Tensor& weight2,
                       const std::optional<std::string>& activation, double dropout_p,
                       const OptionalTensor& seed) {
  Problem problem{{}, shape_of(input), shape_of(input)};
  FeedForwardShape& shape = problem.shape;
  shape.dtype = dtype_of(input, "input");
  check_cpu(input, "input");
  check_contiguous(input, "input");
  FMK_CHECK(input.dim() >= 1, "input: expected at least one dimension");
  for (const auto& [weight, name] : {std::pair{&weight1, "weight1"}, {&weight2, "weight2"}}) {
    check_like(*weight, name, input, "input");
    check_contiguous(*weight, name);
    FMK_CHECK(weight->dim() == 2, name, ": expected two dimensions, got ", weight->dim());
    FMK_CHECK(weight->numel() > 0, name, ": expected at least one element");
  }
  shape.in_features = input.size(input.dim() - 1);
  shape.hidden_features = weight1.size(0);
  shape.out_features = weight2.size(0);
  check_shape(weight1, "weight1", {shape.hidden_features, shape.in_features});
  check_shape(weight2, "weight2", {shape.out_features, shape.hidden_features});
  check_parameter(gate_weight, "gate_weight", input, shape_of(weight1));
  shape.rows = 1;
  for (int64_t i = 0; i + 1 < input.dim(); ++i) shape.rows *= input.size(i);
  shape.gated = gate_weight.has_value();
  shape.activation = activation_from(activation);
  shape.dropout = dropout_of(dropout_p, seed);
  problem.hidden.back() = shape.hidden_features;
  problem.output.back() = shape.out_features;
  return problem;
}

PackedHeader header_of(DType dtype, int64_t out_features, int64_t in_features, bool gated) {
  return packed_header(gated ? PackedKind::kGated : PackedKind::kLinear, dtype,
                       {out_features, in_features, 0, 0, 0});
}

size_t packed_bytes(DType dtype, int64_t out_features, int64_t in_features, bool gated) {
  return gated ? feed_forward_kernels().packed_bytes(dtype, out_features, in_features)
               : linear_kernels().packed_bytes(dtype, out_features, in_features);
}

const void* panels_for(const OptionalTensor& packed, DType dtype, int64_t out_features,
                       int64_t in_features, bool gated) {
  return panels_of(packed, header_of(dtype, out_features, in_features, gated),
                   packed_bytes(dtype, out_features, in_features, gated));
}

// The forward pass on checked operands, without its results.
FeedForwardForward forward_of(const Problem& problem, const Tensor& input, const Tensor& weight1,
                              const OptionalTensor& bias1, const OptionalTensor& gate_weight,
                              const OptionalTensor& gate_bias, const Tensor& weight2,
                              const OptionalTensor& bias2, const OptionalTensor& residual,
                              const OptionalTensor& packed_weight1,
                              const OptionalTensor& packed_weight2) {
  const FeedForwardShape& s = problem.shape;
  check_parameter(bias1, "bias1", input, {s.hidden_features});
  check_parameter(gate_bias, "gate_bias", input, {s.hidden_features});
  check_parameter(bias2, "bias2", input, {s.out_features});
  check_parameter(residual, "residual", input, problem.output);
  FMK_CHECK(s.gated || !gate_bias, "gate_bias: expected none without a gate_weight");

  FeedForwardForward p{};
  p.shape = s;
  p.input = data_of(input);
  p.weight1 = data_of(weight1);
  p.bias1 = data_of(bias1);
  p.gate_weight = data_of(gate_weight);
  p.gate_bias = data_of(gate_bias);
  p.weight2 = data_of(weight2);
  p.bias2 = data_of(bias2);
  p.residual = data_of(residual);
  p.packed_weight1 = panels_for(packed_weight1, s.dtype, s.hidden_features, s.in_features, s.gated);
  p.packed_weight2 = panels_for(packed_weight2, s.dtype, s.out_features, s.hidden_features, false);
  return p;
}

Tensor feed_forward_inference(const Tensor& input, const Tensor& weight1,
                              const OptionalTensor& bias1, const OptionalTensor& gate_weight,
                              const OptionalTensor& gate_bias, const Tensor& weight2,
                              const OptionalTensor& bias2, const OptionalTensor& residual,
                              const OptionalTensor& packed_weight1,
                              const OptionalTensor& packed_weight2,
                              const std::optional<std::string>& activation) {
  const Problem problem =
      check_operands(input, weight1, gate_weight, weight2, activation, 0, std::nullopt);
  FeedForwardForward p = forward_of(problem, input, weight1, bias1, gate_weight, gate_bias, weight2,
                                    bias2, residual, packed_weight1, packed_weight2);
  Tensor output = allocate(input, problem.output);
  Tensor hidden = allocate(input, problem.hidden);
  p.output = mutable_data_of(output);
  p.hidden = mutable_data_of(hidden);
  feed_forward_kernels().forward(p, torch_pool());
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> feed_forward_forward(
    const Tensor& input, const Tensor& weight1, const OptionalTensor& bias1,
    const OptionalTensor& gate_weight, const OptionalTensor& gate_bias, const Tensor& weight2,
    const OptionalTensor& bias2, const OptionalTensor& residual,
    const OptionalTensor& packed_weight1, const OptionalTensor& packed_weight2,
    const std::optional<std::string>& activation, double dropout_p, const OptionalTensor& seed,
    bool save_for_backward) {
  const Problem problem =
      check_operands(input, weight1, gate_weight, weight2, activation, dropout_p, seed);
  const FeedForwardShape& s = problem.shape;
  FeedForwardForward p = forward_of(problem, input, weight1, bias1, gate_weight, gate_bias, weight2,
                                    bias2, residual, packed_weight1, packed_weight2);
  const bool keep_gate = save_for_backward && s.gated;
  const bool keep = save_for_backward && (s.gated || needs_preactivation(s.activation));
  Tensor output = allocate(input, problem.output);
  Tensor hidden = allocate(input, problem.hidden);
  Tensor preactivation = allocate_if(keep, input, problem.hidden);
  Tensor gate_preactivation = allocate_if(keep_gate, input, problem.hidden);
  p.output = mutable_data_of(output);
  p.hidden = mutable_data_of(hidden);
  p.preactivation = mutable_data_if(keep, preactivation);
  p.gate_preactivation = mutable_data_if(keep_gate, gate_preactivation);
  feed_forward_kernels().forward(p, torch_pool());
  return {output, save_for_backward ? hidden : nothing(input), preactivation, gate_preactivation};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> feed_forward_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight1,
    const OptionalTensor& gate_weight, const Tensor& weight2, const Tensor& hidden,
    const Tensor& preactivation, const Tensor& gate_preactivation,
    const std::optional<std::string>& activation, double dropout_p, const OptionalTensor& seed,
    bool need_input, bool need_weight1, bool need_bias1, bool need_gate_weight, bool need_gate_bias,
    bool need_weight2, bool need_bias2) {
  const Problem problem =
      check_operands(input, weight1, gate_weight, weight2, activation, dropout_p, seed);
  const FeedForwardShape& s = problem.shape;
  check_parameter(grad_output, "grad_output", input, problem.output);
  check_parameter(hidden, "hidden", input, problem.hidden);
  if (s.gated || needs_preactivation(s.activation))
    check_parameter(preactivation, "preactivation", input, problem.hidden);
  if (s.gated) check_parameter(gate_preactivation, "gate_preactivation", input, problem.hidden);
  FMK_CHECK(s.gated || !(need_gate_weight || need_gate_bias),
            "need_gate_weight, need_gate_bias: expected false without a gate_weight");

  FeedForwardBackward p{};
  p.shape = s;
  p.grad_output = data_of(grad_output);
  p.input = data_of(input);
  p.weight1 = data_of(weight1);
  p.gate_weight = data_of(gate_weight);
  p.weight2 = data_of(weight2);
  p.hidden = data_of(hidden);
  p.preactivation = data_of(preactivation);
  p.gate_preactivation = data_of(gate_preactivation);
  const bool below = need_input || need_weight1 || need_bias1 || need_gate_weight || need_gate_bias;
  Tensor grad_hidden = allocate_if(below, input, problem.hidden);
  Tensor grad_gate = allocate_if(below && s.gated, input, problem.hidden);
  Tensor grad_input = allocate_if(need_input, input, shape_of(input));
  Tensor grad_weight1 = allocate_if(need_weight1, input, shape_of(weight1));
  Tensor grad_bias1 = allocate_if(need_bias1, input, {s.hidden_features});
  Tensor grad_gate_weight = allocate_if(need_gate_weight, input, shape_of(weight1));
  Tensor grad_gate_bias = allocate_if(need_gate_bias, input, {s.hidden_features});
  Tensor grad_weight2 = allocate_if(need_weight2, input, shape_of(weight2));
  Tensor grad_bias2 = allocate_if(need_bias2, input, {s.out_features});
  p.grad_hidden = mutable_data_if(below, grad_hidden);
  p.grad_gate = mutable_data_if(below && s.gated, grad_gate);
  p.grad_input = mutable_data_if(need_input, grad_input);
  p.grad_weight1 = mutable_data_if(need_weight1, grad_weight1);
  p.grad_bias1 = mutable_data_if(need_bias1, grad_bias1);
  p.grad_gate_weight = mutable_data_if(need_gate_weight, grad_gate_weight);
  p.grad_gate_bias = mutable_data_if(need_gate_bias, grad_gate_bias);
  p.grad_weight2 = mutable_data_if(need_weight2, grad_weight2);
  p.grad_bias2 = mutable_data_if(need_bias2, grad_bias2);
  feed_forward_kernels().backward(p, torch_pool());
  return {grad_input,     grad_weight1, grad_bias1, grad_gate_weight,
          grad_gate_bias, grad_weight2, grad_bias2};
}

Tensor feed_forward_pack_weight(const Tensor& weight, const OptionalTensor& gate_weight) {
  const DType dtype = dtype_of(weight, "weight");
  check_cpu(weight, "weight");
  check_contiguous(weight, "weight");
  FMK_CHECK(weight.dim() == 2, "weight: expected two dimensions, got ", weight.dim());
  check_parameter(gate_weight, "gate_weight", weight, shape_of(weight));
  const bool gated = gate_weight.has_value();
  const int64_t n = weight.size(0), k = weight.size(1);
  void* panels;
  Tensor packed =
      new_packed(weight, header_of(dtype, n, k, gated), packed_bytes(dtype, n, k, gated), &panels);
  if (gated)
    feed_forward_kernels().pack_weight(dtype, data_of(weight), data_of(gate_weight), n, k, panels,
                                       torch_pool());
  else
    linear_kernels().pack_weight(dtype, data_of(weight), false, n, k, panels, torch_pool());
  return packed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CPU, m) {
  m.impl("feed_forward_inference", TORCH_BOX(&feed_forward_inference));
  m.impl("feed_forward_forward", TORCH_BOX(&feed_forward_forward));
  m.impl("feed_forward_backward", TORCH_BOX(&feed_forward_backward));
  m.impl("feed_forward_pack_weight", TORCH_BOX(&feed_forward_pack_weight));
}

}  // namespace fmk::ops
