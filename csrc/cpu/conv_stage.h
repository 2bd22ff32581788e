// Moves between images and blocks of pixels with their channels side by side, which is what the
// micro-kernel reads and writes: rows of an image of either layout to words, and back to planes.
#pragma once

#include "cpu/conv_internal.h"

namespace fmk::FMK_ISA {

// Numbers per staged word: D is the compute type, or the pair of a pairwise dot product.
template <class D>
constexpr int kPairOf = 1;
template <>
constexpr int kPairOf<Bf16Pair> = 2;

#if defined(__AVX512F__)
// Sixteen words, `lanes` of them valid, from consecutive pixels of one channel's plane or of two.
template <class T>
FMK_INLINE __m512 plane_words(const T* p, int lanes) {
  return load(p, lanes).v;
}
FMK_INLINE __m512 plane_pairs(const bf16* p, int64_t plane, bool both, int lanes) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes16(lanes), p));
  if (!both) return _mm512_castsi512_ps(low);
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes16(lanes), p + plane));
  return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
#endif

#if FMK_BF16_DOT
constexpr int64_t kMaxPaddedChannels = 15;
// dst[pixel][words] from src[pixel][channels], an odd number up to kMaxPaddedChannels: the last
// word of a pixel gets a zero.
FMK_NOINLINE void pad_pixels(const bf16* src, int64_t pixels, int64_t channels, Bf16Pair* dst) {
  const int64_t padded = channels + 1, per_vector = 32 / padded;
  uint16_t order[32] = {};
  uint32_t kept = 0;
  for (int64_t pixel = 0; pixel < per_vector; ++pixel)
    for (int64_t c = 0; c < channels; ++c) {
      order[pixel * padded + c] = static_cast<uint16_t>(pixel * channels + c);
      kept |= uint32_t{1} << (pixel * padded + c);
    }
  const __m512i from = _mm512_loadu_si512(order);
  const auto first = [](int64_t n) { return static_cast<__mmask32>((uint64_t{1} << n) - 1); };
  for (int64_t pixel = 0; pixel < pixels; pixel += per_vector) {
    const int64_t n = min_of(per_vector, pixels - pixel);
    const __m512i x = _mm512_maskz_loadu_epi16(first(n * channels), src + pixel * channels);
    _mm512_mask_storeu_epi16(dst + pixel * padded / 2, first(n * padded),
                             _mm512_maskz_permutexvar_epi16(kept, from, x));
  }
}
#endif

// dst[pixel * ld + word] from planes src[channel * plane + pixel]: `pixels` pixels, `channels`
// channels.
template <class T, class D>
FMK_NOINLINE void planes_to_pixels(const T* src, int64_t plane, int64_t pixels, int64_t channels,
                                   D* dst, int64_t ld) {
  constexpr int kPair = kPairOf<D>;
  const int64_t words = ceil_div(channels, kPair);
#if defined(__AVX512F__)
  if constexpr (sizeof(D) == 4) {
    const int64_t ahead = max_of<int64_t>(pixels, 32);
    for (int64_t word = 0; word < words; word += 16) {
      const int count = static_cast<int>(min_of<int64_t>(16, words - word));
      for (int64_t pixel = 0; pixel < pixels; pixel += 16) {
        const int lanes = static_cast<int>(min_of<int64_t>(16, pixels - pixel));
        const T* from = src + word * kPair * plane + pixel;
        // Sixteen planes are too many streams for the hardware to foresee: ask for the next row.
        for (int i = 0; i < count * kPair; ++i) __builtin_prefetch(from + i * plane + ahead);
        auto* to = reinterpret_cast<float*>(dst + pixel * ld + word);
        if constexpr (sizeof(T) == 4) {
          if (count == 16 && lanes == 16) {
            transpose_16x16(from, plane, to, ld);
            continue;
          }
        }
        alignas(64) float block[16][16], turned[16][16];
        for (int i = 0; i < count; ++i) {
          const T* row = from + i * kPair * plane;
          __m512 values;
          if constexpr (kPair == 2)
            values = plane_pairs(row, plane, (word + i) * 2 + 1 < channels, lanes);
          else
            values = plane_words(row, lanes);
          _mm512_store_ps(block[i], values);
        }
        for (int i = count; i < 16; ++i) _mm512_store_ps(block[i], _mm512_setzero_ps());
        if (count == 16 && lanes == 16) {
          transpose_16x16(&block[0][0], 16, to, ld);
        } else {
          transpose_16x16(&block[0][0], 16, &turned[0][0], 16);
          for (int i = 0; i < lanes; ++i)
            _mm512_mask_storeu_ps(to + i * ld, lanes16(count), _mm512_load_ps(turned[i]));
        }
      }
    }
    return;
  }
#endif
  for (int64_t word = 0; word < words; ++word)
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      const T* from = src + word * kPair * plane + pixel;
      const bool both = kPair == 2 && word * 2 + 1 < channels;
      make_word(dst + pixel * ld + word, widen(from[0]), both ? widen(from[plane]) : 0);
    }
}

// dst[column * plane + pixel] from src[pixel * ld + column], in the compute type.
template <class T>
FMK_NOINLINE void pixels_to_planes(const Acc<T>* src, int64_t ld, int64_t pixels, int64_t columns,
                                   T* dst, int64_t plane) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Acc<T>) == 4) {
    for (int64_t column = 0; column < columns; column += 16) {
      const int count = static_cast<int>(min_of<int64_t>(16, columns - column));
      for (int64_t pixel = 0; pixel < pixels; pixel += 16) {
        const int lanes = static_cast<int>(min_of<int64_t>(16, pixels - pixel));
        const float* from = src + pixel * ld + column;
        T* to = dst + column * plane + pixel;
        if constexpr (sizeof(T) == 4) {
          if (count == 16 && lanes == 16) {
            transpose_16x16(from, ld, to, plane);
            continue;
          }
        }
        alignas(64) float turned[16][16];
        if (lanes == 16) {
          transpose_16x16(from, ld, &turned[0][0], 16);
        } else {
          alignas(64) float block[16][16];
          for (int i = 0; i < 16; ++i) store(block[i], i < lanes ? load(from + i * ld) : VecF{});
          transpose_16x16(&block[0][0], 16, &turned[0][0], 16);
        }
        for (int i = 0; i < count; ++i) {
          if (lanes == 16)
            store(to + i * plane, load(turned[i]));
          else
            store(to + i * plane, load(turned[i]), lanes);
        }
      }
    }
    return;
  }
#endif
  for (int64_t column = 0; column < columns; ++column)
    for (int64_t pixel = 0; pixel < pixels; ++pixel)
      narrow(dst + column * plane + pixel, src[pixel * ld + column]);
}

// Which part of an image's rows is staged and how: [group][pixels][words of the group's channels],
// position p of a row being pixel offset + p of the image, and what the padding mode says where
// there is none.
template <class T, class D>
struct RowStage {
  bool channels_last;
  int64_t groups, channels;  // per group
  int64_t height, width;     // of the image; height counts the rows of all its planes
  int64_t offset, pixels;
  PaddingMode padding = PaddingMode::kZeros;

  int64_t words() const { return ceil_div(channels, kPairOf<D>); }
  int64_t group_words() const { return pixels * words(); }
  int64_t row_words() const { return groups * group_words(); }

  // Stages row y (inside the image) of an image.
  void run(const T* image, int64_t y, D* dst) const {
    const int64_t n = words();
    const int64_t begin = min_of(pixels, max_of<int64_t>(0, -offset));
    const int64_t end = max_of(begin, min_of(pixels, width - offset));
    for (int64_t group = 0; group < groups; ++group, dst += group_words()) {
      if (padding == PaddingMode::kZeros) {
        clear(dst, begin * n);
        clear(dst + end * n, (pixels - end) * n);
      } else {
        for (int64_t p = 0; p < begin; ++p) repeat(image, y, group, p, dst + p * n);
        for (int64_t p = end; p < pixels; ++p) repeat(image, y, group, p, dst + p * n);
      }
      if (end == begin) continue;
      if (!channels_last) {
        const T* src = image + (group * channels * height + y) * width + offset + begin;
        planes_to_pixels(src, height * width, end - begin, channels, dst + begin * n, n);
        continue;
      }
      const int64_t total = groups * channels;
      const T* src = image + (y * width + offset + begin) * total + group * channels;
      if (channels == total && channels % kPairOf<D> == 0) {
        copy(src, dst + begin * n, (end - begin) * channels);
        continue;
      }
#if FMK_BF16_DOT
      if constexpr (kPairOf<D> == 2) {
        if (channels == total && channels <= kMaxPaddedChannels) {
          pad_pixels(src, end - begin, channels, dst + begin * n);
          continue;
        }
      }
#endif
      for (int64_t p = begin; p < end; ++p, src += total) copy(src, dst + p * n, channels);
    }
  }

 private:
  // Position p of a row, which lies outside the image.
  void repeat(const T* image, int64_t y, int64_t group, int64_t p, D* dst) const {
    const int64_t x = padded_position(padding, offset + p, width);
    if (channels_last)
      copy(image + (y * width + x) * groups * channels + group * channels, dst, channels);
    else
      planes_to_pixels(image + (group * channels * height + y) * width + x, height * width, 1,
                       channels, dst, words());
  }
  static void clear(D* dst, int64_t n) {
    if (n > 0) std::memset(static_cast<void*>(dst), 0, n * sizeof(D));
  }
  static void copy(const T* src, D* dst, int64_t n) {
    if constexpr (kPairOf<D> == 2) {
      std::memcpy(static_cast<void*>(dst), src, n * sizeof(T));
      if (n % 2) dst[n / 2].high = T{};
    } else {
      convert(src, dst, n);
    }
  }
};

}  // namespace fmk::FMK_ISA
