// The feed-forward block of a Transformer and its gradients:
//
//   hidden = dropout(activation(x w1^T + b1))                              plain
//   hidden = dropout(activation(x gate_w^T + gate_b) * (x w1^T + b1))      gated
//   out    = hidden w2^T + b2 + residual
//
// Buffers are row-major and contiguous, of one storage type; null where not wanted. The caller
// allocates everything.
#pragma once

#include <cstddef>

#include "core/parallel.h"
#include "core/types.h"
#include "cpu/isa.h"

namespace fmk {

struct FeedForwardShape {
  DType dtype;
  int64_t rows, in_features, hidden_features, out_features;
  bool gated;
  Activation activation;
  Dropout dropout;
};

struct FeedForwardForward {
  FeedForwardShape shape;
  const void* input;                            // [rows][in]
  const void *weight1, *bias1;                  // [hidden][in], [hidden] or null
  const void *gate_weight, *gate_bias;          // the same; null if plain
  const void *weight2, *bias2;                  // [out][hidden], [out] or null
  const void* residual;                         // [rows][out] or null
  const void *packed_weight1, *packed_weight2;  // from pack_weight, or null
  void* output;                                 // [rows][out]
  void* hidden;                                 // [rows][hidden]
  void *preactivation, *gate_preactivation;     // the same, or null: x w1^T + b1, x gate_w^T + ...
};

struct FeedForwardBackward {
  FeedForwardShape shape;
  const void* grad_output;  // [rows][out]
  const void* input;
  const void *weight1, *gate_weight, *weight2;
  const void *hidden, *preactivation, *gate_preactivation;  // as the forward kept them; where the
                                                            // block is plain and its activation
                                                            // relu or none, hidden alone is read
  void *grad_hidden, *grad_gate;  // [rows][hidden] work space: the gradients of the preactivations;
                                  // grad_gate is null if plain
  void* grad_input;               // the rest null where not wanted
  void *grad_weight1, *grad_bias1, *grad_gate_weight, *grad_gate_bias, *grad_weight2, *grad_bias2;
};

struct FeedForwardKernels {
  void (*forward)(const FeedForwardForward&, const Parallel&);
  void (*backward)(const FeedForwardBackward&, const Parallel&);
  // The weights of a gated block packed side by side: bytes, and the packing itself.
  size_t (*packed_bytes)(DType, int64_t hidden_features, int64_t in_features);
  void (*pack_weight)(DType, const void* weight1, const void* gate_weight, int64_t hidden_features,
                      int64_t in_features, void* packed, const Parallel&);
};

FMK_KERNEL_TABLE(FeedForwardKernels, feed_forward_kernels)

}  // namespace fmk
