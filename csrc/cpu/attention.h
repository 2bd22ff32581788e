// Scaled-dot-product attention: output = softmax(scale * query key^T + mask) value, and its
// gradients, without ever holding a matrix of weights (online softmax: Milakov and Gimelshein 2018;
// tiling: FlashAttention, Dao et al. 2022).
//
// B batch, Hq query heads, Hkv key and value heads (Hq a multiple of Hkv; query head h reads head
// h / (Hq / Hkv)), Sq queries, Sk keys, D and Dv numbers per head. The caller allocates everything.
#pragma once

#include <cstdint>

#include "core/parallel.h"
#include "core/types.h"
#include "cpu/isa.h"

namespace fmk {

// A (batch, head, row, column) tensor of the call's storage type: column c of a row is at
// data[b * batch + h * head + r * row + c]. Strides count numbers and may be anything.
struct AttentionOperand {
  const void* data;
  int64_t batch, head, row;
};
struct AttentionResult {
  void* data;
  int64_t batch, head, row;
};

// The mask's value for (b, query head, query, key), with its four strides in numbers (0 where it
// broadcasts). boolean: bytes, 0 hides the key. Otherwise numbers of the call's storage type, added
// to the scaled scores.
struct AttentionMask {
  const void* data;  // null: no mask
  bool boolean;
  int64_t batch, head, query, key;
};

struct AttentionProblem {
  DType dtype;
  int64_t batch, heads, kv_heads, queries, keys, head_dim, value_dim;
  AttentionOperand query, key, value;  // rows of D, D and Dv numbers
  AttentionMask mask;
  bool causal;   // query i sees keys 0..i
  double scale;  // any number, negative too
};

struct AttentionForward {
  AttentionProblem problem;
  AttentionResult output;  // rows of Dv; zero for a query that sees no key
  void* lse;               // [B][Hq][Sq] float (double for kF64): log of the softmax's denominator,
                           // -inf for a query that sees no key
};

struct AttentionBackward {
  AttentionProblem problem;
  AttentionOperand grad_output, output;              // rows of Dv
  const void* grad_lse;                              // [B][Hq][Sq] as lse, or null: zero
  const void* lse;                                   // [B][Hq][Sq] from the forward pass
  AttentionResult grad_query, grad_key, grad_value;  // data null where not wanted
};

struct AttentionKernels {
  void (*forward)(const AttentionForward&, const Parallel&);
  void (*backward)(const AttentionBackward&, const Parallel&);
};

FMK_KERNEL_TABLE(AttentionKernels, attention_kernels)

}  // namespace fmk
