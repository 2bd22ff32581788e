// Decode attention: see attention_decode.h.
#include "cuda/attention_decode.h"

#include <algorithm>

#include "cuda/launch.cuh"

namespace fmk::cuda {
namespace {

constexpr int kFragmentWarps = 4;
constexpr int kFragmentHeads = 16;  // rows of a fragment: query heads of one key head
constexpr int kWarpKeys = 16;       // of a tile, per warp
constexpr int kFragmentTile = kFragmentWarps * kWarpKeys;
constexpr int kFloatHeads = 8;  // warps, each with one query head
constexpr int kFloatTile = kWarp;
constexpr int kStages = 2;
constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

__device__ inline float negative_infinity() { return bits_to_float(0xff800000u); }

// Lengths are the caller's data on the device: one past the cache must not be believed.
__device__ inline int clamp_length(int length, int64_t capacity) {
  return length < 0 ? 0 : length < capacity ? length : static_cast<int>(capacity);
}

// The part of a sequence's keys that a block sees, in the block's place of the grid.
struct Span {
  int begin, end, position;

  __device__ Span(const DecodeAttention& p, int tile, int sequence, int split) {
    const int length = clamp_length(p.lengths[sequence], p.capacity);
    position = length - 1;
    int first = 0;
    if (p.window_left >= 0 && p.window_left < position) {
      first = position - static_cast<int>(p.window_left);
    }
    const int tiles = (length - first + tile - 1) / tile;
    const int64_t keys = int64_t{(tiles + p.splits - 1) / p.splits} * tile;  // of a split
    const int64_t begins = first + split * keys, ends = begins + keys;
    begin = begins < length ? static_cast<int>(begins) : length;
    end = ends < length ? static_cast<int>(ends) : length;
  }
};

// Starts copying `rows` rows from `position` on to shared memory, `stride` elements apart, zeros
// past `end` and from feature D on.
template <class T>
__device__ void copy_tile(T* shared, int stride, int width, const DecodeCache& cache,
                          const DecodeAttention& p, int sequence, int head, int position, int end,
                          int rows) {
  constexpr int kElements = kVectorElements<T>;
  const int pieces = width / kElements;
  for (int i = static_cast<int>(threadIdx.x); i < rows * pieces;
       i += static_cast<int>(blockDim.x)) {
    const int row = i / pieces, feature = i % pieces * kElements, key = position + row;
    bool valid = key < end && feature < p.features;
    const T* source = static_cast<const T*>(cache.data);
    if (valid) {
      int64_t block = sequence;
      int in_block = key;
      if (p.page_table != nullptr) {
        block = p.page_table[sequence * p.page_stride + key / p.page_size];
        in_block = key % p.page_size;
        valid = block >= 0 && block < p.pages;
      }
      if (valid) {
        source += block * cache.sequence + head * cache.head + in_block * cache.row + feature;
      }
    }
    copy_async16(shared + row * stride + feature, source, valid);
  }
}

// The score of a key in units of log2, -inf if it is not part of the span.
__device__ inline float score(const DecodeAttention& p, float product, float slope, int key,
                              const Span& span) {
  if (key >= span.end) return negative_infinity();
  float s = p.scale * product;
  if (p.softcap > 0.0f) s = p.softcap * tanhf(s / p.softcap);
  return (s - slope * static_cast<float>(span.position - key)) * kLog2E;
}

__device__ inline float slope_of(const DecodeAttention& p, int sequence, int head) {
  return p.alibi_slopes == nullptr ? 0.0f : p.alibi_slopes[sequence * p.slopes_sequence + head];
}

// Writes a head's share of a split, or the result itself if there is but one: `weighted` is the sum
// of exp2(score - maximum) * value, `sum` that of the weights.
template <class T>
struct HeadResult {
  const DecodeAttention& p;
  int64_t row;  // of (B, Hq)
  int split;
  float maximum, sum;
  float factor;

  __device__ HeadResult(const DecodeAttention& problem, int sequence, int head, int split_index,
                        float own_maximum, float own_sum)
      : p(problem),
        row(sequence * problem.query_heads + head),
        split(split_index),
        maximum(own_maximum),
        sum(own_sum) {
    if (p.splits == 1 && p.sinks != nullptr) {
      const float sink = p.sinks[head] * kLog2E;
      const float pivot = sink > maximum ? sink : maximum;
      if (pivot > negative_infinity()) {
        const float shrink = exp2f(maximum - pivot);
        sum = sum * shrink + exp2f(sink - pivot);
        factor = shrink / sum;
        maximum = pivot;
        return;
      }
    }
    // Zero where no key was seen. A score that is no number has made the sum one, too.
    factor = sum == 0.0f ? 0.0f : 1.0f / sum;
  }

  __device__ void write_lse() const {
    const float lse = sum == 0.0f ? negative_infinity() : (maximum + log2f(sum)) * kLn2;
    if (p.splits == 1) {
      p.lse[row] = lse;
    } else {
      p.partial_lse[split * p.batch * p.query_heads + row] = lse;
    }
  }
  __device__ void write(int feature, float weighted) const {
    if (feature >= p.features) return;
    const float value = sum == 0.0f ? 0.0f : weighted * factor;
    if (p.splits == 1) {
      static_cast<T*>(p.output)[row * p.features + feature] = from_float<T>(value);
    } else {
      const int64_t rows = p.batch * p.query_heads;
      p.partial_output[(split * rows + row) * p.features + feature] = value;
    }
  }
};

// --- half types: fragments of 16 heads, 16 keys per warp, the warps' results merged at the end ---

constexpr size_t fragment_shared_bytes(int width) {
  // Rows are 16 bytes longer than their data, so that 8 of them start in different banks.
  return size_t(kFragmentHeads + 2 * kStages * kFragmentTile) * (width + 8) * sizeof(bf16);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kFragmentWarps* kWarp, 1) decode_kernel(const DecodeAttention p) {
  constexpr int kStride = kWidth + 8;
  const int group_size = static_cast<int>(p.query_heads / p.kv_heads);
  const int head_tiles = (group_size + kFragmentHeads - 1) / kFragmentHeads;
  const int split = static_cast<int>(blockIdx.x), sequence = static_cast<int>(blockIdx.z);
  const int kv_head = static_cast<int>(blockIdx.y) / head_tiles;
  const int in_group = static_cast<int>(blockIdx.y) % head_tiles * kFragmentHeads;
  const int first_head = kv_head * group_size + in_group;
  const int heads = group_size - in_group < kFragmentHeads ? group_size - in_group : kFragmentHeads;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const Span span(p, kFragmentTile, sequence, split);

  auto* queries = reinterpret_cast<T*>(dynamic_shared());
  T* tiles = queries + kFragmentHeads * kStride;
  const auto keys_of = [&](int stage) { return tiles + 2 * stage * kFragmentTile * kStride; };
  const auto values_of = [&](int stage) { return keys_of(stage) + kFragmentTile * kStride; };
  const auto copy_stage = [&](int stage, int position) {
    copy_tile(keys_of(stage), kStride, kWidth, p.key, p, sequence, kv_head, position, span.end,
              kFragmentTile);
    copy_tile(values_of(stage), kStride, kWidth, p.value, p, sequence, kv_head, position, span.end,
              kFragmentTile);
    copy_async_commit();
  };

  constexpr int kPieces = kWidth / kVectorElements<T>;
  for (int i = static_cast<int>(threadIdx.x); i < kFragmentHeads * kPieces;
       i += static_cast<int>(blockDim.x)) {
    const int head = i / kPieces, feature = i % kPieces * kVectorElements<T>;
    const bool valid = head < heads && feature < p.features;
    const T* source = static_cast<const T*>(p.query);
    if (valid) {
      source += sequence * p.query_sequence + (first_head + head) * p.query_head + feature;
    }
    copy_async16(queries + head * kStride + feature, source, valid);
  }
  if (span.begin < span.end) copy_stage(0, span.begin);

  // Rows g and g + 8 of the fragments: see multiply_fragments.
  const int g = lane / 4, t = lane % 4;
  float maximum[2] = {negative_infinity(), negative_infinity()}, sum[2] = {0.0f, 0.0f};
  float slope[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int head = g + 8 * half;
    slope[half] = head < heads ? slope_of(p, sequence, first_head + head) : 0.0f;
  }
  float weighted[kWidth / 8][4] = {};

  int stage = 0;
  for (int position = span.begin; position < span.end; position += kFragmentTile) {
    if (position + kFragmentTile < span.end) {
      copy_stage(stage ^ 1, position + kFragmentTile);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncthreads();  // everybody's copies have landed
    const T* keys = keys_of(stage) + warp * kWarpKeys * kStride;
    const T* values = values_of(stage) + warp * kWarpKeys * kStride;

    float s[2][4] = {};
#pragma unroll
    for (int feature = 0; feature < kWidth; feature += 16) {
      uint32_t a[4], b[4];
      load_matrices<false>(a, queries + (lane % 16) * kStride + feature + lane / 16 * 8);
      load_matrices<false>(
          b, keys + (lane / 16 * 8 + lane % 8) * kStride + feature + lane / 8 % 2 * 8);
      multiply_fragments<T>(s[0], a[0], a[1], a[2], a[3], b[0], b[1]);
      multiply_fragments<T>(s[1], a[0], a[1], a[2], a[3], b[2], b[3]);
    }
    float largest[2] = {maximum[0], maximum[1]};
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = position + warp * kWarpKeys + tile * 8 + 2 * t + i % 2;
        s[tile][i] = score(p, s[tile][i], slope[i / 2], key, span);
        largest[i / 2] = fmaxf(largest[i / 2], s[tile][i]);
      }
    }
    float pivot[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      largest[half] = fmaxf(largest[half], __shfl_xor_sync(kFullWarp, largest[half], 1));
      largest[half] = fmaxf(largest[half], __shfl_xor_sync(kFullWarp, largest[half], 2));
      // Nothing seen so far: any finite number in place of -inf, whose difference is not a number.
      pivot[half] = largest[half] == negative_infinity() ? 0.0f : largest[half];
      const float shrink = exp2f(maximum[half] - pivot[half]);
      maximum[half] = largest[half];
      sum[half] *= shrink;
#pragma unroll
      for (int column = 0; column < kWidth / 8; ++column) {
        weighted[column][2 * half] *= shrink;
        weighted[column][2 * half + 1] *= shrink;
      }
    }
    uint32_t weight[2][2];  // [8 keys][row half]
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float first = exp2f(s[tile][2 * half] - pivot[half]);
        const float second = exp2f(s[tile][2 * half + 1] - pivot[half]);
        sum[half] += first + second;
        weight[tile][half] = pack<T>(first, second);
      }
    }
#pragma unroll
    for (int feature = 0; feature < kWidth; feature += 16) {
      uint32_t b[4];
      load_matrices<true>(b, values + (lane % 16) * kStride + feature + lane / 16 * 8);
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        multiply_fragments<T>(weighted[feature / 8 + tile], weight[0][0], weight[0][1],
                              weight[1][0], weight[1][1], b[2 * tile], b[2 * tile + 1]);
      }
    }
    __syncthreads();  // the stage may be overwritten
    stage ^= 1;
  }
  copy_async_wait<0>();  // the queries', of a block without keys
  __syncthreads();

  // The tiles' memory now takes the warps' results: [warp][head]: weighted values, maximum, sum.
  constexpr int kResult = kWidth + 2;
  auto* results = reinterpret_cast<float*>(tiles);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float total = sum[half];
    total += __shfl_xor_sync(kFullWarp, total, 1);
    total += __shfl_xor_sync(kFullWarp, total, 2);
    float* own = results + (warp * kFragmentHeads + g + 8 * half) * kResult;
    if (t == 0) {
      own[kWidth] = maximum[half];
      own[kWidth + 1] = total;
    }
#pragma unroll
    for (int column = 0; column < kWidth / 8; ++column) {
      own[column * 8 + 2 * t] = weighted[column][2 * half];
      own[column * 8 + 2 * t + 1] = weighted[column][2 * half + 1];
    }
  }
  __syncthreads();
  for (int head = warp; head < heads; head += kFragmentWarps) {
    const auto result_of = [&](int w) { return results + (w * kFragmentHeads + head) * kResult; };
    float merged_maximum = negative_infinity(), merged_sum = 0.0f, share[kFragmentWarps];
#pragma unroll
    for (int w = 0; w < kFragmentWarps; ++w) {
      merged_maximum = fmaxf(merged_maximum, result_of(w)[kWidth]);
    }
    const float pivot = merged_maximum == negative_infinity() ? 0.0f : merged_maximum;
#pragma unroll
    for (int w = 0; w < kFragmentWarps; ++w) {
      share[w] = exp2f(result_of(w)[kWidth] - pivot);
      merged_sum += share[w] * result_of(w)[kWidth + 1];
    }
    const HeadResult<T> result(p, sequence, first_head + head, split, merged_maximum, merged_sum);
    if (lane == 0) result.write_lse();
    for (int feature = lane; feature < kWidth; feature += kWarp) {
      float value = 0.0f;
#pragma unroll
      for (int w = 0; w < kFragmentWarps; ++w) value += share[w] * result_of(w)[feature];
      result.write(feature, value);
    }
  }
}

// --- float: a warp per head, a lane per key for the scores, a lane per features for the values ---

// Rows are 16 bytes longer than their data, so that a warp's vectors lie in different banks.
__host__ __device__ inline int float_stride(int64_t features) {
  return static_cast<int>(features) + kVectorElements<float>;
}
size_t float_shared_bytes(int64_t features) {
  return size_t(kFloatHeads + 2 * kStages * kFloatTile) * float_stride(features) * sizeof(float);
}

__global__ void __launch_bounds__(kFloatHeads* kWarp, 1)
    decode_float_kernel(const DecodeAttention p) {
  constexpr int kElements = kVectorElements<float>;
  constexpr int kOwn = kMaxDecodeFeatures / (kWarp * kElements);  // vectors of features per lane
  const int group_size = static_cast<int>(p.query_heads / p.kv_heads);
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const int head_tiles = (group_size + warps - 1) / warps;
  const int split = static_cast<int>(blockIdx.x), sequence = static_cast<int>(blockIdx.z);
  const int kv_head = static_cast<int>(blockIdx.y) / head_tiles;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int in_group = static_cast<int>(blockIdx.y) % head_tiles * warps + warp;
  const bool has_head = in_group < group_size;
  const int head = kv_head * group_size + in_group;
  const int features = static_cast<int>(p.features), stride = float_stride(features);
  const Span span(p, kFloatTile, sequence, split);

  auto* query = reinterpret_cast<float*>(dynamic_shared()) + warp * stride;
  float* tiles = reinterpret_cast<float*>(dynamic_shared()) + kFloatHeads * stride;
  const auto keys_of = [&](int stage) { return tiles + 2 * stage * kFloatTile * stride; };
  const auto values_of = [&](int stage) { return keys_of(stage) + kFloatTile * stride; };
  const auto copy_stage = [&](int stage, int position) {
    copy_tile(keys_of(stage), stride, features, p.key, p, sequence, kv_head, position, span.end,
              kFloatTile);
    copy_tile(values_of(stage), stride, features, p.value, p, sequence, kv_head, position, span.end,
              kFloatTile);
    copy_async_commit();
  };
  for (int feature = lane; feature < features; feature += kWarp) {
    query[feature] = has_head
                         ? static_cast<const float*>(
                               p.query)[sequence * p.query_sequence + head * p.query_head + feature]
                         : 0.0f;
  }
  if (span.begin < span.end) copy_stage(0, span.begin);

  const float slope = has_head ? slope_of(p, sequence, head) : 0.0f;
  float maximum = negative_infinity(), sum = 0.0f, weighted[kOwn][kElements] = {};
  int stage = 0;
  for (int position = span.begin; position < span.end; position += kFloatTile) {
    if (position + kFloatTile < span.end) {
      copy_stage(stage ^ 1, position + kFloatTile);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncthreads();  // everybody's copies have landed
    const float* key = keys_of(stage) + lane * stride;
    float product = 0.0f;
    for (int feature = 0; feature < features; feature += kElements) {
      float a[kElements], b[kElements];
      unpack<float>(load16(query + feature), a);
      unpack<float>(load16(key + feature), b);
#pragma unroll
      for (int i = 0; i < kElements; ++i) product += a[i] * b[i];
    }
    const float s = score(p, product, slope, position + lane, span);
    float largest = fmaxf(maximum, s);
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, lanes));
    }
    const float pivot = largest == negative_infinity() ? 0.0f : largest;
    const float shrink = exp2f(maximum - pivot), weight = exp2f(s - pivot);
    maximum = largest;
    sum = sum * shrink + weight;
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) weighted[own][i] *= shrink;
    }
    const float* values = values_of(stage);
    for (int row = 0; row < kFloatTile; ++row) {
      const float row_weight = __shfl_sync(kFullWarp, weight, row);
#pragma unroll
      for (int own = 0; own < kOwn; ++own) {
        const int feature = (own * kWarp + lane) * kElements;
        if (feature >= features) continue;
        float value[kElements];
        unpack<float>(load16(values + row * stride + feature), value);
#pragma unroll
        for (int i = 0; i < kElements; ++i) weighted[own][i] += row_weight * value[i];
      }
    }
    __syncthreads();  // the stage may be overwritten
    stage ^= 1;
  }
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    sum += __shfl_xor_sync(kFullWarp, sum, lanes);
  }
  if (!has_head) return;
  const HeadResult<float> result(p, sequence, head, split, maximum, sum);
  if (lane == 0) result.write_lse();
#pragma unroll
  for (int own = 0; own < kOwn; ++own) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      result.write((own * kWarp + lane) * kElements + i, weighted[own][i]);
    }
  }
}

// --- merging the splits ---

template <class T>
__global__ void __launch_bounds__(kWarp) merge_kernel(const DecodeAttention p) {
  const int64_t rows = p.batch * p.query_heads, row = blockIdx.x;
  const int head = static_cast<int>(row % p.query_heads);
  const float sink = p.sinks == nullptr ? negative_infinity() : p.sinks[head];
  float maximum = sink;
  for (int s = 0; s < p.splits; ++s) maximum = fmaxf(maximum, p.partial_lse[s * rows + row]);
  const float pivot = maximum == negative_infinity() ? 0.0f : maximum;
  float sum = expf(sink - pivot);
  for (int s = 0; s < p.splits; ++s) sum += expf(p.partial_lse[s * rows + row] - pivot);
  const bool empty = sum == 0.0f;  // a part that is no number makes the sum one, too
  if (threadIdx.x == 0) p.lse[row] = empty ? negative_infinity() : maximum + logf(sum);
  for (int feature = static_cast<int>(threadIdx.x); feature < p.features; feature += kWarp) {
    float value = 0.0f;
    for (int s = 0; s < p.splits; ++s) {
      const float share = expf(p.partial_lse[s * rows + row] - pivot);
      value += share * p.partial_output[(s * rows + row) * p.features + feature];
    }
    static_cast<T*>(p.output)[row * p.features + feature] =
        from_float<T>(empty ? 0.0f : value / sum);
  }
}

int heads_per_block(const DecodeAttention& p) {
  if (p.dtype != DType::kF32) return kFragmentHeads;
  return static_cast<int>(std::min<int64_t>(p.query_heads / p.kv_heads, kFloatHeads));
}
int64_t head_blocks(const DecodeAttention& p) {
  const int64_t group_size = p.query_heads / p.kv_heads, heads = heads_per_block(p);
  return p.kv_heads * ((group_size + heads - 1) / heads);
}
Grid grid_of(const DecodeAttention& p) {
  return {static_cast<unsigned>(p.splits), static_cast<unsigned>(head_blocks(p)),
          static_cast<unsigned>(p.batch)};
}

size_t shared_bytes(DType dtype, int64_t features) {
  if (dtype == DType::kF32) return float_shared_bytes(features);
  return fragment_shared_bytes(features <= 64 ? 64 : features <= 128 ? 128 : 256);
}

template <class T, int kWidth>
void start(const DecodeAttention& p, Stream stream) {
  launch("decode_attention", decode_kernel<T, kWidth>, grid_of(p), kFragmentWarps * kWarp,
         fragment_shared_bytes(kWidth), stream, p);
}

template <class T>
void start_by_width(const DecodeAttention& p, Stream stream) {
  if (p.features <= 64) return start<T, 64>(p, stream);
  if (p.features <= 128) return start<T, 128>(p, stream);
  start<T, 256>(p, stream);
}

template <class T>
void merge(const DecodeAttention& p, Stream stream) {
  if (p.splits == 1) return;
  launch("decode_attention_merge", merge_kernel<T>,
         {static_cast<unsigned>(p.batch * p.query_heads), 1, 1}, kWarp, 0, stream, p);
}

}  // namespace

std::string decode_problem(const DecodeAttention& p, const DeviceLimits& limits) {
  // A grid's second and third dimension, and its first. Positions are ints, of the last tile's end
  // too.
  constexpr int64_t kMostRows = 65535, kMostBlocks = (int64_t{1} << 31) - 1;
  constexpr int64_t kMostKeys = kMostBlocks - kFragmentTile;
  if (p.dtype == DType::kF64) return "computes in float32, bfloat16 and float16, not float64";
  if (p.features % kVectorElements<bf16> != 0 || p.features > kMaxDecodeFeatures) {
    return "takes multiples of 8 features up to " + std::to_string(kMaxDecodeFeatures) + ", got " +
           std::to_string(p.features);
  }
  if (p.batch > kMostRows || head_blocks(p) > kMostRows || p.batch * p.query_heads > kMostBlocks) {
    return "takes up to 65535 sequences and blocks of heads, got " + std::to_string(p.batch) +
           " and " + std::to_string(head_blocks(p));
  }
  if (p.capacity > kMostKeys) {
    return "takes caches of up to " + std::to_string(kMostKeys) + " keys, got " +
           std::to_string(p.capacity);
  }
  const size_t needed = shared_bytes(p.dtype, p.features);
  if (needed <= limits.shared_per_block) return "";
  return "needs " + std::to_string(needed) + " bytes of shared memory, a block here has " +
         std::to_string(limits.shared_per_block);
}

int decode_splits(const DecodeAttention& p, const DeviceLimits& limits) {
  constexpr int64_t kShort = 4, kMostSplits = 128;
  const int64_t tile = p.dtype == DType::kF32 ? kFloatTile : kFragmentTile;
  const int64_t tiles = (p.capacity + tile - 1) / tile, blocks = p.batch * head_blocks(p);
  if (tiles <= kShort || blocks == 0) return 1;
  return static_cast<int>(
      std::max<int64_t>(1, std::min({limits.multiprocessors / blocks, tiles, kMostSplits})));
}

void decode_attention(const DecodeAttention& p, Stream stream) {
  switch (p.dtype) {
    case DType::kF32:
      launch("decode_attention", decode_float_kernel, grid_of(p),
             static_cast<unsigned>(heads_per_block(p) * kWarp), float_shared_bytes(p.features),
             stream, p);
      return merge<float>(p, stream);
    case DType::kBF16: start_by_width<bf16>(p, stream); return merge<bf16>(p, stream);
    default: start_by_width<f16>(p, stream); return merge<f16>(p, stream);
  }
}

}  // namespace fmk::cuda
