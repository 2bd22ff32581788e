// Elementary functions on vectors, and the activations built from them.
//
// float: bounds in ulp against the correctly rounded result, scanned by tests/test_vmath.py on
// every instruction set:
//   exp      2 ulp     (gradual underflow; overflow to infinity; NaN stays)
//   exp2_nonpositive   3 ulp
//   expm1    2 ulp
//   tanh     3 ulp     (exact sign, +-1 from |x| > 9.02)
//   sigmoid  4 ulp     for x > -87; below, absolute error < 2e-38
//   erf      3 ulp
//   gelu     |error| <= 4e-7 * max(|x|, tiny): the usual 0.5 x (1 + erf(x / sqrt 2)), whose
//   negative tail cancels
// double: the C library, lane by lane. The double path exists for gradient checks, not for speed.
//
// The polynomials are minimax fits (Lawson's iteration on Chebyshev nodes); each states its own
// approximation error.
#pragma once

#include <cmath>

#include "cpu/simd.h"

namespace fmk::FMK_ISA {

template <class F>
FMK_INLINE VecD by_lane(VecD x, const F& function) {
  double lanes[VecD::W];
  store(lanes, x);
  for (int i = 0; i < VecD::W; ++i) lanes[i] = function(lanes[i]);
  return load(lanes);
}

// e^x = 2^n e^r with n = round(x / ln 2), |r| <= ln(2)/2; e^r = 1 + r + r^2 q(r), q of degree 4
// (relative error 3e-9).
FMK_INLINE VecF exp(VecF x) {
  // Beyond these bounds the result is infinity or zero whatever x is; the order of arguments keeps
  // NaN.
  x = min(splat(89.0f), max(splat(-104.5f), x));
  const VecF n = round(x * splat(0x1.715476p+0f));
  VecF r = fnma(n, splat(0x1.62e400p-1f),
                x);  // ln 2 in two parts: the first has trailing zeros, so n * it is exact
  r = fnma(n, splat(0x1.7f7d1cp-20f), r);
  VecF q = splat(0x1.6a2430p-10f);
  q = fma(q, r, splat(0x1.1239e4p-7f));
  q = fma(q, r, splat(0x1.5558f2p-5f));
  q = fma(q, r, splat(0x1.555492p-3f));
  q = fma(q, r, splat(0x1.fffffcp-2f));
  return scale2(fma(q * r, r, r) + splat(1.0f), n);
}
FMK_INLINE VecD exp(VecD x) {
  return by_lane(x, [](double v) { return std::exp(v); });
}

// e^x - 1 = 2^n (e^r - 1) + (2^n - 1), n and r as in exp: no cancellation, for n is 0 where the
// result is small. Computed at half its size, so that 2^n is finite wherever the result is.
FMK_INLINE VecF expm1(VecF x) {
  x = min(splat(89.0f), max(splat(-104.5f), x));
  const VecF n = round(x * splat(0x1.715476p+0f));
  VecF r = fnma(n, splat(0x1.62e400p-1f), x);
  r = fnma(n, splat(0x1.7f7d1cp-20f), r);
  VecF q = splat(0x1.6a2430p-10f);
  q = fma(q, r, splat(0x1.1239e4p-7f));
  q = fma(q, r, splat(0x1.5558f2p-5f));
  q = fma(q, r, splat(0x1.555492p-3f));
  q = fma(q, r, splat(0x1.fffffcp-2f));
  const VecF half_power = scale2(splat(1.0f), n - splat(1.0f));
  const VecF half = fma(fma(q * r, r, r), half_power, half_power - splat(0.5f));
  return half + half;
}
FMK_INLINE VecD expm1(VecD x) {
  return by_lane(x, [](double v) { return std::expm1(v); });
}

// 2^x for softmax, x <= 0 up to rounding: exactly 1 at 0 and 0 at -infinity. 2^fraction by degree
// 5, error 1 ulp before rounding.
FMK_INLINE VecF exp2_nonpositive(VecF x) {
  const WholeAndFraction s = split(x);
  VecF p = splat(0x1.ee51c2p-10f);
  p = fma(p, s.fraction, splat(0x1.260324p-7f));
  p = fma(p, s.fraction, splat(0x1.c969bcp-5f));
  p = fma(p, s.fraction, splat(0x1.ebd524p-3f));
  p = fma(p, s.fraction, splat(0x1.62e4e2p-1f));
  p = fma(p, s.fraction, splat(1.0f));
  return scale2(p, s.whole);
}
// The same to a relative error of 3e-6, for probabilities that are rounded to bf16.
FMK_INLINE VecF exp2_nonpositive_coarse(VecF x) {
  const WholeAndFraction s = split(x);
  VecF p = splat(0x1.b7f762p-7f);
  p = fma(p, s.fraction, splat(0x1.abf852p-5f));
  p = fma(p, s.fraction, splat(0x1.ee2454p-3f));
  p = fma(p, s.fraction, splat(0x1.62d6c6p-1f));
  p = fma(p, s.fraction, splat(1.0f));
  return scale2(p, s.whole);
}
FMK_INLINE VecD exp2_nonpositive(VecD x) {
  return by_lane(x, [](double v) { return std::exp2(v); });
}

// |x| <= 0.625: x + x^3 P(x^2), P of degree 5 (relative error 2e-10). Above: 1 - 2 / (e^(2|x|) +
// 1).
FMK_INLINE VecF tanh(VecF x) {
  const VecF magnitude = abs(x), square = x * x;
  VecF p = splat(0x1.18e1c4p-9f);
  p = fma(p, square, splat(-0x1.0bf4f6p-7f));
  p = fma(p, square, splat(0x1.638b56p-6f));
  p = fma(p, square, splat(-0x1.b9ee90p-5f));
  p = fma(p, square, splat(0x1.111066p-3f));
  p = fma(p, square, splat(-0x1.555554p-2f));
  const VecF small = fma(p * square, x, x);
  const VecF large = splat(1.0f) - splat(2.0f) / (exp(magnitude + magnitude) + splat(1.0f));
  return select(less(splat(0.625f), magnitude), copy_sign(large, x), small);
}
FMK_INLINE VecD tanh(VecD x) {
  return by_lane(x, [](double v) { return std::tanh(v); });
}

template <class V>
FMK_INLINE V splat_as(double x) {
  return splat(static_cast<typename V::Elem>(x));
}

template <class V>
FMK_INLINE V sigmoid(V x) {
  const V one = splat_as<V>(1);
  return one / (one + exp(zero<V>() - x));
}

// |x| <= 1: x + x P(x^2), P of degree 6 (1.2e-9). Above: 1 - exp(-g(|x|)), g(t) = -log erfc(t) of
// degree 6 (1.7e-9), cut at 4, where erf rounds to 1.
FMK_INLINE VecF erf(VecF x) {
  const VecF magnitude = abs(x), square = x * x;
  VecF p = splat(0x1.496a1ep-14f);
  p = fma(p, square, splat(-0x1.a3f6f8p-11f));
  p = fma(p, square, splat(0x1.5405b0p-8f));
  p = fma(p, square, splat(-0x1.b7f90cp-6f));
  p = fma(p, square, splat(0x1.ce2cf8p-4f));
  p = fma(p, square, splat(-0x1.81273ep-2f));
  p = fma(p, square, splat(0x1.06eba8p-3f));
  const VecF small = fma(p, x, x);
  const VecF t = min(splat(4.0f), magnitude);
  VecF g = splat(-0x1.9fb2eep-13f);
  g = fma(g, t, splat(0x1.91cd1ap-9f));
  g = fma(g, t, splat(-0x1.6d9cf0p-6f));
  g = fma(g, t, splat(0x1.aa732cp-4f));
  g = fma(g, t, splat(0x1.4621b8p-1f));
  g = fma(g, t, splat(0x1.20b752p+0f));
  g = fma(g, t, splat(0x1.5d0c4ep-13f));
  const VecF large = splat(1.0f) - exp(zero<VecF>() - g);
  return select(less(splat(1.0f), magnitude), copy_sign(large, x), small);
}
FMK_INLINE VecD erf(VecD x) {
  return by_lane(x, [](double v) { return std::erf(v); });
}

constexpr double kSqrtHalf = 0.70710678118654752440, kInvSqrt2Pi = 0.39894228040143267794;
constexpr double kGeluTanhScale = 0.79788456080286535588,
                 kGeluTanhCubic = 0.044715;  // sqrt(2/pi); Hendrycks, Gimpel

// mish(x) = x tanh(log(1 + e^x)) = x n / (n + 2), n = e^x (e^x + 2); the ratio is 1 in the working
// precision for x > 20.
template <class V>
FMK_INLINE V mish_gate(V x) {
  const V e = exp(min(splat_as<V>(20), x)), n = e * (e + splat_as<V>(2));
  return n / (n + splat_as<V>(2));
}

// activation(x). `activation` is uniform over a call, so the switch costs a predicted branch per
// vector.
template <class V>
FMK_INLINE V activate(Activation activation, V x) {
  const V zeros = zero<V>(), one = splat_as<V>(1), half = splat_as<V>(0.5);
  switch (activation) {
    case Activation::kNone: return x;
    case Activation::kRelu: return max(zeros, x);
    case Activation::kRelu6: return min(splat_as<V>(6), max(zeros, x));
    case Activation::kLeakyRelu: return select(less(x, zeros), x * splat_as<V>(0.01), x);
    case Activation::kElu: return select(less(x, zeros), expm1(min(zeros, x)), x);
    case Activation::kGelu: return half * x * (one + erf(x * splat_as<V>(kSqrtHalf)));
    case Activation::kGeluTanh: {
      const V inner = splat_as<V>(kGeluTanhScale) * fma(splat_as<V>(kGeluTanhCubic) * x * x, x, x);
      return half * x * (one + tanh(inner));
    }
    case Activation::kSilu: return x * sigmoid(x);
    case Activation::kSigmoid: return sigmoid(x);
    case Activation::kTanh: return tanh(x);
    case Activation::kHardswish:
      return x * min(splat_as<V>(6), max(zeros, x + splat_as<V>(3))) * splat_as<V>(1.0 / 6);
    case Activation::kHardsigmoid:
      return min(splat_as<V>(6), max(zeros, x + splat_as<V>(3))) * splat_as<V>(1.0 / 6);
    case Activation::kMish: return x * mish_gate(x);
  }
  return x;
}

// d activation / dx at the pre-activation x. At the kinks as torch: relu, relu6, leaky_relu take
// the slope of the left; relu lets the gradient pass where x is NaN.
template <class V>
FMK_INLINE V activate_grad(Activation activation, V x) {
  const V zeros = zero<V>(), one = splat_as<V>(1), half = splat_as<V>(0.5);
  switch (activation) {
    case Activation::kNone: return one;
    case Activation::kRelu: return select(less(zeros, x), one, select(is_nan(x), one, zeros));
    case Activation::kRelu6:
      return select(less(x, splat_as<V>(6)), select(less(zeros, x), one, zeros), zeros);
    case Activation::kLeakyRelu: return select(less(zeros, x), one, splat_as<V>(0.01));
    case Activation::kElu: return select(less(zeros, x), one, exp(min(zeros, x)));
    case Activation::kGelu: {
      const V density = splat_as<V>(kInvSqrt2Pi) * exp(x * x * splat_as<V>(-0.5));
      return fma(x, density, half * (one + erf(x * splat_as<V>(kSqrtHalf))));
    }
    case Activation::kGeluTanh: {
      const V scale = splat_as<V>(kGeluTanhScale), cubic = splat_as<V>(kGeluTanhCubic);
      const V t = tanh(scale * fma(cubic * x * x, x, x));
      const V inner_grad = scale * fma(splat_as<V>(3 * kGeluTanhCubic) * x, x, one);
      return half * (one + t) + half * x * (one - t * t) * inner_grad;
    }
    case Activation::kSilu: {
      const V s = sigmoid(x);
      return s * fma(x, one - s, one);
    }
    case Activation::kSigmoid: {
      const V s = sigmoid(x);
      return s * (one - s);
    }
    case Activation::kTanh: {
      const V t = tanh(x);
      return one - t * t;
    }
    case Activation::kHardswish: {
      const V three = splat_as<V>(3);
      const V inside = fma(x, splat_as<V>(1.0 / 3), half);
      return select(less(zeros - three, x), select(less(x, three), inside, one), zeros);
    }
    case Activation::kHardsigmoid: {
      const V three = splat_as<V>(3);
      return select(less(zeros - three, x), select(less(x, three), splat_as<V>(1.0 / 6), zeros),
                    zeros);
    }
    case Activation::kMish: {
      const V gate = mish_gate(x);
      return fma(x * (one - gate * gate), sigmoid(x), gate);
    }
  }
  return one;
}

}  // namespace fmk::FMK_ISA
