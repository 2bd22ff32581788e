// Convolutions of images of few channels: their rows are staged, so a tile of neighbouring pixels
// of a row needs one pointer per row of taps and the step from pixel to pixel, and the reduction is
// short enough for the weights to stay in L1.
#pragma once

#include "cpu/conv_rows.h"
#include "cpu/conv_stream.h"

namespace fmk::FMK_ISA {

template <class Mac>
struct RowTileOperands {
  using Word = typename Mac::Word;
  const Word* const* rows;  // [count]: the staged row under each row of taps
  int64_t count;
  int64_t offset, step;  // words from a row's start to the first pixel, and from pixel to pixel
  int64_t words;         // of the reduction, per row
  const Word* panel;     // [count][words][NV * W]
};

// acc[i][:] = sum over rows r, words k of  rows[r][offset + i * step + k] * panel[r][k][:]
template <class Mac, int MR, int NV, class Finish>
FMK_NOINLINE void row_tile(const RowTileOperands<Mac>& in, const Finish& finish) {
  using V = typename Mac::V;
  using Word = typename Mac::Word;
  // Addresses are sums of one of few pointers and one of few steps: a pointer per pixel would take
  // every register there is.
  constexpr int kPerPointer = 4, kPointers = (MR + kPerPointer - 1) / kPerPointer;
  V acc[MR][NV];
  FMK_FOR (i, MR)
    FMK_FOR (j, NV) acc[i][j] = zero<V>();
  finish.template prefetch<MR, NV>();
  const int64_t step = in.step, words = in.words;
  int64_t three_steps = 3 * step;
  asm("" : "+r"(three_steps));
  const Word* panel = in.panel;
  for (int64_t r = 0; r < in.count; ++r) {
    const Word* at[kPointers];
    FMK_FOR (i, kPointers) at[i] = in.rows[r] + in.offset + i * kPerPointer * step;
    for (int64_t k = 0; k < words; ++k, panel += NV * V::W) {
      V factor[NV];
      FMK_FOR (j, NV) factor[j] = pin(Mac::load_words(panel + j * V::W));
      FMK_FOR (i, MR) {
        const int64_t shift = i % kPerPointer == 3 ? three_steps : i % kPerPointer * step;
        const V x = Mac::splat_word(at[i / kPerPointer] + shift);
        FMK_FOR (j, NV) acc[i][j] = Mac::mac(acc[i][j], x, factor[j]);
      }
      FMK_FOR (i, kPointers) at[i] = opaque(at[i] + 1);
    }
  }
  finish.template run<MR, NV>(acc);
}

// The widest tile: with two vectors of weights and a pixel's number, as many accumulators as there
// are registers.
#if defined(__AVX512F__)
constexpr int kRowTilePixels = 14;
#else
constexpr int kRowTilePixels = 6;
#endif
static_assert(kNarrowVecs == 2);

// row_tile<...> for run-time sizes.
template <class Mac, int NV, class Finish, int MR = kRowTilePixels>
FMK_INLINE void row_tile_of_width(int pixels, const RowTileOperands<Mac>& in,
                                  const Finish& finish) {
  if constexpr (MR > 1) {
    if (pixels < MR) return row_tile_of_width<Mac, NV, Finish, MR - 1>(pixels, in, finish);
  }
  row_tile<Mac, MR, NV>(in, finish);
}
template <class Mac, class Finish>
FMK_INLINE void run_row_tile(int pixels, int vecs, const RowTileOperands<Mac>& in,
                             const Finish& finish) {
  if (vecs == 1)
    row_tile_of_width<Mac, 1>(pixels, in, finish);
  else
    row_tile_of_width<Mac, 2>(pixels, in, finish);
}

// The epilogue, which stores past the caches if asked to: `streams` allows for scale, shift and a
// clamp only.
template <class T>
struct RowFinish {
  using V = Vec<T>;
  Epilogue<T> epilogue;
  bool streams;

  template <int MR, int NV>
  FMK_LAMBDA void prefetch() const {
    if (!streams) epilogue.template prefetch<MR, NV>();
  }
  template <int MR, int NV>
  FMK_LAMBDA void run(V (&acc)[MR][NV]) const {
    if constexpr (kCanStream<T>) {
      if (streams) return run_streaming(acc);
    }
    epilogue.run(acc);
  }

 private:
  template <int MR, int NV>
  FMK_LAMBDA void run_streaming(V (&acc)[MR][NV]) const {
    constexpr Acc<T> kInfinity = static_cast<Acc<T>>(__builtin_inf());
    const bool above = epilogue.activation != Activation::kNone;
    const V low = splat(above ? Acc<T>(0) : -kInfinity);
    const V high = splat(epilogue.activation == Activation::kRelu6 ? Acc<T>(6) : kInfinity);
    FMK_FOR (j, NV) {
      const V scale = epilogue.scale ? load(epilogue.scale + j * V::W) : splat_as<V>(1);
      const V shift = epilogue.shift ? load(epilogue.shift + j * V::W) : zero<V>();
      FMK_FOR (i, MR)
        stream(epilogue.out + i * epilogue.ld_out + j * V::W,
               min(high, max(low, fma(acc[i][j], scale, shift))));
    }
  }
};

}  // namespace fmk::FMK_ISA
