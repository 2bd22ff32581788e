// Dropout masks from counters: nothing is stored, and the backward pass draws the same numbers.
#pragma once

#include "cpu/simd.h"

namespace fmk::FMK_ISA {

constexpr int kPhiloxCounters = 16, kPhiloxWords = 4 * kPhiloxCounters;

// Philox 4x32-10 (Salmon et al., SC 2011): words[4 * i + w] is word w of the counter
// (row, first + i, 0), key = seed; see fmkernels/ops/_dropout.py. Plain loops over lanes, which the
// compiler turns into vectors.
FMK_NOINLINE void philox(uint64_t seed, uint64_t row, uint32_t first, uint32_t* words) {
  uint32_t c0[kPhiloxCounters], c1[kPhiloxCounters], c2[kPhiloxCounters], c3[kPhiloxCounters];
  for (int i = 0; i < kPhiloxCounters; ++i) {
    c0[i] = static_cast<uint32_t>(row);
    c1[i] = static_cast<uint32_t>(row >> 32);
    c2[i] = first + static_cast<uint32_t>(i);
    c3[i] = 0;
  }
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kPhiloxCounters; ++i) {
      const uint64_t a = uint64_t{0xD2511F53} * c0[i], b = uint64_t{0xCD9E8D57} * c2[i];
      c0[i] = static_cast<uint32_t>(b >> 32) ^ c1[i] ^ key0;
      c1[i] = static_cast<uint32_t>(b);
      c2[i] = static_cast<uint32_t>(a >> 32) ^ c3[i] ^ key1;
      c3[i] = static_cast<uint32_t>(a);
    }
    key0 += 0x9E3779B9, key1 += 0xBB67AE85;
  }
  for (int i = 0; i < kPhiloxCounters; ++i) {
    words[4 * i] = c0[i];
    words[4 * i + 1] = c1[i];
    words[4 * i + 2] = c2[i];
    words[4 * i + 3] = c3[i];
  }
}

// What elements [column, column + n) of a row are multiplied by: 0 or dropout.factor.
template <class E>
FMK_NOINLINE void dropout_factors(const Dropout& dropout, int64_t row, int64_t column, int64_t n,
                                  E* factors) {
  // Where everything is dropped the factor is 0, and it does not matter what is "kept".
  const auto threshold =
      static_cast<uint32_t>(min_of<uint64_t>(dropout.threshold, uint64_t{0xffffffff}));
  const E factor = static_cast<E>(dropout.factor);
  alignas(64) uint32_t words[kPhiloxWords];
  int64_t skip = column % 4;
  for (int64_t done = 0; done < n;) {
    philox(dropout.seed, static_cast<uint64_t>(row),
           static_cast<uint32_t>((column + done - skip) / 4), words);
    const int64_t count = min_of<int64_t>(n - done, kPhiloxWords - skip);
    for (int64_t i = 0; i < count; ++i)
      factors[done + i] = words[skip + i] >= threshold ? factor : E(0);
    done += count;
    skip = 0;
  }
}

}  // namespace fmk::FMK_ISA
