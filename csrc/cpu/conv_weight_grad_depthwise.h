// The gradient of a depthwise convolution's weight, of NHWC images as they lie.
#pragma once

#include "cpu/conv_internal.h"

namespace fmk::FMK_ISA {

// As weight_gradient(). False, with nothing done, for what it does not cover: other layouts and
// kernels than 3x3, strides above 2, dilated rows, padding other than zeros, channels that do not
// fill whole vectors, and where no gradient of the weight is wanted. Not for double.
template <class T>
bool depthwise_weight_gradient(const WeightGradient<T>&, const Parallel&);

}  // namespace fmk::FMK_ISA
