#include "cpu/linear.h"

#include <type_traits>

#include "cpu/gemm.h"
#include "cpu/reduce.h"

namespace fmk::FMK_ISA {
namespace {

template <class T>
void forward_typed(const LinearForward& p, const Parallel& pool) {
  using V = Vec<T>;
  GemmProblem<T> gemm_problem;
  gemm_problem.m = p.rows;
  gemm_problem.n = p.out_features;
  gemm_problem.k = p.in_features;
  gemm_problem.a = static_cast<const T*>(p.input);
  gemm_problem.lda = p.in_features;
  gemm_problem.packed_b = static_cast<const Word<T>*>(p.packed_weight);
  gemm_problem.b = static_cast<const T*>(p.weight);
  gemm_problem.ldb = p.in_features;
  gemm_problem.b_transposed = true;

  Epilogue<T>& epilogue = gemm_problem.epilogue;
  epilogue.out = static_cast<T*>(p.output);
  epilogue.ld_out = p.out_features;
  if (p.bias) {
    const int64_t padded = PanelSplit<V>::of(p.out_features).padded_columns();
    auto* shift = static_cast<Acc<T>*>(scratch_bytes(Scratch::kCall, padded * sizeof(Acc<T>)));
    widen_padded(static_cast<const T*>(p.bias), p.out_features, padded, Acc<T>(0), shift);
    epilogue.shift = shift;
  }
  epilogue.residual = static_cast<const T*>(p.residual);
  epilogue.ld_residual = p.out_features;
  epilogue.preactivation = static_cast<T*>(p.preactivation);
  epilogue.activation = p.activation;
  gemm(gemm_problem, pool);
}

template <class T>
void backward_typed(const LinearBackward& p, const Parallel& pool) {
  const T* grad_z = static_cast<const T*>(p.grad_output);
  if (p.activation != Activation::kNone) {
    T* out = static_cast<T*>(p.grad_preactivation);
    activation_backward(p.activation, grad_z, static_cast<const T*>(p.saved),
                        p.rows * p.out_features, out, pool);
    grad_z = out;
  }
  if (p.grad_input) {  // [rows][out] x [out][in]
    GemmProblem<T> g;
    g.m = p.rows;
    g.n = p.in_features;
    g.k = p.out_features;
    g.a = grad_z;
    g.lda = p.out_features;
    g.b = static_cast<const T*>(p.weight);
    g.ldb = p.in_features;
    g.epilogue.out = static_cast<T*>(p.grad_input);
    g.epilogue.ld_out = p.in_features;
    gemm(g, pool);
  }
  if (p.grad_weight) {  // [rows][out]^T x [rows][in]
    GemmProblem<T> g;
    g.m = p.out_features;
    g.n = p.in_features;
    g.k = p.rows;
    g.a = grad_z;
    g.lda = p.out_features;
    g.a_reduction_major = true;
    g.b = static_cast<const T*>(p.input);
    g.ldb = p.in_features;
    g.epilogue.out = static_cast<T*>(p.grad_weight);
    g.epilogue.ld_out = p.in_features;
    gemm(g, pool);
  }
  if (p.grad_bias)
    column_sums(grad_z, p.out_features, p.rows, p.out_features, static_cast<T*>(p.grad_bias), pool);
}

void forward(const LinearForward& p, const Parallel& pool) {
  with_type(p.dtype,
            [&](auto* type) { forward_typed<std::remove_pointer_t<decltype(type)>>(p, pool); });
}

void backward(const LinearBackward& p, const Parallel& pool) {
  with_type(p.dtype,
            [&](auto* type) { backward_typed<std::remove_pointer_t<decltype(type)>>(p, pool); });
}

size_t packed_bytes(DType dtype, int64_t out_features, int64_t in_features) {
  size_t bytes = 0;
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    bytes = static_cast<size_t>(packed_words<T>(out_features, in_features)) * sizeof(Word<T>);
  });
  return bytes;
}

template <class T>
void pack_typed(const T* weight, int64_t n, int64_t k, Word<T>* packed, const Parallel& pool) {
  using V = Vec<T>;
  const auto split = PanelSplit<V>::of(n);
  parallel_for(pool, split.count, [&](int64_t panel) {
    const int64_t column = split.column(panel), width = split.width_vecs(panel) * V::W;
    pack_columns_as_panel(weight + column * k, k, k, min_of(width, n - column), width,
                          packed + column * words_of<T>(k));
  });
}

void pack_weight(DType dtype, const void* weight, int64_t n, int64_t k, void* packed,
                 const Parallel& pool) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    pack_typed(static_cast<const T*>(weight), n, k, static_cast<Word<T>*>(packed), pool);
  });
}

}  // namespace

const LinearKernels& linear_kernels() {
  static constexpr LinearKernels table{&forward, &backward, &packed_bytes, &pack_weight};
  return table;
}

}  // namespace fmk::FMK_ISA
