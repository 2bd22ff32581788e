// Convolution with its epilogue, transposed convolution, pooling, and their gradients.
//
//   y = pool(activation(scale * (conv(x, w) + bias) + shift + residual))
//
// All tensors of a call share one storage type and one memory layout: NC[D]HW or, with
// channels_last, N[D]HWC, both dense. Vectors per channel are dense. Everything optional is null
// where it is not there. The caller allocates everything, and has checked shapes and sizes.
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

// Strides of a fused pool up to which a weight packed for Winograd is used; beyond, a call packs
// the weight itself.
constexpr int64_t kWinogradMaxPoolStride = 4;

// What lies around an image: zeros, or the image continued.
enum class PaddingMode : uint8_t { kZeros, kReflect, kReplicate, kCircular };

// Images have up to three axes; those in front that a convolution lacks have size, kernel and
// stride
// 1. `transposed`: what is computed is the adjoint of the convolution described here: it takes an
// image shaped like the convolution's output, of out_channels, to one shaped like its input.
struct ConvShape {
  DType dtype;
  bool channels_last;
  bool transposed;
  PaddingMode padding_mode;
  int32_t axes;
  int64_t batch, channels, height, width;  // of the input; batch, height and width are 0 where the
                                           // input is not known yet (packing a weight)
  int64_t depth;
  int64_t out_channels, groups;  // weight: [out_channels][channels / groups][kernel_d][kernel_h]
                                 // [kernel_w]
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int64_t kernel_d, stride_d, padding_d, dilation_d;
  // Paddings are those before the first position; what is padded after the last shows in the size
  // of the output.
  int64_t out_height, out_width;  // of the convolution, before pooling; 0 as above
  int64_t out_depth;

  int64_t taps() const { return kernel_d * kernel_h * kernel_w; }
  int64_t pixels() const { return depth * height * width; }
  int64_t out_pixels() const { return out_depth * out_height * out_width; }
};

enum class PoolKind : uint8_t { kMax, kAverage };

// A pooling window, sliding over an image of the given size; kernel_h == 0: no pooling. Windows may
// overlap, leave gaps, and reach over the borders, where only what is inside counts: a window with
// nothing inside gives -infinity. At most 256 elements.
struct PoolShape {
  PoolKind kind;
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int64_t out_height, out_width;
  // Of an average: whether what lies in the padding counts among the elements that a sum is divided
  // by; and what it is divided by instead, unless that is 0.
  bool count_padding;
  int64_t divisor;
};

// In an argmax: no element of the window gets a gradient. No position: a fused window holds at most
// 9 elements.
constexpr uint8_t kReluZero = 255;

// input, bias, output and the rest are those of what is computed: of a transposed convolution, the
// input is shaped like the shape's output, and bias, scale and shift have shape.channels elements.
struct ConvForward {
  ConvShape shape;
  PoolShape pool;           // dilation 1
  ConvAlgorithm algorithm;  // from choose_algorithm, or what packed_weight was packed for
  bool turns;  // the input's layout is the other one, shape.channels_last says the output's; not
               // transposed
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
  uint8_t* argmax;      // or null: not wanted. Of a max-pool, shaped like its output: position
                        // i * kernel_w + j in its window of the first maximum; NaN counts as
                        // larger. kReluZero where that maximum is a zero of relu. Of an average
                        // after relu, shaped like the convolution's output: 1 where relu let the
                        // value through, else 0; rows under no window hold that or 0
  // Mean and biased variance per channel of the output as it is stored, over batch and pixels:
  // [out_channels] as scale, or both null: not wanted. Without pool, and not transposed. Work space
  // for them: 3 * out_channels numbers per thread.
  void* mean;
  void* variance;
  double* moments;
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

struct Pooling {
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
  // Of convolutions without anything that only training wants, each reading nothing but the output
  // of the one before and, but for the last, without residual: how many from the first on are
  // better computed together, in bands of rows, than as whole images; 1 if none.
  int64_t (*banded_layers)(const ConvForward*, int64_t count);
  // These together. What lies between them is null.
  void (*banded_forward)(const ConvForward*, int64_t count, const Parallel&);
  void (*backward)(const ConvBackward&, const Parallel&);
  void (*max_pool_forward)(const Pooling&, const void* input, void* output, uint8_t* argmax,
                           const Parallel&);
  // grad_input is written everywhere; contributions of overlapping windows are added in float
  // (double for double).
  void (*max_pool_backward)(const Pooling&, const void* grad_output, const uint8_t* argmax,
                            void* grad_input, const Parallel&);
  void (*avg_pool_forward)(const Pooling&, const void* input, void* output, const Parallel&);
  void (*avg_pool_backward)(const Pooling&, const void* grad_output, void* grad_input,
                            const Parallel&);
};

FMK_KERNEL_TABLE(ConvKernels, conv_kernels)

}  // namespace fmk
