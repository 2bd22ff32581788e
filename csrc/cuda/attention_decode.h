// Attention of one query per sequence to a long cache of keys and values, contiguous or in pages.
//
// The query heads that share a key head are computed together, so that the cache is read once. Long
// caches are split over blocks; a second launch merges the parts. Inference only: there is no
// backward.
//
// Letters: B sequences, Hq query heads, Hkv key and value heads (Hq a multiple), D features, at
// most 256 and a multiple of 8. Rows of D features are contiguous, and all pointers and strides (in
// elements) of query and caches are multiples of 16 bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "core/types.h"
#include "cuda/device.h"

namespace fmk::cuda {

constexpr int kMaxDecodeFeatures = 256;

// Element d of row `position` of head h is at [b * sequence + h * head + position * row + d]; with
// pages b stands for the page, and position for the row within it.
struct DecodeCache {
  const void* data;
  int64_t sequence, head, row;
};

struct DecodeAttention {
  DType dtype;  // not kF64
  int64_t batch, query_heads, kv_heads, features;
  int64_t capacity;   // the most keys that a sequence may have
  const void* query;  // (B, Hq, D) with strides
  int64_t query_sequence, query_head;
  DecodeCache key, value;
  // (B, pages per sequence): row j of sequence b is row j % page_size of page
  // page_table[b * page_stride + j / page_size], and zero if there is no such page; null:
  // contiguous caches.
  const int32_t* page_table;
  int64_t page_stride, pages;
  int page_size;
  // (B): keys in the cache, cut off at the capacity; the query stands at the last one.
  const int32_t* lengths;
  const float* alibi_slopes;  // score - slope * distance; null: none
  int64_t slopes_sequence;    // slope of (b, h) at [b * slopes_sequence + h]
  const float* sinks;         // (Hq): one more logit in the denominator; null: none
  int64_t window_left;        // keys seen before the query's own position; negative: all
  float scale, softcap;       // softcap 0: none
  void* output;               // (B, Hq, D) contiguous; 0 where no key is seen
  float* lse;                 // (B, Hq): log of the denominator; -inf where it is empty
  // Scratch for splits > 1: (splits, B, Hq, D) and (splits, B, Hq).
  float* partial_output;
  float* partial_lse;
  int splits;
};

// How many blocks share a sequence's keys: one where the heads of the batch fill the device or the
// cache is short (4 tiles), else as many as fill it, each with a tile to work on. It depends on the
// capacity alone, not on the lengths, so that a captured graph stays valid.
int decode_splits(const DecodeAttention& problem, const DeviceLimits& limits);

// Empty, or why the device does not take such a call; looks at the sizes alone.
std::string decode_problem(const DecodeAttention& problem, const DeviceLimits& limits);

// Throws Error if a launch fails.
void decode_attention(const DecodeAttention& problem, Stream stream);

}  // namespace fmk::cuda
