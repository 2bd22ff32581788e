// Average pooling on its own, and its gradient, which the convolution's backward pass uses as well.

#include <type_traits>

#include "cpu/conv_internal.h"
#include "cpu/reduce.h"

namespace fmk::FMK_ISA {

// NCHW: a plane is one channel's image and a pixel one number; NHWC: a plane is a whole image and a
// pixel all channels.
template <class T>
struct AveragePool {
  using V = Vec<T>;
  using A = Acc<T>;
  const Pooling& m;
  int64_t planes, run;  // numbers per pixel

  explicit AveragePool(const Pooling& problem) : m(problem) {
    planes = m.channels_last ? m.batch : m.batch * m.channels;
    run = m.channels_last ? m.channels : 1;
  }

  // Elements of a window along one axis: those inside, and what they count as.
  struct Reach {
    int64_t begin, end, counted;
    FMK_INLINE Reach of(int64_t out, int64_t size, int64_t kernel, int64_t stride, int64_t padding,
                        bool count_padding) {
      const int64_t start = out * stride - padding, stop = min_of(start + kernel, size + padding);
      const int64_t begin = max_of<int64_t>(0, start), end = min_of(stop, size);
      return {begin, end, count_padding ? stop - start : end - begin};
    }
  };
  Reach row_reach(int64_t y) const {
    const PoolShape& s = m.pool;
    return Reach::of(y, m.height, s.kernel_h, s.stride_h, s.padding_h, s.count_padding);
  }
  Reach column_reach(int64_t x) const {
    const PoolShape& s = m.pool;
    return Reach::of(x, m.width, s.kernel_w, s.stride_w, s.padding_w, s.count_padding);
  }
  A divisor(const Reach& y, const Reach& x) const {
    return static_cast<A>(m.pool.divisor ? m.pool.divisor : y.counted * x.counted);
  }

  // body(plane, row) for the rows of all planes, shared out.
  template <class Body>
  void for_rows(int64_t rows_per_plane, const Parallel& pool, const Body& body) const {
    const int64_t rows = planes * rows_per_plane, work = planes * m.height * m.width * run;
    const int64_t shards = work < 65536 ? 1 : min_of<int64_t>(pool.threads, rows);
    parallel_for(pool, shards, [&](int64_t shard) {
      for (int64_t row = rows * shard / shards; row < rows * (shard + 1) / shards; ++row)
        body(row / rows_per_plane, row % rows_per_plane);
    });
  }

  // sums[i] += from[i]
  template <class S>
  static void add(const S* from, int64_t n, A* sums) {
    int64_t i = 0;
    for (; i + V::W <= n; i += V::W) store(sums + i, load(sums + i) + load(from + i));
    for (; i < n; ++i) sums[i] += widen(from[i]);
  }
  // to[i] = from[i] / divisor
  static void divide(const A* from, int64_t n, A divisor, T* to) {
    const V by = splat(divisor);
    int64_t i = 0;
    for (; i + V::W <= n; i += V::W) store(to + i, load(from + i) / by);
    for (; i < n; ++i) narrow(to + i, from[i] / divisor);
  }

  void forward(const T* input, T* output, const Parallel& pool) const {
    const int64_t row_size = m.width * run;
    for_rows(m.pool.out_height, pool, [&](int64_t plane, int64_t row) {
      auto* line =
          static_cast<A*>(scratch_bytes(Scratch::kTile, (row_size + run + 2 * V::W) * sizeof(A)));
      A* sums = line + row_size;
      const Reach y = row_reach(row);
      std::memset(static_cast<void*>(line), 0, row_size * sizeof(A));
      for (int64_t i = y.begin; i < y.end; ++i)
        add(input + (plane * m.height + i) * row_size, row_size, line);
      T* to = output + (plane * m.pool.out_height + row) * m.pool.out_width * run;
      for (int64_t column = 0; column < m.pool.out_width; ++column, to += run) {
        const Reach x = column_reach(column);
        std::memset(static_cast<void*>(sums), 0, run * sizeof(A));
        for (int64_t j = x.begin; j < x.end; ++j) add(line + j * run, run, sums);
        divide(sums, run, divisor(y, x), to);
      }
    });
  }

  // Every input row gathers from the windows over it, so no two threads write to one place.
  void backward(const T* grad_output, T* grad_input, const Parallel& pool) const {
    const PoolShape& s = m.pool;
    const int64_t row_size = m.width * run;
    for_rows(m.height, pool, [&](int64_t plane, int64_t row) {
      auto* sums =
          static_cast<A*>(scratch_bytes(Scratch::kTile, (row_size + run + 2 * V::W) * sizeof(A)));
      A* share = sums + row_size;
      std::memset(static_cast<void*>(sums), 0, row_size * sizeof(A));
      const int64_t start = row + s.padding_h;
      const int64_t first = start < s.kernel_h ? 0 : ceil_div(start - s.kernel_h + 1, s.stride_h);
      const int64_t last = min_of(s.out_height, start / s.stride_h + 1);
      for (int64_t out = first; out < last; ++out) {
        const Reach y = row_reach(out);
        const T* grad = grad_output + (plane * s.out_height + out) * s.out_width * run;
        for (int64_t column = 0; column < s.out_width; ++column, grad += run) {
          const Reach x = column_reach(column);
          const A by = divisor(y, x);
          for (int64_t c = 0; c < run; ++c) share[c] = widen(grad[c]) / by;
          for (int64_t j = x.begin; j < x.end; ++j) add(share, run, sums + j * run);
        }
      }
      divide(sums, row_size, A(1), grad_input + (plane * m.height + row) * row_size);
    });
  }
};

void avg_pool_forward(const Pooling& m, const void* input, void* output, const Parallel& pool) {
  with_type(m.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    AveragePool<T>(m).forward(static_cast<const T*>(input), static_cast<T*>(output), pool);
  });
}

void avg_pool_backward(const Pooling& m, const void* grad_output, void* grad_input,
                       const Parallel& pool) {
  with_type(m.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    AveragePool<T>(m).backward(static_cast<const T*>(grad_output), static_cast<T*>(grad_input),
                               pool);
  });
}

template <class T>
void channel_sums(const T* image, bool channels_last, int64_t batch, int64_t channels,
                  int64_t pixels, Acc<T>* sums, const Parallel& pool) {
  using V = Vec<T>;
  if (channels_last) {
    const int64_t vecs = ceil_div(channels, V::W), rows = batch * pixels;
    const int64_t parts = rows * channels < 65536 ? 1 : min_of<int64_t>(pool.threads, vecs);
    parallel_for(pool, parts, [&](int64_t part) {
      for (int64_t vec = vecs * part / parts; vec < vecs * (part + 1) / parts; ++vec) {
        const int lanes = static_cast<int>(min_of<int64_t>(V::W, channels - vec * V::W));
        const T* from = image + vec * V::W;
        V total = zero<V>();
        // Partial sums over runs keep the rounding error from growing with the number of pixels.
        for (int64_t run = 0; run < rows; run += 256) {
          V sum = zero<V>();
          for (int64_t row = run; row < min_of(rows, run + 256); ++row)
            sum = sum + load(from + row * channels, lanes);
          total = total + sum;
        }
        store(sums + vec * V::W, total, lanes);
      }
    });
    return;
  }
  const int64_t shards =
      batch * channels * pixels < 65536 ? 1 : min_of<int64_t>(pool.threads, channels);
  parallel_for(pool, shards, [&](int64_t shard) {
    for (int64_t c = channels * shard / shards; c < channels * (shard + 1) / shards; ++c) {
      Acc<T> total = 0;
      for (int64_t n = 0; n < batch; ++n) {
        const T* plane = image + (n * channels + c) * pixels;
        for (int64_t run = 0; run < pixels; run += 256 * V::W) {
          const int64_t end = min_of(pixels, run + 256 * V::W);
          V sum = zero<V>();
          int64_t i = run;
          for (; i + V::W <= end; i += V::W) sum = sum + load(plane + i);
          if (i < end) sum = sum + load(plane + i, static_cast<int>(end - i));
          total += reduce_add(sum);
        }
      }
      sums[c] = total;
    }
  });
}

#define FMK_INSTANTIATE(T) \
  template void channel_sums(const T*, bool, int64_t, int64_t, int64_t, Acc<T>*, const Parallel&);
FMK_INSTANTIATE(float)
FMK_INSTANTIATE(bf16)
FMK_INSTANTIATE(f16)
FMK_INSTANTIATE(double)
#undef FMK_INSTANTIATE

}  // namespace fmk::FMK_ISA
