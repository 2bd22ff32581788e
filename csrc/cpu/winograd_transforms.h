// The one-dimensional transforms of Winograd's F(4, 3) on the points 0, +-sqrt(1/2), +-sqrt(2),
// infinity (Lavin and Gray, arXiv:1509.09308; root-2 points as in Barabasz et al.,
// arXiv:1803.10986, which lose 2-3 bits less than the usual 0, +-1, +-2):
//
//   y = A^T [ (G g) . (B^T d) ]        d: 6 inputs, g: 3 taps, y: 4 outputs
//
// Two-dimensional tiles apply them to columns, then to rows. The transforms come in pairs of rows
// that share subexpressions, so that a pair of rows of a tile stays in registers between the
// passes.
#pragma once

#include "cpu/simd.h"

namespace fmk::FMK_ISA {

template <int N>
struct Constant {
  static constexpr int value = N;
};

struct WinogradF4 {
  static constexpr int kOutputs = 4, kPoints = 6;
  static constexpr float kRootHalf = 0.70710678118654752f, kRoot2 = 1.41421356237309505f;

  // Rows of B^T d and of A^T m that are computed together.
  static constexpr int kInputRows[3][2] = {{0, 5}, {1, 2}, {3, 4}};
  static constexpr int kOutputRows[2][2] = {{0, 2}, {1, 3}};

  // Rows kInputRows[P] of B^T d; d(i) loads input i.
  template <int P, class Load>
  FMK_INLINE void input_pair(const Load& d, VecF& first, VecF& second) {
    if constexpr (P == 0) {
      first = fnma(splat(2.5f), d(2), d(0) + d(4));
      second = fnma(splat(2.5f), d(3), d(1) + d(5));
    } else {
      constexpr float kSquare = P == 1 ? 2.0f : 0.5f;  // the other pair's point, squared
      constexpr float kPoint = P == 1 ? kRootHalf : kRoot2;
      const VecF even = fnma(splat(kSquare), d(2), d(4)), odd = fnma(splat(kSquare), d(1), d(3));
      first = fma(splat(kPoint), odd, even);
      second = fnma(splat(kPoint), odd, even);
    }
  }
  // Rows kOutputRows[P] of A^T m.
  template <int P, class Load>
  FMK_INLINE void output_pair(const Load& m, VecF& first, VecF& second) {
    if constexpr (P == 0) {
      const VecF low = m(1) + m(2), high = m(3) + m(4);
      first = m(0) + low + high;
      second = fma(splat(2.0f), high, low * splat(0.5f));
    } else {
      const VecF low = m(1) - m(2), high = m(3) - m(4);
      first = fma(splat(kRoot2), high, low * splat(kRootHalf));
      second = fma(splat(2 * kRoot2), high, fma(splat(0.5f * kRootHalf), low, m(5)));
    }
  }
  // G g for all points.
  FMK_INLINE void weights(const VecF (&g)[3], VecF (&u)[6]) {
    u[0] = g[0];
    const VecF even1 = fma(splat(0.5f), g[2], g[0]) * splat(-2.0f / 3),
               odd1 = g[1] * splat(-2.0f / 3 * kRootHalf);
    u[1] = even1 + odd1;
    u[2] = even1 - odd1;
    const VecF even2 = fma(splat(2.0f), g[2], g[0]) * splat(1.0f / 6),
               odd2 = g[1] * splat(kRoot2 / 6);
    u[3] = even2 + odd2;
    u[4] = even2 - odd2;
    u[5] = g[2];
  }
  // The adjoints, for the gradient of the weight: A y and G^T u.
  FMK_INLINE void output_adjoint(const VecF (&y)[4], VecF (&m)[6]) {
    m[0] = y[0];
    const VecF even1 = fma(splat(0.5f), y[2], y[0]);
    const VecF odd1 = splat(kRootHalf) * fma(splat(0.5f), y[3], y[1]);
    m[1] = even1 + odd1;
    m[2] = even1 - odd1;
    const VecF even2 = fma(splat(2.0f), y[2], y[0]);
    const VecF odd2 = splat(kRoot2) * fma(splat(2.0f), y[3], y[1]);
    m[3] = even2 + odd2;
    m[4] = even2 - odd2;
    m[5] = y[3];
  }
  FMK_INLINE void weights_adjoint(const VecF (&u)[6], VecF (&g)[3]) {
    const VecF even1 = (u[1] + u[2]) * splat(-1.0f / 3), even2 = (u[3] + u[4]) * splat(1.0f / 6);
    g[0] = fma(splat(2.0f), even1, u[0] + even2);
    g[1] = fma(splat(-2.0f / 3 * kRootHalf), u[1] - u[2], (u[3] - u[4]) * splat(kRoot2 / 6));
    g[2] = fma(splat(2.0f), even2, even1 + u[5]);
  }
};

// A ragged edge leaves R < 4 outputs of an axis: F(R, 3) on R + 2 of the six points. The rows of G
// are those of F(4, 3) up to a factor, which goes into B^T, so the same transformed weight serves.
template <int R>
struct WinogradEdge;
template <>
struct WinogradEdge<4> {
  static constexpr int kPoint[6] = {0, 1, 2, 3, 4, 5};
  FMK_INLINE void input(const VecF (&d)[6], VecF (&t)[6]) {
    const auto at = [&](int i) FMK_LAMBDA { return d[i]; };
    WinogradF4::input_pair<0>(at, t[0], t[5]);
    WinogradF4::input_pair<1>(at, t[1], t[2]);
    WinogradF4::input_pair<2>(at, t[3], t[4]);
  }
  FMK_INLINE void output(const VecF (&m)[6], VecF (&y)[4]) {
    const auto at = [&](int i) FMK_LAMBDA { return m[i]; };
    WinogradF4::output_pair<0>(at, y[0], y[2]);
    WinogradF4::output_pair<1>(at, y[1], y[3]);
  }
};
template <>
struct WinogradEdge<3> {  // 0, +-sqrt(1/2), sqrt(2), infinity
  static constexpr int kPoint[5] = {0, 1, 2, 3, 5};
  FMK_INLINE void input(const VecF (&d)[5], VecF (&t)[5]) {
    const VecF root_half = splat(WinogradF4::kRootHalf), root2 = splat(WinogradF4::kRoot2);
    const VecF half = splat(0.5f);
    const VecF odd = fnma(half, d[1], d[3]), even = fnma(half, d[0], d[2]);
    const VecF middle = d[2] * splat(-1.5f);
    t[0] = fnma(splat(2.0f), even, root2 * odd);
    t[1] = fma(splat(3 * WinogradF4::kRootHalf), d[3] - d[1], middle);
    t[2] = fma(root_half, d[3] + d[1], middle);
    t[3] = splat(2 * WinogradF4::kRoot2) * odd;
    t[4] = fnma(root2, odd, fnma(half, d[2], d[4]));
  }
  FMK_INLINE void output(const VecF (&m)[5], VecF (&y)[3]) {
    const VecF even = m[1] + m[2], odd = m[1] - m[2];
    y[0] = m[0] + m[3] + even;
    y[1] = fma(splat(WinogradF4::kRoot2), m[3], splat(WinogradF4::kRootHalf) * odd);
    y[2] = fma(splat(2.0f), m[3], fma(splat(0.5f), even, m[4]));
  }
};
template <>
struct WinogradEdge<2> {  // 0, +-sqrt(1/2), infinity
  static constexpr int kPoint[4] = {0, 1, 2, 5};
  FMK_INLINE void input(const VecF (&d)[4], VecF (&t)[4]) {
    constexpr float kOdd = 1.5f * WinogradF4::kRootHalf;
    const VecF middle = d[2] * splat(-1.5f);
    t[0] = fnma(splat(2.0f), d[2], d[0]);
    t[1] = fnma(splat(kOdd), d[1], middle);
    t[2] = fma(splat(kOdd), d[1], middle);
    t[3] = fnma(splat(0.5f), d[1], d[3]);
  }
  FMK_INLINE void output(const VecF (&m)[4], VecF (&y)[2]) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = fma(splat(WinogradF4::kRootHalf), m[1] - m[2], m[3]);
  }
};
template <>
struct WinogradEdge<1> {  // 0, sqrt(1/2), infinity
  static constexpr int kPoint[3] = {0, 1, 5};
  FMK_INLINE void input(const VecF (&d)[3], VecF (&t)[3]) {
    t[0] = fnma(splat(2 * WinogradF4::kRootHalf), d[1], d[0]);
    t[1] = d[1] * splat(-3 * WinogradF4::kRootHalf);
    t[2] = fnma(splat(WinogradF4::kRootHalf), d[1], d[2]);
  }
  FMK_INLINE void output(const VecF (&m)[3], VecF (&y)[1]) { y[0] = m[0] + m[1] + m[2]; }
};
// Whether an edge of R outputs has a product at the point.
FMK_INLINE bool edge_has_point(int outputs, int point) {
  return outputs == 4 || point < 2 || point == 5 || point <= outputs;
}

// V = B^T d B for one tile: `window` is the tile's input pixels, window[x * 6 + y], and `out` gets
// [channels / W][point][W], the point of row i and column j being 6 i + j. `next` is the window of
// the tile after it, whose pixels are prefetched.
template <class F, int P, class S>
FMK_INLINE void transform_input_pair(const S* const* window, int64_t channel, float* out) {
  constexpr int n = F::kPoints;
  VecF rows[2][n];
  FMK_FOR (x, n)
    F::template input_pair<P>([&](int y) FMK_LAMBDA { return load(window[x * n + y] + channel); },
                              rows[0][x], rows[1][x]);
  FMK_FOR (r, 2) {
    float* row = out + F::kInputRows[P][r] * n * VecF::W;
    const auto d = [&](int x) FMK_LAMBDA { return rows[r][x]; };
    VecF first, second;
    F::template input_pair<0>(d, first, second);
    store(row + F::kInputRows[0][0] * VecF::W, first);
    store(row + F::kInputRows[0][1] * VecF::W, second);
    F::template input_pair<1>(d, first, second);
    store(row + F::kInputRows[1][0] * VecF::W, first);
    store(row + F::kInputRows[1][1] * VecF::W, second);
    F::template input_pair<2>(d, first, second);
    store(row + F::kInputRows[2][0] * VecF::W, first);
    store(row + F::kInputRows[2][1] * VecF::W, second);
  }
}
// noinline: inlined into a loop over tiles the compiler spills every intermediate.
template <class F, class S>
FMK_NOINLINE void transform_input(const S* const* window, const S* const* next, int64_t channels,
                                  float* out) {
  constexpr int n = F::kPoints;
  // A whole tile ahead would overflow the sets of L1 where pixels lie 1 KB or more apart.
  constexpr int64_t kAhead = 256 / sizeof(S);
  for (int64_t channel = 0; channel < channels; channel += VecF::W, out += n * n * VecF::W) {
    const bool same = channel + kAhead < channels;
    const S* const* soon = same ? window : next;
    const int64_t at = same ? channel + kAhead : channel + kAhead - channels;
    if (at < channels) {
      // The first two columns are the last ones of the tile before.
      FMK_FOR (i, n * F::kOutputs) __builtin_prefetch(soon[(n - F::kOutputs) * n + i] + at);
    }
    transform_input_pair<F, 0>(window, channel, out);
    transform_input_pair<F, 1>(window, channel, out);
    transform_input_pair<F, 2>(window, channel, out);
  }
}
// The same for a tile of RY x RX outputs; the points that it lacks are not written.
template <int RY, int RX, class S>
FMK_NOINLINE void transform_edge_input(const S* const* window, int64_t channels, float* out) {
  using Y = WinogradEdge<RY>;
  using X = WinogradEdge<RX>;
  for (int64_t channel = 0; channel < channels; channel += VecF::W, out += 36 * VecF::W) {
    VecF rows[RY + 2][RX + 2];
    FMK_FOR (x, RX + 2) {
      VecF d[RY + 2], t[RY + 2];
      FMK_FOR (y, RY + 2) d[y] = load(window[x * 6 + y] + channel);
      Y::input(d, t);
      FMK_FOR (y, RY + 2) rows[y][x] = t[y];
    }
    FMK_FOR (y, RY + 2) {
      VecF t[RX + 2];
      X::input(rows[y], t);
      FMK_FOR (x, RX + 2) store(out + (Y::kPoint[y] * 6 + X::kPoint[x]) * VecF::W, t[x]);
    }
  }
}

// y = A^T m A for one tile and one vector of channels, m being [point][W]: put(i, j, y) gets row i,
// column j.
template <class F, class Put>
FMK_INLINE void transform_output(const float* m, const Put& put) {
  constexpr int n = F::kPoints, kOutputs = F::kOutputs;
  const auto half = [&](auto pair) FMK_LAMBDA {
    constexpr int P = decltype(pair)::value;
    VecF w[2][n];
    FMK_FOR (x, n)
      F::template output_pair<P>([&](int y) FMK_LAMBDA { return load(m + (y * n + x) * VecF::W); },
                                 w[0][x], w[1][x]);
    FMK_FOR (r, 2) {
      const int i = F::kOutputRows[P][r];
      VecF y[kOutputs];
      const auto d = [&](int x) FMK_LAMBDA { return w[r][x]; };
      F::template output_pair<0>(d, y[F::kOutputRows[0][0]], y[F::kOutputRows[0][1]]);
      F::template output_pair<1>(d, y[F::kOutputRows[1][0]], y[F::kOutputRows[1][1]]);
      FMK_FOR (j, kOutputs) put(i, j, y[j]);
    }
  };
  half(Constant<0>{});
  half(Constant<1>{});
}
template <int RY, int RX, class Put>
FMK_INLINE void transform_edge_output(const float* m, const Put& put) {
  using Y = WinogradEdge<RY>;
  using X = WinogradEdge<RX>;
  VecF rows[RY][RX + 2];
  FMK_FOR (x, RX + 2) {
    VecF t[RY + 2], y[RY];
    FMK_FOR (i, RY + 2) t[i] = load(m + (Y::kPoint[i] * 6 + X::kPoint[x]) * VecF::W);
    Y::output(t, y);
    FMK_FOR (i, RY) rows[i][x] = y[i];
  }
  FMK_FOR (i, RY) {
    VecF y[RX];
    X::output(rows[i], y);
    FMK_FOR (j, RX) put(i, j, y[j]);
  }
}

// A y A^T, the adjoint of transform_output, for one tile and `channels` channels: pixels[x * 4 + y]
// are those of a gradient, `out` gets [channel / W][point][W]; the gradient's sum is added to
// `sums`.
template <class F, class S>
FMK_NOINLINE void transform_gradient(const S* const* pixels, int64_t channels, float* out,
                                     float* sums) {
  constexpr int n = F::kPoints, kOutputs = F::kOutputs, W = VecF::W;
  for (int64_t channel = 0; channel < channels; channel += W, out += n * n * W) {
    const int lanes = static_cast<int>(min_of<int64_t>(W, channels - channel));
    VecF rows[n][kOutputs], total = load(sums + channel);
    FMK_FOR (x, kOutputs) {
      VecF y[kOutputs], m[n];
      FMK_FOR (i, kOutputs) {
        const S* from = pixels[x * kOutputs + i] + channel;
        y[i] = lanes == W ? load(from) : load(from, lanes);
      }
      total = total + ((y[0] + y[1]) + (y[2] + y[3]));
      F::output_adjoint(y, m);
      FMK_FOR (i, n) rows[i][x] = m[i];
    }
    store(sums + channel, total);
    FMK_FOR (i, n) {
      VecF m[n];
      F::output_adjoint(rows[i], m);
      FMK_FOR (j, n) store(out + (i * n + j) * W, m[j]);
    }
  }
}

}  // namespace fmk::FMK_ISA
