// What the convolution's source files share: one correlation kernel serves the forward pass and the
// gradient of the input.
#pragma once

#include "cpu/conv.h"
#include "cpu/gemm.h"

namespace fmk::FMK_ISA {

// One axis of a correlation: out[o] = sum over t < taps of w[t] in[o * stride + offset + t * step],
// `in` being zero outside [0, in_size).
struct Axis {
  int64_t in_size, out_size, taps, stride, offset, step;
  int64_t position(int64_t out, int64_t tap) const { return out * stride + offset + tap * step; }
  // Elements of `in` under the windows, from the first tap of the first to the last of the last.
  int64_t span() const {
    return out_size == 0 || taps == 0 ? 0 : (out_size - 1) * stride + (taps - 1) * step + 1;
  }
};

// Output o of an axis is stored at first + o * step of an image of `size`: the gradient of a
// strided convolution's input is computed one residue class at a time.
struct Placement {
  int64_t size, first, step;
};

// out = maxpool(activation(scale * correlation(input, weight) + shift + residual)); see conv.h for
// layouts and nulls.
template <class T>
struct Correlation {
  bool channels_last;
  int64_t batch, groups, channels, out_channels;  // channels per group
  Axis y, x;
  Placement place_y, place_x;  // pool, residual and preactivation want the whole image
  const T* input;
  const void* weight;   // from pack_correlation_weight
  const Acc<T>* shift;  // [groups * out_channels] and kVectorSlack more
  const Acc<T>* scale;  // the same; null unless shift is there, too
  const T* residual;
  Activation activation;
  T* output;
  T* preactivation;
  PoolShape pool;  // kernel_h == 0: none
  uint8_t* argmax;
};
// Vectors per channel are read in whole vectors from any channel on.
template <class T>
constexpr int64_t kVectorSlack = kPanelVecs * Vec<T>::W;

// A weight as the correlation wants it: element (column, reduction, tap) of a group at data +
// group * group_stride + column * column_stride + reduction * reduction_stride + tap_y * kernel_w +
// tap_x, where the i-th tap of an axis is tap first + i * step (step may be negative).
struct TapRange {
  int64_t first, step, count;
};
template <class T>
struct WeightView {
  const T* data;
  int64_t groups, columns, reduction;  // per group
  int64_t group_stride, column_stride, reduction_stride, kernel_w;
  TapRange y, x;
  const Acc<T>* reduction_scale;  // factor per (group, reduction), or null

  // One input and one output channel per group: computed channel by channel instead of as a GEMM.
  bool depthwise() const { return columns == 1 && reduction == 1 && groups > 1; }
};
// Packed: [group][panel][tap_y][tap_x][words of the reduction][width], depthwise
// [tap_y][tap_x][groups] in the compute type, padded to whole vectors.
template <class T>
size_t packed_correlation_bytes(const WeightView<T>&);
template <class T>
void pack_correlation_weight(const WeightView<T>&, void* packed, const Parallel&);
template <class T>
void correlate(const Correlation<T>&, const Parallel&);

// grad_weight[k][c][tap] = scale[k] * sum over pixels of grad[pixel][k] * input[pixel + tap][c],
// and the sums of grad per channel k. Results may be null.
template <class T>
struct WeightGradient {
  bool channels_last;
  int64_t batch, groups, channels, out_channels;  // channels per group
  Axis y, x;
  const T* input;
  const T* grad;
  const Acc<T>* scale;
  T* grad_weight;
  Acc<T>* grad_shift;  // sum of grad
  T* grad_bias;        // scale * sum of grad
};
template <class T>
void weight_gradient(const WeightGradient<T>&, const Parallel&);

// The entries of the kernel table.
void conv_backward(const ConvBackward&, const Parallel&);
void max_pool_forward(const MaxPool&, const void* input, void* output, uint8_t* argmax,
                      const Parallel&);
void max_pool_backward(const MaxPool&, const void* grad_output, const uint8_t* argmax,
                       void* grad_input, const Parallel&);

}  // namespace fmk::FMK_ISA
