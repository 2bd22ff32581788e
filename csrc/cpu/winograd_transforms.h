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
  static constexpr int kInputPairs = 3, kOutputPairs = 2;
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
};

// V = B^T d B for one tile and one vector of channels. pixels[x * 6 + y] points at the tile's input
// pixels, `out` gets [point][W], the point of row i and column j being 6 i + j.
template <class F, int P>
FMK_INLINE void transform_input_pair(const float* const* pixels, int64_t channel, float* out) {
  constexpr int n = F::kPoints;
  VecF rows[2][n];
  FMK_FOR (x, n)
    F::template input_pair<P>([&](int y) FMK_LAMBDA { return load(pixels[x * n + y] + channel); },
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
template <class F>
FMK_NOINLINE void transform_input(const float* const* pixels, int64_t channels, float* out) {
  for (int64_t channel = 0; channel < channels;
       channel += VecF::W, out += F::kPoints * F::kPoints * VecF::W) {
    transform_input_pair<F, 0>(pixels, channel, out);
    transform_input_pair<F, 1>(pixels, channel, out);
    transform_input_pair<F, 2>(pixels, channel, out);
  }
}

// y = A^T m A for one tile and one vector of channels: m is [point][W], output (i, j) goes to
// out + i * row_step + j * column_step where i < rows, j < columns.
template <class F>
FMK_NOINLINE void transform_output(const float* m, float* out, int64_t row_step,
                                   int64_t column_step, int rows, int columns) {
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
      if (i < rows) {
        FMK_FOR (j, kOutputs)
          if (j < columns) store(out + i * row_step + j * column_step, y[j]);
      }
    }
  };
  half(Constant<0>{});
  half(Constant<1>{});
}

}  // namespace fmk::FMK_ISA
