#include "cpu/attention_online.h"
#include "cpu/reduce.h"

namespace fmk::FMK_ISA {
namespace {

// Keys per block: the scores of a block (64 KB) stay in L2, and the output is read and written once
// per block.
constexpr int64_t kKeyBlock = 264;

template <class T>
class ForwardPass {
  using O = Operand<T>;
  using V = Vec<T>;
  using E = Acc<T>;

 public:
  explicit ForwardPass(const AttentionForward& forward)
      : p_(forward.problem),
        forward_(forward),
        queries_(Queries<V>::of(p_)),
        scaling_(Scaling<E>::of(p_)),
        out_ld_(whole_vectors<V>(p_.value_dim)) {}

  double cost() const { return queries_.total_cost(); }

  // The units between two amounts of work, counted from the problem's first unit.
  void run(double begin, double end, Carver carver) const {
    int64_t unit = queries_.unit_after(begin);
    const int64_t last = queries_.unit_after(end);
    if (unit >= last) return;
    Buffers buffers = work_space(carver);
    int64_t staged = -1;  // the key head that lies in the buffers
    for (; unit < last; ++unit) {
      const QueryBlock block = queries_.block(unit / queries_.blocks(), unit % queries_.blocks());
      const int64_t head = block.batch * p_.kv_heads + block.kv_head;
      if (head != staged) stage_head(block, buffers);
      staged = head;
      run_block(block, buffers);
    }
  }

  size_t work_bytes() const {
    Carver carver;
    work_space(carver);
    return carver.used;
  }

 private:
  struct Buffers {
    Word<O>* query_panel;  // [words][lanes]
    O* query_rows;         // [lanes][head_dim]
    E* scores;             // [kKeyBlock + kMaxTileRows][lanes]
    E* out;                // [lanes][out_ld], not yet divided by the sum
    Word<T>*key_copy, *value_copy;
    E* dropout;  // [kKeyBlock + 3][lanes]
    typename MaskBlock<T>::Buffers mask;
    WordRows keys;
    PanelRows<O> values;
  };

  Buffers work_space(Carver& carver) const {
    Buffers b{};
    b.query_panel = carver.take<Word<O>>(words_of<O>(p_.head_dim) * kMaxLanes<V>);
    b.query_rows = carver.take<O>(p_.head_dim * kMaxLanes<V>);
    b.scores = carver.take<E>((kKeyBlock + kMaxTileRows) * kMaxLanes<V>);
    b.out = carver.take<E>(kMaxLanes<V> * out_ld_);
    if (rows_need_copy<T>(p_.head_dim))
      b.key_copy = carver.take<Word<T>>(p_.keys * words_of<T>(p_.head_dim));
    if (panel_needs_copy<T>(p_.value.row, p_.value_dim))
      b.value_copy = carver.take<Word<T>>(words_of<T>(p_.keys) * out_ld_);
    if (p_.dropout.active) b.dropout = carver.take<E>((kKeyBlock + 3) * kMaxLanes<V>);
    if (p_.mask.data) b.mask.carve(carver, kKeyBlock);
    return b;
  }

  void stage_head(const QueryBlock& block, Buffers& b) const {
    b.keys = head_as_words<T>(p_.key, block.batch, block.kv_head, p_.keys, p_.head_dim, b.key_copy);
    const PanelRows<T> values =
        head_as_panel<T>(p_.value, block.batch, block.kv_head, p_.keys, p_.value_dim, b.value_copy);
    b.values = {values.first, values.ld};
  }

  void run_block(const QueryBlock& block, const Buffers& b) const {
    const int64_t lanes = block.vecs * V::W;
    const auto rows = block_rows<T>(p_.query, block, p_.head_dim, b.query_rows);
    pack_columns_as_panel(rows.first, rows.ld, p_.head_dim, block.rows, lanes, b.query_panel);

    Running<V> running;
    running.start();
    bool started = false;
    const int64_t step = key_block_size(block.any_end - block.any_begin, kKeyBlock);
    for (int64_t key0 = block.any_begin; key0 < block.any_end; key0 += step) {
      const int64_t count = min_of(step, block.any_end - key0);
      MaskBlock<T> mask;
      if (p_.mask.data && !mask.read(p_.mask, block, key0, count, b.mask)) continue;
      score_block<T>(p_, queries_, b.keys, key0, count, block, b.query_panel, scaling_, mask,
                     b.scores, nullptr, running.maximum);
      if (p_.dropout.active) dropout_factors<V>(p_, block, key0, count, b.dropout);
      const bool decays = softmax_block<O>(b.scores, key0, count, block, scaling_.unit,
                                           p_.dropout.active ? b.dropout : nullptr, running);
      if (decays && started) decay_output(block, running, b.out, out_ld_);
      const PanelRows<O> values{b.values.first + key0 / Mac<O>::kPair * b.values.ld, b.values.ld};
      queries_from_keys<O>(reinterpret_cast<const Word<O>*>(b.scores), lanes, block.rows, values,
                           p_.value_dim, b.out, started, [&](int64_t row_end) {
                             return block.words_seen<O>(key0, count, row_end);
                           });
      started = true;
    }
    finish_queries<T>(p_, forward_.output, forward_.lse, block, b.out, out_ld_, started, running);
  }

  const AttentionProblem& p_;
  const AttentionForward& forward_;
  const Queries<V> queries_;
  const Scaling<E> scaling_;
  const int64_t out_ld_;  // numbers from row to row of the accumulated output
};

// The forward pass of sequence n of packed ones.
AttentionForward sequence_of(const AttentionForward& p, int64_t n) {
  if (!p.problem.query_offsets) return p;
  const int64_t row = p.problem.query_offsets[n];
  return {sequence_of(p.problem, n), from_row(p.output, row, p.problem.dtype), p.lse};
}

template <class T>
void run_forward(const AttentionForward& p, const Parallel& pool) {
  const AttentionProblem& q = p.problem;
  const int64_t sequences = q.query_offsets ? q.sequences : 1;
  double total = 0;
  size_t bytes = 0;
  for (int64_t n = 0; n < sequences; ++n) {
    const AttentionForward sequence = sequence_of(p, n);
    const ForwardPass<T> pass(sequence);
    total += pass.cost();
    bytes = max_of(bytes, pass.work_bytes());
  }
  // A unit of cost is a vector of queries times a key.
  const double flops = total * Vec<T>::W * 2.0 * static_cast<double>(q.head_dim + q.value_dim);
  // Slices of equal cost.
  constexpr int64_t kSlicesPerThread = 8;
  const int64_t shards = flops < kSerialFlops ? 1 : pool.threads;
  const int64_t slices = shards == 1 ? 1 : shards * kSlicesPerThread;
  WorkShares work(shards, slices);
  parallel_for(pool, work.count(), [&](int64_t shard) {
    const Carver carver{static_cast<char*>(scratch_bytes(Scratch::kTile, bytes)), 0};
    for (int64_t first, last; work.take(shard, kSlicesPerThread, &first, &last);) {
      const double begin = total * static_cast<double>(first) / static_cast<double>(slices);
      const double end = total * static_cast<double>(last) / static_cast<double>(slices);
      double done = 0;
      for (int64_t n = 0; n < sequences && done < end; ++n) {
        const AttentionForward sequence = sequence_of(p, n);
        const ForwardPass<T> pass(sequence);
        const double cost = pass.cost();
        // The last slice ends at the last unit, whatever rounding says.
        const double stop = last == slices ? cost : end - done;
        if (done + cost > begin) pass.run(begin - done, stop, carver);
        done += cost;
      }
    }
  });
}

void forward(const AttentionForward& p, const Parallel& pool) {
  if (attention_is_decoding(p.problem)) return attention_decode(p, pool);
  with_type(p.problem.dtype,
            [&](auto* type) { run_forward<std::remove_pointer_t<decltype(type)>>(p, pool); });
}

}  // namespace

const AttentionKernels& attention_kernels() {
  static constexpr AttentionKernels table{&forward, &attention_backward, &attention_cached,
                                          &attention_statistics, &attention_weights};
  return table;
}

}  // namespace fmk::FMK_ISA
