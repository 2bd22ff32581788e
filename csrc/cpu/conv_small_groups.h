// Correlations of groups of few channels, depthwise among them, for both layouts as they lie: as a
// GEMM such a group would fill a part of a vector only. And of NCHW images of few channels, which
// as a GEMM would be turned on the way in and out.
#pragma once

#include "cpu/conv_internal.h"

namespace fmk::FMK_ISA {

// As correlate(), with the same packed weight. False, with nothing done, for what it does not
// cover: groups of more than 8 channels, one group unless it is of at most 4 channels, at least 8
// outputs, NCHW and not double, with rows of at least a vector; pooling, strides above 2, outputs
// that do not lie side by side (the gradient of a strided input); and in NHWC fewer channels than a
// vector has, dilated rows, filters of other widths than 3, 5 and 7 (3 alone, if groups have
// several channels), and groups whose inputs and outputs differ in number or do not divide a
// vector; where words are pairs, one group, too.
template <class T>
bool correlate_small_groups(const Correlation<T>&, const Parallel&);

}  // namespace fmk::FMK_ISA
