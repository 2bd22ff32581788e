#include "cpu/linear.h"

#include <type_traits>

#include "cpu/linear_products.h"
#include "cpu/reduce.h"

namespace fmk::FMK_ISA {
namespace {

template <class T>
void forward_typed(const LinearForward& p, const Parallel& pool) {
  GemmProblem<T> product = weight_product<T>(p.input, p.rows, p.in_features, p.weight,
                                             p.out_features, p.packed_weight, p.weight_transposed);
  writes_to(product, p.output);
  Epilogue<T>& epilogue = product.epilogue;
  epilogue.shift = bias_shift<T>(p.bias, p.out_features, Scratch::kCall);
  epilogue.residual = static_cast<const T*>(p.residual);
  epilogue.ld_residual = p.out_features;
  epilogue.preactivation = static_cast<T*>(p.preactivation);
  epilogue.activation = p.activation;
  multiply(product, pool);
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
  if (p.grad_input) {
    auto product = input_gradient<T>(grad_z, p.rows, p.out_features, p.weight, p.in_features,
                                     p.weight_transposed);
    writes_to(product, p.grad_input);
    multiply(product, pool);
  }
  if (p.grad_weight) {
    auto product = p.weight_transposed
                       ? weight_gradient<T>(p.input, p.rows, p.in_features, grad_z, p.out_features)
                       : weight_gradient<T>(grad_z, p.rows, p.out_features, p.input, p.in_features);
    writes_to(product, p.grad_weight);
    multiply(product, pool);
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
void pack_typed(const T* weight, bool transposed, int64_t n, int64_t k, Word<T>* packed,
                const Parallel& pool) {
  using V = Vec<T>;
  const auto split = PanelSplit<V>::of(n);
  parallel_for(pool, split.count, [&](int64_t panel) {
    const int64_t column = split.column(panel), width = split.width_vecs(panel) * V::W;
    const int64_t valid = min_of(width, n - column);
    Word<T>* to = packed + column * words_of<T>(k);
    if (transposed)
      pack_rows_as_panel(weight + column, n, k, valid, width, to);
    else
      pack_columns_as_panel(weight + column * k, k, k, valid, width, to);
  });
}

void pack_weight(DType dtype, const void* weight, bool transposed, int64_t n, int64_t k,
                 void* packed, const Parallel& pool) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    pack_typed(static_cast<const T*>(weight), transposed, n, k, static_cast<Word<T>*>(packed),
               pool);
  });
}

}  // namespace

const LinearKernels& linear_kernels() {
  static constexpr LinearKernels table{&forward, &backward, &packed_bytes, &pack_weight};
  return table;
}

}  // namespace fmk::FMK_ISA
