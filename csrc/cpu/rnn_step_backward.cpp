// Backward pass of a single step: dG is complete at once, and all products are plain ones, on
// weights that nobody packed.
#include <type_traits>

#include "cpu/gemm.h"
#include "cpu/rnn_gradients.h"

namespace fmk::FMK_ISA {
namespace {

template <class T>
class StepGradients {
 public:
  using V = Vec<T>;

  FMK_LAMBDA StepGradients(const RnnBackward& problem, const Parallel& threads)
      : p(problem),
        pool(threads),
        rows(problem.shape.batch),
        units(problem.shape.hidden_size),
        inputs(problem.shape.input_size),
        gru(problem.shape.kind == RnnKind::kGru),
        layout_(SumLayout::of(problem.shape, problem.variant, V::W)) {}

  void run() {
    Arena sizes{nullptr};
    plan(sizes);
    Arena arena{static_cast<char*>(scratch_bytes(Scratch::kCall, sizes.used))};
    plan(arena);
    // Sums of sums over a few rows: their rounding errors grow with an eighth of the batch.
    constexpr int64_t kGroup = 8;
    for (int64_t i = 0; i < layout_.size; ++i) sums_[i] = 0;
    for (int64_t first = 0; first < rows; first += kGroup) {
      for (int64_t i = 0; i < layout_.size; ++i) group_sums_[i] = 0;
      for (int64_t i = first; i < min_of(rows, first + kGroup); ++i) one_row(i);
      for (int64_t i = 0; i < layout_.size; ++i) sums_[i] += group_sums_[i];
    }
    write_sums<T>(p.shape, layout_, sums_, p.grad_weights[0]);
    const RnnWeights& weights = p.weights[0];
    const RnnWeightGrads& grads = p.grad_weights[0];
    // Columns of dG: GRU n, r, z, n * r, else as the rows of the weights.
    const int64_t gates = gates_of(p.shape.kind) * units, hidden = gru ? units : 0;
    const auto* h0 = static_cast<const T*>(p.h0);
    const auto* x = static_cast<const T*>(p.input);
    const auto* w_ih = static_cast<const T*>(weights.w_ih);
    const T* before = gru ? carried_ : nullptr;
    through(hidden, gates, static_cast<const T*>(weights.w_hh), units, before, p.grad_h0);
    of_weight(hidden, gates, h0, units, units, grads.w_hh, 0);
    if (!gru) {
      through(0, gates, w_ih, inputs, nullptr, p.grad_input);
      of_weight(0, gates, x, p.input_strides.row, inputs, grads.w_ih, 0);
      return;
    }
    const auto* sum = static_cast<const T*>(p.grad_input);
    through(units, 2 * units, w_ih, inputs, nullptr, p.grad_input);
    through(0, units, w_ih + 2 * units * inputs, inputs, sum, p.grad_input);
    of_weight(units, 2 * units, x, p.input_strides.row, inputs, grads.w_ih, 0);
    of_weight(0, units, x, p.input_strides.row, inputs, grads.w_ih, 2 * units);
  }

 private:
  const RnnBackward& p;
  const Parallel& pool;
  const int64_t rows, units, inputs;
  const bool gru;
  const SumLayout layout_;
  T* grad_gates_;              // dG: [rows][layout_.gates * units]
  T* carried_;                 // GRU: what of the gradient goes on past the gates, [rows][units]
  Acc<T>*sums_, *group_sums_;  // over all rows, and over a few
  Acc<T>*grad_hidden_, *grad_cell_, *first_cell_;  // of a row

  int64_t ld() const { return layout_.gates * units; }

  void plan(Arena& arena) {
    const int64_t padded = layout_.ld;
    grad_gates_ = arena.take<T>(rows * ld());
    carried_ = arena.take<T>(gru ? rows * units + V::W : 0);
    sums_ = arena.take<Acc<T>>(layout_.size);
    group_sums_ = arena.take<Acc<T>>(layout_.size);
    grad_hidden_ = arena.take<Acc<T>>(padded);
    grad_cell_ = arena.take<Acc<T>>(padded);
    first_cell_ = arena.take<Acc<T>>(padded);
  }

  void one_row(int64_t i) {
    const int64_t H = units, first = i * H;
    const auto *of_output = static_cast<const T*>(p.grad_output) + first,
               *of_state = static_cast<const T*>(p.grad_h_n) + first;
    for (int64_t j = 0; j < H; ++j) grad_hidden_[j] = of_output[j] + of_state[j];
    GradientRow<T> g{};
    g.hidden_size = g.gate_step = g.last = H;
    g.grad_hidden = grad_hidden_;
    g.gates = static_cast<const T*>(p.gates) + 4 * first;
    g.grad_gates = grad_gates_ + i * ld();
    g.sums = group_sums_;
    g.ld_sums = layout_.ld;
    if (p.shape.kind == RnnKind::kLstm) {
      for (Acc<T>* row : {grad_cell_, first_cell_})
        for (int64_t j = H; j < layout_.ld; ++j) row[j] = 0;
      load_cell_row<T>(p.grad_c_n, p.wide_cell, first, H, grad_cell_);
      load_cell_row<T>(p.c0, p.wide_cell, first, H, first_cell_);
      g.cells = static_cast<const Acc<T>*>(p.cells) + first;
      g.before = first_cell_;
      g.grad_cell = grad_cell_;
      if (p.grad_cells) g.grad_cell_output = static_cast<const T*>(p.grad_cells) + first;
      lstm_gradients(g);
      if (p.grad_c0) store_cell_row<T>(grad_cell_, H, p.wide_cell, first, p.grad_c0);
      return;
    }
    g.hidden = static_cast<const T*>(p.output) + first;
    g.hidden_before = static_cast<const T*>(p.h0) + first;
    g.relu = p.shape.kind == RnnKind::kRelu;
    g.carried = carried_ + first;  // rows are written in order, each past its end
    if (gru)
      gru_gradients(g);
    else
      rnn_gradients(g);
  }

  // to[rows][n] = add + dG[:, column : column + count] w.
  void through(int64_t column, int64_t count, const T* w, int64_t n, const T* add, void* to) const {
    if (!to) return;
    GemmProblem<T> g;
    g.m = rows;
    g.n = n;
    g.k = count;
    g.a = grad_gates_ + column;
    g.lda = ld();
    g.b = w;
    g.ldb = n;
    g.epilogue.out = static_cast<T*>(to);
    g.epilogue.ld_out = n;
    g.epilogue.residual = add;
    g.epilogue.ld_residual = n;
    gemm(g, pool);
  }

  // Rows [row, row + count) of to[][n] = dG[:, column : column + count]^T x.
  void of_weight(int64_t column, int64_t count, const T* x, int64_t ldx, int64_t n, void* to,
                 int64_t row) const {
    if (!to) return;
    GemmProblem<T> g;
    g.m = count;
    g.n = n;
    g.k = rows;
    g.a = grad_gates_ + column;
    g.lda = ld();
    g.a_reduction_major = true;
    g.b = x;
    g.ldb = ldx;
    g.epilogue.out = static_cast<T*>(to) + row * n;
    g.epilogue.ld_out = n;
    gemm(g, pool);
  }
};

}  // namespace

bool rnn_step_backward(const RnnBackward& p, const Parallel& pool) {
  if (p.shape.steps != 1 || p.shape.batch == 0 || p.shape.directions != 1 || p.lengths ||
      !is_plain(p.shape, p.variant))
    return false;
  bool done = true;
  with_type(p.shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (kWordsInPlace<T> && Mac<T>::kPair == 1)
      StepGradients<T>(p, pool).run();
    else
      done = false;
  });
  return done;
}

}  // namespace fmk::FMK_ISA
