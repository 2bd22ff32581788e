// The dropout options of an operator, as fmkernels/ops/_dropout.py defines them.
#pragma once

#include <cmath>

#include "torch/common.h"

namespace fmk::ops {

inline Dropout dropout_of(double p, const OptionalTensor& seed) {
  FMK_CHECK(p >= 0 && p <= 1, "dropout_p: expected a probability, got ", p);
  if (p == 0) return {};
  FMK_CHECK(seed && seed->is_cpu() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
            "seed: expected an int64 CPU tensor of one element, as dropout_p is not 0");
  Dropout dropout;
  dropout.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
  // Rounds halves to even, as Python does. A probability too small for the threshold drops nothing,
  // but still scales.
  dropout.threshold = static_cast<uint64_t>(std::nearbyint(p * 4294967296.0));
  dropout.factor = p < 1 ? 1 / (1 - p) : 0;
  return dropout;
}

}  // namespace fmk::ops
