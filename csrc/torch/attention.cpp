#include "cpu/attention.h"

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

AttentionMask mask_operand(const OptionalTensor& mask, const Tensor& query,
                           const std::vector<int64_t>& scores) {
  if (!mask) return {};
  check_cpu(*mask, "attn_mask");
  const bool boolean = mask->scalar_type() == ScalarType::Bool;
  FMK_CHECK(boolean || mask->scalar_type() == query.scalar_type(),
            "attn_mask: expected bool or the dtype of query");
  FMK_CHECK(mask->dim() == 4, "attn_mask: expected four dimensions, got ", mask->dim());
  int64_t strides[4];
  for (int i = 0; i < 4; ++i) {
    FMK_CHECK(mask->size(i) == scores[i] || mask->size(i) == 1,
              "attn_mask: expected a shape that broadcasts to ", to_string(scores), ", got ",
              to_string(shape_of(*mask)));
    strides[i] = mask->size(i) == 1 ? 0 : mask->stride(i);
  }
  return {data_of(*mask), boolean, strides[0], strides[1], strides[2], strides[3]};
}

AttentionProblem problem_of(const Tensor& query, const Tensor& key, const Tensor& value,
                            const OptionalTensor& mask, bool is_causal, double scale) {
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
  p.mask = mask_operand(mask, query, {p.batch, p.heads, p.queries, p.keys});
  p.causal = is_causal;
  p.scale = scale;
  return p;
}

ScalarType lse_type(DType dtype) {
  return dtype == DType::kF64 ? ScalarType::Double : ScalarType::Float;
}

// Whether the heads of a position lie side by side in `query`, as they do in the transpose of a
// (B, Sq, Hq, D) tensor, or of one third of a packed projection.
bool is_transposed(const Tensor& query) {
  return query.size(1) > 1 && query.size(2) > 1 && query.stride(1) < query.stride(2);
}

AttentionResult result(const Tensor& tensor) {
  return {mutable_data_of(tensor), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

std::tuple<Tensor, Tensor> sdpa_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    const OptionalTensor& dropout_seed, int64_t window_left, int64_t window_right, double scale,
    double softcap, double dropout_p) {
  FMK_CHECK(!alibi_slopes && !sinks && !cu_seqlens_q && !cu_seqlens_k && !dropout_seed &&
                window_left < 0 && window_right <= 0 && softcap == 0 && dropout_p == 0,
            "not supported");
  const bool is_causal = window_right == 0;
  AttentionForward p{};
  p.problem = problem_of(query, key, value, attn_mask, is_causal, scale);
  const AttentionProblem& q = p.problem;
  Tensor output = is_transposed(query)
                      ? torch::stable::transpose(
                            allocate(query, {q.batch, q.queries, q.heads, q.value_dim}), 1, 2)
                      : allocate(query, {q.batch, q.heads, q.queries, q.value_dim});
  Tensor lse = allocate(query, {q.batch, q.heads, q.queries}, lse_type(q.dtype));
  p.output = result(output);
  p.lse = mutable_data_of(lse);
  attention_kernels().forward(p, torch_pool());
  return {output, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sdpa_backward(
    const Tensor& grad_output, const OptionalTensor& grad_lse, const Tensor& query,
    const Tensor& key, const Tensor& value, const Tensor& output, const Tensor& lse,
    const OptionalTensor& attn_mask, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, const OptionalTensor& dropout_seed, int64_t window_left,
    int64_t window_right, double scale, double softcap, double dropout_p, bool need_query,
    bool need_key, bool need_value, bool need_mask, bool need_slopes, bool need_sinks) {
  FMK_CHECK(!alibi_slopes && !sinks && !cu_seqlens_q && !cu_seqlens_k && !dropout_seed &&
                window_left < 0 && window_right <= 0 && softcap == 0 && dropout_p == 0 &&
                !need_mask && !need_slopes && !need_sinks,
            "not supported");
  const bool is_causal = window_right == 0;
  AttentionBackward p{};
  p.problem = problem_of(query, key, value, attn_mask, is_causal, scale);
  const AttentionProblem& q = p.problem;
  const std::vector<int64_t> rows{q.batch, q.heads, q.queries};
  const std::vector<int64_t> output_shape{q.batch, q.heads, q.queries, q.value_dim};
  p.grad_output = operand(grad_output, "grad_output", query, output_shape);
  p.output = operand(output, "output", query, output_shape);
  const auto check_lse = [&](const Tensor& tensor, const char* name) {
    check_cpu(tensor, name);
    FMK_CHECK(tensor.scalar_type() == lse_type(q.dtype), name,
              ": expected float32, or float64 for float64 operands");
    check_shape(tensor, name, rows);
    check_contiguous(tensor, name);
    return data_of(tensor);
  };
  p.lse = check_lse(lse, "lse");
  p.grad_lse = grad_lse ? check_lse(*grad_lse, "grad_lse") : nullptr;

  Tensor grad_query = allocate_if(need_query, query, shape_of(query));
  Tensor grad_key = allocate_if(need_key, query, shape_of(key));
  Tensor grad_value = allocate_if(need_value, query, shape_of(value));
  if (need_query) p.grad_query = result(grad_query);
  if (need_key) p.grad_key = result(grad_key);
  if (need_value) p.grad_value = result(grad_value);
  attention_kernels().backward(p, torch_pool());
  return {grad_query, grad_key, grad_value, nothing(query), nothing(query), nothing(query)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CPU, m) {
  m.impl("sdpa_forward", TORCH_BOX(&sdpa_forward));
  m.impl("sdpa_backward", TORCH_BOX(&sdpa_backward));
}

}  // namespace fmk::ops
