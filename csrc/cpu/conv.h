// Two-dimensional convolution with its epilogue, max pooling, and their gradients.
//
//   y = maxpool(activation(scale * (conv(x, w) + bias) + shift + residual))
//
// All tensors of a call share one storage type and one memory layout: NCHW or, with channels_last,
// NHWC, both dense. Vectors per channel are dense. Everything optional is null where it is not
// there. The caller allocates everything, and has checked shapes and sizes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/parallel.h"
#include "core/types.h"
#include "cpu/isa.h"

namespace fmk {

// How a convolution is computed, which is also how its weight is packed. The numbers are stored in
// packed weights.
enum class ConvAlgorithm : int32_t {
  kDirect = 0,     // implicit GEMM
  kWinograd4 = 1,  // F(4x4, 3x3)
};

struct ConvShape {
  DType dtype;
  bool channels_last;
  int64_t batch, channels, height, width;  // of the input; batch, height and width are 0 where the
                                           // input is not known yet (packing a weight)
  int64_t out_channels, groups;            // weight: [out_channels][channels / groups][kernel_h]
                                           // [kernel_w]
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  // padding: before the first row and column; what is padded after the
  // last shows in the output's size
  int64_t out_height, out_width;  // of the convolution, before pooling; 0 as above
};

// A pooling window, sliding over an image of the given size; kernel_h == 0: no pooling. Windows may
// overlap, leave gaps, and reach over the borders, where only what is inside counts: a window with
// nothing inside gives -infinity. At most 256 elements.
struct PoolShape {
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int64_t out_height, out_width;
};

// In an argmax: no element of the window gets a gradient. No position: a fused window holds at most
// 9 elements.
constexpr uint8_t kReluZero = 255;

struct ConvForward {
  ConvShape shape;
  PoolShape pool;           // dilation 1
  ConvAlgorithm algorithm;  // from choose_algorithm, or what packed_weight was packed for
  const void* input;
  const void* weight;
  const void* packed_weight;  // from pack_weight for `algorithm`, or null: packed by this call
  const void* bias;           // [out_channels]
  const void* scale;          // [out_channels] in the type that dtype is accumulated in (float, or
                              // double for itself), as shift
  const void* shift;
  const void* residual;  // shaped like the convolution's output
  Activation activation;
  void* output;         // pooled, if there is a pool
  void* preactivation;  // shaped like the convolution's output, or null: not wanted
  uint8_t* argmax;      // shaped like the pooled output, or null: not wanted. Position
                        // i * kernel_w + j in its window of the first maximum; NaN counts as
                        // larger. kReluZero where that maximum is a zero of relu
};

struct ConvBackward {
  ConvShape shape;
  PoolShape pool;
  bool exact;               // no Winograd
  const void* grad_output;  // shaped like the forward's output
  const void* input;        // read for grad_weight
  const void* weight;       // read for grad_input
  const void* bias;         // as in the forward; read for grad_scale
  const void* scale;        // as in the forward
  const void* saved;        // what the activation's derivative is computed from: the
                            // pre-activation, or for relu the forward's output; null for a pooled
                            // relu, whose argmax tells it
  const uint8_t* argmax;    // from the forward, if there is a pool
  Activation activation;
  void* grad_preactivation;  // shaped like the convolution's output: work space, and the gradient
                             // of the residual; null if there is neither activation nor pool:
                             // grad_output is used
  void* grad_input;          // results from here on, each may be null
  void* grad_weight;
  void* grad_bias;
  void* grad_scale;  // as scale and shift
  void* grad_shift;
};

struct MaxPool {
  DType dtype;
  bool channels_last;
  int64_t batch, channels, height, width;  // of the input
  PoolShape pool;
};

struct ConvKernels {
  // The algorithm for a problem; kDirect if `exact`. Sizes of the input may be unknown.
  ConvAlgorithm (*choose_algorithm)(const ConvShape&, bool exact);
  // Bytes of the packed weight, and the packing itself, for an algorithm that choose_algorithm
  // returns for this shape. Neither depends on batch, height, width and the layout.
  size_t (*packed_bytes)(const ConvShape&, ConvAlgorithm);
  void (*pack_weight)(const ConvShape&, ConvAlgorithm, const void* weight, void* packed,
                      const Parallel&);
  void (*forward)(const ConvForward&, const Parallel&);
  void (*backward)(const ConvBackward&, const Parallel&);
  void (*max_pool_forward)(const MaxPool&, const void* input, void* output, uint8_t* argmax,
                           const Parallel&);
  // grad_input is written everywhere; contributions of overlapping windows are added in float
  // (double for double).
  void (*max_pool_backward)(const MaxPool&, const void* grad_output, const uint8_t* argmax,
                            void* grad_input, const Parallel&);
};

FMK_KERNEL_TABLE(ConvKernels, conv_kernels)

}  // namespace fmk
