// Decode attention on CUDA tensors: see csrc/cuda/attention_decode.h.
#include <tuple>

#include "cuda/attention_decode.h"
#include "torch/cuda.h"

namespace fmk::ops {
namespace {

// Rows of features: contiguous, at addresses that are multiples of 16 bytes.
void check_rows(const Tensor& tensor, const char* name, const Tensor& query) {
  FMK_CHECK(on_device(tensor) && tensor.get_device() == query.get_device(), name,
            ": expected a tensor on the query's device");
  FMK_CHECK(tensor.scalar_type() == query.scalar_type(), name, ": expected the query's dtype");
  FMK_CHECK(tensor.dim() == 4, name, ": expected four dimensions, got ", tensor.dim());
  FMK_CHECK(is_aligned(tensor), name, ": expected data that starts at a multiple of 16 bytes");
  FMK_CHECK(tensor.stride(3) == 1, name, ": expected a contiguous last dimension");
  const int64_t vector = dtype_of(tensor, name) == DType::kF32 ? 4 : 8;
  for (int dim = 0; dim < 3; ++dim) {
    FMK_CHECK(tensor.size(dim) <= 1 || tensor.stride(dim) % vector == 0, name,
              ": expected strides that are multiples of 16 bytes");
  }
}

void check_small(const Tensor& tensor, const char* name, const Tensor& query, ScalarType dtype,
                 const std::vector<int64_t>& shape) {
  FMK_CHECK(on_device(tensor) && tensor.get_device() == query.get_device(), name,
            ": expected a tensor on the query's device");
  FMK_CHECK(tensor.scalar_type() == dtype, name, ": expected another dtype");
  check_shape(tensor, name, shape);
  check_contiguous(tensor, name);
}

const float* floats_of(const OptionalTensor& tensor) {
  return static_cast<const float*>(data_of(tensor));
}

std::tuple<Tensor, Tensor> sdpa_decode(const Tensor& query, const Tensor& key_cache,
                                       const Tensor& value_cache, const Tensor& seqlens,
                                       const OptionalTensor& page_table,
                                       const OptionalTensor& alibi_slopes,
                                       const OptionalTensor& sinks, int64_t window_left,
                                       double scale, double softcap) {
  FMK_CHECK(on_device(query), "query: expected a tensor on the device");
  check_rows(query, "query", query);
  check_rows(key_cache, "key_cache", query);
  check_rows(value_cache, "value_cache", query);
  cuda::DecodeAttention p{};
  p.dtype = dtype_of(query, "query");
  p.batch = query.size(0);
  p.query_heads = query.size(1);
  p.features = query.size(3);
  p.kv_heads = key_cache.size(1);
  FMK_CHECK(query.size(2) == 1, "query: expected one query per sequence, got ", query.size(2));
  FMK_CHECK(p.features > 0, "query: expected at least one feature");
  FMK_CHECK(p.kv_heads > 0 && p.query_heads % p.kv_heads == 0, "key_cache: expected a divisor of ",
            p.query_heads, " heads, got ", p.kv_heads);
  const int64_t blocks = key_cache.size(0), rows = key_cache.size(2);
  check_shape(key_cache, "key_cache", {blocks, p.kv_heads, rows, p.features});
  check_shape(value_cache, "value_cache", {blocks, p.kv_heads, rows, p.features});
  check_small(seqlens, "seqlens", query, ScalarType::Int, {p.batch});
  if (page_table) {
    check_small(*page_table, "page_table", query, ScalarType::Int, {p.batch, page_table->size(1)});
    p.page_table = static_cast<const int32_t*>(data_of(page_table));
    p.page_stride = page_table->size(1);
    p.pages = blocks;
    FMK_CHECK(rows < int64_t{1} << 31, "key_cache: expected fewer than 2^31 rows in a page");
    p.page_size = static_cast<int>(rows);
    p.capacity = p.page_stride * rows;
  } else {
    FMK_CHECK(blocks == p.batch, "key_cache: expected ", p.batch, " sequences, got ", blocks);
    p.capacity = rows;
  }
  if (alibi_slopes) {
    check_small(*alibi_slopes, "alibi_slopes", query, ScalarType::Float,
                {alibi_slopes->size(0), p.query_heads});
    FMK_CHECK(alibi_slopes->size(0) == 1 || alibi_slopes->size(0) == p.batch,
              "alibi_slopes: expected one row, or one per sequence");
    p.alibi_slopes = floats_of(alibi_slopes);
    p.slopes_sequence = alibi_slopes->size(0) == 1 ? 0 : p.query_heads;
  }
  if (sinks) check_small(*sinks, "sinks", query, ScalarType::Float, {p.query_heads});
  p.sinks = floats_of(sinks);

  const OnDeviceOf device(query);
  const cuda::DeviceLimits limits = cuda::device_limits();
  const std::string problem = cuda::decode_problem(p, limits);
  FMK_CHECK(problem.empty(), "sdpa_decode ", problem);
  Tensor output = allocate(query, {p.batch, p.query_heads, 1, p.features});
  Tensor lse = allocate(query, {p.batch, p.query_heads, 1}, ScalarType::Float);
  if (p.batch == 0 || p.query_heads == 0) return {output, lse};
  p.query = data_of(query);
  p.query_sequence = query.stride(0);
  p.query_head = query.stride(1);
  const auto cache = [](const Tensor& tensor) {
    return cuda::DecodeCache{data_of(tensor), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
  };
  p.key = cache(key_cache);
  p.value = cache(value_cache);
  p.lengths = static_cast<const int32_t*>(data_of(seqlens));
  p.window_left = window_left;
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  p.splits = cuda::decode_splits(p, limits);
  const int64_t parts = p.splits > 1 ? p.splits : 0;
  Tensor partial_output =
      allocate(query, {parts, p.batch, p.query_heads, p.features}, ScalarType::Float);
  Tensor partial_lse = allocate(query, {parts, p.batch, p.query_heads}, ScalarType::Float);
  p.output = mutable_data_of(output);
  p.lse = static_cast<float*>(mutable_data_of(lse));
  p.partial_output = static_cast<float*>(mutable_data_of(partial_output));
  p.partial_lse = static_cast<float*>(mutable_data_of(partial_lse));
  cuda::decode_attention(p, device.stream());
  return {output, lse};
}

// Why the device cannot take such queries; empty if it can.
std::string sdpa_decode_problem(int64_t device, std::string dtype, int64_t batch,
                                int64_t query_heads, int64_t kv_heads, int64_t features,
                                int64_t capacity) {
  FMK_CHECK(kv_heads > 0, "kv_heads: expected at least one");
  const OnDeviceOf guard(device);
  cuda::DecodeAttention p{};
  p.dtype = dtype_named(dtype);
  p.batch = batch;
  p.query_heads = query_heads;
  p.kv_heads = kv_heads;
  p.features = features;
  p.capacity = capacity;
  return cuda::decode_problem(p, cuda::device_limits());
}

}  // namespace
}  // namespace fmk::ops

STABLE_TORCH_LIBRARY_IMPL(fmkernels, FMK_CUDA_KEY, m) {
  m.impl("sdpa_decode", TORCH_BOX(&fmk::ops::sdpa_decode));
}

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CompositeExplicitAutograd, m) {
  m.impl("sdpa_decode_problem", TORCH_BOX(&fmk::ops::sdpa_decode_problem));
}
