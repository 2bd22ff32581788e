// The activations of core/types.h and their derivatives, with torch's default parameters.
#pragma once

#include "cuda/arch.cuh"

namespace fmk::cuda {

__device__ inline float logistic(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ inline float clamp(float x, float low, float high) {
  return x < low ? low : x > high ? high : x;  // NaN stays NaN
}
__device__ inline float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

constexpr float kLeakySlope = 0.01f;
constexpr float kInverseSqrt2 = 0.70710678118654752440f;
constexpr float kInverseSqrt2Pi = 0.39894228040143267794f;
constexpr float kSqrt2OverPi = 0.79788456080286535588f, kGeluCubic = 0.044715f;

__device__ inline float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kNone: return x;
    case Activation::kRelu: return x < 0.0f ? 0.0f : x;
    case Activation::kRelu6: return clamp(x, 0.0f, 6.0f);
    case Activation::kLeakyRelu: return x > 0.0f ? x : kLeakySlope * x;
    case Activation::kElu: return x > 0.0f ? x : expm1f(x);
    case Activation::kGelu: return 0.5f * x * (1.0f + erff(x * kInverseSqrt2));
    case Activation::kGeluTanh:
      return 0.5f * x * (1.0f + tanhf(kSqrt2OverPi * (x + kGeluCubic * x * x * x)));
    case Activation::kSilu: return x * logistic(x);
    case Activation::kSigmoid: return logistic(x);
    case Activation::kTanh: return tanhf(x);
    case Activation::kHardswish: return x * clamp(x + 3.0f, 0.0f, 6.0f) / 6.0f;
    case Activation::kHardsigmoid: return clamp(x + 3.0f, 0.0f, 6.0f) / 6.0f;
    case Activation::kMish: return x * tanhf(softplus(x));
  }
  return x;
}

// At the pre-activation x; for relu the output does as well.
__device__ inline float activation_derivative(Activation activation, float x) {
  switch (activation) {
    case Activation::kNone: return 1.0f;
    case Activation::kRelu: return x > 0.0f ? 1.0f : 0.0f;
    case Activation::kRelu6: return x > 0.0f && x < 6.0f ? 1.0f : 0.0f;
    case Activation::kLeakyRelu: return x > 0.0f ? 1.0f : kLeakySlope;
    case Activation::kElu: return x > 0.0f ? 1.0f : expf(x);
    case Activation::kGelu:
      return 0.5f * (1.0f + erff(x * kInverseSqrt2)) + x * kInverseSqrt2Pi * expf(-0.5f * x * x);
    case Activation::kGeluTanh: {
      const float t = tanhf(kSqrt2OverPi * (x + kGeluCubic * x * x * x));
      const float inner = kSqrt2OverPi * (1.0f + 3.0f * kGeluCubic * x * x);
      return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * inner;
    }
    case Activation::kSilu: {
      const float s = logistic(x);
      return s * (1.0f + x * (1.0f - s));
    }
    case Activation::kSigmoid: {
      const float s = logistic(x);
      return s * (1.0f - s);
    }
    case Activation::kTanh: {
      const float t = tanhf(x);
      return 1.0f - t * t;
    }
    case Activation::kHardswish:
      return x <= -3.0f ? 0.0f : x < 3.0f ? (2.0f * x + 3.0f) / 6.0f : 1.0f;
    case Activation::kHardsigmoid: return x > -3.0f && x < 3.0f ? 1.0f / 6.0f : 0.0f;
    case Activation::kMish: {
      const float t = tanhf(softplus(x));
      return t + x * (1.0f - t * t) * logistic(x);
    }
  }
  return 1.0f;
}

}  // namespace fmk::cuda
