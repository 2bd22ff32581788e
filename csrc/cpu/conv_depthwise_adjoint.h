// The gradient of the input of a depthwise convolution of stride 2, NHWC, in one pass.
#pragma once

#include "cpu/conv_internal.h"

namespace fmk::FMK_ISA {

// grad_input from the gradient of the output and the weight as the adjoint reads it. False, with
// nothing done, for what it does not cover: other layouts, kernels than 3x3 and strides than 2,
// dilation, padding other than zeros, depth, and fewer channels than a vector has. Not for double.
// May use Scratch::kCall.
template <class T>
bool depthwise_adjoint(const ConvShape&, const WeightView<T>&, const T* grad, T* grad_input,
                       const Parallel&);

}  // namespace fmk::FMK_ISA
