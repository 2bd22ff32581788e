// Layer normalisation and RMS normalisation of rows, alone or of a sum, and their gradients:
//
//   s = dropout(input) + residual;  out = (s - mean) * rstd * weight + bias     (rms: mean = 0)
//
// Buffers are row-major and contiguous; null where not wanted. The caller allocates everything.
#pragma once

#include "core/parallel.h"
#include "core/types.h"
#include "cpu/isa.h"

namespace fmk {

struct NormForward {
  DType dtype;
  int64_t rows, features;
  const void* input;     // [rows][features]
  const void* residual;  // the same, or null
  const void* weight;    // [features] or null: 1
  const void* bias;      // [features] or null: 0
  bool rms;
  double eps;
  Dropout dropout;  // of input
  void* output;     // [rows][features]
  void* sum;        // the same, or null
  void* mean;       // [rows] in the compute type, or null
  void* rstd;       // [rows] in the compute type, or null
};

struct NormBackward {
  DType dtype;
  int64_t rows, features;
  const void* grad_output;  // [rows][features]
  const void* grad_sum;     // the same, or null
  const void* sum;          // the same: s
  const void* weight;       // [features] or null
  const void* mean;         // [rows] in the compute type; null if rms
  const void* rstd;         // [rows] in the compute type
  bool rms;
  Dropout dropout;
  void* grad_input;     // [rows][features] or null
  void* grad_residual;  // the same: the gradient of s
  void* grad_weight;    // [features] or null
  void* grad_bias;      // [features] or null
};

struct NormKernels {
  void (*forward)(const NormForward&, const Parallel&);
  void (*backward)(const NormBackward&, const Parallel&);
};

FMK_KERNEL_TABLE(NormKernels, norm_kernels)

}  // namespace fmk
