#include "cpu/attention_blocks.h"
#include "cpu/reduce.h"

namespace fmk::FMK_ISA {
namespace {

// Keys per block: the scores of a block (64 KB) stay in L2, and the output is read and written once
// per block.
constexpr int64_t kKeyBlock = 264;

// 2^x for x <= 0 as accurately as the product with V will read it.
template <class O, class V>
FMK_INLINE V softmax_exp2(V x) {
  if constexpr (Mac<O>::kPair == 2)
    return exp2_nonpositive_coarse(x);
  else
    return exp2_nonpositive(x);
}

// Natural logarithm of x[i] in [1, 2^31] or NaN; 1.5 ulp. In terms a compiler vectorises.
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
  E decay[kMaxLanes<V>];      // what the block brought to the output so far has to be scaled by
};

// Turns the scores of a block into probabilities, up to the final division, in place: words
// [words_of(count)][lanes]. Returns whether some decay differs from 1.
template <class O>
FMK_NOINLINE bool softmax_block(Acc<O>* scores, int64_t key0, int64_t count,
                                const QueryBlock& block, Acc<O> unit, Running<Vec<O>>& running) {
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
    if (block.ordered)
      end = max_of<int64_t>(0, min_of(count, block.position + column + V::W - key0));
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
      const V even = softmax_exp2<O>(fma(load(from), scale, offset));
      const V odd = softmax_exp2<O>(fma(load(from + lanes), scale, offset));
      sum = sum + even;
      sum_odd = sum_odd + odd;
      store_words(to, even, odd);
      if constexpr (kPair == 1) store_words(to + lanes, odd, odd);
    }
    if (k < end) {
      const V last = softmax_exp2<O>(fma(load(from), scale, offset));
      sum = sum + last;
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
    for (int64_t lane = 0; lane < lanes; ++lane) {
      running.maximum[lane] = running.finished[lane] = -__builtin_inf();
      running.sum[lane] = running.reference[lane] = 0;
    }
    bool started = false;
    const int64_t step = key_block_size(block.last_visible, kKeyBlock);
    for (int64_t key0 = 0; key0 < block.last_visible; key0 += step) {
      const int64_t count = min_of(step, block.last_visible - key0);
      MaskBlock<T> mask;
      if (p_.mask.data && !mask.read(p_.mask, block, key0, count, b.mask)) continue;
      score_block<T>(p_, b.keys, key0, count, block, b.query_panel, scaling_, mask, b.scores,
                     running.maximum);
      if (softmax_block<O>(b.scores, key0, count, block, scaling_.unit, running) && started)
        for (int row = 0; row < block.rows; ++row) {
          const V decay = splat(running.decay[row]);
          E* out = b.out + row * out_ld_;
          for (int64_t column = 0; column < out_ld_; column += V::W)
            store(out + column, load(out + column) * decay);
        }
      const PanelRows<O> values{b.values.first + key0 / Mac<O>::kPair * b.values.ld, b.values.ld};
      queries_from_keys<O>(reinterpret_cast<const Word<O>*>(b.scores), lanes, block.rows, values,
                           p_.value_dim, b.out, started, [&](int64_t row_end) {
                             return block.words_seen<O>(key0, count, row_end);
                           });
      started = true;
    }
    finish_block(block, b, running, started);
  }

  // Divides by the sums, rounds, and stores output and lse.
  void finish_block(const QueryBlock& block, const Buffers& b, Running<V>& running,
                    bool started) const {
    E* lse = running.decay;
    std::memcpy(lse, running.sum, sizeof running.sum);
    log_lanes(lse, block.vecs * V::W);
    for (int row = 0; row < block.rows; ++row) {
      const int64_t head = block.head_of(row), position = block.position_of(row);
      T* out = row_of<T>(forward_.output, block.batch, head, position);
      // The largest score contributes 1, so a sum of 0 means that no key was seen.
      const bool empty = !started || running.sum[row] == 0;
      const V divide = splat(empty ? E(0) : E(1) / running.sum[row]);
      const E* from = b.out + row * out_ld_;
      for (int64_t column = 0; column < p_.value_dim; column += V::W) {
        const V x = empty ? zero<V>() : load(from + column) * divide;
        const int64_t left = p_.value_dim - column;
        if (left >= V::W)
          store(out + column, x);
        else
          store(out + column, x, static_cast<int>(left));
      }
      static_cast<E*>(forward_.lse)[(block.batch * p_.heads + head) * p_.queries + position] =
          empty ? E(-__builtin_inf()) : running.reference[row] * static_cast<E>(kLn2) + lse[row];
    }
  }

  const AttentionProblem& p_;
  const AttentionForward& forward_;
  const Queries<V> queries_;
  const Scaling<E> scaling_;
  const int64_t out_ld_;  // numbers from row to row of the accumulated output
};

void forward(const AttentionForward& p, const Parallel& pool) {
  with_type(p.problem.dtype,
            [&](auto* type) { ForwardPass<std::remove_pointer_t<decltype(type)>>(p).run(pool); });
}

}  // namespace

const AttentionKernels& attention_kernels() {
  static constexpr AttentionKernels table{&forward, &attention_backward};
  return table;
}

}  // namespace fmk::FMK_ISA
