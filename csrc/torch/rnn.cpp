#include "cpu/rnn.h"

#include <tuple>

#include "torch/common.h"

namespace fmk::ops {
namespace {

// Biases follow the two matrices of a direction if there are any.
constexpr size_t kWithoutBiases = 2, kWithBiases = 4;

void check_weights(const std::vector<Tensor>& weights, const Tensor& model, const char* model_name,
                   const LstmShape& shape) {
  const auto directions = static_cast<size_t>(shape.directions);
  FMK_CHECK(
      weights.size() == directions * kWithoutBiases || weights.size() == directions * kWithBiases,
      "weights: expected ", directions * kWithoutBiases, " or ", directions * kWithBiases,
      " tensors, got ", weights.size());
  const size_t per_direction = weights.size() / directions;
  const int64_t gates = 4 * shape.hidden_size;
  const std::vector<int64_t> shapes[kWithBiases] = {
      {gates, shape.input_size}, {gates, shape.hidden_size}, {gates}, {gates}};
  for (size_t i = 0; i < weights.size(); ++i) {
    check_like(weights[i], "weights", model, model_name);
    check_shape(weights[i], "weights", shapes[i % per_direction]);
    check_contiguous(weights[i], "weights");
  }
}

void fill_weights(const std::vector<Tensor>& weights, int64_t directions, LstmWeights* filled) {
  const size_t per_direction = weights.size() / static_cast<size_t>(directions);
  for (int64_t d = 0; d < directions; ++d) {
    const Tensor* first = weights.data() + static_cast<size_t>(d) * per_direction;
    const bool biases = per_direction == kWithBiases;
    filled[d] = {data_of(first[0]), data_of(first[1]), biases ? data_of(first[2]) : nullptr,
                 biases ? data_of(first[3]) : nullptr};
  }
}

struct Sequence {
  LstmShape shape;
  SequenceStrides input_strides;
  std::vector<int64_t> state, output, saved_gates, saved_cells;
};

Sequence check_operands(const Tensor& input, const Tensor& h0, const Tensor& c0,
                        const std::vector<Tensor>& weights, bool batch_first) {
  Sequence s;
  s.shape.dtype = dtype_of(input, "input");
  check_cpu(input, "input");
  FMK_CHECK(input.dim() == 3, "input: expected three dimensions, got ", input.dim());
  const int time = batch_first ? 1 : 0, batch = batch_first ? 0 : 1;
  s.shape.steps = input.size(time);
  s.shape.batch = input.size(batch);
  s.shape.input_size = input.size(2);
  FMK_CHECK(s.shape.steps > 0, "input: expected at least one step");
  // Strides mean nothing where there is one element at most.
  FMK_CHECK(s.shape.input_size <= 1 || s.shape.batch == 0 || input.stride(2) == 1,
            "input: expected a contiguous last dimension");
  s.input_strides = {input.stride(time), input.stride(batch)};
  FMK_CHECK(h0.dim() == 3, "h0: expected three dimensions, got ", h0.dim());
  s.shape.directions = h0.size(0);
  s.shape.hidden_size = h0.size(2);
  FMK_CHECK(s.shape.directions == 1 || s.shape.directions == 2,
            "h0: expected one or two directions, got ", s.shape.directions);
  FMK_CHECK(s.shape.hidden_size > 0, "h0: expected at least one hidden feature");
  const LstmShape& shape = s.shape;
  s.state = {shape.directions, shape.batch, shape.hidden_size};
  check_parameter(h0, "h0", input, s.state);
  check_parameter(c0, "c0", input, s.state);
  check_weights(weights, input, "input", shape);
  s.output = {shape.steps, shape.batch, shape.directions * shape.hidden_size};
  if (batch_first) std::swap(s.output[0], s.output[1]);
  s.saved_gates = {shape.directions, shape.steps, shape.batch, 4 * shape.hidden_size};
  s.saved_cells = {shape.directions, shape.steps, shape.batch, shape.hidden_size};
  return s;
}

// The cell states are kept in the type in which they are computed.
ScalarType state_dtype(DType dtype) {
  return dtype == DType::kF64 ? ScalarType::Double : ScalarType::Float;
}

PackedHeader header_of(const LstmShape& shape, bool has_biases) {
  return packed_header(PackedKind::kLstm, shape.dtype,
                       {shape.directions, shape.hidden_size, shape.input_size, has_biases, 0});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>> lstm_forward(
    const Tensor& input, const Tensor& h0, const Tensor& c0, std::vector<Tensor> weights,
    const OptionalTensor& packed_weight, const OptionalTensor&, const OptionalTensor&,
    const OptionalTensor&, const OptionalTensor&, bool, bool, bool, std::string, std::string,
    double, double, bool batch_first, bool, bool save_for_backward) {
  const Sequence s = check_operands(input, h0, c0, weights, batch_first);
  const RnnKernels& kernels = rnn_kernels();
  const bool has_biases = weights.size() == static_cast<size_t>(s.shape.directions) * kWithBiases;

  Tensor output = allocate(input, s.output);
  Tensor h_n = allocate(input, s.state), c_n = allocate(input, s.state);
  Tensor gates = allocate_if(save_for_backward, input, s.saved_gates);
  Tensor cells = allocate(input, save_for_backward ? s.saved_cells : std::vector<int64_t>{0},
                          state_dtype(s.shape.dtype));
  LstmForward p{};
  p.shape = s.shape;
  p.input = data_of(input);
  p.input_strides = s.input_strides;
  p.h0 = data_of(h0);
  p.c0 = data_of(c0);
  fill_weights(weights, s.shape.directions, p.weights);
  p.packed_weight =
      panels_of(packed_weight, header_of(s.shape, has_biases), kernels.lstm_packed_bytes(s.shape));
  p.output = mutable_data_of(output);
  p.output_strides = {output.stride(batch_first ? 1 : 0), output.stride(batch_first ? 0 : 1)};
  p.h_n = mutable_data_of(h_n);
  p.c_n = mutable_data_of(c_n);
  p.gates = mutable_data_if(save_for_backward, gates);
  p.cells = mutable_data_if(save_for_backward, cells);
  if (s.shape.batch > 0) kernels.lstm_forward(p, torch_pool());
  std::vector<Tensor> saved;
  if (save_for_backward) saved = {gates, cells};
  return {output, h_n, c_n, nothing(input), saved};
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> lstm_backward(
    const Tensor& grad_output, const Tensor& grad_h_n, const Tensor& grad_c_n,
    const OptionalTensor&, const Tensor& input, const Tensor& h0, const Tensor& c0,
    std::vector<Tensor> weights, const Tensor& output, std::vector<Tensor> saved,
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
    bool, bool, bool, std::string, std::string, double, double, bool batch_first, bool need_input,
    bool need_hx, bool need_weights) {
  FMK_CHECK(saved.size() == 2, "saved: expected two tensors");
  const Tensor &gates = saved[0], &cells = saved[1];
  const Sequence s = check_operands(input, h0, c0, weights, batch_first);
  check_parameter(grad_output, "grad_output", input, s.output);
  check_parameter(grad_h_n, "grad_h_n", input, s.state);
  check_parameter(grad_c_n, "grad_c_n", input, s.state);
  check_parameter(output, "output", input, s.output);
  check_parameter(gates, "gates", input, s.saved_gates);
  check_cpu(cells, "cells");
  check_shape(cells, "cells", s.saved_cells);
  check_contiguous(cells, "cells");
  FMK_CHECK(cells.scalar_type() == state_dtype(s.shape.dtype),
            "cells: expected float32, or float64 with a float64 input");

  LstmBackward p{};
  p.shape = s.shape;
  p.batch_first = batch_first;
  p.grad_output = data_of(grad_output);
  p.grad_h_n = data_of(grad_h_n);
  p.grad_c_n = data_of(grad_c_n);
  p.input = data_of(input);
  p.input_strides = s.input_strides;
  p.h0 = data_of(h0);
  p.c0 = data_of(c0);
  fill_weights(weights, s.shape.directions, p.weights);
  p.output = data_of(output);
  p.gates = data_of(gates);
  p.cells = data_of(cells);

  Tensor grad_input = allocate_if(need_input, input, shape_of(input));
  Tensor grad_h0 = allocate_if(need_hx, input, s.state);
  Tensor grad_c0 = allocate_if(need_hx, input, s.state);
  p.grad_input = mutable_data_if(need_input, grad_input);
  p.grad_h0 = mutable_data_if(need_hx, grad_h0);
  p.grad_c0 = mutable_data_if(need_hx, grad_c0);
  const size_t per_direction = weights.size() / static_cast<size_t>(s.shape.directions);
  std::vector<Tensor> grad_weights;
  for (size_t i = 0; i < weights.size(); ++i) {
    grad_weights.push_back(allocate_if(need_weights, input, shape_of(weights[i])));
    if (!need_weights) continue;
    LstmWeightGrads& grads = p.grad_weights[i / per_direction];
    void** const slots[kWithBiases] = {&grads.w_ih, &grads.w_hh, &grads.b_ih, &grads.b_hh};
    *slots[i % per_direction] = mutable_data_of(grad_weights.back());
  }

  const RnnKernels& kernels = rnn_kernels();
  Tensor workspace =
      allocate(input, {static_cast<int64_t>(kernels.lstm_backward_workspace(p))}, ScalarType::Byte);
  p.workspace = mutable_data_of(workspace);
  kernels.lstm_backward(p, torch_pool());
  return {grad_input, grad_h0, grad_c0, grad_weights};
}

Tensor lstm_pack_weight(std::vector<Tensor> weights, int64_t, bool has_biases, bool) {
  const size_t per_direction = has_biases ? kWithBiases : kWithoutBiases;
  FMK_CHECK(weights.size() == per_direction || weights.size() == 2 * per_direction,
            "weights: expected ", per_direction, " or ", 2 * per_direction, " tensors, got ",
            weights.size());
  FMK_CHECK(weights[0].dim() == 2 && weights[1].dim() == 2,
            "weights: expected matrices w_ih and w_hh first");
  LstmShape shape{};
  shape.dtype = dtype_of(weights[0], "weights");
  shape.input_size = weights[0].size(1);
  shape.hidden_size = weights[1].size(1);
  shape.directions = static_cast<int64_t>(weights.size() / per_direction);
  check_weights(weights, weights[0], "the first weight", shape);
  LstmWeights filled[2];
  fill_weights(weights, shape.directions, filled);
  const RnnKernels& kernels = rnn_kernels();
  void* panels;
  Tensor packed = new_packed(weights[0], header_of(shape, has_biases),
                             kernels.lstm_packed_bytes(shape), &panels);
  kernels.lstm_pack_weight(shape, filled, panels, torch_pool());
  return packed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CPU, m) {
  m.impl("lstm_forward", TORCH_BOX(&lstm_forward));
  m.impl("lstm_backward", TORCH_BOX(&lstm_backward));
  m.impl("lstm_pack_weight", TORCH_BOX(&lstm_pack_weight));
}

}  // namespace fmk::ops
