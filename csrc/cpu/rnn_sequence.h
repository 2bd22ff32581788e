// The forward pass over a sequence, as one thread runs it. A tile computes the pre-activations of
// one block of units (rnn_pack.h) for a few rows; they are finished from L1 and never written out,
// except for LSTM variants whose rows must be complete first (layer norm, projection).
#pragma once

#include <type_traits>

#include "core/team.h"
#include "cpu/rnn_cells.h"
#include "cpu/rnn_lstm_variant.h"
#include "cpu/rnn_pack.h"
#include "cpu/rnn_tile.h"

namespace fmk::FMK_ISA {
namespace {

// What the members of a team share, or an item has for itself.
template <class T>
struct SharedState {
  Acc<T>* c;              // [rows][ld_c]
  Operand<T>* hidden[2];  // [rows][ld_h] each, adjacent; the steps alternate
  int64_t ld_c, ld_h;

  // + W: rows a power of two apart would share L1 sets.
  FMK_INLINE SharedState of(const RnnShape& s, int64_t rows, Arena& arena) {
    constexpr int64_t W = Vec<T>::W, kBlock = 2 * W;
    SharedState state;
    state.ld_c = ceil_div(s.hidden_size, kBlock) * kBlock + W;
    state.ld_h = ceil_div(s.output_size, kBlock) * kBlock + W;
    state.c = arena.take<Acc<T>>(s.kind == RnnKind::kLstm ? rows * state.ld_c : 0);
    state.hidden[0] = arena.take<Operand<T>>(2 * rows * state.ld_h);
    state.hidden[1] = state.hidden[0] ? state.hidden[0] + rows * state.ld_h : nullptr;
    return state;
  }
};

// A direction of some rows, all steps: as an item by itself, or as a member of a team with a part
// of the units.
template <class T, class Blocks>
class SequenceRun {
 public:
  using M = Mac<T>;
  using V = Vec<T>;
  static constexpr int W = V::W;
  static constexpr int64_t kRow = PackedLayout<T, Blocks>::kRow;
  static constexpr bool kLstm = std::is_same_v<Blocks, LstmBlocks>;
  // Below this many rows the two halves of a panel are better read one after the other: the input's
  // part for several steps at once, which reads it that many times less often.
  static constexpr int64_t kFewRows = 16, kHoistedRows = 64;

  FMK_LAMBDA SequenceRun(const RnnForward& problem, const PackedLayout<T, Blocks>& packed_layout,
                         const char* packed_direction, int64_t direction, const ItemRows& item_rows)
      : p(problem),
        layout(packed_layout),
        packed(packed_direction),
        d(direction),
        rows(item_rows),
        variant_(kLstm && !is_plain(problem.shape, problem.variant)),
        hoisted_(item_rows.count < kFewRows || problem.variant.layer_norm) {}

  // As an item.
  void run() {
    Arena sizes{nullptr};
    shared_ = SharedState<T>::of(p.shape, rows.count, sizes);
    plan(sizes);
    Arena arena{static_cast<char*>(scratch_bytes(Scratch::kTile, sizes.used))};
    shared_ = SharedState<T>::of(p.shape, rows.count, arena);
    plan(arena);
    begin(shared_);
    sequence(nullptr);
  }

  // As member `index` of a team whose state begin() has prepared.
  void run_in(Team& team, int index, const SharedState<T>& state) {
    block0_ = layout.blocks * index / team.size();
    block1_ = layout.blocks * (index + 1) / team.size();
    member_ = index;
    members_ = team.size();
    shared_ = state;
    Arena sizes{nullptr};
    plan(sizes);
    Arena arena{static_cast<char*>(scratch_bytes(Scratch::kTile, sizes.used))};
    plan(arena);
    sequence(&team);
  }

  // The initial states, in both buffers: a row may enter late.
  void begin(const SharedState<T>& state) const {
    const int64_t H = p.shape.hidden_size;
    // What lies behind the last unit is multiplied by zero weights, so it must be finite.
    std::memset(static_cast<void*>(state.hidden[0]), 0,
                2 * rows.count * state.ld_h * sizeof(Operand<T>));
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t row = d * p.shape.batch + rows.index(i);
      for (Operand<T>* hidden : state.hidden) put_operand(row, hidden + i * state.ld_h);
      if constexpr (kLstm) {
        Acc<T>* c = state.c + i * state.ld_c;
        load_cell_row<T>(p.c0, p.wide_cell, row * H, H, c);
        for (int64_t j = H; j < state.ld_c; ++j) c[j] = 0;
      }
    }
  }

 private:
  const RnnForward& p;
  const PackedLayout<T, Blocks> layout;
  const char* packed;
  const int64_t d;
  const ItemRows rows;
  const bool variant_, hoisted_;
  int64_t block0_ = 0, block1_ = -1;
  int member_ = 0, members_ = 1;

  SharedState<T> shared_;
  EvenRows input_;      // [chunk][rows]
  Word<T>* converted_;  // [chunk][rows][ld_x()], unless the input is read in place
  Acc<T>* projected_;   // hoisted: [blocks][chunk * rows][kRow]
  Acc<T>* gates_;       // [blocks at a time][rows][kRow]
  T** outputs_;         // of the rows at a step
  T** cell_outputs_;
  int64_t* saved_rows_;
  // LSTM variants:
  VariantParameters<T> parameters_;
  Acc<T>*state_, *fresh_, *leave_, *gated_;  // h as rounded [rows][ld_h]; c~ and o of a row; o * A
  Operand<T>* to_project_;                   // [rows][ld_c]
  const Word<T>** project_rows_;
  Acc<T>* new_hidden_;  // [rows][ld_h]

  int64_t chunk() const {
    return hoisted_ ? max_of<int64_t>(
                          1, min_of(p.shape.steps, kHoistedRows / max_of<int64_t>(1, rows.count)))
                    : 1;
  }
  int64_t own_blocks() const { return (block1_ < 0 ? layout.blocks : block1_) - block0_; }
  // Tiles read rows that lie evenly apart, in a chunk of steps too.
  bool input_in_place() const {
    if (!kWordsInPlace<T> || p.shape.input_size % M::kPair != 0) return false;
    if (rows.count == 1) return true;
    return !rows.all.order &&
           (chunk() == 1 || (d == 0 && p.input_strides.step == rows.count * p.input_strides.row));
  }
  int64_t ld_x() const { return ceil_div(layout.x_words, int64_t{W}) * W + W; }
  bool projects() const { return p.shape.output_size != p.shape.hidden_size; }
  int64_t time(int64_t step) const { return d == 0 ? step : p.shape.steps - 1 - step; }
  const T* recurrent_mask(int64_t row) const {
    const auto* mask = static_cast<const T*>(p.variant.recurrent_mask);
    return mask ? mask + (d * p.shape.batch + rows.index(row)) * p.shape.output_size : nullptr;
  }

  // h0 of a (direction, batch) row as an operand, under the recurrent mask.
  void put_operand(int64_t row, Operand<T>* to) const {
    const int64_t P = p.shape.output_size;
    const auto* from = static_cast<const T*>(p.h0) + row * P;
    const auto* mask = static_cast<const T*>(p.variant.recurrent_mask);
    for (int64_t j = 0; j < P; j += W) {
      const int lanes = static_cast<int>(min_of<int64_t>(W, P - j));
      V h = load_lanes(from + j, lanes);
      if (mask) h = h * load_lanes(mask + row * P + j, lanes);
      store_lanes(to + j, h, lanes);
    }
  }

  void plan(Arena& arena) {
    if (block1_ < 0) block1_ = layout.blocks;
    const int64_t n = rows.count, span = chunk() * n;
    converted_ = arena.take<Word<T>>(input_in_place() ? 0 : span * ld_x());
    projected_ = arena.take<Acc<T>>(hoisted_ ? own_blocks() * span * kRow : 0);
    gates_ = arena.take<Acc<T>>((variant_ ? layout.blocks : 1) * n * kRow);
    outputs_ = arena.take<T*>(n);
    cell_outputs_ = arena.take<T*>(n);
    saved_rows_ = arena.take<int64_t>(n);
    if (!variant_) return;
    parameters_ = VariantParameters<T>::of(p.shape, p.weights[d], p.variant.layer_norm, arena);
    state_ = arena.take<Acc<T>>(n * shared_.ld_h);
    fresh_ = arena.take<Acc<T>>(shared_.ld_c);
    leave_ = arena.take<Acc<T>>(shared_.ld_c);
    gated_ = arena.take<Acc<T>>(shared_.ld_c);
    to_project_ = arena.take<Operand<T>>(projects() ? n * shared_.ld_c : 0);
    project_rows_ = arena.take<const Word<T>*>(n);
    new_hidden_ = arena.take<Acc<T>>(projects() ? n * shared_.ld_h : 0);
  }

  void sequence(Team* team) {
    const int64_t steps = p.shape.steps, n = rows.count, span = chunk();
    if (variant_) prepare_variant();
    if (member_ == 0) finish_rows(rows.active(0), n, 0);  // sequences of no steps
    int side = 0;
    for (int64_t first = 0; first < steps; first += span) {
      const int64_t count = min_of(span, steps - first);
      point_at_inputs(first, count);
      if (hoisted_) project_inputs(first, count);
      for (int64_t i = 0; i < count; ++i, side ^= 1) {
        const int64_t step = first + i, t = time(step), active = rows.active(t);
        const int64_t next = step + 1 < steps ? rows.active(time(step + 1)) : 0;
        one_step(t, i, active, side);
        zero_outputs(t, active);
        if (team) team->barrier();
        if (member_ == 0) finish_rows(next, active, side ^ 1);
        // Side by side with the next step: that one writes the other buffer, and c of rows that go
        // on.
      }
    }
  }

  // Final states of rows [begin, end), which take part in no further step.
  void finish_rows(int64_t begin, int64_t end, int side) {
    const int64_t H = p.shape.hidden_size, P = p.shape.output_size;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = d * p.shape.batch + rows.index(i);
      T* h_n = static_cast<T*>(p.h_n) + row * P;
      if (variant_)
        convert(state_ + i * shared_.ld_h, h_n, P);
      else
        convert(shared_.hidden[side] + i * shared_.ld_h, h_n, P);
      if constexpr (kLstm)
        store_cell_row<T>(shared_.c + i * shared_.ld_c, H, p.wide_cell, row * H, p.c_n);
    }
  }

  void zero_outputs(int64_t t, int64_t active) {
    for (int64_t i = active + member_; i < rows.count; i += members_) {
      std::memset(static_cast<void*>(output(t, i)), 0, p.shape.output_size * sizeof(T));
      if (p.cell_states)
        std::memset(static_cast<void*>(cell_output(t, i)), 0, p.shape.hidden_size * sizeof(T));
    }
  }
  T* output(int64_t t, int64_t i) const {
    return static_cast<T*>(p.output) + t * p.output_strides.step +
           rows.index(i) * p.output_strides.row + d * p.shape.output_size;
  }
  T* cell_output(int64_t t, int64_t i) const {
    return static_cast<T*>(p.cell_states) + t * p.cell_strides.step +
           rows.index(i) * p.cell_strides.row + d * p.shape.hidden_size;
  }

  const T* input_row(int64_t t, int64_t i) const {
    return static_cast<const T*>(p.input) + t * p.input_strides.step +
           rows.index(i) * p.input_strides.row;
  }
  void point_at_inputs(int64_t first, int64_t count) {
    constexpr auto kSize = static_cast<int64_t>(sizeof(T));
    if (input_in_place()) {
      const int64_t next_step = d == 0 ? p.input_strides.step : -p.input_strides.step;
      const int64_t next = rows.count == 1 ? next_step : p.input_strides.row;
      input_ = {reinterpret_cast<const char*>(input_row(time(first), 0)), next * kSize};
      return;
    }
    input_ = {reinterpret_cast<const char*>(converted_),
              ld_x() * static_cast<int64_t>(sizeof(Word<T>))};
    for (int64_t step = 0; step < count; ++step) {
      const int64_t t = time(first + step), active = rows.active(t);
      for (int64_t i = 0; i < active; ++i)
        pack_rows(input_row(t, i), 0, 1, p.shape.input_size,
                  converted_ + (step * rows.count + i) * ld_x());
    }
  }

  EvenRows hidden(int side) const {
    return {reinterpret_cast<const char*>(shared_.hidden[side]),
            shared_.ld_h * static_cast<int64_t>(sizeof(Operand<T>))};
  }
  // A block of units, and the one whose weights are read after its own.
  struct BlockPlace {
    int64_t block, next;
  };
  // The panel that is read after this one, from its word `first` on.
  template <int kPanel>
  const char* next_panel(BlockPlace at, int64_t first) const {
    constexpr int kNext = kPanel + 1 < Blocks::kPanels ? kPanel + 1 : 0;
    const int64_t own = kNext > 0 ? at.block : at.next;
    return reinterpret_cast<const char*>(layout.x_panel(packed, own, kNext) +
                                         first * Blocks::kWidth[kNext] * W);
  }

  // One panel of one block for rows [0, count) of the operands, a tile at a time.
  template <int kPanel, bool kChained>
  void panel_tiles(int64_t count, GateOperands<M> in, const char* next) const {
    constexpr int NV = Blocks::kWidth[kPanel];
    const auto tiles = RowTiles::of(count, NV);
    const int64_t row_words = in.parts[0].words + in.parts[1].words;
    in.ahead_step = 64 * (tiles.tiles > 1 ? 1 : NV);
    for (int64_t tile = 0; tile < tiles.tiles; ++tile) {
      const int64_t row = tiles.begin(tile);
      GateOperands<M> own = in;
      const char* ahead = next + row_words * tile * in.ahead_step;
      for (auto& part : own.parts) {
        part.rows.first += row * part.rows.bytes_apart;
        part.ahead = ahead;
        ahead += part.words * in.ahead_step;
      }
      if (own.init) own.init += row * own.ld_init;
      own.gates += row * own.ld_gates;
      run_gate_tile<M, NV, kChained>(tiles.rows(tile), own);
    }
  }

  // projected_ = bias + x W_ih^T for all rows of the chunk.
  void project_inputs(int64_t first, int64_t count) {
    for (int64_t block = block0_; block < block1_; ++block) {
      const BlockPlace at{block, block + 1 < block1_ ? block + 1 : block0_};
      project_panel<0>(at, count);
      if constexpr (Blocks::kPanels > 1) project_panel<1>(at, count);
    }
    if (!p.variant.layer_norm) return;
    for (int64_t step = 0; step < count; ++step) {
      const int64_t t = time(first + step), active = rows.active(t);
      for (int64_t i = 0; i < active; ++i) {
        const int64_t saved = saved_row(t, i), H = p.shape.hidden_size;
        VariantRow<T> row{};
        row.variant = &p.variant;
        row.parameters = &parameters_;
        row.hidden_size = H;
        row.block_step = chunk() * rows.count * kRow;
        row.normalise_input(
            projected_ + (step * rows.count + i) * kRow,
            p.normed_ih ? static_cast<T*>(p.normed_ih) + saved * 4 * H : nullptr,
            p.norm_scales ? static_cast<Acc<T>*>(p.norm_scales) + saved * 2 : nullptr);
      }
    }
  }
  template <int kPanel>
  void project_panel(BlockPlace at, int64_t count) {
    const int64_t block = at.block;
    GateOperands<M> in{};
    in.parts[0] = {input_, layout.x_words, layout.x_panel(packed, block, kPanel)};
    in.init = layout.bias(packed, block) + Blocks::x_position(kPanel) * W;
    in.gates = projected_ + (block - block0_) * chunk() * rows.count * kRow +
               Blocks::x_position(kPanel) * W;
    in.ld_gates = kRow;
    panel_tiles<kPanel, true>(count * rows.count, in, next_panel<kPanel>(at, 0));
  }

  // The pre-activations of a block for the active rows. `gates` receives them.
  template <int kPanel>
  void block_panel(BlockPlace at, int64_t index, int64_t active, int side, Acc<T>* gates) {
    const int64_t block = at.block;
    constexpr int kX = Blocks::x_position(kPanel), kH = Blocks::h_position(kPanel);
    GateOperands<M> in{};
    in.gates = gates + kH * W;
    in.ld_gates = kRow;
    in.parts[1] = {hidden(side), layout.h_words, layout.h_panel(packed, block, kPanel)};
    // The next panel's words of x are asked for by whichever product here is of x.
    const bool of_h = hoisted_ || kX != kH;
    const char* next = next_panel<kPanel>(at, of_h ? layout.x_words : 0);
    if (p.variant.layer_norm) return panel_tiles<kPanel, false>(active, in, next);
    in.init = layout.bias(packed, block) + kH * W;
    if (kX == kH && hoisted_) {
      in.init = projected_ + ((block - block0_) * chunk() + index) * rows.count * kRow + kX * W;
      in.ld_init = kRow;
    } else if (kX == kH) {
      in.parts[0] = {input_, layout.x_words, layout.x_panel(packed, block, kPanel)};
    }
    panel_tiles<kPanel, false>(active, in, next);
    if constexpr (kX != kH) {
      Acc<T>* to = gates + kX * W;
      if (hoisted_) {
        const Acc<T>* from =
            projected_ + ((block - block0_) * chunk() + index) * rows.count * kRow + kX * W;
        for (int64_t i = 0; i < active; ++i) store(to + i * kRow, load(from + i * kRow));
      } else {
        GateOperands<M> x{};
        x.parts[0] = {input_, layout.x_words, layout.x_panel(packed, block, kPanel)};
        x.init = layout.bias(packed, block) + kX * W;
        x.gates = to;
        x.ld_gates = kRow;
        panel_tiles<kPanel, false>(active, x, next_panel<kPanel>(at, 0));
      }
    }
  }

  int64_t saved_row(int64_t t, int64_t i) const {
    return (d * p.shape.steps + t) * p.shape.batch + rows.index(i);
  }

  void one_step(int64_t t, int64_t index, int64_t active, int side) {
    if (active == 0) return;
    for (int64_t i = 0; i < active; ++i) {
      outputs_[i] = output(t, i);
      saved_rows_[i] = saved_row(t, i);
      if (p.cell_states) cell_outputs_[i] = cell_output(t, i);
    }
    // Every other step goes through the blocks from their end: it begins with those weights that
    // the step before has left in the nearest caches.
    const int64_t step = side == 0 ? 1 : -1, first = side == 0 ? block0_ : block1_ - 1;
    for (int64_t i = 0; i < own_blocks(); ++i) {
      const int64_t block = first + i * step;
      const BlockPlace at{block, i + 1 < own_blocks() ? block + step : block};
      Acc<T>* gates = gates_ + (variant_ ? block * rows.count * kRow : 0);
      block_panel<0>(at, index, active, side, gates);
      if constexpr (Blocks::kPanels > 1) block_panel<1>(at, index, active, side, gates);
      if (!variant_) finish_block(block, active, side, gates);
    }
    if constexpr (kLstm) {
      if (variant_) finish_variant(index, active, side);
    }
  }

  void finish_block(int64_t block, int64_t active, int side, Acc<T>* gates) {
    BlockStep<T> s;
    s.gates = gates;
    s.unit = block * Blocks::kUnitVecs * W;
    s.hidden_size = p.shape.hidden_size;
    s.c = shared_.c;
    s.from = shared_.hidden[side];
    s.hidden = shared_.hidden[side ^ 1];
    s.ld_c = shared_.ld_c;
    s.ld_h = shared_.ld_h;
    s.outputs = outputs_;
    s.saved_rows = saved_rows_;
    s.gates_kept = static_cast<T*>(p.gates);
    s.cells_kept = static_cast<Acc<T>*>(p.cells);
    s.cell_outputs = p.cell_states ? cell_outputs_ : nullptr;
    s.relu = p.shape.kind == RnnKind::kRelu;
    finish_cells<T, Blocks>(s, active);
  }

  // --- LSTM variants ---

  void prepare_variant() {
    const int64_t P = p.shape.output_size;
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t row = d * p.shape.batch + rows.index(i);
      convert(static_cast<const T*>(p.h0) + row * P, state_ + i * shared_.ld_h, P);
      project_rows_[i] = reinterpret_cast<const Word<T>*>(to_project_ + i * shared_.ld_c);
    }
    if (projects())
      std::memset(static_cast<void*>(to_project_), 0,
                  rows.count * shared_.ld_c * sizeof(Operand<T>));
  }

  void finish_variant(int64_t index, int64_t active, int side) {
    const int64_t H = p.shape.hidden_size;
    const auto* zoneout_c = p.variant.zoneout_c;
    for (int64_t i = 0; i < active; ++i) {
      const int64_t saved = saved_rows_[i];
      VariantRow<T> row{};
      row.variant = &p.variant;
      row.parameters = &parameters_;
      row.hidden_size = H;
      row.block_step = rows.count * kRow;
      row.gates = gates_ + i * kRow;
      if (p.variant.layer_norm) {
        row.from_x = projected_ + (index * rows.count + i) * kRow;
        row.normed_kept = p.normed_hh ? static_cast<T*>(p.normed_hh) + saved * 4 * H : nullptr;
        row.scale_kept =
            p.norm_scales ? static_cast<Acc<T>*>(p.norm_scales) + saved * 2 + 1 : nullptr;
      }
      row.x_step = chunk() * rows.count * kRow;
      row.c = shared_.c + i * shared_.ld_c;
      row.keep_c = {zoneout_c ? zoneout_c + saved * H : nullptr,
                    static_cast<Acc<T>>(zoneout_c ? 0 : p.variant.zoneout)};
      row.fresh = fresh_;
      row.leave = leave_;
      row.gated = gated_;
      row.gates_kept = p.gates ? static_cast<T*>(p.gates) + saved * 4 * H : nullptr;
      row.cells_kept = p.cells ? static_cast<Acc<T>*>(p.cells) + saved * H : nullptr;
      row.cell_output = p.cell_states ? cell_outputs_[i] : nullptr;
      row.run();
      if (projects())
        convert(gated_, to_project_ + i * shared_.ld_c, H);
      else
        finish_hidden(i, gated_, side);
    }
    if (!projects()) return;
    project_hidden(active);
    for (int64_t i = 0; i < active; ++i) finish_hidden(i, new_hidden_ + i * shared_.ld_h, side);
  }

  // new_hidden_ = to_project_ W_hr^T.
  void project_hidden(int64_t active) {
    const int64_t words = words_of<T>(p.shape.hidden_size);
    const auto split = PanelSplit<V>::of(p.shape.output_size);
    for (int64_t panel = 0; panel < split.count; ++panel) {
      const int vecs = split.width_vecs(panel);
      const auto tiles = RowTiles::of(active, vecs);
      for (int64_t tile = 0; tile < tiles.tiles; ++tile) {
        const int64_t row = tiles.begin(tile);
        TileOperands<M> in;
        in.rows = project_rows_ + row;
        in.words = words;
        in.b = layout.hr_panels(packed) + split.column(panel) * words;
        run_tile<M, false>(
            tiles.rows(tile), vecs, in,
            StoreAccumulators<V>{new_hidden_ + row * shared_.ld_h + split.column(panel),
                                 shared_.ld_h});
      }
    }
  }

  // The new hidden state of a row from h~: zoneout, rounding, output, the next step's operand.
  void finish_hidden(int64_t i, const Acc<T>* fresh, int side) {
    const int64_t P = p.shape.output_size;
    const bool* zoneout_h = p.variant.zoneout_h;
    const Keep<T> keep{zoneout_h ? zoneout_h + saved_rows_[i] * P : nullptr,
                       static_cast<Acc<T>>(zoneout_h ? 0 : p.variant.zoneout)};
    const T* mask = recurrent_mask(i);
    Acc<T>* state = state_ + i * shared_.ld_h;
    Operand<T>* operand = shared_.hidden[side ^ 1] + i * shared_.ld_h;
    for (int64_t j = 0; j < P; j += W) {
      const int lanes = static_cast<int>(min_of<int64_t>(W, P - j));
      V h = load(fresh + j);
      if (keep.any()) h = keep.mix(j, lanes, load(state + j), h);
      store_lanes(outputs_[i] + j, h, lanes);
      if constexpr (!std::is_same_v<T, Acc<T>>) h = load_lanes(outputs_[i] + j, lanes);
      store_lanes(state + j, h, lanes);
      if (mask) h = h * load_lanes(mask + j, lanes);
      store_lanes(operand + j, h, lanes);
    }
  }
};

}  // namespace
}  // namespace fmk::FMK_ISA
