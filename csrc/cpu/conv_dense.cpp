#include "cpu/conv_dense.h"

namespace fmk::FMK_ISA {

template <class T>
bool correlate_dense(const Correlation<T>& p, const Parallel& pool) {
  if constexpr (kFusedEpilogue<T>) {
    constexpr int64_t kFewPixels = 1024;
    const int64_t rows = p.batch * p.placed_pixels();
    const bool pointwise = p.row_taps() == 1 && p.x.taps == 1 && p.z.stride == 1 &&
                           p.y.stride == 1 && p.x.stride == 1 && p.z.offset == 0 &&
                           p.y.offset == 0 && p.x.offset == 0;
    if (!pointwise || !p.channels_last || p.turns || p.groups > 1 || !p.in_order() ||
        p.placed_pixels() != p.z.in_size * p.y.in_size * p.x.in_size || p.pool.kernel_h ||
        p.moments.wanted() || p.channels % Mac<T>::kPair != 0 || rows < kFewPixels)
      return false;
    // Outputs that are wider than the inputs cost more than the reduction in float: the strips of
    // correlate() write them in whole pixels and ask for their lines ahead.
    if (Mac<T>::kPair == 1 && p.out_channels > p.channels) return false;
    GemmProblem<T> product;
    product.m = rows;
    product.n = p.out_channels;
    product.k = p.channels;
    product.a = p.input;
    product.lda = p.channels;
    product.packed_b = static_cast<const Word<T>*>(p.weight);
    product.epilogue.out = p.output;
    product.epilogue.ld_out = product.epilogue.ld_residual = p.out_channels;
    product.epilogue.scale = p.scale;
    product.epilogue.shift = p.shift;
    product.epilogue.residual = p.residual;
    product.epilogue.preactivation = p.preactivation;
    product.epilogue.activation = p.activation;
    gemm(product, pool);
    return true;
  }
  return false;
}

template bool correlate_dense(const Correlation<float>&, const Parallel&);
template bool correlate_dense(const Correlation<bf16>&, const Parallel&);
template bool correlate_dense(const Correlation<f16>&, const Parallel&);
template bool correlate_dense(const Correlation<double>&, const Parallel&);

}  // namespace fmk::FMK_ISA
