// The pointwise part of a forward step: from pre-activations to the next state.
#pragma once

#include <type_traits>

#include "cpu/rnn_internal.h"

namespace fmk::FMK_ISA {
namespace {

// tanh(x) = -e / (2 + e), e = e^-2x - 1. Where x is cut, tanh has rounded to -1.
template <class V>
FMK_INLINE V tanh_by_expm1(V x) {
  const V e = expm1(max(splat_as<V>(-20), x) * splat_as<V>(-2));
  return (zero<V>() - e) / (splat_as<V>(2) + e);
}

// sigmoid(a) tanh(b) = (1 - e) / ((1 + e^-a) (1 + e)), e = e^-2b: one division for both. Where b is
// cut, tanh has rounded to -1; where e^-a overflows, the quotient is 0 as it should be.
template <class V>
struct SigmoidTimesTanh {
  V a_term, b_term;  // 1 + e^-a, e^-2b - 1

  FMK_INLINE SigmoidTimesTanh of(V a, V b) {
    return {splat_as<V>(1) + exp(zero<V>() - a), expm1(max(splat_as<V>(-20), b) * splat_as<V>(-2))};
  }
  FMK_LAMBDA V product() const {
    return (zero<V>() - b_term) / (a_term * (splat_as<V>(2) + b_term));
  }
  FMK_LAMBDA V sigmoid_a() const { return splat_as<V>(1) / a_term; }
  FMK_LAMBDA V tanh_b() const { return (zero<V>() - b_term) / (splat_as<V>(2) + b_term); }
};

template <class V>
FMK_INLINE V gate_activation(GateActivation activation, V x) {
  switch (activation) {
    case GateActivation::kTanh: return tanh_by_expm1(x);
    case GateActivation::kSigmoid: return sigmoid(x);
    case GateActivation::kRelu: return max(zero<V>(), x);
    case GateActivation::kHardSigmoid:
      return min(splat_as<V>(6), max(zero<V>(), x + splat_as<V>(3))) / splat_as<V>(6);
    case GateActivation::kIdentity: break;
  }
  return x;
}

// The derivative by the activation's own result.
template <class V>
FMK_INLINE V gate_slope(GateActivation activation, V y) {
  const V one = splat_as<V>(1);
  switch (activation) {
    case GateActivation::kTanh: return fnma(y, y, one);
    case GateActivation::kSigmoid: return y * (one - y);
    case GateActivation::kRelu: return select(less(zero<V>(), y), one, zero<V>());
    case GateActivation::kHardSigmoid:
      return select(less(zero<V>(), y), select(less(y, one), splat_as<V>(1.0 / 6), zero<V>()),
                    zero<V>());
    case GateActivation::kIdentity: break;
  }
  return one;
}

// A gate as it is saved: a hard sigmoid below 1 must not round to 1, where its slope is 0.
template <class T, class V>
FMK_INLINE V saved_gate(GateActivation activation, V y) {
  if (std::is_same_v<T, Acc<T>> || activation != GateActivation::kHardSigmoid) return y;
  const V one = splat_as<V>(1);
  const V below = splat_as<V>(std::is_same_v<T, bf16> ? 1 - 0x1p-8 : 1 - 0x1p-11);
  return select(less(y, one), min(below, y), y);
}

// One step of one block of units, for rows 0, 1, ... of an item.
template <class T>
struct BlockStep {
  const Acc<T>* gates;  // [rows][positions * W] pre-activations
  int64_t unit;         // the block's first
  int64_t hidden_size;
  Acc<T>* c;               // [rows][ld_c] cell states, updated; LSTM
  const Operand<T>* from;  // [rows][ld_h] hidden states before; GRU
  Operand<T>* hidden;      // [rows][ld_h] and after
  int64_t ld_c, ld_h;
  T* const* outputs;          // of the rows at this step
  const int64_t* saved_rows;  // of the rows at this step
  T* gates_kept;              // [saved rows][4H], or null
  Acc<T>* cells_kept;         // [saved rows][H]
  T* const* cell_outputs;     // of the rows at this step, or null
  bool relu;                  // RNN

  int lanes(int vec) const {
    return static_cast<int>(
        max_of<int64_t>(0, min_of<int64_t>(Vec<T>::W, hidden_size - unit - vec * Vec<T>::W)));
  }
};

// Writes h to the output, and as it is rounded there to the next step's operand.
template <class T, class V>
FMK_INLINE void put_hidden(T* output, Operand<T>* hidden, V h, int lanes) {
  store_lanes(output, h, lanes);
  if constexpr (!std::is_same_v<T, Operand<T>>) h = load_lanes(output, lanes);
  store_lanes(hidden, h, lanes);
}

template <class T, bool kSave>
FMK_NOINLINE void lstm_cells(const BlockStep<T>& s, int64_t rows) {
  using V = Vec<T>;
  constexpr int W = V::W;
  const int lanes = s.lanes(0);
  const int64_t H = s.hidden_size;
  const Acc<T>* gates = s.gates;
  for (int64_t row = 0; row < rows; ++row, gates += 4 * W) {
    const V i = load(gates), f = load(gates + W), g = load(gates + 2 * W), o = load(gates + 3 * W);
    Acc<T>* cell = s.c + row * s.ld_c + s.unit;
    const V keep = sigmoid(f);
    const auto enter = SigmoidTimesTanh<V>::of(i, g);
    const V c = fma(keep, load(cell), enter.product());
    const auto leave = SigmoidTimesTanh<V>::of(o, c);
    if constexpr (kSave) {
      T* kept = s.gates_kept + s.saved_rows[row] * 4 * H + s.unit;
      store_lanes(kept, enter.sigmoid_a(), lanes);
      store_lanes(kept + H, keep, lanes);
      store_lanes(kept + 2 * H, enter.tanh_b(), lanes);
      store_lanes(kept + 3 * H, leave.sigmoid_a(), lanes);
      store_lanes(s.cells_kept + s.saved_rows[row] * H + s.unit, c, lanes);
    }
    if (s.cell_outputs) store_lanes(s.cell_outputs[row] + s.unit, c, lanes);
    store(cell, c);
    put_hidden(s.outputs[row] + s.unit, s.hidden + row * s.ld_h + s.unit, leave.product(), lanes);
  }
}

template <class T, bool kSave>
FMK_NOINLINE void gru_cells(const BlockStep<T>& s, int64_t rows) {
  using V = Vec<T>;
  constexpr int W = V::W;
  const int lanes = s.lanes(0);
  const int64_t H = s.hidden_size;
  const Acc<T>* gates = s.gates;
  for (int64_t row = 0; row < rows; ++row, gates += 4 * W) {
    const V r = sigmoid(load(gates)), z = sigmoid(load(gates + W)), q = load(gates + 3 * W);
    const V n = tanh_by_expm1(fma(r, q, load(gates + 2 * W)));
    const V before = load_lanes(s.from + row * s.ld_h + s.unit, lanes);
    const V h = fma(z, before - n, n);
    if constexpr (kSave) {
      T* kept = s.gates_kept + s.saved_rows[row] * 4 * H + s.unit;
      store_lanes(kept, r, lanes);
      store_lanes(kept + H, z, lanes);
      store_lanes(kept + 2 * H, n, lanes);
      store_lanes(kept + 3 * H, q, lanes);
    }
    put_hidden(s.outputs[row] + s.unit, s.hidden + row * s.ld_h + s.unit, h, lanes);
  }
}

template <class T>
FMK_NOINLINE void rnn_cells(const BlockStep<T>& s, int64_t rows) {
  using V = Vec<T>;
  constexpr int W = V::W;
  const Acc<T>* gates = s.gates;
  for (int64_t row = 0; row < rows; ++row, gates += 2 * W)
    for (int vec = 0; vec < 2; ++vec) {
      const int lanes = s.lanes(vec);
      if (lanes == 0) break;
      const V x = load(gates + vec * W);
      const V h = s.relu ? max(zero<V>(), x) : tanh_by_expm1(x);
      const int64_t unit = s.unit + vec * W;
      put_hidden(s.outputs[row] + unit, s.hidden + row * s.ld_h + unit, h, lanes);
    }
}

// Mean and reciprocal standard deviation of n numbers that lie in vectors `step` apart.
template <class V>
struct Moments {
  typename V::Elem mean, scale;

  template <class Load>
  FMK_INLINE Moments of(const Load& vector, int64_t n, double eps) {
    constexpr int W = V::W;
    const int64_t vecs = ceil_div(n, W);
    V sum = zero<V>(), squares = zero<V>();
    for (int64_t i = 0; i < vecs; ++i) sum = sum + vector(i);
    const auto mean = reduce_add(sum) / static_cast<typename V::Elem>(n);
    typename V::Elem last[W];
    for (int64_t i = 0; i < vecs; ++i) {
      V centered = vector(i) - splat(mean);
      const int lanes = static_cast<int>(min_of<int64_t>(W, n - i * W));
      if (lanes < W) {  // what lies behind the last number does not count
        store(last, centered);
        centered = load(last, lanes);
      }
      squares = fma(centered, centered, squares);
    }
    const auto variance = reduce_add(squares) / static_cast<typename V::Elem>(n);
    return {mean, static_cast<typename V::Elem>(1 / __builtin_sqrt(variance + eps))};
  }
};

}  // namespace
}  // namespace fmk::FMK_ISA
