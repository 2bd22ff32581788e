// Correlations of one input that are written to one output, each to places of its own.
#pragma once

#include "cpu/conv_internal.h"

namespace fmk::FMK_ISA {

constexpr int64_t kMostParts = 16;

// correlate() of all `count` <= kMostParts of them, in one parallel region where that is possible:
// threads wait for one another once, and what a block of rows reads is there for all parts.
template <class T>
void correlate_parts(const Correlation<T>* parts, int64_t count, const Parallel&);

}  // namespace fmk::FMK_ISA
