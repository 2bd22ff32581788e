// Correlations of groups of few channels, or of images of few channels, over NCHW images.
#pragma once

#include <type_traits>

#include "cpu/conv_stage.h"

namespace fmk::FMK_ISA {

// The even lanes of a and b, one after the other, and the odd ones.
#if defined(__AVX512F__)
FMK_INLINE void deinterleave(VecF a, VecF b, VecF* even, VecF* odd) {
  const __m512i two = _mm512_set1_epi32(2),
                lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i first = _mm512_mullo_epi32(lanes, two);
  *even = {_mm512_permutex2var_ps(a.v, first, b.v)};
  *odd = {_mm512_permutex2var_ps(a.v, _mm512_add_epi32(first, _mm512_set1_epi32(1)), b.v)};
}
#elif defined(__AVX2__)
FMK_INLINE VecF in_order(__m256 x) {  // quarters 0, 2, 1, 3
  return {_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xd8))};
}
FMK_INLINE void deinterleave(VecF a, VecF b, VecF* even, VecF* odd) {
  *even = in_order(_mm256_shuffle_ps(a.v, b.v, 0x88));
  *odd = in_order(_mm256_shuffle_ps(a.v, b.v, 0xdd));
}
#else
FMK_INLINE void deinterleave(VecF a, VecF b, VecF* even, VecF* odd) {
  *even = {Floats{a.v[0], a.v[2], b.v[0], b.v[2]}};
  *odd = {Floats{a.v[1], a.v[3], b.v[1], b.v[3]}};
}
#endif

// The i-th number of a word.
FMK_INLINE float number_of(const float* word, int64_t) { return *word; }
FMK_INLINE double number_of(const double* word, int64_t) { return *word; }
FMK_INLINE float number_of(const Bf16Pair* word, int64_t i) {
  return to_float(i == 0 ? word->low : word->high);
}

// A vector of words from neighbouring pixels of one plane, or of two where words are pairs and
// there is a second one, `plane` numbers on.
template <class T, class A>
FMK_INLINE Vec<T> load_plane_words(const T* p, int64_t, bool, const A*) {
  return load(p);
}
template <class T, class A>
FMK_INLINE void make_plane_word(const T* p, int64_t, bool, A* word) {
  *word = widen(*p);
}
#if FMK_BF16_DOT
FMK_INLINE VecF load_plane_words(const bf16* p, int64_t plane, bool both, const Bf16Pair*) {
  return {plane_pairs(p, plane, both, VecF::W)};
}
FMK_INLINE void make_plane_word(const bf16* p, int64_t plane, bool both, Bf16Pair* word) {
  *word = {p[0], both ? p[plane] : bf16{}};
}
#endif

// NCHW: vectors hold neighbouring outputs of a row. The input rows under a row of outputs are kept
// in a ring with their padding in place, cut into as many phases as the stride has, so that what a
// tap adds to a vector of outputs is one vector. Rows are those of channels, or of the pairs of
// channels that M multiplies.
template <class T, class M>
struct PlaneRows {
  using V = Vec<T>;
  using A = Acc<T>;
  using D = typename M::Word;
  static constexpr int kPair = M::kPair;
  static constexpr int kMaxVecs = 4;
  // Output channels that share what is loaded of the rows, of as many vectors as there are
  // registers for.
  static constexpr int kTogether = 4;
#if defined(__AVX512F__)
  static constexpr int kMostTogether = 8, kSharedVecs = 3, kSharedVecsOfFew = 4;
#else
  static constexpr int kMostTogether = 4, kSharedVecs = 3, kSharedVecsOfFew = 3;
#endif
  const Correlation<T>& p;
  bool depthwise;
  bool clamps;    // of the epilogue, no more than scale, shift and a clamp is there
  int64_t words;  // of a group's channels
  int together;   // output channels that are computed at a time, if a group has as many
  int64_t ring, phase, row_length;  // rows of a word; words of a phase and of a row
  int64_t group_rows;

  explicit PlaneRows(const Correlation<T>& problem) : p(problem) {
    depthwise = p.channels == 1 && p.out_channels == 1;
    clamps = p.activation <= Activation::kRelu6 && !p.residual && !p.preactivation;
    words = ceil_div(p.channels, int64_t{kPair});
    together = p.out_channels < kMostTogether ? kTogether : kMostTogether;
    ring = (p.y.taps - 1) * p.y.step + 1;
    // Whole vectors are read.
    phase =
        ceil_div(p.x.out_size, int64_t{V::W}) * V::W + (p.x.taps - 1) * p.x.step / p.x.stride + 1;
    row_length = phase * p.x.stride;
    group_rows = ring * words;
  }

  // Output rows [y0, y1) of a group of an image.
  void run(int64_t image, int64_t group, int64_t y0, int64_t y1) const {
    const int64_t products = words * p.y.taps * p.x.taps;  // per output
    const int64_t row_taps = words * p.y.taps;
    const int64_t numbers = (group_rows + 1) * row_length + products * p.out_channels;
    auto* memory = static_cast<char*>(
        scratch_bytes(Scratch::kRows, (row_taps + p.x.taps) * sizeof(void*) + numbers * sizeof(D)));
    auto** under = reinterpret_cast<const D**>(memory);           // [word][tap_y]: the input row
    auto* shifts = reinterpret_cast<int64_t*>(under + row_taps);  // [tap_x], within a row
    auto* rows = reinterpret_cast<D*>(shifts + p.x.taps);
    D *zeros = rows + group_rows * row_length, *weights = zeros + row_length;
    std::memset(static_cast<void*>(rows), 0, (group_rows + 1) * row_length * sizeof(D));
    gather_weights(group, weights);
    for (int64_t tap = 0; tap < p.x.taps; ++tap)
      shifts[tap] = tap * p.x.step % p.x.stride * phase + tap * p.x.step / p.x.stride;
    const int64_t in_plane = p.y.in_size * p.x.in_size;
    const T* from = p.input + (image * p.groups + group) * p.channels * in_plane;
    int64_t staged = -1;  // input rows before this are in the ring
    int64_t first = 0;    // slot of the ring for the first row under the outputs
    for (int64_t y = y0; y < y1; ++y) {
      const int64_t top = p.y.position(y, 0), end = min_of(p.y.in_size, top + ring);
      const auto slot = [&](int64_t row) {  // of one of the `ring` rows from top on
        const int64_t at = first + row - top;
        return (at < ring ? at : at - ring) * row_length;
      };
      for (int64_t c = 0; c < words; ++c) {
        D* ring_rows = rows + c * ring * row_length;
        const bool both = c * kPair + 1 < p.channels;
        for (int64_t row = max_of(max_of<int64_t>(0, top), staged); row < end; ++row)
          stage(from + c * kPair * in_plane + row * p.x.in_size, in_plane, both,
                ring_rows + slot(row));
        for (int64_t ty = 0; ty < p.y.taps; ++ty) {
          const int64_t row = top + ty * p.y.step;
          const bool inside = row >= 0 && row < p.y.in_size;
          under[c * p.y.taps + ty] = inside ? ring_rows + slot(row) : zeros;
        }
      }
      staged = max_of(staged, top + ring);
      for (first += p.y.stride; first >= ring;) first -= ring;
      for (int64_t k = 0; k < p.out_channels;) {
        const int64_t channel = group * p.out_channels + k;
        const int64_t plane = image * p.groups * p.out_channels + channel;
        const Row row{under, row_taps, shifts, weights + k * products, channel};
        const int64_t out = (plane * p.y.out_size + y) * p.x.out_size;
        if (k < shared_channels()) {
          if (together == kTogether)
            multiply_together<kTogether, kSharedVecsOfFew>(row, out);
          else
            multiply_together<kMostTogether, kSharedVecs>(row, out);
          k += together;
        } else {
          multiply_row(row, out);
          ++k;
        }
      }
    }
  }

 private:
  // What one row of one output channel is made of.
  struct Row {
    const D* const* under;
    int64_t row_taps;
    const int64_t* shifts;
    const D* weights;
    int64_t channel;
  };

  // Output channels of a group before this are computed `together` at a time.
  int64_t shared_channels() const {
    return sizeof(A) == sizeof(float) ? p.out_channels / together * together : 0;
  }

  // Of a group, as [out channel][word][tap_y][tap_x]; of channels that are computed together as
  // [word][tap_y][tap_x][out channel].
  void gather_weights(int64_t group, D* to) const {
    const int64_t taps = p.y.taps * p.x.taps, length = taps * words;
    if constexpr (std::is_same_v<D, A>) {
      if (depthwise) {
        const auto* from = static_cast<const A*>(p.weight);
        const int64_t padded = ceil_div(p.groups, int64_t{V::W}) * V::W;
        for (int64_t tap = 0; tap < taps; ++tap) to[tap] = from[tap * padded + group];
        return;
      }
    }
    constexpr int kPacked = Mac<T>::kPair;
    const int64_t packed_words = words_of<T>(p.channels);
    const auto split = panel_split<T>(p.groups, p.out_channels, p.channels, taps);
    const auto* from = static_cast<const Word<T>*>(p.weight) +
                       group * split.padded_columns() * taps * packed_words;
    for (int64_t panel = 0; panel < split.count; ++panel) {
      const int64_t column = split.column(panel), width = split.width_vecs(panel) * V::W;
      for (int64_t k = column; k < min_of(p.out_channels, column + width); ++k) {
        const bool alone = k >= shared_channels();
        const int64_t step = alone ? 1 : together;
        D* at = to + (alone ? k : k / together * together) * length + (alone ? 0 : k % together);
        const auto* panel_column = from + column * taps * packed_words + k - column;
        for (int64_t c = 0; c < words; ++c)
          for (int64_t tap = 0; tap < taps; ++tap, at += step) {
            const int64_t packed = c * kPair / kPacked;
            const auto* word = panel_column + (tap * packed_words + packed) * width;
            if constexpr (kPair == kPacked)
              *at = *word;
            else
              *at = number_of(word, c % kPacked);
          }
      }
    }
  }

  // An input row, and its fellow in the next plane, to their place behind the padding.
  void stage(const T* from, int64_t plane, bool both, D* to) const {
    const int64_t first = -p.x.offset, stride = p.x.stride;
    const int64_t count = min_of(p.x.in_size, p.x.span() - first);
    const auto words_at = [&](int64_t x)
                              FMK_LAMBDA { return load_plane_words(from + x, plane, both, to); };
    const auto put_words = [](D* at, V value)
                               FMK_LAMBDA { store(reinterpret_cast<A*>(at), value); };
    int64_t x = 0;
    if (stride == 1) {
      if constexpr (kPair == 1) return convert(from, to + first, count);
      for (; x + V::W <= count; x += V::W) put_words(to + first + x, words_at(x));
      for (; x < count; ++x) make_plane_word(from + x, plane, both, to + first + x);
      return;
    }
    // stride 2: pixels 0, 2, ... and 1, 3, ... go to one phase each.
    D* even = to + first % 2 * phase + first / 2;
    D* odd = to + (first + 1) % 2 * phase + (first + 1) / 2;
    if constexpr (sizeof(A) == sizeof(float)) {
      for (; x + 2 * V::W <= count; x += 2 * V::W, even += V::W, odd += V::W) {
        V low, high;
        deinterleave(words_at(x), words_at(x + V::W), &low, &high);
        put_words(even, low);
        put_words(odd, high);
      }
    }
    for (; x < count; ++x) make_plane_word(from + x, plane, both, (x % 2 ? odd : even)++);
  }

  // K channels: the first one's row to the output from `out` on.
  template <int K, int kMost>
  void multiply_together(const Row& row, int64_t out) const {
    const int64_t vecs = ceil_div(p.x.out_size, int64_t{V::W});
    const auto split = EvenSplit::of(vecs, ceil_div(vecs, int64_t{kMost}));
    for (int64_t vec = 0, i = 0; vec < vecs; vec += split.size(i++)) {
      const int64_t x = vec * V::W;
      switch (split.size(i)) {
        case 1: multiply_tile<K, 1>(row, x, out + x); break;
        case 2: multiply_tile<K, 2>(row, x, out + x); break;
        case 3: multiply_tile<K, 3>(row, x, out + x); break;
        default: multiply_tile<K, kMost>(row, x, out + x);
      }
    }
  }
  template <int K, int NV>
  FMK_NOINLINE void tile(const PlaneRows& self, const Row& at, int64_t x, int64_t out) {
    const Correlation<T>& p = self.p;
    const int64_t plane = p.y.out_size * p.x.out_size, taps = p.x.taps;
    FMK_FOR (k, K)
      FMK_FOR (j, NV) __builtin_prefetch(p.output + out + k * plane + j * V::W, 1);
    V sum[K][NV];
    FMK_FOR (k, K)
      FMK_FOR (j, NV) sum[k][j] = zero<V>();
    const D* weight = at.weights;
    for (int64_t i = 0; i < at.row_taps; ++i) {
      const D* row = at.under[i] + x;
      for (int64_t tx = 0; tx < taps; ++tx, weight += K) {
        const D* from = row + at.shifts[tx];
        V value[NV];
        FMK_FOR (j, NV) value[j] = pin(M::load_words(from + j * V::W));
        FMK_FOR (k, K) {
          const V factor = M::splat_word(weight + k);
          FMK_FOR (j, NV) sum[k][j] = M::mac(sum[k][j], factor, value[j]);
        }
      }
    }
    const int64_t columns = min_of<int64_t>(NV * V::W, p.x.out_size - x);
    if (self.clamps) {
      constexpr A kInfinity = static_cast<A>(__builtin_inf());
      const V low = splat(p.activation != Activation::kNone ? A(0) : -kInfinity);
      const V high = splat(p.activation == Activation::kRelu6 ? A(6) : kInfinity);
      FMK_FOR (k, K) {
        const V scale = p.scale ? splat(p.scale[at.channel + k]) : splat_as<V>(1);
        const V shift = p.shift ? splat(p.shift[at.channel + k]) : zero<V>();
        FMK_FOR (j, NV)
          put(p.output + out + k * plane + j * V::W,
              min(high, max(low, fma(sum[k][j], scale, shift))),
              static_cast<int>(min_of<int64_t>(V::W, columns - j * V::W)));
      }
      return;
    }
    V done[K][NV];
    FMK_FOR (k, K)
      FMK_FOR (j, NV) done[k][j] = sum[k][j];
    for (int k = 0; k < K; ++k)
      finish_row(self, done[k], NV, at.channel + k, columns, out + k * plane);
  }
  template <int K, int NV>
  void multiply_tile(const Row& at, int64_t x, int64_t out) const {
    tile<K, NV>(*this, at, x, out);
  }

  // To the output from `out` on.
  void multiply_row(const Row& row, int64_t out) const {
    for (int64_t x = 0; x < p.x.out_size; x += kMaxVecs * V::W) {
      const int64_t columns = min_of<int64_t>(kMaxVecs * V::W, p.x.out_size - x);
      switch (ceil_div(columns, int64_t{V::W})) {
        case 1: multiply<1>(row, x, columns, out + x); break;
        case 2: multiply<2>(row, x, columns, out + x); break;
        case 3: multiply<3>(row, x, columns, out + x); break;
        default: multiply<4>(row, x, columns, out + x);
      }
    }
  }
  template <int NV>
  void multiply(const Row& at, int64_t x, int64_t columns, int64_t out) const {
    V sum[NV];
    FMK_FOR (j, NV) sum[j] = zero<V>();
    const D* weight = at.weights;
    for (int64_t i = 0; i < at.row_taps; ++i) {
      const D* row = at.under[i] + x;
      for (int64_t tx = 0; tx < p.x.taps; ++tx) {
        const D* from = row + at.shifts[tx];
        const V factor = M::splat_word(weight++);
        FMK_FOR (j, NV) sum[j] = M::mac(sum[j], factor, M::load_words(from + j * V::W));
      }
    }
    V done[NV];
    FMK_FOR (j, NV) done[j] = sum[j];
    finish_row(*this, done, NV, at.channel, columns, out);
  }
  FMK_NOINLINE void finish_row(const PlaneRows& self, const V* sum, int vecs, int64_t channel,
                               int64_t columns, int64_t out) {
    const Correlation<T>& p = self.p;
    const V scale = p.scale ? splat(p.scale[channel]) : splat_as<V>(1);
    const V shift = p.shift ? splat(p.shift[channel]) : zero<V>();
    for (int j = 0; j < vecs; ++j) {
      const int lanes = static_cast<int>(min_of<int64_t>(V::W, columns - j * V::W));
      const int64_t to = out + j * V::W;
      V z = fma(sum[j], scale, shift);
      if (p.residual) z = z + load(p.residual + to, lanes);
      if (p.preactivation) put(p.preactivation + to, z, lanes);
      put(p.output + to, activate(p.activation, z), lanes);
    }
  }
  static void put(T* to, V value, int lanes) {
    if (lanes == V::W)
      store(to, value);
    else
      store(to, value, lanes);
  }
};

}  // namespace fmk::FMK_ISA
