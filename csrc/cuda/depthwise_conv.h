// Depthwise convolution, one or two spatial axes (one: height 1), contiguous images:
//
//   y[n, c] = activation(bias[c] + sum over i, j of w[c, i, j] x[n, c / M, y sh + i dh - ph, ...])
//
// with M outputs per input channel. A causal convolution pads by its whole reach on the left alone;
// `state` then holds what came before the first column. All tensors are contiguous and of one
// dtype.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/types.h"
#include "cuda/device.h"

namespace fmk::cuda {

struct DepthwiseShape {
  DType dtype;              // not kF64
  int64_t batch, channels;  // channels of the output
  int multiplier;           // M
  int input_h, input_w, output_h, output_w;
  int kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w;
  int padding_h, padding_w;  // before the first row and column; what lies after is implied
  int state_w;               // columns of the state, 0 for none; at most padding_w
};

struct DepthwiseForward {
  DepthwiseShape shape;
  Activation activation;
  const void* input;    // (N, C / M, H, W)
  const void* state;    // (N, C / M, H, state_w) or null
  const void* weight;   // (C, KH, KW)
  const void* bias;     // (C) or null
  void* output;         // (N, C, OH, OW)
  void* preactivation;  // the same or null: not saved
};

struct DepthwiseBackward {
  DepthwiseShape shape;
  Activation activation;
  const void* grad_output;  // (N, C, OH, OW)
  // Where the activation's derivative is taken: the pre-activation, or the output of a relu; null
  // without an activation.
  const void* saved;
  const void* input;
  const void* state;
  const void* weight;
  void* grad_input;   // null: not wanted
  void* grad_state;   // null: not wanted
  void* grad_weight;  // null: not wanted, and no grad_bias either
  void* grad_bias;    // null: not wanted
  // Scratch for grad_weight: depthwise_partials() floats.
  float* partials;
  int splits;
};

// Blocks that share one channel's weight gradient: enough to fill the device. Their sums are added
// in a fixed order, so that the result is the same in each run.
int depthwise_splits(const DepthwiseShape& shape, const DeviceLimits& limits);
inline int64_t depthwise_partials(const DepthwiseShape& shape, int splits) {
  return int64_t{splits} * shape.channels * (int64_t{shape.kernel_h} * shape.kernel_w + 1);
}

// Empty, or why the kernels do not take this convolution.
const char* depthwise_problem(const DepthwiseShape& shape, const DeviceLimits& limits);

// Throw Error if a launch fails.
void depthwise_forward(const DepthwiseForward& problem, Stream stream);
void depthwise_backward(const DepthwiseBackward& problem, Stream stream);

}  // namespace fmk::cuda
