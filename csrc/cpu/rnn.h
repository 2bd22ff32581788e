// One LSTM layer over a whole sequence, in one or two directions, and its gradients.
//
//   i, f, o = sigmoid(W_ih x + b_ih + W_hh h + b_hh)    g = tanh(same)
//   c' = f * c + i * g                                  h' = o * tanh(c')
//
// T steps, B batch rows, I input features, H hidden features, D directions (the second runs
// backwards in time). Gates are stacked in the order i, f, g, o. All buffers hold `dtype` and
// belong to the caller; c is carried in float (double for kF64) whatever the dtype, h is rounded to
// the dtype at each step.
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

struct LstmShape {
  DType dtype;
  int64_t steps, batch, input_size, hidden_size, directions;
};

// The parameters of one direction, contiguous.
struct LstmWeights {
  const void* w_ih;  // [4H][I]
  const void* w_hh;  // [4H][H]
  const void* b_ih;  // [4H] or null
  const void* b_hh;  // [4H] or null, as b_ih
};

struct LstmForward {
  LstmShape shape;
  const void* input;  // rows of I, anywhere
  SequenceStrides input_strides;
  const void* h0;  // [D][B][H]
  const void* c0;  // [D][B][H]
  LstmWeights weights[2];
  const void* packed_weight;  // from pack_weight, or null: packed by this call
  void* output;               // rows of D * H
  SequenceStrides output_strides;
  void* h_n;    // [D][B][H]
  void* c_n;    // [D][B][H]
  void* gates;  // [D][T][B][4H] activated gates for the backward pass, or null
  void* cells;  // [D][T][B][H] cell states, float (double for kF64); null if gates is
};

// Gradients are written, not accumulated; null where not wanted.
struct LstmWeightGrads {
  void* w_ih;  // [4H][I]
  void* w_hh;  // [4H][H]
  void* b_ih;  // [4H]
  void* b_hh;  // [4H]
};

struct LstmBackward {
  LstmShape shape;
  bool batch_first;  // whether input, output and their gradients are (B, T, ...) or (T, B, ...)
  const void* grad_output;  // [T][B][D * H] ([B][T][D * H])
  const void* grad_h_n;     // [D][B][H]
  const void* grad_c_n;     // [D][B][H]
  const void* input;        // rows of I, anywhere
  SequenceStrides input_strides;
  const void* h0;  // [D][B][H]
  const void* c0;  // [D][B][H]
  LstmWeights weights[2];
  const void* output;  // [T][B][D * H] ([B][T][D * H])
  const void* gates;   // as the forward pass left them
  const void* cells;
  void* workspace;   // lstm_backward_workspace(...) bytes, aligned to 64
  void* grad_input;  // [T][B][I] ([B][T][I]) or null
  void* grad_h0;     // [D][B][H] or null
  void* grad_c0;     // [D][B][H] or null
  LstmWeightGrads grad_weights[2];
};

struct RnnKernels {
  void (*lstm_forward)(const LstmForward&, const Parallel&);
  void (*lstm_backward)(const LstmBackward&, const Parallel&);
  // Bytes of work space that lstm_backward wants for this problem; reads no buffer, only which are
  // null.
  size_t (*lstm_backward_workspace)(const LstmBackward&);
  // Bytes of the packed weights of all directions (steps and batch do not matter), and the packing.
  size_t (*lstm_packed_bytes)(const LstmShape&);
  void (*lstm_pack_weight)(const LstmShape&, const LstmWeights* weights, void* packed,
                           const Parallel&);
};

FMK_KERNEL_TABLE(RnnKernels, rnn_kernels)

}  // namespace fmk
