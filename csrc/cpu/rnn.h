// One recurrent layer over a whole sequence, in one or two directions, and its gradients: LSTM with
// its variants, GRU, and the plain RNN. fmkernels/ops/rnn/reference has the equations.
//
// T steps, B batch rows, I input features, H hidden features, P features of the hidden state (H
// unless an LSTM projects it), G gates (LSTM 4: i, f, g, o; GRU 3: r, z, n; RNN 1), D directions
// (the second runs backwards in time). All buffers hold `dtype` unless said otherwise and belong to
// the caller. States are float (double for kF64); h is rounded to the dtype at each step.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/parallel.h"
#include "core/types.h"
#include "cpu/isa.h"

namespace fmk {

// Elements of a (T, B, features) tensor: step t of row b starts at t * step + b * row.
struct SequenceStrides {
  int64_t step, row;
};

enum class RnnKind : uint8_t { kLstm, kGru, kTanh, kRelu };
// In the order of LSTM_ACTIVATIONS in fmkernels/ops/rnn/schema.py.
enum class GateActivation : uint8_t { kTanh, kSigmoid, kRelu, kHardSigmoid, kIdentity };

struct RnnShape {
  DType dtype;
  RnnKind kind;
  int64_t steps, batch, input_size, hidden_size, output_size, directions;  // output_size: P
};

// How an LSTM differs from the plain one; other kinds leave it as it is.
struct LstmVariant {
  GateActivation activation = GateActivation::kTanh;
  GateActivation recurrent_activation = GateActivation::kSigmoid;
  bool peephole = false, layer_norm = false;
  double zoneout = 0, norm_eps = 0;
  const void* recurrent_mask = nullptr;  // [D][B][P] or null
  const bool* zoneout_h = nullptr;       // [D][T][B][P] or null: `zoneout` of the old value stays
  const bool* zoneout_c = nullptr;       // [D][T][B][H], as zoneout_h
};

// The parameters of one direction, contiguous; null where the layer has no such parameter.
struct RnnWeights {
  const void *w_ih, *w_hh;        // [G * H][I], [G * H][P]
  const void *b_ih, *b_hh;        // [G * H], both or none
  const void* w_hr;               // [P][H]
  const void* peephole;           // [3][H]
  const void *norm_ih, *norm_hh;  // [4H]
  const void *norm_c, *bias_c;    // [H]
};
// Gradients are written, not accumulated; null where not wanted.
struct RnnWeightGrads {
  void *w_ih, *w_hh, *b_ih, *b_hh, *w_hr, *peephole, *norm_ih, *norm_hh, *norm_c, *bias_c;
};

struct RnnForward {
  RnnShape shape;
  bool cell;  // a step by itself, not the first of a sequence: its sums may be in another order
  LstmVariant variant;
  const int64_t* lengths;  // [B], each in [0, T]; null: all T
  const void* input;       // rows of I, anywhere
  SequenceStrides input_strides;
  const void* h0;   // [D][B][P]
  const void* c0;   // [D][B][H]
  bool wide_cell;   // c0 and c_n are float though the dtype is not
  bool zero_state;  // of a cell: h0 and c0 hold zeros, so that products with h0 may be left out
  RnnWeights weights[2];
  const void* packed_weight;  // from pack_weight, or null: packed by this call
  void* output;               // rows of D * P
  SequenceStrides output_strides;
  void* h_n;          // [D][B][P]
  void* c_n;          // [D][B][H]
  void* cell_states;  // [T][B][D * H] ([B][T][D * H] where the output is), or null
  SequenceStrides cell_strides;
  // For the backward pass, or null:
  void* gates;                  // [D][T][B][4H]: LSTM i, f, g, o; GRU r, z, n, W_hn h + b_hn
  void* cells;                  // LSTM: [D][T][B][H], in the states' type
  void *normed_ih, *normed_hh;  // layer norm: [D][T][B][4H]
  void* norm_scales;            // layer norm: [D][T][B][2], in the states' type
};

struct RnnBackward {
  RnnShape shape;
  LstmVariant variant;
  bool batch_first;  // whether input, output and their gradients are (B, T, ...) or (T, B, ...)
  const int64_t* lengths;
  const void* grad_output;  // [T][B][D * P] ([B][T][D * P])
  const void* grad_h_n;     // [D][B][P]
  const void* grad_c_n;     // [D][B][H]
  const void* grad_cells;   // as cell_states, or null
  const void* input;        // rows of I, anywhere
  SequenceStrides input_strides;
  const void* h0;  // [D][B][P]
  const void* c0;  // [D][B][H]
  bool wide_cell;  // c0, grad_c_n and grad_c0 are float though the dtype is not
  RnnWeights weights[2];
  const void* output;  // [T][B][D * P] ([B][T][D * P])
  // As the forward pass left them:
  const void *gates, *cells, *normed_ih, *normed_hh, *norm_scales;
  void* workspace;   // backward_workspace(...) bytes, aligned to 64
  void* grad_input;  // [T][B][I] ([B][T][I]) or null
  void* grad_h0;     // [D][B][P] or null
  void* grad_c0;     // [D][B][H] or null
  RnnWeightGrads grad_weights[2];
};

struct RnnKernels {
  void (*forward)(const RnnForward&, const Parallel&);
  void (*backward)(const RnnBackward&, const Parallel&);
  // Bytes of work space that backward wants for this problem; reads no buffer, only which are null.
  size_t (*backward_workspace)(const RnnBackward&);
  // Bytes of the packed weights of all directions (steps and batch do not matter), and the packing.
  size_t (*packed_bytes)(const RnnShape&);
  // With layer norm the biases stay out of the packed weights.
  void (*pack_weight)(const RnnShape&, bool layer_norm, const RnnWeights* weights, void* packed,
                      const Parallel&);
};

FMK_KERNEL_TABLE(RnnKernels, rnn_kernels)

}  // namespace fmk
