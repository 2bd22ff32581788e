#include "cpu/norm.h"

#include <type_traits>

#include "cpu/dropout.h"
#include "cpu/reduce.h"

namespace fmk::FMK_ISA {
namespace {

FMK_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
FMK_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// body(i, lanes) for every vector of n elements, lanes < W at the end only.
template <class V, class Body>
FMK_INLINE void for_vectors(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + V::W <= n; i += V::W) body(i, V::W);
  if (i < n) body(i, static_cast<int>(n - i));
}
// x as it comes back from storage.
template <class T>
FMK_INLINE Vec<T> rounded(Vec<T> x) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    return x;
  } else {
    T stored[Vec<T>::W];
    store(stored, x);
    return load(stored);
  }
}

// The first `lanes` lanes of x, the rest zero.
template <class V>
FMK_INLINE V first_lanes(V x, int lanes) {
  typename V::Elem stored[V::W];
  store(stored, x);
  return load(stored, lanes);
}

// sums[r] = the sum over n elements of term(r, i, lanes), a vector from element i on whose lanes
// past the end do not count. Partial sums, so that an addition need not wait for the one before.
template <class V, int R, class Term>
FMK_INLINE void sums_of(int64_t n, const Term& term, typename V::Elem* sums) {
  V partial[R][4];
  FMK_FOR (r, R)
    FMK_FOR (j, 4) partial[r][j] = zero<V>();
  int64_t i = 0;
  for (; i + 4 * V::W <= n; i += 4 * V::W)
    FMK_FOR (r, R)
      FMK_FOR (j, 4) partial[r][j] = partial[r][j] + term(r, i + j * V::W, V::W);
  for (; i + V::W <= n; i += V::W)
    FMK_FOR (r, R) partial[r][0] = partial[r][0] + term(r, i, V::W);
  if (i < n) {
    const int lanes = static_cast<int>(n - i);
    FMK_FOR (r, R) partial[r][1] = partial[r][1] + first_lanes(term(r, i, lanes), lanes);
  }
  FMK_FOR (r, R)
    sums[r] = reduce_add((partial[r][0] + partial[r][1]) + (partial[r][2] + partial[r][3]));
}

// Two partial sums that take turns: for a loop that cannot be unrolled by hand.
template <class V>
struct Sum {
  V next = zero<V>(), other = zero<V>();
  FMK_LAMBDA void add(V x) {
    const V grown = next + x;
    next = other;
    other = grown;
  }
  FMK_LAMBDA typename V::Elem total() const { return reduce_add(next + other); }
};

// The shards that `rows` rows of `features` elements are worth.
FMK_INLINE int64_t shards_of(int64_t rows, int64_t features, int64_t threads) {
  constexpr int64_t kGrain = 32768;
  return max_of<int64_t>(1, min_of(min_of(threads, rows), rows * features / kGrain));
}

// buffer[i] = what is normalised, in the compute type; also kept in p.sum.
template <class T>
FMK_NOINLINE void add_residual(const NormForward& p, int64_t row, Acc<T>* buffer) {
  using V = Vec<T>;
  const int64_t n = p.features, at = row * n;
  const bool drop = p.dropout.threshold != 0;
  const auto* input = static_cast<const T*>(p.input) + at;
  const auto* residual = static_cast<const T*>(p.residual) + at;
  T* sum = p.sum ? static_cast<T*>(p.sum) + at : nullptr;
  if (drop) dropout_factors(p.dropout, row, 0, n, buffer);
  for_vectors<V>(n, [&](int64_t i, int lanes) FMK_LAMBDA {
    V s = load_lanes(input + i, lanes);
    if (drop) s = s * load_lanes(buffer + i, lanes);
    s = rounded<T>(s + load_lanes(residual + i, lanes));
    if (sum) store_lanes(sum + i, s, lanes);
    store_lanes(buffer + i, s, lanes);
  });
}

// Several rows side by side, x[0] and each next one ld further on: the sums of a row end in a chain
// of dependent steps, behind which the other rows' work fits. X: T, or the compute type where rows
// went through a buffer.
template <class T, int R, class X>
FMK_NOINLINE void normalise_rows(const NormForward& p, int64_t row, const X* x, int64_t ld) {
  using V = Vec<T>;
  using A = Acc<T>;
  const int64_t n = p.features;
  const auto* weight = static_cast<const T*>(p.weight);
  const auto* bias = static_cast<const T*>(p.bias);
  auto* output = static_cast<T*>(p.output) + row * n;
  const A count = static_cast<A>(n);
  A mean[R] = {}, rstd[R];
  const auto value = [&](int r, int64_t i, int lanes)
                         FMK_LAMBDA { return load_lanes(x + r * ld + i, lanes); };
  if (!p.rms) {
    sums_of<V, R>(n, value, mean);
    FMK_FOR (r, R) mean[r] /= count;
  }
  V center[R], scale[R];
  FMK_FOR (r, R) center[r] = splat(mean[r]);
  // Squares of deviations: the difference of two means would cancel.
  const auto square = [&](int r, int64_t i, int lanes) FMK_LAMBDA {
    const V deviation = value(r, i, lanes) - center[r];
    return deviation * deviation;
  };
  sums_of<V, R>(n, square, rstd);
  FMK_FOR (r, R) {
    rstd[r] = A(1) / square_root(rstd[r] / count + static_cast<A>(p.eps));
    scale[r] = splat(rstd[r]);
  }
  const auto finish = [&](const auto& affine) FMK_LAMBDA {
    for_vectors<V>(n, [&](int64_t i, int lanes) FMK_LAMBDA {
      FMK_FOR (r, R)
        store_lanes(output + r * n + i,
                    affine((value(r, i, lanes) - center[r]) * scale[r], i, lanes), lanes);
    });
  };
  if (weight && bias)
    finish([&](V y, int64_t i, int lanes) FMK_LAMBDA {
      return fma(y, load_lanes(weight + i, lanes), load_lanes(bias + i, lanes));
    });
  else if (weight)
    finish([&](V y, int64_t i, int lanes) FMK_LAMBDA { return y * load_lanes(weight + i, lanes); });
  else
    finish([&](V y, int64_t i, int lanes)
               FMK_LAMBDA { return bias ? y + load_lanes(bias + i, lanes) : y; });
  FMK_FOR (r, R) {
    if (p.mean) static_cast<A*>(p.mean)[row + r] = mean[r];
    if (p.rstd) static_cast<A*>(p.rstd)[row + r] = rstd[r];
  }
}

constexpr int kRowsAtOnce = 2;

template <class T>
void forward_typed(const NormForward& p, const Parallel& pool) {
  const int64_t shards = shards_of(p.rows, p.features, pool.threads);
  parallel_for(pool, shards, [&](int64_t shard) {
    Acc<T>* buffer = nullptr;
    if (p.residual)
      buffer = static_cast<Acc<T>*>(scratch_bytes(Scratch::kRows, p.features * sizeof(Acc<T>)));
    const int64_t n = p.features, end = p.rows * (shard + 1) / shards;
    int64_t row = p.rows * shard / shards;
    if (buffer) {
      for (; row < end; ++row) {
        add_residual<T>(p, row, buffer);
        normalise_rows<T, 1>(p, row, static_cast<const Acc<T>*>(buffer), n);
      }
      return;
    }
    const T* input = static_cast<const T*>(p.input);
    for (; row + kRowsAtOnce <= end; row += kRowsAtOnce)
      normalise_rows<T, kRowsAtOnce>(p, row, input + row * n, n);
    for (; row < end; ++row) normalise_rows<T, 1>(p, row, input + row * n, n);
  });
}

// Gradient of one row; grad * normalised and grad are added to the parameters' sums.
template <class T>
FMK_NOINLINE void backward_row(const NormBackward& p, int64_t row, Acc<T>* normalised,
                               Acc<T>* scaled, Acc<T>* weight_sums, Acc<T>* bias_sums) {
  using V = Vec<T>;
  using A = Acc<T>;
  const int64_t n = p.features, at = row * n;
  const auto* grad = static_cast<const T*>(p.grad_output) + at;
  const auto* s = static_cast<const T*>(p.sum) + at;
  const auto* weight = static_cast<const T*>(p.weight);
  const V mean = splat(p.rms ? A(0) : static_cast<const A*>(p.mean)[row]);
  const V rstd = splat(static_cast<const A*>(p.rstd)[row]);
  Sum<V> products, plains;
  for_vectors<V>(n, [&](int64_t i, int lanes) FMK_LAMBDA {
    const V g = load_lanes(grad + i, lanes);
    const V x = (load_lanes(s + i, lanes) - mean) * rstd;
    if (weight_sums)
      store_lanes(weight_sums + i, fma(g, x, load_lanes(weight_sums + i, lanes)), lanes);
    if (bias_sums) store_lanes(bias_sums + i, g + load_lanes(bias_sums + i, lanes), lanes);
    const V w = weight ? g * load_lanes(weight + i, lanes) : g;
    store_lanes(normalised + i, x, lanes);
    store_lanes(scaled + i, w, lanes);
    // Lanes past the end have w = 0, for g is 0 there; but x may be anything.
    products.add(lanes == V::W ? w * x : w * load_lanes(normalised + i, lanes));
    plains.add(w);
  });
  if (!p.grad_input && !p.grad_residual) return;
  const A count = static_cast<A>(n);
  const V along = splat(products.total() / count);
  const V offset = splat(p.rms ? A(0) : plains.total() / count);
  const T* grad_sum = p.grad_sum ? static_cast<const T*>(p.grad_sum) + at : nullptr;
  T* grad_input = p.grad_input ? static_cast<T*>(p.grad_input) + at : nullptr;
  T* grad_residual = p.grad_residual ? static_cast<T*>(p.grad_residual) + at : nullptr;
  for_vectors<V>(n, [&](int64_t i, int lanes) FMK_LAMBDA {
    V g = fnma(load_lanes(normalised + i, lanes), along, load_lanes(scaled + i, lanes) - offset) *
          rstd;
    if (grad_sum) g = g + load_lanes(grad_sum + i, lanes);
    store_lanes(normalised + i, g, lanes);
    if (grad_residual) store_lanes(grad_residual + i, g, lanes);
    if (grad_input && !p.dropout.threshold) store_lanes(grad_input + i, g, lanes);
  });
  if (!grad_input || !p.dropout.threshold) return;
  dropout_factors(p.dropout, row, 0, n, scaled);
  for_vectors<V>(n, [&](int64_t i, int lanes) FMK_LAMBDA {
    store_lanes(grad_input + i, load_lanes(normalised + i, lanes) * load_lanes(scaled + i, lanes),
                lanes);
  });
}

template <class T>
void backward_typed(const NormBackward& p, const Parallel& pool) {
  using A = Acc<T>;
  const int64_t n = p.features;
  // The parameters' gradients are sums over rows. Each block of rows has its own partial sums, so
  // that neither rounding nor the result depends on the number of threads.
  const int64_t block_rows = max_of<int64_t>(64, ceil_div(p.rows, 512));
  const int64_t blocks = ceil_div(p.rows, block_rows);
  const int64_t kinds = (p.grad_weight ? 1 : 0) + (p.grad_bias ? 1 : 0);
  A* partial = nullptr;
  if (kinds)
    partial = static_cast<A*>(
        scratch_bytes(Scratch::kCall, max_of<int64_t>(1, kinds * blocks * n) * sizeof(A)));
  A* weight_sums = p.grad_weight ? partial : nullptr;
  A* bias_sums = p.grad_bias ? partial + (kinds - 1) * blocks * n : nullptr;
  const int64_t shards = min_of(blocks, shards_of(p.rows, n, pool.threads));
  parallel_for(pool, shards, [&](int64_t shard) {
    auto* rows = static_cast<A*>(scratch_bytes(Scratch::kRows, 2 * n * sizeof(A)));
    for (int64_t block = blocks * shard / shards; block < blocks * (shard + 1) / shards; ++block) {
      A* of_weight = weight_sums ? weight_sums + block * n : nullptr;
      A* of_bias = bias_sums ? bias_sums + block * n : nullptr;
      for (int64_t i = 0; i < n; ++i) {
        if (of_weight) of_weight[i] = 0;
        if (of_bias) of_bias[i] = 0;
      }
      const int64_t end = min_of(p.rows, (block + 1) * block_rows);
      for (int64_t row = block * block_rows; row < end; ++row)
        backward_row<T>(p, row, rows, rows + n, of_weight, of_bias);
    }
  });
  if (weight_sums) column_sums(weight_sums, n, blocks, n, static_cast<T*>(p.grad_weight), pool);
  if (bias_sums) column_sums(bias_sums, n, blocks, n, static_cast<T*>(p.grad_bias), pool);
}

void forward(const NormForward& p, const Parallel& pool) {
  with_type(p.dtype,
            [&](auto* type) { forward_typed<std::remove_pointer_t<decltype(type)>>(p, pool); });
}

void backward(const NormBackward& p, const Parallel& pool) {
  with_type(p.dtype,
            [&](auto* type) { backward_typed<std::remove_pointer_t<decltype(type)>>(p, pool); });
}

}  // namespace

const NormKernels& norm_kernels() {
  static constexpr NormKernels table{&forward, &backward};
  return table;
}

}  // namespace fmk::FMK_ISA
