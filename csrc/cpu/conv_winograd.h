// Winograd F(4x4, 3x3) for correlations with 3 x 3 taps, stride 1 and dilation 1: 36 products
// instead of 144 for sixteen outputs. Computed in float whatever the storage type; the error is a
// few 1e-6 of the largest output (csrc/cpu/winograd_transforms.h), and a NaN or an infinity spreads
// over the tile that holds it.
#pragma once

#include "cpu/conv_internal.h"

namespace fmk::FMK_ISA {

// Whether a 3 x 3 correlation is expected to be faster this way: the transforms cost in proportion
// to C + K, the products that they save in proportion to C * K.
FMK_INLINE bool winograd_pays(int64_t channels, int64_t out_channels) {
  return channels >= 32 && out_channels >= 32 && channels % 16 == 0;
}
// Strides up to this of a fused pool are supported.
constexpr int64_t kWinogradMaxPoolStride = 4;

// Packed: [panel][point][channels][width] floats.
template <class T>
size_t packed_winograd_bytes(const WeightView<T>&);
template <class T>
void pack_winograd_weight(const WeightView<T>&, void* packed, const Parallel&);
// As correlate(), with a weight from pack_winograd_weight; one group, outputs side by side (place
// steps of 1).
template <class T>
void correlate_winograd(const Correlation<T>&, const Parallel&);

}  // namespace fmk::FMK_ISA
