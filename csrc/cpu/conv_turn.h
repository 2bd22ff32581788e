// Weights, whose rows are output channels, turned so that a vector holds neighbouring columns of
// what multiplies: the first step of packing them.
#pragma once

#include "cpu/conv_internal.h"

namespace fmk::FMK_ISA {

#if defined(__AVX512F__)
// to[channel * taps + tap][16], and up to 15 vectors more: the first `taps` taps of `run` channels
// of the reduction and of `valid` columns from `src` on, widened to float; further columns are
// zero.
template <class T>
FMK_NOINLINE void turn_columns(const WeightView<T>& w, const T* src, int64_t taps, int64_t run,
                               int64_t valid, float (*to)[16]) {
  alignas(64) float block[16][16];
  // Rows of numbers that lie side by side in memory, `step` apart from column to column.
  const auto turn = [&](const T* from, int64_t length, float (*turned)[16]) FMK_LAMBDA {
    for (int64_t i = 0; i < length; i += 16) {
      const int n = static_cast<int>(min_of<int64_t>(16, length - i));
      if constexpr (sizeof(T) == sizeof(float)) {
        if (n == 16 && valid == 16) {
          transpose_16x16(from + i, w.column_stride, turned[i], 16);
          continue;
        }
      }
      for (int64_t column = 0; column < 16; ++column)
        store(block[column],
              column < valid ? load(from + column * w.column_stride + i, n) : zero<VecF>());
      transpose_16x16(block[0], 16, turned[i], 16);
    }
  };
  if (w.reduction_stride == taps) return turn(src, run * taps, to);
  const bool vector = taps == 1 && w.column_stride == 1;
  for (int64_t channel = 0; channel < run; ++channel, src += w.reduction_stride) {
    if (vector)
      store(to[channel], load(src, static_cast<int>(valid)));
    else
      turn(src, taps, to + channel * taps);
  }
}
#endif

}  // namespace fmk::FMK_ISA
