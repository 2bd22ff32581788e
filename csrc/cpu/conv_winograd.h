// Winograd F(4x4, 3x3) for correlations with 3 x 3 taps, stride 1 and dilation 1: 36 products
// instead of 144 for sixteen outputs. With several taps along the depth, the products of the planes
// under them are added up before they are transformed back. Computed in float whatever the storage
// type; the error is a few 1e-6 of the largest output (csrc/cpu/winograd_transforms.h), and a NaN
// or an infinity spreads over the tile that holds it.
#pragma once

#include "cpu/conv_internal.h"

namespace fmk::FMK_ISA {

FMK_INLINE int64_t winograd_tiles(const ConvShape& s) {
  return s.batch * s.out_depth * ceil_div(s.out_height, 4) * ceil_div(s.out_width, 4);
}

// Whether a convolution of this shape has the form, and is expected to be faster in it. The
// transforms of input and output cost in proportion to C + K, the weight's to C * K, the products
// that are saved to C * K * pixels. Pixels may be unknown (0): then the weight is being packed for
// many uses.
FMK_INLINE bool winograd_pays(const ConvShape& s) {
  const bool form = s.dtype != DType::kF64 && s.groups == 1 && s.kernel_h == 3 && s.kernel_w == 3 &&
                    s.stride_h == 1 && s.stride_w == 1 && s.dilation_h == 1 && s.dilation_w == 1 &&
                    s.axes >= 2 && s.stride_d == 1 && s.padding_mode == PaddingMode::kZeros;
  constexpr int64_t kMaxReduction = 2304;  // bounds the transformed inputs of a block
  const int64_t pixels = s.batch * s.out_depth * s.out_height * s.out_width;
  return form && s.channels >= 32 && s.out_channels >= 32 && s.channels % 16 == 0 &&
         (s.kernel_d == 1 || s.kernel_d * s.channels <= kMaxReduction) &&
         (pixels == 0 || pixels >= 128);
}
// The type whose direct sums are dot products of pairs, of twice as many products in the same time.
constexpr bool sums_pairs(DType dtype) { return FMK_BF16_DOT && dtype == DType::kBF16; }
// The same where the weight is transformed for this call alone: the pixels are known.
FMK_INLINE bool winograd_pays_once(const ConvShape& s) {
  constexpr int64_t kMinTilesForPairs = 64;
  return winograd_pays(s) && !(sums_pairs(s.dtype) && winograd_tiles(s) < kMinTilesForPairs);
}
// The same for the gradient of the weight, whose result costs as many products as a few dozen
// tiles.
FMK_INLINE bool winograd_gradient_pays(const ConvShape& s) {
  constexpr int64_t kMinTiles = 48, kMinTilesForPairs = 192;
  constexpr int64_t kMaxBufferFloats = 24 << 20;  // of each thread's buffer
  return winograd_pays(s) &&
         winograd_tiles(s) >= (sums_pairs(s.dtype) ? kMinTilesForPairs : kMinTiles) &&
         36 * s.kernel_d * s.channels * s.out_channels <= kMaxBufferFloats;
}
// Packed: [panel][point][tap_z][channels][width] floats.
template <class T>
size_t packed_winograd_bytes(const WeightView<T>&);
template <class T>
void pack_winograd_weight(const WeightView<T>&, void* packed, const Parallel&);
// As correlate(), with a weight from pack_winograd_weight; one group, outputs side by side (place
// steps of 1).
template <class T>
void correlate_winograd(const Correlation<T>&, const Parallel&);
// As weight_gradient().
template <class T>
void winograd_weight_gradient(const WeightGradient<T>&, const Parallel&);

}  // namespace fmk::FMK_ISA
