// Helpers shared by the families' forward and backward passes: type dispatch, widened parameters,
// column sums, and the elementwise step from the gradient of an output to that of its
// pre-activation.
#pragma once

#include "core/parallel.h"
#include "core/scratch.h"
#include "cpu/vmath.h"

namespace fmk::FMK_ISA {

// Calls body with a null pointer of the storage type: with_type(dtype, [&](auto* type) {
// run<T>(...); }) where using T = std::remove_pointer_t<decltype(type)>.
template <class Body>
FMK_INLINE void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kF32: return body(static_cast<float*>(nullptr));
    case DType::kBF16: return body(static_cast<bf16*>(nullptr));
    case DType::kF16: return body(static_cast<f16*>(nullptr));
    case DType::kF64: return body(static_cast<double*>(nullptr));
  }
}

// to[i] = from[i] widened for i < n, then `fill` up to `padded`.
template <class T>
FMK_INLINE void widen_padded(const T* from, int64_t n, int64_t padded, Acc<T> fill, Acc<T>* to) {
  if (from) convert(from, to, n);
  for (int64_t i = from ? n : 0; i < padded; ++i) to[i] = fill;
}

// sums[column] = sum over rows of x[row][column], added in the compute type, rows in order: columns
// are what is shared out, so the result does not depend on the number of threads.
template <class T, class Out>
FMK_NOINLINE void column_sums(const T* x, int64_t ld, int64_t rows, int64_t columns, Out* sums,
                              const Parallel& pool) {
  using V = Vec<T>;
  constexpr int64_t kBlock = 4 * V::W;
  const int64_t blocks = ceil_div(columns, kBlock);
  const int64_t shards = rows * columns < 65536 ? 1 : min_of<int64_t>(pool.threads, blocks);
  parallel_for(pool, shards, [&](int64_t shard) {
    for (int64_t block = blocks * shard / shards; block < blocks * (shard + 1) / shards; ++block) {
      const int64_t first = block * kBlock;
      // Partial sums over runs of rows keep the rounding error from growing with the number of
      // rows.
      V total[4] = {zero<V>(), zero<V>(), zero<V>(), zero<V>()};
      for (int64_t run = 0; run < rows; run += 256) {
        V sum[4] = {zero<V>(), zero<V>(), zero<V>(), zero<V>()};
        for (int64_t row = run; row < min_of(rows, run + 256); ++row)
          for (int j = 0; j < 4; ++j) {
            const int64_t left = columns - first - j * V::W;
            const T* p = x + row * ld + first + j * V::W;
            if (left >= V::W)
              sum[j] = sum[j] + load(p);
            else if (left > 0)
              sum[j] = sum[j] + load(p, static_cast<int>(left));
          }
        for (int j = 0; j < 4; ++j) total[j] = total[j] + sum[j];
      }
      for (int j = 0; j < 4; ++j) {
        const int64_t left = columns - first - j * V::W;
        if (left > 0)
          store(sums + first + j * V::W, total[j], static_cast<int>(min_of<int64_t>(V::W, left)));
      }
    }
  });
}

// grad_z = grad_y * activation'(z), n elements. `saved` is z, or y itself for relu, whose
// derivative it tells as well.
template <class T>
FMK_NOINLINE void activation_backward(Activation activation, const T* grad_y, const T* saved,
                                      int64_t n, T* grad_z, const Parallel& pool) {
  using V = Vec<T>;
  constexpr int64_t kGrain = 16384;
  const int64_t shards = max_of<int64_t>(1, min_of<int64_t>(pool.threads, n / kGrain));
  parallel_for(pool, shards, [&](int64_t shard) {
    const int64_t blocks = ceil_div(n, V::W), end = min_of(n, blocks * (shard + 1) / shards * V::W);
    for (int64_t i = blocks * shard / shards * V::W; i < end; i += V::W) {
      if (i + V::W <= end) {
        store(grad_z + i, load(grad_y + i) * activate_grad(activation, load(saved + i)));
      } else {
        const int lanes = static_cast<int>(end - i);
        store(grad_z + i,
              load(grad_y + i, lanes) * activate_grad(activation, load(saved + i, lanes)), lanes);
      }
    }
  });
}

}  // namespace fmk::FMK_ISA
