// Depthwise convolution forward and its gradient of the input: see depthwise_conv.h.
//
// Both are correlations: the gradient slides the flipped kernel over grad_output, with stride - 1
// zeros between its elements, and sums over the M outputs of an input channel.
#include <algorithm>
#include <limits>

#include "cuda/depthwise_tile.cuh"

namespace fmk::cuda {
namespace {

struct Correlation {
  int64_t planes;  // of the result
  int result_h, result_w;
  int kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, padding_h, padding_w;
  int channels;            // planes of the result per image
  int sources;             // source planes per plane of the result, adjacent
  int results_per_source;  // planes of the result per source plane, adjacent
  bool flipped;
  Tiling tiling;
};

// Whether each output reads adjacent elements of the tile, and neighbours share them.
__host__ __device__ inline bool is_dense(const Correlation& c) {
  return c.stride_w == 1 && c.dilation_w == 1;
}

// The sums of one row of outputs with one row of the kernel.
template <int kElements>
__device__ void add_row(const Correlation& c, const float* weights, const float* row, int first,
                        float (&sum)[kElements]) {
  for (int tap = 0; tap < c.kernel_w; tap += kTapsAtOnce) {
    if (is_dense(c)) {
      float window[kElements + kTapsAtOnce - 1];
#pragma unroll
      for (int k = 0; k < kElements + kTapsAtOnce - 1; ++k) window[k] = row[spot(first + tap + k)];
#pragma unroll
      for (int j = 0; j < kTapsAtOnce; ++j) {
        if (tap + j >= c.kernel_w) break;
        const float weight = weights[tap + j];
#pragma unroll
        for (int k = 0; k < kElements; ++k) sum[k] += weight * window[k + j];
      }
    } else {
      for (int j = tap; j < tap + kTapsAtOnce && j < c.kernel_w; ++j) {
#pragma unroll
        for (int k = 0; k < kElements; ++k) {
          sum[k] += weights[j] * row[spot(first + k * c.stride_w + j * c.dilation_w)];
        }
      }
    }
  }
}

// finish(plane, row, column, count, sums): stores `count` outputs.
template <class T, class Source, class Finish>
__device__ void correlate(const Correlation& c, const Source& source, const T* weight,
                          const Finish& finish) {
  constexpr int kElements = kVectorElements<T>;
  const Tiling& tiling = c.tiling;
  const int taps = c.kernel_h * c.kernel_w;
  auto* weights = reinterpret_cast<float*>(dynamic_shared());
  float* tiles = weights + tiling.planes * taps;
  const int tile = static_cast<int>(blockIdx.x % (tiling.tiles_y * tiling.tiles_x));
  const int64_t first_plane =
      static_cast<int64_t>(blockIdx.x / (tiling.tiles_y * tiling.tiles_x)) * tiling.planes;
  const int top = tile / tiling.tiles_x * tiling.height;
  const int left = tile % tiling.tiles_x * tiling.width;
  const int first_row = top * c.stride_h - c.padding_h;
  const int wanted_column = left * c.stride_w - c.padding_w;
  const int first_column = aligned_down<T>(wanted_column);
  const int64_t rest = c.planes - first_plane;
  const int planes = rest < tiling.planes ? static_cast<int>(rest) : tiling.planes;

  const int row_items = tiling.width / kElements, plane_items = tiling.height * row_items;
  // One source plane after the other; with several (M > 1, backward) a thread keeps its sums, so a
  // block then has no more items than threads.
  for (int item = static_cast<int>(threadIdx.x);; item += static_cast<int>(blockDim.x)) {
    const bool first_item = item == static_cast<int>(threadIdx.x);
    const int own = item / plane_items;
    const bool valid = own < planes;
    const int y = item % plane_items / row_items, x = item % row_items * kElements;
    float sum[kElements] = {};
    for (int s = 0; s < c.sources; ++s) {
      if (first_item) {
        if (s > 0) __syncthreads();  // the source plane before has been used
        for (int p = 0; p < planes; ++p) {
          const int64_t plane = first_plane + p;
          const int64_t read = plane / c.results_per_source * c.sources + s;
          const int64_t channel = plane % c.channels * c.sources + s;
          for (int i = static_cast<int>(threadIdx.x); i < taps; i += static_cast<int>(blockDim.x)) {
            weights[p * taps + i] =
                to_float(weight[channel * taps + (c.flipped ? taps - 1 - i : i)]);
          }
          fill_tile<T>(tiles + p * tiling.rows * tiling.pitch, tiling, first_row, first_column,
                       [&](int row, int column, float (&values)[kElements]) {
                         source(read, row, column, values);
                       });
        }
        __syncthreads();  // the tiles are complete
      }
      if (!valid) continue;
      for (int i = 0; i < c.kernel_h; ++i) {
        const int row = own * tiling.rows + y * c.stride_h + i * c.dilation_h;
        add_row(c, weights + own * taps + i * c.kernel_w, tiles + row * tiling.pitch,
                x * c.stride_w + wanted_column - first_column, sum);
      }
    }
    if (!valid) break;
    const int row = top + y, column = left + x;
    if (row >= c.result_h || column >= c.result_w) continue;
    const int left_over = c.result_w - column;
    finish(first_plane + own, row, column, left_over < kElements ? left_over : kElements, sum);
  }
}

template <class T>
__device__ void store_row(T* address, int count, const float (&values)[kVectorElements<T>]) {
  constexpr int kElements = kVectorElements<T>;
  if (count == kElements && reinterpret_cast<uintptr_t>(address) % sizeof(Words4) == 0) {
    store16(address, pack_vector<T>(values));
    return;
  }
#pragma unroll
  for (int k = 0; k < kElements; ++k) {
    if (k < count) address[k] = from_float<T>(values[k]);
  }
}

template <class T>
__global__ void __launch_bounds__(kDepthwiseThreads)
    depthwise_forward_kernel(const DepthwiseForward p, const Correlation c, const Plane plane) {
  constexpr int kElements = kVectorElements<T>;
  const ImageSource<T> source{static_cast<const T*>(p.input), static_cast<const T*>(p.state),
                              plane};
  const T* bias = static_cast<const T*>(p.bias);
  correlate<T>(c, source, static_cast<const T*>(p.weight),
               [&](int64_t result, int row, int column, int count, float (&sum)[kElements]) {
                 const int64_t at = (result * c.result_h + row) * c.result_w + column;
                 const float shift = bias == nullptr ? 0.0f : to_float(bias[result % c.channels]);
#pragma unroll
                 for (int k = 0; k < kElements; ++k) sum[k] += shift;
                 if (p.preactivation != nullptr) {
                   store_row(static_cast<T*>(p.preactivation) + at, count, sum);
                 }
#pragma unroll
                 for (int k = 0; k < kElements; ++k) sum[k] = activate(p.activation, sum[k]);
                 store_row(static_cast<T*>(p.output) + at, count, sum);
               });
}

template <class T>
__global__ void __launch_bounds__(kDepthwiseThreads)
    depthwise_grad_input_kernel(const DepthwiseBackward p, const Correlation c, const Plane plane) {
  constexpr int kElements = kVectorElements<T>;
  const GradientSource<T> source{static_cast<const T*>(p.grad_output),
                                 static_cast<const T*>(p.saved), p.activation, plane};
  // The result's columns start with the state's.
  const int state_w = p.shape.state_w, width = p.shape.input_w;
  correlate<T>(c, source, static_cast<const T*>(p.weight),
               [&](int64_t result, int row, int column, int count, float (&sum)[kElements]) {
                 const int64_t line = result * c.result_h + row;
                 T* grad_input = static_cast<T*>(p.grad_input);
                 T* grad_state = static_cast<T*>(p.grad_state);
                 if (state_w == 0) return store_row(grad_input + line * width + column, count, sum);
#pragma unroll
                 for (int k = 0; k < kElements; ++k) {
                   const int at = column + k - state_w;
                   if (k >= count) break;
                   if (at >= 0 && grad_input != nullptr) {
                     grad_input[line * width + at] = from_float<T>(sum[k]);
                   }
                   if (at < 0 && grad_state != nullptr) {
                     grad_state[line * state_w + state_w + at] = from_float<T>(sum[k]);
                   }
                 }
               });
}

int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace

// Tiles of outputs that are wide for whole vectors and rows of the source, and as many planes as
// give every thread something to do.
Tiling depthwise_tiling(const DepthwiseShape& shape, int64_t planes, int result_h, int result_w,
                        int stride_h, int stride_w, bool sums_sources) {
  const int elements = shape.dtype == DType::kF32 ? 4 : 8;
  constexpr int kRowItems = 64;            // threads along a row at most
  constexpr int64_t kMostReach = 1 << 20;  // rows or columns of a tile, more than any memory holds
  Tiling t{};
  t.width = std::min(round_up(result_w, elements), kRowItems * elements / (result_h > 1 ? 4 : 1));
  const int row_items = t.width / elements;
  t.height = std::min(result_h, std::max(1, kDepthwiseThreads / row_items));
  // Two outputs a thread in a tall image, so that fewer rows are read twice.
  if (!sums_sources) t.height = std::min(result_h, 2 * t.height);
  const int items = t.height * row_items;
  t.planes =
      static_cast<int>(std::clamp<int64_t>(planes, 1, std::max(1, kDepthwiseThreads / items)));
  t.tiles_y = (result_h + t.height - 1) / t.height;
  t.tiles_x = (result_w + t.width - 1) / t.width;
  t.blocks = (planes + t.planes - 1) / t.planes * t.tiles_y * t.tiles_x;
  const auto reach = [](int outputs, int stride, int taps, int dilation) {
    return int64_t{outputs - 1} * stride + int64_t{taps - 1} * dilation + 1;
  };
  const int64_t rows = reach(t.height, stride_h, shape.kernel_h, shape.dilation_h);
  const int64_t columns = reach(t.width, stride_w, shape.kernel_w, shape.dilation_w);
  if (std::max(rows, columns) > kMostReach) {
    t.shared_bytes = std::numeric_limits<size_t>::max();
    return t;
  }
  t.rows = static_cast<int>(rows);
  // Both ends may be out of line by a vector, and taps are read in fours.
  t.columns = round_up(static_cast<int>(columns) + kTapsAtOnce, elements) + elements;
  t.pitch = spot(t.columns) + 1;
  t.shared_bytes = sizeof(float) * t.planes *
                   (size_t(t.rows) * t.pitch + size_t(shape.kernel_h) * shape.kernel_w);
  return t;
}

namespace {

Correlation forward_correlation(const DepthwiseShape& s) {
  Correlation c{};
  c.planes = s.batch * s.channels;
  c.result_h = s.output_h;
  c.result_w = s.output_w;
  c.kernel_h = s.kernel_h;
  c.kernel_w = s.kernel_w;
  c.stride_h = s.stride_h;
  c.stride_w = s.stride_w;
  c.dilation_h = s.dilation_h;
  c.dilation_w = s.dilation_w;
  c.padding_h = s.padding_h;
  c.padding_w = s.padding_w;
  c.channels = static_cast<int>(s.channels);
  c.sources = 1;
  c.results_per_source = s.multiplier;
  c.flipped = false;
  c.tiling = depthwise_tiling(s, c.planes, s.output_h, s.output_w, s.stride_h, s.stride_w, false);
  return c;
}

Correlation grad_input_correlation(const DepthwiseShape& s) {
  Correlation c{};
  c.planes = s.batch * (s.channels / s.multiplier);
  c.result_h = s.input_h;
  c.result_w = s.state_w + s.input_w;
  c.kernel_h = s.kernel_h;
  c.kernel_w = s.kernel_w;
  c.stride_h = c.stride_w = 1;
  c.dilation_h = s.dilation_h;
  c.dilation_w = s.dilation_w;
  c.padding_h = s.dilation_h * (s.kernel_h - 1) - s.padding_h;
  c.padding_w = s.dilation_w * (s.kernel_w - 1) - (s.padding_w - s.state_w);
  c.channels = static_cast<int>(s.channels / s.multiplier);
  c.sources = s.multiplier;
  c.results_per_source = 1;
  c.flipped = true;
  c.tiling = depthwise_tiling(s, c.planes, c.result_h, c.result_w, 1, 1, true);
  return c;
}

template <class T>
void forward(const DepthwiseForward& p, Stream stream) {
  const DepthwiseShape& s = p.shape;
  const Correlation c = forward_correlation(s);
  const Plane plane{s.input_h, s.input_w, s.state_w, 1, 1};
  launch("depthwise_forward", depthwise_forward_kernel<T>,
         {static_cast<unsigned>(c.tiling.blocks), 1, 1}, kDepthwiseThreads, c.tiling.shared_bytes,
         stream, p, c, plane);
}

template <class T>
void grad_input(const DepthwiseBackward& p, Stream stream) {
  const DepthwiseShape& s = p.shape;
  const Correlation c = grad_input_correlation(s);
  const Plane plane{(s.output_h - 1) * s.stride_h + 1, (s.output_w - 1) * s.stride_w + 1, 0,
                    s.stride_h, s.stride_w};
  launch("depthwise_grad_input", depthwise_grad_input_kernel<T>,
         {static_cast<unsigned>(c.tiling.blocks), 1, 1}, kDepthwiseThreads, c.tiling.shared_bytes,
         stream, p, c, plane);
}

}  // namespace

const char* depthwise_problem(const DepthwiseShape& s, const DeviceLimits& limits) {
  constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;
  if (s.dtype == DType::kF64) return "computes in float32, bfloat16 and float16, not float64";
  // The gradient of the weight takes a block for some of a channel's taps.
  const int64_t taps = int64_t{s.kernel_h} * s.kernel_w;
  if (s.channels > kMostBlocks / taps) return "the weight takes more blocks than a grid has";
  const auto problem_of = [&](const Tiling& tiling) {
    if (tiling.shared_bytes > limits.shared_per_block) {
      return "the kernel's reach does not fit a block's shared memory";
    }
    return tiling.blocks > kMostBlocks ? "the image takes more blocks than a grid has" : "";
  };
  // A kernel that fits forward has sizes that the backward can count with.
  const char* problem = problem_of(forward_correlation(s).tiling);
  return *problem != '\0' ? problem : problem_of(grad_input_correlation(s).tiling);
}

void depthwise_forward(const DepthwiseForward& p, Stream stream) {
  switch (p.shape.dtype) {
    case DType::kF32: return forward<float>(p, stream);
    case DType::kBF16: return forward<bf16>(p, stream);
    default: return forward<f16>(p, stream);
  }
}

void depthwise_grad_input(const DepthwiseBackward& p, Stream stream) {
  switch (p.shape.dtype) {
    case DType::kF32: return grad_input<float>(p, stream);
    case DType::kBF16: return grad_input<bf16>(p, stream);
    default: return grad_input<f16>(p, stream);
  }
}

}  // namespace fmk::cuda
