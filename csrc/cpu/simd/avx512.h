// AVX-512 (F, BW, DQ, VL), and with AVX512_BF16 the pairwise dot product. Included by simd.h only.
#pragma once

#include <immintrin.h>

// -DFMK_EMULATE_BF16 (CXXFLAGS) replaces the two instructions of AVX512_BF16 by AVX-512 arithmetic,
// so that the kernels of that ISA are tested on processors without it. Slow; not for shipping.
#if defined(__AVX512BF16__)
#define FMK_BF16_DOT 1
#else
#define FMK_BF16_DOT 0
#endif

namespace fmk::FMK_ISA {

struct VecF {
  static constexpr int W = 16;
  using Elem = float;
  __m512 v;
};
struct VecD {
  static constexpr int W = 8;
  using Elem = double;
  __m512d v;
};

FMK_INLINE VecF splat(float x) { return {_mm512_set1_ps(x)}; }
FMK_INLINE VecD splat(double x) { return {_mm512_set1_pd(x)}; }

FMK_INLINE __mmask16 lanes16(int n) { return static_cast<__mmask16>((1u << n) - 1); }

FMK_INLINE VecF widen_bf16(__m256i bits) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
FMK_INLINE VecF load(const float* p) { return {_mm512_loadu_ps(p)}; }
FMK_INLINE VecD load(const double* p) { return {_mm512_loadu_pd(p)}; }
FMK_INLINE VecF load(const bf16* p) {
  return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FMK_INLINE VecF load(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
FMK_INLINE VecF load(const float* p, int n) { return {_mm512_maskz_loadu_ps(lanes16(n), p)}; }
FMK_INLINE VecD load(const double* p, int n) {
  return {_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p)};
}
FMK_INLINE VecF load(const bf16* p, int n) {
  return widen_bf16(_mm256_maskz_loadu_epi16(lanes16(n), p));
}
FMK_INLINE VecF load(const f16* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes16(n), p))};
}

FMK_INLINE __m256i narrow_bf16(VecF x) {
#if FMK_BF16_DOT && !defined(FMK_EMULATE_BF16)
  return (__m256i)_mm512_cvtneps_pbh(x.v);
#else
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
}
#if FMK_BF16_DOT
// low's numbers in the lower half.
FMK_INLINE __m512i narrow_bf16(VecF high, VecF low) {
#if defined(FMK_EMULATE_BF16)
  return _mm512_inserti64x4(_mm512_castsi256_si512(narrow_bf16(low)), narrow_bf16(high), 1);
#else
  return (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v);
#endif
}
#endif
FMK_INLINE __m256i narrow_f16(VecF x) {
  return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FMK_INLINE void store(float* p, VecF x) { _mm512_storeu_ps(p, x.v); }
FMK_INLINE void store(double* p, VecD x) { _mm512_storeu_pd(p, x.v); }
FMK_INLINE void store(bf16* p, VecF x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(x));
}
FMK_INLINE void store(f16* p, VecF x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_f16(x));
}
FMK_INLINE void store(float* p, VecF x, int n) { _mm512_mask_storeu_ps(p, lanes16(n), x.v); }
FMK_INLINE void store(double* p, VecD x, int n) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), x.v);
}
FMK_INLINE void store(bf16* p, VecF x, int n) {
  _mm256_mask_storeu_epi16(p, lanes16(n), narrow_bf16(x));
}
FMK_INLINE void store(f16* p, VecF x, int n) {
  _mm256_mask_storeu_epi16(p, lanes16(n), narrow_f16(x));
}

FMK_INLINE VecF operator+(VecF a, VecF b) { return {_mm512_add_ps(a.v, b.v)}; }
FMK_INLINE VecF operator-(VecF a, VecF b) { return {_mm512_sub_ps(a.v, b.v)}; }
FMK_INLINE VecF operator*(VecF a, VecF b) { return {_mm512_mul_ps(a.v, b.v)}; }
FMK_INLINE VecF operator/(VecF a, VecF b) { return {_mm512_div_ps(a.v, b.v)}; }
FMK_INLINE VecD operator+(VecD a, VecD b) { return {_mm512_add_pd(a.v, b.v)}; }
FMK_INLINE VecD operator-(VecD a, VecD b) { return {_mm512_sub_pd(a.v, b.v)}; }
FMK_INLINE VecD operator*(VecD a, VecD b) { return {_mm512_mul_pd(a.v, b.v)}; }
FMK_INLINE VecD operator/(VecD a, VecD b) { return {_mm512_div_pd(a.v, b.v)}; }
FMK_INLINE VecF fma(VecF a, VecF b, VecF c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FMK_INLINE VecD fma(VecD a, VecD b, VecD c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
FMK_INLINE VecF fnma(VecF a, VecF b, VecF c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
FMK_INLINE VecD fnma(VecD a, VecD b, VecD c) { return {_mm512_fnmadd_pd(a.v, b.v, c.v)}; }
FMK_INLINE VecF max(VecF a, VecF b) { return {_mm512_max_ps(a.v, b.v)}; }
FMK_INLINE VecD max(VecD a, VecD b) { return {_mm512_max_pd(a.v, b.v)}; }
FMK_INLINE VecF min(VecF a, VecF b) { return {_mm512_min_ps(a.v, b.v)}; }
FMK_INLINE VecD min(VecD a, VecD b) { return {_mm512_min_pd(a.v, b.v)}; }
FMK_INLINE VecF abs(VecF a) { return {_mm512_abs_ps(a.v)}; }
FMK_INLINE VecD abs(VecD a) { return {_mm512_abs_pd(a.v)}; }

FMK_INLINE __mmask16 less(VecF a, VecF b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
FMK_INLINE __mmask8 less(VecD a, VecD b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ); }
FMK_INLINE __mmask16 is_nan(VecF a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q); }
FMK_INLINE __mmask8 is_nan(VecD a) { return _mm512_cmp_pd_mask(a.v, a.v, _CMP_UNORD_Q); }
FMK_INLINE VecF select(__mmask16 m, VecF a, VecF b) { return {_mm512_mask_blend_ps(m, b.v, a.v)}; }
FMK_INLINE VecD select(__mmask8 m, VecD a, VecD b) { return {_mm512_mask_blend_pd(m, b.v, a.v)}; }
FMK_INLINE VecF copy_sign(VecF magnitude, VecF sign) {
  const __m512 bit = _mm512_set1_ps(-0.0f);
  return {_mm512_or_ps(_mm512_andnot_ps(bit, magnitude.v), _mm512_and_ps(bit, sign.v))};
}
FMK_INLINE VecD copy_sign(VecD magnitude, VecD sign) {
  const __m512d bit = _mm512_set1_pd(-0.0);
  return {_mm512_or_pd(_mm512_andnot_pd(bit, magnitude.v), _mm512_and_pd(bit, sign.v))};
}
FMK_INLINE VecF round(VecF a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
struct WholeAndFraction {
  VecF whole, fraction;
};
// vscalefps rounds its exponent down itself, so `whole` may be x; at -infinity the fraction is 0.
FMK_INLINE WholeAndFraction split(VecF x) {
  return {x, {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}};
}
FMK_INLINE VecF scale2(VecF p, VecF n) { return {_mm512_scalef_ps(p.v, n.v)}; }
FMK_INLINE float reduce_add(VecF a) { return _mm512_reduce_add_ps(a.v); }
FMK_INLINE double reduce_add(VecD a) { return _mm512_reduce_add_pd(a.v); }
// Lane i is the sum of the lanes of a[i]: at each level two vectors become one of half the terms.
FMK_INLINE VecF reduce_add(const VecF (&a)[16]) {
  __m512 pairs[8], fours[4];
  FMK_FOR (i, 8)
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i].v, a[2 * i + 1].v),
                             _mm512_unpackhi_ps(a[2 * i].v, a[2 * i + 1].v));
  FMK_FOR (i, 4) {
    const __m512d x = _mm512_castps_pd(pairs[2 * i]), y = _mm512_castps_pd(pairs[2 * i + 1]);
    fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  const auto add_quarters = [](__m512 x, __m512 y) FMK_LAMBDA {
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
  };
  return {add_quarters(add_quarters(fours[0], fours[1]), add_quarters(fours[2], fours[3]))};
}
FMK_INLINE float reduce_max(VecF a) { return _mm512_reduce_max_ps(a.v); }
FMK_INLINE double reduce_max(VecD a) { return _mm512_reduce_max_pd(a.v); }
FMK_INLINE VecF pin(VecF a) {
  asm("" : "+v"(a.v));
  return a;
}
FMK_INLINE VecD pin(VecD a) {
  asm("" : "+v"(a.v));
  return a;
}

#if FMK_BF16_DOT
// acc[lane] += a[2*lane] * b[2*lane] + a[2*lane+1] * b[2*lane+1], pairs of bf16 in 32-bit lanes.
// Denormal inputs count as zero (vdpbf16ps ignores MXCSR).
FMK_INLINE VecF dot2(VecF acc, VecF a, VecF b) {
#if defined(FMK_EMULATE_BF16)
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const auto odd = [&](VecF x) {
    return _mm512_castsi512_ps(_mm512_and_si512((__m512i)x.v, high));
  };
  const auto even = [](VecF x) { return _mm512_castsi512_ps(_mm512_slli_epi32((__m512i)x.v, 16)); };
  return {_mm512_fmadd_ps(odd(a), odd(b), _mm512_fmadd_ps(even(a), even(b), acc.v))};
#else
  return {_mm512_dpbf16_ps(acc.v, (__m512bh)a.v, (__m512bh)b.v)};
#endif
}
#endif

}  // namespace fmk::FMK_ISA
