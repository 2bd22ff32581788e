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

  void run(const Parallel& pool) const {
    const double flops = 2.0 * static_cast<double>(p_.head_dim + p_.value_dim) *
                         static_cast<double>(p_.keys) * static_cast<double>(p_.batch) *
                         static_cast<double>(p_.heads) * static_cast<double>(p_.queries);
    const int64_t units = queries_.lists * queries_.blocks();
    const int64_t shards = flops < kSerialFlops ? 1 : min_of<int64_t>(pool.threads, units);
    parallel_for(pool, shards, [&](int64_t shard) {
      Buffers buffers = work_space();
      int64_t staged = -1;  // the key head that lies in the buffers
      const int64_t end = queries_.unit_at(shard + 1, shards);
      for (int64_t unit = queries_.unit_at(shard, shards); unit < end; ++unit) {
        const QueryBlock block = queries_.block(unit / queries_.blocks(), unit % queries_.blocks());
        const int64_t head = block.batch * p_.kv_heads + block.kv_head;
        if (head != staged) stage_head(block, buffers);
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
    E* out;                // [lanes][out_ld], not yet divided by the sum
    Word<T>*key_copy, *value_copy;
    typename MaskBlock<T>::Buffers mask;
    WordRows keys;
    PanelRows<O> values;
  };

  Buffers work_space() const {
    Buffers b{};
    const auto carve = [&](Carver& carver) {
      b.query_panel = carver.take<Word<O>>(words_of<O>(p_.head_dim) * kMaxLanes<V>);
      b.query_rows = carver.take<O>(p_.head_dim * kMaxLanes<V>);
      b.scores = carver.take<E>((kKeyBlock + kMaxTileRows) * kMaxLanes<V>);
      b.out = carver.take<E>(kMaxLanes<V> * out_ld_);
      if (rows_need_copy<T>(p_.head_dim))
        b.key_copy = carver.take<Word<T>>(p_.keys * words_of<T>(p_.head_dim));
      if (panel_needs_copy<T>(p_.value.row, p_.value_dim))
        b.value_copy = carver.take<Word<T>>(words_of<T>(p_.keys) * out_ld_);
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

  void run_block(const QueryBlock& block, const Buffers& b) const {
    const int64_t lanes = block.vecs * V::W;
    const auto rows = block_rows<T>(p_.query, block, p_.head_dim, b.query_rows);
    pack_columns_as_panel(rows.first, rows.ld, p_.head_dim, block.rows, lanes, b.query_panel);

    Running<V> running;
    running.start();
    bool started = false;
    const int64_t step = key_block_size(block.last_visible, kKeyBlock);
    for (int64_t key0 = 0; key0 < block.last_visible; key0 += step) {
      const int64_t count = min_of(step, block.last_visible - key0);
      MaskBlock<T> mask;
      if (p_.mask.data && !mask.read(p_.mask, block, key0, count, b.mask)) continue;
      score_block<T>(p_, b.keys, key0, count, block, b.query_panel, scaling_, mask, b.scores,
                     running.maximum);
      const bool decays = softmax_block<O>(b.scores, key0, count, block, scaling_.unit, running);
      if (decays && started) decay_output(block, running, b.out, out_ld_);
      const PanelRows<O> values{b.values.first + key0 / Mac<O>::kPair * b.values.ld, b.values.ld};
      queries_from_keys<O>(reinterpret_cast<const Word<O>*>(b.scores), lanes, block.rows, values,
                           p_.value_dim, b.out, started, [&](int64_t row_end) {
                             return block.words_seen<O>(key0, count, row_end);
                           });
      started = true;
    }
    finish_queries<T>(forward_, block, b.out, out_ld_, started, running);
  }

  const AttentionProblem& p_;
  const AttentionForward& forward_;
  const Queries<V> queries_;
  const Scaling<E> scaling_;
  const int64_t out_ld_;  // numbers from row to row of the accumulated output
};

void forward(const AttentionForward& p, const Parallel& pool) {
  if (attention_is_decoding(p.problem)) return attention_decode(p, pool);
  with_type(p.problem.dtype,
            [&](auto* type) { ForwardPass<std::remove_pointer_t<decltype(type)>>(p).run(pool); });
}

}  // namespace

const AttentionKernels& attention_kernels() {
  static constexpr AttentionKernels table{&forward, &attention_backward};
  return table;
}

}  // namespace fmk::FMK_ISA
