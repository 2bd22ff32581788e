// LSTM forward. Weights are packed with the gates interleaved: a panel holds, for one vector of
// hidden units, all words of the reduction over x and then over h, each word with the four gates
// side by side [word][4 gates][W units]. A tile then ends with i, f, g, o of the same units for its
// rows, and the cell is finished from L1; pre-activations are never written out.
#include <type_traits>

#include "cpu/rnn_internal.h"

namespace fmk::FMK_ISA {
namespace {

constexpr int kGates = 4;
constexpr int kGateTileRows = kTileRows[kGates];

// Where things lie in packed weights; per direction the biases, then the panels.
template <class T>
struct PackedLayout {
  static constexpr int W = Vec<T>::W;
  static constexpr int kWidth = kGates * W;
  int64_t units, x_words, h_words;  // units: vectors of hidden units

  FMK_INLINE PackedLayout of(const LstmShape& s) {
    return {ceil_div(s.hidden_size, W), words_of<T>(s.input_size), words_of<T>(s.hidden_size)};
  }
  int64_t panel_words() const { return (x_words + h_words) * kWidth; }
  size_t bias_bytes() const { return static_cast<size_t>(units) * kWidth * sizeof(Acc<T>); }
  size_t direction_bytes() const {
    return bias_bytes() + static_cast<size_t>(units * panel_words()) * sizeof(Word<T>);
  }
  const Acc<T>* bias(const void* direction, int64_t unit) const {
    return static_cast<const Acc<T>*>(direction) + unit * kWidth;
  }
  const Word<T>* x_panel(const void* direction, int64_t unit) const {
    const char* panels = static_cast<const char*>(direction) + bias_bytes();
    return reinterpret_cast<const Word<T>*>(panels) + unit * panel_words();
  }
  const Word<T>* h_panel(const void* direction, int64_t unit) const {
    return x_panel(direction, unit) + x_words * kWidth;
  }
};

// One gate's rows of a weight matrix [columns][k] into its quarter of a panel.
template <class T>
FMK_NOINLINE void pack_gate(const T* weight, int64_t k, int64_t columns, Word<T>* to) {
  constexpr int W = Vec<T>::W, kWidth = kGates * W;
  if constexpr (kWordsInPlace<T>) {
    pack_columns_into_panel(weight, k, k, columns, W, to, kWidth);
  } else {
    auto* wide = static_cast<Word<T>*>(
        scratch_bytes(Scratch::kRows, static_cast<size_t>(columns * k) * sizeof(Word<T>)));
    convert(weight, wide, columns * k);
    pack_columns_into_panel(wide, k, k, columns, W, to, kWidth);
  }
}

template <class T>
void pack_unit(const LstmShape& s, const LstmWeights& weights, const PackedLayout<T>& layout,
               int64_t unit, char* direction) {
  constexpr int W = Vec<T>::W;
  const int64_t first = unit * W, columns = min_of<int64_t>(W, s.hidden_size - first);
  auto* bias = const_cast<Acc<T>*>(layout.bias(direction, unit));
  auto* x_panel = const_cast<Word<T>*>(layout.x_panel(direction, unit));
  auto* h_panel = const_cast<Word<T>*>(layout.h_panel(direction, unit));
  const auto* b_ih = static_cast<const T*>(weights.b_ih);
  const auto* b_hh = static_cast<const T*>(weights.b_hh);
  for (int gate = 0; gate < kGates; ++gate) {
    const int64_t row = gate * s.hidden_size + first;
    pack_gate(static_cast<const T*>(weights.w_ih) + row * s.input_size, s.input_size, columns,
              x_panel + gate * W);
    pack_gate(static_cast<const T*>(weights.w_hh) + row * s.hidden_size, s.hidden_size, columns,
              h_panel + gate * W);
    for (int64_t j = 0; j < W; ++j)
      bias[gate * W + j] = b_ih && j < columns ? widen(b_ih[row + j]) + widen(b_hh[row + j]) : 0;
  }
}

template <class T>
void pack_typed(const LstmShape& s, const LstmWeights* weights, char* packed,
                const Parallel& pool) {
  const auto layout = PackedLayout<T>::of(s);
  const int64_t count = s.directions * layout.units;
  const bool serial = s.directions * layout.direction_bytes() < 128 * 1024;
  const int64_t shards = serial ? 1 : min_of<int64_t>(pool.threads, count);
  parallel_for(pool, shards, [&](int64_t shard) {
    for (int64_t i = count * shard / shards; i < count * (shard + 1) / shards; ++i) {
      const int64_t d = i / layout.units;
      pack_unit(s, weights[d], layout, i % layout.units, packed + d * layout.direction_bytes());
    }
  });
}

// gates[i][:] = init[i][:] + x_i * x panel + h_i * h panel, for the rows of one tile.
template <class M>
struct GateOperands {
  using Word = typename M::Word;
  struct Part {
    const Word* const* rows;
    int64_t words;
    const Word* panel;
  };
  Part parts[2];
  const typename M::V::Elem* init;  // [rows][ld_init]; ld_init 0 repeats one row
  int64_t ld_init;
  typename M::V::Elem* gates;  // [rows][4 * W]
};

template <class M, int MR>
FMK_NOINLINE void gate_tile(const GateOperands<M>& in) {
  using V = typename M::V;
  constexpr int64_t kWidth = kGates * V::W;
  V acc[kPartialSums<MR, kGates>][MR][kGates];
  clear_sums(acc);
  for (const auto& part : in.parts)
    if (part.words) accumulate_rows<M>(acc, part.rows, part.words, part.panel, kWidth);
  add_sums(acc, in.init, in.ld_init);
  StoreAccumulators<V>{in.gates, kWidth}.run(acc[0]);
}

template <class M, int MR = kGateTileRows>
FMK_INLINE void run_gate_tile(int rows, const GateOperands<M>& in) {
  if constexpr (MR > 1) {
    if (rows < MR) return run_gate_tile<M, MR - 1>(rows, in);
  }
  gate_tile<M, MR>(in);
}

// The cell for `rows` rows of one vector of units. All pointers are at the first row and unit.
template <class T>
struct CellStep {
  const Acc<T>* gates;  // [rows][4 * W] pre-activations
  int lanes;            // valid units
  Acc<T>* c;            // [rows][ld_state], updated
  Operand<T>* hidden;   // [rows][ld_state], the next step's operand
  int64_t ld_state;
  T* output;
  int64_t ld_output;
  T* saved_gates;  // null: not kept
  Acc<T>* saved_cells;
  int64_t hidden_size;  // of the saved rows: 4 * hidden_size gates, hidden_size cells
};

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

template <class T, bool kSave>
FMK_NOINLINE void finish_cells(CellStep<T> s, int rows) {
  using V = Vec<T>;
  constexpr int W = V::W;
  for (int row = 0; row < rows; ++row) {
    const V i = load(s.gates), f = load(s.gates + W), g = load(s.gates + 2 * W),
            o = load(s.gates + 3 * W);
    const V keep = sigmoid(f);
    const auto enter = SigmoidTimesTanh<V>::of(i, g);
    const V c = fma(keep, load(s.c), enter.product());
    const auto leave = SigmoidTimesTanh<V>::of(o, c);
    V h = leave.product();
    if constexpr (kSave) {
      store_lanes(s.saved_gates, enter.sigmoid_a(), s.lanes);
      store_lanes(s.saved_gates + s.hidden_size, keep, s.lanes);
      store_lanes(s.saved_gates + 2 * s.hidden_size, enter.tanh_b(), s.lanes);
      store_lanes(s.saved_gates + 3 * s.hidden_size, leave.sigmoid_a(), s.lanes);
      store_lanes(s.saved_cells, c, s.lanes);
      s.saved_gates += kGates * s.hidden_size;
      s.saved_cells += s.hidden_size;
    }
    store(s.c, c);
    store_lanes(s.output, h, s.lanes);
    if constexpr (!std::is_same_v<T, Operand<T>>) h = load(s.output, s.lanes);  // as rounded
    store_lanes(s.hidden, h, s.lanes);
    s.gates += kGates * W;
    s.c += s.ld_state;
    s.hidden += s.ld_state;
    s.output += s.ld_output;
  }
}

// One item of the work: a direction of a slice of the batch, all steps.
template <class T>
class SequenceRun {
 public:
  using M = Mac<T>;
  using V = Vec<T>;
  static constexpr int W = V::W, kWidth = kGates * W;
  // Below this many rows the two halves of a panel are better read one after the other: the input's
  // part for several steps at once, which reads it that many times less often.
  static constexpr int64_t kFewRows = 16, kHoistedRows = 64;

  // `packed` is the direction's.
  FMK_LAMBDA SequenceRun(const LstmForward& problem, const PackedLayout<T>& packed_layout,
                         const char* packed_direction, int64_t direction, int64_t first_row,
                         int64_t row_count)
      : p(problem),
        layout(packed_layout),
        packed(packed_direction),
        d(direction),
        row0(first_row),
        rows(row_count) {}

  void run() {
    const int64_t steps = p.shape.steps;
    const bool hoisted = rows < kFewRows && steps > 1;
    const int64_t chunk = hoisted ? min_of(steps, max_of<int64_t>(2, kHoistedRows / rows)) : 1;
    const int64_t ld = state_ld();

    Arena sizes{nullptr};
    plan(sizes, chunk, hoisted);
    Arena arena{static_cast<char*>(scratch_bytes(Scratch::kTile, sizes.used))};
    plan(arena, chunk, hoisted);

    const T* h0 = static_cast<const T*>(p.h0) + (d * p.shape.batch + row0) * hidden_size();
    const T* c0 = static_cast<const T*>(p.c0) + (d * p.shape.batch + row0) * hidden_size();
    // What lies behind the last unit is multiplied by zero weights, so it must be finite.
    std::memset(static_cast<void*>(hidden_[0]), 0, 2 * rows * ld * sizeof(Operand<T>));
    for (int64_t row = 0; row < rows; ++row) {
      widen_padded(c0 + row * hidden_size(), hidden_size(), ld, Acc<T>(0), c_ + row * ld);
      convert(h0 + row * hidden_size(), hidden_[0] + row * ld, hidden_size());
      for (int side = 0; side < 2; ++side)
        hidden_rows_[side * rows + row] =
            reinterpret_cast<const Word<T>*>(hidden_[0] + (side * rows + row) * ld);
    }

    int side = 0;
    for (int64_t first = 0; first < steps; first += chunk) {
      const int64_t count = min_of(chunk, steps - first);
      point_at_inputs(first, count);
      if (hoisted) project_inputs(count * rows);
      for (int64_t i = 0; i < count; ++i, side ^= 1) one_step(first + i, i, hoisted, side);
    }

    T* h_n = static_cast<T*>(p.h_n) + (d * p.shape.batch + row0) * hidden_size();
    T* c_n = static_cast<T*>(p.c_n) + (d * p.shape.batch + row0) * hidden_size();
    for (int64_t row = 0; row < rows; ++row) {
      convert(hidden_[side] + row * ld, h_n + row * hidden_size(), hidden_size());
      convert(c_ + row * ld, c_n + row * hidden_size(), hidden_size());
    }
  }

 private:
  const LstmForward& p;
  const PackedLayout<T> layout;
  const char* packed;
  const int64_t d, row0, rows;

  int64_t state_ld() const {
    return layout.units * W + W;  // + W: rows a power of two apart would share L1 sets
  }
  bool input_in_place() const { return kWordsInPlace<T> && p.shape.input_size % M::kPair == 0; }
  int64_t time(int64_t step) const { return d == 0 ? step : p.shape.steps - 1 - step; }
  int64_t hidden_size() const { return p.shape.hidden_size; }

  Acc<T>* c_;                    // [rows][ld]
  Operand<T>* hidden_[2];        // [rows][ld] each, adjacent; the steps alternate
  const Word<T>** hidden_rows_;  // [2][rows]
  const Word<T>** input_rows_;   // [chunk][rows]
  Acc<T>* gates_;                // [units][chunk * rows][4 * W] if hoisted, else one tile
  int64_t gates_ld_unit_;        // 0 if not hoisted
  Word<T>* converted_;           // [chunk][rows][x_words], unless the input is read in place

  void plan(Arena& arena, int64_t chunk, bool hoisted) {
    c_ = arena.take<Acc<T>>(rows * state_ld());
    hidden_[0] = arena.take<Operand<T>>(2 * rows * state_ld());
    hidden_[1] = hidden_[0] ? hidden_[0] + rows * state_ld() : nullptr;
    hidden_rows_ = arena.take<const Word<T>*>(2 * rows);
    input_rows_ = arena.take<const Word<T>*>(chunk * rows);
    gates_ld_unit_ = hoisted ? chunk * rows * kWidth : 0;
    gates_ = arena.take<Acc<T>>(hoisted ? layout.units * gates_ld_unit_ : kGateTileRows * kWidth);
    converted_ = arena.take<Word<T>>(input_in_place() ? 0 : chunk * rows * layout.x_words);
  }

  void point_at_inputs(int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t row = 0; row < rows; ++row) {
        const T* x = static_cast<const T*>(p.input) + time(first + i) * p.input_strides.step +
                     (row0 + row) * p.input_strides.row;
        const int64_t index = i * rows + row;
        if (input_in_place()) {
          input_rows_[index] = reinterpret_cast<const Word<T>*>(x);
        } else {
          Word<T>* copy = converted_ + index * layout.x_words;
          pack_rows(x, 0, 1, p.shape.input_size, copy);
          input_rows_[index] = copy;
        }
      }
  }

  // gates_ = bias + x W_ih^T for all rows of the chunk.
  void project_inputs(int64_t count) {
    const auto tiles = RowTiles::of(count, kGates);
    for (int64_t unit = 0; unit < layout.units; ++unit)
      for (int64_t t = 0; t < tiles.tiles; ++t) {
        const int64_t row = tiles.begin(t);
        GateOperands<M> in{};
        in.parts[0] = {input_rows_ + row, layout.x_words, layout.x_panel(packed, unit)};
        in.init = layout.bias(packed, unit);
        in.gates = gates_ + unit * gates_ld_unit_ + row * kWidth;
        run_gate_tile(tiles.rows(t), in);
      }
  }

  void one_step(int64_t step, int64_t index, bool hoisted, int side) {
    const int64_t t = time(step), ld = state_ld(), H = hidden_size();
    const int64_t batch = p.shape.batch, saved_row = (d * p.shape.steps + t) * batch + row0;
    T* output =
        static_cast<T*>(p.output) + t * p.output_strides.step + row0 * p.output_strides.row + d * H;
    const auto tiles = RowTiles::of(rows, kGates);
    for (int64_t unit = 0; unit < layout.units; ++unit)
      for (int64_t tile = 0; tile < tiles.tiles; ++tile) {
        const int64_t row = tiles.begin(tile), column = unit * W;
        GateOperands<M> in{};
        in.parts[1] = {hidden_rows_ + side * rows + row, layout.h_words,
                       layout.h_panel(packed, unit)};
        if (hoisted) {
          in.gates = gates_ + unit * gates_ld_unit_ + (index * rows + row) * kWidth;
          in.init = in.gates;
          in.ld_init = kWidth;
        } else {
          in.parts[0] = {input_rows_ + row, layout.x_words, layout.x_panel(packed, unit)};
          in.gates = gates_;
          in.init = layout.bias(packed, unit);
        }
        run_gate_tile(tiles.rows(tile), in);

        CellStep<T> cell;
        cell.gates = in.gates;
        cell.lanes = static_cast<int>(min_of<int64_t>(W, H - column));
        cell.c = c_ + row * ld + column;
        cell.hidden = hidden_[side ^ 1] + row * ld + column;
        cell.ld_state = ld;
        cell.output = output + row * p.output_strides.row + column;
        cell.ld_output = p.output_strides.row;
        cell.hidden_size = H;
        if (p.gates) {
          cell.saved_gates = static_cast<T*>(p.gates) + (saved_row + row) * kGates * H + column;
          cell.saved_cells = static_cast<Acc<T>*>(p.cells) + (saved_row + row) * H + column;
          finish_cells<T, true>(cell, tiles.rows(tile));
        } else {
          finish_cells<T, false>(cell, tiles.rows(tile));
        }
      }
  }
};

template <class T>
void forward_typed(const LstmForward& p, const Parallel& pool) {
  const auto layout = PackedLayout<T>::of(p.shape);
  const auto* packed = static_cast<const char*>(p.packed_weight);
  if (!packed) {
    auto* fresh = static_cast<char*>(
        scratch_bytes(Scratch::kCall, p.shape.directions * layout.direction_bytes()));
    pack_typed<T>(p.shape, p.weights, fresh, pool);
    packed = fresh;
  }
  const double flops = lstm_flops(p.shape);
  const auto items = SequenceItems::of(p.shape, flops, pool);
  for_each_item(items, flops, pool, [&](int64_t item) {
    const int64_t rows = items.rows(item), d = items.direction(item);
    if (rows == 0) return;
    SequenceRun<T> run(p, layout, packed + d * layout.direction_bytes(), d, items.first_row(item),
                       rows);
    run.run();
  });
}

void lstm_forward(const LstmForward& p, const Parallel& pool) {
  with_type(p.shape.dtype,
            [&](auto* type) { forward_typed<std::remove_pointer_t<decltype(type)>>(p, pool); });
}

size_t lstm_packed_bytes(const LstmShape& shape) {
  size_t bytes = 0;
  with_type(shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    bytes = shape.directions * PackedLayout<T>::of(shape).direction_bytes();
  });
  return bytes;
}

void lstm_pack_weight(const LstmShape& shape, const LstmWeights* weights, void* packed,
                      const Parallel& pool) {
  with_type(shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    pack_typed<T>(shape, weights, static_cast<char*>(packed), pool);
  });
}

}  // namespace

const RnnKernels& rnn_kernels() {
  static constexpr RnnKernels table{&lstm_forward, &lstm_backward, &lstm_backward_workspace,
                                    &lstm_packed_bytes, &lstm_pack_weight};
  return table;
}

}  // namespace fmk::FMK_ISA
