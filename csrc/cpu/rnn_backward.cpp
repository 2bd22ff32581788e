// LSTM backward. The time loop does only what depends on the step after: dh = grad_output + dG W_hh
// and the pointwise gradients of the gates' pre-activations dG, which it leaves for all steps in
// the work space. The weights' gradients are then single products over all steps and rows, dW_ih =
// dG^T X and dW_hh = dG^T H_prev, and so is dX = dG W_ih.
#include <type_traits>

#include "cpu/rnn_internal.h"
#include "cpu/rnn_weight_grad.h"

namespace fmk::FMK_ISA {
namespace {

// Panels of a plain [k][n] matrix; `words` is the reduction length of a panel, of which this matrix
// fills words_of(k) from word `first` on.
template <class T>
void pack_panel(const T* matrix, int64_t n, int64_t k, int64_t panel, int64_t words, int64_t first,
                Word<T>* packed) {
  using V = Vec<T>;
  const auto split = PanelSplit<V>::of(n);
  const int64_t column = split.column(panel), width = split.width_vecs(panel) * V::W;
  pack_rows_as_panel(matrix + column, n, k, min_of(width, n - column), width,
                     packed + column * words + first * width);
}

template <class T>
void pack_weights(const LstmBackward& p, const BackwardWorkspace<T>& w, double flops,
                  const Parallel& pool) {
  const LstmShape& s = p.shape;
  const int64_t gates = 4 * s.hidden_size, words = words_of<T>(gates);
  const int64_t hh = PanelSplit<Vec<T>>::of(s.hidden_size).count;
  const int64_t ih = p.grad_input ? PanelSplit<Vec<T>>::of(s.input_size).count : 0;
  const int64_t count = s.directions * (hh + ih);
  const int64_t shards = flops < kSerialFlops ? 1 : min_of<int64_t>(pool.threads, count);
  parallel_for(pool, shards, [&](int64_t shard) {
    for (int64_t i = count * shard / shards; i < count * (shard + 1) / shards; ++i) {
      const int64_t d = i % s.directions, panel = i / s.directions;
      if (panel < hh)
        pack_panel(static_cast<const T*>(p.weights[d].w_hh), s.hidden_size, gates, panel, words,
                   int64_t{0}, w.hh_panels + d * w.hh_direction_words);
      else
        pack_panel(static_cast<const T*>(p.weights[d].w_ih), s.input_size, gates, panel - hh,
                   s.directions * words, d * words, w.ih_panels);
    }
  });
}

// The pointwise part of a step for `rows` rows of `columns` units. All pointers are at the first of
// both.
template <class T>
struct GateGradients {
  const Acc<T>* grad_hidden;  // [rows][ld_grad_hidden]: what comes from the step after
  int64_t ld_grad_hidden;
  const T* grad_output;
  int64_t ld_output;
  const T* gates;        // [rows][4 * hidden_size]
  const Acc<T>* cells;   // [rows][hidden_size]
  const Acc<T>* before;  // the step before's cells, [rows][ld_before]
  int64_t ld_before;
  Acc<T>* grad_cell;  // [rows][ld_grad_cell], carried on
  int64_t ld_grad_cell;
  T* grad_gates;  // rows ld_grad_gates apart
  int64_t ld_grad_gates;
  Acc<T>* sums;  // [4][ld_grad_hidden]: added to
  int64_t hidden_size;
};

template <class T>
FMK_INLINE void prefetch_row(const T* p, int columns) {
  for (int j = 0; j < columns; j += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(p + j);
}

// Asks for what gate_gradients will read: these are short pieces of many rows, which the hardware
// does not foresee, and the matrix product before leaves the time to fetch them.
template <class T>
FMK_NOINLINE void prefetch(const GateGradients<T>& s, int rows, int columns) {
  for (int row = 0; row < rows; ++row) {
    for (int gate = 0; gate < 4; ++gate) {
      prefetch_row(s.gates + row * 4 * s.hidden_size + gate * s.hidden_size, columns);
      prefetch_row(s.grad_gates + row * s.ld_grad_gates + gate * s.hidden_size, columns);
    }
    prefetch_row(s.grad_output + row * s.ld_output, columns);
    prefetch_row(s.cells + row * s.hidden_size, columns);
    prefetch_row(s.before + row * s.ld_before, columns);
  }
}

template <class T>
FMK_NOINLINE void gate_gradients(GateGradients<T> s, int rows, int columns) {
  using V = Vec<T>;
  constexpr int W = V::W;
  const V one = splat_as<V>(1);
  const int64_t H = s.hidden_size;
  for (int row = 0; row < rows; ++row) {
    for (int j = 0; j < columns; j += W) {
      const int lanes = min_of(W, columns - j);
      const V i = load_lanes(s.gates + j, lanes), f = load_lanes(s.gates + H + j, lanes),
              g = load_lanes(s.gates + 2 * H + j, lanes),
              o = load_lanes(s.gates + 3 * H + j, lanes);
      const V tanh_c = tanh_by_expm1(load_lanes(s.cells + j, lanes));
      const V dh = load(s.grad_hidden + j) + load_lanes(s.grad_output + j, lanes);
      const V dc = fma(dh * o, fnma(tanh_c, tanh_c, one), load(s.grad_cell + j));
      store(s.grad_cell + j, dc * f);
      const V grads[4] = {dc * g * i * (one - i),
                          dc * load_lanes(s.before + j, lanes) * f * (one - f),
                          dc * i * fnma(g, g, one), dh * tanh_c * o * (one - o)};
      FMK_FOR (gate, 4) {
        store_lanes(s.grad_gates + gate * H + j, grads[gate], lanes);
        Acc<T>* sum = s.sums + gate * s.ld_grad_hidden + j;
        store(sum, load(sum) + grads[gate]);
      }
    }
    s.grad_hidden += s.ld_grad_hidden;
    s.grad_output += s.ld_output;
    s.gates += 4 * H;
    s.cells += H;
    s.before += s.ld_before;
    s.grad_cell += s.ld_grad_cell;
    s.grad_gates += s.ld_grad_gates;
  }
}

// One item of the work: a direction of a slice of the batch, all steps, last first.
template <class T>
class BackwardRun {
 public:
  using M = Mac<T>;
  using V = Vec<T>;
  static constexpr int W = V::W;

  FMK_LAMBDA BackwardRun(const LstmBackward& problem, const BackwardWorkspace<T>& workspace,
                         int64_t direction, int64_t first_row, int64_t row_count, Acc<T>* grad_bias)
      : p(problem),
        w(workspace),
        split(PanelSplit<V>::of(problem.shape.hidden_size)),
        d(direction),
        row0(first_row),
        rows(row_count),
        grad_bias_(grad_bias) {}

  // grad_bias [4][H] becomes the sum of dG over steps and rows.
  void run() {
    const int64_t H = p.shape.hidden_size, state = (d * p.shape.batch + row0) * H;
    Arena sizes{nullptr};
    plan(sizes);
    Arena arena{static_cast<char*>(scratch_bytes(Scratch::kTile, sizes.used))};
    plan(arena);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t from = state + row * H;
      widen_padded(static_cast<const T*>(p.grad_c_n) + from, H, ld(), Acc<T>(0),
                   grad_cell_ + row * ld());
      widen_padded(static_cast<const T*>(p.c0) + from, H, ld(), Acc<T>(0),
                   first_cell_ + row * ld());
    }
    for (int64_t i = 0; i < 4 * H; ++i) grad_bias_[i] = 0;
    for (int64_t step = p.shape.steps - 1; step >= 0; --step) one_step(step);
    if (p.grad_h0) grad_first_hidden(static_cast<T*>(p.grad_h0) + state);
    if (p.grad_c0)
      for (int64_t row = 0; row < rows; ++row)
        convert(grad_cell_ + row * ld(), static_cast<T*>(p.grad_c0) + state + row * H, H);
  }

 private:
  const LstmBackward& p;
  const BackwardWorkspace<T>& w;
  const PanelSplit<V> split;
  const int64_t d, row0, rows;
  Acc<T>* grad_bias_;

  Acc<T>* grad_cell_;          // [rows][ld()]
  Acc<T>* first_cell_;         // c0, [rows][ld()]
  Acc<T>* grad_hidden_;        // one tile
  Acc<T>* sums_;               // [4][panel width], over the rows of a step
  const Word<T>** next_rows_;  // dG of the step after

  int64_t ld() const { return split.padded_columns(); }
  int64_t time(int64_t step) const { return d == 0 ? step : p.shape.steps - 1 - step; }
  int64_t gate_row_length() const { return p.shape.directions * 4 * p.shape.hidden_size; }
  // dG of step t for one row.
  T* grad_gates(int64_t t, int64_t row) const {
    return w.grad_gates + row_index(p, t, row0 + row) * gate_row_length() +
           d * 4 * p.shape.hidden_size;
  }

  void plan(Arena& arena) {
    grad_cell_ = arena.take<Acc<T>>(rows * ld());
    first_cell_ = arena.take<Acc<T>>(rows * ld());
    grad_hidden_ = arena.take<Acc<T>>(kMaxTileElems<V>);
    sums_ = arena.take<Acc<T>>(4 * kPanelVecs * W);
    next_rows_ = arena.take<const Word<T>*>(rows);
  }

  void point_at_grad_gates(int64_t t) {
    for (int64_t row = 0; row < rows; ++row)
      next_rows_[row] = reinterpret_cast<const Word<T>*>(grad_gates(t, row));
  }

  // grad_hidden_ = dG W_hh for a tile, dG being what next_rows_ points at.
  void through_recurrence(int64_t panel, int64_t row, int tile_rows) {
    const int64_t words = words_of<T>(4 * p.shape.hidden_size);
    const int vecs = split.width_vecs(panel);
    TileOperands<M> in;
    in.rows = next_rows_ + row;
    in.words = words;
    in.b = w.hh_panels + d * w.hh_direction_words + split.column(panel) * words;
    run_tile<M, false>(tile_rows, vecs, in, StoreAccumulators<V>{grad_hidden_, vecs * W});
  }

  void one_step(int64_t step) {
    const LstmShape& s = p.shape;
    const int64_t H = s.hidden_size, t = time(step);
    const bool last = step == s.steps - 1;
    const int64_t saved = (d * s.steps + t) * s.batch + row0;
    const int64_t saved_before =
        step > 0 ? (d * s.steps + time(step - 1)) * s.batch + row0 : int64_t{0};
    const int64_t output_ld = s.directions * H * (p.batch_first ? s.steps : 1);
    const T* grad_output =
        static_cast<const T*>(p.grad_output) + row_index(p, t, row0) * s.directions * H + d * H;
    if (!last) point_at_grad_gates(time(step + 1));
    for (int64_t panel = 0; panel < split.count; ++panel) {
      const int64_t column = split.column(panel), width = split.width_vecs(panel) * W;
      const int64_t valid = min_of(width, H - column);
      const auto tiles = RowTiles::of(rows, split.width_vecs(panel));
      for (int64_t i = 0; i < 4 * width; ++i) sums_[i] = 0;
      for (int64_t tile = 0; tile < tiles.tiles; ++tile) {
        const int64_t row = tiles.begin(tile);
        const int tile_rows = tiles.rows(tile);
        GateGradients<T> g;
        g.grad_hidden = grad_hidden_;
        g.ld_grad_hidden = width;
        g.grad_output = grad_output + row * output_ld + column;
        g.ld_output = output_ld;
        g.gates = static_cast<const T*>(p.gates) + (saved + row) * 4 * H + column;
        g.cells = static_cast<const Acc<T>*>(p.cells) + (saved + row) * H + column;
        g.before = step > 0
                       ? static_cast<const Acc<T>*>(p.cells) + (saved_before + row) * H + column
                       : first_cell_ + row * ld() + column;
        g.ld_before = step > 0 ? H : ld();
        g.grad_cell = grad_cell_ + row * ld() + column;
        g.ld_grad_cell = ld();
        g.grad_gates = grad_gates(t, row) + column;
        g.ld_grad_gates = gate_row_length() * (p.batch_first ? s.steps : 1);
        g.sums = sums_;
        g.hidden_size = H;
        prefetch(g, tile_rows, static_cast<int>(valid));
        if (last) {
          const T* from =
              static_cast<const T*>(p.grad_h_n) + (d * s.batch + row0 + row) * H + column;
          for (int i = 0; i < tile_rows; ++i)
            widen_padded(from + i * H, valid, width, Acc<T>(0), grad_hidden_ + i * width);
        } else {
          through_recurrence(panel, row, tile_rows);
        }
        gate_gradients(g, tile_rows, static_cast<int>(valid));
      }
      for (int gate = 0; gate < 4; ++gate)
        for (int64_t i = 0; i < valid; ++i)
          grad_bias_[gate * H + column + i] += sums_[gate * width + i];
    }
  }

  void grad_first_hidden(T* grad_h0) {
    const int64_t H = p.shape.hidden_size;
    point_at_grad_gates(time(0));
    for (int64_t panel = 0; panel < split.count; ++panel) {
      const int64_t column = split.column(panel), width = split.width_vecs(panel) * W;
      const auto tiles = RowTiles::of(rows, split.width_vecs(panel));
      for (int64_t tile = 0; tile < tiles.tiles; ++tile) {
        through_recurrence(panel, tiles.begin(tile), tiles.rows(tile));
        for (int i = 0; i < tiles.rows(tile); ++i)
          convert(grad_hidden_ + i * width, grad_h0 + (tiles.begin(tile) + i) * H + column,
                  min_of(width, H - column));
      }
    }
  }
};

// All dG and the gradients of h0, c0 and the biases.
template <class T>
void time_loop(const LstmBackward& p, const BackwardWorkspace<T>& w, double flops,
               const Parallel& pool) {
  const int64_t gates = 4 * p.shape.hidden_size;
  const auto items = SequenceItems::of(p.shape, flops, pool);
  auto* grad_bias = static_cast<Acc<T>*>(
      scratch_bytes(Scratch::kCall, static_cast<size_t>(items.count() * gates) * sizeof(Acc<T>)));
  for_each_item(items, flops, pool, [&](int64_t item) {
    BackwardRun<T> run(p, w, items.direction(item), items.first_row(item), items.rows(item),
                       grad_bias + item * gates);
    run.run();
  });
  for (int64_t d = 0; d < p.shape.directions; ++d) {
    const LstmWeightGrads& grads = p.grad_weights[d];
    if (!grads.b_ih) continue;
    Acc<T>* total = grad_bias + d * items.slices * gates;
    for (int64_t slice = 1; slice < items.slices; ++slice)
      for (int64_t i = 0; i < gates; ++i) total[i] += total[slice * gates + i];
    convert(total, static_cast<T*>(grads.b_ih), gates);
    convert(total, static_cast<T*>(grads.b_hh), gates);
  }
}

template <class T>
void input_gradient(const LstmBackward& p, const BackwardWorkspace<T>& w, const Parallel& pool) {
  const LstmShape& s = p.shape;
  GemmProblem<T> g;
  g.m = s.steps * s.batch;
  g.n = s.input_size;
  g.k = s.directions * 4 * s.hidden_size;
  g.a = w.grad_gates;
  g.lda = g.k;
  g.packed_b = w.ih_panels;
  g.epilogue.out = static_cast<T*>(p.grad_input);
  g.epilogue.ld_out = s.input_size;
  gemm(g, pool);
}

template <class T>
void backward_typed(const LstmBackward& p, const Parallel& pool) {
  Arena arena{static_cast<char*>(p.workspace)};
  const auto w = BackwardWorkspace<T>::of(p, arena);
  const double flops = lstm_flops(p.shape);
  pack_weights(p, w, flops, pool);
  time_loop(p, w, flops, pool);
  if (p.grad_weights[0].w_hh) weight_gradients(p, w, flops, pool);
  if (p.grad_input) input_gradient(p, w, pool);
}

// Types that the micro-kernel does not read: the whole problem in float.
template <class T>
class Widened {
 public:
  // Lays the float problem out in the arena (which may only be counting).
  FMK_LAMBDA Widened(const LstmBackward& problem, Arena& arena) : p(problem), wide(problem) {
    const LstmShape& s = p.shape;
    const int64_t rows = s.steps * s.batch, H = s.hidden_size, D = s.directions;
    wide.shape.dtype = DType::kF32;
    wide.grad_output = arena.take<float>(rows * D * H);
    wide.output = arena.take<float>(rows * D * H);
    wide.input = arena.take<float>(rows * s.input_size);
    wide.input_strides = p.batch_first ? SequenceStrides{s.input_size, s.steps * s.input_size}
                                       : SequenceStrides{s.batch * s.input_size, s.input_size};
    wide.gates = arena.take<float>(rows * D * 4 * H);
    wide.grad_h_n = arena.take<float>(D * s.batch * H);
    wide.grad_c_n = arena.take<float>(D * s.batch * H);
    wide.h0 = arena.take<float>(D * s.batch * H);
    wide.c0 = arena.take<float>(D * s.batch * H);
    place(arena, rows * s.input_size, wide.grad_input);
    place(arena, D * s.batch * H, wide.grad_h0);
    place(arena, D * s.batch * H, wide.grad_c0);
    for (int64_t d = 0; d < D; ++d) {
      wide.weights[d].w_ih = arena.take<float>(4 * H * s.input_size);
      wide.weights[d].w_hh = arena.take<float>(4 * H * H);
      place(arena, 4 * H * s.input_size, wide.grad_weights[d].w_ih);
      place(arena, 4 * H * H, wide.grad_weights[d].w_hh);
      place(arena, 4 * H, wide.grad_weights[d].b_ih);
      place(arena, 4 * H, wide.grad_weights[d].b_hh);
    }
    wide.workspace = arena.base ? arena.base + arena.used : nullptr;
    BackwardWorkspace<float>::of(wide, arena);
  }

  void run(const Parallel& pool) const {
    const LstmShape& s = p.shape;
    const int64_t rows = s.steps * s.batch, H = s.hidden_size, D = s.directions;
    widen_all(p.grad_output, rows * D * H, wide.grad_output);
    widen_all(p.output, rows * D * H, wide.output);
    widen_all(p.gates, rows * D * 4 * H, wide.gates);
    widen_all(p.grad_h_n, D * s.batch * H, wide.grad_h_n);
    widen_all(p.grad_c_n, D * s.batch * H, wide.grad_c_n);
    widen_all(p.h0, D * s.batch * H, wide.h0);
    widen_all(p.c0, D * s.batch * H, wide.c0);
    for (int64_t t = 0; t < s.steps; ++t)
      for (int64_t b = 0; b < s.batch; ++b)
        widen_all(
            static_cast<const T*>(p.input) + t * p.input_strides.step + b * p.input_strides.row,
            s.input_size,
            static_cast<const float*>(wide.input) + row_index(p, t, b) * s.input_size);
    for (int64_t d = 0; d < D; ++d) {
      widen_all(p.weights[d].w_ih, 4 * H * s.input_size, wide.weights[d].w_ih);
      widen_all(p.weights[d].w_hh, 4 * H * H, wide.weights[d].w_hh);
    }
    backward_typed<float>(wide, pool);
    narrow_all(wide.grad_input, rows * s.input_size, p.grad_input);
    narrow_all(wide.grad_h0, D * s.batch * H, p.grad_h0);
    narrow_all(wide.grad_c0, D * s.batch * H, p.grad_c0);
    for (int64_t d = 0; d < D; ++d) {
      narrow_all(wide.grad_weights[d].w_ih, 4 * H * s.input_size, p.grad_weights[d].w_ih);
      narrow_all(wide.grad_weights[d].w_hh, 4 * H * H, p.grad_weights[d].w_hh);
      narrow_all(wide.grad_weights[d].b_ih, 4 * H, p.grad_weights[d].b_ih);
      narrow_all(wide.grad_weights[d].b_hh, 4 * H, p.grad_weights[d].b_hh);
    }
  }

 private:
  const LstmBackward& p;
  LstmBackward wide;

  // A gradient is wanted in float where it is wanted at all. Counting, the pointer only says so.
  FMK_LAMBDA void place(Arena& arena, int64_t count, void*& gradient) {
    if (!gradient) return;
    if (float* piece = arena.take<float>(count)) gradient = piece;
  }
  void widen_all(const void* from, int64_t n, const void* to) const {
    convert(static_cast<const T*>(from), static_cast<float*>(const_cast<void*>(to)), n);
  }
  void narrow_all(const void* from, int64_t n, void* to) const {
    if (to) convert(static_cast<const float*>(from), static_cast<T*>(to), n);
  }
};

}  // namespace

void lstm_backward(const LstmBackward& p, const Parallel& pool) {
  with_type(p.shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (kWordsInPlace<T>) {
      backward_typed<T>(p, pool);
    } else {
      Arena arena{static_cast<char*>(p.workspace)};
      Widened<T>(p, arena).run(pool);
    }
  });
}

size_t lstm_backward_workspace(const LstmBackward& p) {
  Arena arena{nullptr};
  with_type(p.shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (kWordsInPlace<T>)
      BackwardWorkspace<T>::of(p, arena);
    else
      Widened<T>(p, arena);
  });
  return arena.used;
}

}  // namespace fmk::FMK_ISA
