// What follows a convolution in training: batch or group norm, residual, activation and pooling.
//
//   y = pool(activation(weight * (x - mean) / sqrt(variance + eps) + bias + residual))
//
// Images are NC[D]HW or, with channels_last, N[D]HWC, dense, of one storage type; everything per
// channel is of the type that it is accumulated in. What is null is not there, or not wanted.
#pragma once

#include "cpu/conv.h"

namespace fmk {

struct ChannelNorm {
  DType dtype;
  bool channels_last;
  int64_t batch, channels, height, width;  // height counts the rows of all planes
  int64_t groups;                          // 0: one mean and variance per channel of the batch,
                                           // else one per image and group
  double eps;
  Activation activation;
  PoolShape pool;  // kernel_h == 0: none

  int64_t statistics() const { return groups ? batch * groups : channels; }
};

struct ChannelNormForward {
  ChannelNorm norm;
  const void* input;
  const void* weight;  // [channels]
  const void* bias;
  const void* residual;
  void* output;
  void* mean;  // [statistics()]
  void* variance;
  bool given;       // mean and variance are there already: they are read
  uint8_t* argmax;  // as in conv.h, without kReluZero
};

struct ChannelNormBackward {
  ChannelNorm norm;
  const void* grad_output;
  const void* input;
  const void* weight;
  const void* bias;
  const void* residual;  // read if there is an activation
  const void* mean;
  const void* variance;
  const uint8_t* argmax;
  void* grad_preactivation;  // shaped like the input: the residual's gradient, and work space; may
                             // be grad_input, if the residual's gradient is not wanted
  void* grad_input;
  void* grad_weight;
  void* grad_bias;
};

struct ChannelNormKernels {
  void (*forward)(const ChannelNormForward&, const Parallel&);
  void (*backward)(const ChannelNormBackward&, const Parallel&);
};

FMK_KERNEL_TABLE(ChannelNormKernels, channel_norm_kernels)

}  // namespace fmk
