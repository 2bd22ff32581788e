// The backward pass recomputes the probabilities of a block of queries and a block of keys from lse
// and uses them at once (FlashAttention's scheme). With P the probabilities, all transposed like
// the scores (a row per key):
//
//   dP = dO V^T    dS = P * (dP - delta)    delta = rowsum(dO * O) - grad_lse
//   dV += P^T dO   dK += scale dS^T Q       dQ += scale dS K
//
// A thread owns a key head, or a share of its queries, so nothing is added to concurrently. Sums
// are kept in the compute type until the end. With dropout factors Z, dV += (Z P)^T dO and dP is
// multiplied by Z; dS is the gradient of masks and slopes, before the derivative of the softcap.
//
// A gradient dW of the weights themselves is added to dP, before Z. rowsum(Z P * dW) then belongs
// to delta, and takes a pass of its own over the keys.
#include "cpu/attention_gradients.h"
#include "cpu/reduce.h"

namespace fmk::FMK_ISA {
namespace {

// Keys per block: scores and their gradients, of 64 queries, take 36 KB each.
constexpr int64_t kKeyBlock = 144;

template <class T>
class BackwardPass {
  using O = Operand<T>;
  using V = Vec<T>;
  using E = Acc<T>;

 public:
  explicit BackwardPass(const AttentionBackward& backward)
      : p_(backward.problem),
        backward_(backward),
        queries_(Queries<V>::of(p_)),
        scaling_(Scaling<E>::of(p_)),
        key_ld_(whole_vectors<V>(p_.head_dim)),
        value_ld_(whole_vectors<V>(p_.value_dim)),
        key_sums_((p_.keys + kRowsPerTile) * key_ld_),
        value_sums_((p_.keys + kRowsPerTile) * value_ld_),
        heads_(p_.batch * p_.kv_heads),
        blocks_per_head_(heads_ ? queries_.lists / heads_ * queries_.blocks() : 0),
        need_plain_(backward.grad_mask),
        need_sums_(backward.grad_slopes || backward.grad_sinks),
        need_grad_scores_(backward.grad_query.data || backward.grad_key.data || need_plain_ ||
                          need_sums_),
        need_weight_grads_(need_grad_scores_ && backward.grad_weights.data) {}

  int64_t heads() const { return heads_; }
  // Work of one key head, in arbitrary units.
  double head_cost() const {
    return heads_ ? queries_.total_cost() / static_cast<double>(heads_) : 0.0;
  }
  double flops() const {
    return 4.0 * static_cast<double>(p_.head_dim + p_.value_dim) * static_cast<double>(p_.keys) *
           static_cast<double>(p_.batch) * static_cast<double>(p_.heads) *
           static_cast<double>(p_.queries);
  }

  // Key heads [begin, end), each whole; for a shard of a region that serves several problems.
  void run_heads(int64_t begin, int64_t end, const OptionGradients<E>& options) const {
    Buffers buffers = work_space(false);
    buffers.options = options;
    for (int64_t head = begin; head < end; ++head) {
      run_part(head, 0, 1, buffers);
      for (int64_t key = 0; key < p_.keys; ++key)
        store_key(head, key, buffers.key_sums, buffers.value_sums);
    }
  }

  void run(const Parallel& pool) const {
    if (heads_ == 0) return;
    const double flops = this->flops();
    const int64_t threads = flops < kSerialFlops ? 1 : pool.threads;
    const int64_t parts = parts_per_head(threads), units = heads_ * parts;
    E* shared = nullptr;  // the sums of every part
    if (parts > 1)
      shared = static_cast<E*>(
          scratch_bytes(Scratch::kCall, units * (key_sums_ + value_sums_) * sizeof(E)));
    const int64_t shards = min_of(threads, units);
    const OptionSums<E> sums = OptionSums<E>::of(backward_, shards);
    WorkShares work(shards, units, sums.sharing());
    parallel_for(pool, work.count(), [&](int64_t shard) {
      Buffers buffers = work_space(parts > 1);
      buffers.options = sums.of_shard(shard);
      for (int64_t unit; work.take(shard, &unit);) {
        if (shared) {
          buffers.key_sums = shared + unit * (key_sums_ + value_sums_);
          buffers.value_sums = buffers.key_sums + key_sums_;
        }
        run_part(unit / parts, unit % parts, parts, buffers);
        if (!shared)
          for (int64_t key = 0; key < p_.keys; ++key)
            store_key(unit, key, buffers.key_sums, buffers.value_sums);
      }
    });
    sums.store(backward_);
    if (!shared) return;
    const int64_t rows = heads_ * p_.keys, row_shards = min_of(threads, rows);
    parallel_for(pool, row_shards, [&](int64_t shard) {
      for (int64_t row = rows * shard / row_shards; row < rows * (shard + 1) / row_shards; ++row) {
        const int64_t head = row / p_.keys, key = row % p_.keys;
        E* sums = shared + head * parts * (key_sums_ + value_sums_);
        for (int64_t part = 1; part < parts; ++part) {
          const E* more = sums + part * (key_sums_ + value_sums_);
          for (int64_t i = key * key_ld_; i < (key + 1) * key_ld_; ++i) sums[i] += more[i];
          for (int64_t i = 0; i < value_ld_; ++i)
            sums[key_sums_ + key * value_ld_ + i] += more[key_sums_ + key * value_ld_ + i];
        }
        store_key(head, key, sums, sums + key_sums_);
      }
    });
  }

 private:
  struct Buffers {
    Word<O>*query_panel, *grad_panel;  // [words][lanes]: the block's queries and output gradients
    O *query_rows, *grad_rows;         // [lanes][width], where they cannot be read in place
    Word<O>*query_copy, *grad_copy;    // [words_of(lanes)][padded width]
    E *scores, *grad_probs;            // [kKeyBlock + kMaxTileRows][lanes]
    O *probs, *grad_scores;            // the same memory, unless numbers are stored in pairs
    Word<O>* grad_score_words;         // [words_of(kKeyBlock)][lanes]
    E* grad_query;                     // [lanes][key_ld]
    E *key_sums, *value_sums;          // [keys + kRowsPerTile][key_ld], [..][value_ld]
    Word<T>*key_copy, *value_copy, *key_panel_copy;
    typename MaskBlock<T>::Buffers mask;
    E *dropout, *derivative, *plain;     // [kKeyBlock + kMaxTileRows][lanes], where needed
    E *weight_grad_rows, *weight_grads;  // [lanes][kKeyBlock] and transposed, where needed
    OptionGradients<E> options;
    WordRows keys, values;
    PanelRows<O> key_panel;
  };

  Buffers work_space(bool shared_sums) const {
    Buffers b{};
    constexpr int64_t kLanes = kMaxLanes<V>;
    constexpr int64_t kBlockNumbers = (kKeyBlock + kMaxTileRows) * kLanes;
    const auto carve = [&](Carver& carver) {
      b.query_panel = carver.take<Word<O>>(words_of<O>(p_.head_dim) * kLanes);
      b.grad_panel = carver.take<Word<O>>(words_of<O>(p_.value_dim) * kLanes);
      b.query_rows = carver.take<O>(p_.head_dim * kLanes);
      b.grad_rows = carver.take<O>(p_.value_dim * kLanes);
      b.query_copy = carver.take<Word<O>>(words_of<O>(kLanes) * key_ld_);
      b.grad_copy = carver.take<Word<O>>(words_of<O>(kLanes) * value_ld_);
      b.scores = carver.take<E>(kBlockNumbers);
      b.grad_probs = carver.take<E>(kBlockNumbers);
      if constexpr (Mac<O>::kPair == 2) {
        b.probs = carver.take<O>(kBlockNumbers);
        b.grad_scores = carver.take<O>(kBlockNumbers);
        b.grad_score_words = carver.take<Word<O>>(words_of<O>(kKeyBlock) * kLanes);
      } else {
        b.probs = b.scores;
        b.grad_scores = b.grad_score_words = b.grad_probs;
      }
      b.grad_query = carver.take<E>(kLanes * key_ld_);
      if (!shared_sums) {
        b.key_sums = carver.take<E>(key_sums_);
        b.value_sums = carver.take<E>(value_sums_);
      }
      if (rows_need_copy<T>(p_.head_dim))
        b.key_copy = carver.take<Word<T>>(p_.keys * words_of<T>(p_.head_dim));
      if (rows_need_copy<T>(p_.value_dim))
        b.value_copy = carver.take<Word<T>>(p_.keys * words_of<T>(p_.value_dim));
      if (panel_needs_copy<T>(p_.key.row, p_.head_dim))
        b.key_panel_copy = carver.take<Word<T>>(words_of<T>(p_.keys) * key_ld_);
      if (p_.mask.data) b.mask.carve(carver, kKeyBlock);
      if (p_.dropout.active) b.dropout = carver.take<E>(kBlockNumbers);
      if (scaling_.cap > 0) b.derivative = carver.take<E>(kBlockNumbers);
      if (need_plain_) b.plain = carver.take<E>(kBlockNumbers);
      if (need_weight_grads_) {
        b.weight_grad_rows = carver.take<E>(kKeyBlock * kLanes);
        b.weight_grads = carver.take<E>(kKeyBlock * kLanes);
      }
    };
    Carver carver;
    carve(carver);
    carver = {static_cast<char*>(scratch_bytes(Scratch::kTile, carver.used)), 0};
    carve(carver);
    return b;
  }

  // Into how many parts the queries of a key head are cut: as few as keep all threads about equally
  // busy.
  int64_t parts_per_head(int64_t threads) const {
    int64_t parts = 1;
    while (parts < blocks_per_head_ && heads_ * parts < 8 * threads && heads_ * parts % threads)
      ++parts;
    return parts;
  }
  // The first block of a part: parts of a head are of equal cost.
  int64_t first_block(int64_t part, int64_t parts) const {
    int64_t total = 0;
    for (int64_t i = 0; i < blocks_per_head_; ++i) total += queries_.cost(i % queries_.blocks());
    const int64_t target = static_cast<int64_t>(static_cast<double>(total) * part / parts);
    int64_t block = 0;
    for (int64_t done = 0; block < blocks_per_head_; ++block) {
      const int64_t cost = queries_.cost(block % queries_.blocks());
      if (done + cost / 2 >= target) break;
      done += cost;
    }
    return part == parts ? blocks_per_head_ : block;
  }

  void run_part(int64_t head, int64_t part, int64_t parts, Buffers& b) const {
    const int64_t batch = head / p_.kv_heads, kv_head = head % p_.kv_heads;
    b.keys = head_as_words<T>(p_.key, batch, kv_head, p_.keys, p_.head_dim, b.key_copy);
    b.values = head_as_words<T>(p_.value, batch, kv_head, p_.keys, p_.value_dim, b.value_copy);
    const PanelRows<T> panel =
        head_as_panel<T>(p_.key, batch, kv_head, p_.keys, p_.head_dim, b.key_panel_copy);
    b.key_panel = {panel.first, panel.ld};
    std::memset(b.key_sums, 0, key_sums_ * sizeof(E));
    std::memset(b.value_sums, 0, value_sums_ * sizeof(E));
    const int64_t end = first_block(part + 1, parts);
    for (int64_t i = first_block(part, parts); i < end; ++i) {
      const int64_t list = head * (queries_.lists / heads_) + i / queries_.blocks();
      run_block(queries_.block(list, i % queries_.blocks()), b);
    }
  }

  // The rows of a block as the panel of a reduction over queries.
  static PanelRows<O> rows_as_panel(const BlockRows<T>& rows, int count, int64_t width,
                                    Word<O>* copy) {
    if constexpr (Mac<O>::kPair == 1) {
      if (width % V::W == 0 && rows.ld != 0) return {rows.first, rows.ld};
    }
    const int64_t padded = whole_vectors<V>(width);
    pack_rows_as_panel(rows.first, rows.ld, count, width, padded, copy);
    return {copy, padded};
  }

  void run_block(const QueryBlock& block, const Buffers& b) const {
    const int64_t lanes = block.vecs * V::W;
    const auto queries = block_rows<T>(p_.query, block, p_.head_dim, b.query_rows);
    const auto grads = block_rows<T>(backward_.grad_output, block, p_.value_dim, b.grad_rows);
    pack_columns_as_panel(queries.first, queries.ld, p_.head_dim, block.rows, lanes, b.query_panel);
    if (need_grad_scores_)
      pack_columns_as_panel(grads.first, grads.ld, p_.value_dim, block.rows, lanes, b.grad_panel);
    PanelRows<O> query_rows{}, grad_rows{};
    if (backward_.grad_key.data)
      query_rows = rows_as_panel(queries, block.rows, p_.head_dim, b.query_copy);
    if (backward_.grad_value.data)
      grad_rows = rows_as_panel(grads, block.rows, p_.value_dim, b.grad_copy);
    alignas(64) E lse[kMaxLanes<V>], delta[kMaxLanes<V>];
    read_row_terms(block, grads, lse, delta);
    const int64_t step = key_block_size(block.any_end - block.any_begin, kKeyBlock);
    if (need_weight_grads_) add_weight_terms(block, step, lse, b, delta);
    RowSums<double> sums[kMaxLanes<V>] = {};
    LaneSums<V> lane_sums;

    bool started = false;
    for (int64_t key0 = block.any_begin; key0 < block.any_end; key0 += step) {
      const int64_t count = min_of(step, block.any_end - key0);
      MaskBlock<T> mask;
      if (p_.mask.data && !mask.read(p_.mask, block, key0, count, b.mask)) continue;
      alignas(64) E maximum[kMaxLanes<V>] = {};
      score_block<T>(p_, queries_, b.keys, key0, count, block, b.query_panel, scaling_, mask,
                     b.scores, b.derivative, maximum);
      if (p_.dropout.active) dropout_factors<V>(p_, block, key0, count, b.dropout);
      if (need_grad_scores_)
        keys_times_queries<O>(b.values, key0, count, block, b.grad_panel, words_of<O>(p_.value_dim),
                              [&](int64_t k, int j) {
                                return StoreAccumulators<V>{b.grad_probs + k * lanes + j * V::W,
                                                            lanes};
                              });
      if (need_weight_grads_) {
        read_weight_grads(block, key0, count, b);
        for (int64_t i = 0; i < count * lanes; i += V::W)
          store(b.grad_probs + i, load(b.grad_probs + i) + load(b.weight_grads + i));
      }
      if (need_sums_) start_lane_sums(block, key0, lane_sums);
      probabilities_block<O>({b.scores, b.grad_probs, lse, delta, scaling_.unit, need_grad_scores_,
                              b.dropout, b.derivative, b.plain, need_sums_ ? &lane_sums : nullptr,
                              b.probs, b.grad_scores, b.grad_score_words},
                             key0, count, block);
      if (need_sums_) add_lane_sums(block, lane_sums, sums);
      if (need_plain_) add_mask_gradient(block, key0, count, b);
      if (backward_.grad_value.data)
        keys_from_queries<O>(b.probs, key0, count, block, grad_rows, p_.value_dim,
                             b.value_sums + key0 * value_ld_);
      if (backward_.grad_key.data)
        keys_from_queries<O>(b.grad_scores, key0, count, block, query_rows, p_.head_dim,
                             b.key_sums + key0 * key_ld_);
      if (backward_.grad_query.data) {
        const PanelRows<O> keys{b.key_panel.first + key0 / Mac<O>::kPair * b.key_panel.ld,
                                b.key_panel.ld};
        queries_from_keys<O>(
            b.grad_score_words, lanes, block.rows, keys, p_.head_dim, b.grad_query, started,
            [&](int64_t row_end) { return block.words_seen<O>(key0, count, row_end); });
      }
      started = true;
    }
    if (need_sums_) add_row_gradients(block, lse, delta, sums, b.options);
    if (!backward_.grad_query.data) return;
    if (!started) std::memset(b.grad_query, 0, kMaxLanes<V> * key_ld_ * sizeof(E));
    for (int row = 0; row < block.rows; ++row)
      store_row(
          b.grad_query + row * key_ld_, static_cast<E>(p_.scale), p_.head_dim,
          row_of<T>(backward_.grad_query, block.batch, block.head_of(row), block.position_of(row)));
  }

  // lse as an exponent of 2, and delta, of each lane; lanes without a query, and queries that see
  // no key, get no probabilities.
  void read_row_terms(const QueryBlock& block, const BlockRows<T>& grads, E* lse, E* delta) const {
    const E infinity = __builtin_inf();
    for (int64_t row = 0; row < block.vecs * V::W; ++row) {
      lse[row] = infinity;
      delta[row] = 0;
      if (row >= block.rows) continue;
      const int64_t head = block.head_of(row), position = block.position_of(row);
      const int64_t at = row_index(p_, block.batch, head, position);
      const E value = static_cast<const E*>(backward_.lse)[at];
      if (value == -infinity) continue;
      lse[row] = value * static_cast<E>(kLog2E);
      const T* out = row_of<T>(backward_.output, block.batch, head, position);
      const O* grad = grads.first + row * grads.ld;
      V sum = zero<V>();
      for (int64_t column = 0; column < p_.value_dim; column += V::W) {
        const int64_t left = p_.value_dim - column;
        if (left >= V::W) {
          sum = fma(load(grad + column), load(out + column), sum);
        } else {
          const int n = static_cast<int>(left);
          sum = fma(load(grad + column, n), load(out + column, n), sum);
        }
      }
      delta[row] = reduce_add(sum);
      if (backward_.grad_lse) delta[row] -= static_cast<const E*>(backward_.grad_lse)[at];
    }
  }

  // The gradients of the weights of keys [key0, key0 + count): b.weight_grads[count][lanes].
  void read_weight_grads(const QueryBlock& block, int64_t key0, int64_t count,
                         const Buffers& b) const {
    const AttentionMask& grads = backward_.grad_weights;
    const E factor = static_cast<E>(backward_.grad_weights_factor);
    for (int row = 0; row < block.rows; ++row) {
      const T* from = static_cast<const T*>(grads.data) + block.batch * grads.batch +
                      block.head_of(row) * grads.head + block.position_of(row) * grads.query +
                      key0 * grads.key;
      E* to = b.weight_grad_rows + row * count;
      if (grads.key == 1)
        convert(from, to, count);
      else
        for (int64_t k = 0; k < count; ++k) to[k] = widen(from[k * grads.key]);
      for (int64_t k = 0; k < count; ++k) to[k] *= factor;
    }
    pack_columns_as_panel(b.weight_grad_rows, count, count, block.rows, block.vecs * V::W,
                          b.weight_grads);
  }

  // Adds rowsum(P * dW) to delta, over blocks of `step` keys.
  void add_weight_terms(const QueryBlock& block, int64_t step, const E* lse, const Buffers& b,
                        E* delta) const {
    const int64_t lanes = block.vecs * V::W;
    const V unit = splat(scaling_.unit);
    for (int64_t key0 = block.any_begin; key0 < block.any_end; key0 += step) {
      const int64_t count = min_of(step, block.any_end - key0);
      MaskBlock<T> mask;
      if (p_.mask.data && !mask.read(p_.mask, block, key0, count, b.mask)) continue;
      alignas(64) E maximum[kMaxLanes<V>] = {};
      score_block<T>(p_, queries_, b.keys, key0, count, block, b.query_panel, scaling_, mask,
                     b.scores, nullptr, maximum);
      if (p_.dropout.active) dropout_factors<V>(p_, block, key0, count, b.dropout);
      read_weight_grads(block, key0, count, b);
      for (int64_t k = 0; k < count; ++k) {
        for (int j = block.hidden_vecs(key0 + k, V::W); j < block.vecs; ++j) {
          const int64_t at = k * lanes + j * V::W;
          V x = probability<O>(load(b.scores + at), unit, load(lse + j * V::W));
          if (p_.dropout.active) x = x * load(b.dropout + at);
          store(delta + j * V::W, fma(x, load(b.weight_grads + at), load(delta + j * V::W)));
        }
      }
    }
  }

  int64_t nearest_key_distance(int64_t query) const {
    const int64_t position = p_.first_position + query;
    return max_of<int64_t>(0, max_of(position - (p_.keys - 1), -position));
  }
  void start_lane_sums(const QueryBlock& block, int64_t key0, LaneSums<V>& sums) const {
    std::memset(&sums, 0, sizeof sums);
    for (int row = 0; row < block.rows; ++row) {
      const int64_t query = block.position_of(row);
      sums.position[row] = static_cast<E>(p_.first_position + query - key0);
      sums.nearest[row] = static_cast<E>(nearest_key_distance(query));
    }
  }
  static void add_lane_sums(const QueryBlock& block, const LaneSums<V>& from, RowSums<double>* to) {
    for (int row = 0; row < block.rows; ++row) {
      to[row].weight += from.weight[row];
      to[row].weight_distance += from.weight_distance[row];
      to[row].grad += from.grad[row];
      to[row].grad_distance += from.grad_distance[row];
    }
  }
  // With delta replaced by what the same probabilities give, exact = sum(P dP) - grad_lse, and
  // `share` the sink's part of the softmax:
  //
  //   d sink = -share exact    d slope = -sum(P (dP - exact) distance)
  //
  // Weights and share are divided by their sum, for a rounded lse is a factor that all have in
  // common. sum(P (dP - exact)) is known, so the distance of the nearest key need not be summed.
  void add_row_gradients(const QueryBlock& block, const E* lse, const E* delta,
                         const RowSums<double>* sums, const OptionGradients<E>& to) const {
    for (int row = 0; row < block.rows; ++row) {
      if (lse[row] == __builtin_inf()) continue;
      const int64_t head = block.head_of(row), query = block.position_of(row);
      const int64_t at = row_index(p_, block.batch, head, query);
      const RowSums<double>& s = sums[row];
      double share = 0;
      if (p_.sinks) {
        const double sink = static_cast<const E*>(p_.sinks)[head] * kLog2E;
        share = std::exp2(sink - static_cast<double>(lse[row]));
      }
      const double all = s.weight + share, given = delta[row];
      share /= all;
      const double products = (s.grad + given * s.weight) / all;  // sum(P dP)
      const double grad_lse =
          backward_.grad_lse ? static_cast<const E*>(backward_.grad_lse)[at] : E(0);
      const double exact = products - grad_lse;
      if (to.sinks && share > 0) to.sinks[head].add(-share * exact);
      if (!to.slopes) continue;
      const double beyond = (s.grad_distance + (given - exact) * s.weight_distance) / all;
      const double rest = products * share + grad_lse * (1 - share);  // sum(P (dP - exact))
      to.slopes[block.batch * p_.slopes_batch + head].add(
          -(beyond + static_cast<double>(nearest_key_distance(query)) * rest));
    }
  }

  void add_mask_gradient(const QueryBlock& block, int64_t key0, int64_t count,
                         const Buffers& b) const {
    const int64_t lanes = block.vecs * V::W;
    for (int row = 0; row < block.rows; ++row) {
      E* to = b.options.mask + block.batch * backward_.mask_batch +
              block.head_of(row) * backward_.mask_head +
              block.position_of(row) * backward_.mask_query + key0 * backward_.mask_key;
      const E* from = b.plain + row;
      if (backward_.mask_key == 0) {
        for (int64_t k = 0; k < count; ++k) *to += from[k * lanes];
      } else {
        for (int64_t k = 0; k < count; ++k) to[k] += from[k * lanes];
      }
    }
  }

  void store_key(int64_t head, int64_t key, const E* key_sums, const E* value_sums) const {
    const int64_t batch = head / p_.kv_heads, kv_head = head % p_.kv_heads;
    if (backward_.grad_key.data)
      store_row(key_sums + key * key_ld_, static_cast<E>(p_.scale), p_.head_dim,
                row_of<T>(backward_.grad_key, batch, kv_head, key));
    if (backward_.grad_value.data)
      store_row(value_sums + key * value_ld_, E(1), p_.value_dim,
                row_of<T>(backward_.grad_value, batch, kv_head, key));
  }

  const AttentionProblem& p_;
  const AttentionBackward& backward_;
  const Queries<V> queries_;
  const Scaling<E> scaling_;
  const int64_t key_ld_, value_ld_;      // numbers from row to row of the sums
  const int64_t key_sums_, value_sums_;  // numbers of all rows
  const int64_t heads_, blocks_per_head_;
  const bool need_plain_, need_sums_, need_grad_scores_, need_weight_grads_;
};

// The backward pass of sequence n of packed ones.
AttentionBackward sequence_of(const AttentionBackward& p, int64_t n) {
  if (!p.problem.query_offsets) return p;
  const DType type = p.problem.dtype;
  const int64_t row = p.problem.query_offsets[n], key = p.problem.key_offsets[n];
  AttentionBackward s = p;
  s.problem = sequence_of(p.problem, n);
  s.grad_output = from_row(p.grad_output, row, type);
  s.output = from_row(p.output, row, type);
  s.grad_query = from_row(p.grad_query, row, type);
  s.grad_key = from_row(p.grad_key, key, type);
  s.grad_value = from_row(p.grad_value, key, type);
  if (p.grad_slopes) {
    const int64_t bytes = type == DType::kF64 ? 8 : 4;
    s.grad_slopes = static_cast<char*>(p.grad_slopes) + n * p.problem.slopes_batch * bytes;
    s.slopes_numbers = p.problem.heads;
  }
  return s;
}

// All sequences in one region: shards are runs of (sequence, key head) of equal cost.
template <class T>
void run_packed(const AttentionBackward& p, const Parallel& pool) {
  using Pass = BackwardPass<T>;
  const int64_t sequences = p.problem.sequences;
  double total = 0, flops = 0;
  for (int64_t n = 0; n < sequences; ++n) {
    const AttentionBackward sequence = sequence_of(p, n);
    const Pass pass(sequence);
    total += pass.head_cost() * static_cast<double>(pass.heads());
    flops += pass.flops();
  }
  const int64_t units = sequences * p.problem.kv_heads;
  const int64_t shards = flops < kSerialFlops ? 1 : min_of<int64_t>(pool.threads, units);
  const auto sums = OptionSums<Acc<T>>::of(p, max_of<int64_t>(1, shards));
  parallel_for(pool, shards, [&](int64_t shard) {
    const double share = total / static_cast<double>(shards);
    const double begin = share * static_cast<double>(shard);
    const double end = share * static_cast<double>(shard + 1);
    double done = 0;
    for (int64_t n = 0; n < sequences; ++n) {
      const AttentionBackward sequence = sequence_of(p, n);
      const Pass pass(sequence);
      const double cost = pass.head_cost();
      OptionGradients<Acc<T>> options = sums.of_shard(shard);
      if (options.slopes) options.slopes += n * p.problem.slopes_batch;
      for (int64_t head = 0; head < pass.heads(); ++head, done += cost) {
        // A head belongs to the shard in which its middle lies.
        const double middle = done + cost / 2;
        if ((middle >= begin || shard == 0) && (middle < end || shard + 1 == shards))
          pass.run_heads(head, head + 1, options);
      }
    }
  });
  sums.store(p);
}

template <class T>
void run_backward(const AttentionBackward& p, const Parallel& pool) {
  if (!p.problem.query_offsets) return BackwardPass<T>(p).run(pool);
  // Few heads of few sequences do not fill the threads: each sequence then shares out its queries.
  if (p.problem.sequences * p.problem.kv_heads >= 2 * pool.threads || pool.threads == 1)
    return run_packed<T>(p, pool);
  for (int64_t n = 0; n < p.problem.sequences; ++n) {
    const AttentionBackward sequence = sequence_of(p, n);
    BackwardPass<T>(sequence).run(pool);
  }
}

}  // namespace

void attention_backward(const AttentionBackward& p, const Parallel& pool) {
  with_type(p.problem.dtype,
            [&](auto* type) { run_backward<std::remove_pointer_t<decltype(type)>>(p, pool); });
}

}  // namespace fmk::FMK_ISA
