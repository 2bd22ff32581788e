// Attention of a few queries (decoding): bound by reading keys and values once. Queries that share
// a key head are taken together. Scores are products along the width of the head, so keys and
// values are read as they lie, a vector of neighbours at a time, and widened in registers.
#include "cpu/attention_online.h"
#include "cpu/reduce.h"

namespace fmk::FMK_ISA {
namespace {

// Queries of a list that are still few; more are faster as tiles of attention_forward.cpp.
constexpr int64_t kFewQueries = 8;
// Keys of which all scores are taken before the values are read: long runs through memory.
constexpr int64_t kKeyBlock = 1056;
// Values are read column panel by column panel within so many rows.
constexpr int64_t kValueRows = 24;
// How far ahead of the loads to prefetch, along the rows: into L2, which has more reads from memory
// under way than L1.
constexpr int64_t kPrefetchBytes = 8192;

constexpr int kKeysPerTile = 4;
// Accumulators are keys x queries, then queries x vectors.
#if defined(__AVX512F__)
constexpr int kQueriesPerTile = 4, kVecsPerTile = 4;
#else
constexpr int kQueriesPerTile = 2, kVecsPerTile = 4;
#endif

template <class T>
FMK_INLINE int64_t prefetch_distance(int64_t stride, int64_t width) {
  const int64_t row_bytes = max_of<int64_t>(1, width * static_cast<int64_t>(sizeof(T)));
  return (kPrefetchBytes / row_bytes + 1) * stride;
}

// scores[key][query] = sum of products[key][query], for a tile of keys.
template <class V, int NQ>
FMK_INLINE void store_sums(const V (&products)[kKeysPerTile][NQ], typename V::Elem* scores,
                           int64_t lanes) {
#if defined(__AVX512F__)
  if constexpr (NQ == 4 && V::W == 16) {
    VecF all[16];
    FMK_FOR (i, 16) all[i] = products[i / 4][i % 4];
    const __m512 sums = reduce_add(all).v;  // quarter k is key k
    _mm_storeu_ps(scores, _mm512_castps512_ps128(sums));
    _mm_storeu_ps(scores + lanes, _mm512_extractf32x4_ps(sums, 1));
    _mm_storeu_ps(scores + 2 * lanes, _mm512_extractf32x4_ps(sums, 2));
    _mm_storeu_ps(scores + 3 * lanes, _mm512_extractf32x4_ps(sums, 3));
    return;
  }
#endif
  for (int k = 0; k < kKeysPerTile; ++k)
    for (int q = 0; q < NQ; ++q) scores[k * lanes + q] = reduce_add(products[k][q]);
}

// scores[k][q] = key k . query q for k < count, q < NQ; room for kKeysPerTile more rows. Queries
// are rows of whole vectors, padded with zeros.
template <class T, int NQ>
FMK_NOINLINE void score_keys(const T* keys, int64_t stride, int64_t count, int64_t width,
                             const Acc<T>* queries, int64_t query_ld, Acc<T>* scores,
                             int64_t lanes) {
  using V = Vec<T>;
  const int64_t ahead = prefetch_distance<T>(stride, width);
  for (int64_t k = 0; k < count; k += kKeysPerTile) {
    const T* row[kKeysPerTile];
    V sums[kKeysPerTile][NQ];
    FMK_FOR (i, kKeysPerTile) {
      row[i] = keys + min_of(k + i, count - 1) * stride;
      FMK_FOR (q, NQ) sums[i][q] = zero<V>();
    }
    int64_t column = 0;
    const auto step = [&](const auto& load_key) FMK_LAMBDA {
      V key[kKeysPerTile];
      FMK_FOR (i, kKeysPerTile) key[i] = pin(load_key(row[i] + column));
      FMK_FOR (q, NQ) {
        const V query = pin(load(queries + q * query_ld + column));
        FMK_FOR (i, kKeysPerTile) sums[i][q] = fma(key[i], query, sums[i][q]);
      }
    };
    for (; column + V::W <= width; column += V::W) {
      FMK_FOR (i, kKeysPerTile) __builtin_prefetch(row[i] + column + ahead, 0, 2);
      step([](const T* p) FMK_LAMBDA { return load(p); });
    }
    const int left = static_cast<int>(width - column);
    if (left > 0) step([left](const T* p) FMK_LAMBDA { return load(p, left); });
    store_sums<V, NQ>(sums, scores + k * lanes, lanes);
  }
}

// out[q][column] (+)= sum over k < count of probs[k][q] * values[k][column], for q < NQ and the NV
// vectors of columns at `values`, the last of which has `last` valid ones.
template <class T, int NQ, int NV>
FMK_NOINLINE void add_values(const Acc<T>* probs, int64_t lanes, const T* values, int64_t stride,
                             int64_t ahead, int64_t count, int last, bool accumulate, Acc<T>* out,
                             int64_t out_ld) {
  using V = Vec<T>;
  V sums[NQ][NV];
  FMK_FOR (q, NQ)
    FMK_FOR (j, NV) sums[q][j] = accumulate ? load(out + q * out_ld + j * V::W) : zero<V>();
  for (int64_t k = 0; k < count; ++k, values += stride, probs += lanes) {
    V value[NV];
    FMK_FOR (j, NV) {
      const T* from = values + j * V::W;
      __builtin_prefetch(from + ahead, 0, 2);
      value[j] = pin(j + 1 < NV || last == V::W ? load(from) : load(from, last));
    }
    FMK_FOR (q, NQ) {
      const V p = splat(probs[q]);
      FMK_FOR (j, NV) sums[q][j] = fma(p, value[j], sums[q][j]);
    }
  }
  FMK_FOR (q, NQ)
    FMK_FOR (j, NV) store(out + q * out_ld + j * V::W, sums[q][j]);
}

// Rows of one key head: side by side in memory, or in pages.
template <class T>
struct KeyRows {
  const T* first;
  int64_t row, page;     // numbers from row to row, and from page to page
  const int32_t* pages;  // null: one run
  int64_t page_size;

  const T* at(int64_t key) const {
    if (!pages) return first + key * row;
    return first + pages[key / page_size] * page + key % page_size * row;
  }
  // Rows from `key` on, at most `count`, that lie side by side.
  int64_t run(int64_t key, int64_t count) const {
    return pages ? min_of(count, page_size - key % page_size) : count;
  }
};

// What a share of a block's keys leaves to be merged with the others.
template <class V>
struct Partial {
  using E = typename V::Elem;
  E reference[kFewQueries], sum[kFewQueries];
  bool started;
};

template <class T>
class DecodePass {
  using V = Vec<T>;
  using E = Acc<T>;

 public:
  struct Pages {
    const int32_t* table;  // of this sequence; null: none
    int64_t size;
  };

  DecodePass(const AttentionProblem& problem, const AttentionResult& output, void* lse,
             const Pages& pages)
      : p_(problem),
        output_(output),
        lse_(lse),
        pages_(pages),
        queries_(Queries<V>::of(p_)),
        scaling_(Scaling<E>::of(p_)),
        query_ld_(whole_vectors<V>(p_.head_dim)),
        out_ld_(whole_vectors<V>(p_.value_dim)) {}

  struct Buffers {
    E* queries;  // [kFewQueries][query_ld]
    E* scores;   // [kKeyBlock + kMaxTileRows][lanes]
    E* out;      // [kFewQueries][out_ld]
    typename MaskBlock<T>::Buffers mask;
  };

  Buffers work_space() const {
    Buffers b{};
    constexpr int64_t kScores = (kKeyBlock + kMaxTileRows) * kMaxLanes<V>;
    const auto carve = [&](Carver& carver) {
      b.queries = carver.take<E>(kFewQueries * query_ld_);
      b.scores = carver.take<E>(kScores);
      b.out = carver.take<E>(kFewQueries * out_ld_);
      if (p_.mask.data) b.mask.carve(carver, kKeyBlock);
    };
    Carver carver;
    carve(carver);
    carver = {static_cast<char*>(scratch_bytes(Scratch::kTile, carver.used)), 0};
    carve(carver);
    // Softmax runs over whole vectors, also over lanes without a query.
    const int64_t rows = min_of<int64_t>(kKeyBlock, p_.keys) + kMaxTileRows;
    std::memset(b.scores, 0, rows * kMaxLanes<V> * sizeof(E));
    return b;
  }

  int64_t units() const { return queries_.lists * queries_.blocks(); }
  double cost() const { return static_cast<double>(queries_.block(0, 0).any_end + 16); }
  double numbers_per_key() const { return static_cast<double>(p_.head_dim + p_.value_dim); }
  int64_t partial_numbers() const { return kFewQueries * out_ld_; }

  // Share `part` of `parts` of the keys of a unit; alone, it finishes the queries.
  void run(int64_t unit, int64_t part, int64_t parts, const Buffers& b, Partial<V>* partial,
           E* partial_out) const {
    const QueryBlock block = block_of(unit);
    Running<V> running;
    running.start();
    const int64_t keys = max_of<int64_t>(0, block.any_end - block.any_begin);
    const auto first_key = [&](int64_t n) {
      return n == parts ? block.any_end
                        : block.any_begin + keys * n / parts / kKeyAlignment * kKeyAlignment;
    };
    const bool started = run_keys(block, first_key(part), first_key(part + 1), b, running);
    if (parts == 1)
      return finish_queries<T>(p_, output_, lse_, block, b.out, out_ld_, started, running);
    partial->started = started;
    std::memcpy(partial->reference, running.reference, sizeof partial->reference);
    std::memcpy(partial->sum, running.sum, sizeof partial->sum);
    if (started) std::memcpy(partial_out, b.out, partial_numbers() * sizeof(E));
  }

  // Merges the shares of a unit, in order, and finishes its queries.
  void merge(int64_t unit, int64_t parts, const Partial<V>* partials, E* outs) const {
    const QueryBlock block = block_of(unit);
    Running<V> running;
    running.start();
    E* out = outs;
    bool started = false;
    for (int64_t part = 0; part < parts; ++part) {
      const Partial<V>& share = partials[part];
      const E* more = outs + part * partial_numbers();
      if (!share.started) continue;
      for (int row = 0; row < block.rows; ++row) {
        const bool first = !started || running.sum[row] == 0;
        const E reference = first                                           ? share.reference[row]
                            : share.sum[row] == 0                           ? running.reference[row]
                            : running.reference[row] > share.reference[row] ? running.reference[row]
                                                                            : share.reference[row];
        const E old = first ? E(0) : std::exp2(running.reference[row] - reference);
        const E now = share.sum[row] == 0 ? E(0) : std::exp2(share.reference[row] - reference);
        running.sum[row] = first ? share.sum[row] : running.sum[row] * old + share.sum[row] * now;
        running.reference[row] = reference;
        for (int64_t i = row * out_ld_; i < (row + 1) * out_ld_; ++i)
          out[i] = first ? more[i] : out[i] * old + more[i] * now;
      }
      started = true;
    }
    finish_queries<T>(p_, output_, lse_, block, out, out_ld_, started, running);
  }

 private:
  QueryBlock block_of(int64_t unit) const {
    return queries_.block(unit / queries_.blocks(), unit % queries_.blocks());
  }
  KeyRows<T> rows(const AttentionOperand& x, const QueryBlock& block) const {
    return {row_of<T>(x, pages_.table ? 0 : block.batch, block.kv_head, 0), x.row, x.batch,
            pages_.table, pages_.size};
  }

  bool run_keys(const QueryBlock& block, int64_t first, int64_t last, const Buffers& b,
                Running<V>& running) const {
    const int64_t lanes = block.vecs * V::W;
    std::memset(b.queries, 0, kFewQueries * query_ld_ * sizeof(E));
    for (int row = 0; row < block.rows; ++row)
      convert(row_of<T>(p_.query, block.batch, block.head_of(row), block.position_of(row)),
              b.queries + row * query_ld_, p_.head_dim);
    const KeyRows<T> keys = rows(p_.key, block), values = rows(p_.value, block);
    bool started = false;
    const int64_t step = key_block_size(last - first, kKeyBlock);
    for (int64_t key0 = first; key0 < last; key0 += step) {
      const int64_t count = min_of(step, last - key0);
      MaskBlock<T> mask;
      if (p_.mask.data && !mask.read(p_.mask, block, key0, count, b.mask)) continue;
      for (int64_t k = 0; k < count;) {
        const int64_t run = keys.run(key0 + k, count - k);
        for (int row = 0; row < block.rows; row += kQueriesPerTile)
          score_rows(block.rows - row, keys.at(key0 + k), run, b.queries + row * query_ld_,
                     b.scores + k * lanes + row, lanes);
        k += run;
      }
      finish_scores<T>(p_, queries_, key0, 0, count, block, scaling_, mask, b.scores, nullptr,
                       running.maximum);
      const bool decays =
          softmax_block<E>(b.scores, key0, count, block, scaling_.unit, nullptr, running);
      if (decays && started) decay_output(block, running, b.out, out_ld_);
      for (int64_t k = 0; k < count;) {
        const int64_t run = values.run(key0 + k, min_of(kValueRows, count - k));
        add_rows(block.rows, b.scores + k * lanes, lanes, values.at(key0 + k), run,
                 started || k > 0, b.out);
        k += run;
      }
      started = true;
    }
    return started;
  }

  // One tile of queries, the first of `rows`.
  void score_rows(int rows, const T* keys, int64_t count, const E* queries, E* scores,
                  int64_t lanes) const {
    const int64_t stride = p_.key.row, width = p_.head_dim;
    if (rows == 1)
      score_keys<T, 1>(keys, stride, count, width, queries, query_ld_, scores, lanes);
    else if (rows == 2)
      score_keys<T, 2>(keys, stride, count, width, queries, query_ld_, scores, lanes);
    else
      score_keys<T, kQueriesPerTile>(keys, stride, count, width, queries, query_ld_, scores, lanes);
  }

  void add_rows(int rows, const E* probs, int64_t lanes, const T* values, int64_t count,
                bool accumulate, E* out) const {
    const int64_t vecs = out_ld_ / V::W;
    const int64_t ahead = prefetch_distance<T>(p_.value.row, p_.value_dim);
    for (int64_t j = 0; j < vecs; j += kVecsPerTile) {
      const int64_t column = j * V::W;
      const int panel = static_cast<int>(min_of<int64_t>(kVecsPerTile, vecs - j));
      const int last =
          static_cast<int>(min_of<int64_t>(p_.value_dim - column - (panel - 1) * V::W, V::W));
      for (int row = 0; row < rows; row += kQueriesPerTile) {
        const auto add = [&]<int NQ>() FMK_LAMBDA {
          const E* p = probs + row;
          const T* from = values + column;
          E* to = out + row * out_ld_ + column;
          const int64_t stride = p_.value.row;
          switch (panel) {
            case 1:
              return add_values<T, NQ, 1>(p, lanes, from, stride, ahead, count, last, accumulate,
                                          to, out_ld_);
            case 2:
              return add_values<T, NQ, 2>(p, lanes, from, stride, ahead, count, last, accumulate,
                                          to, out_ld_);
            case 3:
              return add_values<T, NQ, 3>(p, lanes, from, stride, ahead, count, last, accumulate,
                                          to, out_ld_);
            default:
              return add_values<T, NQ, 4>(p, lanes, from, stride, ahead, count, last, accumulate,
                                          to, out_ld_);
          }
        };
        if (rows - row == 1)
          add.template operator()<1>();
        else if (rows - row == 2)
          add.template operator()<2>();
        else
          add.template operator()<kQueriesPerTile>();
      }
    }
  }

  const AttentionProblem p_;
  const AttentionResult output_;
  void* lse_;
  const Pages pages_;
  const Queries<V> queries_;
  const Scaling<E> scaling_;
  const int64_t query_ld_, out_ld_;  // numbers from row to row
};

// Sequence b of a cache, as a problem of its own; its pages stay where they are.
AttentionProblem sequence_of(const AttentionCached& p, int64_t b) {
  AttentionProblem s = p.problem;
  const int64_t size = size_of(s.dtype);
  const auto from = [&](const AttentionOperand& x, int64_t numbers) {
    return AttentionOperand{static_cast<const char*>(x.data) + numbers * size, x.batch, x.head,
                            x.row};
  };
  s.batch = 1;
  s.keys = p.lengths[b];
  s.first_position = s.keys - s.queries;
  s.first_row = b * s.row_batch;
  s.query = from(s.query, b * s.query.batch);
  if (!p.pages) {
    s.key = from(s.key, b * s.key.batch);
    s.value = from(s.value, b * s.value.batch);
  }
  if (s.slopes) {
    const int64_t bytes = s.dtype == DType::kF64 ? 8 : 4;
    s.slopes = static_cast<const char*>(s.slopes) + b * s.slopes_batch * bytes;
  }
  return s;
}
AttentionResult from_sequence(const AttentionResult& x, int64_t b, DType type) {
  return {static_cast<char*>(x.data) + b * x.batch * size_of(type), x.batch, x.head, x.row};
}

// make(n) is the pass of sequence n, all of which have equally many units.
template <class T, class Make>
void run_decoding(int64_t sequences, const Make& make, const Parallel& pool) {
  using V = Vec<T>;
  using Pass = DecodePass<T>;
  if (sequences == 0) return;
  const Pass model = make(0);
  const int64_t per_sequence = model.units(), units = sequences * per_sequence;
  if (units == 0) return;
  double total = 0;
  for (int64_t n = 0; n < sequences; ++n) total += make(n).cost();
  const double numbers = total * static_cast<double>(per_sequence) * model.numbers_per_key();
  // A core reads about as many numbers in 20 us.
  const int64_t threads = numbers < 1e5 ? 1 : pool.threads;
  // Where units do not fill the threads evenly, each one's keys are shared out as well.
  int64_t parts = 1;
  while (units * parts < 4 * threads && units * parts % threads != 0) ++parts;
  const int64_t stride = model.partial_numbers();
  Partial<V>* partials = nullptr;
  Acc<T>* outs = nullptr;
  if (parts > 1) {
    partials =
        static_cast<Partial<V>*>(scratch_bytes(Scratch::kCall, units * parts * sizeof(Partial<V>)));
    outs = static_cast<Acc<T>*>(
        scratch_bytes(Scratch::kCall2, units * parts * stride * sizeof(Acc<T>)));
  }
  const int64_t shards = min_of(threads, units * parts);
  parallel_for(pool, shards, [&](int64_t shard) {
    const auto buffers = model.work_space();
    // Items are (sequence, unit, part); shares of equal cost, each ending within half an item.
    const double share = total * static_cast<double>(per_sequence * parts);
    const double begin = share * static_cast<double>(shard) / static_cast<double>(shards);
    const double end = share * static_cast<double>(shard + 1) / static_cast<double>(shards);
    double done = 0;
    for (int64_t n = 0; n < sequences; ++n) {
      const Pass pass = make(n);
      const double cost = pass.cost();
      for (int64_t item = 0; item < per_sequence * parts; ++item) {
        const double middle = done + cost / 2;
        done += cost;
        const bool mine = middle >= begin && (middle < end || shard + 1 == shards);
        if (!mine) continue;
        const int64_t unit = item / parts, part = item % parts;
        const int64_t at = (n * per_sequence + unit) * parts + part;
        pass.run(unit, part, parts, buffers, partials ? partials + at : nullptr,
                 outs ? outs + at * stride : nullptr);
      }
    }
  });
  if (parts == 1) return;
  for (int64_t n = 0; n < sequences; ++n) {
    const Pass pass = make(n);
    for (int64_t unit = 0; unit < per_sequence; ++unit) {
      const int64_t at = (n * per_sequence + unit) * parts;
      pass.merge(unit, parts, partials + at, outs + at * stride);
    }
  }
}

// A sequence's keys or values out of their pages: [head][key][width], side by side.
template <class T>
AttentionOperand gather_pages(const AttentionCached& p, int64_t b, const AttentionOperand& x,
                              int64_t width, Scratch slot) {
  const int64_t heads = p.problem.kv_heads, keys = p.lengths[b];
  T* to = static_cast<T*>(scratch_bytes(slot, heads * keys * width * sizeof(T)));
  const int32_t* pages = p.pages + b * p.pages_per_sequence;
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t key = 0; key < keys; ++key)
      std::memcpy(static_cast<void*>(to + (head * keys + key) * width),
                  row_of<T>(x, pages[key / p.page_size], head, key % p.page_size),
                  width * sizeof(T));
  return {to, 0, keys * width, width};
}

template <class T>
void run_cached(const AttentionCached& p, const Parallel& pool) {
  if (attention_is_decoding(p.problem)) {
    const auto make = [&](int64_t b) {
      const int32_t* table = p.pages ? p.pages + b * p.pages_per_sequence : nullptr;
      return DecodePass<T>(sequence_of(p, b), from_sequence(p.output, b, p.problem.dtype), p.lse,
                           {table, p.page_size});
    };
    return run_decoding<T>(p.problem.batch, make, pool);
  }
  for (int64_t b = 0; b < p.problem.batch; ++b) {
    AttentionForward forward{sequence_of(p, b), from_sequence(p.output, b, p.problem.dtype), p.lse};
    if (p.pages) {
      const int64_t width = p.problem.head_dim, value_width = p.problem.value_dim;
      forward.problem.key = gather_pages<T>(p, b, p.problem.key, width, Scratch::kCall);
      forward.problem.value = gather_pages<T>(p, b, p.problem.value, value_width, Scratch::kCall2);
    }
    attention_kernels().forward(forward, pool);
  }
}

}  // namespace

bool attention_is_decoding(const AttentionProblem& p) {
  return p.kv_heads > 0 && p.heads / p.kv_heads * p.queries <= kFewQueries && !p.query_offsets &&
         !p.dropout.active;
}

void attention_decode(const AttentionForward& p, const Parallel& pool) {
  with_type(p.problem.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_decoding<T>(
        1, [&](int64_t) { return DecodePass<T>(p.problem, p.output, p.lse, {nullptr, 0}); }, pool);
  });
}

void attention_cached(const AttentionCached& p, const Parallel& pool) {
  with_type(p.problem.dtype,
            [&](auto* type) { run_cached<std::remove_pointer_t<decltype(type)>>(p, pool); });
}

}  // namespace fmk::FMK_ISA
