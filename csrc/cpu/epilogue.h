// What happens to a tile of accumulators before it is stored:
//
//   z   = scale * acc + shift + residual        scale, shift per column (bias folded in), residual
//   like the output out = activation(z)                         rounded to the storage type
//
// all in registers for the clamps (none, relu, relu6); the other activations run over the tile
// while it is in L1.
#pragma once

#include "cpu/vmath.h"

namespace fmk::FMK_ISA {

// Raw accumulators to a buffer of the compute type: for reductions that are cut, or finished by
// somebody else.
template <class V>
struct StoreAccumulators {
  typename V::Elem* out;
  int64_t ld;

  template <int MR, int NV>
  FMK_LAMBDA void run(V (&acc)[MR][NV]) const {
    FMK_FOR (i, MR)
      FMK_FOR (j, NV) store(out + i * ld + j * V::W, acc[i][j]);
  }
  template <int MR, int NV>
  FMK_LAMBDA void prefetch() const {
    FMK_FOR (i, MR)
      FMK_FOR (j, NV) __builtin_prefetch(out + i * ld + j * V::W, 1);
  }
  StoreAccumulators at_row(int64_t row) const { return {out + row * ld, ld}; }
};

// out[rows][columns] = activation(z[rows][columns]), z in the compute type.
template <class T>
FMK_NOINLINE void activate_rows(Activation activation, const Acc<T>* z, int64_t ld_z, int rows,
                                int columns, T* out, int64_t ld) {
  using V = Vec<T>;
  for (int row = 0; row < rows; ++row)
    for (int column = 0; column < columns; column += V::W) {
      const int lanes = min_of(V::W, columns - column);
      const V y = activate(activation, load(z + row * ld_z + column));
      if (lanes == V::W)
        store(out + row * ld + column, y);
      else
        store(out + row * ld + column, y, lanes);
    }
}

// A step of the caller's own instead of activation and store. It gets a tile of sums, shift added,
// as z[rows][ld_z] in L1, and the place of the tile in the product: `columns` valid columns from
// `column` on.
template <class T>
struct TileStep {
  void (*run)(const TileStep& self, const Acc<T>* z, int64_t ld_z, int64_t row, int rows,
              int64_t column, int columns);
};

template <class T>
struct Epilogue {
  using V = Vec<T>;
  using Elem = Acc<T>;

  T* out = nullptr;
  int64_t ld_out = 0;
  int columns = 0;              // valid columns of the tile, the rest of its vectors is padding
  const Elem* scale = nullptr;  // null: 1; padded to whole vectors
  const Elem* shift = nullptr;  // null: 0; padded to whole vectors
  const T* residual = nullptr;  // null: 0
  int64_t ld_residual = 0;
  T* preactivation =
      nullptr;  // where z is kept for the backward pass, laid out as `out`; null: not kept
  Activation activation = Activation::kNone;
  const TileStep<T>* step = nullptr;  // with it, only shift is applied of all the above
  int64_t row = 0, column = 0;        // of the tile, for the step

  template <int MR, int NV>
  FMK_LAMBDA void run(V (&acc)[MR][NV]) const {
    FMK_FOR (j, NV) {
      if (shift) {
        const V add = load(shift + j * V::W);
        if (scale) {
          const V factor = load(scale + j * V::W);
          FMK_FOR (i, MR) acc[i][j] = fma(acc[i][j], factor, add);
        } else {
          FMK_FOR (i, MR) acc[i][j] = acc[i][j] + add;
        }
      }
    }
    if (residual) {
      FMK_FOR (j, NV) {
        const int lanes = columns - j * V::W;
        if (lanes >= V::W) {
          FMK_FOR (i, MR) acc[i][j] = acc[i][j] + load(residual + i * ld_residual + j * V::W);
        } else if (lanes > 0) {
          FMK_FOR (i, MR)
            acc[i][j] = acc[i][j] + load(residual + i * ld_residual + j * V::W, lanes);
        }
      }
    }
    if (preactivation) store_tile(preactivation, acc);
    if (step || activation > Activation::kRelu6) {
      Elem z[MR][NV * V::W];
      FMK_FOR (i, MR)
        FMK_FOR (j, NV) store(&z[i][j * V::W], acc[i][j]);
      if (step) return step->run(*step, &z[0][0], NV * V::W, row, MR, column, columns);
      activate_rows(activation, &z[0][0], NV * V::W, MR, columns, out, ld_out);
      return;
    }
    if (activation != Activation::kNone) {
      const V low = zero<V>();
      FMK_FOR (i, MR)
        FMK_FOR (j, NV) acc[i][j] = max(low, acc[i][j]);
    }
    if (activation == Activation::kRelu6) {
      const V high = splat_as<V>(6);
      FMK_FOR (i, MR)
        FMK_FOR (j, NV) acc[i][j] = min(high, acc[i][j]);
    }
    store_tile(out, acc);
  }

  // Asks for the lines that run() writes.
  template <int MR, int NV>
  FMK_LAMBDA void prefetch() const {
    FMK_FOR (i, MR)
      FMK_FOR (j, NV) __builtin_prefetch(out + i * ld_out + j * V::W, 1);
  }

  template <int MR, int NV>
  FMK_LAMBDA void store_tile(T* to, V (&acc)[MR][NV]) const {
    FMK_FOR (j, NV) {
      const int lanes = columns - j * V::W;
      if (lanes >= V::W) {
        FMK_FOR (i, MR) store(to + i * ld_out + j * V::W, acc[i][j]);
      } else if (lanes > 0) {
        FMK_FOR (i, MR) store(to + i * ld_out + j * V::W, acc[i][j], lanes);
      }
    }
  }

  // The same for accumulators that already lie in memory, acc[rows][ld_acc].
  void run_rows(Elem* acc, int64_t ld_acc, int64_t rows) const {
    if (step) {
      if (shift) {
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < ld_acc; j += V::W)
            store(acc + i * ld_acc + j, load(acc + i * ld_acc + j) + load(shift + j));
      }
      return step->run(*step, acc, ld_acc, row, static_cast<int>(rows), column, columns);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const Epilogue of_row = at_row(i);
      for (int j = 0; j < columns; j += V::W) {
        V one[1][1] = {{load(acc + i * ld_acc + j)}};
        of_row.at_panel(j, columns - j).template run<1, 1>(one);
      }
    }
  }

  Epilogue at_row(int64_t rows) const {
    Epilogue moved = *this;
    moved.row += rows;
    moved.out += rows * ld_out;
    if (residual) moved.residual += rows * ld_residual;
    if (preactivation) moved.preactivation += rows * ld_out;
    return moved;
  }
  // The same epilogue for the panel that starts `first` columns on and has `valid` columns.
  Epilogue at_panel(int64_t first, int64_t valid) const {
    Epilogue moved = *this;
    moved.column += first;
    moved.out += first;
    moved.columns = static_cast<int>(valid);
    if (scale) moved.scale += first;
    if (shift) moved.shift += first;
    if (residual) moved.residual += first;
    if (preactivation) moved.preactivation += first;
    return moved;
  }
};

}  // namespace fmk::FMK_ISA
