// Correlations of groups of few channels over NHWC images.
#pragma once

#include <type_traits>

#include "cpu/conv_internal.h"
#include "cpu/conv_plane_rows.h"
#include "cpu/conv_stream.h"
#include "cpu/gemm.h"

namespace fmk::FMK_ISA {

constexpr int64_t kMaxGroupChannels = 8;
constexpr int64_t kCachedOutput = 96 << 10;  // numbers of an output that L2 may hold

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

// As many neighbouring channels as a run of N vectors holds, in an order that is cheap to take
// apart and to put together again: of two vectors of bf16 the one has the first, the other the
// second four of every eight channels, as they come when words are put together from two rows.
template <class T, class V>
FMK_INLINE void load_run(const T* p, V (&to)[1]) {
  to[0] = pin(load(p));
}
template <class T, class V>
FMK_INLINE void store_run(T* p, const V (&from)[1]) {
  store(p, from[0]);
}
template <class V>
FMK_INLINE void load_run_of_factors(const typename V::Elem* p, V (&to)[1]) {
  to[0] = load(p);
}
#if defined(__AVX512F__)
template <class T>
constexpr bool kHasWideRuns = std::is_same_v<T, bf16>;
FMK_INLINE void load_run(const bf16* p, VecF (&to)[2]) {
  const __m512i low = _mm512_setzero_si512(), high = _mm512_loadu_si512(p);
  to[0] = {_mm512_castsi512_ps(_mm512_unpacklo_epi16(low, high))};
  to[1] = {_mm512_castsi512_ps(_mm512_unpackhi_epi16(low, high))};
}
FMK_INLINE void store_run(bf16* p, const VecF (&from)[2]) {
  const __m512i order =
      _mm512_setr_epi32(0x10000, 0x30002, 0x110010, 0x130012, 0x50004, 0x70006, 0x150014, 0x170016,
                        0x90008, 0xb000a, 0x190018, 0x1b001a, 0xd000c, 0xf000e, 0x1d001c, 0x1f001e);
#if FMK_BF16_DOT
  const __m512i rounded = narrow_bf16(from[1], from[0]);
#else
  const __m512i rounded =
      _mm512_inserti64x4(_mm512_castsi256_si512(narrow_bf16(from[0])), narrow_bf16(from[1]), 1);
#endif
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, rounded));
}
// A run in the order of the channels.
FMK_INLINE void interleave(VecF (&run)[2]) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  const VecF low{_mm512_permutex2var_ps(run[0].v, first, run[1].v)};
  run[1] = {_mm512_permutex2var_ps(run[0].v, second, run[1].v)};
  run[0] = low;
}
FMK_INLINE void load_run_of_factors(const float* p, VecF (&to)[2]) {
  const VecF first = load(p), second = load(p + VecF::W);
  to[0] = {_mm512_shuffle_f32x4(first.v, second.v, 0x88)};
  to[1] = {_mm512_shuffle_f32x4(first.v, second.v, 0xdd)};
}
#else
template <class T>
constexpr bool kHasWideRuns = false;
#endif

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
  int64_t channels, padded;               // of all groups
  int64_t group_words;                    // of a group's channels
  const Factor* weights;                  // [tap_y][tap_x][word of the group][padded]
  const Bf16Pair* paired_taps = nullptr;  // [tap_y but the last][tap_x][padded], depthwise bf16
  Epilogue<T> epilogue;
  bool clamps;  // of it, no more than scale, shift and a clamp is there
  bool fetches_output;
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
    fetches_output = !streams && p.batch * p.y.out_size * p.x.out_size * channels > kCachedOutput;
    weights = static_cast<const Factor*>(p.weight);
    if constexpr (!kDepthwise) gather_weights();
#if FMK_BF16_DOT
    if constexpr (kDepthwise && kHasWideRuns<T>) pair_taps();
#endif
  }

  // Output rows [y0, y1) of an image, a strip of columns after the other: its rows stay in L1 until
  // the last row of outputs has read them.
  template <int kTaps, int kStride>
  void run(int64_t image, int64_t y0, int64_t y1) const {
    if constexpr (kDepthwise && kHasWideRuns<T>) {
      if (channels >= 2 * V::W) return run_strips<2, kTaps, kStride>(image, y0, y1);
    }
    run_strips<1, kTaps, kStride>(image, y0, y1);
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

  template <int N, int kTaps, int kStride>
  void run_strips(int64_t image, int64_t y0, int64_t y1) const {
    const int64_t out = p.x.out_size;
    // What is left over at the end of a row is computed again.
    const auto waste = [&](int64_t pixels) { return ceil_div(out, pixels) * pixels - out; };
    if (kTaps == 3 && out >= kPixels - 1 && waste(kPixels - 1) < waste(kPixels))
      strips<kTaps == 3 ? kPixels - 1 : kPixels, N, kTaps, kStride>(image, y0, y1);
    else if (out >= kPixels)
      strips<kPixels, N, kTaps, kStride>(image, y0, y1);
    else if (out >= kFewPixels)
      strips<kFewPixels, N, kTaps, kStride>(image, y0, y1);
    else
      strips<1, N, kTaps, kStride>(image, y0, y1);
  }
  template <int P, int N, int kTaps, int kStride>
  void strips(int64_t image, int64_t y0, int64_t y1) const {
    const int64_t out = p.x.out_size, row0 = image * p.y.out_size;
    const T* from = p.input + image * p.y.in_size * p.x.in_size * channels;
    for (int64_t i = 0; i < out; i += P) {
      // The last strip overlaps the one before.
      const int64_t x = min_of(i, out - P), first = x * kStride + p.x.offset;
      const bool inside = first >= 0 && first + (P - 1) * kStride + kTaps <= p.x.in_size;
      for (int64_t y = y0; y < y1; ++y) {
        const int64_t pixel = (row0 + y) * out + x;
        if (P >= kPixels - 1 && inside)
          block<P, N, kTaps, kStride, P >= kPixels - 1>(from, y, x, pixel);
        else
          block<P, N, kTaps, kStride, false>(from, y, x, pixel);
      }
    }
  }

  template <int P, int N, int kTaps, int kStride, bool kInside>
  void block(const T* image, int64_t y, int64_t x, int64_t pixel) const {
    constexpr int64_t kRun = N * V::W;
    for (int64_t i = 0; i < channels; i += kRun) {
      // The last run overlaps the one before.
      const int64_t channel = min_of(i, channels - kRun);
      // A copy: what finish() refers to would not stay in registers.
      V sum[P][N], done[P][N];
      multiply<P, N, kTaps, kStride, kInside>(image + channel, y, x, channel, sum);
      // Where the strip's next row goes: few lines of each of several pixels are no stream, either.
      if (kInside && fetches_output) {
        const T* next = p.output + (pixel + p.x.out_size) * channels + channel;
        FMK_FOR (k, P) {
          __builtin_prefetch(next, 1, 2);
          next = opaque(next + channels);
        }
      }
      if (clamps) {
        clamp(sum, channel, pixel);
        continue;
      }
      FMK_FOR (k, P)
        FMK_FOR (n, N) done[k][n] = sum[k][n];
      finish(epilogue.at_panel(channel, kRun).at_row(pixel), done);
    }
  }
  // The usual epilogue, whose few operations are cheaper than a call.
  template <int P, int N>
  FMK_LAMBDA void clamp(const V (&sum)[P][N], int64_t channel, int64_t pixel) const {
    constexpr A kInfinity = static_cast<A>(__builtin_inf());
    const bool above = p.activation != Activation::kNone;
    const V low = splat(above ? A(0) : -kInfinity);
    const V high = splat(p.activation == Activation::kRelu6 ? A(6) : kInfinity);
    V scale[N], shift[N];
    FMK_FOR (n, N) scale[n] = splat_as<V>(1), shift[n] = zero<V>();
    if (p.scale) load_run_of_factors(p.scale + channel, scale);
    if (p.shift) load_run_of_factors(p.shift + channel, shift);
    T* to = p.output + pixel * channels + channel;
    FMK_FOR (k, P) {
      V z[N];
      FMK_FOR (n, N) z[n] = min(high, max(low, fma(sum[k][n], scale[n], shift[n])));
      if (N == 1 && streams)
        stream(to, z[0]);
      else
        store_run(to, z);
      to = opaque(to + channels);
    }
  }
  // A function of its own: the epilogue is long, and there are many kinds of blocks.
  template <int P, int N>
  FMK_NOINLINE void finish(const Epilogue<T>& epilogue, V (&sum)[P][N]) {
    if constexpr (N == 2)
      FMK_FOR (k, P) interleave(sum[k]);
    epilogue.run(sum);
  }

#if FMK_BF16_DOT
  // From the weight of depthwise bf16: the words (tap, the tap below it).
  void pair_taps() {
    const int64_t row = p.x.taps * padded, n = (p.y.taps - 1) * row;
    auto* to = static_cast<Bf16Pair*>(scratch_bytes(Scratch::kPanel, n * sizeof(Bf16Pair)));
    const auto* from = static_cast<const A*>(p.weight);
    for (int64_t i = 0; i < n; i += V::W) {
      const auto bits = [&](int64_t at) FMK_LAMBDA {
        return _mm512_cvtepu16_epi32(narrow_bf16(load(from + at)));
      };
      _mm512_storeu_si512(to + i, _mm512_or_si512(bits(i), _mm512_slli_epi32(bits(i + row), 16)));
    }
    paired_taps = to;
  }
  // The kernel's rows [*ty, end) but for a last one without a fellow: two of them by one dot
  // product of pairs.
  template <int P, int kTaps, int kStride, bool kInside>
  FMK_LAMBDA void multiply_pairs(const T* image, int64_t y, int64_t first, int64_t channel,
                                 int64_t end, int64_t* ty, V (&sum)[P][2]) const {
    for (; *ty + 2 <= end; *ty += 2) {
      const T* upper = image + (p.y.position(y, *ty) * p.x.in_size + first) * channels;
      const T* lower = upper + p.y.step * p.x.in_size * channels;
      const Bf16Pair* words = paired_taps + *ty * kTaps * padded + channel;
      V factor[kTaps][2];
      FMK_FOR (tap, kTaps)
        load_run_of_factors(reinterpret_cast<const A*>(words + tap * padded), factor[tap]);
      FMK_FOR (column, (P - 1) * kStride + kTaps) {
        const T *above = upper, *below = lower;
        upper = opaque(upper + channels), lower = opaque(lower + channels);
        if (!kInside && (first + column < 0 || first + column >= p.x.in_size)) continue;
        const __m512i a = _mm512_loadu_si512(above), b = _mm512_loadu_si512(below);
        const V x{_mm512_castsi512_ps(_mm512_unpacklo_epi16(a, b))};
        const V z{_mm512_castsi512_ps(_mm512_unpackhi_epi16(a, b))};
        FMK_FOR (i, P) {
          const int tap = column - i * kStride;
          if (tap >= 0 && tap < kTaps) {
            sum[i][0] = dot2(sum[i][0], x, factor[tap][0]);
            sum[i][1] = dot2(sum[i][1], z, factor[tap][1]);
          }
        }
      }
    }
  }
#endif

  template <int P, int N, int kTaps, int kStride, bool kInside>
  FMK_LAMBDA void multiply(const T* image, int64_t y, int64_t x, int64_t channel,
                           V (&sum)[P][N]) const {
    FMK_FOR (i, P)
      FMK_FOR (n, N) sum[i][n] = zero<V>();
    // Known to the compiler, or it would load all values ahead of a loop over the words.
    const int64_t words = kDepthwise ? 1 : group_words, tap_step = words * padded;
    const Factor* weight = weights + channel;
    const int64_t first = x * kStride + p.x.offset;
    // The rows of the kernel that lie on the image.
    int64_t ty = 0, end = p.y.taps;
    while (ty < end && p.y.position(y, ty) < 0) ++ty;
    while (ty < end && p.y.position(y, end - 1) >= p.y.in_size) --end;
#if FMK_BF16_DOT
    if constexpr (kDepthwise && N == 2)
      multiply_pairs<P, kTaps, kStride, kInside>(image, y, first, channel, end, &ty, sum);
#endif
    for (weight += ty * kTaps * tap_step; ty < end; ++ty, weight += kTaps * tap_step) {
      const int64_t in_y = p.y.position(y, ty);
      const T* row = image + (in_y * p.x.in_size + first) * channels;
      for (int64_t word = 0; word < words; ++word) {
        const Factor* factors = weight + word * padded;
        V factor[kTaps][N];
        FMK_FOR (tap, kTaps) {
          if constexpr (kDepthwise)
            load_run_of_factors(factors + tap * tap_step, factor[tap]);
          else
            factor[tap][0] = M::load_words(factors + tap * tap_step);
        }
        const T* from = row;
        FMK_FOR (column, (P - 1) * kStride + kTaps) {
          // Addresses one from the other: as many as there are columns would not stay in registers.
          const T* at = kDepthwise ? from : row + column * channels;
          if constexpr (kDepthwise) from = opaque(from + channels);
          if (!kInside && (first + column < 0 || first + column >= p.x.in_size)) continue;
          V value[N];
          if constexpr (kDepthwise)
            load_run(at, value);
          else
            value[0] = permute(pin(load_words_of_groups(at)), lanes_of[word]);
          FMK_FOR (i, P) {
            const int tap = column - i * kStride;
            if (tap >= 0 && tap < kTaps)
              FMK_FOR (n, N) sum[i][n] = M::mac(sum[i][n], value[n], factor[tap][n]);
          }
        }
      }
    }
    if constexpr (kInside) {
      // The strip's next rows, which nothing has touched yet: many pixels by turns are no stream to
      // the hardware.
      FMK_FOR (i, kStride) {
        const int64_t fresh = min_of(p.y.in_size - 1, p.y.position(y + 1, p.y.taps - 1) - i);
        const T* next = image + (fresh * p.x.in_size + first) * channels;
        FMK_FOR (j, (P - 1) * kStride + kTaps) {
          __builtin_prefetch(next);
          next = opaque(next + channels);
        }
      }
    }
  }
};

}  // namespace fmk::FMK_ISA
