// 1x1 convolutions of NCHW images as they lie: per image a GEMM of the weight, in place, with the
// planes of the input. Nothing is turned, and the weight needs no packing.
#pragma once

#include "cpu/conv_internal.h"

namespace fmk::FMK_ISA {

// output[k][pixel] = activation(scale[k] * (sum over c of weight[k][c] input[c][pixel]) + shift[k]
// + residual[k][pixel]); the nulls of Correlation.
template <class T>
struct Pointwise {
  int64_t batch, channels, out_channels, pixels;
  const T* input;
  const T* weight;
  const Acc<T>* scale;
  const Acc<T>* shift;
  const T* residual;
  Activation activation;
  T* output;
  T* preactivation;
  ChannelMoments<T> moments;
};

// A panel of the input should stay in L2.
constexpr int64_t kMaxPointwiseChannels = 2048;
// Whether the shape has the form, for a type whose weight the micro-kernel reads in place.
template <class T>
FMK_INLINE bool is_pointwise(const ConvShape& s, const PoolShape& pool) {
  const bool plain = s.kernel_h == 1 && s.kernel_w == 1 && s.stride_h == 1 && s.stride_w == 1 &&
                     s.out_height == s.height && s.out_width == s.width && s.padding_h == 0 &&
                     s.padding_w == 0;
  return kFusedEpilogue<T> && !s.channels_last && plain && s.groups == 1 && pool.kernel_h == 0 &&
         s.channels % Mac<T>::kPair == 0 && s.channels <= kMaxPointwiseChannels;
}
template <class T>
void correlate_pointwise(const Pointwise<T>&, const Parallel&);

}  // namespace fmk::FMK_ISA
