// Forward pass of a single step on weights that nobody packed. There is no second step for which
// packing would pay, so the weights are read once, where they lie: by dot products for a few rows,
// else as the row-major operand of the tile, whose panel is then the transposed input. Threads
// share the units.
#include <type_traits>

#include "cpu/dot_rows.h"
#include "cpu/rnn_cells.h"
#include "cpu/rnn_pack.h"
#include "cpu/rnn_tile.h"

namespace fmk::FMK_ISA {
namespace {

// to[c][r] = from[r][c] + shift[r] for a block of W x W.
template <class V>
FMK_NOINLINE void transpose_block(const typename V::Elem* from, int64_t ld,
                                  const typename V::Elem* shift, typename V::Elem* to,
                                  int64_t ld_to) {
#if defined(__AVX512F__)
  if constexpr (V::W == 16) {
    transpose_16x16(from, ld, to, ld_to);
    const V added = load(shift);
    for (int c = 0; c < V::W; ++c) store(to + c * ld_to, load(to + c * ld_to) + added);
    return;
  }
#endif
  for (int c = 0; c < V::W; ++c)
    for (int r = 0; r < V::W; ++r) to[c * ld_to + r] = from[r * ld + c] + shift[r];
}

// One step of a range of blocks of units (rnn_pack.h), for all rows.
template <class T, class Blocks>
class CellRun {
 public:
  using V = Vec<T>;
  using M = Mac<T>;
  static constexpr int W = V::W;
  static constexpr int64_t kRow = Blocks::kPositions * W;
  static constexpr int64_t kBlockUnits = Blocks::kUnitVecs * W;

  FMK_LAMBDA CellRun(const RnnForward& problem, int64_t first_block, int64_t last_block)
      : p(problem),
        weights(problem.weights[0]),
        rows(problem.shape.batch),
        units(problem.shape.hidden_size),
        block0(first_block),
        block1(last_block) {}

  void run() {
    Arena sizes{nullptr};
    plan(sizes);
    Arena arena{static_cast<char*>(scratch_bytes(Scratch::kTile, sizes.used))};
    plan(arena);
    for (int64_t i = 0; i < rows; ++i) {
      outputs_[i] = static_cast<T*>(p.output) + i * p.output_strides.row;
      if (p.cell_states) cell_outputs_[i] = static_cast<T*>(p.cell_states) + i * p.cell_strides.row;
      saved_rows_[i] = i;
    }
    if (rows > kDotRows<T>) transpose_operands();
    for (int64_t block = block0; block < block1; ++block) {
      if (rows > kDotRows<T>)
        by_tiles(block);
      else
        by_dot_products(block);
      finish(block);
    }
  }

 private:
  const RnnForward& p;
  const RnnWeights& weights;
  const int64_t rows, units, block0, block1;
  Acc<T>* gates_;       // [rows, to whole vectors][kRow] of a block
  Acc<T>* c_;           // [rows][W] of a block
  Acc<T>* transposed_;  // [W][tile columns]
  Word<T>*x_panels_, *h_panels_;
  T **outputs_, **cell_outputs_;
  int64_t* saved_rows_;

  static constexpr int kVecs = 2;  // of rows in a panel: the widest tile that run_gate_tile knows
  int64_t row_vecs() const { return ceil_div(rows, int64_t{W}); }

  void plan(Arena& arena) {
    const bool tiles = rows > kDotRows<T>;
    gates_ = arena.take<Acc<T>>(row_vecs() * W * kRow);
    c_ = arena.take<Acc<T>>(rows * W);
    transposed_ = arena.take<Acc<T>>(W * kVecs * W);
    x_panels_ = arena.take<Word<T>>(tiles ? row_vecs() * W * p.shape.input_size : 0);
    h_panels_ = arena.take<Word<T>>(tiles ? row_vecs() * W * p.shape.output_size : 0);
    outputs_ = arena.take<T*>(rows);
    cell_outputs_ = arena.take<T*>(rows);
    saved_rows_ = arena.take<int64_t>(rows);
  }

  // Which part of the step a position holds; GRU's third is of x alone, its fourth of h.
  static constexpr bool kGru = Blocks::kGates == 3;
  FMK_INLINE constexpr bool reads_x(int position) { return !kGru || position != 3; }
  FMK_INLINE constexpr bool reads_h(int position) { return !kGru || position != 2; }
  bool multiplies_h(int position) const { return reads_h(position) && !p.zero_state; }
  int64_t weight_row(int64_t block, int position) const {
    if (Blocks::kGates == 1) return block * kBlockUnits + position * W;
    return min_of(position, Blocks::kGates - 1) * units + block * W;
  }
  // Units of a position of a block; the second vector of an RNN's last block may have none.
  int64_t units_of(int64_t block, int position) const {
    const int64_t first = block * kBlockUnits + (Blocks::kGates == 1 ? position * W : 0);
    return max_of<int64_t>(0, min_of<int64_t>(W, units - first));
  }
  void bias_of(int64_t block, int position, Acc<T>* to) const {
    const int64_t row = weight_row(block, position), count = units_of(block, position);
    const auto *x = static_cast<const T*>(weights.b_ih), *h = static_cast<const T*>(weights.b_hh);
    for (int64_t j = 0; j < W; ++j) {
      to[j] = 0;
      if (!x || j >= count) continue;
      if (reads_x(position)) to[j] += x[row + j];
      if (reads_h(position)) to[j] += h[row + j];
    }
  }
  const T* input_row(int64_t i) const {
    return static_cast<const T*>(p.input) + i * p.input_strides.row;
  }
  const T* x_weight(int64_t row) const {
    return static_cast<const T*>(weights.w_ih) + row * p.shape.input_size;
  }
  const T* h_weight(int64_t row) const {
    return static_cast<const T*>(weights.w_hh) + row * p.shape.output_size;
  }

  void by_dot_products(int64_t block) {
    const int64_t I = p.shape.input_size, H = p.shape.output_size;
    for (int position = 0; position < Blocks::kPositions; ++position) {
      const int64_t row = weight_row(block, position), columns = units_of(block, position);
      Acc<T>* z = gates_ + position * W;
      DotPart<T> parts[2]{};
      if (reads_x(position)) parts[0] = {input_row(0), p.input_strides.row, x_weight(row), I, I};
      if (multiplies_h(position)) parts[1] = {static_cast<const T*>(p.h0), H, h_weight(row), H, H};
      dot_rows(parts, rows, columns, z, kRow);
      alignas(64) Acc<T> bias[W];
      bias_of(block, position, bias);
      for (int64_t i = 0; i < rows; ++i) {
        Acc<T>* row_gates = z + i * kRow;
        store(row_gates, load_lanes(row_gates, static_cast<int>(columns)) + load(bias));
      }
    }
  }

  // Panels of kVecs vectors of rows, one after the other.
  void transpose_operands() {
    const int64_t I = p.shape.input_size, H = p.shape.output_size;
    for (int64_t vec = 0; vec < row_vecs(); vec += kVecs) {
      const int64_t row = vec * W, width = min_of<int64_t>(kVecs, row_vecs() - vec) * W;
      const int64_t count = min_of(width, rows - row);
      pack_columns_as_panel(input_row(row), p.input_strides.row, I, count, width,
                            x_panels_ + row * I);
      pack_columns_as_panel(static_cast<const T*>(p.h0) + row * H, H, H, count, width,
                            h_panels_ + row * H);
    }
  }

  void by_tiles(int64_t block) {
    for (int position = 0; position < Blocks::kPositions; ++position) {
      const int64_t count = units_of(block, position);
      if (count == 0) continue;
      alignas(64) Acc<T> bias[W];
      bias_of(block, position, bias);
      for (int64_t vec = 0; vec < row_vecs(); vec += kVecs) {
        const int vecs = static_cast<int>(min_of<int64_t>(kVecs, row_vecs() - vec));
        if (vecs == 2)
          panel_tiles<2>(weight_row(block, position), count, position, vec * W);
        else
          panel_tiles<1>(weight_row(block, position), count, position, vec * W);
        for (int i = 0; i < vecs; ++i)
          transpose_block<V>(transposed_ + i * W, vecs * W, bias,
                             gates_ + (vec + i) * W * kRow + position * W, kRow);
      }
    }
  }

  // transposed_[unit][row] for `count` rows of the weights and a panel of rows from `first` on.
  template <int NV>
  void panel_tiles(int64_t weight, int64_t count, int position, int64_t first) {
    constexpr auto kSize = static_cast<int64_t>(sizeof(T));
    const int64_t I = p.shape.input_size, H = p.shape.output_size;
    const auto tiles = RowTiles::of(count, NV);
    for (int64_t tile = 0; tile < tiles.tiles; ++tile) {
      const int64_t row = tiles.begin(tile);
      GateOperands<M> in{};
      // Ahead: the weights' rows that follow; the panel stays in the cache.
      const auto part = [&](const T* rows_from, int64_t words, const Word<T>* panel) FMK_LAMBDA {
        const auto* from = reinterpret_cast<const char*>(rows_from);
        const int64_t apart = words * kSize;
        return typename GateOperands<M>::Part{
            {from, apart}, words, panel, from + tiles.rows(tile) * apart};
      };
      if (reads_x(position)) in.parts[0] = part(x_weight(weight + row), I, x_panels_ + first * I);
      if (multiplies_h(position))
        in.parts[1] = part(h_weight(weight + row), H, h_panels_ + first * H);
      in.gates = transposed_ + row * NV * W;
      in.ld_gates = NV * W;
      in.ahead_step = 64;
      run_gate_tile<M, NV, false>(tiles.rows(tile), in);
    }
  }

  void finish(int64_t block) {
    const int64_t unit = block * kBlockUnits, H = units;
    const int64_t lanes = min_of<int64_t>(W, H - unit);
    const bool lstm = Blocks::kGates == 4;
    if (lstm)
      for (int64_t i = 0; i < rows; ++i)
        load_cell_row<T>(p.c0, p.wide_cell, i * H + unit, lanes, c_ + i * W);
    BlockStep<T> s{};
    s.gates = gates_;
    s.unit = unit;
    s.hidden_size = H;
    s.c = c_ - unit;
    s.ld_c = W;
    s.from = static_cast<const T*>(p.h0);
    s.hidden = static_cast<T*>(p.h_n);
    s.ld_h = H;
    s.outputs = outputs_;
    s.saved_rows = saved_rows_;
    s.gates_kept = static_cast<T*>(p.gates);
    s.cells_kept = static_cast<Acc<T>*>(p.cells);
    s.cell_outputs = p.cell_states ? cell_outputs_ : nullptr;
    s.relu = p.shape.kind == RnnKind::kRelu;
    finish_cells<T, Blocks>(s, rows);
    if (lstm)
      for (int64_t i = 0; i < rows; ++i)
        store_cell_row<T>(c_ + i * W, lanes, p.wide_cell, i * H + unit, p.c_n);
  }
};

template <class T, class Blocks>
void cell_forward(const RnnForward& p, const Parallel& pool) {
  const RnnShape& s = p.shape;
  const int64_t blocks = ceil_div(s.hidden_size, int64_t{Blocks::kUnitVecs * Vec<T>::W});
  const int64_t bytes = gates_of(s.kind) * s.hidden_size * (s.input_size + s.output_size) *
                        static_cast<int64_t>(sizeof(T));
  const bool serial = rnn_flops(s) < kSerialFlops && bytes < kSerialBytes;
  const int64_t shards = serial ? 1 : min_of<int64_t>(pool.threads, blocks);
  parallel_for(pool, shards, [&](int64_t shard) {
    CellRun<T, Blocks>(p, blocks * shard / shards, blocks * (shard + 1) / shards).run();
  });
}

}  // namespace

bool rnn_cell_forward(const RnnForward& p, const Parallel& pool) {
  if (!p.cell || p.shape.directions != 1 || p.lengths || !is_plain(p.shape, p.variant))
    return false;
  bool done = true;
  with_type(p.shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (kWordsInPlace<T> && Mac<T>::kPair == 1) {
      switch (p.shape.kind) {
        case RnnKind::kLstm: return cell_forward<T, LstmBlocks>(p, pool);
        case RnnKind::kGru: return cell_forward<T, GruBlocks>(p, pool);
        default: return cell_forward<T, RnnBlocks>(p, pool);
      }
    } else {
      done = false;
    }
  });
  return done;
}

}  // namespace fmk::FMK_ISA
