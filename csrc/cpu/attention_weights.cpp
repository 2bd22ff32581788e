// Attention that also gives its weights away, or their mean over the heads. The scores of a block
// of queries with all keys are kept, so that keys and values are read once: their largest is known
// before the first exponential, and the sums before the first weight is stored. The mean is added
// up in that same form, so the weights of single heads never reach memory.
#include "cpu/attention_online.h"
#include "cpu/reduce.h"

namespace fmk::FMK_ISA {
namespace {

// Keys per block of the products: scores of a block (64 KB) stay in L2.
constexpr int64_t kKeyBlock = 264;

// The exponent that counts as 0, of each lane: that of the largest score. While a query has seen no
// key, its maximum is -inf, and 0 serves: -inf less -inf is NaN.
template <class V>
FMK_INLINE void set_references(const QueryBlock& block, typename V::Elem unit,
                               Running<V>& running) {
  const V lowest = splat(typename V::Elem(-__builtin_inf()));
  for (int column = 0; column < block.vecs * V::W; column += V::W) {
    const V largest = load(running.maximum + column);
    store(running.reference + column, select(less(lowest, largest), largest * splat(unit),
                                             select(is_nan(largest), largest, zero<V>())));
  }
}

// Scores become exponentials in place, and words of the product with V: the same memory unless
// numbers are stored in pairs. `dropout`: factors of the exponentials, not of their sum; or null.
template <class O>
FMK_NOINLINE void exponentials_block(Acc<O>* scores, Word<O>* words, int64_t key0, int64_t count,
                                     const QueryBlock& block, Acc<O> unit, const Acc<O>* dropout,
                                     Running<Vec<O>>& running) {
  using V = Vec<O>;
  using E = Acc<O>;
  constexpr int kPair = Mac<O>::kPair;
  const int64_t lanes = block.vecs * V::W;
  const V scale = splat(unit);
  for (int j = 0; j < block.vecs; ++j) {
    const int column = j * V::W;
    // Keys that some query of this vector may see.
    int64_t end = count;
    if (block.ordered) end = max_of<int64_t>(0, min_of(count, block.edge + column + V::W - key0));
    const V offset = zero<V>() - load(running.reference + column);
    V sums[2] = {zero<V>(), zero<V>()};
    for (int64_t k = 0; k < count; k += 2) {
      V pair[2] = {zero<V>(), zero<V>()};
      FMK_FOR (i, 2) {
        if (k + i >= count) break;
        E* at = scores + (k + i) * lanes + column;
        if (k + i < end) {
          pair[i] = softmax_exp2<O>(fma(load(at), scale, offset));
          sums[i] = sums[i] + pair[i];
          if (dropout) pair[i] = pair[i] * load(dropout + (k + i) * lanes + column);
        }
        store(at, pair[i]);
      }
      if constexpr (kPair == 2) store_words(words + k / 2 * lanes + column, pair[0], pair[1]);
    }
    store(running.sum + column, load(running.sum + column) + sums[0] + sums[1]);
  }
}

// total[k][lane] (+)= from[k][lane] * factor[lane].
template <class V>
FMK_NOINLINE void add_weights(const typename V::Elem* from, const typename V::Elem* factor,
                              int64_t keys, int vecs, bool first, typename V::Elem* total) {
  const int64_t lanes = vecs * V::W;
  for (int j = 0; j < vecs; ++j) {
    const V scale = load(factor + j * V::W);
    for (int64_t at = j * V::W; at < keys * lanes; at += lanes)
      store(total + at,
            first ? load(from + at) * scale : fma(load(from + at), scale, load(total + at)));
  }
}

// Columns of a tile of store_weights.
constexpr int kTileKeys = 16;

// rows[lane][k] = tile[k][lane], both dense.
template <class E>
FMK_INLINE void transpose_tile(const E* tile, int width, E* rows) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<E, float>) return transpose_16x16(tile, 16, rows, kTileKeys);
#endif
  for (int lane = 0; lane < width; ++lane)
    for (int k = 0; k < kTileKeys; ++k) rows[lane * kTileKeys + k] = tile[k * width + lane];
}

// to[lane][k] = from[k][lane] * factor[lane] for all rows of the block, which are `ld` apart.
template <class T>
FMK_NOINLINE void store_weights(const Acc<T>* from, const Acc<T>* factor, int64_t keys,
                                const QueryBlock& block, T* to, int64_t ld) {
  using V = Vec<T>;
  using E = Acc<T>;
  constexpr int W = V::W;
  alignas(64) E tile[kTileKeys * W] = {}, rows[kTileKeys * W];
  const int64_t lanes = block.vecs * W;
  for (int64_t lane = 0; lane < block.rows; lane += W) {
    const V scale = load(factor + lane);
    const int count = static_cast<int>(min_of<int64_t>(W, block.rows - lane));
    for (int64_t k = 0; k < keys; k += kTileKeys) {
      const int left = static_cast<int>(min_of<int64_t>(kTileKeys, keys - k));
      for (int i = 0; i < left; ++i)
        store(tile + i * W, load(from + (k + i) * lanes + lane) * scale);
      T* corner = to + lane * ld + k;
#if defined(__AVX512F__)
      if constexpr (std::is_same_v<T, float>) {
        if (count == W && left == kTileKeys) {
          transpose_16x16(tile, W, corner, ld);
          continue;
        }
      }
#endif
      transpose_tile(tile, W, rows);
      for (int row = 0; row < count; ++row)
        convert(rows + row * kTileKeys, corner + row * ld, left);
    }
  }
}

template <class T>
class WeightsPass {
  using O = Operand<T>;
  using V = Vec<T>;
  using E = Acc<T>;

 public:
  explicit WeightsPass(const AttentionWeights& weights)
      : p_(weights.problem),
        out_(weights),
        queries_(queries_of(p_)),
        scaling_(Scaling<E>::of(p_)),
        out_ld_(whole_vectors<V>(p_.value_dim)) {}

  // A unit is a block of queries with some of the heads: one, or for the mean as many as leave
  // every thread something to do.
  void run(const Parallel& pool) const {
    const double flops =
        queries_.total_cost() * V::W * 2.0 * static_cast<double>(p_.head_dim + p_.value_dim);
    const int64_t threads = flops < kSerialFlops ? 1 : pool.threads;
    const int64_t parts = out_.average ? parts_per_block(threads) : p_.heads;
    const int64_t blocks = queries_.blocks(), units = p_.batch * parts * blocks;
    E* shared = nullptr;  // the sum of every part
    if (out_.average && parts > 1)
      shared = static_cast<E*>(
          scratch_bytes(Scratch::kCall, units * p_.keys * kMaxLanes<V> * sizeof(E)));
    WorkShares work(min_of(threads, units), units);
    parallel_for(pool, work.count(), [&](int64_t shard) {
      Buffers buffers = work_space(!shared);
      int64_t staged = -1;  // the key head that lies in the buffers
      for (int64_t unit; work.take(shard, &unit);) {
        const int64_t part = unit / blocks % parts, batch = unit / blocks / parts;
        const int64_t begin = p_.heads * part / parts, end = p_.heads * (part + 1) / parts;
        if (shared) buffers.total = shared + unit * p_.keys * kMaxLanes<V>;
        for (int64_t head = begin; head < end; ++head) {
          const QueryBlock block = queries_.block(batch * p_.heads + head, unit % blocks);
          const int64_t key_head = batch * p_.kv_heads + block.kv_head;
          if (key_head != staged) stage_head(block, buffers);
          staged = key_head;
          run_block(block, head == begin, buffers);
          if (out_.average && !shared && head + 1 == end) store_mean(block, buffers.total);
        }
      }
    });
    if (!shared) return;
    share_out(pool, min_of(threads, p_.batch * blocks), p_.batch * blocks, WorkShares::kStealing,
              [&](int64_t, int64_t unit) {
                const int64_t batch = unit / blocks;
                const QueryBlock block = queries_.block(batch * p_.heads, unit % blocks);
                const int64_t numbers = (block.any_end - block.any_begin) * block.vecs * V::W;
                E* sum = shared + (batch * parts * blocks + unit % blocks) * p_.keys * kMaxLanes<V>;
                for (int64_t part = 1; part < parts; ++part) {
                  const E* more = sum + part * blocks * p_.keys * kMaxLanes<V>;
                  for (int64_t i = 0; i < numbers; i += V::W)
                    store(sum + i, load(sum + i) + load(more + i));
                }
                store_mean(block, sum);
              });
  }

 private:
  struct Buffers {
    Word<O>* query_panel;  // [words][lanes]
    O* query_rows;         // [lanes][head_dim]
    E* scores;             // [keys + kMaxTileRows][lanes]
    Word<O>* words;        // [words_of(kKeyBlock)][lanes], where numbers are stored in pairs
    E* total;              // [keys][lanes]: the sum over heads
    E* out;                // [lanes][out_ld], not yet divided by the sum
    Word<T>*key_copy, *value_copy;
    E* dropout;  // [kKeyBlock + 3][lanes]
    typename MaskBlock<T>::Buffers mask;
    WordRows keys;
    PanelRows<O> values;
  };

  // A head per list, whatever their number: a lane of the mean is a query of every head.
  static Queries<V> queries_of(const AttentionProblem& p) {
    const int64_t group = p.kv_heads ? p.heads / p.kv_heads : 1;
    return {p, group, 1, p.batch * p.heads, p.queries, PanelSplit<V>::of(p.queries)};
  }

  int64_t parts_per_block(int64_t threads) const {
    const int64_t units = p_.batch * queries_.blocks();
    int64_t parts = 1;
    while (parts < p_.heads && units * parts < 4 * threads && units * parts % threads) ++parts;
    return parts;
  }

  Buffers work_space(bool own_total) const {
    Buffers b{};
    const auto carve = [&](Carver& carver) {
      b.query_panel = carver.take<Word<O>>(words_of<O>(p_.head_dim) * kMaxLanes<V>);
      b.query_rows = carver.take<O>(p_.head_dim * kMaxLanes<V>);
      b.scores = carver.take<E>((p_.keys + kKeyAlignment + kMaxTileRows) * kMaxLanes<V>);
      if constexpr (Mac<O>::kPair == 2)
        b.words = carver.take<Word<O>>(words_of<O>(kKeyBlock) * kMaxLanes<V>);
      if (out_.average && own_total) b.total = carver.take<E>(p_.keys * kMaxLanes<V>);
      b.out = carver.take<E>(kMaxLanes<V> * out_ld_);
      if (rows_need_copy<T>(p_.head_dim))
        b.key_copy = carver.take<Word<T>>(p_.keys * words_of<T>(p_.head_dim));
      if (panel_needs_copy<T>(p_.value.row, p_.value_dim))
        b.value_copy = carver.take<Word<T>>(words_of<T>(p_.keys) * out_ld_);
      if (p_.dropout.active) b.dropout = carver.take<E>((kKeyBlock + 3) * kMaxLanes<V>);
      if (p_.mask.data) b.mask.carve(carver, kKeyBlock);
    };
    Carver carver;
    carve(carver);
    carver = {static_cast<char*>(scratch_bytes(Scratch::kTile, carver.used)), 0};
    carve(carver);
    return b;
  }

  void stage_head(const QueryBlock& block, Buffers& b) const {
    b.keys = head_as_words<T>(p_.key, block.batch, block.kv_head, p_.keys, p_.head_dim, b.key_copy);
    const PanelRows<T> values =
        head_as_panel<T>(p_.value, block.batch, block.kv_head, p_.keys, p_.value_dim, b.value_copy);
    b.values = {values.first, values.ld};
  }

  void run_block(const QueryBlock& block, bool first_head, const Buffers& b) const {
    const int64_t lanes = block.vecs * V::W, all = block.any_end - block.any_begin;
    const auto rows = block_rows<T>(p_.query, block, p_.head_dim, b.query_rows);
    pack_columns_as_panel(rows.first, rows.ld, p_.head_dim, block.rows, lanes, b.query_panel);
    Running<V> running;
    running.start();
    const int64_t step = key_block_size(all, kKeyBlock);
    for (int64_t key0 = block.any_begin; key0 < block.any_end; key0 += step) {
      const int64_t count = min_of(step, block.any_end - key0);
      E* scores = b.scores + (key0 - block.any_begin) * lanes;
      MaskBlock<T> mask;
      if (p_.mask.data && !mask.read(p_.mask, block, key0, count, b.mask)) {
        for (int64_t i = 0; i < count * lanes; ++i) scores[i] = -__builtin_inf();
        continue;
      }
      score_block<T>(p_, queries_, b.keys, key0, count, block, b.query_panel, scaling_, mask,
                     scores, nullptr, running.maximum);
    }

    set_references<V>(block, scaling_.unit, running);
    bool started = false;
    for (int64_t key0 = block.any_begin; key0 < block.any_end; key0 += step) {
      const int64_t count = min_of(step, block.any_end - key0);
      E* scores = b.scores + (key0 - block.any_begin) * lanes;
      auto* words = Mac<O>::kPair == 2 ? b.words : reinterpret_cast<Word<O>*>(scores);
      if (p_.dropout.active) dropout_factors<V>(p_, block, key0, count, b.dropout);
      exponentials_block<O>(scores, words, key0, count, block, scaling_.unit,
                            p_.dropout.active ? b.dropout : nullptr, running);
      const PanelRows<O> values{b.values.first + key0 / Mac<O>::kPair * b.values.ld, b.values.ld};
      queries_from_keys<O>(
          words, lanes, block.rows, values, p_.value_dim, b.out, started,
          [&](int64_t row_end) { return block.words_seen<O>(key0, count, row_end); });
      started = true;
    }
    finish_queries<T>(p_, out_.output, out_.lse, block, b.out, out_ld_, started, running);

    // Lanes without a query, and queries that see no key, have a sum of 0.
    for (int64_t lane = 0; lane < lanes; ++lane)
      if (lane >= block.rows || running.sum[lane] == 0) running.factor[lane] = 0;
    if (out_.average)
      add_weights<V>(b.scores, running.factor, all, block.vecs, first_head, b.total);
    else
      store_rows(block, b.scores, running.factor, block.batch * p_.heads + block.head);
  }

  void store_mean(const QueryBlock& block, const E* total) const {
    alignas(64) E factor[kMaxLanes<V>];
    for (E& one : factor) one = E(1) / static_cast<E>(p_.heads);
    store_rows(block, total, factor, block.batch);
  }

  // Rows of matrix `matrix` of the result; 0 for the keys that none of the queries may see.
  void store_rows(const QueryBlock& block, const E* from, const E* factor, int64_t matrix) const {
    T* to = static_cast<T*>(out_.weights) + (matrix * p_.queries + block.position) * p_.keys;
    for (int row = 0; row < block.rows; ++row) {
      T* begin = to + row * p_.keys;
      std::memset(static_cast<void*>(begin), 0, block.any_begin * sizeof(T));
      std::memset(static_cast<void*>(begin + block.any_end), 0,
                  (p_.keys - block.any_end) * sizeof(T));
    }
    store_weights<T>(from, factor, block.any_end - block.any_begin, block, to + block.any_begin,
                     p_.keys);
  }

  const AttentionProblem& p_;
  const AttentionWeights& out_;
  const Queries<V> queries_;
  const Scaling<E> scaling_;
  const int64_t out_ld_;  // numbers from row to row of the accumulated output
};

}  // namespace

void attention_weights(const AttentionWeights& p, const Parallel& pool) {
  with_type(p.problem.dtype,
            [&](auto* type) { WeightsPass<std::remove_pointer_t<decltype(type)>>(p).run(pool); });
}

}  // namespace fmk::FMK_ISA
