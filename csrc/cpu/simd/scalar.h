// Portable C++ on 16-byte GCC/Clang vectors: what the compiler's baseline offers (SSE2 on x86-64,
// NEON on aarch64, plain scalar code elsewhere). The reference for the other instruction sets, and
// the path for machines without them. Included by simd.h only.
#pragma once

#include <cmath>

#define FMK_BF16_DOT 0

namespace fmk::FMK_ISA {

typedef float Floats __attribute__((vector_size(16)));
typedef double Doubles __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef int64_t Longs __attribute__((vector_size(16)));

struct VecF {
  static constexpr int W = 4;
  using Elem = float;
  Floats v;
};
struct VecD {
  static constexpr int W = 2;
  using Elem = double;
  Doubles v;
};

FMK_INLINE VecF splat(float x) { return {Floats{x, x, x, x}}; }
FMK_INLINE VecD splat(double x) { return {Doubles{x, x}}; }

FMK_INLINE float half_to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  uint32_t bits;
  if (magnitude >= 0x7c00) {
    bits = 0x7f800000 | ((magnitude & 0x3ff) << 13) | (magnitude > 0x7c00 ? 0x400000 : 0);
  } else if (magnitude >= 0x400) {
    bits = (magnitude << 13) + 0x38000000;
  } else {
    const float value =
        static_cast<float>(magnitude) * 0x1p-24f;  // subnormal: an exact multiple of 2^-24
    std::memcpy(&bits, &value, 4);
  }
  bits |= sign;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
FMK_INLINE f16 float_to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return f16{static_cast<uint16_t>(sign | 0x7e00)};
  if (bits >= 0x477ff000)
    return f16{static_cast<uint16_t>(sign | 0x7c00)};  // rounds to 2^16 or more
  if (bits < 0x38800000) {  // below 2^-14: adding 0.5 leaves the rounded multiple of 2^-24 in the
                            // low mantissa bits
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return f16{static_cast<uint16_t>(sign | (bits - 0x3f000000))};
  }
  return f16{
      static_cast<uint16_t>(sign | ((bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13))};
}

FMK_INLINE float as_float(float x) { return x; }
FMK_INLINE float as_float(bf16 x) { return to_float(x); }
FMK_INLINE float as_float(f16 x) { return half_to_float(x); }
FMK_INLINE void assign(float& to, float x) { to = x; }
FMK_INLINE void assign(bf16& to, float x) { to = to_bf16(x); }
FMK_INLINE void assign(f16& to, float x) { to = float_to_half(x); }

FMK_INLINE VecF load(const float* p) {
  VecF x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
FMK_INLINE VecD load(const double* p) {
  VecD x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
FMK_INLINE VecF load(const bf16* p) {
  return {Floats{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}
FMK_INLINE VecF load(const f16* p) {
  return {
      Floats{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])}};
}
template <class T>
FMK_INLINE VecF load(const T* p, int n) {
  VecF x{};
  for (int i = 0; i < n; ++i) x.v[i] = as_float(p[i]);
  return x;
}
FMK_INLINE VecD load(const double* p, int n) {
  VecD x{};
  for (int i = 0; i < n; ++i) x.v[i] = p[i];
  return x;
}
template <class T>
FMK_INLINE void store(T* p, VecF x, int n) {
  for (int i = 0; i < n; ++i) assign(p[i], x.v[i]);
}
FMK_INLINE void store(double* p, VecD x, int n) {
  for (int i = 0; i < n; ++i) p[i] = x.v[i];
}
template <class T>
FMK_INLINE void store(T* p, VecF x) {
  store(p, x, VecF::W);
}
FMK_INLINE void store(float* p, VecF x) { std::memcpy(p, &x, sizeof x); }
FMK_INLINE void store(double* p, VecD x) { std::memcpy(p, &x, sizeof x); }

FMK_INLINE VecF operator+(VecF a, VecF b) { return {a.v + b.v}; }
FMK_INLINE VecF operator-(VecF a, VecF b) { return {a.v - b.v}; }
FMK_INLINE VecF operator*(VecF a, VecF b) { return {a.v * b.v}; }
FMK_INLINE VecF operator/(VecF a, VecF b) { return {a.v / b.v}; }
FMK_INLINE VecD operator+(VecD a, VecD b) { return {a.v + b.v}; }
FMK_INLINE VecD operator-(VecD a, VecD b) { return {a.v - b.v}; }
FMK_INLINE VecD operator*(VecD a, VecD b) { return {a.v * b.v}; }
FMK_INLINE VecD operator/(VecD a, VecD b) { return {a.v / b.v}; }
template <class V>
FMK_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}
template <class V>
FMK_INLINE V fnma(V a, V b, V c) {
  return c - a * b;
}
FMK_INLINE Ints less(VecF a, VecF b) { return a.v < b.v; }
FMK_INLINE Longs less(VecD a, VecD b) { return a.v < b.v; }
FMK_INLINE Ints is_nan(VecF a) { return a.v != a.v; }
FMK_INLINE Longs is_nan(VecD a) { return a.v != a.v; }
FMK_INLINE VecF select(Ints m, VecF a, VecF b) {
  return {(Floats)((m & (Ints)a.v) | (~m & (Ints)b.v))};
}
FMK_INLINE VecD select(Longs m, VecD a, VecD b) {
  return {(Doubles)((m & (Longs)a.v) | (~m & (Longs)b.v))};
}
template <class V>
FMK_INLINE V max(V a, V b) {
  return select(less(b, a), a, b);
}
template <class V>
FMK_INLINE V min(V a, V b) {
  return select(less(a, b), a, b);
}
FMK_INLINE VecF abs(VecF a) { return {(Floats)((Ints)a.v & 0x7fffffff)}; }
FMK_INLINE VecD abs(VecD a) { return {(Doubles)((Longs)a.v & 0x7fffffffffffffff)}; }
FMK_INLINE VecF copy_sign(VecF magnitude, VecF sign) {
  return {(Floats)(((Ints)magnitude.v & 0x7fffffff) | ((Ints)sign.v & ~0x7fffffff))};
}
FMK_INLINE VecD copy_sign(VecD magnitude, VecD sign) {
  constexpr int64_t kMagnitude = 0x7fffffffffffffff;
  return {(Doubles)(((Longs)magnitude.v & kMagnitude) | ((Longs)sign.v & ~kMagnitude))};
}
FMK_INLINE VecF round(VecF a) {
  for (int i = 0; i < VecF::W; ++i) a.v[i] = std::nearbyint(a.v[i]);
  return a;
}
struct WholeAndFraction {
  VecF whole, fraction;
};
FMK_INLINE WholeAndFraction split(VecF x) {
  x = max(splat(-160.0f), x);  // whose power of two is 0; keeps NaN
  VecF whole;
  for (int i = 0; i < VecF::W; ++i) whole.v[i] = std::floor(x.v[i]);
  return {whole, x - whole};
}
FMK_INLINE VecF scale2(VecF p, VecF n) {
  for (int i = 0; i < VecF::W; ++i) p.v[i] = std::ldexp(p.v[i], static_cast<int>(n.v[i]));
  return p;
}
template <class V>
FMK_INLINE typename V::Elem reduce_add(V a) {
  typename V::Elem sum = 0;
  for (int i = 0; i < V::W; ++i) sum += a.v[i];
  return sum;
}
template <class V>
FMK_INLINE typename V::Elem reduce_max(V a) {
  typename V::Elem largest = a.v[0];
  for (int i = 1; i < V::W; ++i) largest = a.v[i] > largest ? a.v[i] : largest;
  return largest;
}
FMK_INLINE VecF pin(VecF a) { return a; }
FMK_INLINE VecD pin(VecD a) { return a; }

}  // namespace fmk::FMK_ISA
