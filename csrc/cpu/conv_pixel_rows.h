// Correlations of groups of few channels over NHWC images.
#pragma once

#include <type_traits>

#include "cpu/conv_internal.h"
#include "cpu/conv_stream.h"

namespace fmk::FMK_ISA {

constexpr int64_t kMaxGroupChannels = 8;

// lane i of the result is lane index[i] of x.
#if defined(__AVX512F__)
FMK_INLINE VecF permute(VecF x, const int32_t* index) {
  return {_mm512_permutexvar_ps(_mm512_loadu_si512(index), x.v)};
}
#elif defined(__AVX2__)
FMK_INLINE VecF permute(VecF x, const int32_t* index) {
  return {
      _mm256_permutevar8x32_ps(x.v, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)))};
}
#else
FMK_INLINE VecF permute(VecF x, const int32_t* index) {
  return {Floats{x.v[index[0]], x.v[index[1]], x.v[index[2]], x.v[index[3]]}};
}
#endif

// What a vector's permutation chooses from: a vector of numbers or, where words are pairs, as many
// numbers in the lower lanes.
template <class T>
FMK_INLINE Vec<T> load_words_of_groups(const T* p) {
#if FMK_BF16_DOT
  if constexpr (Mac<T>::kPair == 2)
    return {_mm512_castps256_ps512(_mm256_loadu_ps(reinterpret_cast<const float*>(p)))};
#endif
  return load(p);
}

// NHWC: vectors hold channels, of several groups if need be. A block of kPixels neighbouring
// outputs takes every input vector of a kernel row once, and from it, for each word of a group's
// channels, the lanes that the outputs' lanes multiply.
template <class T, bool kDepthwise>
struct PixelRows {
  using V = Vec<T>;
  using A = Acc<T>;
  using M = Mac<std::conditional_t<kDepthwise, A, T>>;
  using Factor = typename M::Word;
  static constexpr int kPixels = 8, kFewPixels = 4;
  const Correlation<T>& p;
  int64_t channels, padded;  // of all groups
  int64_t group_words;       // of a group's channels
  const Factor* weights;     // [tap_y][tap_x][word of the group][padded]
  Epilogue<T> epilogue;
  bool clamps;   // of it, no more than scale, shift and a clamp is there
  bool streams;  // the output leaves the caches anyway: it is written past them, not read first
  int32_t lanes_of[kMaxGroupChannels][V::W];  // of a vector, for a word of its groups

  explicit PixelRows(const Correlation<T>& problem) : p(problem) {
    channels = p.groups * p.channels;
    padded = ceil_div(channels, int64_t{V::W}) * V::W;
    group_words = kDepthwise ? 1 : words_of<T>(p.channels);
    epilogue.out = p.output;
    epilogue.ld_out = epilogue.ld_residual = channels;
    epilogue.scale = p.scale;
    epilogue.shift = p.shift;
    epilogue.residual = p.residual;
    epilogue.preactivation = p.preactivation;
    epilogue.activation = p.activation;
    clamps = p.activation <= Activation::kRelu6 && !p.residual && !p.preactivation;
    streams =
        !p.moments.wanted() && streamed(p.output, p.batch * p.y.out_size * p.x.out_size, channels);
    weights = static_cast<const Factor*>(p.weight);
    if constexpr (!kDepthwise) gather_weights();
  }

  // `row` of all the images' output rows.
  template <int kTaps, int kStride>
  void run(int64_t row) const {
    const int64_t image = row / p.y.out_size, y = row % p.y.out_size, out = p.x.out_size;
    const T* from = p.input + image * p.y.in_size * p.x.in_size * channels;
    // The last block overlaps the one before.
    if (out >= kPixels) {
      for (int64_t i = 0; i < out; i += kPixels) {
        const int64_t x = min_of(i, out - kPixels), first = x * kStride + p.x.offset;
        if (first >= 0 && first + (kPixels - 1) * kStride + kTaps <= p.x.in_size)
          block<kPixels, kTaps, kStride, true>(from, y, x, row * out + x);
        else
          block<kPixels, kTaps, kStride, false>(from, y, x, row * out + x);
      }
    } else if (out >= kFewPixels) {
      for (int64_t i = 0; i < out; i += kFewPixels) {
        const int64_t x = min_of(i, out - kFewPixels);
        block<kFewPixels, kTaps, kStride, false>(from, y, x, row * out + x);
      }
    } else {
      for (int64_t x = 0; x < out; ++x) block<1, kTaps, kStride, false>(from, y, x, row * out + x);
    }
  }

 private:
  // From the packed weight, [group][tap][word][W].
  void gather_weights() {
    const int64_t length = p.y.taps * p.x.taps * group_words;
    const int64_t bytes = length * padded * static_cast<int64_t>(sizeof(Factor));
    auto* to = static_cast<Factor*>(scratch_bytes(Scratch::kPanel, bytes));
    std::memset(static_cast<void*>(to), 0, bytes);
    const auto* from = static_cast<const Factor*>(p.weight);
    for (int64_t group = 0; group < p.groups; ++group)
      for (int64_t i = 0; i < length; ++i, from += V::W)
        for (int64_t k = 0; k < p.channels; ++k) to[i * padded + group * p.channels + k] = from[k];
    weights = to;
    for (int64_t word = 0; word < group_words; ++word)
      for (int64_t lane = 0; lane < V::W; ++lane)
        lanes_of[word][lane] = static_cast<int32_t>(lane / p.channels * group_words + word);
  }

  template <int P, int kTaps, int kStride, bool kInside>
  void block(const T* image, int64_t y, int64_t x, int64_t pixel) const {
    for (int64_t i = 0; i < padded; i += V::W) {
      // The last vector overlaps the one before.
      const int64_t channel = min_of(i, channels - V::W);
      // A copy: what finish() refers to would not stay in registers.
      V sum[P][1], done[P][1];
      multiply<P, kTaps, kStride, kInside>(image + channel, y, x, channel, sum);
      if (clamps) {
        clamp(sum, channel, pixel);
        continue;
      }
      FMK_FOR (k, P) done[k][0] = sum[k][0];
      finish(epilogue.at_panel(channel, V::W).at_row(pixel), done);
    }
  }
  // The usual epilogue, whose few operations are cheaper than a call.
  template <int P>
  FMK_LAMBDA void clamp(const V (&sum)[P][1], int64_t channel, int64_t pixel) const {
    constexpr A kInfinity = static_cast<A>(__builtin_inf());
    const bool above = p.activation != Activation::kNone;
    const V low = splat(above ? A(0) : -kInfinity);
    const V high = splat(p.activation == Activation::kRelu6 ? A(6) : kInfinity);
    const V scale = p.scale ? load(p.scale + channel) : splat_as<V>(1);
    const V shift = p.shift ? load(p.shift + channel) : zero<V>();
    T* to = p.output + pixel * channels + channel;
    FMK_FOR (k, P) {
      const V z = min(high, max(low, fma(sum[k][0], scale, shift)));
      if (streams)
        stream(to + k * channels, z);
      else
        store(to + k * channels, z);
    }
  }
  // A function of its own: the epilogue is long, and there are many kinds of blocks.
  template <int P>
  FMK_NOINLINE void finish(const Epilogue<T>& epilogue, V (&sum)[P][1]) {
    epilogue.run(sum);
  }

  template <int P, int kTaps, int kStride, bool kInside>
  FMK_LAMBDA void multiply(const T* image, int64_t y, int64_t x, int64_t channel,
                           V (&sum)[P][1]) const {
    FMK_FOR (i, P) sum[i][0] = zero<V>();
    const int64_t tap_step = group_words * padded;
    const Factor* weight = weights + channel;
    const int64_t first = x * kStride + p.x.offset;
    for (int64_t ty = 0; ty < p.y.taps; ++ty, weight += kTaps * tap_step) {
      const int64_t in_y = p.y.position(y, ty);
      if (in_y < 0 || in_y >= p.y.in_size) continue;
      const T* row = image + (in_y * p.x.in_size + first) * channels;
      for (int64_t word = 0; word < group_words; ++word) {
        const Factor* factors = weight + word * padded;
        const auto value_at = [&](int64_t column) FMK_LAMBDA {
          const T* from = row + column * channels;
          if constexpr (kDepthwise)
            return pin(load(from));
          else
            return permute(pin(load_words_of_groups(from)), lanes_of[word]);
        };
        V factor[kTaps];
        FMK_FOR (tap, kTaps) factor[tap] = M::load_words(factors + tap * tap_step);
        FMK_FOR (column, (P - 1) * kStride + kTaps) {
          if (!kInside && (first + column < 0 || first + column >= p.x.in_size)) continue;
          const V value = value_at(column);
          FMK_FOR (i, P) {
            const int tap = column - i * kStride;
            if (tap >= 0 && tap < kTaps) sum[i][0] = M::mac(sum[i][0], value, factor[tap]);
          }
        }
      }
    }
    if constexpr (kInside) {
      // The next block's part of the rows that nothing has touched yet: many pixels by turns are no
      // stream to the hardware.
      FMK_FOR (i, kStride) {
        const int64_t fresh = min_of(p.y.in_size - 1, p.y.position(y, p.y.taps - 1) - i);
        const T* next = image + (fresh * p.x.in_size + first + P * kStride) * channels;
        FMK_FOR (j, P * kStride) __builtin_prefetch(next + (j + kTaps - kStride) * channels);
      }
    }
  }
};

}  // namespace fmk::FMK_ISA
