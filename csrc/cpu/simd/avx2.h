// AVX2 with FMA and F16C. Included by simd.h only.
#pragma once

#include <immintrin.h>

#define FMK_BF16_DOT 0

namespace fmk::FMK_ISA {

struct VecF {
  static constexpr int W = 8;
  using Elem = float;
  __m256 v;
};
struct VecD {
  static constexpr int W = 4;
  using Elem = double;
  __m256d v;
};

FMK_INLINE VecF splat(float x) { return {_mm256_set1_ps(x)}; }
FMK_INLINE VecD splat(double x) { return {_mm256_set1_pd(x)}; }

FMK_INLINE __m256i lanes8(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FMK_INLINE __m256i lanes4(int n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
FMK_INLINE VecF widen_bf16(__m128i bits) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
// The first n halves of p, the rest zero.
FMK_INLINE __m128i load_halves(const void* p, int n) {
  alignas(16) uint16_t halves[8] = {};
  std::memcpy(halves, p, 2 * n);
  return _mm_load_si128(reinterpret_cast<const __m128i*>(halves));
}
FMK_INLINE VecF load(const float* p) { return {_mm256_loadu_ps(p)}; }
FMK_INLINE VecD load(const double* p) { return {_mm256_loadu_pd(p)}; }
FMK_INLINE VecF load(const bf16* p) {
  return widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
FMK_INLINE VecF load(const f16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
FMK_INLINE VecF load(const float* p, int n) { return {_mm256_maskload_ps(p, lanes8(n))}; }
FMK_INLINE VecD load(const double* p, int n) { return {_mm256_maskload_pd(p, lanes4(n))}; }
FMK_INLINE VecF load(const bf16* p, int n) { return widen_bf16(load_halves(p, n)); }
FMK_INLINE VecF load(const f16* p, int n) { return {_mm256_cvtph_ps(load_halves(p, n))}; }

FMK_INLINE __m128i narrow_bf16(VecF x) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
FMK_INLINE __m128i narrow_f16(VecF x) {
  return _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FMK_INLINE void store_halves(void* p, __m128i x, int n) {
  alignas(16) uint16_t halves[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(halves), x);
  std::memcpy(p, halves, 2 * n);
}
FMK_INLINE void store(float* p, VecF x) { _mm256_storeu_ps(p, x.v); }
FMK_INLINE void store(double* p, VecD x) { _mm256_storeu_pd(p, x.v); }
FMK_INLINE void store(bf16* p, VecF x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(x));
}
FMK_INLINE void store(f16* p, VecF x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_f16(x));
}
FMK_INLINE void store(float* p, VecF x, int n) { _mm256_maskstore_ps(p, lanes8(n), x.v); }
FMK_INLINE void store(double* p, VecD x, int n) { _mm256_maskstore_pd(p, lanes4(n), x.v); }
FMK_INLINE void store(bf16* p, VecF x, int n) { store_halves(p, narrow_bf16(x), n); }
FMK_INLINE void store(f16* p, VecF x, int n) { store_halves(p, narrow_f16(x), n); }

FMK_INLINE VecF operator+(VecF a, VecF b) { return {_mm256_add_ps(a.v, b.v)}; }
FMK_INLINE VecF operator-(VecF a, VecF b) { return {_mm256_sub_ps(a.v, b.v)}; }
FMK_INLINE VecF operator*(VecF a, VecF b) { return {_mm256_mul_ps(a.v, b.v)}; }
FMK_INLINE VecF operator/(VecF a, VecF b) { return {_mm256_div_ps(a.v, b.v)}; }
FMK_INLINE VecD operator+(VecD a, VecD b) { return {_mm256_add_pd(a.v, b.v)}; }
FMK_INLINE VecD operator-(VecD a, VecD b) { return {_mm256_sub_pd(a.v, b.v)}; }
FMK_INLINE VecD operator*(VecD a, VecD b) { return {_mm256_mul_pd(a.v, b.v)}; }
FMK_INLINE VecD operator/(VecD a, VecD b) { return {_mm256_div_pd(a.v, b.v)}; }
FMK_INLINE VecF fma(VecF a, VecF b, VecF c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
FMK_INLINE VecD fma(VecD a, VecD b, VecD c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
FMK_INLINE VecF fnma(VecF a, VecF b, VecF c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
FMK_INLINE VecD fnma(VecD a, VecD b, VecD c) { return {_mm256_fnmadd_pd(a.v, b.v, c.v)}; }
FMK_INLINE VecF max(VecF a, VecF b) { return {_mm256_max_ps(a.v, b.v)}; }
FMK_INLINE VecD max(VecD a, VecD b) { return {_mm256_max_pd(a.v, b.v)}; }
FMK_INLINE VecF min(VecF a, VecF b) { return {_mm256_min_ps(a.v, b.v)}; }
FMK_INLINE VecD min(VecD a, VecD b) { return {_mm256_min_pd(a.v, b.v)}; }
FMK_INLINE VecF abs(VecF a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
FMK_INLINE VecD abs(VecD a) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), a.v)}; }

FMK_INLINE __m256 less(VecF a, VecF b) { return _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ); }
FMK_INLINE __m256d less(VecD a, VecD b) { return _mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ); }
FMK_INLINE __m256 is_nan(VecF a) { return _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q); }
FMK_INLINE __m256d is_nan(VecD a) { return _mm256_cmp_pd(a.v, a.v, _CMP_UNORD_Q); }
FMK_INLINE VecF select(__m256 m, VecF a, VecF b) { return {_mm256_blendv_ps(b.v, a.v, m)}; }
FMK_INLINE VecD select(__m256d m, VecD a, VecD b) { return {_mm256_blendv_pd(b.v, a.v, m)}; }
FMK_INLINE VecF copy_sign(VecF magnitude, VecF sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(bit, magnitude.v), _mm256_and_ps(bit, sign.v))};
}
FMK_INLINE VecD copy_sign(VecD magnitude, VecD sign) {
  const __m256d bit = _mm256_set1_pd(-0.0);
  return {_mm256_or_pd(_mm256_andnot_pd(bit, magnitude.v), _mm256_and_pd(bit, sign.v))};
}
FMK_INLINE VecF round(VecF a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
struct WholeAndFraction {
  VecF whole, fraction;
};
FMK_INLINE WholeAndFraction split(VecF x) {
  x = max(splat(-160.0f), x);  // whose power of two is 0; keeps NaN
  const VecF whole{_mm256_floor_ps(x.v)};
  return {whole, x - whole};
}
// Two multiplications by half of 2^n each, so that results in the denormal range and overflow come
// out right.
FMK_INLINE VecF scale2(VecF p, VecF n) {
  const __m256i k = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(k, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256i rest = _mm256_sub_epi32(k, half);
  const __m256 second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(p.v, first), second)};
}
template <class V>
FMK_INLINE typename V::Elem reduce_add(V a) {
  typename V::Elem lanes[V::W], sum = 0;
  store(lanes, a);
  for (int i = 0; i < V::W; ++i) sum += lanes[i];
  return sum;
}
template <class V>
FMK_INLINE typename V::Elem reduce_max(V a) {
  typename V::Elem lanes[V::W];
  store(lanes, a);
  typename V::Elem largest = lanes[0];
  for (int i = 1; i < V::W; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  return largest;
}
FMK_INLINE VecF pin(VecF a) {
  asm("" : "+x"(a.v));
  return a;
}
FMK_INLINE VecD pin(VecD a) {
  asm("" : "+x"(a.v));
  return a;
}

}  // namespace fmk::FMK_ISA
