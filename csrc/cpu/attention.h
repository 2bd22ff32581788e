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
// broadcasts).
struct AttentionMask {
  enum class Kind : uint8_t {
    kBytes,    // 0 hides the key
    kStorage,  // numbers of the call's storage type, added to the scores
    kFloat,    // floats, added
  };
  const void* data;  // null: no mask
  Kind kind;
  int64_t batch, head, query, key;
};

// Which weights are dropped: ops/_dropout.py has the formula.
struct AttentionDropout {
  bool active;
  uint64_t seed;
  uint32_t threshold;  // words below it are dropped
  double factor;       // of a weight that is kept
};

// Equally long sequences, or packed ones: then batch is 1, queries and keys are totals, and
// sequence n has rows [offsets[n], offsets[n + 1]) of both. The score of query i and key j is
//
//   s = scale * q_i . k_j;  s = softcap * tanh(s / softcap);  s = s - slope * |p_i - j| + mask
//
// p_i = first_position + i, and key j is visible if p_i - window_left <= j <= p_i + window_right.
struct AttentionProblem {
  DType dtype;
  int64_t batch, heads, kv_heads, queries, keys, head_dim, value_dim;
  AttentionOperand query, key, value;  // rows of D, D and Dv numbers
  AttentionMask mask;
  int64_t window_left, window_right;  // negative: no bound
  double scale;                       // any number, negative too
  double softcap;                     // 0: none
  const void* slopes;                 // as lse: slope of (b, head) at [b * slopes_batch + head]
  int64_t slopes_batch;
  const void* sinks;  // as lse, [Hq]: one more logit, without a value; null: none
  AttentionDropout dropout;
  int64_t first_position;
  // The index of (b, head, query) in lse: first_row + b * row_batch + head * row_head + query.
  int64_t first_row, row_batch, row_head;
  const int32_t *query_offsets, *key_offsets;  // null: not packed
  int64_t sequences;
};

struct AttentionForward {
  AttentionProblem problem;
  AttentionResult output;  // rows of Dv; zero for a query that sees no key
  void* lse;  // [B][Hq][Sq] float (double for kF64): log of the softmax's denominator, sink
              // included; -inf for a query that sees nothing
};

struct AttentionBackward {
  AttentionProblem problem;
  AttentionOperand grad_output, output;  // rows of Dv
  const void* grad_lse;                  // [B][Hq][Sq] as lse, or null: zero
  const void* lse;                       // [B][Hq][Sq] from the forward pass
  // Of the weights after dropout, storage type, any strides; data null: zero. Times the factor.
  AttentionMask grad_weights;
  double grad_weights_factor;
  AttentionResult grad_query, grad_key, grad_value;  // data null where not wanted
  // Null where not wanted. Of the mask as it is given, in the compute type: element (b, head,
  // query, key) has the mask's strides as if it were contiguous, 0 where it broadcasts.
  void* grad_mask;
  int64_t mask_numbers;
  int64_t mask_batch, mask_head, mask_query, mask_key;
  void *grad_slopes, *grad_sinks;  // shaped like slopes and sinks
  int64_t slopes_numbers;
};

// Of each query's softmax, without dropout, all indexed as lse; compute type but for the keys. Not
// for packed sequences.
struct AttentionStatistics {
  AttentionProblem problem;  // value is not read
  void* entropy;             // in nats, the sink being an outcome; 0 for a row without any
  int64_t* top_key;          // of the largest weight, the first of equals; -1 if none is visible
  void* top_weight;
  void* lse;
};

// Not for packed sequences.
struct AttentionWeights {
  AttentionProblem problem;
  AttentionResult output;  // as in AttentionForward, and lse
  void* lse;
  // Contiguous [B][Hq][Sq][Sk] of the storage type: the weights after dropout; 0 where a query does
  // not see the key. Or their mean over the heads, [B][Sq][Sk].
  void* weights;
  bool average;
};

// A few queries at the end of each sequence of a cache.
struct AttentionCached {
  AttentionProblem problem;  // queries per sequence; keys: the capacity; key and value: the caches
  const int32_t* lengths;    // [B], in [0, capacity], checked
  const int32_t* pages;  // [B][pages_per_sequence] or null; `batch` strides go from page to page
  int64_t pages_per_sequence, page_size;
  AttentionResult output;
  void* lse;
};

struct AttentionKernels {
  void (*forward)(const AttentionForward&, const Parallel&);
  void (*backward)(const AttentionBackward&, const Parallel&);
  void (*cached)(const AttentionCached&, const Parallel&);
  void (*statistics)(const AttentionStatistics&, const Parallel&);
  void (*weights)(const AttentionWeights&, const Parallel&);
};

FMK_KERNEL_TABLE(AttentionKernels, attention_kernels)

}  // namespace fmk
