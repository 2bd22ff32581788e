// Packing of convolution weights for the correlation kernel.

#include "cpu/conv_turn.h"

namespace fmk::FMK_ISA {
namespace {

// The line-th row of taps of the view, counted over its planes, as a row of the kernel.
template <class T>
FMK_INLINE int64_t tap_row(const WeightView<T>& w, int64_t line) {
  const int64_t tz = line / w.y.count, ty = line - tz * w.y.count;
  return (w.z.first + tz * w.z.step) * w.kernel_h + w.y.first + ty * w.y.step;
}

#if defined(__AVX512F__)
// Reduction channels times taps that are turned at a time: 16 KB, half of an L1 cache.
constexpr int64_t kTurned = 256;

// Sixteen words from two rows of numbers; a type without pairs has no second one.
FMK_INLINE void store_turned(VecF x, VecF, float* to) { store(to, x); }
#if FMK_BF16_DOT
FMK_INLINE void store_turned(VecF x, VecF y, Bf16Pair* to) {
  const auto round = [](VecF v) FMK_LAMBDA {
    alignas(32) bf16 rounded[16];
    store(rounded, v);
    return _mm512_cvtepu16_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(rounded)));
  };
  _mm512_storeu_si512(to, _mm512_or_si512(round(x), _mm512_slli_epi32(round(y), 16)));
}
#endif

// pack_vector() by blocks that are turned in registers; false, with nothing done, for very many
// taps.
template <class T>
bool pack_turned(const WeightView<T>& w, const T* src, const Acc<T>* scale, int64_t valid,
                 Word<T>* dst, int64_t width) {
  constexpr int kPair = Mac<T>::kPair;
  const int64_t taps = w.reduction_stride < w.column_stride ? w.reduction_stride : w.column_stride;
  const int64_t words = words_of<T>(w.reduction);
  const int64_t run = min_of<int64_t>(16, kTurned / max_of<int64_t>(1, taps)) / kPair * kPair;
  if (run == 0) return false;
  // The last block of taps is turned whole.
  alignas(64) float numbers[kTurned + 16][16];
  for (int64_t first = 0; first < w.reduction; first += run, src += run * w.reduction_stride) {
    const int64_t channels = min_of(run, w.reduction - first);
    turn_columns(w, src, taps, channels, valid, numbers);
    for (int64_t channel = 0; channel < channels; channel += kPair) {
      const bool both = kPair == 2 && channel + 1 < channels;
      const VecF factor = splat(scale ? scale[first + channel] : 1.0f);
      const VecF factor2 = splat(scale && both ? scale[first + channel + 1] : 1.0f);
      Word<T>* to = dst + (first + channel) / kPair * width;
      for (int64_t line = 0; line < w.z.count * w.y.count; ++line) {
        const int64_t row = channel * taps + tap_row(w, line) * w.kernel_w + w.x.first;
        for (int64_t tx = 0; tx < w.x.count; ++tx, to += words * width) {
          const int64_t at = row + tx * w.x.step;
          const VecF second = both ? load(numbers[at + taps]) * factor2 : zero<VecF>();
          store_turned(load(numbers[at]) * factor, second, to);
        }
      }
    }
  }
  return true;
}
#endif

// One vector's worth of columns, from `column` of a group on, of which `valid` exist.
template <class T>
void pack_vector(const WeightView<T>& w, int64_t group, int64_t column, int64_t valid, Word<T>* dst,
                 int64_t width) {
  constexpr int W = Vec<T>::W;
  constexpr int kPair = Mac<T>::kPair;
  const int64_t words = words_of<T>(w.reduction);
  const T* src = w.data + group * w.group_stride + column * w.column_stride;
#if defined(__AVX512F__)
  if constexpr (sizeof(Acc<T>) == sizeof(float)) {
    const Acc<T>* scale = w.reduction_scale ? w.reduction_scale + group * w.reduction : nullptr;
    if (pack_turned(w, src, scale, valid, dst, width)) return;
  }
#endif
  for (int64_t word = 0; word < words; ++word) {
    const int64_t first = word * kPair;
    const bool both = kPair == 2 && first + 1 < w.reduction;
    Acc<T> scale[2] = {1, 1};
    if (w.reduction_scale) {
      scale[0] = w.reduction_scale[group * w.reduction + first];
      if (both) scale[1] = w.reduction_scale[group * w.reduction + first + 1];
    }
    for (int64_t i = 0; i < W; ++i) {
      Word<T>* to = dst + word * width + i;
      const T* from = src + first * w.reduction_stride + i * w.column_stride;
      for (int64_t line = 0; line < w.z.count * w.y.count; ++line) {
        const T* row = from + tap_row(w, line) * w.kernel_w;
        for (int64_t tx = 0; tx < w.x.count; ++tx, to += words * width) {
          if (i >= valid) {
            make_word(to, 0, 0);
            continue;
          }
          const T* p = row + w.x.first + tx * w.x.step;
          make_word(to, widen(p[0]) * scale[0],
                    both ? widen(p[w.reduction_stride]) * scale[1] : Acc<T>(0));
        }
      }
    }
  }
}

template <class T>
void pack_depthwise(const WeightView<T>& w, Acc<T>* dst) {
  const int64_t width = ceil_div(w.groups, Vec<T>::W) * Vec<T>::W;
  for (int64_t line = 0; line < w.z.count * w.y.count; ++line)
    for (int64_t tx = 0; tx < w.x.count; ++tx, dst += width) {
      const T* tap = w.data + tap_row(w, line) * w.kernel_w + w.x.first + tx * w.x.step;
      for (int64_t group = 0; group < w.groups; ++group)
        dst[group] = widen(tap[group * w.group_stride]) *
                     (w.reduction_scale ? w.reduction_scale[group] : Acc<T>(1));
      for (int64_t group = w.groups; group < width; ++group) dst[group] = 0;
    }
}

}  // namespace

template <class T>
size_t packed_correlation_bytes(const WeightView<T>& w) {
  const int64_t taps = w.taps();
  if (w.depthwise())
    return static_cast<size_t>(taps * ceil_div(w.groups, Vec<T>::W) * Vec<T>::W) * sizeof(Acc<T>);
  return static_cast<size_t>(w.groups * packed_words<T>(w.columns, 1) * taps *
                             words_of<T>(w.reduction)) *
         sizeof(Word<T>);
}

template <class T>
void pack_correlation_weight(const WeightView<T>& w, void* packed, const Parallel& pool) {
  if (w.depthwise()) return pack_depthwise(w, static_cast<Acc<T>*>(packed));
  using V = Vec<T>;
  const auto split = panel_split<T>(w.groups, w.columns, w.reduction, w.taps());
  const int64_t length = w.taps() * words_of<T>(w.reduction);
  const int64_t units = w.groups * split.vecs;
  const int64_t shards = units * length * V::W < 32768 ? 1 : min_of<int64_t>(pool.threads, units);
  parallel_for(pool, shards, [&](int64_t shard) {
    for (int64_t unit = units * shard / shards; unit < units * (shard + 1) / shards; ++unit) {
      const int64_t group = unit / split.vecs, vec = unit % split.vecs;
      int64_t panel = 0;
      while (split.first_vec(panel + 1) <= vec) ++panel;
      auto* dst = static_cast<Word<T>*>(packed) +
                  (group * split.padded_columns() + split.column(panel)) * length +
                  (vec - split.first_vec(panel)) * V::W;
      pack_vector(w, group, vec * V::W, min_of<int64_t>(V::W, w.columns - vec * V::W), dst,
                  split.width_vecs(panel) * V::W);
    }
  });
}

#define FMK_INSTANTIATE(T)                                        \
  template size_t packed_correlation_bytes(const WeightView<T>&); \
  template void pack_correlation_weight(const WeightView<T>&, void*, const Parallel&);
FMK_INSTANTIATE(float)
FMK_INSTANTIATE(bf16)
FMK_INSTANTIATE(f16)
FMK_INSTANTIATE(double)
#undef FMK_INSTANTIATE

}  // namespace fmk::FMK_ISA
