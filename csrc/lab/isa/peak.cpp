#include "lab/peak.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fmk::FMK_ISA {
namespace {

// Independent accumulators: enough to cover latency x throughput of the instruction (8 to 12 on
// today's cores), and few enough to stay in registers beside the two operands (32 vector registers
// with AVX-512, 16 without).
#if defined(__AVX512F__)
constexpr int kAccumulators = 16;
#else
constexpr int kAccumulators = 12;
#endif

#if defined(__AVX512F__)
using F32 = __m512;
using F64 = __m512d;
F32 multiply_add(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
F64 multiply_add(F64 a, F64 b, F64 c) { return _mm512_fmadd_pd(a, b, c); }
#elif defined(__AVX2__)
using F32 = __m256;
using F64 = __m256d;
F32 multiply_add(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
F64 multiply_add(F64 a, F64 b, F64 c) { return _mm256_fmadd_pd(a, b, c); }
#else
// The baseline's own vectors; it has no fused multiply-add.
typedef float F32 __attribute__((vector_size(16)));
typedef double F64 __attribute__((vector_size(16)));
F32 multiply_add(F32 a, F32 b, F32 c) { return a * b + c; }
F64 multiply_add(F64 a, F64 b, F64 c) { return a * b + c; }
#endif

template <class Vector, class Scalar>
Scalar multiply_add_rounds(int64_t rounds, double* flops) {
  constexpr int kLanes = sizeof(Vector) / sizeof(Scalar);
  Vector sums[kAccumulators];
  for (int i = 0; i < kAccumulators; ++i) sums[i] = Vector{} + Scalar(i);
  // x <- x * factor + term tends to 1: neither infinite nor denormal, however long it runs.
  const Vector factor = Vector{} + Scalar(0.5), term = Vector{} + Scalar(0.5);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 16
    for (int i = 0; i < kAccumulators; ++i) sums[i] = multiply_add(sums[i], factor, term);
  }
  *flops = 2.0 * kLanes * kAccumulators * double(rounds);
  Vector total = sums[0];
  for (int i = 1; i < kAccumulators; ++i) total += sums[i];
  Scalar result = 0;
  for (int lane = 0; lane < kLanes; ++lane) result += total[lane];
  return result;
}

float fma_f32(int64_t rounds, double* flops) {
  return multiply_add_rounds<F32, float>(rounds, flops);
}
double fma_f64(int64_t rounds, double* flops) {
  return multiply_add_rounds<F64, double>(rounds, flops);
}

#if defined(__AVX512BF16__) && !defined(FMK_EMULATE_BF16)
float fma_bf16(int64_t rounds, double* flops) {
  __m512 sums[kAccumulators];
  for (int i = 0; i < kAccumulators; ++i) sums[i] = _mm512_set1_ps(float(i));
  const __m512bh ones = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1.0f), _mm512_set1_ps(1.0f));
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 16
    for (int i = 0; i < kAccumulators; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], ones, ones);
  }
  *flops = 2.0 * 32 * kAccumulators * double(rounds);
  __m512 total = sums[0];
  for (int i = 1; i < kAccumulators; ++i) total = _mm512_add_ps(total, sums[i]);
  return _mm512_reduce_add_ps(total);
}
#endif

uint64_t read(const void* data, int64_t bytes) {
  typedef uint64_t Line __attribute__((vector_size(64)));
  const Line* lines = static_cast<const Line*>(data);
  Line a{}, b{}, c{}, d{};
  for (int64_t i = 0; i < bytes / int64_t(sizeof(Line)); i += 4) {
    a ^= lines[i];
    b ^= lines[i + 1];
    c ^= lines[i + 2];
    d ^= lines[i + 3];
  }
  const Line all = (a ^ b) ^ (c ^ d);
  uint64_t result = 0;
  for (int i = 0; i < 8; ++i) result ^= all[i];
  return result;
}

}  // namespace

const PeakKernels& peak_kernels() {
#if defined(__AVX512BF16__) && !defined(FMK_EMULATE_BF16)
  static constexpr PeakKernels table{&fma_f32, &fma_f64, &fma_bf16, &read};
#else
  static constexpr PeakKernels table{&fma_f32, &fma_f64, nullptr, &read};
#endif
  return table;
}

}  // namespace fmk::FMK_ISA
