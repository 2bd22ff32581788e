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
template <class V, class S>
FMK_INLINE V pool_max(const WindowElements<typename V::Elem>& window, const S* origin) {
  V largest = splat_as<V>(-__builtin_inf());
  for (int i = 0; i < window.count; ++i) {
    const V value = load(origin + window.offset[i]);
    largest = select(is_nan(largest), largest, max(largest, value));
  }
  return largest;
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

  // The stores of n pixels that are consecutive in the tensor, z[n][width].
  void store_run(T* tensor, int64_t image, int64_t pixel, int64_t pixels_per_image, int64_t n,
                 const A* z) const {
    T* to = pixel_of(tensor, image, pixel, pixels_per_image);
    if (!p.channels_last) return pixels_to_planes<T>(z, width, n, columns, to, pixels_per_image);
    for (int64_t i = 0; i < n; ++i) convert_from(z + i * width, to + i * total_channels(), columns);
  }
  static void convert_from(const A* from, T* to, int64_t n) {
    int64_t i = 0;
    for (; i + V::W <= n; i += V::W) store(to + i, load(from + i));
    if (i < n) store(to + i, load(from + i), static_cast<int>(n - i));
  }

  void epilogue(const Piece& piece, int64_t pixel, int n, A* z) const {
    const int64_t pixels_per_image = p.y.out_size * p.x.out_size;
    if (p.shift) {
      for (int64_t j = 0; j < width; j += V::W) {
        const V shift = load(p.shift + channel + j);
        const V scale = p.scale ? load(p.scale + channel + j) : splat_as<V>(1);
        for (int i = 0; i < n; ++i)
          store(z + i * width + j, fma(load(z + i * width + j), scale, shift));
      }
    }
    if (p.residual) {
      const T* from = pixel_of(p.residual, piece.image, pixel, pixels_per_image);
      alignas(64) A turned[kStep * kMaxWidth];
      if (!p.channels_last) planes_to_pixels(from, pixels_per_image, n, columns, turned, width);
      for (int i = 0; i < n; ++i)
        for (int64_t j = 0; j < columns; j += V::W) {
          const int lanes = static_cast<int>(min_of<int64_t>(V::W, columns - j));
          const V add = p.channels_last ? load(from + i * total_channels() + j, lanes)
                                        : load(turned + i * width + j, lanes);
          store(z + i * width + j, load(z + i * width + j) + add);
        }
    }
    if (p.preactivation) {
      const int64_t skip = max_of<int64_t>(0, piece.own_begin * p.x.out_size - pixel);
      if (skip < n)
        store_run(p.preactivation, piece.image, pixel + skip, pixels_per_image, n - skip,
                  z + skip * width);
    }
    if (p.activation != Activation::kNone)
      for (int64_t j = 0; j < n * width; j += V::W)
        store(z + j, activate(p.activation, load(z + j)));
  }

  // n pixels to where they belong in the output image.
  void place(int64_t image, int64_t pixel, int n, const A* z) const {
    const int64_t pixels_per_image = p.place_y.size * p.place_x.size;
    if (p.place_y.step == 1 && p.place_x.step == 1)
      return store_run(p.output, image, pixel, pixels_per_image, n, z);
    for (int i = 0; i < n; ++i) {
      const int64_t y = (pixel + i) / p.x.out_size, x = (pixel + i) % p.x.out_size;
      const int64_t at = (p.place_y.first + y * p.place_y.step) * p.place_x.size + p.place_x.first +
                         x * p.place_x.step;
      store_run(p.output, image, at, pixels_per_image, 1, z + i * width);
    }
  }

  // The position of a maximum that relu let through, kReluZero where it is one of relu's zeros.
  static V alive(V value, V position) {
    const V zeros = zero<V>(), dead = splat_as<V>(kReluZero);
    return select(less(zeros, value), position, select(is_nan(value), position, dead));
  }

  // conv: the piece's rows after the activation.
  void pool(const Piece& piece, const A* conv) const {
    const PoolShape& s = p.pool;
    const int64_t out_width = p.x.out_size, pixels_per_image = s.out_height * s.out_width;
    WindowElements<A> window;
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
          if (p.argmax) {
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
  void flush(int64_t image, int64_t pixel, int n, int64_t pixels_per_image, const A* best,
             const A* positions) const {
    store_run(p.output, image, pixel, pixels_per_image, n, best);
    if (!p.argmax) return;
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
