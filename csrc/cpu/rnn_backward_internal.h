// The backward pass's numbering of rows, and the work space through which its time loop
// (rnn_backward.cpp) hands dG to the products that follow it (rnn_products.cpp).
#pragma once

#include <type_traits>

#include "cpu/rnn_internal.h"

namespace fmk::FMK_ISA {

// What is wanted of the gradients of the weight matrices and of the input, from the work space's
// dG. `rows` of the steps' rows are not padding.
void rnn_products(const RnnBackward&, int64_t rows, const Parallel&);

namespace {

// Rows (t, b) of X, dG and dX are numbered as they lie in the caller's layout.
FMK_INLINE int64_t row_index(const RnnBackward& p, int64_t t, int64_t b) {
  return p.batch_first ? b * p.shape.steps + t : t * p.shape.batch + b;
}
FMK_INLINE int64_t time_of(const RnnBackward& p, int64_t row) {
  return p.batch_first ? row % p.shape.steps : row / p.shape.batch;
}
FMK_INLINE int64_t batch_of(const RnnBackward& p, int64_t row) {
  return p.batch_first ? row / p.shape.steps : row % p.shape.batch;
}
// The step that a row's step t started from, or -1 where that is the initial state.
FMK_INLINE int64_t time_before(const RnnBackward& p, int64_t d, int64_t t, int64_t b) {
  if (d == 0) return t - 1;
  const int64_t length = p.lengths ? p.lengths[b] : p.shape.steps;
  return t + 1 < length ? t + 1 : -1;
}
template <class T>
FMK_INLINE const T* hidden_before(const RnnBackward& p, int64_t d, int64_t t, int64_t b) {
  const int64_t P = p.shape.output_size, before = time_before(p, d, t, b);
  if (before < 0) return static_cast<const T*>(p.h0) + (d * p.shape.batch + b) * P;
  return static_cast<const T*>(p.output) + (row_index(p, before, b) * p.shape.directions + d) * P;
}

// A weight [gates * H][n] as the right operand of a product with dG: dG's columns of a gate number
// `step` (H, or one more so that pairs do not cross gates), gate g being the weight's source[g], -1
// for none.
struct GateMap {
  int64_t hidden_size, step;
  int count;
  int source[4];

  int64_t columns() const { return count * step; }
  // The weight's row for a column of dG, or -1.
  int64_t row(int64_t column) const {
    const int64_t unit = column % step;
    const int gate = source[column / step];
    return gate < 0 || unit >= hidden_size ? -1 : gate * hidden_size + unit;
  }
};

template <class T>
struct BackwardWorkspace {
  using V = Vec<T>;

  int64_t gate_step, gates;     // columns and number of a direction's gates in dG
  int64_t projected_step;       // P, even where pairs are read
  Operand<T>* grad_gates;       // dG: [rows][D][gates * gate_step]
  Operand<T>* grad_x;           // layer norm: the same for W_ih x; else grad_gates
  Operand<T>* grad_projected;   // projection: of h~, [rows][D][projected_step]
  T* gated;                     // projection: o * A, [rows][D][H]
  T* masked;                    // recurrent mask: h as it met W_hh, [rows][D][P]
  int64_t* active_rows;         // lengths: the rows that are not padding
  Word<T>* hh_panels;           // per direction W_hh in panels over P
  Word<T>* hr_panels;           // per direction W_hr in panels over H
  Word<T>* ih_panels;           // W_ih of all directions, one reduction, in panels over I
  Operand<T>* wide_input_grad;  // [rows][I] where dX is not computed in T
  int64_t hh_words, hr_words;   // of a direction
  GateMap hh, ih;
  int64_t hh_first;  // the first column of dG that W_hh's product reads

  FMK_INLINE BackwardWorkspace of(const RnnBackward& p, Arena& arena) {
    constexpr int64_t kPair = Mac<T>::kPair;
    const RnnShape& s = p.shape;
    const bool gru = s.kind == RnnKind::kGru, projects = s.output_size != s.hidden_size;
    const int64_t rows = s.steps * s.batch, D = s.directions;
    BackwardWorkspace w;
    w.gate_step = ceil_div(s.hidden_size, kPair) * kPair;
    w.projected_step = ceil_div(s.output_size, kPair) * kPair;
    w.gates = gru ? 4 : gates_of(s.kind);
    w.hh = {s.hidden_size, w.gate_step, gates_of(s.kind), {0, 1, 2, 3}};
    w.ih = w.hh;
    w.hh_first = 0;
    if (gru) {
      // With two directions the unused fourth gate lies between them.
      w.ih = {s.hidden_size, w.gate_step, D == 1 ? 3 : 4, {2, 0, 1, -1}};
      w.hh_first = w.gate_step;
    }
    const int64_t columns = rows * D * w.gates * w.gate_step;
    w.grad_gates = arena.take<Operand<T>>(columns);
    w.grad_x = p.variant.layer_norm ? arena.take<Operand<T>>(columns) : w.grad_gates;
    w.grad_projected = arena.take<Operand<T>>(projects ? rows * D * w.projected_step : 0);
    w.gated = arena.take<T>(projects ? rows * D * s.hidden_size : 0);
    w.masked = arena.take<T>(p.variant.recurrent_mask ? rows * D * s.output_size : 0);
    w.active_rows = arena.take<int64_t>(p.lengths ? rows : 0);
    w.hh_words = packed_words<T>(s.output_size, w.hh.columns());
    w.hr_words = projects ? packed_words<T>(s.hidden_size, w.projected_step) : 0;
    w.hh_panels = arena.take<Word<T>>(D * w.hh_words);
    w.hr_panels = arena.take<Word<T>>(D * w.hr_words);
    w.ih_panels =
        arena.take<Word<T>>(p.grad_input ? packed_words<T>(s.input_size, D * w.ih.columns()) : 0);
    constexpr bool kNarrow = !std::is_same_v<T, Operand<T>>;
    w.wide_input_grad = arena.take<Operand<T>>(kNarrow && p.grad_input ? rows * s.input_size : 0);
    return w;
  }

  int64_t row_length(const RnnShape& s) const { return s.directions * gates * gate_step; }
};

}  // namespace
}  // namespace fmk::FMK_ISA
