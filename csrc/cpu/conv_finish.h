// From the accumulators of a block of convolution pixels to the output: epilogue, pooling, layout.
#pragma once

#include "cpu/conv_internal.h"
#include "cpu/conv_rows.h"

namespace fmk::FMK_ISA {

// argmax bytes: dst[i] = positions[i], whole numbers in the compute type.
template <class A>
FMK_INLINE void store_positions(const A* positions, int64_t n, uint8_t* dst) {
  for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<uint8_t>(positions[i]);
}

// The elements of one pooling window that lie inside: offsets in numbers from the window's first
// element (which itself may lie outside), and positions in the window.
template <class A>
struct WindowElements {
  int count = 0;
  int64_t offset[256];
  A position[256];

  // rows and columns of the image; the window starts at (y, x).
  void find(const PoolShape& pool, int64_t y, int64_t x, int64_t height, int64_t width,
            int64_t row_step, int64_t column_step) {
    count = 0;
    for (int64_t i = 0; i < pool.kernel_h; ++i) {
      const int64_t dy = i * pool.dilation_h;
      if (y + dy < 0 || y + dy >= height) continue;
      for (int64_t j = 0; j < pool.kernel_w; ++j) {
        const int64_t dx = j * pool.dilation_w;
        if (x + dx < 0 || x + dx >= width) continue;
        offset[count] = dy * row_step + dx * column_step;
        position[count++] = static_cast<A>(i * pool.kernel_w + j);
      }
    }
  }
};

// The maximum over a window of vectors, and the position of the first one. A NaN wins over
// everything before it, as in torch.
template <class V, class S>
FMK_INLINE void pool_max(const WindowElements<typename V::Elem>& window, const S* origin, int lanes,
                         V* best, V* position) {
  V largest = splat_as<V>(-__builtin_inf());
  V at = splat(window.count ? window.position[0] : typename V::Elem(0));
  for (int i = 0; i < window.count; ++i) {
    const S* from = origin + window.offset[i];
    const V value = lanes == V::W ? load(from) : load(from, lanes);
    const V here = splat(window.position[i]);
    const auto nan = is_nan(value), above = less(largest, value);
    largest = select(nan, value, select(above, value, largest));
    at = select(nan, here, select(above, here, at));
  }
  *best = largest;
  *position = at;
}
template <class V>
FMK_INLINE V pool_max(V largest, V value) {
  return select(is_nan(largest), largest, max(largest, value));
}
template <class V, class S>
FMK_INLINE V pool_max(const WindowElements<typename V::Elem>& window, const S* origin) {
  V largest = splat_as<V>(-__builtin_inf());
  for (int i = 0; i < window.count; ++i)
    largest = pool_max(largest, load(origin + window.offset[i]));
  return largest;
}

// The sum over a window of vectors divided by `divisor`.
template <class V, class S>
FMK_INLINE V pool_average(const WindowElements<typename V::Elem>& window, const S* origin,
                          int lanes, V divisor) {
  V sum = zero<V>();
  for (int i = 0; i < window.count; ++i) {
    const S* from = origin + window.offset[i];
    sum = sum + (lanes == V::W ? load(from) : load(from, lanes));
  }
  return sum / divisor;
}

template <class T>
struct Finisher {
  using V = Vec<T>;
  using A = Acc<T>;
  static constexpr int kStep = 64;                     // pixels handled at a time
  static constexpr int kMaxWidth = kPanelVecs * V::W;  // of a panel
  const Correlation<T>& p;
  int64_t channel, columns, width;  // output channels [channel, channel + columns) of the output,
                                    // `width` numbers per pixel in the block's rows
  bool finished = false;            // the rows have been through the epilogue

  int64_t total_channels() const { return p.groups * p.out_channels; }

  // Output pixels [pixel, pixel + n) of an image, in the order in which they are computed, as runs
  // that lie in a tensor shaped like the output `step` pixels apart: body(first, i, count, step),
  // i counted from `pixel`.
  template <class Body>
  FMK_INLINE void for_runs(const Correlation<T>& p, int64_t pixel, int64_t n, const Body& body) {
    if (p.in_order()) return body(pixel, int64_t(0), n, int64_t(1));
    for (int64_t i = 0; i < n;) {
      const int64_t row = (pixel + i) / p.x.out_size, x = pixel + i - row * p.x.out_size;
      const int64_t count = min_of(n - i, p.x.out_size - x);
      // The last positions of a row may not exist, where residues take turns.
      const int64_t placed =
          min_of(count, ceil_div(p.place_x.size - p.place_x.first, p.place_x.step) - x);
      const int64_t z = row / p.y.out_size, y = row - z * p.y.out_size;
      const int64_t plane = p.place_z.first + z * p.place_z.step;
      const int64_t line = plane * p.place_y.size + p.place_y.first + y * p.place_y.step;
      if (placed > 0)
        body(line * p.place_x.size + p.place_x.first + x * p.place_x.step, i, placed,
             p.place_x.step);
      i += count;
    }
  }

  // rows: accumulators [conv rows][p.x.out_size][width]; overwritten.
  void run(const Piece& piece, A* rows) const {
    const int64_t out_width = p.x.out_size;
    A* first = rows + piece.first_row * out_width * width;
    const int64_t pixels = (piece.end - piece.begin) * out_width;
    for (int64_t i = 0; i < pixels && !(finished && p.pool.kernel_h); i += kStep) {
      const int n = static_cast<int>(min_of<int64_t>(kStep, pixels - i));
      A* z = first + i * width;
      if (!finished) epilogue(piece, piece.begin * out_width + i, n, z);
      if (p.pool.kernel_h == 0) place(piece.image, piece.begin * out_width + i, n, z);
    }
    if (p.pool.kernel_h) pool(piece, first);
  }

 private:
  // The address of a convolution pixel's first channel in a tensor shaped like the convolution's
  // output.
  template <class S>
  S* pixel_of(S* tensor, int64_t image, int64_t pixel, int64_t pixels_per_image) const {
    if (p.channels_last)
      return tensor + (image * pixels_per_image + pixel) * total_channels() + channel;
    return tensor + (image * total_channels() + channel) * pixels_per_image + pixel;
  }

  // The stores of n pixels that lie `step` pixels apart in the tensor, z[n][width].
  void store_run(T* tensor, int64_t image, int64_t pixel, int64_t pixels_per_image, int64_t n,
                 const A* z, int64_t step = 1) const {
    T* to = pixel_of(tensor, image, pixel, pixels_per_image);
    if (p.channels_last) {
      for (int64_t i = 0; i < n; ++i)
        convert_from(z + i * width, to + i * step * total_channels(), columns);
    } else if (step == 1) {
      pixels_to_planes<T>(z, width, n, columns, to, pixels_per_image);
    } else {
      for (int64_t j = 0; j < columns; ++j)
        for (int64_t i = 0; i < n; ++i)
          narrow(to + j * pixels_per_image + i * step, z[i * width + j]);
    }
  }
  // The same from any pixels of an image shaped like the output.
  void store_pixels(T* tensor, int64_t image, int64_t pixel, int64_t n, const A* z) const {
    for_runs(p, pixel, n, [&](int64_t first, int64_t i, int64_t count, int64_t step) {
      store_run(tensor, image, first, p.placed_pixels(), count, z + i * width, step);
    });
  }
  static void convert_from(const A* from, T* to, int64_t n) {
    int64_t i = 0;
    for (; i + V::W <= n; i += V::W) store(to + i, load(from + i));
    if (i < n) store(to + i, load(from + i), static_cast<int>(n - i));
  }

  void epilogue(const Piece& piece, int64_t pixel, int n, A* z) const {
    if (p.shift) {
      for (int64_t j = 0; j < width; j += V::W) {
        const V shift = load(p.shift + channel + j);
        const V scale = p.scale ? load(p.scale + channel + j) : splat_as<V>(1);
        for (int i = 0; i < n; ++i)
          store(z + i * width + j, fma(load(z + i * width + j), scale, shift));
      }
    }
    if (p.residual)
      for_runs(p, pixel, n, [&](int64_t first, int64_t i, int64_t count, int64_t step) {
        add_residual(piece.image, first, count, z + i * width, step);
      });
    if (p.preactivation) {
      const int64_t skip = max_of<int64_t>(0, piece.own_begin * p.x.out_size - pixel);
      if (skip < n)
        store_pixels(p.preactivation, piece.image, pixel + skip, n - skip, z + skip * width);
    }
    if (p.activation != Activation::kNone)
      for (int64_t j = 0; j < n * width; j += V::W)
        store(z + j, activate(p.activation, load(z + j)));
    if (p.argmax && p.pool.kind == PoolKind::kAverage) {
      const int64_t skip = max_of<int64_t>(0, piece.own_begin * p.x.out_size - pixel);
      for (int64_t i = skip; i < n; ++i) store_mask(piece.image, pixel + i, z + i * width);
    }
  }

  // z[n][width] += the residual of n pixels, `step` pixels apart.
  void add_residual(int64_t image, int64_t pixel, int64_t n, A* z, int64_t step) const {
    const int64_t pixels_per_image = p.placed_pixels();
    const T* from = pixel_of(p.residual, image, pixel, pixels_per_image);
    alignas(64) A turned[kStep * kMaxWidth];
    if (!p.channels_last && step == 1) {
      planes_to_pixels(from, pixels_per_image, n, columns, turned, width);
    } else if (!p.channels_last) {
      for (int64_t j = 0; j < columns; ++j)
        for (int64_t i = 0; i < n; ++i)
          turned[i * width + j] = widen(from[j * pixels_per_image + i * step]);
    }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < columns; j += V::W) {
        const int lanes = static_cast<int>(min_of<int64_t>(V::W, columns - j));
        const V add = p.channels_last ? load(from + i * step * total_channels() + j, lanes)
                                      : load(turned + i * width + j, lanes);
        store(z + i * width + j, load(z + i * width + j) + add);
      }
  }

  // For an average-pool after relu: which values of a pixel relu let through.
  void store_mask(int64_t image, int64_t pixel, const A* z) const {
    const int64_t pixels = p.out_rows() * p.x.out_size;
    uint8_t* to = pixel_of(p.argmax, image, pixel, pixels);
    const int64_t step = p.channels_last ? 1 : pixels;
    for (int64_t j = 0; j < columns; ++j) to[j * step] = z[j] > 0 || z[j] != z[j];
  }

  // n pixels to where they belong in the output image.
  void place(int64_t image, int64_t pixel, int n, const A* z) const {
    store_pixels(p.output, image, pixel, n, z);
  }

  // The position of a maximum that relu let through, kReluZero where it is one of relu's zeros.
  static V alive(V value, V position) {
    const V zeros = zero<V>(), dead = splat_as<V>(kReluZero);
    return select(less(zeros, value), position, select(is_nan(value), position, dead));
  }

  // conv: the piece's rows after the activation.
  void pool(const Piece& piece, const A* conv) const {
    const PoolShape& s = p.pool;
    // Maxima of which nobody wants the position: first over the rows of a window.
    const int64_t run =
        s.kernel_w * width > kTall ? 0 : (kTall / width - s.kernel_w) / s.stride_w + 1;
    if (s.kind == PoolKind::kMax && !p.argmax && s.kernel_h > 1 && s.kernel_w > 1 && run > 0) {
      for (int64_t py = piece.out_begin; py < piece.out_end; ++py)
        for (int64_t px = 0; px < s.out_width; px += min_of<int64_t>(run, kStep))
          pool_run(piece, conv, py, px, min_of(min_of<int64_t>(run, kStep), s.out_width - px));
      return;
    }
    const int64_t out_width = p.x.out_size, pixels_per_image = s.out_height * s.out_width;
    WindowElements<A> window;
    const V divisor = splat(static_cast<A>(s.kernel_h * s.kernel_w));
    alignas(64) A best[kStep * kMaxWidth], positions[kStep * kMaxWidth];
    int pending = 0;
    bool window_inside = false;
    for (int64_t py = piece.out_begin; py < piece.out_end; ++py) {
      const int64_t y = py * s.stride_h - s.padding_h;
      const bool rows_inside = y >= 0 && y + s.kernel_h <= p.y.out_size;
      for (int64_t px = 0; px < s.out_width; ++px) {
        const int64_t x = px * s.stride_w - s.padding_w;
        const bool inside = rows_inside && x >= 0 && x + s.kernel_w <= out_width;
        if (!inside || !window_inside)
          window.find(s, y, x, p.y.out_size, out_width, out_width * width, width);
        window_inside = inside;
        const A* origin = conv + ((y - piece.begin) * out_width + x) * width;
        A* to = best + pending * width;
        for (int64_t j = 0; j < width; j += V::W) {
          if (s.kind == PoolKind::kAverage) {
            store(to + j, pool_average(window, origin + j, V::W, divisor));
          } else if (p.argmax) {
            V value, position;
            pool_max(window, origin + j, V::W, &value, &position);
            if (p.activation == Activation::kRelu) position = alive(value, position);
            store(to + j, value);
            store(positions + pending * width + j, position);
          } else {
            store(to + j, pool_max<V>(window, origin + j));
          }
        }
        const int64_t pixel = py * s.out_width + px;
        if (++pending == kStep || pixel + 1 == piece.out_end * s.out_width) {
          flush(piece.image, pixel + 1 - pending, pending, pixels_per_image, best, positions);
          pending = 0;
        }
      }
    }
  }
  static constexpr int64_t kTall = 4096;  // numbers of a row of maxima: half of L1
  // Pooled pixels [px, px + n) of row py.
  void pool_run(const Piece& piece, const A* conv, int64_t py, int64_t px, int64_t n) const {
    const PoolShape& s = p.pool;
    alignas(64) A tall[kTall], best[kStep * kMaxWidth];
    const auto inside = [](int64_t first, int64_t count, int64_t size, int64_t* begin) {
      *begin = min_of(size, max_of<int64_t>(0, first));
      return max_of(*begin, min_of(size, first + count));
    };
    const int64_t first = px * s.stride_w - s.padding_w;
    int64_t y0, x0;
    const int64_t y1 = inside(py * s.stride_h - s.padding_h, s.kernel_h, p.y.out_size, &y0);
    const int64_t x1 = inside(first, (n - 1) * s.stride_w + s.kernel_w, p.x.out_size, &x0);
    const int64_t row_step = p.x.out_size * width;
    const A* from = conv + (y0 - piece.begin) * row_step + x0 * width;
    const V nothing = splat_as<V>(-__builtin_inf());
    for (int64_t i = 0; i < (x1 - x0) * width; i += V::W) {
      V largest = nothing;
      for (int64_t y = 0; y < y1 - y0; ++y)
        largest = pool_max(largest, load(from + y * row_step + i));
      store(tall + i, largest);
    }
    for (int64_t i = 0; i < n; ++i) {
      int64_t begin;
      const int64_t end = inside(first + i * s.stride_w, s.kernel_w, p.x.out_size, &begin);
      const A* window = tall + (begin - x0) * width;
      for (int64_t j = 0; j < width; j += V::W) {
        V largest = nothing;
        for (int64_t x = 0; x < end - begin; ++x)
          largest = pool_max(largest, load(window + x * width + j));
        store(best + i * width + j, largest);
      }
    }
    const int64_t pixels = s.out_height * s.out_width;
    store_run(p.output, piece.image, py * s.out_width + px, pixels, n, best);
  }
  void flush(int64_t image, int64_t pixel, int n, int64_t pixels_per_image, const A* best,
             const A* positions) const {
    store_run(p.output, image, pixel, pixels_per_image, n, best);
    if (!p.argmax || p.pool.kind == PoolKind::kAverage) return;
    uint8_t* to = pixel_of(p.argmax, image, pixel, pixels_per_image);
    if (p.channels_last) {
      for (int i = 0; i < n; ++i)
        store_positions(positions + i * width, columns, to + i * total_channels());
    } else {
      for (int64_t j = 0; j < columns; ++j)
        for (int i = 0; i < n; ++i)
          to[j * pixels_per_image + i] = static_cast<uint8_t>(positions[i * width + j]);
    }
  }
};

}  // namespace fmk::FMK_ISA
