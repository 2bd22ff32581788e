// Backward pass of the recurrent layers. The time loop does only what depends on the step after: dh
// = grad_output + dG W_hh and the pointwise gradients of the gates' pre-activations dG, which it
// leaves for all steps in the work space. The weights' gradients are then single products over all
// steps and rows, and so is dX (rnn_products.cpp). Threads share the rows or, as in the forward
// pass, the units.
#include <type_traits>

#include "core/team.h"
#include "cpu/rnn_backward_internal.h"
#include "cpu/rnn_gradients.h"

namespace fmk::FMK_ISA {
namespace {

alignas(64) const char kZeros[kPanelVecs * 64] = {};

// A panel of a weight [rows][n] whose reduction runs over the columns of dG; `words` is the
// reduction length of a panel, of which this matrix fills its part from word `first` on.
template <class T>
void pack_mapped_panel(const T* matrix, int64_t n, const GateMap& map, int64_t panel, int64_t words,
                       int64_t first, Word<T>* packed) {
  using V = Vec<T>;
  const auto split = PanelSplit<V>::of(n);
  const int64_t column = split.column(panel), width = split.width_vecs(panel) * V::W;
  const auto row_at = [&](int64_t k) FMK_LAMBDA {
    const int64_t row = map.row(k);
    return row < 0 ? reinterpret_cast<const T*>(kZeros) : matrix + row * n + column;
  };
  pack_rows_at<T>(row_at, map.columns(), min_of(width, n - column), width,
                  packed + column * words + first * width);
}

template <class T>
void pack_weights(const RnnBackward& p, const BackwardWorkspace<T>& w, double flops,
                  const Parallel& pool) {
  const RnnShape& s = p.shape;
  const int64_t hh_words = words_of<T>(w.hh.columns()), ih_words = words_of<T>(w.ih.columns());
  const int64_t hh = PanelSplit<Vec<T>>::of(s.output_size).count;
  const int64_t ih = p.grad_input ? PanelSplit<Vec<T>>::of(s.input_size).count : 0;
  const int64_t hr = w.hr_words ? PanelSplit<Vec<T>>::of(s.hidden_size).count : 0;
  const int64_t count = s.directions * (hh + ih + hr);
  const int64_t shards = flops < kSerialFlops ? 1 : min_of<int64_t>(pool.threads, count);
  const GateMap projection{s.output_size, w.projected_step, 1, {0, 0, 0, 0}};
  parallel_for(pool, shards, [&](int64_t shard) {
    for (int64_t i = count * shard / shards; i < count * (shard + 1) / shards; ++i) {
      const int64_t d = i % s.directions, panel = i / s.directions;
      const RnnWeights& weights = p.weights[d];
      if (panel < hh)
        pack_mapped_panel(static_cast<const T*>(weights.w_hh), s.output_size, w.hh, panel, hh_words,
                          int64_t{0}, w.hh_panels + d * w.hh_words);
      else if (panel < hh + ih)
        pack_mapped_panel(static_cast<const T*>(weights.w_ih), s.input_size, w.ih, panel - hh,
                          s.directions * ih_words, d * ih_words, w.ih_panels);
      else
        pack_mapped_panel(static_cast<const T*>(weights.w_hr), s.hidden_size, projection,
                          panel - hh - ih, words_of<T>(w.projected_step), int64_t{0},
                          w.hr_panels + d * w.hr_words);
    }
  });
}

// Rows after which the sums over rows and steps so far are added to the total: one chain over all
// of them would carry a rounding error that grows with their number.
constexpr int64_t kRowsPerSum = 64;

// A direction of some rows, all steps, last first: as an item by itself, or as a member of a team
// with a part of the units.
template <class T>
class BackwardRun {
 public:
  using M = Mac<T>;
  using V = Vec<T>;
  static constexpr int W = V::W;

  FMK_LAMBDA BackwardRun(const RnnBackward& problem, const BackwardWorkspace<T>& workspace,
                         int64_t direction, const ItemRows& item_rows, const SumLayout& layout,
                         Acc<T>* sums)
      : p(problem),
        w(workspace),
        hidden_split(PanelSplit<V>::of(problem.shape.output_size)),
        unit_split(PanelSplit<V>::of(problem.shape.hidden_size)),
        d(direction),
        rows(item_rows),
        layout_(layout),
        sums_(sums),
        lstm_(problem.shape.kind == RnnKind::kLstm),
        variant_(lstm_ && !is_plain(problem.shape, problem.variant)),
        panel1_(hidden_split.count),
        unit1_(problem.shape.output_size) {}

  // As an item. The sums over steps and rows are added to `sums`.
  void run() { sequence(nullptr); }

  // As member `index` of a team.
  void run_in(Team& team, int index) {
    panel0_ = hidden_split.count * index / team.size();
    panel1_ = hidden_split.count * (index + 1) / team.size();
    unit0_ = hidden_split.column(panel0_);
    unit1_ = min_of(hidden_split.column(panel1_), p.shape.output_size);
    member_ = index;
    sequence(&team);
  }

 private:
  void sequence(Team* team) {
    Arena sizes{nullptr};
    plan(sizes);
    Arena arena{static_cast<char*>(scratch_bytes(Scratch::kTile, sizes.used))};
    plan(arena);
    begin();
    int64_t earlier_active = 0, earlier_time = 0, summed = 0;
    for (int64_t step = p.shape.steps - 1; step >= 0; --step) {
      const int64_t t = d == 0 ? step : p.shape.steps - 1 - step, active = rows.active(t);
      if (earlier_active) through_recurrence(earlier_time, earlier_active);
      one_step(t, active);
      summed += active;
      if (summed >= kRowsPerSum || step == 0) {
        add_recent_sums(team);
        summed = 0;
      }
      if (member_ == 0) clear_rest(t, active);
      if (team) team->barrier();  // the next step reads all of dG
      earlier_active = active;
      earlier_time = t;
    }
    if (earlier_active && p.grad_h0) through_recurrence(earlier_time, earlier_active);
    finish();
  }

  const RnnBackward& p;
  const BackwardWorkspace<T>& w;
  const PanelSplit<V> hidden_split, unit_split;
  const int64_t d;
  const ItemRows rows;
  const SumLayout layout_;
  Acc<T>* sums_;         // over all rows and steps
  Acc<T>* recent_sums_;  // over the last few
  const bool lstm_, variant_;
  // What a member computes: panels of the hidden state, and their units.
  int64_t panel0_ = 0, panel1_, unit0_ = 0, unit1_;
  int member_ = 0;

  Acc<T>* grad_hidden_;  // [rows][ld_p()]: of the state after the step, then before it
  Acc<T>* carried_;      // [rows][ld_p()]: what of it goes on past the gates; null if nothing does
  Acc<T>* grad_cell_;    // [rows][ld_h()]
  Acc<T>* first_cell_;   // c0, [rows][ld_h()]
  const Word<T>** operand_rows_;
  // LSTM variants:
  VariantParameters<T> parameters_;
  Acc<T>* grad_gated_;  // of o * A, [rows][ld_h()]; projection
  Acc<T>*fresh_, *squashed_, *through_, *grads_;

  int64_t ld_p() const { return hidden_split.padded_columns(); }
  int64_t ld_h() const { return unit_split.padded_columns(); }
  bool projects() const { return w.hr_words > 0; }
  bool carries() const {
    return p.shape.kind == RnnKind::kGru || p.variant.zoneout != 0 || p.variant.zoneout_h;
  }
  int64_t saved_row(int64_t t, int64_t i) const {
    return (d * p.shape.steps + t) * p.shape.batch + rows.index(i);
  }
  // dG (or the part of x) of step t for one row.
  Operand<T>* gradient_row(Operand<T>* gradients, int64_t t, int64_t i) const {
    return gradients + row_index(p, t, rows.index(i)) * w.row_length(p.shape) +
           d * w.gates * w.gate_step;
  }
  Operand<T>* projected_row(int64_t t, int64_t i) const {
    return w.grad_projected +
           (row_index(p, t, rows.index(i)) * p.shape.directions + d) * w.projected_step;
  }

  void plan(Arena& arena) {
    const int64_t n = rows.count;
    grad_hidden_ = arena.take<Acc<T>>(n * ld_p());
    carried_ = arena.take<Acc<T>>(carries() ? n * ld_p() : 0);
    grad_cell_ = arena.take<Acc<T>>(lstm_ ? n * ld_h() : 0);
    first_cell_ = arena.take<Acc<T>>(lstm_ ? n * ld_h() : 0);
    operand_rows_ = arena.take<const Word<T>*>(n);
    recent_sums_ = arena.take<Acc<T>>(layout_.size);
    if (!variant_) return;
    parameters_ = VariantParameters<T>::of(p.shape, p.weights[d], p.variant.layer_norm, arena);
    grad_gated_ = arena.take<Acc<T>>(projects() ? n * ld_h() : 0);
    fresh_ = arena.take<Acc<T>>(ld_h());
    squashed_ = arena.take<Acc<T>>(ld_h());
    through_ = arena.take<Acc<T>>(ld_h());
    grads_ = arena.take<Acc<T>>(4 * ld_h());
  }

  void begin() {
    const int64_t H = p.shape.hidden_size, P = p.shape.output_size;
    for (int64_t i = 0; i < layout_.size; ++i) recent_sums_[i] = 0;
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t row = d * p.shape.batch + rows.index(i);
      widen_padded(static_cast<const T*>(p.grad_h_n) + row * P, P, ld_p(), Acc<T>(0),
                   grad_hidden_ + i * ld_p());
      if (!lstm_) continue;
      for (Acc<T>* to : {grad_cell_ + i * ld_h(), first_cell_ + i * ld_h()})
        for (int64_t j = H; j < ld_h(); ++j) to[j] = 0;
      load_cell_row<T>(p.grad_c_n, p.wide_cell, row * H, H, grad_cell_ + i * ld_h());
      load_cell_row<T>(p.c0, p.wide_cell, row * H, H, first_cell_ + i * ld_h());
    }
  }

  void finish() {
    const int64_t H = p.shape.hidden_size, P = p.shape.output_size, count = unit1_ - unit0_;
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t row = d * p.shape.batch + rows.index(i);
      if (p.grad_h0)
        convert(grad_hidden_ + i * ld_p() + unit0_, static_cast<T*>(p.grad_h0) + row * P + unit0_,
                count);
      if (p.grad_c0)  // units of c are those of h, unless a projection lies between: no team then
        store_cell_row<T>(grad_cell_ + i * ld_h() + unit0_, projects() ? H : count, p.wide_cell,
                          row * H + unit0_, p.grad_c0);
    }
  }

  // A member of a team adds those of its own units.
  void add_recent_sums(const Team* team) {
    const int64_t first = team ? unit0_ : 0;
    const int64_t last = team ? min_of(layout_.ld, hidden_split.column(panel1_)) : layout_.ld;
    for (int64_t row = 0; row < layout_.size; row += layout_.ld)
      for (int64_t j = row + first; j < row + last; ++j) {
        sums_[j] += recent_sums_[j];
        recent_sums_[j] = 0;
      }
  }

  // The product of operand_rows_ and packed panels [first, last), for rows [0, count).
  void multiply(int64_t count, const PanelSplit<V>& split, int64_t first, int64_t last,
                int64_t words, const Word<T>* panels, const Acc<T>* init, Acc<T>* to) {
    const int64_t ld = split.padded_columns();
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t column = split.column(panel);
      const int vecs = split.width_vecs(panel);
      const auto tiles = RowTiles::of(count, vecs);
      for (int64_t tile = 0; tile < tiles.tiles; ++tile) {
        const int64_t row = tiles.begin(tile), place = row * ld + column;
        TileOperands<M> in;
        in.rows = operand_rows_ + row;
        in.words = words;
        in.b = panels + column * words;
        if (init) in.init = init + place, in.ld_init = ld;
        run_tile<M, false>(tiles.rows(tile), vecs, in, StoreAccumulators<V>{to + place, ld});
      }
    }
  }

  // grad_hidden_ becomes that of the state before step t, for the rows active there.
  void through_recurrence(int64_t t, int64_t active) {
    const auto* mask = static_cast<const T*>(p.variant.recurrent_mask);
    const int64_t P = p.shape.output_size;
    for (int64_t i = 0; i < active; ++i)
      operand_rows_[i] =
          reinterpret_cast<const Word<T>*>(gradient_row(w.grad_gates, t, i) + w.hh_first);
    multiply(active, hidden_split, panel0_, panel1_, words_of<T>(w.hh.columns()),
             w.hh_panels + d * w.hh_words, carries() && !mask ? carried_ : nullptr, grad_hidden_);
    if (!mask) return;
    for (int64_t i = 0; i < active; ++i) {
      const T* of_row = mask + (d * p.shape.batch + rows.index(i)) * P;
      for (int64_t j = 0; j < P; j += W) {
        Acc<T>* grad = grad_hidden_ + i * ld_p() + j;
        const int lanes = static_cast<int>(min_of<int64_t>(W, P - j));
        const V passed = load(grad) * load_lanes(of_row + j, lanes);
        store(grad, carries() ? passed + load(carried_ + i * ld_p() + j) : passed);
      }
    }
  }

  // Gradients of padding are zero: dX is computed from them.
  void clear_rest(int64_t t, int64_t active) {
    const size_t bytes = static_cast<size_t>(w.gates * w.gate_step) * sizeof(Operand<T>);
    for (int64_t i = active; i < rows.count; ++i) {
      std::memset(static_cast<void*>(gradient_row(w.grad_x, t, i)), 0, bytes);
      if (w.grad_x != w.grad_gates)
        std::memset(static_cast<void*>(gradient_row(w.grad_gates, t, i)), 0, bytes);
    }
  }

  void one_step(int64_t t, int64_t active) {
    const int64_t H = p.shape.hidden_size, P = p.shape.output_size, D = p.shape.directions;
    for (int64_t i = 0; i < active; ++i) {
      const T* grad_output =
          static_cast<const T*>(p.grad_output) + (row_index(p, t, rows.index(i)) * D + d) * P;
      Acc<T>* grad = grad_hidden_ + i * ld_p();
      for (int64_t j = unit0_; j < unit1_; j += W) {
        const int lanes = static_cast<int>(min_of<int64_t>(W, P - j));
        store(grad + j, load(grad + j) + load_lanes(grad_output + j, lanes));
      }
      if (variant_) pass_through_hidden(t, i);
    }
    if (projects()) {
      for (int64_t i = 0; i < active; ++i)
        operand_rows_[i] = reinterpret_cast<const Word<T>*>(projected_row(t, i));
      multiply(active, unit_split, 0, unit_split.count, words_of<T>(w.projected_step),
               w.hr_panels + d * w.hr_words, nullptr, grad_gated_);
    }
    for (int64_t i = 0; i < active; ++i) {
      const int64_t b = rows.index(i), saved = saved_row(t, i), before = time_before(p, d, t, b);
      GradientRow<T> g{};
      g.hidden_size = H;
      g.gate_step = w.gate_step;
      g.first = unit0_;
      g.last = unit1_;
      g.grad_hidden = projects() ? grad_gated_ + i * ld_h() : grad_hidden_ + i * ld_p();
      g.gates = static_cast<const T*>(p.gates) + saved * 4 * H;
      g.grad_gates = gradient_row(w.grad_gates, t, i);
      g.sums = recent_sums_;
      g.ld_sums = layout_.ld;
      if (unit1_ == P) clear_pads(g.grad_gates);
      if (lstm_) {
        const auto* cells = static_cast<const Acc<T>*>(p.cells);
        g.cells = cells + saved * H;
        g.before = before < 0 ? first_cell_ + i * ld_h() : cells + saved_row(before, i) * H;
        g.grad_cell = grad_cell_ + i * ld_h();
        if (p.grad_cells)
          g.grad_cell_output =
              static_cast<const T*>(p.grad_cells) + (row_index(p, t, b) * D + d) * H;
        if (variant_)
          variant_step(t, i, g);
        else
          lstm_gradients(g);
        continue;
      }
      g.hidden = static_cast<const T*>(p.output) + (row_index(p, t, b) * D + d) * P;
      g.hidden_before = hidden_before<T>(p, d, t, b);
      g.relu = p.shape.kind == RnnKind::kRelu;
      if (p.shape.kind == RnnKind::kGru) {
        g.carried = carried_ + i * ld_p();
        gru_gradients(g);
      } else {
        rnn_gradients(g);
      }
    }
  }

  // dG's columns between gates, which exist where pairs are read.
  void clear_pads(Operand<T>* grad_gates) const {
    for (int64_t j = p.shape.hidden_size; j < w.gate_step; ++j)
      for (int64_t gate = 0; gate < w.gates; ++gate)
        grad_gates[gate * w.gate_step + j] = Operand<T>{};
  }

  // From the gradient of h' to that of h~ (in grad_hidden_, or as W_hr's operand) and to what goes
  // on; and the hidden state as it met W_hh.
  void pass_through_hidden(int64_t t, int64_t i) {
    const int64_t P = p.shape.output_size, b = rows.index(i), D = p.shape.directions;
    const bool* zoneout_h = p.variant.zoneout_h;
    const Keep<T> keep{zoneout_h ? zoneout_h + saved_row(t, i) * P : nullptr,
                       static_cast<Acc<T>>(zoneout_h ? 0 : p.variant.zoneout)};
    const auto* mask = static_cast<const T*>(p.variant.recurrent_mask);
    const T* before = hidden_before<T>(p, d, t, b);
    Acc<T>* grad = grad_hidden_ + i * ld_p();
    for (int64_t j = 0; j < P; j += W) {
      const int lanes = static_cast<int>(min_of<int64_t>(W, P - j));
      V total = load(grad + j);
      if (keep.any()) {
        store(carried_ + i * ld_p() + j, keep.mix(j, lanes, total, zero<V>()));
        total = keep.mix(j, lanes, zero<V>(), total);
        store(grad + j, total);
      }
      if (projects()) store_lanes(projected_row(t, i) + j, total, lanes);
      if (mask)
        store_lanes(w.masked + (row_index(p, t, b) * D + d) * P + j,
                    load_lanes(before + j, lanes) *
                        load_lanes(mask + (d * p.shape.batch + b) * P + j, lanes),
                    lanes);
    }
    if (projects())
      for (int64_t j = P; j < w.projected_step; ++j) projected_row(t, i)[j] = Operand<T>{};
  }

  void variant_step(int64_t t, int64_t i, const GradientRow<T>& g) {
    const int64_t H = p.shape.hidden_size, saved = saved_row(t, i);
    const bool* zoneout_c = p.variant.zoneout_c;
    VariantGradientRow<T> v{};
    v.variant = &p.variant;
    v.parameters = &parameters_;
    v.layout = layout_;
    v.row = g;
    v.keep_c = {zoneout_c ? zoneout_c + saved * H : nullptr,
                static_cast<Acc<T>>(zoneout_c ? 0 : p.variant.zoneout)};
    if (p.variant.layer_norm) {
      v.grad_x = gradient_row(w.grad_x, t, i);
      clear_pads(v.grad_x);
      v.normed_ih = static_cast<const T*>(p.normed_ih) + saved * 4 * H;
      v.normed_hh = static_cast<const T*>(p.normed_hh) + saved * 4 * H;
      v.scales = static_cast<const Acc<T>*>(p.norm_scales) + saved * 2;
    }
    v.fresh = fresh_;
    v.squashed = squashed_;
    v.through = through_;
    v.grads = grads_;
    if (projects())
      v.gated = w.gated + (row_index(p, t, rows.index(i)) * p.shape.directions + d) * H;
    v.run();
  }
};

// All dG and the gradients of the initial states and of everything but the matrices.
template <class T>
void time_loop(const RnnBackward& p, const BackwardWorkspace<T>& w, double flops,
               const Parallel& pool) {
  void* memory =
      scratch_bytes(Scratch::kExtra, RowOrder::bytes(p.lengths, p.shape.batch, p.shape.steps) + 8);
  const auto order = RowOrder::of(p.lengths, p.shape.batch, p.shape.steps, memory);
  const int64_t panels = PanelSplit<Vec<T>>::of(p.shape.output_size).count;
  const bool in_a_team =
      flops >= kSerialFlops && panels >= pool.threads &&
      shares_units(p.shape, p.variant, pool.threads, w.hh_words * sizeof(Word<T>));
  const auto layout = SumLayout::of(p.shape, p.variant, Vec<T>::W);
  auto items = SequenceItems::of(p.shape, order, pool);
  if (in_a_team) items.slices = 1;
  const int64_t total = items.count() * layout.size;
  auto* sums = static_cast<Acc<T>*>(
      scratch_bytes(Scratch::kCall, static_cast<size_t>(total) * sizeof(Acc<T>)));
  for (int64_t i = 0; i < total; ++i) sums[i] = 0;
  if (in_a_team) {
    Team team(pool.threads);
    parallel_for(pool, pool.threads, [&](int64_t) {
      const int index = team.join();
      if (index >= 0) BackwardRun<T>(p, w, 0, items.rows(0), layout, sums).run_in(team, index);
    });
  } else {
    for_each_item(items, flops, pool, [&](int64_t item) {
      BackwardRun<T>(p, w, items.direction(item), items.rows(item), layout,
                     sums + item * layout.size)
          .run();
    });
  }
  for (int64_t d = 0; d < p.shape.directions; ++d) {
    Acc<T>* total_of = sums + d * items.slices * layout.size;
    for (int64_t slice = 1; slice < items.slices; ++slice)
      for (int64_t i = 0; i < layout.size; ++i) total_of[i] += total_of[slice * layout.size + i];
    write_sums<T>(p.shape, layout, total_of, p.grad_weights[d]);
  }
}

template <class T>
void backward_typed(const RnnBackward& p, const Parallel& pool) {
  Arena arena{static_cast<char*>(p.workspace)};
  const auto w = BackwardWorkspace<T>::of(p, arena);
  const double flops = rnn_flops(p.shape);
  int64_t rows = p.shape.steps * p.shape.batch;
  if (p.lengths) {
    const int64_t all = rows;
    rows = 0;
    for (int64_t row = 0; row < all; ++row)
      if (time_of(p, row) < p.lengths[batch_of(p, row)]) w.active_rows[rows++] = row;
  }
  pack_weights(p, w, flops, pool);
  time_loop(p, w, flops, pool);
  rnn_products(p, rows, pool);
}

}  // namespace

void rnn_backward(const RnnBackward& p, const Parallel& pool) {
  if (rnn_step_backward(p, pool)) return;
  with_type(p.shape.dtype,
            [&](auto* type) { backward_typed<std::remove_pointer_t<decltype(type)>>(p, pool); });
}

size_t rnn_backward_workspace(const RnnBackward& p) {
  Arena arena{nullptr};
  with_type(p.shape.dtype, [&](auto* type) {
    BackwardWorkspace<std::remove_pointer_t<decltype(type)>>::of(p, arena);
  });
  return arena.used;
}

}  // namespace fmk::FMK_ISA
