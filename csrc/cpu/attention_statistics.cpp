// Of each query's softmax: entropy, largest weight and its key, in one pass over the keys with an
// online softmax; nothing of the size of the scores is held.
#include "cpu/attention_scores.h"
#include "cpu/reduce.h"

namespace fmk::FMK_ISA {
namespace {

// Keys per block: scores stay in L2.
constexpr int64_t kKeyBlock = 264;

// Of the block of queries at hand, a query per lane. Exponents are of 2; `weight` and `moment` are
// sums over the keys of 2^x and of x 2^x, x being the exponent less the reference. With Z the sum
// of weights, the entropy in nats is ln 2 (log2 Z - moment / Z): two terms that are never negative.
template <class V>
struct alignas(64) RunningStatistics {
  using E = typename V::Elem;
  E maximum[kMaxLanes<V>];  // of the scores, raised by score_block
  E reference[kMaxLanes<V>], weight[kMaxLanes<V>], moment[kMaxLanes<V>];
  E best[kMaxLanes<V>];  // the largest score so far and its key
  int64_t top_key[kMaxLanes<V>];

  void start() {
    for (int lane = 0; lane < kMaxLanes<V>; ++lane) {
      maximum[lane] = best[lane] = -__builtin_inf();
      reference[lane] = weight[lane] = moment[lane] = 0;
      top_key[lane] = -1;
    }
  }
  // Moves the exponent that counts as 0 up to `to`.
  void raise(int lane, E to) {
    if (weight[lane] > 0) {
      const E shift = reference[lane] - to, decay = std::exp2(shift);
      moment[lane] = decay > 0 ? decay * (moment[lane] + shift * weight[lane]) : E(0);
      weight[lane] *= decay;
    }
    reference[lane] = to;
  }
};

// Adds the scores of keys [key0, key0 + count).
template <class V>
FMK_NOINLINE void add_scores(const typename V::Elem* scores, int64_t key0, int64_t count,
                             const QueryBlock& block, typename V::Elem unit,
                             RunningStatistics<V>& running) {
  using E = typename V::Elem;
  const int64_t lanes = block.vecs * V::W;
  // Below this 2^x is 0, and at -infinity x 2^x would be NaN.
  const V lowest = splat(E(-1100)), scale = splat(unit);
  for (int j = 0; j < block.vecs; ++j) {
    const int column = j * V::W;
    // Keys that some query of this vector may see.
    int64_t end = count;
    if (block.ordered) end = max_of<int64_t>(0, min_of(count, block.edge + column + V::W - key0));
    for (int lane = column; lane < column + V::W; ++lane) {
      const E largest = running.maximum[lane];
      if (largest > running.best[lane] || largest != largest) running.raise(lane, largest * unit);
    }
    const V offset = zero<V>() - load(running.reference + column);
    V weight = zero<V>(), moment = zero<V>();
    V best = load(running.best + column), key = splat(E(-1));
    for (int64_t k = 0; k < end; ++k) {
      const V score = load(scores + k * lanes + column), x = fma(score, scale, offset);
      const V p = exp2_nonpositive(x);
      weight = weight + p;
      moment = fma(max(lowest, x), p, moment);
      const auto larger = less(best, score);
      best = select(larger, score, best);
      key = select(larger, splat(static_cast<E>(k)), key);
    }
    store(running.weight + column, load(running.weight + column) + weight);
    store(running.moment + column, load(running.moment + column) + moment);
    store(running.best + column, best);
    alignas(64) E found[V::W];
    store(found, key);
    for (int lane = 0; lane < V::W; ++lane)
      if (found[lane] >= 0)
        running.top_key[column + lane] = key0 + static_cast<int64_t>(found[lane]);
  }
}

template <class T>
class StatisticsPass {
  using O = Operand<T>;
  using V = Vec<T>;
  using E = Acc<T>;

 public:
  explicit StatisticsPass(const AttentionStatistics& statistics)
      : p_(statistics.problem),
        out_(statistics),
        queries_(Queries<V>::of(p_)),
        scaling_(Scaling<E>::of(p_)) {}

  void run(const Parallel& pool) const {
    const double total = queries_.total_cost();
    const double flops = total * V::W * 2.0 * static_cast<double>(p_.head_dim);
    const int64_t shards = flops < kSerialFlops ? 1 : pool.threads;
    parallel_for(pool, shards, [&](int64_t shard) {
      const auto at = [&](int64_t n) {
        return queries_.unit_after(total * static_cast<double>(n) / static_cast<double>(shards));
      };
      const int64_t end = shard + 1 == shards ? queries_.lists * queries_.blocks() : at(shard + 1);
      Buffers buffers = work_space();
      int64_t staged = -1;
      for (int64_t unit = at(shard); unit < end; ++unit) {
        const QueryBlock block = queries_.block(unit / queries_.blocks(), unit % queries_.blocks());
        const int64_t head = block.batch * p_.kv_heads + block.kv_head;
        if (head != staged)
          buffers.keys = head_as_words<T>(p_.key, block.batch, block.kv_head, p_.keys, p_.head_dim,
                                          buffers.key_copy);
        staged = head;
        run_block(block, buffers);
      }
    });
  }

 private:
  struct Buffers {
    Word<O>* query_panel;  // [words][lanes]
    O* query_rows;         // [lanes][head_dim]
    E* scores;             // [kKeyBlock + kMaxTileRows][lanes]
    Word<T>* key_copy;
    typename MaskBlock<T>::Buffers mask;
    WordRows keys;
  };

  Buffers work_space() const {
    Buffers b{};
    const auto carve = [&](Carver& carver) {
      b.query_panel = carver.take<Word<O>>(words_of<O>(p_.head_dim) * kMaxLanes<V>);
      b.query_rows = carver.take<O>(p_.head_dim * kMaxLanes<V>);
      b.scores = carver.take<E>((kKeyBlock + kMaxTileRows) * kMaxLanes<V>);
      if (rows_need_copy<T>(p_.head_dim))
        b.key_copy = carver.take<Word<T>>(p_.keys * words_of<T>(p_.head_dim));
      if (p_.mask.data) b.mask.carve(carver, kKeyBlock);
    };
    Carver carver;
    carve(carver);
    carver = {static_cast<char*>(scratch_bytes(Scratch::kTile, carver.used)), 0};
    carve(carver);
    return b;
  }

  void run_block(const QueryBlock& block, const Buffers& b) const {
    const auto rows = block_rows<T>(p_.query, block, p_.head_dim, b.query_rows);
    pack_columns_as_panel(rows.first, rows.ld, p_.head_dim, block.rows, block.vecs * V::W,
                          b.query_panel);
    RunningStatistics<V> running;
    running.start();
    const int64_t step = key_block_size(block.any_end - block.any_begin, kKeyBlock);
    for (int64_t key0 = block.any_begin; key0 < block.any_end; key0 += step) {
      const int64_t count = min_of(step, block.any_end - key0);
      MaskBlock<T> mask;
      if (p_.mask.data && !mask.read(p_.mask, block, key0, count, b.mask)) continue;
      score_block<T>(p_, queries_, b.keys, key0, count, block, b.query_panel, scaling_, mask,
                     b.scores, nullptr, running.maximum);
      add_scores<V>(b.scores, key0, count, block, scaling_.unit, running);
    }
    finish(block, running);
  }

  void finish(const QueryBlock& block, RunningStatistics<V>& running) const {
    for (int row = 0; row < block.rows; ++row) {
      const int64_t head = block.head_of(row);
      const int64_t at = row_index(p_, block.batch, head, block.position_of(row));
      const E top = running.best[row] * scaling_.unit;  // as an exponent
      if (p_.sinks) add_sink(static_cast<const E*>(p_.sinks)[head], row, running);
      const E weight = running.weight[row], reference = running.reference[row];
      const bool empty = weight == 0, seen = running.top_key[row] >= 0;
      const E log_weight = std::log2(weight);
      static_cast<E*>(out_.entropy)[at] =
          empty ? E(0) : static_cast<E>(kLn2) * (log_weight - running.moment[row] / weight);
      out_.top_key[at] = running.top_key[row];
      static_cast<E*>(out_.top_weight)[at] = seen ? std::exp2(top - reference) / weight : E(0);
      static_cast<E*>(out_.lse)[at] = empty ? -static_cast<E>(__builtin_inf())
                                            : static_cast<E>(kLn2) * (reference + log_weight);
    }
  }

  // The sink is one more outcome.
  static void add_sink(E sink, int row, RunningStatistics<V>& running) {
    sink *= static_cast<E>(kLog2E);
    if (sink == -__builtin_inf()) return;
    if (running.weight[row] == 0 || sink > running.reference[row]) running.raise(row, sink);
    const E x = sink - running.reference[row], p = std::exp2(x);
    running.weight[row] += p;
    if (p > 0) running.moment[row] += x * p;
  }

  const AttentionProblem& p_;
  const AttentionStatistics& out_;
  const Queries<V> queries_;
  const Scaling<E> scaling_;
};

}  // namespace

void attention_statistics(const AttentionStatistics& p, const Parallel& pool) {
  with_type(p.problem.dtype, [&](auto* type) {
    StatisticsPass<std::remove_pointer_t<decltype(type)>>(p).run(pool);
  });
}

}  // namespace fmk::FMK_ISA
