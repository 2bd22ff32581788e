// Shared by rnn_*.cpp of one instruction set: work sharing and arenas.
#pragma once

#include "cpu/gemm.h"
#include "cpu/reduce.h"
#include "cpu/rnn.h"

namespace fmk::FMK_ISA {

void lstm_backward(const LstmBackward&, const Parallel&);
size_t lstm_backward_workspace(const LstmBackward&);

// What hidden states are kept in between steps: the storage type where the micro-kernel reads that,
// else the compute type.
template <class T, bool kInPlace = kWordsInPlace<T>>
struct OperandOf {
  using Type = T;
};
template <class T>
struct OperandOf<T, false> {
  using Type = Word<T>;
};
template <class T>
using Operand = typename OperandOf<T>::Type;

// tanh(x) = -e / (2 + e), e = e^-2x - 1. Where x is cut, tanh has rounded to -1.
template <class V>
FMK_INLINE V tanh_by_expm1(V x) {
  const V e = expm1(max(splat_as<V>(-20), x) * splat_as<V>(-2));
  return (zero<V>() - e) / (splat_as<V>(2) + e);
}

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

// Hands out 64-byte aligned pieces of a buffer. With a null buffer it only counts.
struct Arena {
  char* base;
  size_t used = 0;

  template <class E>
  FMK_LAMBDA E* take(int64_t count) {
    E* piece = base ? reinterpret_cast<E*>(base + used) : nullptr;
    used += (static_cast<size_t>(count) * sizeof(E) + 63) / 64 * 64;
    return piece;
  }
};

// Who computes what: every item is one direction of one slice of the batch and runs through the
// whole sequence by itself, so no thread ever waits for another.
struct SequenceItems {
  int64_t directions, slices, batch;

  FMK_INLINE SequenceItems of(const LstmShape& shape, double flops, const Parallel& pool) {
    // Fewer rows leave a core waiting for the weights, which each slice reads for itself.
    constexpr int64_t kMinRows = 4;
    int64_t slices = 1;
    if (flops >= kSerialFlops)
      slices = max_of<int64_t>(
          1, min_of(pool.threads / shape.directions, ceil_div(shape.batch, kMinRows)));
    return {shape.directions, slices, shape.batch};
  }
  int64_t count() const { return directions * slices; }
  int64_t direction(int64_t item) const { return item / slices; }
  int64_t first_row(int64_t item) const { return batch * (item % slices) / slices; }
  int64_t rows(int64_t item) const {
    return batch * (item % slices + 1) / slices - first_row(item);
  }
};

// Runs body(item), all on the calling thread where the work is too little to share.
template <class Body>
FMK_INLINE void for_each_item(const SequenceItems& items, double flops, const Parallel& pool,
                              const Body& body) {
  Parallel serial;
  parallel_for(flops < kSerialFlops ? serial : pool, items.count(), body);
}

// Multiplications and additions of the gates' matrix products, over all steps and directions.
FMK_INLINE double lstm_flops(const LstmShape& s) {
  return 8.0 * static_cast<double>(s.directions * s.steps) * static_cast<double>(s.batch) *
         static_cast<double>(s.hidden_size) * static_cast<double>(s.input_size + s.hidden_size);
}

// --- shared by the backward pass and its weight gradients ---

// Rows (t, b) of X, dG and dX are numbered as they lie in the caller's layout.
FMK_INLINE int64_t row_index(const LstmBackward& p, int64_t t, int64_t b) {
  return p.batch_first ? b * p.shape.steps + t : t * p.shape.batch + b;
}

template <class T>
struct BackwardWorkspace {
  using V = Vec<T>;

  T* grad_gates;       // dG: [rows][D][4H]
  Word<T>* hh_panels;  // per direction W_hh [4H][H] in panels over H
  Word<T>* ih_panels;  // W_ih of all directions, one reduction of D * 4H, in panels over I
  int64_t hh_direction_words;

  FMK_INLINE BackwardWorkspace of(const LstmBackward& p, Arena& arena) {
    const LstmShape& s = p.shape;
    const int64_t rows = s.steps * s.batch, gates = 4 * s.hidden_size;
    BackwardWorkspace w;
    w.grad_gates = arena.take<T>(rows * s.directions * gates);
    w.hh_direction_words = packed_words<T>(s.hidden_size, gates);
    w.hh_panels = arena.take<Word<T>>(s.directions * w.hh_direction_words);
    w.ih_panels =
        arena.take<Word<T>>(p.grad_input ? packed_words<T>(s.input_size, s.directions * gates) : 0);
    return w;
  }
};

}  // namespace fmk::FMK_ISA
