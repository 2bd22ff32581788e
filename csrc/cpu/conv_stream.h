// Stores past the caches, for outputs that are too large to stay there until they are read: a line
// that is written whole need not be read first. Every store is an aligned cache line.
#pragma once

#include "cpu/conv_internal.h"

namespace fmk::FMK_ISA {

constexpr int64_t kStreamedBytes = 8 << 20;

#if defined(__AVX512F__)
template <class T>
constexpr bool kCanStream = sizeof(T) == 4;
FMK_INLINE void stream(float* p, VecF x) { _mm512_stream_ps(p, x.v); }
// Before others may read what was stored.
FMK_INLINE void stream_end() { _mm_sfence(); }
#else
template <class T>
constexpr bool kCanStream = false;
FMK_INLINE void stream_end() {}
#endif
template <class T, class V>
FMK_INLINE void stream(T* p, V x) {
  store(p, x);
}

// Whether an NHWC output of so many pixels is stored so.
template <class T>
FMK_INLINE bool streamed(const T* output, int64_t pixels, int64_t channels) {
  return kCanStream<T> && pixels * channels * static_cast<int64_t>(sizeof(T)) > kStreamedBytes &&
         channels % Vec<T>::W == 0 && reinterpret_cast<uintptr_t>(output) % 64 == 0;
}

// The usual part of an epilogue, clamp(scale * acc + shift + residual), with stores past the
// caches.
template <class T>
struct StreamedEpilogue {
  using V = Vec<T>;
  const Epilogue<T>& of;

  static bool fits(const Correlation<T>& p) {
    return p.activation <= Activation::kRelu6 && !p.preactivation && p.out_channels % V::W == 0 &&
           streamed(p.output, p.batch * p.placed_pixels(), p.groups * p.out_channels);
  }
  template <int MR, int NV>
  FMK_LAMBDA void run(V (&acc)[MR][NV]) const {
    constexpr Acc<T> kInfinity = static_cast<Acc<T>>(__builtin_inf());
    const V low = splat(of.activation == Activation::kNone ? -kInfinity : Acc<T>(0));
    const V high = splat(of.activation == Activation::kRelu6 ? Acc<T>(6) : kInfinity);
    FMK_FOR (j, NV) {
      const V scale = of.scale ? load(of.scale + j * V::W) : splat_as<V>(1);
      const V shift = of.shift ? load(of.shift + j * V::W) : zero<V>();
      FMK_FOR (i, MR) acc[i][j] = fma(acc[i][j], scale, shift);
    }
    if (of.residual) {
      FMK_FOR (i, MR)
        FMK_FOR (j, NV) acc[i][j] = acc[i][j] + load(of.residual + i * of.ld_residual + j * V::W);
    }
    FMK_FOR (i, MR)
      FMK_FOR (j, NV) stream(of.out + i * of.ld_out + j * V::W, min(high, max(low, acc[i][j])));
  }
};

}  // namespace fmk::FMK_ISA
