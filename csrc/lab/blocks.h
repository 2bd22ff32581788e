// The pieces that every kernel is made of, one by one: the GEMM micro-kernel and the vector
// mathematics.
#pragma once

#include <cstdint>

#include "core/types.h"
#include "cpu/isa.h"

namespace fmk {

enum class MathFunction : int {
  kExp,
  kExp2Nonpositive,
  kExp2NonpositiveCoarse,
  kTanh,
  kSigmoid,
  kErf,
  kExpm1,
};

// C[m][n] = A B with plain row-major operands of one storage type.
struct BlockGemm {
  DType dtype;
  int64_t m, n, k;
  const void* a;
  int64_t lda;
  bool a_reduction_major;  // A[m][k] at a[k * lda + m]
  const void* b;
  int64_t ldb;
  bool b_transposed;  // B[k][n] at b[n * ldb + k]
  void* c;            // [m][n], contiguous
};

struct BlockKernels {
  void (*math)(MathFunction, const float* x, float* y, int64_t n);
  // y = activation(x), or its derivative at x.
  void (*activation)(Activation, bool derivative, const float* x, float* y, int64_t n);
  void (*activation_f64)(Activation, bool derivative, const double* x, double* y, int64_t n);
  void (*gemm)(const BlockGemm&);
  // Rows of the largest tile that is `vecs` vectors wide (vecs = 1 ...; 0 past the widest), and the
  // lanes of a vector of float.
  int (*tile_rows)(int vecs);
  int lanes;
  // Repeats one product with a prepacked B, on operands of the kernel's own choosing, for
  // `repeats` times; returns a number that depends on the results.
  double (*repeat_packed_gemm)(DType, int64_t m, int64_t n, int64_t k, int64_t repeats);
};

FMK_KERNEL_TABLE(BlockKernels, block_kernels)

}  // namespace fmk
