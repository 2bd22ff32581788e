// Dropout masks from counters: nothing is stored, and the backward pass draws the same numbers.
#pragma once

#include "cpu/simd.h"

namespace fmk::FMK_ISA {

// Philox 4x32-10 (Salmon et al., SC 2011) of N counters c[word][i], which become the random words;
// fmkernels/ops/_dropout.py says what for. Plain loops over lanes, which the compiler turns into
// vectors.
template <int N>
FMK_INLINE void philox(uint32_t (&c)[4][N], uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < N; ++i) {
      const uint64_t first = uint64_t{0xD2511F53} * c[0][i];
      const uint64_t second = uint64_t{0xCD9E8D57} * c[2][i];
      c[0][i] = static_cast<uint32_t>(second >> 32) ^ c[1][i] ^ key0;
      c[1][i] = static_cast<uint32_t>(second);
      c[2][i] = static_cast<uint32_t>(first >> 32) ^ c[3][i] ^ key1;
      c[3][i] = static_cast<uint32_t>(first);
    }
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
}

constexpr int kPhiloxCounters = 16, kPhiloxWords = 4 * kPhiloxCounters;

// words[4 * i + w]: word w of the counter (row, first + i, 0).
FMK_NOINLINE void philox_row(uint64_t seed, uint64_t row, uint32_t first, uint32_t* words) {
  uint32_t c[4][kPhiloxCounters];
  for (int i = 0; i < kPhiloxCounters; ++i) {
    c[0][i] = static_cast<uint32_t>(row);
    c[1][i] = static_cast<uint32_t>(row >> 32);
    c[2][i] = first + static_cast<uint32_t>(i);
    c[3][i] = 0;
  }
  philox(c, seed);
  for (int i = 0; i < kPhiloxCounters; ++i)
    for (int word = 0; word < 4; ++word) words[4 * i + word] = c[word][i];
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
    philox_row(dropout.seed, static_cast<uint64_t>(row),
               static_cast<uint32_t>((column + done - skip) / 4), words);
    const int64_t count = min_of<int64_t>(n - done, kPhiloxWords - skip);
    for (int64_t i = 0; i < count; ++i)
      factors[done + i] = words[skip + i] >= threshold ? factor : E(0);
    done += count;
    skip = 0;
  }
}

}  // namespace fmk::FMK_ISA
