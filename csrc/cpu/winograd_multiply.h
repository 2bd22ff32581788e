// The products of Winograd tiles: for every point a GEMM of tiles x channels x output channels.
// The micro-kernel of gemm.h, but for operands that lie as the transforms leave them ([tile][vector
// of channels][point][W], so a row's next vector is a stride away that no hardware prefetcher
// follows), with the prefetching that this order needs.
#pragma once

#include "cpu/gemm.h"

namespace fmk::FMK_ISA {

struct PointProduct {
  const float* a;  // row i, vector v of channels: a + i * lda + v * vec_step
  int64_t lda;
  const float* b;  // [vecs * W][NV * W]
  int64_t vecs;
  float* out;  // row i, vector j: out + i * ld_out + j * vec_step
  int64_t ld_out, vec_step;
  bool add;       // to what is there
  int64_t tiles;  // of MR rows each
  // What the next product reads as b, fetched by NV of its last tiles, a cache line (16 floats) for
  // every step of their reductions. `fetched` tiles, possibly less than none, have done so before.
  const float* soon;
  int64_t fetched;
};

// All tiles of a product in one call: what a tile costs beside its multiplications counts where
// reductions are as short as a slice that stays in L1.
template <int MR, int NV>
FMK_NOINLINE void multiply_point(const PointProduct& p) {
  constexpr int W = VecF::W;
  const float* rows = p.a;
  float* out = p.out;
  const int64_t lda = p.lda, vec_step = p.vec_step;
  for (int64_t tile = 0; tile < p.tiles; ++tile, rows += MR * lda) {
    VecF acc[MR][NV];
    FMK_FOR (i, MR)
      FMK_FOR (j, NV) acc[i][j] = zero<VecF>();
    const float *a = rows, *b = p.b;
    const int64_t share = p.fetched + tile, soon_step = share < 0 ? 0 : 16;
    const float* soon = p.soon + (share < 0 ? 0 : share * p.vecs * W * 16);
    for (int64_t vec = 0; vec < p.vecs; ++vec, a += vec_step) {
      const float* next = vec + 1 < p.vecs ? a + vec_step : rows + MR * lda;
      FMK_FOR (i, MR) __builtin_prefetch(next + i * lda);
      for (int64_t k = 0; k < W; ++k, b += NV * W) {
        VecF panel[NV];
        FMK_FOR (j, NV) panel[j] = pin(load(b + j * W));
        __builtin_prefetch(soon);
        soon += soon_step;
        FMK_FOR (i, MR) {
          const VecF x = splat(a[i * lda + k]);
          FMK_FOR (j, NV) acc[i][j] = fma(x, panel[j], acc[i][j]);
        }
      }
    }
    FMK_FOR (i, MR) {
      if (p.add) {
        FMK_FOR (j, NV) acc[i][j] = acc[i][j] + load(out + j * vec_step);
      }
      FMK_FOR (j, NV) store(out + j * vec_step, acc[i][j]);
      out += p.ld_out;
    }
  }
}

template <int NV, int MR = kTileRows[NV]>
FMK_INLINE void multiply_point_rows(int rows, const PointProduct& p) {
  if constexpr (MR > 1) {
    if (rows < MR) return multiply_point_rows<NV, MR - 1>(rows, p);
  }
  multiply_point<MR, NV>(p);
}
// rows in [1, kTileRows[vecs]], vecs in [1, kPanelVecs].
FMK_INLINE void multiply_point(int rows, int vecs, const PointProduct& p) {
  switch (vecs) {
    case 1: return multiply_point_rows<1>(rows, p);
    case 2: return multiply_point_rows<2>(rows, p);
#if defined(__AVX512F__)
    case 3: return multiply_point_rows<3>(rows, p);
    case 4: return multiply_point_rows<4>(rows, p);
#endif
  }
}

}  // namespace fmk::FMK_ISA
