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

}  // namespace fmk::FMK_ISA
