#include "cpu/feed_forward.h"

#include <type_traits>

#include "cpu/dropout.h"
#include "cpu/linear_products.h"

namespace fmk::FMK_ISA {
namespace {

// What the steps of both passes know. In a paired product the gate's columns of a tile come first,
// and column numbers are those of the pair.
template <class T>
struct HiddenStep : TileStep<T> {
  Activation activation;
  bool gated;
  Dropout dropout;
  int64_t ld;  // hidden features

  // body(offset into a [rows][hidden] matrix, offset into the row of the tile, lanes, dropout's
  // factor) for each vector of a row of the tile.
  template <class Body>
  FMK_LAMBDA void for_row(int64_t row, int64_t column, int columns, const Body& body) const {
    using V = Vec<T>;
    alignas(64) Acc<T> factors[kPanelVecs * V::W];
    if (dropout.threshold) dropout_factors(dropout, row, column, columns, factors);
    for (int j = 0; j < columns; j += V::W) {
      const int lanes = min_of(V::W, columns - j);
      body(row * ld + column + j, j, lanes,
           dropout.threshold ? load_lanes(factors + j, lanes) : splat_as<V>(1));
    }
  }
};

template <class T>
struct ForwardStep : HiddenStep<T> {
  T *hidden, *preactivation, *gate_preactivation;
};

template <class T>
FMK_NOINLINE void finish_hidden(const TileStep<T>& step, const Acc<T>* z, int64_t ld_z, int64_t row,
                                int rows, int64_t column, int columns) {
  using V = Vec<T>;
  const auto& self = static_cast<const ForwardStep<T>&>(step);
  const int64_t up = self.gated ? ld_z / 2 : 0;
  if (self.gated) column /= 2;
  for (int i = 0; i < rows; ++i, z += ld_z)
    self.for_row(row + i, column, columns, [&](int64_t at, int j, int lanes, V factor) FMK_LAMBDA {
      const V first = load(z + j);
      V x = activate(self.activation, first);
      if (self.gated) {
        const V second = load(z + up + j);
        if (self.gate_preactivation) store_lanes(self.gate_preactivation + at, first, lanes);
        if (self.preactivation) store_lanes(self.preactivation + at, second, lanes);
        x = x * second;
      } else if (self.preactivation) {
        store_lanes(self.preactivation + at, first, lanes);
      }
      store_lanes(self.hidden + at, x * factor, lanes);
    });
}

template <class T>
struct BackwardStep : HiddenStep<T> {
  const T *saved, *gate_preactivation;  // saved: the pre-activation, or hidden itself for relu
  T *grad, *grad_gate;
};

// z: the gradient of hidden.
template <class T>
FMK_NOINLINE void backward_hidden(const TileStep<T>& step, const Acc<T>* z, int64_t ld_z,
                                  int64_t row, int rows, int64_t column, int columns) {
  using V = Vec<T>;
  const auto& self = static_cast<const BackwardStep<T>&>(step);
  for (int i = 0; i < rows; ++i, z += ld_z)
    self.for_row(row + i, column, columns, [&](int64_t at, int j, int lanes, V factor) FMK_LAMBDA {
      const V g = load(z + j) * factor;
      if (!self.gated) {
        const V slope = self.activation == Activation::kNone
                            ? splat_as<V>(1)
                            : activate_grad(self.activation, load_lanes(self.saved + at, lanes));
        return store_lanes(self.grad + at, g * slope, lanes);
      }
      const V gate = load_lanes(self.gate_preactivation + at, lanes);
      const V up = load_lanes(self.saved + at, lanes);
      store_lanes(self.grad + at, g * activate(self.activation, gate), lanes);
      store_lanes(self.grad_gate + at, g * up * activate_grad(self.activation, gate), lanes);
    });
}

template <class T, class Step>
FMK_INLINE void describe(Step& step, const FeedForwardShape& shape) {
  step.activation = shape.activation;
  step.gated = shape.gated;
  step.dropout = shape.dropout;
  step.ld = shape.hidden_features;
}

// Both biases in the order of the panels of a paired product: gate first.
template <class T>
const Acc<T>* paired_shift(const void* gate_bias, const void* bias, int64_t n) {
  using V = Vec<T>;
  if (!gate_bias && !bias) return nullptr;
  const auto split = PanelSplit<V>::paired(n);
  auto* shift =
      static_cast<Acc<T>*>(scratch_bytes(Scratch::kCall, split.padded_columns() * sizeof(Acc<T>)));
  for (int64_t panel = 0; panel < split.count; ++panel) {
    const int64_t part = split.width_vecs(panel) * V::W / 2, first = split.column(panel) / 2;
    const int64_t valid = min_of(part, n - first);
    Acc<T>* to = shift + 2 * first;
    const auto* gate = static_cast<const T*>(gate_bias);
    const auto* other = static_cast<const T*>(bias);
    widen_padded(gate ? gate + first : nullptr, valid, part, Acc<T>(0), to);
    widen_padded(other ? other + first : nullptr, valid, part, Acc<T>(0), to + part);
  }
  return shift;
}

template <class T>
void forward_typed(const FeedForwardForward& p, const Parallel& pool) {
  const FeedForwardShape& s = p.shape;
  auto first = weight_product<T>(p.input, s.rows, s.in_features, p.weight1, s.hidden_features,
                                 p.packed_weight1);
  writes_to(first, p.hidden);
  first.paired = s.gated;
  first.b_first = static_cast<const T*>(p.gate_weight);
  ForwardStep<T> step;
  if (s.gated || s.dropout.threshold) {
    step.run = &finish_hidden<T>;
    describe<T>(step, s);
    step.hidden = static_cast<T*>(p.hidden);
    step.preactivation = static_cast<T*>(p.preactivation);
    step.gate_preactivation = static_cast<T*>(p.gate_preactivation);
    first.epilogue.step = &step;
  } else {
    first.epilogue.preactivation = static_cast<T*>(p.preactivation);
    first.epilogue.activation = s.activation;
  }
  first.epilogue.shift = s.gated ? paired_shift<T>(p.gate_bias, p.bias1, s.hidden_features)
                                 : bias_shift<T>(p.bias1, s.hidden_features, Scratch::kCall);
  multiply(first, pool);

  auto second = weight_product<T>(p.hidden, s.rows, s.hidden_features, p.weight2, s.out_features,
                                  p.packed_weight2);
  writes_to(second, p.output);
  second.epilogue.shift = bias_shift<T>(p.bias2, s.out_features, Scratch::kCall);
  second.epilogue.residual = static_cast<const T*>(p.residual);
  second.epilogue.ld_residual = s.out_features;
  multiply(second, pool);
}

template <class T>
void parameter_gradients(const void* grad, int64_t rows, int64_t n, const void* x, int64_t k,
                         void* grad_weight, void* grad_bias, const Parallel& pool) {
  if (grad_weight) {
    auto product = weight_gradient<T>(grad, rows, n, x, k);
    writes_to(product, grad_weight);
    multiply(product, pool);
  }
  if (grad_bias)
    column_sums(static_cast<const T*>(grad), n, rows, n, static_cast<T*>(grad_bias), pool);
}

template <class T>
void backward_typed(const FeedForwardBackward& p, const Parallel& pool) {
  const FeedForwardShape& s = p.shape;
  const bool below =
      p.grad_input || p.grad_weight1 || p.grad_bias1 || p.grad_gate_weight || p.grad_gate_bias;
  if (below) {
    auto product =
        input_gradient<T>(p.grad_output, s.rows, s.out_features, p.weight2, s.hidden_features);
    writes_to(product, p.grad_hidden);
    const bool from_hidden = !s.gated && s.activation == Activation::kRelu;
    BackwardStep<T> step;
    step.run = &backward_hidden<T>;
    describe<T>(step, s);
    step.saved = static_cast<const T*>(from_hidden ? p.hidden : p.preactivation);
    step.gate_preactivation = static_cast<const T*>(p.gate_preactivation);
    step.grad = static_cast<T*>(p.grad_hidden);
    step.grad_gate = static_cast<T*>(p.grad_gate);
    if (s.gated || s.dropout.threshold || s.activation != Activation::kNone)
      product.epilogue.step = &step;
    multiply(product, pool);
  }
  if (p.grad_input) {
    auto product =
        input_gradient<T>(p.grad_hidden, s.rows, s.hidden_features, p.weight1, s.in_features);
    writes_to(product, p.grad_input);
    multiply(product, pool);
    if (s.gated) {
      auto through_gate =
          input_gradient<T>(p.grad_gate, s.rows, s.hidden_features, p.gate_weight, s.in_features);
      writes_to(through_gate, p.grad_input);
      // Each element is read by the tile that then writes it.
      through_gate.epilogue.residual = static_cast<const T*>(p.grad_input);
      through_gate.epilogue.ld_residual = s.in_features;
      multiply(through_gate, pool);
    }
  }
  parameter_gradients<T>(p.grad_hidden, s.rows, s.hidden_features, p.input, s.in_features,
                         p.grad_weight1, p.grad_bias1, pool);
  if (s.gated)
    parameter_gradients<T>(p.grad_gate, s.rows, s.hidden_features, p.input, s.in_features,
                           p.grad_gate_weight, p.grad_gate_bias, pool);
  parameter_gradients<T>(p.grad_output, s.rows, s.out_features, p.hidden, s.hidden_features,
                         p.grad_weight2, p.grad_bias2, pool);
}

template <class T>
void pack_typed(const T* weight1, const T* gate_weight, int64_t n, int64_t k, Word<T>* packed,
                const Parallel& pool) {
  using V = Vec<T>;
  const auto split = PanelSplit<V>::paired(n);
  parallel_for(pool, split.count, [&](int64_t panel) {
    const int64_t width = split.width_vecs(panel) * V::W, part = width / 2;
    const int64_t first = split.column(panel) / 2, valid = min_of(part, n - first);
    Word<T>* to = packed + split.column(panel) * words_of<T>(k);
    pack_columns_into_panel(gate_weight + first * k, k, k, valid, part, to, width);
    pack_columns_into_panel(weight1 + first * k, k, k, valid, part, to + part, width);
  });
}

void forward(const FeedForwardForward& p, const Parallel& pool) {
  with_type(p.shape.dtype,
            [&](auto* type) { forward_typed<std::remove_pointer_t<decltype(type)>>(p, pool); });
}

void backward(const FeedForwardBackward& p, const Parallel& pool) {
  with_type(p.shape.dtype,
            [&](auto* type) { backward_typed<std::remove_pointer_t<decltype(type)>>(p, pool); });
}

size_t packed_bytes(DType dtype, int64_t hidden_features, int64_t in_features) {
  size_t bytes = 0;
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto split = PanelSplit<Vec<T>>::paired(hidden_features);
    bytes =
        static_cast<size_t>(split.padded_columns() * words_of<T>(in_features)) * sizeof(Word<T>);
  });
  return bytes;
}

void pack_weight(DType dtype, const void* weight1, const void* gate_weight, int64_t n, int64_t k,
                 void* packed, const Parallel& pool) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    pack_typed(static_cast<const T*>(weight1), static_cast<const T*>(gate_weight), n, k,
               static_cast<Word<T>*>(packed), pool);
  });
}

}  // namespace

const FeedForwardKernels& feed_forward_kernels() {
  static constexpr FeedForwardKernels table{&forward, &backward, &packed_bytes, &pack_weight};
  return table;
}

}  // namespace fmk::FMK_ISA
