// The gradients of a depthwise convolution's weight and bias: see depthwise_conv.h.
//
// A block takes one channel's share of the batch's tiles and one piece of the kernel, and leaves
// its sum in scratch; a second launch adds the blocks' sums in a fixed order.
#include <algorithm>

#include "cuda/depthwise_tile.cuh"

namespace fmk::cuda {
namespace {

constexpr int kTapRows = 4;  // with kTapsAtOnce columns: the piece of a kernel that a block sums

struct Pieces {
  int rows, columns;
};
__host__ __device__ inline Pieces pieces_of(const DepthwiseShape& s) {
  return {(s.kernel_h + kTapRows - 1) / kTapRows, (s.kernel_w + kTapsAtOnce - 1) / kTapsAtOnce};
}

// The sum over a block's threads of each value, to the first thread of each warp's `sums` row and
// then to every caller: sums[value]. Ends with a barrier.
template <int kValues>
__device__ void sum_over_block(const float (&values)[kValues], float* warp_sums) {
  constexpr int kWarps = kDepthwiseThreads / kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
    float value = values[v];
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      value += __shfl_xor_sync(kFullWarp, value, lanes);
    }
    if (lane == 0) warp_sums[warp * kValues + v] = value;
  }
  __syncthreads();
  if (threadIdx.x < kValues) {
    float total = 0.0f;
    for (int w = 0; w < kWarps; ++w)
      total += warp_sums[w * kValues + static_cast<int>(threadIdx.x)];
    warp_sums[threadIdx.x] = total;
  }
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(kDepthwiseThreads)
    depthwise_grad_weight_kernel(const DepthwiseBackward p, const Tiling tiling) {
  constexpr int kElements = kVectorElements<T>;
  constexpr int kPiece = kTapRows * kTapsAtOnce;
  const DepthwiseShape& s = p.shape;
  const Pieces pieces = pieces_of(s);
  const int piece = static_cast<int>(blockIdx.x) % (pieces.rows * pieces.columns);
  const int channel = static_cast<int>(blockIdx.x) / (pieces.rows * pieces.columns);
  const int split = static_cast<int>(blockIdx.y);
  const int first_i = piece / pieces.columns * kTapRows;
  const int first_j = piece % pieces.columns * kTapsAtOnce;
  const int tap_rows = s.kernel_h - first_i < kTapRows ? s.kernel_h - first_i : kTapRows;
  const int tap_columns = s.kernel_w - first_j < kTapsAtOnce ? s.kernel_w - first_j : kTapsAtOnce;

  const int input_channels = static_cast<int>(s.channels) / s.multiplier;
  const ImageSource<T> image{static_cast<const T*>(p.input),
                             static_cast<const T*>(p.state),
                             {s.input_h, s.input_w, s.state_w, 1, 1}};
  const GradientSource<T> gradient{static_cast<const T*>(p.grad_output),
                                   static_cast<const T*>(p.saved),
                                   p.activation,
                                   {s.output_h, s.output_w, 0, 1, 1}};
  auto* tile = reinterpret_cast<float*>(dynamic_shared());
  const int row_items = tiling.width / kElements;
  const int tiles = tiling.tiles_y * tiling.tiles_x;
  float sum[kPiece + 1] = {};  // and the bias

  for (int64_t work = split; work < s.batch * tiles; work += p.splits) {
    const int64_t n = work / tiles;
    const int top = static_cast<int>(work % tiles) / tiling.tiles_x * tiling.height;
    const int left = static_cast<int>(work % tiles) % tiling.tiles_x * tiling.width;
    const int wanted_column = left * s.stride_w - s.padding_w;
    const int first_column = aligned_down<T>(wanted_column);
    __syncthreads();  // the tile before has been used
    fill_tile<T>(tile, tiling, top * s.stride_h - s.padding_h, first_column,
                 [&](int row, int column, float (&values)[kElements]) {
                   image(n * input_channels + channel / s.multiplier, row, column, values);
                 });
    __syncthreads();  // the tile is complete
    for (int item = static_cast<int>(threadIdx.x); item < tiling.height * row_items;
         item += kDepthwiseThreads) {
      const int y = item / row_items, x = item % row_items * kElements;
      float grad[kElements];
      // Zeros past the image, whatever the tile holds there.
      gradient(n * s.channels + channel, top + y, left + x, grad);
#pragma unroll
      for (int k = 0; k < kElements; ++k) sum[kPiece] += grad[k];
#pragma unroll
      for (int i = 0; i < kTapRows; ++i) {
        if (i >= tap_rows) break;
        const float* row = tile + (y * s.stride_h + (first_i + i) * s.dilation_h) * tiling.pitch;
        const int first = x * s.stride_w + wanted_column - first_column;
#pragma unroll
        for (int j = 0; j < kTapsAtOnce; ++j) {
          if (j >= tap_columns) break;
          const int tap = first + (first_j + j) * s.dilation_w;
#pragma unroll
          for (int k = 0; k < kElements; ++k) {
            // An output past the image has no gradient, and its input may be anything.
            const bool inside = left + x + k < s.output_w && top + y < s.output_h;
            if (inside) sum[i * kTapsAtOnce + j] += grad[k] * row[spot(tap + k * s.stride_w)];
          }
        }
      }
    }
  }
  FMK_SHARED(float, warp_sums, (kDepthwiseThreads / kWarp) * (kPiece + 1));
  sum_over_block(sum, warp_sums);
  const int taps = s.kernel_h * s.kernel_w;
  float* partials = p.partials + (static_cast<int64_t>(split) * s.channels + channel) * (taps + 1);
  const int value = static_cast<int>(threadIdx.x);
  if (value < kPiece && value / kTapsAtOnce < tap_rows && value % kTapsAtOnce < tap_columns) {
    const int i = first_i + value / kTapsAtOnce, j = first_j + value % kTapsAtOnce;
    partials[i * s.kernel_w + j] = warp_sums[value];
  }
  if (value == kPiece && piece == 0) partials[taps] = warp_sums[kPiece];
}

template <class T>
__global__ void __launch_bounds__(kDepthwiseThreads)
    depthwise_sum_kernel(const DepthwiseBackward p) {
  const int taps = p.shape.kernel_h * p.shape.kernel_w;
  const int64_t values = p.shape.channels * (taps + 1);
  const int64_t i =
      static_cast<int64_t>(blockIdx.x) * kDepthwiseThreads + static_cast<int>(threadIdx.x);
  if (i >= values) return;
  float total = 0.0f;
  for (int split = 0; split < p.splits; ++split) total += p.partials[split * values + i];
  const int64_t channel = i / (taps + 1), tap = i % (taps + 1);
  if (tap < taps) {
    static_cast<T*>(p.grad_weight)[channel * taps + tap] = from_float<T>(total);
  } else if (p.grad_bias != nullptr) {
    static_cast<T*>(p.grad_bias)[channel] = from_float<T>(total);
  }
}

Tiling tiling_of(const DepthwiseShape& s) {
  return depthwise_tiling(s, 1, s.output_h, s.output_w, s.stride_h, s.stride_w, false);
}

template <class T>
void grad_weight(const DepthwiseBackward& p, Stream stream) {
  const DepthwiseShape& s = p.shape;
  const Pieces pieces = pieces_of(s);
  const auto blocks = static_cast<unsigned>(s.channels * pieces.rows * pieces.columns);
  const Tiling tiling = tiling_of(s);
  launch("depthwise_grad_weight", depthwise_grad_weight_kernel<T>,
         {blocks, static_cast<unsigned>(p.splits), 1}, kDepthwiseThreads, tiling.shared_bytes,
         stream, p, tiling);
  const int64_t values = depthwise_partials(s, 1);
  const auto sum_blocks =
      static_cast<unsigned>((values + kDepthwiseThreads - 1) / kDepthwiseThreads);
  launch("depthwise_grad_weight_sum", depthwise_sum_kernel<T>, {sum_blocks, 1, 1},
         kDepthwiseThreads, 0, stream, p);
}

}  // namespace

int depthwise_splits(const DepthwiseShape& s, const DeviceLimits& limits) {
  constexpr int64_t kBlocksPerMultiprocessor = 8;
  const Pieces pieces = pieces_of(s);
  const Tiling tiling = tiling_of(s);
  const int64_t blocks = s.channels * pieces.rows * pieces.columns;
  const int64_t work = s.batch * tiling.tiles_y * tiling.tiles_x;
  const int64_t wanted =
      limits.multiprocessors * kBlocksPerMultiprocessor / std::max<int64_t>(blocks, 1);
  return static_cast<int>(std::clamp<int64_t>(wanted, 1, std::max<int64_t>(work, 1)));
}

void depthwise_grad_weight(const DepthwiseBackward& p, Stream stream) {
  switch (p.shape.dtype) {
    case DType::kF32: return grad_weight<float>(p, stream);
    case DType::kBF16: return grad_weight<bf16>(p, stream);
    default: return grad_weight<f16>(p, stream);
  }
}

void depthwise_backward(const DepthwiseBackward& p, Stream stream) {
  if (p.grad_input != nullptr || p.grad_state != nullptr) depthwise_grad_input(p, stream);
  if (p.grad_weight != nullptr) depthwise_grad_weight(p, stream);
}

}  // namespace fmk::cuda
