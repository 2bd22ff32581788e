#include "cpu/rnn.h"

#include <tuple>

#include "core/pages.h"
#include "torch/common.h"

namespace fmk::ops {
namespace {

using Tensors = std::vector<Tensor>;

// One parameter of a direction: its place in the structures, and its shape.
struct Parameter {
  const void* RnnWeights::* weight;
  void* RnnWeightGrads::* gradient;
  std::vector<int64_t> shape;
};

// The parameters of a direction in the order of the ops.
std::vector<Parameter> parameters_of(const RnnShape& s, bool biases, const LstmVariant& v) {
  using W = RnnWeights;
  using G = RnnWeightGrads;
  const int64_t H = s.hidden_size, P = s.output_size;
  const int64_t gates = (s.kind == RnnKind::kLstm ? 4 : s.kind == RnnKind::kGru ? 3 : 1) * H;
  std::vector<Parameter> list{{&W::w_ih, &G::w_ih, {gates, s.input_size}},
                              {&W::w_hh, &G::w_hh, {gates, P}}};
  if (biases) {
    list.push_back({&W::b_ih, &G::b_ih, {gates}});
    list.push_back({&W::b_hh, &G::b_hh, {gates}});
  }
  if (P != H) list.push_back({&W::w_hr, &G::w_hr, {P, H}});
  if (v.peephole) list.push_back({&W::peephole, &G::peephole, {3, H}});
  if (v.layer_norm) {
    list.push_back({&W::norm_ih, &G::norm_ih, {gates}});
    list.push_back({&W::norm_hh, &G::norm_hh, {gates}});
    list.push_back({&W::norm_c, &G::norm_c, {H}});
    if (biases) list.push_back({&W::bias_c, &G::bias_c, {H}});
  }
  return list;
}

void check_weights(const Tensors& weights, const Tensor& model, const char* model_name,
                   const std::vector<Parameter>& parameters, int64_t directions) {
  const size_t expected = parameters.size() * static_cast<size_t>(directions);
  FMK_CHECK(weights.size() == expected, "weights: expected ", expected, " tensors, got ",
            weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    check_like(weights[i], "weights", model, model_name);
    check_shape(weights[i], "weights", parameters[i % parameters.size()].shape);
    check_contiguous(weights[i], "weights");
  }
}

void fill_weights(const Tensors& weights, const std::vector<Parameter>& parameters,
                  RnnWeights* filled) {
  for (size_t i = 0; i < weights.size(); ++i)
    filled[i / parameters.size()].*parameters[i % parameters.size()].weight = data_of(weights[i]);
}

// The gradients, to be returned, and the places where the kernel writes them.
Tensors allocate_gradients(const Tensors& weights, const std::vector<Parameter>& parameters,
                           bool wanted, RnnWeightGrads* filled) {
  Tensors gradients;
  for (size_t i = 0; i < weights.size(); ++i) {
    gradients.push_back(allocate_if(wanted, weights[i], shape_of(weights[i])));
    if (wanted)
      filled[i / parameters.size()].*parameters[i % parameters.size()].gradient =
          mutable_data_of(gradients.back());
  }
  return gradients;
}

GateActivation gate_activation_from(const char* argument, const std::string& name) {
  static const std::array<const char*, 5> names{"tanh", "sigmoid", "relu", "hard_sigmoid",
                                                "identity"};
  for (size_t i = 0; i < names.size(); ++i)
    if (name == names[i]) return static_cast<GateActivation>(i);
  FMK_CHECK(false, argument, ": unknown name '", name, "'");
  return GateActivation::kTanh;
}

RnnKind kind_from(const std::string& nonlinearity) {
  FMK_CHECK(nonlinearity == "tanh" || nonlinearity == "relu",
            "nonlinearity: expected 'tanh' or 'relu', got '", nonlinearity, "'");
  return nonlinearity == "tanh" ? RnnKind::kTanh : RnnKind::kRelu;
}

// The cell states are kept in the type in which they are computed.
ScalarType state_dtype(DType dtype) {
  return dtype == DType::kF64 ? ScalarType::Double : ScalarType::Float;
}

struct Sequence {
  RnnShape shape;
  SequenceStrides input_strides;
  std::vector<int64_t> hidden, cell, output, cell_states, saved;  // saved: (D, T, B)

  std::vector<int64_t> kept(int64_t width) const {
    std::vector<int64_t> result = saved;
    result.push_back(width);
    return result;
  }
};

// A cell: one step, without the dimensions of time and direction.
Sequence check_cell_step(Sequence s, const Tensor& input, const Tensor& h0, int64_t hidden_size) {
  FMK_CHECK(h0.dim() == 2, "h0: expected two dimensions, got ", h0.dim());
  s.shape.steps = s.shape.directions = 1;
  s.shape.batch = input.size(0);
  s.shape.input_size = input.size(1);
  s.shape.output_size = h0.size(1);
  s.shape.hidden_size = hidden_size < 0 ? h0.size(1) : hidden_size;
  FMK_CHECK(s.shape.input_size <= 1 || s.shape.batch == 0 || input.stride(1) == 1,
            "input: expected a contiguous last dimension");
  FMK_CHECK(s.shape.hidden_size > 0 && s.shape.output_size > 0,
            "h0: expected at least one hidden feature");
  s.input_strides = {0, input.stride(0)};
  s.hidden = s.output = {s.shape.batch, s.shape.output_size};
  s.cell = s.cell_states = {s.shape.batch, s.shape.hidden_size};
  s.saved = {1, 1, s.shape.batch};
  check_parameter(h0, "h0", input, s.hidden);
  return s;
}

Sequence check_sequence(RnnKind kind, const Tensor& input, const Tensor& h0, int64_t hidden_size,
                        const OptionalTensor& lengths, bool batch_first) {
  Sequence s{};
  s.shape.dtype = dtype_of(input, "input");
  s.shape.kind = kind;
  check_cpu(input, "input");
  if (input.dim() == 2) {
    FMK_CHECK(!lengths && !batch_first, "lengths, batch_first: a cell has no time");
    return check_cell_step(s, input, h0, hidden_size);
  }
  FMK_CHECK(input.dim() == 3, "input: expected two or three dimensions, got ", input.dim());
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
  s.shape.output_size = h0.size(2);
  s.shape.hidden_size = hidden_size < 0 ? h0.size(2) : hidden_size;
  FMK_CHECK(s.shape.directions == 1 || s.shape.directions == 2,
            "h0: expected one or two directions, got ", s.shape.directions);
  FMK_CHECK(s.shape.hidden_size > 0 && s.shape.output_size > 0,
            "h0: expected at least one hidden feature");
  const RnnShape& shape = s.shape;
  s.hidden = {shape.directions, shape.batch, shape.output_size};
  s.cell = {shape.directions, shape.batch, shape.hidden_size};
  s.output = {shape.steps, shape.batch, shape.directions * shape.output_size};
  s.cell_states = {shape.steps, shape.batch, shape.directions * shape.hidden_size};
  if (batch_first) {
    std::swap(s.output[0], s.output[1]);
    std::swap(s.cell_states[0], s.cell_states[1]);
  }
  s.saved = {shape.directions, shape.steps, shape.batch};
  check_parameter(h0, "h0", input, s.hidden);
  if (lengths) {
    check_cpu(*lengths, "lengths");
    check_shape(*lengths, "lengths", {shape.batch});
    check_contiguous(*lengths, "lengths");
    FMK_CHECK(lengths->scalar_type() == ScalarType::Long, "lengths: expected int64");
    const auto* values = static_cast<const int64_t*>(data_of(*lengths));
    for (int64_t b = 0; b < shape.batch; ++b)
      FMK_CHECK(values[b] >= 0 && values[b] <= shape.steps, "lengths: expected values in [0, ",
                shape.steps, "], got ", values[b]);
  }
  return s;
}

void check_kept(const Tensor& tensor, const char* name, const std::vector<int64_t>& shape,
                ScalarType dtype) {
  check_cpu(tensor, name);
  check_shape(tensor, name, shape);
  check_contiguous(tensor, name);
  FMK_CHECK(tensor.scalar_type() == dtype, name, ": expected another dtype");
}

// c0 or a gradient of c_n: in the input's dtype, or in float32 beside a narrower one. Returns
// whether it is the latter.
bool check_cell(const Tensor& cell, const char* name, const Tensor& input, const Sequence& s) {
  check_cpu(cell, name);
  check_shape(cell, name, s.cell);
  check_contiguous(cell, name);
  if (cell.scalar_type() == input.scalar_type()) return false;
  FMK_CHECK(cell.scalar_type() == state_dtype(s.shape.dtype), name,
            ": expected the dtype of input or float32");
  return true;
}

int64_t last_size(const Tensor& tensor, const char* name) {
  FMK_CHECK(tensor.dim() >= 2, name, ": expected two or three dimensions, got ", tensor.dim());
  return tensor.size(tensor.dim() - 1);
}

LstmVariant variant_of(const Sequence& s, const Tensor& input, const OptionalTensor& recurrent_mask,
                       const OptionalTensor& zoneout_h, const OptionalTensor& zoneout_c,
                       bool peephole, bool layer_norm, const std::string& activation,
                       const std::string& recurrent_activation, double zoneout, double norm_eps) {
  LstmVariant v;
  v.activation = gate_activation_from("activation", activation);
  v.recurrent_activation = gate_activation_from("recurrent_activation", recurrent_activation);
  v.peephole = peephole;
  v.layer_norm = layer_norm;
  v.norm_eps = norm_eps;
  check_parameter(recurrent_mask, "recurrent_mask", input, s.hidden);
  v.recurrent_mask = data_of(recurrent_mask);
  FMK_CHECK(zoneout_h.has_value() == zoneout_c.has_value(),
            "zoneout_h, zoneout_c: expected both or none");
  if (zoneout_h) {
    check_kept(*zoneout_h, "zoneout_h", s.kept(s.shape.output_size), ScalarType::Bool);
    check_kept(*zoneout_c, "zoneout_c", s.kept(s.shape.hidden_size), ScalarType::Bool);
    v.zoneout_h = static_cast<const bool*>(data_of(*zoneout_h));
    v.zoneout_c = static_cast<const bool*>(data_of(*zoneout_c));
  } else {
    v.zoneout = zoneout;
  }
  return v;
}

const int64_t* lengths_of(const OptionalTensor& lengths) {
  return static_cast<const int64_t*>(data_of(lengths));
}

PackedHeader header_of(const RnnShape& s, bool has_biases, bool layer_norm) {
  const bool lstm = s.kind == RnnKind::kLstm, gru = s.kind == RnnKind::kGru;
  return packed_header(lstm  ? PackedKind::kLstm
                       : gru ? PackedKind::kGru
                             : PackedKind::kRnn,
                       s.dtype,
                       {s.directions, s.hidden_size, s.input_size, s.output_size,
                        (has_biases ? 1 : 0) + (layer_norm ? 2 : 0)});
}

SequenceStrides strides_of(const Tensor& tensor, bool batch_first) {
  if (tensor.dim() == 2) return {0, tensor.stride(0)};
  return {tensor.stride(batch_first ? 1 : 0), tensor.stride(batch_first ? 0 : 1)};
}

// A large tensor that a kernel fills from end to end.
Tensor allocate_large(const Tensor& like, const std::vector<int64_t>& shape,
                      std::optional<ScalarType> dtype = std::nullopt) {
  Tensor tensor = allocate(like, shape, dtype);
  prefer_large_pages(tensor.mutable_data_ptr(),
                     static_cast<size_t>(tensor.numel()) * tensor.element_size());
  return tensor;
}

// --- forward ---

// What every kind does alike; returns output and h_n, which `p` then points at.
std::tuple<Tensor, Tensor> run_forward(const Sequence& s, RnnForward& p, const Tensor& input,
                                       const Tensor& h0, const Tensors& weights,
                                       const OptionalTensor& packed_weight,
                                       const OptionalTensor& lengths, bool has_biases,
                                       bool batch_first) {
  const auto parameters = parameters_of(s.shape, has_biases, p.variant);
  check_weights(weights, input, "input", parameters, s.shape.directions);
  const RnnKernels& kernels = rnn_kernels();
  p.packed_weight = panels_of(packed_weight, header_of(s.shape, has_biases, p.variant.layer_norm),
                              kernels.packed_bytes(s.shape));
  Tensor output = allocate_large(input, s.output), h_n = allocate(input, s.hidden);
  p.shape = s.shape;
  p.cell = input.dim() == 2;
  p.lengths = lengths_of(lengths);
  p.input = data_of(input);
  p.input_strides = s.input_strides;
  p.h0 = data_of(h0);
  fill_weights(weights, parameters, p.weights);
  p.output = mutable_data_of(output);
  p.output_strides = strides_of(output, batch_first);
  p.h_n = mutable_data_of(h_n);
  if (s.shape.batch > 0) kernels.forward(p, torch_pool());
  return {output, h_n};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensors> lstm_forward(
    const Tensor& input, const Tensor& h0, const Tensor& c0, Tensors weights,
    const OptionalTensor& packed_weight, const OptionalTensor& lengths,
    const OptionalTensor& recurrent_mask, const OptionalTensor& zoneout_h,
    const OptionalTensor& zoneout_c, bool has_biases, bool peephole, bool layer_norm,
    std::string activation, std::string recurrent_activation, double zoneout, double norm_eps,
    bool batch_first, bool return_cells, bool save_for_backward) {
  const Sequence s =
      check_sequence(RnnKind::kLstm, input, h0, last_size(c0, "c0"), lengths, batch_first);
  const int64_t H = s.shape.hidden_size;
  RnnForward p{};
  p.wide_cell = check_cell(c0, "c0", input, s);
  p.variant = variant_of(s, input, recurrent_mask, zoneout_h, zoneout_c, peephole, layer_norm,
                         activation, recurrent_activation, zoneout, norm_eps);
  p.c0 = data_of(c0);
  Tensor c_n = allocate(c0, s.cell);
  p.c_n = mutable_data_of(c_n);
  Tensor cell_states = allocate_if(return_cells, input, s.cell_states);
  if (return_cells) {
    p.cell_states = mutable_data_of(cell_states);
    p.cell_strides = strides_of(cell_states, batch_first);
  }
  Tensors saved;
  if (save_for_backward) {
    const ScalarType state = state_dtype(s.shape.dtype);
    saved = {allocate_large(input, s.kept(4 * H)), allocate_large(input, s.kept(H), state)};
    p.gates = mutable_data_of(saved[0]);
    p.cells = mutable_data_of(saved[1]);
    if (layer_norm) {
      for (void** to : {&p.normed_ih, &p.normed_hh}) {
        saved.push_back(allocate_large(input, s.kept(4 * H)));
        *to = mutable_data_of(saved.back());
      }
      saved.push_back(allocate(input, s.kept(2), state));
      p.norm_scales = mutable_data_of(saved.back());
    }
  }
  auto [output, h_n] =
      run_forward(s, p, input, h0, weights, packed_weight, lengths, has_biases, batch_first);
  return {output, h_n, c_n, cell_states, saved};
}

std::tuple<Tensor, Tensor, Tensor> gru_forward(const Tensor& input, const Tensor& h0,
                                               Tensors weights, const OptionalTensor& packed_weight,
                                               const OptionalTensor& lengths, bool has_biases,
                                               bool batch_first, bool save_for_backward) {
  const Sequence s = check_sequence(RnnKind::kGru, input, h0, -1, lengths, batch_first);
  RnnForward p{};
  Tensor gates =
      save_for_backward ? allocate_large(input, s.kept(4 * s.shape.hidden_size)) : nothing(input);
  p.gates = mutable_data_if(save_for_backward, gates);
  auto [output, h_n] =
      run_forward(s, p, input, h0, weights, packed_weight, lengths, has_biases, batch_first);
  return {output, h_n, gates};
}

std::tuple<Tensor, Tensor> rnn_forward(const Tensor& input, const Tensor& h0, Tensors weights,
                                       const OptionalTensor& packed_weight,
                                       const OptionalTensor& lengths, std::string nonlinearity,
                                       bool has_biases, bool batch_first) {
  const Sequence s = check_sequence(kind_from(nonlinearity), input, h0, -1, lengths, batch_first);
  RnnForward p{};
  return run_forward(s, p, input, h0, weights, packed_weight, lengths, has_biases, batch_first);
}

// Zeros in place of a state that was not given, of a cell or a layer.
Tensor zero_state(const Tensor& input, int64_t directions, int64_t features, bool batch_first) {
  const bool cell = input.dim() == 2;
  const int64_t batch = input.size(cell || batch_first ? 0 : 1);
  Tensor state = allocate(input, cell ? std::vector<int64_t>{batch, features}
                                      : std::vector<int64_t>{directions, batch, features});
  std::memset(mutable_data_of(state), 0, static_cast<size_t>(state.numel()) * state.element_size());
  return state;
}

// A layer or cell without options, of which nothing is kept for a backward pass.
std::tuple<Tensor, Tensor, Tensor> run_inference(const Tensor& input, const OptionalTensor& h0,
                                                 const OptionalTensor& c0, const Tensors& weights,
                                                 const OptionalTensor& packed_weight,
                                                 const std::string& kind, int64_t directions,
                                                 bool batch_first) {
  FMK_CHECK(kind == "lstm" || kind == "gru" || kind == "tanh" || kind == "relu",
            "kind: unknown name '", kind, "'");
  FMK_CHECK(directions == 1 || directions == 2, "directions: expected 1 or 2, got ", directions);
  const auto count = static_cast<int64_t>(weights.size());
  FMK_CHECK(count == 2 * directions || count == 4 * directions,
            "weights: expected 2 or 4 tensors of each direction, got ", count);
  const bool lstm = kind == "lstm", has_biases = count == 4 * directions;
  FMK_CHECK(!lstm || h0.has_value() == c0.has_value(), "h0, c0: expected both or none");
  FMK_CHECK(lstm || !c0, "c0: only an LSTM has one");
  RnnForward p{};
  p.zero_state = !h0;
  const Tensor h =
      h0 ? *h0 : zero_state(input, directions, last_size(weights[1], "weights"), batch_first);
  const Tensor c = c0 ? *c0 : h;
  const Sequence s =
      check_sequence(lstm            ? RnnKind::kLstm
                     : kind == "gru" ? RnnKind::kGru
                                     : kind_from(kind),
                     input, h, lstm ? last_size(c, "c0") : -1, std::nullopt, batch_first);
  FMK_CHECK(s.shape.directions == directions, "h0: expected ", directions, " directions, got ",
            s.shape.directions);
  Tensor c_n = allocate_if(lstm, c, s.cell);
  if (lstm) {
    p.wide_cell = check_cell(c, "c0", input, s);
    p.c0 = data_of(c);
    p.c_n = mutable_data_of(c_n);
  }
  auto [output, h_n] =
      run_forward(s, p, input, h, weights, packed_weight, std::nullopt, has_biases, batch_first);
  return {output, h_n, c_n};
}

std::tuple<Tensor, Tensor, Tensor> rnn_inference(const Tensor& input, const OptionalTensor& h0,
                                                 const OptionalTensor& c0, Tensors weights,
                                                 const OptionalTensor& packed_weight,
                                                 std::string kind, int64_t directions,
                                                 bool batch_first) {
  FMK_CHECK(input.dim() == 3, "input: expected three dimensions, got ", input.dim());
  return run_inference(input, h0, c0, weights, packed_weight, kind, directions, batch_first);
}

std::tuple<Tensor, Tensor> rnn_step(const Tensor& input, const OptionalTensor& h0,
                                    const OptionalTensor& c0, Tensors weights,
                                    const OptionalTensor& packed_weight, std::string kind) {
  FMK_CHECK(input.dim() == 2, "input: expected two dimensions, got ", input.dim());
  auto [output, h, c] = run_inference(input, h0, c0, weights, packed_weight, kind, 1, false);
  return {h, c};
}

// --- backward ---

// What every kind does alike; `p` holds what is special. Returns the gradients of input, h0 and the
// weights.
std::tuple<Tensor, Tensor, Tensors> run_backward(const Sequence& s, RnnBackward& p,
                                                 const Tensor& grad_output, const Tensor& grad_h_n,
                                                 const Tensor& input, const Tensor& h0,
                                                 const Tensors& weights, const Tensor& output,
                                                 const OptionalTensor& lengths, bool has_biases,
                                                 bool batch_first, bool need_input, bool need_hx,
                                                 bool need_weights) {
  check_parameter(grad_output, "grad_output", input, s.output);
  check_parameter(grad_h_n, "grad_h_n", input, s.hidden);
  check_parameter(output, "output", input, s.output);
  const auto parameters = parameters_of(s.shape, has_biases, p.variant);
  check_weights(weights, input, "input", parameters, s.shape.directions);
  p.shape = s.shape;
  p.batch_first = batch_first;
  p.lengths = lengths_of(lengths);
  p.grad_output = data_of(grad_output);
  p.grad_h_n = data_of(grad_h_n);
  p.input = data_of(input);
  p.input_strides = s.input_strides;
  p.h0 = data_of(h0);
  fill_weights(weights, parameters, p.weights);
  p.output = data_of(output);
  Tensor grad_input = need_input ? allocate_large(input, shape_of(input)) : nothing(input);
  Tensor grad_h0 = allocate_if(need_hx, input, s.hidden);
  p.grad_input = mutable_data_if(need_input, grad_input);
  p.grad_h0 = mutable_data_if(need_hx, grad_h0);
  Tensors gradients = allocate_gradients(weights, parameters, need_weights, p.grad_weights);
  const RnnKernels& kernels = rnn_kernels();
  Tensor workspace = allocate_large(
      input, {static_cast<int64_t>(kernels.backward_workspace(p)) + 64}, ScalarType::Byte);
  const auto address = reinterpret_cast<uintptr_t>(mutable_data_of(workspace));
  p.workspace = reinterpret_cast<void*>((address + 63) / 64 * 64);
  kernels.backward(p, torch_pool());
  return {grad_input, grad_h0, gradients};
}

std::tuple<Tensor, Tensor, Tensor, Tensors> lstm_backward(
    const Tensor& grad_output, const Tensor& grad_h_n, const Tensor& grad_c_n,
    const OptionalTensor& grad_cells, const Tensor& input, const Tensor& h0, const Tensor& c0,
    Tensors weights, const Tensor& output, Tensors saved, const OptionalTensor& lengths,
    const OptionalTensor& recurrent_mask, const OptionalTensor& zoneout_h,
    const OptionalTensor& zoneout_c, bool has_biases, bool peephole, bool layer_norm,
    std::string activation, std::string recurrent_activation, double zoneout, double norm_eps,
    bool batch_first, bool need_input, bool need_hx, bool need_weights) {
  const Sequence s =
      check_sequence(RnnKind::kLstm, input, h0, last_size(c0, "c0"), lengths, batch_first);
  const int64_t H = s.shape.hidden_size;
  const ScalarType state = state_dtype(s.shape.dtype), dtype = input.scalar_type();
  RnnBackward p{};
  p.wide_cell = check_cell(c0, "c0", input, s);
  FMK_CHECK(check_cell(grad_c_n, "grad_c_n", input, s) == p.wide_cell,
            "grad_c_n: expected the dtype of c0");
  p.variant = variant_of(s, input, recurrent_mask, zoneout_h, zoneout_c, peephole, layer_norm,
                         activation, recurrent_activation, zoneout, norm_eps);
  const size_t expected = layer_norm ? 5 : 2;
  FMK_CHECK(saved.size() == expected, "saved: expected ", expected, " tensors, got ", saved.size());
  check_kept(saved[0], "saved gates", s.kept(4 * H), dtype);
  check_kept(saved[1], "saved cells", s.kept(H), state);
  p.gates = data_of(saved[0]);
  p.cells = data_of(saved[1]);
  if (layer_norm) {
    check_kept(saved[2], "saved norm of the input", s.kept(4 * H), dtype);
    check_kept(saved[3], "saved norm of the hidden state", s.kept(4 * H), dtype);
    check_kept(saved[4], "saved scales", s.kept(2), state);
    p.normed_ih = data_of(saved[2]);
    p.normed_hh = data_of(saved[3]);
    p.norm_scales = data_of(saved[4]);
  }
  check_parameter(grad_cells, "grad_cells", input, s.cell_states);
  p.grad_cells = data_of(grad_cells);
  p.grad_c_n = data_of(grad_c_n);
  p.c0 = data_of(c0);
  Tensor grad_c0 = allocate_if(need_hx, c0, s.cell);
  p.grad_c0 = mutable_data_if(need_hx, grad_c0);
  auto [grad_input, grad_h0, gradients] =
      run_backward(s, p, grad_output, grad_h_n, input, h0, weights, output, lengths, has_biases,
                   batch_first, need_input, need_hx, need_weights);
  return {grad_input, grad_h0, grad_c0, gradients};
}

std::tuple<Tensor, Tensor, Tensors> gru_backward(const Tensor& grad_output, const Tensor& grad_h_n,
                                                 const Tensor& input, const Tensor& h0,
                                                 Tensors weights, const Tensor& output,
                                                 const Tensor& gates, const OptionalTensor& lengths,
                                                 bool has_biases, bool batch_first, bool need_input,
                                                 bool need_hx, bool need_weights) {
  const Sequence s = check_sequence(RnnKind::kGru, input, h0, -1, lengths, batch_first);
  check_parameter(gates, "gates", input, s.kept(4 * s.shape.hidden_size));
  RnnBackward p{};
  p.gates = data_of(gates);
  return run_backward(s, p, grad_output, grad_h_n, input, h0, weights, output, lengths, has_biases,
                      batch_first, need_input, need_hx, need_weights);
}

std::tuple<Tensor, Tensor, Tensors> rnn_backward(
    const Tensor& grad_output, const Tensor& grad_h_n, const Tensor& input, const Tensor& h0,
    Tensors weights, const Tensor& output, const OptionalTensor& lengths, std::string nonlinearity,
    bool has_biases, bool batch_first, bool need_input, bool need_hx, bool need_weights) {
  const Sequence s = check_sequence(kind_from(nonlinearity), input, h0, -1, lengths, batch_first);
  RnnBackward p{};
  return run_backward(s, p, grad_output, grad_h_n, input, h0, weights, output, lengths, has_biases,
                      batch_first, need_input, need_hx, need_weights);
}

// --- packing ---

Tensor pack_weight(RnnKind kind, const Tensors& weights, int64_t directions, bool has_biases,
                   bool layer_norm) {
  FMK_CHECK(directions == 1 || directions == 2, "directions: expected 1 or 2, got ", directions);
  FMK_CHECK(weights.size() >= 2, "weights: expected w_ih and w_hh first");
  const size_t count = weights.size() / static_cast<size_t>(directions);
  FMK_CHECK(weights[0].dim() == 2 && weights[1].dim() == 2,
            "weights: expected matrices w_ih and w_hh first");
  const int64_t gates = kind == RnnKind::kLstm ? 4 : kind == RnnKind::kGru ? 3 : 1;
  RnnShape shape{};
  shape.kind = kind;
  shape.dtype = dtype_of(weights[0], "weights");
  shape.input_size = weights[0].size(1);
  shape.hidden_size = weights[0].size(0) / gates;
  shape.output_size = weights[1].size(1);
  shape.directions = directions;
  FMK_CHECK(shape.hidden_size > 0 && shape.output_size > 0, "weights: expected hidden features");
  LstmVariant variant;
  variant.layer_norm = layer_norm;
  // A peephole does not get packed, so nobody says whether there is one: it shows.
  variant.peephole = count == parameters_of(shape, has_biases, variant).size() + 1;
  const auto parameters = parameters_of(shape, has_biases, variant);
  check_weights(weights, weights[0], "the first weight", parameters, directions);
  RnnWeights filled[2]{};
  fill_weights(weights, parameters, filled);
  const RnnKernels& kernels = rnn_kernels();
  void* panels;
  Tensor packed = new_packed(weights[0], header_of(shape, has_biases, layer_norm),
                             kernels.packed_bytes(shape), &panels);
  kernels.pack_weight(shape, layer_norm, filled, panels, torch_pool());
  return packed;
}

Tensor lstm_pack_weight(Tensors weights, int64_t directions, bool has_biases, bool layer_norm) {
  return pack_weight(RnnKind::kLstm, weights, directions, has_biases, layer_norm);
}
Tensor gru_pack_weight(Tensors weights, int64_t directions, bool has_biases) {
  return pack_weight(RnnKind::kGru, weights, directions, has_biases, false);
}
Tensor rnn_pack_weight(Tensors weights, int64_t directions, bool has_biases) {
  return pack_weight(RnnKind::kTanh, weights, directions, has_biases, false);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CPU, m) {
  m.impl("lstm_forward", TORCH_BOX(&lstm_forward));
  m.impl("lstm_backward", TORCH_BOX(&lstm_backward));
  m.impl("lstm_pack_weight", TORCH_BOX(&lstm_pack_weight));
  m.impl("gru_forward", TORCH_BOX(&gru_forward));
  m.impl("gru_backward", TORCH_BOX(&gru_backward));
  m.impl("gru_pack_weight", TORCH_BOX(&gru_pack_weight));
  m.impl("rnn_forward", TORCH_BOX(&rnn_forward));
  m.impl("rnn_backward", TORCH_BOX(&rnn_backward));
  m.impl("rnn_pack_weight", TORCH_BOX(&rnn_pack_weight));
  m.impl("rnn_inference", TORCH_BOX(&rnn_inference));
  m.impl("rnn_step", TORCH_BOX(&rnn_step));
}

}  // namespace fmk::ops
