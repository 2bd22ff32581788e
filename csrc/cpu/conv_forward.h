// The forward pass in parts, for whole images and for bands of them.
#pragma once

#include "cpu/conv_internal.h"

namespace fmk::FMK_ISA {

// Whole images, by whichever algorithm.
void conv_forward(const ConvForward&, const Parallel&);

// How a call is computed, and the weight packed for that, or null: there is none yet.
struct ReadWeight {
  ConvAlgorithm algorithm;
  const void* packed;
};
ReadWeight weight_read_by(const ConvForward&);

// The correlation that a call comes to, read as a direct sum, but for its moments; a transposed one
// is its adjoint. `room`: work space of affine_numbers(p) numbers that the result refers to.
template <class T>
Correlation<T> correlation_of(const ConvForward& p, const void* weight, Acc<T>* room);

FMK_INLINE int64_t output_channels(const ConvShape& s) {
  return s.transposed ? s.channels : s.out_channels;
}
template <class T>
FMK_INLINE int64_t affine_numbers(const ConvForward& p) {
  return 3 * (output_channels(p.shape) + kVectorSlack<T>);
}

// conv_bands.cpp
int64_t banded_layers(const ConvForward*, int64_t count);
void banded_forward(const ConvForward*, int64_t count, const Parallel&);

}  // namespace fmk::FMK_ISA
