// The online softmax of the forward passes (Milakov and Gimelshein 2018): a block of scores becomes
// probabilities relative to the largest score so far, and what was summed before is scaled down
// when a larger one appears.
#pragma once

#include "cpu/attention_scores.h"

namespace fmk::FMK_ISA {

// attention_decode.cpp: the pass for few queries per key head, and which problems it takes.
bool attention_is_decoding(const AttentionProblem& p);
void attention_decode(const AttentionForward& p, const Parallel& pool);

namespace {

// 2^x for x <= 0 as accurately as the product with V will read it.
template <class O, class V>
FMK_INLINE V softmax_exp2(V x) {
  if constexpr (Mac<O>::kPair == 2)
    return exp2_nonpositive_coarse(x);
  else
    return exp2_nonpositive(x);
}

// Natural logarithm of a positive normal x[i], or NaN; 1.5 ulp. In terms a compiler vectorises.
FMK_NOINLINE void log_lanes(float* x, int n) {
  for (int i = 0; i < n; ++i) {
    // x = 2^e m with m in [sqrt(1/2), sqrt(2)): 0x3504f3 is the mantissa of sqrt(2).
    int32_t bits;
    std::memcpy(&bits, x + i, 4);
    const int32_t e = (bits - 0x3f3504f3) >> 23;
    bits -= e * (1 << 23);
    float m;
    std::memcpy(&m, &bits, 4);
    // log m = 2 artanh(s), |s| < 0.172: the series' next term is below 1e-9 of the sum.
    const float s = (m - 1.0f) / (m + 1.0f), z = s * s;
    const float series = 1.0f / 3 + z * (1.0f / 5 + z * (1.0f / 7 + z * (1.0f / 9)));
    const float log_m = 2 * s + 2 * s * z * series;
    const float result = static_cast<float>(e) * static_cast<float>(kLn2) + log_m;
    x[i] = x[i] == x[i] ? result : x[i];
  }
}
FMK_NOINLINE void log_lanes(double* x, int n) {
  for (int i = 0; i < n; ++i) x[i] = std::log(x[i]);
}

// The state of the online softmax of a block of queries, a query per lane.
template <class V>
struct alignas(64) Running {
  using E = typename V::Elem;
  E maximum[kMaxLanes<V>];    // of the scores of the blocks so far and of the one being worked on
  E finished[kMaxLanes<V>];   // of the blocks that are in `sum` and in the output
  E reference[kMaxLanes<V>];  // the exponent taken as 0
  E sum[kMaxLanes<V>];        // of 2^(exponent - reference)
  E decay[kMaxLanes<V>];      // what the last block scales sum and output by
  E factor[kMaxLanes<V>];     // in the end, what makes weights of the exponentials

  void start() {
    for (int lane = 0; lane < kMaxLanes<V>; ++lane) {
      maximum[lane] = finished[lane] = -__builtin_inf();
      reference[lane] = sum[lane] = 0;
    }
  }
};

// Turns the scores of a block into probabilities, up to the final division, in place: words
// [words_of(count)][lanes]. `dropout`: factors of the probabilities, not of their sum; or null.
// Returns whether some decay differs from 1.
template <class O>
FMK_NOINLINE bool softmax_block(Acc<O>* scores, int64_t key0, int64_t count,
                                const QueryBlock& block, Acc<O> unit, const Acc<O>* dropout,
                                Running<Vec<O>>& running) {
  using V = Vec<O>;
  using E = Acc<O>;
  constexpr int kPair = Mac<O>::kPair;
  const int64_t lanes = block.vecs * V::W;
  auto* words = reinterpret_cast<Word<O>*>(scores);
  const V scale = splat(unit), lowest = splat(E(-__builtin_inf()));
  bool decays = false;
  for (int j = 0; j < block.vecs; ++j) {
    const int column = j * V::W;
    // Keys that some query of this vector may see.
    int64_t end = count;
    if (block.ordered) end = max_of<int64_t>(0, min_of(count, block.edge + column + V::W - key0));
    const V largest = load(running.maximum + column), before = load(running.finished + column);
    // While a query has seen no key, its maximum is -inf, and 0 serves as reference: -inf less -inf
    // is NaN.
    const V reference =
        select(less(lowest, largest), largest * scale, select(is_nan(largest), largest, zero<V>()));
    const V offset = zero<V>() - reference;
    const V decay =
        select(less(before, largest), softmax_exp2<O>(fma(before, scale, offset)), splat(E(1)));
    V sum = zero<V>(), sum_odd = zero<V>();
    const E* from = scores + column;
    Word<O>* to = words + column;
    int64_t k = 0;
    for (; k + 2 <= end; k += 2, from += 2 * lanes, to += 2 / kPair * lanes) {
      V even = softmax_exp2<O>(fma(load(from), scale, offset));
      V odd = softmax_exp2<O>(fma(load(from + lanes), scale, offset));
      sum = sum + even;
      sum_odd = sum_odd + odd;
      if (dropout) {
        const E* factors = dropout + k * lanes + column;
        even = even * load(factors);
        odd = odd * load(factors + lanes);
      }
      store_words(to, even, odd);
      if constexpr (kPair == 1) store_words(to + lanes, odd, odd);
    }
    if (k < end) {
      V last = softmax_exp2<O>(fma(load(from), scale, offset));
      sum = sum + last;
      if (dropout) last = last * load(dropout + k * lanes + column);
      store_words(to, last, zero<V>());
    }
    // A tile of P V whose last query lies in a later vector reads on.
    const int64_t read = words_of<O>(min_of(count, end + kMaxTileRows));
    for (int64_t word = words_of<O>(end); word < read; ++word)
      store_words(words + word * lanes + column, zero<V>(), zero<V>());
    store(running.finished + column, largest);
    store(running.reference + column, reference);
    store(running.decay + column, decay);
    store(running.sum + column, fma(load(running.sum + column), decay, sum + sum_odd));
  }
  for (int row = 0; row < block.rows; ++row) decays |= running.decay[row] != E(1);
  return decays;
}

// out[rows][ld] *= the block's decay.
template <class V>
FMK_INLINE void decay_output(const QueryBlock& block, const Running<V>& running,
                             typename V::Elem* out, int64_t ld) {
  for (int row = 0; row < block.rows; ++row) {
    const V decay = splat(running.decay[row]);
    for (int64_t column = 0; column < ld; column += V::W)
      store(out + row * ld + column, load(out + row * ld + column) * decay);
  }
}

// Adds the sink to the softmax of each row: another logit in the denominator. Its value may be
// larger than the reference, which then moves; `decay` is what that scales the output by.
template <class V>
FMK_NOINLINE void add_sinks(const AttentionProblem& p, const QueryBlock& block,
                            Running<V>& running) {
  using E = typename V::Elem;
  for (int row = 0; row < block.rows; ++row) {
    const E sink = static_cast<const E*>(p.sinks)[block.head_of(row)] * static_cast<E>(kLog2E);
    E& sum = running.sum[row];
    E& reference = running.reference[row];
    running.decay[row] = 1;
    if (sink == -__builtin_inf()) continue;
    if (sum == 0) {
      reference = sink;
      sum = 1;
    } else if (sink > reference) {
      running.decay[row] = std::exp2(reference - sink);
      sum = sum * running.decay[row] + 1;
      reference = sink;
    } else {
      sum += std::exp2(sink - reference);
    }
  }
}

// Divides out[rows][ld] by the sums, rounds, and stores output and lse. `started`: whether any
// block of keys was taken. Uses up `running`.
template <class T>
FMK_NOINLINE void finish_queries(const AttentionProblem& p, const AttentionResult& output,
                                 void* lse_out, const QueryBlock& block, const Acc<T>* out,
                                 int64_t ld, bool started, Running<Vec<T>>& running) {
  using V = Vec<T>;
  using E = Acc<T>;
  for (int row = 0; row < block.rows; ++row) running.decay[row] = 1;
  if (p.sinks) add_sinks<V>(p, block, running);
  for (int row = 0; row < block.rows; ++row)
    running.factor[row] = running.decay[row] / running.sum[row];
  E* lse = running.decay;
  std::memcpy(lse, running.sum, sizeof running.sum);
  log_lanes(lse, block.vecs * V::W);
  for (int row = 0; row < block.rows; ++row) {
    const int64_t head = block.head_of(row), position = block.position_of(row);
    T* to = row_of<T>(output, block.batch, head, position);
    // The largest score contributes 1, so a sum of 0 means that nothing was seen.
    const bool empty = running.sum[row] == 0;
    if (empty || !started)
      std::memset(static_cast<void*>(to), 0, p.value_dim * sizeof(T));
    else
      store_row(out + row * ld, running.factor[row], p.value_dim, to);
    static_cast<E*>(lse_out)[row_index(p, block.batch, head, position)] =
        empty ? E(-__builtin_inf()) : running.reference[row] * static_cast<E>(kLn2) + lse[row];
  }
}

}  // namespace
}  // namespace fmk::FMK_ISA
