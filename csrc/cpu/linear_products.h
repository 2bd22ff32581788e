// The three matrix products of a linear layer, as GEMM problems without an epilogue: the caller
// says where the result goes (writes_to) and what happens to it, and runs them (multiply).
#pragma once

#include "cpu/gemm.h"
#include "cpu/reduce.h"

namespace fmk::FMK_ISA {

// gemm, compiled once for all the families that share this header: its tiles are many functions.
void multiply(const GemmProblem<float>& p, const Parallel& pool);
void multiply(const GemmProblem<double>& p, const Parallel& pool);
void multiply(const GemmProblem<bf16>& p, const Parallel& pool);
void multiply(const GemmProblem<f16>& p, const Parallel& pool);

// x w^T: x [rows][k], w [n][k], or [k][n] if transposed.
template <class T>
FMK_INLINE GemmProblem<T> weight_product(const void* x, int64_t rows, int64_t k, const void* w,
                                         int64_t n, const void* packed_w, bool transposed = false) {
  GemmProblem<T> p;
  p.m = rows;
  p.n = n;
  p.k = k;
  p.a = static_cast<const T*>(x);
  p.lda = k;
  // A few rows are bound by reading the weight, which they do faster as it lies: eight streams of
  // whole rows instead of one of panels.
  if (rows > kUnpackedRows || transposed) p.packed_b = static_cast<const Word<T>*>(packed_w);
  p.b = static_cast<const T*>(w);
  p.ldb = transposed ? n : k;
  p.b_transposed = !transposed;
  return p;
}

// The gradient of x: grad w, grad [rows][n], w [n][k], or [k][n] if transposed.
template <class T>
FMK_INLINE GemmProblem<T> input_gradient(const void* grad, int64_t rows, int64_t n, const void* w,
                                         int64_t k, bool transposed = false) {
  GemmProblem<T> p;
  p.m = rows;
  p.n = k;
  p.k = n;
  p.a = static_cast<const T*>(grad);
  p.lda = n;
  p.b = static_cast<const T*>(w);
  p.ldb = transposed ? n : k;
  p.b_transposed = transposed;
  return p;
}

// The gradient of w: grad^T x, grad [rows][n], x [rows][k].
template <class T>
FMK_INLINE GemmProblem<T> weight_gradient(const void* grad, int64_t rows, int64_t n, const void* x,
                                          int64_t k) {
  GemmProblem<T> p;
  p.m = n;
  p.n = k;
  p.k = rows;
  p.a = static_cast<const T*>(grad);
  p.lda = n;
  p.a_reduction_major = true;
  p.b = static_cast<const T*>(x);
  p.ldb = k;
  return p;
}

template <class T>
FMK_INLINE void writes_to(GemmProblem<T>& p, void* out) {
  p.epilogue.out = static_cast<T*>(out);
  p.epilogue.ld_out = p.n;
}

// The bias of n columns as the epilogue's shift, in `slot`; null if there is none.
template <class T>
FMK_INLINE const Acc<T>* bias_shift(const void* bias, int64_t n, Scratch slot) {
  if (!bias) return nullptr;
  const int64_t padded = PanelSplit<Vec<T>>::of(n).padded_columns();
  auto* shift = static_cast<Acc<T>*>(scratch_bytes(slot, padded * sizeof(Acc<T>)));
  widen_padded(static_cast<const T*>(bias), n, padded, Acc<T>(0), shift);
  return shift;
}

}  // namespace fmk::FMK_ISA
