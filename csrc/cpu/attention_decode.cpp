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
// How far ahead of the loads to prefetch, along the rows.
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
    // Halving the number of vectors and the terms per sum at a time: sums of four lanes each ...
    __m512 four[4];
    FMK_FOR (k, 4) {
      const auto add = [](__m512 a, __m512 b) FMK_LAMBDA {
        return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
      };
      const __m512 a = add(products[k][0].v, products[k][1].v);
      const __m512 b = add(products[k][2].v, products[k][3].v);
      four[k] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    }
    // ... then of the four quarters of the vectors: quarter k of the result is key k.
    const auto add = [](__m512 a, __m512 b) FMK_LAMBDA {
      return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    const __m512 sums = add(add(four[0], four[1]), add(four[2], four[3]));
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
      FMK_FOR (i, kKeysPerTile) __builtin_prefetch(row[i] + column + ahead);
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
      __builtin_prefetch(from + ahead);
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

template <class T>
class DecodePass {
  using V = Vec<T>;
  using E = Acc<T>;

 public:
  explicit DecodePass(const AttentionForward& forward)
      : p_(forward.problem),
        forward_(forward),
        queries_(Queries<V>::of(p_)),
        scaling_(Scaling<E>::of(p_)),
        query_ld_(whole_vectors<V>(p_.head_dim)),
        out_ld_(whole_vectors<V>(p_.value_dim)) {}

  void run(const Parallel& pool) const {
    const int64_t units = queries_.lists * queries_.blocks();
    const double numbers = static_cast<double>(p_.head_dim + p_.value_dim) *
                           static_cast<double>(p_.keys) * static_cast<double>(units);
    // A core reads about as many numbers in 20 us.
    const int64_t shards = numbers < 1e5 ? 1 : min_of<int64_t>(pool.threads, units);
    parallel_for(pool, shards, [&](int64_t shard) {
      const Buffers buffers = work_space();
      const int64_t end = queries_.unit_at(shard + 1, shards);
      for (int64_t unit = queries_.unit_at(shard, shards); unit < end; ++unit)
        run_block(queries_.block(unit / queries_.blocks(), unit % queries_.blocks()), buffers);
    });
  }

 private:
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
    std::memset(b.scores, 0, kScores * sizeof(E));
    return b;
  }

  void run_block(const QueryBlock& block, const Buffers& b) const {
    const int64_t lanes = block.vecs * V::W;
    std::memset(b.queries, 0, kFewQueries * query_ld_ * sizeof(E));
    for (int row = 0; row < block.rows; ++row)
      convert(row_of<T>(p_.query, block.batch, block.head_of(row), block.position_of(row)),
              b.queries + row * query_ld_, p_.head_dim);
    Running<V> running;
    running.start();
    bool started = false;
    const int64_t step = key_block_size(block.last_visible, kKeyBlock);
    for (int64_t key0 = 0; key0 < block.last_visible; key0 += step) {
      const int64_t count = min_of(step, block.last_visible - key0);
      MaskBlock<T> mask;
      if (p_.mask.data && !mask.read(p_.mask, block, key0, count, b.mask)) continue;
      const T* keys = row_of<T>(p_.key, block.batch, block.kv_head, key0);
      for (int row = 0; row < block.rows; row += kQueriesPerTile)
        score_rows(block.rows - row, keys, count, b.queries + row * query_ld_, b.scores + row,
                   lanes);
      finish_scores<T>(p_, key0, 0, count, block, scaling_, mask, b.scores, running.maximum);
      const bool decays = softmax_block<E>(b.scores, key0, count, block, scaling_.unit, running);
      if (decays && started) decay_output(block, running, b.out, out_ld_);
      for (int64_t k = 0; k < count; k += kValueRows) {
        const T* values = row_of<T>(p_.value, block.batch, block.kv_head, key0 + k);
        add_rows(block.rows, b.scores + k * lanes, lanes, values, min_of(kValueRows, count - k),
                 started || k > 0, b.out);
      }
      started = true;
    }
    finish_queries<T>(forward_, block, b.out, out_ld_, started, running);
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

  const AttentionProblem& p_;
  const AttentionForward& forward_;
  const Queries<V> queries_;
  const Scaling<E> scaling_;
  const int64_t query_ld_, out_ld_;  // numbers from row to row
};

}  // namespace

bool attention_is_decoding(const AttentionProblem& p) {
  return p.kv_heads > 0 && p.heads / p.kv_heads * p.queries <= kFewQueries;
}

void attention_decode(const AttentionForward& p, const Parallel& pool) {
  with_type(p.problem.dtype,
            [&](auto* type) { DecodePass<std::remove_pointer_t<decltype(type)>>(p).run(pool); });
}

}  // namespace fmk::FMK_ISA
