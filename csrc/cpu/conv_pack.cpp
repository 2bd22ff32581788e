// Packing of convolution weights for the correlation kernel.

#include "cpu/conv_internal.h"

namespace fmk::FMK_ISA {
namespace {

// The line-th row of taps of the view, counted over its planes, as a row of the kernel.
template <class T>
FMK_INLINE int64_t tap_row(const WeightView<T>& w, int64_t line) {
  const int64_t tz = line / w.y.count, ty = line - tz * w.y.count;
  return (w.z.first + tz * w.z.step) * w.kernel_h + w.y.first + ty * w.y.step;
}

// Sixteen columns of a forward weight, whose taps and input channels lie side by side: blocks are
// turned in registers.
#if defined(__AVX512F__)
void pack_columns_f32(const float* src, int64_t column_stride, int64_t channels, int64_t taps,
                      float* dst, int64_t width) {
  const int64_t length = channels * taps;
  alignas(64) float turned[16][16];
  int64_t channel = 0, tap = 0, i = 0;
  for (; i + 16 <= length; i += 16) {
    transpose_16x16(src + i, column_stride, &turned[0][0], 16);
    for (int j = 0; j < 16; ++j) {
      store(dst + (tap * channels + channel) * width, load(turned[j]));
      if (++tap == taps) tap = 0, ++channel;
    }
  }
  for (; i < length; ++i) {
    float* to = dst + (tap * channels + channel) * width;
    for (int j = 0; j < 16; ++j) to[j] = src[j * column_stride + i];
    if (++tap == taps) tap = 0, ++channel;
  }
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
  if constexpr (sizeof(T) == 4) {
    const int64_t taps = w.taps();
    const bool whole =
        taps == w.reduction_stride && w.z.first == 0 && w.y.first == 0 && w.x.first == 0;
    if (whole && valid == W && !w.reduction_scale)
      return pack_columns_f32(src, w.column_stride, w.reduction, taps, dst, width);
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
