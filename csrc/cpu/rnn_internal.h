// Shared by rnn_*.cpp of one instruction set: rows and their lengths, work sharing, arenas.
#pragma once

#include "cpu/gemm.h"
#include "cpu/reduce.h"
#include "cpu/rnn.h"

namespace fmk::FMK_ISA {

// Whether this is a step that rnn_cell.cpp or rnn_step_backward.cpp knows, and so has done.
bool rnn_cell_forward(const RnnForward&, const Parallel&);
bool rnn_step_backward(const RnnBackward&, const Parallel&);
void rnn_backward(const RnnBackward&, const Parallel&);
size_t rnn_backward_workspace(const RnnBackward&);

// What a matrix product reads: the storage type where the micro-kernel reads that, else the compute
// type.
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

FMK_INLINE int gates_of(RnnKind kind) {
  return kind == RnnKind::kLstm ? 4 : kind == RnnKind::kGru ? 3 : 1;
}
FMK_INLINE bool is_plain(const RnnShape& s, const LstmVariant& v) {
  return s.output_size == s.hidden_size && v.activation == GateActivation::kTanh &&
         v.recurrent_activation == GateActivation::kSigmoid && !v.peephole && !v.layer_norm &&
         v.zoneout == 0 && !v.recurrent_mask && !v.zoneout_h;
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

// Initial and final cell states: in the layer's type, or in float beside a narrower one.
template <class T>
FMK_INLINE void load_cell_row(const void* cells, bool wide, int64_t first, int64_t n, Acc<T>* to) {
  if (wide)
    convert(static_cast<const Acc<T>*>(cells) + first, to, n);
  else
    convert(static_cast<const T*>(cells) + first, to, n);
}
template <class T>
FMK_INLINE void store_cell_row(const Acc<T>* from, int64_t n, bool wide, int64_t first,
                               void* cells) {
  if (wide)
    convert(from, static_cast<Acc<T>*>(cells) + first, n);
  else
    convert(from, static_cast<T*>(cells) + first, n);
}

// Batch rows by falling length, so that those taking part in a step always come first.
struct RowOrder {
  const int64_t* order;   // [B] rows of the batch; null: as they are, all as long as the sequence
  const int64_t* longer;  // [T + 1]: how many are longer than t

  FMK_INLINE size_t bytes(const int64_t* lengths, int64_t batch, int64_t steps) {
    return lengths ? static_cast<size_t>(batch + 2 * (steps + 1)) * sizeof(int64_t) : 0;
  }
  // `memory` holds bytes(...).
  FMK_INLINE RowOrder of(const int64_t* lengths, int64_t batch, int64_t steps, void* memory) {
    if (!lengths) return {nullptr, nullptr};
    auto* order = static_cast<int64_t*>(memory);
    int64_t *longer = order + batch, *place = longer + steps + 1;
    for (int64_t t = 0; t <= steps; ++t) longer[t] = 0;
    for (int64_t b = 0; b < batch; ++b) ++longer[lengths[b]];
    int64_t sum = 0;
    for (int64_t t = steps; t >= 0; --t) {  // a counting sort
      const int64_t here = longer[t];
      longer[t] = place[t] = sum;
      sum += here;
    }
    for (int64_t b = 0; b < batch; ++b) order[place[lengths[b]]++] = b;
    return {order, longer};
  }
};

// The rows of one item of the work, and how many of them take part in a step.
struct ItemRows {
  RowOrder all;
  int64_t count, first, stride;  // row i is order[first + i * stride]

  int64_t index(int64_t i) const {
    const int64_t place = first + i * stride;
    return all.order ? all.order[place] : place;
  }
  int64_t active(int64_t t) const {
    if (!all.order) return count;
    return max_of<int64_t>(0, ceil_div(all.longer[t] - first, stride));
  }
};

// Who computes what: every item is one direction of one slice of the batch and runs through the
// whole sequence by itself, so no thread ever waits for another. Does not depend on the number of
// steps: a sequence in pieces is computed as it is in whole, bit for bit.
struct SequenceItems {
  int64_t directions, slices, batch;
  RowOrder order;

  FMK_INLINE SequenceItems of(const RnnShape& shape, RowOrder order, const Parallel& pool) {
    // Fewer rows leave a core waiting for the weights, which each slice reads for itself.
    constexpr int64_t kMinRows = 4;
    const int64_t slices =
        max_of<int64_t>(1, min_of(pool.threads / shape.directions, shape.batch / kMinRows));
    return {shape.directions, slices, shape.batch, order};
  }
  int64_t count() const { return directions * slices; }
  int64_t direction(int64_t item) const { return item / slices; }
  ItemRows rows(int64_t item) const {
    const int64_t slice = item % slices;
    // Long and short sequences go to every slice.
    if (order.order) return {order, ceil_div(batch - slice, slices), slice, slices};
    const int64_t first = batch * slice / slices;
    return {order, batch * (slice + 1) / slices - first, first, 1};
  }
};

// Whether the threads should share the units of all rows, with a barrier per step, instead of the
// rows: each then reads only its own part of the recurrent weights. Does not depend on the number
// of steps, as SequenceItems does not.
FMK_INLINE bool shares_units(const RnnShape& s, const LstmVariant& v, int threads,
                             int64_t weight_bytes) {
  // A quarter of L2: what a step reads besides its weights wants room too. Below kWorthABarrier
  // bytes of weights a thread alone is as fast.
  constexpr int64_t kResident = 256 * 1024, kWorthABarrier = 96 * 1024;
  constexpr int64_t kEnoughRows = 24;  // to hide the weights' way from L3
  if (threads < 2 || s.directions > 1 || !is_plain(s, v)) return false;
  if (weight_bytes < kWorthABarrier) return false;
  const int64_t rows = s.batch / threads;
  return rows < 4 || (weight_bytes > kResident && rows < kEnoughRows);
}

// Runs body(item), all on the calling thread where the work is too little to share.
template <class Body>
FMK_INLINE void for_each_item(const SequenceItems& items, double flops, const Parallel& pool,
                              const Body& body) {
  Parallel serial;
  parallel_for(flops < kSerialFlops ? serial : pool, items.count(), body);
}

// Multiplications and additions of the gates' matrix products, over all steps and directions.
FMK_INLINE double rnn_flops(const RnnShape& s) {
  return 2.0 * gates_of(s.kind) * static_cast<double>(s.directions * s.steps) *
         static_cast<double>(s.batch) * static_cast<double>(s.hidden_size) *
         static_cast<double>(s.input_size + s.output_size);
}

}  // namespace fmk::FMK_ISA
