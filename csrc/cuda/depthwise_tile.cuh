// A tile of source planes in shared memory, for the depthwise kernels: bandwidth-bound, so each
// element is read once, in 16-byte vectors where rows are aligned, and kept as float.
#pragma once

#include "cuda/activation.cuh"
#include "cuda/depthwise_conv.h"
#include "cuda/launch.cuh"

namespace fmk::cuda {

constexpr int kDepthwiseThreads = 128;
constexpr int kTapsAtOnce = 4;  // of a kernel's row; values are loaded once for all of them

// One source plane: a matrix, perhaps with columns before it, perhaps spread out by zeros.
struct Plane {
  int height, width;       // of the source, zeros between its elements included
  int state_w;             // columns -state_w .. -1 come from the state
  int spread_h, spread_w;  // one element every so many rows and columns
};

// How outputs are dealt to blocks, and the source tile that this takes.
struct Tiling {
  int planes, height, width;  // outputs per block
  int tiles_y, tiles_x;       // per plane
  int64_t blocks;             // all
  int rows, columns, pitch;   // of a source tile
  size_t shared_bytes;
};

// The spot of a column in a row of the tile. Threads read with a stride of one vector's elements;
// one float of padding every 32 puts those into different banks.
__host__ __device__ constexpr int spot(int column) { return column + column / 32; }

// The first column of a source tile: aligned down, so that vectors are.
template <class T>
__host__ __device__ constexpr int aligned_down(int column) {
  constexpr int n = kVectorElements<T>;
  return (column >= 0 ? column / n : -((-column + n - 1) / n)) * n;
}

// Copies a tile with load(row, column, values): one vector's worth of columns from an aligned
// column on. All threads of the block take part.
template <class T, class Load>
__device__ void fill_tile(float* tile, const Tiling& tiling, int first_row, int first_column,
                          const Load& load) {
  constexpr int kElements = kVectorElements<T>;
  const int vectors = tiling.columns / kElements;
  for (int i = static_cast<int>(threadIdx.x); i < tiling.rows * vectors;
       i += static_cast<int>(blockDim.x)) {
    const int row = i / vectors, column = i % vectors * kElements;
    float values[kElements];
    load(first_row + row, first_column + column, values);
#pragma unroll
    for (int k = 0; k < kElements; ++k) tile[row * tiling.pitch + spot(column + k)] = values[k];
  }
}

// Reads a plane and its state. `plane` counts over batch and channels.
template <class T>
struct ImageSource {
  const T* image;
  const T* state;
  Plane shape;

  __device__ void operator()(int64_t plane, int row, int column,
                             float (&values)[kVectorElements<T>]) const {
    constexpr int kElements = kVectorElements<T>;
    const T* own = image + (plane * shape.height + row) * shape.width;
    const bool row_inside = row >= 0 && row < shape.height;
    if (row_inside && column >= 0 && column + kElements <= shape.width &&
        reinterpret_cast<uintptr_t>(own + column) % sizeof(Words4) == 0) {
      unpack<T>(load16(own + column), values);
      return;
    }
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      const int c = column + k;
      values[k] = 0.0f;
      if (row_inside && c >= 0 && c < shape.width) values[k] = to_float(own[c]);
      if (row_inside && c < 0 && c >= -shape.state_w) {
        const T* before = state + (plane * shape.height + row) * shape.state_w;
        values[k] = to_float(before[shape.state_w + c]);
      }
    }
  }
};

// Reads the gradient of the pre-activation: grad_output times the activation's derivative, spread
// out as a strided convolution's backward needs it.
template <class T>
struct GradientSource {
  const T* grad_output;
  const T* saved;
  Activation activation;
  Plane shape;

  __device__ void operator()(int64_t plane, int row, int column,
                             float (&values)[kVectorElements<T>]) const {
    constexpr int kElements = kVectorElements<T>;
    const bool row_inside = row >= 0 && row < shape.height && row % shape.spread_h == 0;
    const int width = (shape.width - 1) / shape.spread_w + 1;
    const int height = (shape.height - 1) / shape.spread_h + 1;
    const int64_t first = (plane * height + (row_inside ? row / shape.spread_h : 0)) * width;
    const bool inside = shape.spread_w == 1 && column >= 0 && column + kElements <= shape.width;
    if (row_inside && inside && aligned(grad_output + first + column) &&
        (saved == nullptr || aligned(saved + first + column))) {
      unpack<T>(load16(grad_output + first + column), values);
      if (saved == nullptr) return;
      float at[kElements];
      unpack<T>(load16(saved + first + column), at);
#pragma unroll
      for (int k = 0; k < kElements; ++k) {
        values[k] *= activation_derivative(activation, at[k]);
      }
      return;
    }
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      const int c = column + k;
      values[k] = 0.0f;
      if (!row_inside || c < 0 || c >= shape.width || c % shape.spread_w != 0) continue;
      const int64_t at = first + c / shape.spread_w;
      values[k] = to_float(grad_output[at]);
      if (saved != nullptr) values[k] *= activation_derivative(activation, to_float(saved[at]));
    }
  }

  __device__ static bool aligned(const T* address) {
    return reinterpret_cast<uintptr_t>(address) % sizeof(Words4) == 0;
  }
};

// For a result of `planes` planes; `sums_sources`: a block may have no more items than threads.
Tiling depthwise_tiling(const DepthwiseShape& shape, int64_t planes, int result_h, int result_w,
                        int stride_h, int stride_w, bool sums_sources);

// The two halves of depthwise_backward().
void depthwise_grad_input(const DepthwiseBackward& problem, Stream stream);
void depthwise_grad_weight(const DepthwiseBackward& problem, Stream stream);

}  // namespace fmk::cuda
