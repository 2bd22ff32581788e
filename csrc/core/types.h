// Types shared by every kernel, on every device. No torch, no inline functions: this header is
// included by translation units that are compiled for different instruction sets, and nothing
// compiled for one may be linked into another.
#pragma once

#include <cstdint>

namespace fmk {

enum class DType : uint8_t { kF32, kBF16, kF16, kF64 };

// Storage types: bits only. Arithmetic happens in float (see csrc/cpu/simd.h for the conversions).
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The activations of the epilogue, with torch's default parameters. The order is the order of the
// names in fmkernels/ops/_activations.py; the stable-ABI layer translates names to these values.
enum class Activation : uint8_t {
  kNone,
  kRelu,
  kRelu6,
  kLeakyRelu,  // slope 0.01
  kElu,        // alpha 1
  kGelu,       // x * Phi(x)
  kGeluTanh,
  kSilu,
  kSigmoid,
  kTanh,
  kHardswish,
  kHardsigmoid,
  kMish,
};

// Dropout as fmkernels/ops/_dropout.py defines it: element (row, column) is kept, multiplied by
// `factor`, where its Philox word is at least `threshold`. threshold 0: no dropout.
struct Dropout {
  uint64_t seed = 0;
  uint64_t threshold = 0;
  double factor = 1;
};

}  // namespace fmk
