// The pointwise part of a forward step: from pre-activations to the next state.
#pragma once

#include <type_traits>

#include "cpu/rnn_internal.h"

namespace fmk::FMK_ISA {
namespace {

// n / d for finite d from 1 to 2^126, to 1 ulp: an approximate reciprocal, a step of Newton's for
// it and one for the quotient, in a third of the division's time.
FMK_INLINE VecF divide(VecF n, VecF d) {
#if defined(__AVX512F__)
  const VecF about = {_mm512_rcp14_ps(d.v)};
  const VecF reciprocal = fma(about, fnma(d, about, splat(1.0f)), about);
  const VecF quotient = n * reciprocal;
  return fma(fnma(quotient, d, n), reciprocal, quotient);
#else
  return n / d;
#endif
}
FMK_INLINE VecD divide(VecD n, VecD d) { return n / d; }

// e^x (or e^x - 1) of several vectors side by side, as exp and expm1 in vmath.h: each is one long
// chain, and the processor does not look far enough ahead to find the next one by itself.
template <bool kMinusOne, int N>
FMK_INLINE void exp_of_each(VecF (&x)[N]) {
  VecF n[N], r[N], q[N];
  FMK_FOR (i, N) x[i] = min(splat(89.0f), max(splat(-104.5f), x[i]));
  FMK_FOR (i, N) n[i] = round(x[i] * splat(0x1.715476p+0f));
  FMK_FOR (i, N) r[i] = fnma(n[i], splat(0x1.62e400p-1f), x[i]);
  FMK_FOR (i, N) r[i] = fnma(n[i], splat(0x1.7f7d1cp-20f), r[i]);
  FMK_FOR (i, N) q[i] = fma(splat(0x1.6a2430p-10f), r[i], splat(0x1.1239e4p-7f));
  FMK_FOR (i, N) q[i] = fma(q[i], r[i], splat(0x1.5558f2p-5f));
  FMK_FOR (i, N) q[i] = fma(q[i], r[i], splat(0x1.555492p-3f));
  FMK_FOR (i, N) q[i] = fma(q[i], r[i], splat(0x1.fffffcp-2f));
  FMK_FOR (i, N) q[i] = fma(q[i] * r[i], r[i], r[i]);
  if constexpr (kMinusOne) {
    FMK_FOR (i, N) n[i] = scale2(splat(1.0f), n[i] - splat(1.0f));
    FMK_FOR (i, N) q[i] = fma(q[i], n[i], n[i] - splat(0.5f));
    FMK_FOR (i, N) x[i] = q[i] + q[i];
  } else {
    FMK_FOR (i, N) x[i] = scale2(q[i] + splat(1.0f), n[i]);
  }
}
template <bool kMinusOne, int N>
FMK_INLINE void exp_of_each(VecD (&x)[N]) {
  FMK_FOR (i, N) x[i] = kMinusOne ? expm1(x[i]) : exp(x[i]);
}

// 1 + e^-x, of which sigmoid(x) is the reciprocal. x is cut where that is 2e-38 or, for a product
// with a tanh, whose term would overflow, 4e-21.
template <class V, int N>
FMK_INLINE void sigmoid_terms(V (&x)[N], const double (&cuts)[N]) {
  FMK_FOR (i, N) x[i] = zero<V>() - max(splat_as<V>(cuts[i]), x[i]);
  exp_of_each<false>(x);
  FMK_FOR (i, N) x[i] = splat_as<V>(1) + x[i];
}
constexpr double kCut = -87, kCutOfProduct = -47;

// e = e^2|x| - 1, of which tanh|x| is e / (2 + e). Where x is cut, tanh has rounded to 1.
template <class V, int N>
FMK_INLINE void tanh_terms(V (&x)[N]) {
  FMK_FOR (i, N) x[i] = min(splat_as<V>(20), abs(x[i])) * splat_as<V>(2);
  exp_of_each<true>(x);
}
// tanh(x), to 3 ulp; near 1, where its slope is made of the difference, to 0.7 ulp.
template <class V>
FMK_INLINE V tanh_of_term(V e, V x) {
  const V two = splat_as<V>(2);
  const auto large = less(two, e);
  const V quotient = divide(select(large, two, e), two + e);
  return copy_sign(select(large, splat_as<V>(1) - quotient, quotient), x);
}
template <class V>
FMK_INLINE V tanh_by_expm1(V x) {
  V term[1] = {x};
  tanh_terms(term);
  return tanh_of_term(term[0], x);
}

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
  Acc<T>* gates;  // [rows][positions * W] pre-activations; overwritten
  int64_t unit;   // the block's first
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

// Runs step(row, integral constant n) over rows in groups of n, four as long as there are.
template <class Step>
FMK_INLINE void for_row_groups(int64_t rows, const Step& step) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) step(row, std::integral_constant<int, 4>{});
  for (; row < rows; ++row) step(row, std::integral_constant<int, 1>{});
}

// Two passes: gates and cell states row by row, whose four exponentials fill the processor, then
// the output's tanh of several rows at once.
// |sigmoid(a) tanh(b)| = e / ((1 + e^-a) (2 + e)), e = e^2|b| - 1: one division for both.
template <class T, bool kSave>
FMK_NOINLINE void lstm_cells(const BlockStep<T>& s, int64_t rows) {
  using V = Vec<T>;
  constexpr int W = V::W, kRow = 4 * W;
  const V one = splat_as<V>(1), two = splat_as<V>(2);
  const int lanes = s.lanes(0);
  const int64_t H = s.hidden_size;
  for (int64_t row = 0; row < rows; ++row) {
    Acc<T>* gates = s.gates + row * kRow;
    V sigmoids[3] = {load(gates), load(gates + W), load(gates + 3 * W)};
    const V g = load(gates + 2 * W);
    V enter[1] = {g};
    sigmoid_terms(sigmoids, {kCutOfProduct, kCut, kCutOfProduct});
    tanh_terms(enter);
    Acc<T>* cell = s.c + row * s.ld_c + s.unit;
    const V keep = divide(one, sigmoids[1]);
    const V entering = copy_sign(divide(enter[0], sigmoids[0] * (two + enter[0])), g);
    const V c = fma(keep, load(cell), entering);
    if constexpr (kSave) {
      T* kept = s.gates_kept + s.saved_rows[row] * 4 * H + s.unit;
      store_lanes(kept, divide(one, sigmoids[0]), lanes);
      store_lanes(kept + H, keep, lanes);
      store_lanes(kept + 2 * H, tanh_of_term(enter[0], g), lanes);
      store_lanes(kept + 3 * H, divide(one, sigmoids[2]), lanes);
      store_lanes(s.cells_kept + s.saved_rows[row] * H + s.unit, c, lanes);
    }
    if (s.cell_outputs) store_lanes(s.cell_outputs[row] + s.unit, c, lanes);
    store(cell, c);
    store(gates, c);
    store(gates + W, sigmoids[2]);
  }
  for_row_groups(rows, [&](int64_t row, auto count) FMK_LAMBDA {
    constexpr int N = decltype(count)::value;
    const Acc<T>* gates = s.gates + row * kRow;
    V cells[N];
    FMK_FOR (i, N) cells[i] = load(gates + i * kRow);
    tanh_terms(cells);
    FMK_FOR (i, N) {
      const V leave = load(gates + i * kRow + W);
      const V h = copy_sign(divide(cells[i], leave * (two + cells[i])), load(gates + i * kRow));
      put_hidden(s.outputs[row + i] + s.unit, s.hidden + (row + i) * s.ld_h + s.unit, h, lanes);
    }
  });
}

template <class T, bool kSave>
FMK_NOINLINE void gru_cells(const BlockStep<T>& s, int64_t rows) {
  using V = Vec<T>;
  constexpr int W = V::W, kRow = 4 * W;
  const V one = splat_as<V>(1);
  const int lanes = s.lanes(0);
  const int64_t H = s.hidden_size;
  // As the LSTM's: first r and z, then the tanh of several rows at once.
  for (int64_t row = 0; row < rows; ++row) {
    Acc<T>* gates = s.gates + row * kRow;
    V sigmoids[2] = {load(gates), load(gates + W)};
    sigmoid_terms(sigmoids, {kCut, kCut});
    const V r = divide(one, sigmoids[0]), z = divide(one, sigmoids[1]), q = load(gates + 3 * W);
    if constexpr (kSave) {
      T* kept = s.gates_kept + s.saved_rows[row] * 4 * H + s.unit;
      store_lanes(kept, r, lanes);
      store_lanes(kept + H, z, lanes);
      store_lanes(kept + 3 * H, q, lanes);
    }
    store(gates, z);
    store(gates + W, fma(r, q, load(gates + 2 * W)));
  }
  for_row_groups(rows, [&](int64_t row, auto count) FMK_LAMBDA {
    constexpr int N = decltype(count)::value;
    const Acc<T>* gates = s.gates + row * kRow;
    V n[N];
    FMK_FOR (i, N) n[i] = load(gates + i * kRow + W);
    tanh_terms(n);
    FMK_FOR (i, N) {
      const V fresh = tanh_of_term(n[i], load(gates + i * kRow + W));
      if constexpr (kSave)
        store_lanes(s.gates_kept + s.saved_rows[row + i] * 4 * H + s.unit + 2 * H, fresh, lanes);
      const int64_t place = (row + i) * s.ld_h + s.unit;
      const V before = load_lanes(s.from + place, lanes);
      put_hidden(s.outputs[row + i] + s.unit, s.hidden + place,
                 fma(load(gates + i * kRow), before - fresh, fresh), lanes);
    }
  });
}

template <class T>
FMK_NOINLINE void rnn_cells(const BlockStep<T>& s, int64_t rows) {
  using V = Vec<T>;
  constexpr int W = V::W, kRow = 2 * W;
  for (int vec = 0; vec < 2; ++vec) {
    const int lanes = s.lanes(vec);
    const int64_t unit = s.unit + vec * W;
    if (lanes == 0) break;
    for_row_groups(rows, [&](int64_t row, auto count) FMK_LAMBDA {
      constexpr int N = decltype(count)::value;
      V h[N];
      FMK_FOR (i, N) h[i] = load(s.gates + (row + i) * kRow + vec * W);
      if (s.relu) {
        FMK_FOR (i, N) h[i] = max(zero<V>(), h[i]);
      } else {
        tanh_terms(h);
        FMK_FOR (i, N) h[i] = tanh_of_term(h[i], load(s.gates + (row + i) * kRow + vec * W));
      }
      FMK_FOR (i, N)
        put_hidden(s.outputs[row + i] + unit, s.hidden + (row + i) * s.ld_h + unit, h[i], lanes);
    });
  }
}

template <class T, class Blocks>
FMK_INLINE void finish_cells(const BlockStep<T>& s, int64_t rows) {
  if constexpr (Blocks::kGates == 4) {
    if (s.gates_kept)
      lstm_cells<T, true>(s, rows);
    else
      lstm_cells<T, false>(s, rows);
  } else if constexpr (Blocks::kGates == 3) {
    if (s.gates_kept)
      gru_cells<T, true>(s, rows);
    else
      gru_cells<T, false>(s, rows);
  } else {
    rnn_cells<T>(s, rows);
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
