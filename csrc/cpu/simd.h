// One vector vocabulary for every kernel; simd/<isa>.h implements it for the instruction set of
// this translation unit.
//
//   VecF, VecD        vectors of float and of double; V::W lanes of V::Elem
//   splat(x), zero<V>()
//   load(p), load(p, n)       from float, double, bf16 or f16 storage; the second form reads n < W
//   elements, rest zero store(p, v), store(p, v, n)   bf16 and f16 round to nearest even and keep
//   NaN
//   + - * /, fma(a,b,c) = a*b + c, fnma(a,b,c) = c - a*b
//   max(a,b), min(a,b)        the second argument if either is NaN, so max(zero, x) is a relu that
//   propagates NaN less(a,b), select(mask, if_true, if_false), abs, copy_sign(magnitude, sign),
//   is_nan round(x), scale2(p, n) = p * 2^n for integral n (gradual underflow, overflow to
//   infinity) reduce_add, reduce_max pin(v)            keeps a loaded vector in a register: GCC 12
//   may otherwise repeat the load as a memory operand of
//                     every FMA that uses it, which makes the tile load-bound
//   split(x)          x as {whole, fraction in [0, 1)}, for scale2(2^fraction, whole): 2^-infinity
//                     comes out as 0
//
// Everything here is static and always inlined: no symbol of one instruction set can be linked into
// another's code.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/types.h"

#define FMK_INLINE static inline __attribute__((always_inline))
#define FMK_LAMBDA __attribute__((always_inline))
#define FMK_NOINLINE static __attribute__((noinline))
// for (i = 0 .. count - 1), unrolled: loops over a tile's registers, which must not stay loops.
#define FMK_FOR(i, count) _Pragma("GCC unroll 32") for (int i = 0; i < (count); ++i)

namespace fmk::FMK_ISA {

template <class T>
FMK_INLINE T min_of(T a, T b) {
  return a < b ? a : b;
}
template <class T>
FMK_INLINE T max_of(T a, T b) {
  return a < b ? b : a;
}
FMK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class V>
FMK_INLINE V zero() {
  return V{};
}

// Scalar conversions, used by the tails and by the ISAs without conversion instructions.
FMK_INLINE float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
FMK_INLINE bf16 to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return bf16{0x7fc0};
  return bf16{static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

}  // namespace fmk::FMK_ISA

#if defined(__AVX512F__)
#include "cpu/simd/avx512.h"
#elif defined(__AVX2__)
#include "cpu/simd/avx2.h"
#else
#include "cpu/simd/scalar.h"
#endif

namespace fmk::FMK_ISA {

// The vector a storage type is computed in: float for float, bf16 and f16, double for double.
template <class T>
struct ComputeOf {
  using Vec = VecF;
};
template <>
struct ComputeOf<double> {
  using Vec = VecD;
};
template <class T>
using Vec = typename ComputeOf<T>::Vec;
template <class T>
using Acc = typename Vec<T>::Elem;

// The first `lanes` elements, or a whole vector by the quicker form.
template <class T>
FMK_INLINE Vec<T> load_lanes(const T* p, int lanes) {
  return lanes == Vec<T>::W ? load(p) : load(p, lanes);
}
template <class T, class V>
FMK_INLINE void store_lanes(T* p, V x, int lanes) {
  if (lanes == V::W)
    store(p, x);
  else
    store(p, x, lanes);
}

// One element as its compute type.
FMK_INLINE float widen(float x) { return x; }
FMK_INLINE double widen(double x) { return x; }
FMK_INLINE float widen(bf16 x) { return to_float(x); }
FMK_INLINE float widen(f16 x) {
  float lanes[VecF::W];
  store(lanes, load(&x, 1));
  return lanes[0];
}
FMK_INLINE void narrow(float* p, float x) { *p = x; }
FMK_INLINE void narrow(double* p, double x) { *p = x; }
FMK_INLINE void narrow(bf16* p, float x) { *p = to_bf16(x); }
FMK_INLINE void narrow(f16* p, float x) { store(p, splat(x), 1); }

// dst[i] = convert(src[i]) between any two storage types of one compute type.
template <class From, class To>
FMK_INLINE void convert(const From* src, To* dst, int64_t n) {
  constexpr int W = Vec<From>::W;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(dst + i, load(src + i));
  if (i < n) store(dst + i, load(src + i, static_cast<int>(n - i)), static_cast<int>(n - i));
}

}  // namespace fmk::FMK_ISA
