// Max pooling on its own, and its gradient, which the convolution's backward pass uses as well.

#include <type_traits>

#include "cpu/conv_finish.h"
#include "cpu/conv_internal.h"
#include "cpu/reduce.h"

namespace fmk::FMK_ISA {
namespace {

constexpr int64_t kSerialElements = 65536;

// The rows of all images or planes, shared out: body(plane, row) for rows of `rows_per_plane`.
template <class Body>
void for_rows(int64_t planes, int64_t rows_per_plane, int64_t work, const Parallel& pool,
              const Body& body) {
  const int64_t rows = planes * rows_per_plane;
  const int64_t shards = work < kSerialElements ? 1 : min_of<int64_t>(pool.threads, rows);
  parallel_for(pool, shards, [&](int64_t shard) {
    for (int64_t row = rows * shard / shards; row < rows * (shard + 1) / shards; ++row)
      body(row / rows_per_plane, row % rows_per_plane);
  });
}

// One output row of a plane. `even` and `odd` hold the columns of an input row apart when windows
// start at every other one, so that neighbouring windows are neighbouring lanes.
template <class T>
void pool_plane_row(const PoolShape& s, const T* plane, int64_t height, int64_t width, int64_t row,
                    T* out, uint8_t* argmax, Acc<T>* columns) {
  using V = Vec<T>;
  using A = Acc<T>;
  const int64_t y0 = row * s.stride_h - s.padding_h;
  // The columns as if padded with -infinity, split by the residue of the stride: window position j
  // of output x lies at phase j' = j * dilation % stride, index x + j * dilation / stride.
  const int64_t span = (s.out_width - 1) * s.stride_w + (s.kernel_w - 1) * s.dilation_w + 1;
  const int64_t phase_length = ceil_div(span, s.stride_w) + V::W;
  const int64_t padded = ceil_div(s.out_width, V::W) * V::W;
  A* largest = columns + s.stride_w * phase_length;
  A* at = largest + padded;
  const V lowest = splat_as<V>(-__builtin_inf());
  bool first = true;
  int64_t first_i = 0;
  for (int64_t i = 0; i < s.kernel_h; ++i) {
    const int64_t y = y0 + i * s.dilation_h;
    if (y < 0 || y >= height) continue;
    const T* from = plane + y * width;
    if (s.stride_w == 1) {
      for (int64_t p = 0; p < span; ++p) {
        const int64_t x = p - s.padding_w;
        columns[p] = x < 0 || x >= width ? -__builtin_inf() : widen(from[x]);
      }
    } else {
      for (int64_t p = 0, phase = 0, index = 0; p < span; ++p) {
        const int64_t x = p - s.padding_w;
        columns[phase * phase_length + index] =
            x < 0 || x >= width ? -__builtin_inf() : widen(from[x]);
        if (++phase == s.stride_w) phase = 0, ++index;
      }
    }
    if (first) first_i = i;
    for (int64_t j = 0; j < s.kernel_w; ++j) {
      const int64_t shift = j * s.dilation_w;
      const A* values = columns + shift % s.stride_w * phase_length + shift / s.stride_w;
      const V here = splat(static_cast<A>(i * s.kernel_w + j));
      for (int64_t x = 0; x < padded; x += V::W) {
        const V value = load(values + x);
        const V old = first && j == 0 ? lowest : load(largest + x);
        const auto nan = is_nan(value), above = less(old, value);
        store(largest + x, select(nan, value, select(above, value, old)));
        if (argmax) {
          const V old_at = first && j == 0 ? zero<V>() : load(at + x);
          store(at + x, select(nan, here, select(above, here, old_at)));
        }
      }
    }
    first = false;
  }
  if (first) {
    for (int64_t x = 0; x < padded; x += V::W) store(largest + x, lowest), store(at + x, zero<V>());
  }
  for (int64_t x = 0; x < s.out_width; ++x) narrow(out + x, largest[x]);
  if (!argmax) return;
  for (int64_t x = 0; x < s.out_width; ++x) {
    argmax[x] = static_cast<uint8_t>(at[x]);
    // Nothing above -infinity: the first element that is inside.
    if (largest[x] == -static_cast<A>(__builtin_inf()) && !first) {
      int64_t j = 0;
      while (j < s.kernel_w && x * s.stride_w - s.padding_w + j * s.dilation_w < 0) ++j;
      argmax[x] = static_cast<uint8_t>(first_i * s.kernel_w + (j < s.kernel_w ? j : 0));
    }
  }
}

template <class T>
void forward_typed(const Pooling& m, const T* input, T* output, uint8_t* argmax,
                   const Parallel& pool) {
  using V = Vec<T>;
  using A = Acc<T>;
  const PoolShape& s = m.pool;
  const int64_t work = m.batch * m.channels * s.out_height * s.out_width * s.kernel_h * s.kernel_w;
  if (work == 0) return;
  if (!m.channels_last) {
    const int64_t span = (s.out_width - 1) * s.stride_w + (s.kernel_w - 1) * s.dilation_w + 1;
    const int64_t length = s.stride_w * (ceil_div(span, s.stride_w) + V::W) +
                           2 * ceil_div(s.out_width, V::W) * V::W + 2 * V::W;
    for_rows(m.batch * m.channels, s.out_height, work, pool, [&](int64_t plane, int64_t row) {
      auto* columns = static_cast<A*>(scratch_bytes(Scratch::kTile, length * sizeof(A)));
      const int64_t at = (plane * s.out_height + row) * s.out_width;
      pool_plane_row(s, input + plane * m.height * m.width, m.height, m.width, row, output + at,
                     argmax ? argmax + at : nullptr, columns);
    });
    return;
  }
  const int64_t channels = m.channels;
  for_rows(m.batch, s.out_height, work, pool, [&](int64_t image, int64_t row) {
    WindowElements<A> window;
    const int64_t y = row * s.stride_h - s.padding_h;
    const T* from = input + image * m.height * m.width * channels;
    for (int64_t column = 0; column < s.out_width; ++column) {
      const int64_t x = column * s.stride_w - s.padding_w;
      window.find(s, y, x, m.height, m.width, m.width * channels, channels);
      const int64_t at = ((image * s.out_height + row) * s.out_width + column) * channels;
      for (int64_t c = 0; c < channels; c += V::W) {
        const T* origin = from + (y * m.width + x) * channels + c;
        const int lanes = static_cast<int>(min_of<int64_t>(V::W, channels - c));
        V best, position;
        alignas(64) A positions[V::W];
        pool_max(window, origin, lanes, &best, &position);
        if (lanes == V::W)
          store(output + at + c, best);
        else
          store(output + at + c, best, lanes);
        if (argmax) {
          store(positions, position);
          store_positions(positions, lanes, argmax + at + c);
        }
      }
    }
  });
}

// The windows that may hold input position `at` along one axis: outputs [first, last).
FMK_INLINE void windows_over(int64_t at, int64_t padding, int64_t reach, int64_t stride,
                             int64_t out, int64_t* first, int64_t* last) {
  const int64_t start = at + padding;  // output o covers [o * stride, o * stride + reach]
  *first = start > reach ? ceil_div(start - reach, stride) : 0;
  *last = min_of(out, start / stride + 1);
}

// Positions as numbers of the compute type; `lanes` of them are valid.
template <class V>
FMK_INLINE V load_positions(const uint8_t* p, int lanes) {
#if defined(__AVX512F__)
  if constexpr (V::W == 16) {
    const __m128i bytes = _mm_maskz_loadu_epi8(lanes16(lanes), p);
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))};
  }
#endif
  typename V::Elem values[V::W] = {};
  for (int i = 0; i < lanes; ++i) values[i] = p[i];
  return load(values);
}

// sums[x] += the gradients of one row of windows whose maximum lies in kernel row base / kernel_w.
// A position that is none of a window's matches nothing, and its gradient goes nowhere.
template <class T>
void unpool_pixels(const Pooling& m, int64_t base, const T* grad, const uint8_t* positions,
                   Acc<T>* sums) {
  using V = Vec<T>;
  using A = Acc<T>;
  const PoolShape& s = m.pool;
  for (int64_t column = 0; column < s.out_width; ++column) {
    const int64_t x = column * s.stride_w - s.padding_w;
    for (int64_t c = 0; c < m.channels; c += V::W) {
      const int64_t at = column * m.channels + c;
      const int lanes = static_cast<int>(min_of<int64_t>(V::W, m.channels - c));
      const V value = load(grad + at, lanes);
      const V position = load_positions<V>(positions + at, lanes);
      for (int64_t j = 0; j < s.kernel_w; ++j) {
        const int64_t to = x + j * s.dilation_w;
        if (to < 0 || to >= m.width) continue;
        const V here = splat(static_cast<A>(base + j));
        const V part =
            select(less(position, here), zero<V>(), select(less(here, position), zero<V>(), value));
        A* sum = sums + to * m.channels + c;
        store(sum, load(sum) + part);  // past the last channel: zeros, in the slack of the row
      }
    }
  }
}
#if defined(__AVX512F__)
// a0 b0 a1 b1 ...
FMK_INLINE void store_interleaved(float* p, VecF a, VecF b) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  _mm512_storeu_ps(p, _mm512_permutex2var_ps(a.v, low, b.v));
  _mm512_storeu_ps(p + 16, _mm512_permutex2var_ps(a.v, high, b.v));
}
#endif
template <class V>
FMK_INLINE void store_interleaved(typename V::Elem* p, V a, V b) {
  typename V::Elem even[V::W], odd[V::W];
  store(even, a);
  store(odd, b);
  for (int i = 0; i < V::W; ++i) p[2 * i] = even[i], p[2 * i + 1] = odd[i];
}

// No branches on positions: they are as good as random.
template <class T>
void unpool_plane(const Pooling& m, int64_t base, const T* grad, const uint8_t* positions,
                  Acc<T>* sums) {
  using V = Vec<T>;
  using A = Acc<T>;
  const PoolShape& s = m.pool;
  const bool halves = s.kernel_w == 2 && s.stride_w == 2 && s.dilation_w == 1 && s.padding_w == 0;
  for (int64_t column = 0; column < s.out_width; column += V::W) {
    const int lanes = static_cast<int>(min_of<int64_t>(V::W, s.out_width - column));
    const V value = load(grad + column, lanes);
    const V position = load_positions<V>(positions + column, lanes);
    const auto part = [&](int64_t j) FMK_LAMBDA {
      const V here = splat(static_cast<A>(base + j));
      return select(less(position, here), zero<V>(),
                    select(less(here, position), zero<V>(), value));
    };
    if (halves && s.kernel_h <= s.stride_h) {  // one window over each position
      store_interleaved(sums + 2 * column, part(0), part(1));
      continue;
    }
    for (int64_t j = 0; j < s.kernel_w; ++j) {
      A parts[V::W];
      store(parts, part(j));
      const int64_t x = column * s.stride_w - s.padding_w + j * s.dilation_w;
      for (int i = 0; i < lanes; ++i) {
        const int64_t to = x + i * s.stride_w;
        if (to >= 0 && to < m.width) sums[to] += parts[i];
      }
    }
  }
}

// Every input row gathers from the windows over it, so no two threads write to one place.
template <class T>
void unpool(const Pooling& m, const T* grad_output, const uint8_t* argmax, T* grad_input,
            const Parallel& pool) {
  using V = Vec<T>;
  using A = Acc<T>;
  const PoolShape& s = m.pool;
  const int64_t reach_h = (s.kernel_h - 1) * s.dilation_h;
  const int64_t work = m.batch * m.channels * m.height * m.width;
  if (work == 0) return;
  const int64_t lane_step = m.channels_last ? m.channels : 1;  // between horizontal neighbours
  const int64_t planes = m.channels_last ? m.batch : m.batch * m.channels;
  for_rows(planes, m.height, work, pool, [&](int64_t plane, int64_t y) {
    const int64_t row_size = m.width * lane_step;
    auto* sums = static_cast<A*>(scratch_bytes(Scratch::kTile, (row_size + 3 * V::W) * sizeof(A)));
    std::memset(static_cast<void*>(sums), 0, (row_size + 3 * V::W) * sizeof(A));
    int64_t first, last;
    windows_over(y, s.padding_h, reach_h, s.stride_h, s.out_height, &first, &last);
    for (int64_t row = first; row < last; ++row) {
      const int64_t dy = y + s.padding_h - row * s.stride_h;
      if (dy % s.dilation_h != 0) continue;
      const int64_t i = dy / s.dilation_h;
      const int64_t at = (plane * s.out_height + row) * s.out_width * lane_step;
      const T* grad = grad_output + at;
      const uint8_t* positions = argmax + at;
      const int64_t base = i * s.kernel_w;
      if (m.channels_last)
        unpool_pixels(m, base, grad, positions, sums);
      else
        unpool_plane(m, base, grad, positions, sums);
    }
    T* out = grad_input + (plane * m.height + y) * row_size;
    for (int64_t x = 0; x + V::W <= row_size; x += V::W) store(out + x, load(sums + x));
    for (int64_t x = row_size / V::W * V::W; x < row_size; ++x) narrow(out + x, sums[x]);
  });
}

}  // namespace

void max_pool_forward(const Pooling& m, const void* input, void* output, uint8_t* argmax,
                      const Parallel& pool) {
  with_type(m.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    forward_typed(m, static_cast<const T*>(input), static_cast<T*>(output), argmax, pool);
  });
}

void max_pool_backward(const Pooling& m, const void* grad_output, const uint8_t* argmax,
                       void* grad_input, const Parallel& pool) {
  with_type(m.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    unpool(m, static_cast<const T*>(grad_output), argmax, static_cast<T*>(grad_input), pool);
  });
}

}  // namespace fmk::FMK_ISA
