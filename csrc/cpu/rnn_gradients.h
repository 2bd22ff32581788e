// The pointwise part of a backward step, one row at a time: from the gradients of the new states to
// those of the gates' pre-activations and of the old cell state.
#pragma once

#include "cpu/rnn_lstm_variant.h"

namespace fmk::FMK_ISA {
namespace {

// Where the sums over steps and rows of a direction lie: gradients of biases and of a variant's
// small parameters. Each is padded to whole vectors.
struct SumLayout {
  int64_t ld;     // of one gate
  int64_t gates;  // bias sums: LSTM i f g o; GRU r z n and n * r; RNN one
  int64_t peephole, norm_ih, norm_hh, norm_c, bias_c, size;

  FMK_INLINE SumLayout of(const RnnShape& s, const LstmVariant& v, int64_t width) {
    SumLayout l;
    l.ld = ceil_div(s.hidden_size, width) * width;
    l.gates = s.kind == RnnKind::kLstm || s.kind == RnnKind::kGru ? 4 : 1;
    int64_t next = l.gates;
    const auto place = [&](bool used, int64_t rows) FMK_LAMBDA {
      const int64_t here = next * l.ld;
      if (used) next += rows;
      return here;
    };
    l.peephole = place(v.peephole, 3);
    l.norm_ih = place(v.layer_norm, 4);
    l.norm_hh = place(v.layer_norm, 4);
    l.norm_c = place(v.layer_norm, 1);
    l.bias_c = place(v.layer_norm, 1);
    l.size = next * l.ld;
    return l;
  }
};

// What the rows' sums are: gradients of biases and of a variant's small parameters.
template <class T>
FMK_NOINLINE void write_sums(const RnnShape& s, const SumLayout& l, const Acc<T>* sums,
                             const RnnWeightGrads& out) {
  const int64_t H = s.hidden_size;
  const auto write = [&](int64_t from, int64_t rows, void* to) {
    for (int64_t row = 0; to && row < rows; ++row)
      convert(sums + from + row * l.ld, static_cast<T*>(to) + row * H, H);
  };
  const int gates = gates_of(s.kind);
  write(0, gates, out.b_ih);
  write(0, gates, out.b_hh);
  if (s.kind == RnnKind::kGru && out.b_hh) write(3 * l.ld, 1, static_cast<T*>(out.b_hh) + 2 * H);
  write(l.peephole, 3, out.peephole);
  write(l.norm_ih, 4, out.norm_ih);
  write(l.norm_hh, 4, out.norm_hh);
  write(l.norm_c, 1, out.norm_c);
  write(l.bias_c, 1, out.bias_c);
}

template <class V>
FMK_INLINE void add_to(typename V::Elem* sum, V x) {
  store(sum, load(sum) + x);
}

// One row of one step. Rows of the caller hold hidden_size numbers a gate, those of dG `gate_step`.
template <class T>
struct GradientRow {
  int64_t hidden_size, gate_step;
  int64_t first, last;        // the units to compute
  const Acc<T>* grad_hidden;  // of the new hidden state, grad_output included
  const T* gates;
  Operand<T>* grad_gates;
  Acc<T>* sums;
  int64_t ld_sums;
  // LSTM
  const Acc<T>*cells, *before;  // c of this step and the one before
  Acc<T>* grad_cell;            // carried on
  const T* grad_cell_output;    // or null
  // GRU, RNN
  const T *hidden, *hidden_before;
  Acc<T>* carried;  // GRU: what of grad_hidden goes on by itself
  bool relu;
};

template <class T>
FMK_NOINLINE void lstm_gradients(const GradientRow<T>& s) {
  using V = Vec<T>;
  constexpr int W = V::W;
  const V one = splat_as<V>(1);
  const int64_t H = s.hidden_size;
  for (int64_t j = s.first; j < s.last; j += W) {
    const int lanes = static_cast<int>(min_of<int64_t>(W, H - j));
    const V i = load_lanes(s.gates + j, lanes), f = load_lanes(s.gates + H + j, lanes),
            g = load_lanes(s.gates + 2 * H + j, lanes), o = load_lanes(s.gates + 3 * H + j, lanes);
    const V tanh_c = tanh_by_expm1(load_lanes(s.cells + j, lanes));
    const V dh = load_lanes(s.grad_hidden + j, lanes);
    V dc = load(s.grad_cell + j);
    if (s.grad_cell_output) dc = dc + load_lanes(s.grad_cell_output + j, lanes);
    dc = fma(dh * o, fnma(tanh_c, tanh_c, one), dc);
    store(s.grad_cell + j, dc * f);
    const V grads[4] = {dc * g * i * (one - i),
                        dc * load_lanes(s.before + j, lanes) * f * (one - f),
                        dc * i * fnma(g, g, one), dh * tanh_c * o * (one - o)};
    FMK_FOR (gate, 4) {
      store_lanes(s.grad_gates + gate * s.gate_step + j, grads[gate], lanes);
      add_to(s.sums + gate * s.ld_sums + j, grads[gate]);
    }
  }
}

// dG lies as n, r, z, n * r: the first three are those of W_ih x, the last three those of W_hh h.
template <class T>
FMK_NOINLINE void gru_gradients(const GradientRow<T>& s) {
  using V = Vec<T>;
  constexpr int W = V::W;
  const V one = splat_as<V>(1);
  const int64_t H = s.hidden_size;
  for (int64_t j = s.first; j < s.last; j += W) {
    const int lanes = static_cast<int>(min_of<int64_t>(W, H - j));
    const V r = load_lanes(s.gates + j, lanes), z = load_lanes(s.gates + H + j, lanes),
            n = load_lanes(s.gates + 2 * H + j, lanes), q = load_lanes(s.gates + 3 * H + j, lanes);
    const V dh = load_lanes(s.grad_hidden + j, lanes);
    const V before = load_lanes(s.hidden_before + j, lanes);
    const V dn = dh * (one - z) * fnma(n, n, one);
    const V dr = dn * q * r * (one - r), dz = dh * (before - n) * z * (one - z), dnr = dn * r;
    store(s.carried + j, dh * z);
    const V grads[4] = {dn, dr, dz, dnr};
    FMK_FOR (gate, 4) store_lanes(s.grad_gates + gate * s.gate_step + j, grads[gate], lanes);
    const V ordered[4] = {dr, dz, dn, dnr};
    FMK_FOR (gate, 4) add_to(s.sums + gate * s.ld_sums + j, ordered[gate]);
  }
}

template <class T>
FMK_NOINLINE void rnn_gradients(const GradientRow<T>& s) {
  using V = Vec<T>;
  constexpr int W = V::W;
  const V one = splat_as<V>(1);
  for (int64_t j = s.first; j < s.last; j += W) {
    const int lanes = static_cast<int>(min_of<int64_t>(W, s.hidden_size - j));
    const V h = load_lanes(s.hidden + j, lanes), dh = load_lanes(s.grad_hidden + j, lanes);
    const V grad = s.relu ? select(less(zero<V>(), h), dh, select(is_nan(h), dh, zero<V>()))
                          : dh * fnma(h, h, one);
    store_lanes(s.grad_gates + j, grad, lanes);
    add_to(s.sums + j, grad);
  }
}

// The gradient through N(v): (g - mean(g) - N(v) mean(g N(v))) * scale, over 4H gates that lie in
// rows `ld` apart.
template <class T>
struct NormGradient {
  using V = Vec<T>;
  int64_t hidden_size, ld;

  // grads (of the scaled norm) and gain in rows of ld, normed in rows of H.
  void run(const Acc<T>* grads, const Acc<T>* gain, const T* normed, Acc<T> scale, Acc<T>* sums,
           Operand<T>* to, int64_t gate_step) const {
    constexpr int W = V::W;
    const int64_t H = hidden_size;
    V sum = zero<V>(), along = zero<V>();
    for (int gate = 0; gate < 4; ++gate)
      for (int64_t j = 0; j < H; j += W) {
        const int lanes = static_cast<int>(min_of<int64_t>(W, H - j));
        const V g = load(grads + gate * ld + j), n = load_lanes(normed + gate * H + j, lanes);
        add_to(sums + gate * ld + j, g * n);
        const V scaled = g * load(gain + gate * ld + j);
        sum = sum + scaled;
        along = fma(scaled, n, along);
      }
    const auto count = static_cast<Acc<T>>(4 * H);
    const V mean = splat(reduce_add(sum) / count), slope = splat(reduce_add(along) / count);
    for (int gate = 0; gate < 4; ++gate)
      for (int64_t j = 0; j < H; j += W) {
        const int lanes = static_cast<int>(min_of<int64_t>(W, H - j));
        const V scaled = load(grads + gate * ld + j) * load(gain + gate * ld + j);
        const V n = load_lanes(normed + gate * H + j, lanes);
        store_lanes(to + gate * gate_step + j, (fnma(n, slope, scaled) - mean) * splat(scale),
                    lanes);
      }
  }
};

// One row of one step of an LSTM variant.
template <class T>
struct VariantGradientRow {
  using V = Vec<T>;
  static constexpr int W = V::W;

  const LstmVariant* variant;
  const VariantParameters<T>* parameters;
  SumLayout layout;
  GradientRow<T> row;  // grad_hidden is of o * A; grad_gates those of W_hh h
  Keep<T> keep_c;
  Operand<T>* grad_x;  // layer norm: the gradients of W_ih x, else null
  const T *normed_ih, *normed_hh;
  const Acc<T>* scales;                       // of the two norms
  Acc<T>*fresh, *squashed, *through, *grads;  // rows of layout.ld: c~, A, d A's argument; four: dG
  T* gated;                                   // projection: o * A for W_hr's gradient, or null

  void run() const {
    const VariantParameters<T>& p = *parameters;
    const auto act = variant->activation, gate_act = variant->recurrent_activation;
    const int64_t H = row.hidden_size, ld = layout.ld;
    squash();
    for (int64_t j = 0; j < H; j += W) {
      const int lanes = static_cast<int>(min_of<int64_t>(W, H - j));
      const V i = load_lanes(row.gates + j, lanes), f = load_lanes(row.gates + H + j, lanes),
              g = load_lanes(row.gates + 2 * H + j, lanes),
              o = load_lanes(row.gates + 3 * H + j, lanes);
      const V before = load_lanes(row.before + j, lanes), cell = load(fresh + j);
      const V dh = load_lanes(row.grad_hidden + j, lanes), a = load(squashed + j);
      V total = load(row.grad_cell + j);
      if (row.grad_cell_output) total = total + load_lanes(row.grad_cell_output + j, lanes);
      V stays = zero<V>(), goes = total;
      if (keep_c.any()) {
        stays = keep_c.mix(j, lanes, total, zero<V>());
        goes = keep_c.mix(j, lanes, zero<V>(), total);
      }
      const V grad_o = dh * a * gate_slope(gate_act, o);
      V dc = goes + load(through + j);
      if (p.peephole) dc = fma(grad_o, load(p.peephole + 2 * p.ld + j), dc);
      const V dg[4] = {dc * g * gate_slope(gate_act, i), dc * before * gate_slope(gate_act, f),
                       dc * i * gate_slope(act, g), grad_o};
      V carried = fma(dc, f, stays);
      if (p.peephole) {
        carried = fma(dg[0], load(p.peephole + j), carried);
        carried = fma(dg[1], load(p.peephole + p.ld + j), carried);
        Acc<T>* sums = row.sums + layout.peephole + j;
        add_to(sums, dg[0] * before);
        add_to(sums + ld, dg[1] * before);
        add_to(sums + 2 * ld, grad_o * cell);
      }
      store(row.grad_cell + j, carried);
      if (gated) store_lanes(gated + j, o * a, lanes);
      FMK_FOR (gate, 4) {
        add_to(row.sums + gate * row.ld_sums + j, dg[gate]);
        if (p.norm_ih)
          store(grads + gate * ld + j, dg[gate]);
        else
          store_lanes(row.grad_gates + gate * row.gate_step + j, dg[gate], lanes);
      }
    }
    if (!p.norm_ih) return;
    const NormGradient<T> norm{H, ld};
    norm.run(grads, p.norm_ih, normed_ih, scales[0], row.sums + layout.norm_ih, grad_x,
             row.gate_step);
    norm.run(grads, p.norm_hh, normed_hh, scales[1], row.sums + layout.norm_hh, row.grad_gates,
             row.gate_step);
  }

 private:
  // fresh = c~, squashed = A(N(c~)), through = the gradient that reaches c~ through it.
  void squash() const {
    const VariantParameters<T>& p = *parameters;
    const auto act = variant->activation;
    const int64_t H = row.hidden_size;
    for (int64_t j = 0; j < H; j += W) {
      const int lanes = static_cast<int>(min_of<int64_t>(W, H - j));
      V cell = load_lanes(row.cells + j, lanes);
      if (keep_c.any())  // what is saved is mixed
        cell = fma(load_lanes(row.gates + H + j, lanes), load_lanes(row.before + j, lanes),
                   load_lanes(row.gates + j, lanes) * load_lanes(row.gates + 2 * H + j, lanes));
      store(fresh + j, cell);
    }
    Moments<V> m{};
    if (p.norm_c)
      m = Moments<V>::of([&](int64_t i) FMK_LAMBDA { return load(fresh + i * W); }, H,
                         variant->norm_eps);
    V sum = zero<V>(), along = zero<V>();
    for (int64_t j = 0; j < H; j += W) {
      const int lanes = static_cast<int>(min_of<int64_t>(W, H - j));
      const V o = load_lanes(row.gates + 3 * H + j, lanes);
      const V dh = load_lanes(row.grad_hidden + j, lanes);
      V x = load(fresh + j), normed = x;
      if (p.norm_c) {
        normed = (x - splat(m.mean)) * splat(m.scale);
        x = normed * load(p.norm_c + j);
        if (p.bias_c) x = x + load(p.bias_c + j);
      }
      const V a = gate_activation(act, x);
      V grad = dh * o * gate_slope(act, a);
      store(squashed + j, a);
      if (p.norm_c) {
        add_to(row.sums + layout.norm_c + j, grad * normed);
        add_to(row.sums + layout.bias_c + j, grad);
        grad = grad * load(p.norm_c + j);
        sum = sum + grad;
        along = fma(grad, normed, along);
      }
      store(through + j, grad);
    }
    if (!p.norm_c) return;
    const auto count = static_cast<Acc<T>>(H);
    const V mean = splat(reduce_add(sum) / count), slope = splat(reduce_add(along) / count);
    for (int64_t j = 0; j < H; j += W) {
      const V normed = (load(fresh + j) - splat(m.mean)) * splat(m.scale);
      store(through + j, (fnma(normed, slope, load(through + j)) - mean) * splat(m.scale));
    }
  }
};

}  // namespace
}  // namespace fmk::FMK_ISA
