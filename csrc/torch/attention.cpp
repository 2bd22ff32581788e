#include "cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "torch/common.h"

namespace fmk::ops {
namespace {

// A four-dimensional CPU tensor of the query's dtype and of the given shape, rows adjacent in
// memory.
AttentionOperand operand(const Tensor& tensor, const char* name, const Tensor& query,
                         const std::vector<int64_t>& shape) {
  check_like(tensor, name, query, "query");
  check_shape(tensor, name, shape);
  FMK_CHECK(tensor.stride(3) == 1 || tensor.size(3) <= 1, name,
            ": expected a last dimension of stride 1, got ", tensor.stride(3));
  return {data_of(tensor), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

ScalarType lse_type(DType dtype) {
  return dtype == DType::kF64 ? ScalarType::Double : ScalarType::Float;
}

AttentionMask mask_operand(const OptionalTensor& mask, const Tensor& query,
                           const std::vector<int64_t>& scores) {
  if (!mask) return {};
  check_cpu(*mask, "attn_mask");
  using Kind = AttentionMask::Kind;
  const ScalarType type = mask->scalar_type();
  FMK_CHECK(type == ScalarType::Bool || type == ScalarType::Float || type == query.scalar_type(),
            "attn_mask: expected bool, float32 or the dtype of query");
  const Kind kind = type == ScalarType::Bool      ? Kind::kBytes
                    : type == query.scalar_type() ? Kind::kStorage
                                                  : Kind::kFloat;
  FMK_CHECK(mask->dim() == 4, "attn_mask: expected four dimensions, got ", mask->dim());
  int64_t strides[4];
  for (int i = 0; i < 4; ++i) {
    FMK_CHECK(mask->size(i) == scores[i] || mask->size(i) == 1,
              "attn_mask: expected a shape that broadcasts to ", to_string(scores), ", got ",
              to_string(shape_of(*mask)));
    strides[i] = mask->size(i) == 1 ? 0 : mask->stride(i);
  }
  return {data_of(*mask), kind, strides[0], strides[1], strides[2], strides[3]};
}

// A small contiguous tensor of lse's dtype.
const void* per_head(const OptionalTensor& tensor, const char* name, DType dtype) {
  if (!tensor) return nullptr;
  check_cpu(*tensor, name);
  FMK_CHECK(tensor->scalar_type() == lse_type(dtype), name,
            ": expected float32, or float64 for float64 operands");
  check_contiguous(*tensor, name);
  return data_of(*tensor);
}

const int32_t* indices(const Tensor& tensor, const char* name, const std::vector<int64_t>& shape) {
  check_cpu(tensor, name);
  FMK_CHECK(tensor.scalar_type() == ScalarType::Int, name, ": expected int32");
  check_shape(tensor, name, shape);
  check_contiguous(tensor, name);
  return static_cast<const int32_t*>(data_of(tensor));
}

const int32_t* sequence_offsets(const Tensor& tensor, const char* name, int64_t sequences,
                                int64_t rows) {
  const int32_t* offsets = indices(tensor, name, {sequences + 1});
  for (int64_t n = 0; n <= sequences; ++n)
    FMK_CHECK(n == 0 ? offsets[0] == 0 : offsets[n] >= offsets[n - 1], name,
              ": expected offsets that rise from 0");
  FMK_CHECK(offsets[sequences] == rows, name, ": expected the last offset to be the ", rows,
            " packed rows, got ", offsets[sequences]);
  return offsets;
}

// The options of the ops, in their order.
struct Options {
  const OptionalTensor &attn_mask, &alibi_slopes, &sinks, &cu_seqlens_q, &cu_seqlens_k,
      &dropout_seed;
  int64_t window_left, window_right;
  double scale, softcap, dropout_p;
};

void set_per_head(AttentionProblem& p, const OptionalTensor& slopes, const OptionalTensor& sinks,
                  int64_t sequences) {
  p.sinks = per_head(sinks, "sinks", p.dtype);
  if (sinks) check_shape(*sinks, "sinks", {p.heads});
  p.slopes = per_head(slopes, "alibi_slopes", p.dtype);
  if (!slopes) return;
  FMK_CHECK(slopes->dim() == 2 && slopes->size(1) == p.heads &&
                (slopes->size(0) == sequences || slopes->size(0) == 1),
            "alibi_slopes: expected shape (", sequences, " or 1, ", p.heads, ")");
  p.slopes_batch = slopes->size(0) == 1 ? 0 : p.heads;
}

void set_dropout(AttentionProblem& p, const OptionalTensor& seed, double dropout_p) {
  FMK_CHECK(dropout_p >= 0 && dropout_p <= 1, "dropout_p: expected a number in [0, 1]");
  if (dropout_p == 0) return;
  FMK_CHECK(seed.has_value(), "dropout_seed: expected a tensor where dropout_p > 0");
  check_cpu(*seed, "dropout_seed");
  FMK_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
            "dropout_seed: expected one int64");
  const double threshold = std::nearbyint(dropout_p * 4294967296.0);
  p.dropout.active = true;
  p.dropout.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(data_of(*seed)));
  p.dropout.threshold = static_cast<uint32_t>(std::min(threshold, 4294967295.0));
  p.dropout.factor = dropout_p == 1 ? 0 : 1 / (1 - dropout_p);
}

AttentionProblem problem_of(const Tensor& query, const Tensor& key, const Tensor& value,
                            const Options& options) {
  AttentionProblem p{};
  p.dtype = dtype_of(query, "query");
  for (const auto& [tensor, name] : {std::pair{&query, "query"}, {&key, "key"}, {&value, "value"}})
    FMK_CHECK(tensor->dim() == 4, name, ": expected four dimensions, got ", tensor->dim());
  p.batch = query.size(0);
  p.heads = query.size(1);
  p.queries = query.size(2);
  p.head_dim = query.size(3);
  p.kv_heads = key.size(1);
  p.keys = key.size(2);
  p.value_dim = value.size(3);
  FMK_CHECK(p.kv_heads > 0 ? p.heads % p.kv_heads == 0 : p.heads == 0,
            "key: expected a number of heads that divides the query's ", p.heads, ", got ",
            p.kv_heads);
  p.query = operand(query, "query", query, {p.batch, p.heads, p.queries, p.head_dim});
  p.key = operand(key, "key", query, {p.batch, p.kv_heads, p.keys, p.head_dim});
  p.value = operand(value, "value", query, {p.batch, p.kv_heads, p.keys, p.value_dim});
  p.mask = mask_operand(options.attn_mask, query, {p.batch, p.heads, p.queries, p.keys});
  p.row_batch = p.heads * p.queries;
  p.row_head = p.queries;
  p.sequences = p.batch;
  const OptionalTensor &offsets_q = options.cu_seqlens_q, &offsets_k = options.cu_seqlens_k;
  FMK_CHECK(offsets_q.has_value() == offsets_k.has_value(),
            "cu_seqlens_k: expected together with cu_seqlens_q");
  if (offsets_q) {
    FMK_CHECK(
        p.batch == 1 && !options.attn_mask && offsets_q->dim() == 1 && offsets_q->size(0) >= 1,
        "cu_seqlens_q: expected a vector, a batch of 1 and no attn_mask");
    p.sequences = offsets_q->size(0) - 1;
    p.query_offsets = sequence_offsets(*offsets_q, "cu_seqlens_q", p.sequences, p.queries);
    p.key_offsets = sequence_offsets(*offsets_k, "cu_seqlens_k", p.sequences, p.keys);
  }
  p.window_left = options.window_left;
  p.window_right = options.window_right;
  p.scale = options.scale;
  p.softcap = options.softcap;
  set_per_head(p, options.alibi_slopes, options.sinks, p.sequences);
  set_dropout(p, options.dropout_seed, options.dropout_p);
  return p;
}

// Whether the heads of a position lie side by side in `query`, as they do in the transpose of a
// (B, Sq, Hq, D) tensor, or of one third of a packed projection.
bool is_transposed(const Tensor& query) {
  return query.size(1) > 1 && query.size(2) > 1 && query.stride(1) < query.stride(2);
}

AttentionResult result(const Tensor& tensor) {
  return {mutable_data_of(tensor), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

std::vector<int64_t> weights_shape(const AttentionProblem& p, bool average) {
  if (average) return {p.batch, p.queries, p.keys};
  return {p.batch, p.heads, p.queries, p.keys};
}

// The output of the op: laid out as the query.
Tensor allocate_output(const Tensor& query, const AttentionProblem& p) {
  const std::vector<int64_t> shape{p.batch, p.heads, p.queries, p.value_dim};
  if (!is_transposed(query)) return allocate(query, shape);
  return allocate_strided(query, shape, strides_of(shape, {0, 2, 1, 3}));
}

std::tuple<Tensor, Tensor> sdpa_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    const OptionalTensor& dropout_seed, int64_t window_left, int64_t window_right, double scale,
    double softcap, double dropout_p) {
  AttentionForward p{};
  p.problem = problem_of(query, key, value,
                         {attn_mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, dropout_seed,
                          window_left, window_right, scale, softcap, dropout_p});
  const AttentionProblem& q = p.problem;
  Tensor output = allocate_output(query, q);
  Tensor lse = allocate(query, {q.batch, q.heads, q.queries}, lse_type(q.dtype));
  p.output = result(output);
  p.lse = mutable_data_of(lse);
  attention_kernels().forward(p, torch_pool());
  return {output, lse};
}

Tensor sdpa_inference(const Tensor& query, const Tensor& key, const Tensor& value,
                      const OptionalTensor& attn_mask, bool is_causal, double scale) {
  const OptionalTensor none;
  return std::get<0>(sdpa_forward(query, key, value, attn_mask, none, none, none, none, none, -1,
                                  is_causal ? 0 : -1, scale, 0, 0));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sdpa_statistics(
    const Tensor& query, const Tensor& key, const OptionalTensor& attn_mask,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    const OptionalTensor& dropout_seed, int64_t window_left, int64_t window_right, double scale,
    double softcap, double) {
  FMK_CHECK(!cu_seqlens_q && !cu_seqlens_k, "cu_seqlens_q: expected no packed sequences");
  AttentionStatistics p{};
  p.problem = problem_of(query, key, key,
                         {attn_mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, dropout_seed,
                          window_left, window_right, scale, softcap, 0.0});
  const AttentionProblem& q = p.problem;
  const std::vector<int64_t> rows{q.batch, q.heads, q.queries};
  Tensor entropy = allocate(query, rows, lse_type(q.dtype));
  Tensor top_key = allocate(query, rows, ScalarType::Long);
  Tensor top_weight = allocate(query, rows, lse_type(q.dtype));
  Tensor lse = allocate(query, rows, lse_type(q.dtype));
  p.entropy = mutable_data_of(entropy);
  p.top_key = static_cast<int64_t*>(mutable_data_of(top_key));
  p.top_weight = mutable_data_of(top_weight);
  p.lse = mutable_data_of(lse);
  attention_kernels().statistics(p, torch_pool());
  return {entropy, top_key, top_weight, lse};
}

std::tuple<Tensor, Tensor, Tensor> sdpa_weights(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    const OptionalTensor& dropout_seed, int64_t window_left, int64_t window_right, double scale,
    double softcap, double dropout_p, bool average) {
  FMK_CHECK(!cu_seqlens_q && !cu_seqlens_k, "cu_seqlens_q: expected no packed sequences");
  AttentionWeights p{};
  p.problem = problem_of(query, key, value,
                         {attn_mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, dropout_seed,
                          window_left, window_right, scale, softcap, dropout_p});
  const AttentionProblem& q = p.problem;
  FMK_CHECK(!average || q.heads > 0, "query: expected at least one head to average over");
  Tensor output = allocate_output(query, q);
  Tensor weights = allocate(query, weights_shape(q, average));
  Tensor lse = allocate(query, {q.batch, q.heads, q.queries}, lse_type(q.dtype));
  p.output = result(output);
  p.lse = mutable_data_of(lse);
  p.weights = mutable_data_of(weights);
  p.average = average;
  attention_kernels().weights(p, torch_pool());
  return {output, weights, lse};
}

// Zeros of the compute type, for sums.
Tensor zeros(const Tensor& like, const std::vector<int64_t>& shape, DType dtype) {
  Tensor tensor = allocate(like, shape, lse_type(dtype));
  std::memset(mutable_data_of(tensor), 0, tensor.numel() * (dtype == DType::kF64 ? 8 : 4));
  return tensor;
}

// grad_mask is contiguous with the mask's sizes; its strides are those, 0 where it broadcasts.
Tensor allocate_grad_mask(const Tensor& query, const Tensor& mask, AttentionBackward& p) {
  Tensor grad = zeros(query, shape_of(mask), p.problem.dtype);
  const auto stride = [&](int i) { return mask.size(i) == 1 ? 0 : grad.stride(i); };
  p.grad_mask = mutable_data_of(grad);
  p.mask_numbers = grad.numel();
  p.mask_batch = stride(0);
  p.mask_head = stride(1);
  p.mask_query = stride(2);
  p.mask_key = stride(3);
  return grad;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Which gradients are wanted, in the ops' order.
struct Needs {
  bool query, key, value, mask, slopes, sinks;
};

void set_grad_weights(const Tensor& grad, const Tensor& query, bool average, AttentionBackward& p) {
  const AttentionProblem& q = p.problem;
  FMK_CHECK(!q.query_offsets, "cu_seqlens_q: expected no packed sequences");
  FMK_CHECK(!average || q.heads > 0, "query: expected at least one head to average over");
  check_like(grad, "grad_weights", query, "query");
  check_shape(grad, "grad_weights", weights_shape(q, average));
  const int64_t head = average ? 0 : grad.stride(1);
  p.grad_weights = {data_of(grad), AttentionMask::Kind::kStorage, grad.stride(0),
                    head,          grad.stride(average ? 1 : 2),  grad.stride(average ? 2 : 3)};
  p.grad_weights_factor = average ? 1.0 / static_cast<double>(q.heads) : 1.0;
}

Gradients backward(const Tensor& grad_output, const OptionalTensor& grad_lse,
                   const OptionalTensor& grad_weights, bool average, const Tensor& query,
                   const Tensor& key, const Tensor& value, const Tensor& output, const Tensor& lse,
                   const Options& options, const Needs& need) {
  const auto [need_query, need_key, need_value, need_mask, need_slopes, need_sinks] = need;
  const OptionalTensor &attn_mask = options.attn_mask, &alibi_slopes = options.alibi_slopes;
  const OptionalTensor& sinks = options.sinks;
  AttentionBackward p{};
  p.problem = problem_of(query, key, value, options);
  const AttentionProblem& q = p.problem;
  if (grad_weights) set_grad_weights(*grad_weights, query, average, p);
  const std::vector<int64_t> rows{q.batch, q.heads, q.queries};
  const std::vector<int64_t> output_shape{q.batch, q.heads, q.queries, q.value_dim};
  p.grad_output = operand(grad_output, "grad_output", query, output_shape);
  p.output = operand(output, "output", query, output_shape);
  const auto check_lse = [&](const OptionalTensor& tensor, const char* name) {
    const void* data = per_head(tensor, name, q.dtype);
    if (tensor) check_shape(*tensor, name, rows);
    return data;
  };
  p.lse = check_lse(lse, "lse");
  p.grad_lse = check_lse(grad_lse, "grad_lse");
  FMK_CHECK(!need_mask || (attn_mask && q.mask.kind != AttentionMask::Kind::kBytes),
            "need_mask: there is no attn_mask with a gradient");
  FMK_CHECK(!need_slopes || alibi_slopes, "need_slopes: there are no alibi_slopes");
  FMK_CHECK(!need_sinks || sinks, "need_sinks: there are no sinks");

  Tensor grad_query = allocate_if(need_query, query, shape_of(query));
  Tensor grad_key = allocate_if(need_key, query, shape_of(key));
  Tensor grad_value = allocate_if(need_value, query, shape_of(value));
  Tensor grad_mask = nothing(query), grad_slopes = nothing(query), grad_sinks = nothing(query);
  if (need_query) p.grad_query = result(grad_query);
  if (need_key) p.grad_key = result(grad_key);
  if (need_value) p.grad_value = result(grad_value);
  if (need_mask) grad_mask = allocate_grad_mask(query, *attn_mask, p);
  if (need_slopes) {
    grad_slopes = zeros(query, shape_of(*alibi_slopes), q.dtype);
    p.grad_slopes = mutable_data_of(grad_slopes);
    p.slopes_numbers = grad_slopes.numel();
  }
  if (need_sinks) {
    grad_sinks = zeros(query, {q.heads}, q.dtype);
    p.grad_sinks = mutable_data_of(grad_sinks);
  }
  attention_kernels().backward(p, torch_pool());
  if (need_mask) grad_mask = torch::stable::to(grad_mask, attn_mask->scalar_type());
  return {grad_query, grad_key, grad_value, grad_mask, grad_slopes, grad_sinks};
}

Gradients sdpa_backward(const Tensor& grad_output, const OptionalTensor& grad_lse,
                        const Tensor& query, const Tensor& key, const Tensor& value,
                        const Tensor& output, const Tensor& lse, const OptionalTensor& attn_mask,
                        const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                        const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                        const OptionalTensor& dropout_seed, int64_t window_left,
                        int64_t window_right, double scale, double softcap, double dropout_p,
                        bool need_query, bool need_key, bool need_value, bool need_mask,
                        bool need_slopes, bool need_sinks) {
  return backward(grad_output, grad_lse, std::nullopt, false, query, key, value, output, lse,
                  {attn_mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, dropout_seed,
                   window_left, window_right, scale, softcap, dropout_p},
                  {need_query, need_key, need_value, need_mask, need_slopes, need_sinks});
}

Gradients sdpa_weights_backward(
    const Tensor& grad_output, const Tensor& grad_weights, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& output, const Tensor& lse, const OptionalTensor& attn_mask,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    const OptionalTensor& dropout_seed, int64_t window_left, int64_t window_right, double scale,
    double softcap, double dropout_p, bool average, bool need_query, bool need_key, bool need_value,
    bool need_mask, bool need_slopes, bool need_sinks) {
  return backward(grad_output, std::nullopt, grad_weights, average, query, key, value, output, lse,
                  {attn_mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, dropout_seed,
                   window_left, window_right, scale, softcap, dropout_p},
                  {need_query, need_key, need_value, need_mask, need_slopes, need_sinks});
}

// --- the cache ---

struct Cache {
  const int32_t *lengths, *pages;
  int64_t pages_per_sequence, capacity;
};

// Checks lengths, with `appended` more keys to come, and the pages that they reach.
Cache cache_of(const Tensor& key_cache, const Tensor& seqlens, const OptionalTensor& page_table,
               int64_t batch, int64_t appended) {
  Cache c{};
  const int64_t size = key_cache.size(2);
  c.lengths = indices(seqlens, "seqlens", {batch});
  c.capacity = size;
  if (page_table) {
    FMK_CHECK(page_table->dim() == 2, "page_table: expected two dimensions");
    FMK_CHECK(size > 0, "key_cache: expected pages of at least one row");
    c.pages_per_sequence = page_table->size(1);
    c.pages = indices(*page_table, "page_table", {batch, c.pages_per_sequence});
    c.capacity = c.pages_per_sequence * size;
  }
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t first = c.lengths[b], last = first + appended;
    FMK_CHECK(first >= 0 && last <= c.capacity, "cache_seqlens: lengths must stay in [0, ",
              c.capacity, "], got ", first, " to ", last);
    if (!c.pages) continue;
    for (int64_t page = 0; page * size < last; ++page) {
      const int64_t entry = c.pages[b * c.pages_per_sequence + page];
      FMK_CHECK(entry >= 0 && entry < key_cache.size(0), "page_table: entries must be in [0, ",
                key_cache.size(0), "), got ", entry);
    }
  }
  return c;
}

void check_caches(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                  const OptionalTensor& page_table) {
  for (const auto& [tensor, name] :
       {std::pair{&query, "query"}, {&key_cache, "key_cache"}, {&value_cache, "value_cache"}})
    FMK_CHECK(tensor->dim() == 4, name, ": expected four dimensions, got ", tensor->dim());
  if (!page_table)
    FMK_CHECK(key_cache.size(0) == query.size(0), "key_cache: expected the batch of query");
}

std::tuple<Tensor, Tensor> sdpa_cached(const Tensor& query, const Tensor& key_cache,
                                       const Tensor& value_cache, const Tensor& seqlens,
                                       const OptionalTensor& page_table,
                                       const OptionalTensor& alibi_slopes,
                                       const OptionalTensor& sinks, int64_t window_left,
                                       int64_t window_right, double scale, double softcap) {
  check_caches(query, key_cache, value_cache, page_table);
  AttentionCached p{};
  AttentionProblem& q = p.problem;
  q.dtype = dtype_of(query, "query");
  q.batch = q.sequences = query.size(0);
  q.heads = query.size(1);
  q.queries = query.size(2);
  q.head_dim = query.size(3);
  q.kv_heads = key_cache.size(1);
  q.keys = key_cache.size(2);
  q.value_dim = value_cache.size(3);
  FMK_CHECK(q.kv_heads > 0 ? q.heads % q.kv_heads == 0 : q.heads == 0,
            "key_cache: expected a number of heads that divides the query's ", q.heads, ", got ",
            q.kv_heads);
  const int64_t entries = key_cache.size(0);
  q.query = operand(query, "query", query, {q.batch, q.heads, q.queries, q.head_dim});
  q.key = operand(key_cache, "key_cache", query, {entries, q.kv_heads, q.keys, q.head_dim});
  q.value = operand(value_cache, "value_cache", query, {entries, q.kv_heads, q.keys, q.value_dim});
  q.row_batch = q.heads * q.queries;
  q.row_head = q.queries;
  q.window_left = window_left;
  q.window_right = window_right;
  q.scale = scale;
  q.softcap = softcap;
  set_per_head(q, alibi_slopes, sinks, q.batch);
  const Cache cache = cache_of(key_cache, seqlens, page_table, q.batch, 0);
  p.lengths = cache.lengths;
  p.pages = cache.pages;
  p.pages_per_sequence = cache.pages_per_sequence;
  p.page_size = q.keys;
  Tensor output = allocate_output(query, q);
  Tensor lse = allocate(query, {q.batch, q.heads, q.queries}, lse_type(q.dtype));
  p.output = result(output);
  p.lse = mutable_data_of(lse);
  attention_kernels().cached(p, torch_pool());
  return {output, lse};
}

void kv_cache_append(const Tensor& key_cache, const Tensor& value_cache, const Tensor& key,
                     const Tensor& value, const Tensor& seqlens, const OptionalTensor& page_table) {
  check_caches(key, key_cache, value_cache, page_table);
  const int64_t batch = key.size(0), heads = key_cache.size(1), count = key.size(2);
  const int64_t size = key_cache.size(2);
  check_shape(value_cache, "value_cache", {key_cache.size(0), heads, size, value_cache.size(3)});
  const Cache cache = cache_of(key_cache, seqlens, page_table, batch, count);
  const auto append = [&](const Tensor& to, const Tensor& from, const char* name) {
    const AttentionOperand source =
        operand(from, name, key_cache, {batch, heads, count, to.size(3)});
    check_like(to, name, key_cache, "key_cache");
    FMK_CHECK(to.stride(3) == 1 || to.size(3) <= 1, name,
              "_cache: expected a last dimension of stride 1");
    const auto bytes = static_cast<int64_t>(dtype_of(to, name) == DType::kF64   ? 8
                                            : dtype_of(to, name) == DType::kF32 ? 4
                                                                                : 2);
    auto* data = static_cast<char*>(mutable_data_of(to));
    const auto* rows = static_cast<const char*>(source.data);
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t head = 0; head < heads; ++head)
        for (int64_t i = 0; i < count; ++i) {
          int64_t entry = b, row = cache.lengths[b] + i;
          if (cache.pages) {
            entry = cache.pages[b * cache.pages_per_sequence + row / size];
            row %= size;
          }
          const int64_t target = entry * to.stride(0) + head * to.stride(1) + row * to.stride(2);
          const int64_t origin = b * source.batch + head * source.head + i * source.row;
          std::memcpy(data + target * bytes, rows + origin * bytes, to.size(3) * bytes);
        }
  };
  append(key_cache, key, "key");
  append(value_cache, value, "value");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CPU, m) {
  m.impl("sdpa_forward", TORCH_BOX(&sdpa_forward));
  m.impl("sdpa_inference", TORCH_BOX(&sdpa_inference));
  m.impl("sdpa_backward", TORCH_BOX(&sdpa_backward));
  m.impl("sdpa_statistics", TORCH_BOX(&sdpa_statistics));
  m.impl("sdpa_weights", TORCH_BOX(&sdpa_weights));
  m.impl("sdpa_weights_backward", TORCH_BOX(&sdpa_weights_backward));
  m.impl("sdpa_cached", TORCH_BOX(&sdpa_cached));
  m.impl("kv_cache_append", TORCH_BOX(&kv_cache_append));
}

}  // namespace fmk::ops
