// The elementwise step of attention's backward pass and its products over queries; and the sums of
// which the gradients of ALiBi slopes and sinks are made.
#pragma once

#include "cpu/attention_scores.h"

namespace fmk::FMK_ISA {
namespace {

// Sums over the keys of each query, from which the gradients of slopes and sinks are made. They
// replace delta, which is only as exact as the rounded output: its error would be multiplied by the
// distance of every key. Distances are taken from the nearest key there is, so that for a query far
// from all keys no large common part has to cancel.
template <class E>
struct RowSums {
  E weight, weight_distance;  // P, and P times the distance
  E grad, grad_distance;      // the same of P * (dP - delta)
};
template <class V>
struct alignas(64) LaneSums {
  using E = typename V::Elem;
  E position[kMaxLanes<V>];  // of the query, counted from the block's first key
  E nearest[kMaxLanes<V>];   // distance of the nearest key
  E weight[kMaxLanes<V>], weight_distance[kMaxLanes<V>];
  E grad[kMaxLanes<V>], grad_distance[kMaxLanes<V>];

  FMK_LAMBDA void add(int column, int64_t key, V p, V plain) {
    const V distance =
        abs(load(position + column) - splat(static_cast<E>(key))) - load(nearest + column);
    store(weight + column, load(weight + column) + p);
    store(weight_distance + column, fma(p, distance, load(weight_distance + column)));
    store(grad + column, load(grad + column) + plain);
    store(grad_distance + column, fma(plain, distance, load(grad_distance + column)));
  }
};

// A sum of many terms that nearly cancel, with the rounding errors of its additions beside it
// (Neumaier 1974).
struct Compensated {
  double sum = 0, error = 0;
  void add(double x) {
    const double next = sum + x;
    error += std::abs(sum) >= std::abs(x) ? (sum - next) + x : (x - next) + sum;
    sum = next;
  }
  double total() const { return sum + error; }
};

// What the elementwise step reads and writes for one block; see BackwardPass::Buffers.
template <class O>
struct ScoreGradients {
  Acc<O>* scores;
  Acc<O>* grad_probs;
  const Acc<O>* lse;    // [lanes], as an exponent of 2; infinity where there are no probabilities
  const Acc<O>* delta;  // [lanes]
  Acc<O> unit;
  bool need_grad_scores;
  const Acc<O>*dropout, *derivative;  // [keys][lanes], or null: 1
  Acc<O>* plain;                      // dS before the derivative, in the compute type; or null
  LaneSums<Vec<O>>* sums;             // null where not wanted
  O* probs;
  O* grad_scores;
  Word<O>* grad_score_words;
};

// P of a vector of scores; lse as an exponent of 2.
template <class O, class V>
FMK_INLINE V probability(V score, V unit, V lse) {
  const V x = fma(score, unit, zero<V>() - lse);
  if constexpr (Mac<O>::kPair == 2)
    return exp2_nonpositive_coarse(x);
  else
    return exp2_nonpositive(x);
}

// scores -> P, and grad_probs -> dS, for keys [key0, key0 + count). As rows of O, with zeros up to
// a whole number of tiles; dS also as words along the keys.
template <class O>
FMK_NOINLINE void probabilities_block(const ScoreGradients<O>& g, int64_t key0, int64_t count,
                                      const QueryBlock& block) {
  using V = Vec<O>;
  constexpr int kPair = Mac<O>::kPair;
  const int64_t lanes = block.vecs * V::W;
  const V unit = splat(g.unit);
  const int64_t padded = ceil_div(count, kRowsPerTile) * kRowsPerTile;
  for (int64_t k = 0; k < padded; k += kPair) {
    // Beyond the last key, and where a vector of queries does not see the key, scores and gradients
    // are undefined.
    const int hidden = k < count ? block.hidden_vecs(key0 + k, V::W) : block.vecs;
    for (int j = 0; j < block.vecs; ++j) {
      const V lse = load(g.lse + j * V::W), delta = load(g.delta + j * V::W);
      V grads[2] = {zero<V>(), zero<V>()};
      for (int i = 0; i < kPair; ++i) {
        const int64_t at = (k + i) * lanes + j * V::W;
        V p = zero<V>(), plain = zero<V>();
        if (j >= hidden && k + i < count) {
          p = probability<O>(load(g.scores + at), unit, lse);
          if (g.need_grad_scores) {
            V grad = load(g.grad_probs + at);
            if (g.dropout) grad = grad * load(g.dropout + at);
            plain = p * (grad - delta);
            if (g.sums) g.sums->add(j * V::W, k + i, p, plain);
            grads[i] = g.derivative ? plain * load(g.derivative + at) : plain;
          }
          if (g.dropout) p = p * load(g.dropout + at);
        }
        if (g.plain) store(g.plain + at, plain);
        store(g.probs + at, p);
        if (g.need_grad_scores) store(g.grad_scores + at, grads[i]);
      }
      if constexpr (kPair == 2) {
        if (g.need_grad_scores && k < count)
          store_words(g.grad_score_words + k / 2 * lanes + j * V::W, grads[0], grads[1]);
      }
    }
  }
}

// out[count][padded width] += A panel: a row of A [count, up to a whole number of tiles][lanes] per
// key, the panel's rows one per query of the block.
template <class O, Prefetch kPrefetch>
FMK_INLINE void add_keys_from_queries(const O* a, int64_t key0, int64_t count,
                                      const QueryBlock& block, const PanelRows<O>& panel,
                                      int64_t width, Acc<O>* out) {
  using M = Mac<O>;
  using V = Vec<O>;
  using Finish = StoreAccumulators<V>;
  constexpr int kPair = M::kPair, kRows = kRowsPerTile;
  const auto split = PanelSplit<V>::of(width);
  const int64_t ld = split.padded_columns(), lanes = block.vecs * V::W;
  for (int64_t k = 0; k < count; k += kRows) {
    // Queries before key0 + k do not see any key of the tile.
    int64_t skip = 0;
    if (block.ordered)
      skip = max_of<int64_t>(0, min_of<int64_t>(key0 + k - block.edge, block.rows)) / kPair;
    const Word<O>* row_pointers[kRows];
    for (int i = 0; i < kRows; ++i)
      row_pointers[i] = reinterpret_cast<const Word<O>*>(a + (k + i) * lanes) + skip;
    TileOperands<M> in;
    in.rows = row_pointers;
    in.words = words_of<O>(block.rows) - skip;
    in.ldb = panel.ld;
    in.ld_init = ld;
    for (int64_t i = 0; i < split.count; ++i) {
      const int64_t column = split.column(i);
      in.b = panel.first + skip * panel.ld + column;
      in.init = out + k * ld + column;
      const Finish finish{out + k * ld + column, ld};
      switch (split.width_vecs(i)) {
        case 1: tile<M, kRows, 1, false, Finish, kPrefetch>(in, finish); break;
        case 2: tile<M, kRows, 2, false, Finish, kPrefetch>(in, finish); break;
#if defined(__AVX512F__)
        case 3: tile<M, kRows, 3, false, Finish, kPrefetch>(in, finish); break;
        case 4: tile<M, kRows, 4, false, Finish, kPrefetch>(in, finish); break;
#endif
      }
    }
  }
}
template <class O>
FMK_INLINE void keys_from_queries(const O* a, int64_t key0, int64_t count, const QueryBlock& block,
                                  const PanelRows<O>& panel, int64_t width, Acc<O>* out) {
  if (stays_in_l1<O>(words_of<O>(block.rows), panel.ld))
    add_keys_from_queries<O, Prefetch::kNothing>(a, key0, count, block, panel, width, out);
  else
    add_keys_from_queries<O, Prefetch::kPanel>(a, key0, count, block, panel, width, out);
}

// Sums that queries of several heads share; null where not wanted.
template <class E>
struct OptionGradients {
  E* mask;
  Compensated *slopes, *sinks;
};

// The sums of each shard for what all heads share, added up in order.
template <class E>
struct OptionSums {
  int64_t shards, mask, slopes, sinks;
  E *masks, *in_place;    // [shards][mask]
  Compensated* per_head;  // [shards][slopes + sinks]
  bool own_mask;          // each element of the mask belongs to one query: written in place

  static OptionSums of(const AttentionBackward& p, int64_t shards) {
    const AttentionProblem& q = p.problem;
    OptionSums s{};
    s.shards = shards;
    s.in_place = static_cast<E*>(p.grad_mask);
    // A broadcast over keys alone still leaves every element to one query.
    s.own_mask = p.grad_mask && (q.batch == 1 || p.mask_batch) && (q.heads == 1 || p.mask_head) &&
                 (q.queries == 1 || p.mask_query);
    if (p.grad_mask && !s.own_mask) s.mask = p.mask_numbers;
    if (p.grad_slopes) s.slopes = p.slopes_numbers;
    if (p.grad_sinks) s.sinks = q.heads;
    Carver carver;
    const auto carve = [&] {
      s.per_head = carver.take<Compensated>(shards * (s.slopes + s.sinks));
      s.masks = carver.take<E>(shards * s.mask);
    };
    carve();
    const size_t bytes = carver.used;
    if (bytes == 0) return s;
    carver = {static_cast<char*>(scratch_bytes(Scratch::kCall2, bytes)), 0};
    carve();
    std::memset(carver.base, 0, bytes);
    return s;
  }

  // How the units are shared out: what a thread adds up depends on which it computes.
  WorkShares::Kind sharing() const {
    return mask || slopes || sinks ? WorkShares::kFixed : WorkShares::kStealing;
  }
  OptionGradients<E> of_shard(int64_t shard) const {
    Compensated* from = per_head + shard * (slopes + sinks);
    return {own_mask ? in_place
            : mask   ? masks + shard * mask
                     : nullptr,
            slopes ? from : nullptr, sinks ? from + slopes : nullptr};
  }

  void store(const AttentionBackward& p) const {
    for (int64_t shard = 0; shard < shards; ++shard)
      for (int64_t i = 0; i < mask; ++i) static_cast<E*>(p.grad_mask)[i] += masks[shard * mask + i];
    const auto add = [&](void* to, int64_t offset, int64_t count) {
      for (int64_t i = 0; to && i < count; ++i) {
        Compensated all;
        for (int64_t shard = 0; shard < shards; ++shard) {
          const Compensated& one = per_head[shard * (slopes + sinks) + offset + i];
          all.add(one.sum);
          all.add(one.error);
        }
        static_cast<E*>(to)[i] += static_cast<E>(all.total());
      }
    };
    add(p.grad_slopes, 0, slopes);
    add(p.grad_sinks, slopes, sinks);
  }
};

}  // namespace
}  // namespace fmk::FMK_ISA
