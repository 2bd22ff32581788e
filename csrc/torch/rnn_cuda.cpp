// The persistent recurrence on CUDA tensors: see csrc/cuda/rnn.h.
#include <tuple>

#include "cuda/rnn.h"
#include "torch/cuda.h"

namespace fmk::ops {
namespace {

using cuda::RnnCell;

RnnCell cell_from(const std::string& name) {
  FMK_CHECK(name == "lstm" || name == "gru", "cell: expected 'lstm' or 'gru', got '", name, "'");
  return name == "lstm" ? RnnCell::kLstm : RnnCell::kGru;
}

// The sizes of a recurrence and the shapes that follow from them.
struct Recurrence {
  cuda::RnnShape shape;
  std::vector<int64_t> state, output, gates, cells;
  int step, batch;  // dimensions of a sequence tensor
};

// Cell states are float32 whatever the dtype of the sequence.
void check_float(const Tensor& tensor, const char* name, const Tensor& model,
                 const std::vector<int64_t>& shape) {
  FMK_CHECK(on_device(tensor) && tensor.get_device() == model.get_device(), name,
            ": expected a tensor on the input's device");
  FMK_CHECK(tensor.scalar_type() == ScalarType::Float, name, ": expected float32");
  check_shape(tensor, name, shape);
  check_contiguous(tensor, name);
}

const float* floats_of(const OptionalTensor& tensor) {
  return static_cast<const float*>(data_of(tensor));
}

// An LSTM's cell state; a GRU has none.
Tensor allocate_state(bool lstm, const Tensor& like, const std::vector<int64_t>& shape) {
  return allocate(like, lstm ? shape : std::vector<int64_t>{0}, ScalarType::Float);
}
float* mutable_floats_if(bool wanted, const Tensor& tensor) {
  return static_cast<float*>(mutable_data_if(wanted, tensor));
}

Recurrence check_state(const Tensor& sequence, const char* name, const Tensor& h0,
                       const OptionalTensor& c0, const OptionalTensor& lengths,
                       const std::vector<Tensor>& w_hh, const std::string& cell, bool batch_first,
                       int leading) {
  FMK_CHECK(on_device(sequence), name, ": expected a tensor on the device");
  FMK_CHECK(sequence.dim() == leading + 3, name, ": expected ", leading + 3, " dimensions, got ",
            sequence.dim());
  FMK_CHECK(h0.dim() == 3, "h0: expected three dimensions, got ", h0.dim());
  Recurrence r;
  r.step = leading + (batch_first ? 1 : 0);
  r.batch = leading + (batch_first ? 0 : 1);
  cuda::RnnShape& shape = r.shape;
  shape.dtype = dtype_of(sequence, name);
  shape.cell = cell_from(cell);
  shape.steps = sequence.size(r.step);
  shape.batch = sequence.size(r.batch);
  shape.directions = h0.size(0);
  shape.hidden = h0.size(2);
  FMK_CHECK(shape.directions == 1 || shape.directions == 2, "h0: expected one or two directions");
  FMK_CHECK(shape.steps > 0, name, ": expected at least one step");
  FMK_CHECK(shape.hidden > 0, "h0: expected at least one hidden feature");
  const bool lstm = shape.cell == RnnCell::kLstm;
  r.state = {shape.directions, shape.batch, shape.hidden};
  r.output = {shape.steps, shape.batch, shape.directions * shape.hidden};
  if (batch_first) std::swap(r.output[0], r.output[1]);
  r.gates = {shape.directions, shape.steps, shape.batch, cuda::kRnnSlots * shape.hidden};
  r.cells = {shape.directions, shape.steps, shape.batch, shape.hidden};
  check_operand(h0, "h0", sequence, r.state);
  FMK_CHECK(c0.has_value() == lstm, "c0: an LSTM has one, and only an LSTM");
  if (lstm) check_float(*c0, "c0", sequence, r.state);
  FMK_CHECK(w_hh.size() == static_cast<size_t>(shape.directions),
            "w_hh: expected one per direction, got ", w_hh.size());
  for (const Tensor& weight : w_hh) {
    check_operand(weight, "w_hh", sequence,
                  {cuda::rnn_gates(shape.cell) * shape.hidden, shape.hidden});
  }
  if (lengths) {
    FMK_CHECK(on_device(*lengths) && lengths->get_device() == sequence.get_device(),
              "lengths: expected a tensor on the input's device");
    FMK_CHECK(lengths->scalar_type() == ScalarType::Long, "lengths: expected int64");
    check_shape(*lengths, "lengths", {shape.batch});
    check_contiguous(*lengths, "lengths");
  }
  return r;
}

cuda::RnnPlan planned(const Recurrence& r, bool backward) {
  cuda::RnnPlan plan;
  const std::string problem = cuda::plan_rnn(r.shape, backward, cuda::device_limits(), &plan);
  FMK_CHECK(problem.empty(), problem);
  return plan;
}

Tensor counters_for(const Recurrence& r, const cuda::RnnPlan& plan, const Tensor& like) {
  return allocate(like, {rnn_counters(r.shape, plan)}, ScalarType::Int);
}

const int64_t* lengths_of(const OptionalTensor& lengths) {
  return static_cast<const int64_t*>(data_of(lengths));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rnn_recurrence_forward(
    const Tensor& projected, std::vector<Tensor> w_hh, std::vector<Tensor> b_hn, const Tensor& h0,
    const OptionalTensor& c0, const OptionalTensor& lengths, std::string cell, bool batch_first,
    bool save_for_backward) {
  const Recurrence r =
      check_state(projected, "projected", h0, c0, lengths, w_hh, cell, batch_first, 1);
  const cuda::RnnShape& shape = r.shape;
  std::vector<int64_t> expected = {shape.directions, r.output[0], r.output[1],
                                   cuda::rnn_gates(shape.cell) * shape.hidden};
  check_operand(projected, "projected", h0, expected);
  FMK_CHECK(b_hn.empty() || (shape.cell == RnnCell::kGru && b_hn.size() == w_hh.size()),
            "b_hn: expected none, or one per direction of a GRU");
  for (const Tensor& bias : b_hn) check_operand(bias, "b_hn", projected, {shape.hidden});

  const bool lstm = shape.cell == RnnCell::kLstm;
  const OnDeviceOf device(projected);
  const Tensor first_h = aligned(h0);
  for (Tensor& weight : w_hh) weight = aligned(weight);
  Tensor output = allocate(projected, r.output), h_n = allocate(projected, r.state);
  Tensor c_n = allocate_state(lstm, projected, r.state);
  Tensor gates = allocate_if(save_for_backward, projected, r.gates);
  const bool save_cells = lstm && save_for_backward;
  Tensor cells = allocate_state(save_cells, projected, r.cells);
  if (shape.batch == 0) return {output, h_n, c_n, gates, cells};

  const cuda::RnnPlan plan = planned(r, false);
  Tensor counters = counters_for(r, plan, projected);
  cuda::RnnForward p{};
  p.shape = shape;
  p.projected = data_of(projected);
  p.projected_direction = projected.stride(0);
  p.projected_step = projected.stride(r.step);
  p.projected_batch = projected.stride(r.batch);
  for (size_t d = 0; d < w_hh.size(); ++d) {
    p.w_hh[d] = data_of(w_hh[d]);
    p.b_hn[d] = b_hn.empty() ? nullptr : data_of(b_hn[d]);
  }
  p.h0 = data_of(first_h);
  p.c0 = floats_of(c0);
  p.lengths = lengths_of(lengths);
  p.output = mutable_data_of(output);
  p.output_step = output.stride(r.step - 1);
  p.output_batch = output.stride(r.batch - 1);
  p.h_n = mutable_data_of(h_n);
  p.c_n = mutable_floats_if(lstm, c_n);
  p.gates = mutable_data_if(save_for_backward, gates);
  p.cells = mutable_floats_if(save_cells, cells);
  p.counters = static_cast<unsigned*>(mutable_data_of(counters));
  cuda::rnn_forward(p, plan, device.stream());
  return {output, h_n, c_n, gates, cells};
}

std::tuple<Tensor, Tensor, Tensor> rnn_recurrence_backward(
    const Tensor& grad_output, const Tensor& grad_h_n, const OptionalTensor& grad_c_n,
    std::vector<Tensor> w_hh, const Tensor& h0, const OptionalTensor& c0,
    const OptionalTensor& lengths, const Tensor& output, const Tensor& gates, const Tensor& cells,
    std::string cell, bool batch_first) {
  const Recurrence r = check_state(output, "output", h0, c0, lengths, w_hh, cell, batch_first, 0);
  const cuda::RnnShape& shape = r.shape;
  const bool lstm = shape.cell == RnnCell::kLstm;
  check_operand(output, "output", h0, r.output);
  check_operand(grad_output, "grad_output", h0, r.output);
  check_operand(grad_h_n, "grad_h_n", h0, r.state);
  FMK_CHECK(grad_c_n.has_value() == lstm, "grad_c_n: an LSTM has one, and only an LSTM");
  check_operand(gates, "gates", h0, r.gates);
  if (lstm) {
    check_float(*grad_c_n, "grad_c_n", h0, r.state);
    check_float(cells, "cells", h0, r.cells);
  }

  const OnDeviceOf device(output);
  for (Tensor& weight : w_hh) weight = aligned(weight);
  std::vector<int64_t> grad_gates_shape = {shape.directions, r.output[0], r.output[1],
                                           cuda::kRnnSlots * shape.hidden};
  Tensor grad_gates = allocate(output, grad_gates_shape);
  Tensor grad_h0 = allocate(output, r.state), grad_c0 = allocate_state(lstm, output, r.state);
  if (shape.batch == 0) return {grad_gates, grad_h0, grad_c0};

  const cuda::RnnPlan plan = planned(r, true);
  Tensor counters = counters_for(r, plan, output);
  cuda::RnnBackward p{};
  p.shape = shape;
  p.grad_output = data_of(grad_output);
  p.grad_output_step = grad_output.stride(r.step);
  p.grad_output_batch = grad_output.stride(r.batch);
  p.grad_h_n = data_of(grad_h_n);
  p.grad_c_n = floats_of(grad_c_n);
  for (size_t d = 0; d < w_hh.size(); ++d) p.w_hh[d] = data_of(w_hh[d]);
  p.h0 = data_of(h0);
  p.c0 = floats_of(c0);
  p.lengths = lengths_of(lengths);
  p.output = data_of(output);
  p.output_step = output.stride(r.step);
  p.output_batch = output.stride(r.batch);
  p.gates = data_of(gates);
  p.cells = floats_of(cells);
  p.grad_gates = mutable_data_of(grad_gates);
  p.grad_gates_step = grad_gates.stride(r.step + 1);
  p.grad_gates_batch = grad_gates.stride(r.batch + 1);
  p.grad_h0 = mutable_data_of(grad_h0);
  p.grad_c0 = mutable_floats_if(lstm, grad_c0);
  p.counters = static_cast<unsigned*>(mutable_data_of(counters));
  cuda::rnn_backward(p, plan, device.stream());
  return {grad_gates, grad_h0, grad_c0};
}

// Why the device cannot hold such a recurrence, forward and backward; empty if it can.
std::string rnn_recurrence_problem(int64_t device, std::string dtype, std::string cell,
                                   int64_t steps, int64_t batch, int64_t hidden,
                                   int64_t directions) {
  const OnDeviceOf guard(device);
  const cuda::RnnShape shape{dtype_named(dtype), cell_from(cell), steps, batch, hidden, directions};
  const cuda::DeviceLimits limits = cuda::device_limits();
  cuda::RnnPlan plan;
  const std::string problem = cuda::plan_rnn(shape, false, limits, &plan);
  return problem.empty() ? cuda::plan_rnn(shape, true, limits, &plan) : problem;
}

}  // namespace
}  // namespace fmk::ops

STABLE_TORCH_LIBRARY_IMPL(fmkernels, FMK_CUDA_KEY, m) {
  m.impl("rnn_recurrence_forward", TORCH_BOX(&fmk::ops::rnn_recurrence_forward));
  m.impl("rnn_recurrence_backward", TORCH_BOX(&fmk::ops::rnn_recurrence_backward));
}

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CompositeExplicitAutograd, m) {
  m.impl("rnn_recurrence_problem", TORCH_BOX(&fmk::ops::rnn_recurrence_problem));
}
