// The pointwise part of a step of the LSTM's variants, one row at a time: other activations,
// peepholes, layer norm, zoneout.
#pragma once

#include "cpu/rnn_cells.h"

namespace fmk::FMK_ISA {
namespace {

// What of an old value stays, lane by lane: a mask, or the same share everywhere.
template <class T>
struct Keep {
  const bool* mask;
  Acc<T> share;

  FMK_LAMBDA bool any() const { return mask || share != 0; }
  // The part that stays (1, 0 or the share) at position i.
  FMK_LAMBDA Vec<T> at(int64_t i, int lanes) const {
    using V = Vec<T>;
    if (!mask) return splat(share);
    Acc<T> values[V::W] = {};
    for (int j = 0; j < lanes; ++j) values[j] = mask[i + j] ? 1 : 0;
    return load(values);
  }
  // Exactly old or new where a mask says so, whatever the other one is.
  FMK_LAMBDA Vec<T> mix(int64_t i, int lanes, Vec<T> old, Vec<T> fresh) const {
    using V = Vec<T>;
    const V keep = at(i, lanes);
    if (mask) return select(less(zero<V>(), keep), old, fresh);
    return fma(keep, old - fresh, fresh);
  }
};

// One direction's small parameters, widened and padded to whole vectors of units; null where the
// layer has no such parameter. With layer norm `bias` is b_ih + b_hh.
template <class T>
struct VariantParameters {
  const Acc<T>*peephole, *norm_ih, *norm_hh, *norm_c, *bias, *bias_c;  // rows `ld` apart
  int64_t ld;

  FMK_INLINE VariantParameters of(const RnnShape& s, const RnnWeights& w, bool layer_norm,
                                  Arena& arena) {
    VariantParameters p{};
    p.ld = ceil_div(s.hidden_size, Vec<T>::W) * Vec<T>::W;
    p.peephole = widened(w.peephole, nullptr, 3, s.hidden_size, p.ld, arena);
    if (!layer_norm) return p;
    p.norm_ih = widened(w.norm_ih, nullptr, 4, s.hidden_size, p.ld, arena);
    p.norm_hh = widened(w.norm_hh, nullptr, 4, s.hidden_size, p.ld, arena);
    p.norm_c = widened(w.norm_c, nullptr, 1, s.hidden_size, p.ld, arena);
    p.bias = widened(w.b_ih, w.b_hh, 4, s.hidden_size, p.ld, arena);
    p.bias_c = widened(w.bias_c, nullptr, 1, s.hidden_size, p.ld, arena);
    return p;
  }

 private:
  FMK_INLINE const Acc<T>* widened(const void* from, const void* add, int64_t rows, int64_t n,
                                   int64_t ld, Arena& arena) {
    if (!from) return nullptr;
    Acc<T>* to = arena.take<Acc<T>>(rows * ld);
    if (!arena.base) return nullptr;
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = 0; i < ld; ++i) {
        Acc<T> value = 0;
        if (i < n) value = widen(static_cast<const T*>(from)[row * n + i]);
        if (i < n && add) value += widen(static_cast<const T*>(add)[row * n + i]);
        to[row * ld + i] = value;
      }
    return to;
  }
};

// One row of one step. Pre-activations lie in blocks of 4 * W, `block_step` apart, those of the
// input `x_step`.
template <class T>
struct VariantRow {
  const LstmVariant* variant;
  const VariantParameters<T>* parameters;
  int64_t hidden_size, block_step, x_step;
  const Acc<T>* gates;   // all of it, or with layer norm W_hh h as it is
  const Acc<T>* from_x;  // layer norm: norm_ih * N(W_ih x) + bias, else null
  Acc<T>* c;             // the cell state, updated
  Keep<T> keep_c;
  Acc<T>*fresh, *leave;         // rows of whole vectors: c~ and o
  Acc<T>* gated;                // result: o * A(c~)
  T *gates_kept, *normed_kept;  // [4H] or null
  Acc<T>* cells_kept;
  Acc<T>* scale_kept;  // of W_hh h's norm
  T* cell_output;      // or null

  void run() {
    using V = Vec<T>;
    constexpr int W = V::W;
    const VariantParameters<T>& p = *parameters;
    const auto act = variant->activation, gate_act = variant->recurrent_activation;
    const int64_t H = hidden_size, blocks = ceil_div(H, W);
    Moments<V> m{};
    if (from_x) {
      m = moments_of_gates();
      if (scale_kept) *scale_kept = m.scale;
    }
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t unit = block * W;
      const int lanes = static_cast<int>(min_of<int64_t>(W, H - unit));
      const Acc<T>* own = gates + block * block_step;
      V a[4];
      FMK_FOR (gate, 4) {
        a[gate] = load(own + gate * W);
        if (from_x) {
          const V normed = (a[gate] - splat(m.mean)) * splat(m.scale);
          if (normed_kept) store_lanes(normed_kept + gate * H + unit, normed, lanes);
          a[gate] = fma(normed, load(p.norm_hh + gate * p.ld + unit),
                        load(from_x + block * x_step + gate * W));
        }
      }
      const V before = load(c + unit);
      if (p.peephole) {
        a[0] = fma(load(p.peephole + unit), before, a[0]);
        a[1] = fma(load(p.peephole + p.ld + unit), before, a[1]);
      }
      const V i = gate_activation(gate_act, a[0]), f = gate_activation(gate_act, a[1]);
      const V g = gate_activation(act, a[2]);
      const V cell = fma(f, before, i * g);
      if (p.peephole) a[3] = fma(load(p.peephole + 2 * p.ld + unit), cell, a[3]);
      const V o = gate_activation(gate_act, a[3]);
      if (gates_kept) {
        store_lanes(gates_kept + unit, saved_gate<T>(gate_act, i), lanes);
        store_lanes(gates_kept + H + unit, saved_gate<T>(gate_act, f), lanes);
        store_lanes(gates_kept + 2 * H + unit, saved_gate<T>(act, g), lanes);
        store_lanes(gates_kept + 3 * H + unit, saved_gate<T>(gate_act, o), lanes);
      }
      if (p.norm_c) {
        store(fresh + unit, zero<V>());  // unused lanes do not count in the norm
        store_lanes(fresh + unit, cell, lanes);
        store(leave + unit, o);
      } else {
        store(gated + unit, o * gate_activation(act, cell));
      }
      const V mixed = keep_c.any() ? keep_c.mix(unit, lanes, before, cell) : cell;
      if (cells_kept) store_lanes(cells_kept + unit, mixed, lanes);
      if (cell_output) store_lanes(cell_output + unit, mixed, lanes);
      store(c + unit, mixed);
    }
    if (p.norm_c) normalise_cell();
  }

 private:
  FMK_LAMBDA Moments<Vec<T>> moments_of_gates() const {
    // The gates of the last block have unused lanes, each gate its own.
    using V = Vec<T>;
    constexpr int W = V::W;
    const int64_t H = hidden_size, blocks = ceil_div(H, W);
    using E = typename V::Elem;
    V sum = zero<V>();
    for (int64_t block = 0; block < blocks; ++block)  // unused lanes hold zeros
      FMK_FOR (gate, 4) sum = sum + load(gates + block * block_step + gate * W);
    const E mean = reduce_add(sum) / static_cast<E>(4 * H);
    V squares = zero<V>();
    E last[W];
    for (int64_t block = 0; block < blocks; ++block) {
      const int lanes = static_cast<int>(min_of<int64_t>(W, H - block * W));
      FMK_FOR (gate, 4) {
        V centered = load(gates + block * block_step + gate * W) - splat(mean);
        if (lanes < W) {
          store(last, centered);
          centered = load(last, lanes);
        }
        squares = fma(centered, centered, squares);
      }
    }
    const E variance = reduce_add(squares) / static_cast<E>(4 * H);
    return {mean, static_cast<E>(1 / __builtin_sqrt(variance + variant->norm_eps))};
  }

  void normalise_cell() {
    using V = Vec<T>;
    constexpr int W = V::W;
    const VariantParameters<T>& p = *parameters;
    const auto m = Moments<V>::of([&](int64_t i) FMK_LAMBDA { return load(fresh + i * W); },
                                  hidden_size, variant->norm_eps);
    for (int64_t unit = 0; unit < hidden_size; unit += W) {
      V x = (load(fresh + unit) - splat(m.mean)) * splat(m.scale) * load(p.norm_c + unit);
      if (p.bias_c) x = x + load(p.bias_c + unit);
      store(gated + unit, load(leave + unit) * gate_activation(variant->activation, x));
    }
  }

 public:
  // gates = norm_ih * N(gates) + bias, in place, for the part of x: the row's `gates` must be
  // writable.
  void normalise_input(Acc<T>* x, T* normed, Acc<T>* scale) {
    using V = Vec<T>;
    constexpr int W = V::W;
    const VariantParameters<T>& p = *parameters;
    gates = x;
    const auto m = moments_of_gates();
    if (scale) *scale = m.scale;
    for (int64_t unit = 0, block = 0; unit < hidden_size; unit += W, ++block) {
      const int lanes = static_cast<int>(min_of<int64_t>(W, hidden_size - unit));
      FMK_FOR (gate, 4) {
        Acc<T>* own = x + block * block_step + gate * W;
        const V value = (load(own) - splat(m.mean)) * splat(m.scale);
        if (normed) store_lanes(normed + gate * hidden_size + unit, value, lanes);
        V scaled = value * load(p.norm_ih + gate * p.ld + unit);
        if (p.bias) scaled = scaled + load(p.bias + gate * p.ld + unit);
        store(own, scaled);
      }
    }
  }
};

}  // namespace
}  // namespace fmk::FMK_ISA
