// How queries are cut into blocks, and which keys a block sees.
#pragma once

#include <type_traits>

#include "cpu/attention.h"
#include "cpu/gemm.h"

namespace fmk::FMK_ISA {

void attention_backward(const AttentionBackward& p, const Parallel& pool);
void attention_cached(const AttentionCached& p, const Parallel& pool);
void attention_statistics(const AttentionStatistics& p, const Parallel& pool);
void attention_weights(const AttentionWeights& p, const Parallel& pool);

namespace {

constexpr double kLog2E = 1.44269504088896340736, kLn2 = 0.69314718055994530942;

// What a storage type is multiplied as: itself, or float where the machine has no arithmetic for
// it.
template <class T>
using Operand = std::conditional_t<kWordsInPlace<T>, T, float>;

template <class V>
constexpr int kMaxLanes = kPanelVecs * V::W;

template <class V>
FMK_INLINE int64_t whole_vectors(int64_t n) {
  return ceil_div(n, V::W) * V::W;
}

// Key blocks start at multiples of this: of the pairs of a word and of Philox's four numbers.
constexpr int64_t kKeyAlignment = 4;

FMK_INLINE int64_t row_index(const AttentionProblem& p, int64_t batch, int64_t head,
                             int64_t query) {
  return p.first_row + batch * p.row_batch + head * p.row_head + query;
}

FMK_INLINE int64_t size_of(DType type) {
  return type == DType::kF64 ? 8 : type == DType::kF32 ? 4 : 2;
}
FMK_INLINE AttentionOperand from_row(const AttentionOperand& x, int64_t row, DType type) {
  return {static_cast<const char*>(x.data) + row * x.row * size_of(type), x.batch, x.head, x.row};
}
FMK_INLINE AttentionResult from_row(const AttentionResult& x, int64_t row, DType type) {
  if (!x.data) return x;
  return {static_cast<char*>(x.data) + row * x.row * size_of(type), x.batch, x.head, x.row};
}
// Sequence n of packed ones, as a problem of its own.
FMK_INLINE AttentionProblem sequence_of(const AttentionProblem& p, int64_t n) {
  if (!p.query_offsets) return p;
  AttentionProblem s = p;
  s.query_offsets = s.key_offsets = nullptr;
  s.sequences = 1;
  s.first_row = p.query_offsets[n];
  s.queries = p.query_offsets[n + 1] - p.query_offsets[n];
  s.keys = p.key_offsets[n + 1] - p.key_offsets[n];
  s.query = from_row(p.query, p.query_offsets[n], p.dtype);
  s.key = from_row(p.key, p.key_offsets[n], p.dtype);
  s.value = from_row(p.value, p.key_offsets[n], p.dtype);
  if (p.slopes) {
    const int64_t bytes = p.dtype == DType::kF64 ? 8 : 4;
    s.slopes = static_cast<const char*>(p.slopes) + n * p.slopes_batch * bytes;
  }
  return s;
}

// A block of queries: consecutive rows of a list (see Queries), one per lane.
struct QueryBlock {
  int64_t batch, kv_head, head, position;  // of the first row
  int64_t queries;                         // rows per head
  int rows, vecs;
  bool one_head;
  // Of one head, and later keys are hidden: the first row sees no key from `edge` + 1 on, and each
  // row sees one more than the row before.
  bool ordered;
  int64_t edge;
  int64_t any_begin, any_end;  // keys that some row may see
  int64_t all_begin, all_end;  // keys that every row sees

  int64_t head_of(int64_t row) const { return one_head ? head : head + (position + row) / queries; }
  int64_t position_of(int64_t row) const {
    return one_head ? position + row : (position + row) % queries;
  }
  // Words of a reduction over keys [key0, key0 + count) that the rows before row_end may see.
  template <class O>
  int64_t words_seen(int64_t key0, int64_t count, int64_t row_end) const {
    if (ordered) count = max_of<int64_t>(0, min_of(count, edge + row_end - key0));
    return words_of<O>(count);
  }
  // Whole vectors of queries that come before key `key` and so must not see it.
  int hidden_vecs(int64_t key, int width) const {
    if (!ordered || key <= edge) return 0;
    return static_cast<int>(min_of<int64_t>((key - edge) / width, vecs));
  }
};

// The queries that share a key head are walked as lists of rows: each head its own, or, where heads
// have few queries (decoding), all the group's heads in one, so that keys and values are read once.
template <class V>
struct Queries {
  const AttentionProblem& problem;
  int64_t group, heads_per_list, lists, rows;
  PanelSplit<V> split;

  FMK_INLINE Queries of(const AttentionProblem& p) {
    constexpr int64_t kFew = 32;
    const int64_t group = p.kv_heads ? p.heads / p.kv_heads : 1;
    const int64_t heads = p.queries < kFew ? group : 1;
    const int64_t rows = heads * p.queries;
    return {p, group, heads, heads ? p.batch * p.heads / heads : 0, rows, PanelSplit<V>::of(rows)};
  }
  int64_t blocks() const { return split.count; }
  // The keys that query `row` of a head sees.
  int64_t begin(int64_t row) const {
    if (problem.window_left < 0) return 0;
    return min_of(problem.keys,
                  max_of<int64_t>(0, problem.first_position + row - problem.window_left));
  }
  int64_t end(int64_t row) const {
    if (problem.window_right < 0) return problem.keys;
    return min_of(problem.keys,
                  max_of<int64_t>(0, problem.first_position + row + problem.window_right + 1));
  }
  QueryBlock block(int64_t list, int64_t index) const {
    const int64_t lists_per_batch = problem.heads / heads_per_list;
    const int64_t first = split.column(index);
    QueryBlock b;
    b.batch = list / lists_per_batch;
    const int64_t head = list % lists_per_batch * heads_per_list;
    b.kv_head = head / group;
    b.head = head;
    b.position = first;
    b.queries = problem.queries;
    b.vecs = split.width_vecs(index);
    b.rows = static_cast<int>(min_of<int64_t>(rows - first, b.vecs * V::W));
    b.one_head = heads_per_list == 1;
    b.ordered = problem.window_right >= 0 && b.one_head;
    b.edge = problem.first_position + first + problem.window_right;
    const int64_t low = b.one_head ? first : 0;
    const int64_t high = b.one_head ? first + b.rows - 1 : problem.queries - 1;
    b.any_begin = begin(low) / kKeyAlignment * kKeyAlignment;
    b.any_end = end(high);
    b.all_begin = begin(high);
    b.all_end = end(low);
    return b;
  }
  // Work of a block, in arbitrary units.
  int64_t cost(int64_t index) const {
    int64_t keys = problem.keys;
    if (heads_per_list == 1) {
      const int64_t last = min_of(rows, split.column(index + 1)) - 1;
      keys = max_of<int64_t>(0, end(last) - begin(split.column(index)));
    }
    return (keys + 32) * split.width_vecs(index);
  }
  int64_t list_cost() const {
    int64_t total = 0;
    for (int64_t i = 0; i < blocks(); ++i) total += cost(i);
    return total;
  }
  double total_cost() const {
    return static_cast<double>(list_cost()) * static_cast<double>(lists);
  }
  // Units are (list, block), lists outermost: the first one after `work` of the total cost.
  int64_t unit_after(double work) const {
    const int64_t per_list = list_cost();
    if (work >= total_cost()) return lists * blocks();
    if (work <= 0) return 0;
    const int64_t target = static_cast<int64_t>(work);
    const int64_t list = min_of(target / per_list, lists), rest = target - list * per_list;
    int64_t unit = list * blocks();
    for (int64_t i = 0, done = 0; list < lists && i < blocks() && done + cost(i) / 2 < rest; ++i) {
      done += cost(i);
      ++unit;
    }
    return unit;
  }
};

}  // namespace
}  // namespace fmk::FMK_ISA
