#include "cpu/conv_small_groups.h"

#include <type_traits>

#include "cpu/conv_stream.h"

namespace fmk::FMK_ISA {
namespace {

constexpr int64_t kMaxGroupChannels = 8;
constexpr int64_t kMomentPixels = 64;      // gathered at a time
constexpr double kSerialProducts = 2.5e5;  // about 20 us of one core, as for kSerialFlops

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

// NHWC: vectors hold channels, of several groups if need be. A block of kPixels neighbouring
// outputs takes every input vector of a kernel row once, and from it, for each channel of a group,
// the lanes that the outputs' lanes multiply.
template <class T, bool kDepthwise>
struct PixelRows {
  using V = Vec<T>;
  using A = Acc<T>;
  static constexpr int kPixels = 8, kFewPixels = 4;
  const Correlation<T>& p;
  int64_t channels, padded;  // of all groups
  const A* weights;          // [tap_y][tap_x][channel of the group][padded]
  Epilogue<T> epilogue;
  bool clamps;   // of it, no more than scale, shift and a clamp is there
  bool streams;  // the output leaves the caches anyway: it is written past them, not read first
  int32_t lanes_of[kMaxGroupChannels][V::W];  // of a vector, for a channel of its groups

  explicit PixelRows(const Correlation<T>& problem) : p(problem) {
    channels = p.groups * p.channels;
    padded = ceil_div(channels, int64_t{V::W}) * V::W;
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
    weights = static_cast<const A*>(p.weight);
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
  // From the packed weight, [group][tap][channel][W].
  void gather_weights() {
    const int64_t length = p.y.taps * p.x.taps * p.channels;
    auto* to = static_cast<A*>(scratch_bytes(Scratch::kPanel, length * padded * sizeof(A)));
    std::memset(static_cast<void*>(to), 0, length * padded * sizeof(A));
    const auto* from = static_cast<const A*>(p.weight);
    for (int64_t group = 0; group < p.groups; ++group)
      for (int64_t i = 0; i < length; ++i, from += V::W)
        for (int64_t k = 0; k < p.channels; ++k) to[i * padded + group * p.channels + k] = from[k];
    weights = to;
    for (int64_t c = 0; c < p.channels; ++c)
      for (int64_t lane = 0; lane < V::W; ++lane)
        lanes_of[c][lane] = static_cast<int32_t>(lane / p.channels * p.channels + c);
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
    const int64_t group_channels = kDepthwise ? 1 : p.channels, tap_step = group_channels * padded;
    const A* weight = weights + channel;
    const int64_t first = x * kStride + p.x.offset;
    for (int64_t ty = 0; ty < p.y.taps; ++ty, weight += kTaps * tap_step) {
      const int64_t in_y = p.y.position(y, ty);
      if (in_y < 0 || in_y >= p.y.in_size) continue;
      const T* row = image + (in_y * p.x.in_size + first) * channels;
      for (int64_t c = 0; c < group_channels; ++c) {
        const A* factors = weight + c * padded;
        const auto value_at = [&](int64_t column) FMK_LAMBDA {
          const V value = pin(load(row + column * channels));
          if constexpr (kDepthwise)
            return value;
          else
            return permute(value, lanes_of[c]);
        };
        V factor[kTaps];
        FMK_FOR (tap, kTaps) factor[tap] = load(factors + tap * tap_step);
        FMK_FOR (column, (P - 1) * kStride + kTaps) {
          if (!kInside && (first + column < 0 || first + column >= p.x.in_size)) continue;
          const V value = value_at(column);
          FMK_FOR (i, P) {
            const int tap = column - i * kStride;
            if (tap >= 0 && tap < kTaps) sum[i][0] = fma(value, factor[tap], sum[i][0]);
          }
        }
      }
    }
    if constexpr (kInside) {
      // The next block's part of the last row, which nothing has touched yet: many pixels by turns
      // are no stream to the hardware.
      const int64_t last = min_of(p.y.in_size - 1, p.y.position(y, p.y.taps - 1));
      const T* next = image + (last * p.x.in_size + first + P * kStride) * channels;
      FMK_FOR (i, P * kStride) __builtin_prefetch(next + (i + kTaps - kStride) * channels);
    }
  }
};

// NCHW: vectors hold neighbouring outputs of a row. The input rows under a row of outputs are kept
// in a ring with their padding in place, cut into as many phases as the stride has, so that what a
// tap adds to a vector of outputs is one vector.
template <class T>
struct PlaneRows {
  using V = Vec<T>;
  using A = Acc<T>;
  static constexpr int kMaxVecs = 4;
  const Correlation<T>& p;
  bool depthwise;
  int64_t ring, phase, row_length;  // rows of a channel; numbers of a phase and of a row
  int64_t group_rows;

  explicit PlaneRows(const Correlation<T>& problem) : p(problem) {
    depthwise = p.channels == 1 && p.out_channels == 1;
    ring = (p.y.taps - 1) * p.y.step + 1;
    // Whole vectors are read.
    phase =
        ceil_div(p.x.out_size, int64_t{V::W}) * V::W + (p.x.taps - 1) * p.x.step / p.x.stride + 1;
    row_length = phase * p.x.stride;
    group_rows = ring * p.channels;
  }

  void run(int64_t image, int64_t group) const {
    const int64_t products = p.channels * p.y.taps * p.x.taps;  // per output
    const int64_t row_taps = p.channels * p.y.taps;
    const int64_t numbers = (group_rows + 1) * row_length + products * p.out_channels;
    auto* memory = static_cast<char*>(
        scratch_bytes(Scratch::kRows, (row_taps + p.x.taps) * sizeof(void*) + numbers * sizeof(A)));
    auto** under = reinterpret_cast<const A**>(memory);           // [channel][tap_y]: the input row
    auto* shifts = reinterpret_cast<int64_t*>(under + row_taps);  // [tap_x], within a row
    auto* rows = reinterpret_cast<A*>(shifts + p.x.taps);
    A *zeros = rows + group_rows * row_length, *weights = zeros + row_length;
    std::memset(static_cast<void*>(rows), 0, (group_rows + 1) * row_length * sizeof(A));
    gather_weights(group, weights);
    for (int64_t tap = 0; tap < p.x.taps; ++tap)
      shifts[tap] = tap * p.x.step % p.x.stride * phase + tap * p.x.step / p.x.stride;
    const int64_t in_plane = p.y.in_size * p.x.in_size;
    const T* from = p.input + (image * p.groups + group) * p.channels * in_plane;
    int64_t staged = -1;  // input rows before this are in the ring
    int64_t first = 0;    // slot of the ring for the first row under the outputs
    for (int64_t y = 0; y < p.y.out_size; ++y) {
      const int64_t top = p.y.position(y, 0), end = min_of(p.y.in_size, top + ring);
      const auto slot = [&](int64_t row) {  // of one of the `ring` rows from top on
        const int64_t at = first + row - top;
        return (at < ring ? at : at - ring) * row_length;
      };
      for (int64_t c = 0; c < p.channels; ++c) {
        A* ring_rows = rows + c * ring * row_length;
        for (int64_t row = max_of(max_of<int64_t>(0, top), staged); row < end; ++row)
          stage(from + c * in_plane + row * p.x.in_size, ring_rows + slot(row));
        for (int64_t ty = 0; ty < p.y.taps; ++ty) {
          const int64_t row = top + ty * p.y.step;
          const bool inside = row >= 0 && row < p.y.in_size;
          under[c * p.y.taps + ty] = inside ? ring_rows + slot(row) : zeros;
        }
      }
      staged = max_of(staged, top + ring);
      for (first += p.y.stride; first >= ring;) first -= ring;
      for (int64_t k = 0; k < p.out_channels; ++k) {
        const int64_t channel = group * p.out_channels + k;
        const int64_t plane = image * p.groups * p.out_channels + channel;
        const Row row{under, row_taps, shifts, weights + k * products, channel};
        multiply_row(row, (plane * p.y.out_size + y) * p.x.out_size);
      }
    }
  }

 private:
  // What one row of one output channel is made of.
  struct Row {
    const A* const* under;
    int64_t row_taps;
    const int64_t* shifts;
    const A* weights;
    int64_t channel;
  };

  // Of a group, as [out channel][channel][tap_y][tap_x].
  void gather_weights(int64_t group, A* to) const {
    const auto* from = static_cast<const A*>(p.weight);
    const int64_t taps = p.y.taps * p.x.taps;
    const int64_t padded = ceil_div(p.groups, int64_t{V::W}) * V::W;
    const int64_t width = ceil_div(p.out_channels, int64_t{V::W}) * V::W;  // of the only panel
    for (int64_t k = 0; k < p.out_channels; ++k)
      for (int64_t c = 0; c < p.channels; ++c)
        for (int64_t tap = 0; tap < taps; ++tap)
          *to++ = depthwise ? from[tap * padded + group]
                            : from[((group * taps + tap) * p.channels + c) * width + k];
  }

  // An input row to its place behind the padding.
  void stage(const T* from, A* to) const {
    const int64_t first = -p.x.offset, stride = p.x.stride;
    const int64_t count = min_of(p.x.in_size, p.x.span() - first);
    if (stride == 1) return convert(from, to + first, count);
    // stride 2: pixels 0, 2, ... and 1, 3, ... go to one phase each.
    A* even = to + first % 2 * phase + first / 2;
    A* odd = to + (first + 1) % 2 * phase + (first + 1) / 2;
    int64_t x = 0;
    if constexpr (sizeof(A) == sizeof(float)) {
      for (; x + 2 * V::W <= count; x += 2 * V::W, even += V::W, odd += V::W) {
        V low, high;
        deinterleave(load(from + x), load(from + x + V::W), &low, &high);
        store(even, low);
        store(odd, high);
      }
    }
    for (; x < count; ++x) *(x % 2 ? odd : even)++ = widen(from[x]);
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
    const A* weight = at.weights;
    for (int64_t i = 0; i < at.row_taps; ++i) {
      const A* row = at.under[i] + x;
      for (int64_t tx = 0; tx < p.x.taps; ++tx) {
        const A* from = row + at.shifts[tx];
        const V factor = splat(*weight++);
        FMK_FOR (j, NV) sum[j] = fma(load(from + j * V::W), factor, sum[j]);
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

template <class T, bool kDepthwise, int kTaps>
void run_pixels(const Correlation<T>& p, const Parallel& pool, int64_t threads) {
  const PixelRows<T, kDepthwise> work(p);
  const int64_t rows = p.batch * p.y.out_size, shards = min_of(threads, rows);
  parallel_for(pool, shards, [&](int64_t shard) {
    const int64_t end = rows * (shard + 1) / shards;
    int64_t gathered = rows * shard / shards;  // rows before this are in the moments
    for (int64_t row = gathered; row < end; ++row) {
      if (p.x.stride == 1)
        work.template run<kTaps, 1>(row);
      else
        work.template run<kTaps, 2>(row);
      const int64_t pixels = (row + 1 - gathered) * p.x.out_size;
      if (p.moments.wanted() && (pixels >= kMomentPixels || row + 1 == end)) {
        const int64_t first = gathered * p.x.out_size;
        p.moments.add(shard, 0, first, first + pixels, 0, p.groups * p.out_channels);
        gathered = row + 1;
      }
    }
    if (work.streams) stream_end();
  });
}

}  // namespace

template <class T>
bool correlate_small_groups(const Correlation<T>& p, const Parallel& pool) {
  using V = Vec<T>;
  const bool depthwise = p.channels == 1 && p.out_channels == 1;
  if (p.groups == 1 || p.channels > kMaxGroupChannels ||
      p.out_channels > min_of<int64_t>(kMaxGroupChannels, kPanelVecs * V::W))
    return false;
  if (p.pool.kernel_h || p.place_y.step != 1 || p.place_x.step != 1 || p.x.stride > 2 ||
      p.y.taps == 0 || p.x.taps == 0 || p.x.offset > 0 || p.y.in_size == 0 || p.x.in_size == 0)
    return false;
  // Pairs of numbers, of which other packed weights consist, would have to be taken apart.
  if (!depthwise && Mac<T>::kPair != 1) return false;
  const double products = static_cast<double>(p.batch * p.y.out_size * p.x.out_size * p.groups) *
                          static_cast<double>(p.channels * p.out_channels * p.y.taps * p.x.taps);
  const int64_t threads = products < kSerialProducts ? 1 : pool.threads;
  if (!p.channels_last) {
    const PlaneRows<T> rows(p);
    const int64_t units = p.batch * p.groups, shards = min_of(threads, units);
    parallel_for(pool, shards, [&](int64_t shard) {
      for (int64_t unit = units * shard / shards; unit < units * (shard + 1) / shards; ++unit) {
        const int64_t image = unit / p.groups, channel = unit % p.groups * p.out_channels;
        rows.run(image, unit % p.groups);
        if (p.moments.wanted())
          p.moments.add(shard, image, 0, p.y.out_size * p.x.out_size, channel,
                        channel + p.out_channels);
      }
    });
    return true;
  }
  // Wide filters and groups of several channels are worth their code in the types that are used.
  constexpr bool kCommon = sizeof(T) <= 4 && !std::is_same_v<T, f16>;
  if (p.x.step != 1 || p.groups * p.channels < V::W) return false;
  if (depthwise) {
    if (p.x.taps == 3) return run_pixels<T, true, 3>(p, pool, threads), true;
    if constexpr (kCommon) {
      if (p.x.taps == 5) return run_pixels<T, true, 5>(p, pool, threads), true;
      if (p.x.taps == 7) return run_pixels<T, true, 7>(p, pool, threads), true;
    }
  } else if constexpr (kCommon) {
    if (p.channels == p.out_channels && V::W % p.channels == 0 && p.x.taps == 3)
      return run_pixels<T, false, 3>(p, pool, threads), true;
  }
  return false;
}

template bool correlate_small_groups(const Correlation<float>&, const Parallel&);
template bool correlate_small_groups(const Correlation<bf16>&, const Parallel&);
template bool correlate_small_groups(const Correlation<f16>&, const Parallel&);
template bool correlate_small_groups(const Correlation<double>&, const Parallel&);

}  // namespace fmk::FMK_ISA
