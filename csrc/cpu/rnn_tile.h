// The recurrent layers' micro-kernel: gemm.h's tile over two operands, x and h, that are reduced
// one after the other and whose rows lie evenly apart.
#pragma once

#include <type_traits>

#include "cpu/gemm.h"

namespace fmk::FMK_ISA {
namespace {

// Rows that lie evenly apart.
struct EvenRows {
  const char* first;
  int64_t bytes_apart;
};

// gates[i][:] = init[i][:] + x_i * x panel + h_i * h panel, for the rows of one tile.
template <class M>
struct GateOperands {
  using Word = typename M::Word;
  using Elem = typename M::V::Elem;
  struct Part {
    EvenRows rows;
    int64_t words;
    const Word* panel;
    // What is wanted in L2 soon: a line of it per word of the reduction. Null: nothing.
    const char* ahead = nullptr;
  };
  Part parts[2];
  const Elem* init;  // [rows][ld_init]; ld_init 0 repeats one row; null: zeros
  int64_t ld_init;
  Elem* gates;  // [rows][ld_gates]
  int64_t ld_gates;
  int64_t ahead_step;
};

// acc += a b. In a loop of two steps the compiler (gcc 12) lets accumulators wander from register
// to register and copies them back, which the front end has no time for.
template <class M>
FMK_INLINE void accumulate(typename M::V& acc, typename M::V a, typename M::V b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<M, MacF32>) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(acc.v) : "v"(a.v), "v"(b.v));
    return;
  }
#endif
  acc = M::mac(acc, a, b);
}

// acc += A B as accumulate_rows in gemm.h, for rows that lie evenly apart. Twelve row pointers and
// a panel's are more than there are general registers, and what the compiler then keeps in vector
// registers comes back through a port that multiplies: so every fourth row has a pointer, and the
// others are that far from it.
template <class M, int MR, int NV, int kSums>
FMK_INLINE void accumulate_even_rows(typename M::V (&acc)[kSums][MR][NV],
                                     const typename GateOperands<M>::Part& part,
                                     int64_t ahead_step) {
  using V = typename M::V;
  using Word = typename M::Word;
  constexpr int kGroups = (MR + 3) / 4, kUnroll = kSums > 1 ? kSums : 2;
  constexpr int64_t kWidth = NV * V::W;
  constexpr bool kAhead = MR * NV >= 16;  // smaller tiles have no room between their loads
  const char* group[kGroups];
  FMK_FOR (g, kGroups) group[g] = part.rows.first + 4 * g * part.rows.bytes_apart;
  const int64_t one = part.rows.bytes_apart, three = 3 * one;
  const Word* b = part.panel;
  const char* next = part.ahead;
  const auto step = [&](V(&set)[MR][NV], int64_t k) FMK_LAMBDA {
    V panel[NV];
    FMK_FOR (j, NV) panel[j] = pin(M::load_words(b + k * kWidth + j * V::W));
    prefetch_panel<M, NV>(b + (k + kPanelPrefetchSteps) * kWidth);
    if constexpr (kAhead) {
      __builtin_prefetch(next, 0, 2);
      next += ahead_step;
    }
    FMK_FOR (i, MR) {
      const int64_t from_group = i % 4 == 0 ? 0 : i % 4 == 1 ? one : i % 4 == 2 ? 2 * one : three;
      const char* row = group[i / 4] + from_group + k * static_cast<int64_t>(sizeof(Word));
      const V x = M::splat_word(reinterpret_cast<const Word*>(row));
      FMK_FOR (j, NV) accumulate<M>(set[i][j], x, panel[j]);
    }
  };
  const auto advance = [&](int64_t steps) FMK_LAMBDA {
    FMK_FOR (g, kGroups) {
      // opaque, or the compiler makes a pointer of every row again
      group[g] = opaque(group[g] + steps * static_cast<int64_t>(sizeof(Word)));
    }
    b += steps * kWidth;
  };
  int64_t k = 0;
  for (; k + kUnroll <= part.words; k += kUnroll) {
    FMK_FOR (s, kUnroll) step(acc[s % kSums], s);
    advance(kUnroll);
  }
  for (; k < part.words; ++k) {
    step(acc[0], 0);
    advance(1);
  }
}

// kChained: the sum over the words of a row is one chain, however many rows the tile has, so that a
// row's result does not depend on its company.
template <class M, int MR, int NV, bool kChained>
FMK_NOINLINE void gate_tile(const GateOperands<M>& in) {
  using V = typename M::V;
  V acc[kChained ? 1 : kPartialSums<MR, NV>][MR][NV];
  clear_sums(acc);
  for (const auto& part : in.parts)
    if (part.words) accumulate_even_rows<M>(acc, part, in.ahead_step);
  add_sums(acc, in.init, in.ld_init);
  StoreAccumulators<V>{in.gates, in.ld_gates}.run(acc[0]);
}

template <class M, int NV, bool kChained, int MR = kTileRows[NV]>
FMK_INLINE void run_gate_tile(int rows, const GateOperands<M>& in) {
  if constexpr (MR > 1) {
    if (rows < MR) return run_gate_tile<M, NV, kChained, MR - 1>(rows, in);
  }
  gate_tile<M, MR, NV, kChained>(in);
}

}  // namespace
}  // namespace fmk::FMK_ISA
