// 1x1 convolutions of stride 1 over NHWC images, which are plain products of matrices.
#pragma once

#include "cpu/conv_internal.h"

namespace fmk::FMK_ISA {

// As correlate(), with the same packed weight. False, with nothing done, for what is no plain
// product (other kernels, strides, padding, pools, layouts; batch statistics, which are gathered
// of blocks), for types that are staged, for few pixels, where the weight is what is read, and for
// wide outputs in float.
template <class T>
bool correlate_dense(const Correlation<T>&, const Parallel&);

}  // namespace fmk::FMK_ISA
