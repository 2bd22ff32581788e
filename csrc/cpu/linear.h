// Fully connected layer: out = activation(x w^T + bias + residual), and its gradients.
//
// Buffers are row-major and contiguous, of one storage type; null where not wanted. The caller
// allocates everything. Where weight_transposed, weight and grad_weight are [in_features]
// [out_features].
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/parallel.h"
#include "core/types.h"
#include "cpu/isa.h"

namespace fmk {

struct LinearForward {
  DType dtype;
  int64_t rows, in_features, out_features;
  bool weight_transposed;
  const void* input;          // [rows][in_features]
  const void* weight;         // [out_features][in_features]
  const void* packed_weight;  // from pack_weight, or null: packed on the fly by the threads
  const void* bias;           // [out_features] or null
  const void* residual;       // [rows][out_features] or null
  Activation activation;
  void* output;         // [rows][out_features]
  void* preactivation;  // [rows][out_features] or null
};

struct LinearBackward {
  DType dtype;
  int64_t rows, in_features, out_features;
  bool weight_transposed;
  const void* grad_output;  // [rows][out_features]
  const void* input;        // [rows][in_features], read for grad_weight
  const void* weight;       // [out_features][in_features], read for grad_input
  const void* saved;  // what the activation's derivative is computed from: the pre-activation, or
                      // for relu the output; null if there is no activation
  Activation activation;
  void*
      grad_preactivation;  // [rows][out_features] work space and result (it is also the gradient of
                           // the residual); null if there is no activation: grad_output is used
  void* grad_input;        // [rows][in_features] or null
  void* grad_weight;       // [out_features][in_features] or null
  void* grad_bias;         // [out_features] or null
};

struct LinearKernels {
  void (*forward)(const LinearForward&, const Parallel&);
  void (*backward)(const LinearBackward&, const Parallel&);
  // Bytes of the packed weight, and the packing itself: [panel][words][width], see pack.h.
  size_t (*packed_bytes)(DType, int64_t out_features, int64_t in_features);
  void (*pack_weight)(DType, const void* weight, bool transposed, int64_t out_features,
                      int64_t in_features, void* packed, const Parallel&);
};

FMK_KERNEL_TABLE(LinearKernels, linear_kernels)

}  // namespace fmk
