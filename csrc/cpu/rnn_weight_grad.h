// The gradients of the LSTM's weights, from what the time loop of rnn_backward.cpp leaves behind.
#pragma once

#include "cpu/rnn_internal.h"

namespace fmk::FMK_ISA {
namespace {

// dW_ih = dG^T X and dW_hh = dG^T H_prev for a block of gate rows of one direction. All blocks of a
// direction together read dG once, a chunk of time steps at a time, while the sums stay in the
// cache: dG is the largest thing there is, and panel by panel as in gemm() it would come from
// memory for each.
template <class T>
class WeightGradientRun {
 public:
  using M = Mac<T>;
  using V = Vec<T>;

  // Gate rows of a block at most, and rows of dG in a chunk: the block's operands and sums fit into
  // L2.
  static constexpr int64_t kBlockRows = 256, kChunk = 256;

  FMK_LAMBDA WeightGradientRun(const LstmBackward& problem, const BackwardWorkspace<T>& workspace,
                               int64_t direction, int64_t first_gate, int64_t gate_count)
      : p(problem), w(workspace), d(direction), gate0(first_gate), gates(gate_count) {}

  void run() {
    const LstmShape& s = p.shape;
    parts_[0].n = s.input_size;
    parts_[0].grad = static_cast<T*>(p.grad_weights[d].w_ih);
    parts_[1].n = s.hidden_size;
    parts_[1].grad = static_cast<T*>(p.grad_weights[d].w_hh);
    Arena sizes{nullptr};
    plan(sizes);
    Arena arena{static_cast<char*>(scratch_bytes(Scratch::kTile, sizes.used))};
    plan(arena);
    const int64_t rows = s.steps * s.batch, chunks = max_of<int64_t>(1, ceil_div(rows, kChunk));
    for (int64_t i = 0; i < chunks; ++i) {
      // Chunks start at even rows, where pairs do.
      const int64_t first = i * kChunk;
      add_chunk(first, min_of(kChunk, rows - first), i == 0);
    }
    for (const Part& part : parts_) write(part);
  }

 private:
  struct Part {
    int64_t n;
    T* grad;          // [4H][n]
    Word<T>* panels;  // of the chunk's rows of X or H_prev
    Acc<T>* sums;     // [panel][gates][width]
    const T* rows[kChunk];
  };
  const LstmBackward& p;
  const BackwardWorkspace<T>& w;
  const int64_t d, gate0, gates;
  Part parts_[2];
  Word<T>* grad_gates_;  // [words][ld()] of the chunk

  int64_t ld() const {
    return ceil_div(gates, V::W) * V::W + V::W;  // + W: rows a power of two apart share L1 sets
  }

  void plan(Arena& arena) {
    const int64_t words = words_of<T>(kChunk);
    grad_gates_ = arena.take<Word<T>>(words * ld());
    for (Part& part : parts_) {
      const int64_t columns = PanelSplit<V>::of(part.n).padded_columns();
      part.panels = arena.take<Word<T>>(words * columns);
      part.sums = arena.take<Acc<T>>(gates * columns);
    }
  }

  void point_at_rows(int64_t first, int64_t count) {
    const LstmShape& s = p.shape;
    const int64_t H = s.hidden_size, output_ld = s.directions * H;
    const int64_t first_step = d == 0 ? 0 : s.steps - 1, back = d == 0 ? -1 : 1;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = first + i;
      const int64_t t = p.batch_first ? row % s.steps : row / s.batch;
      const int64_t b = p.batch_first ? row / s.steps : row % s.batch;
      parts_[0].rows[i] =
          static_cast<const T*>(p.input) + t * p.input_strides.step + b * p.input_strides.row;
      parts_[1].rows[i] = t == first_step ? static_cast<const T*>(p.h0) + (d * s.batch + b) * H
                                          : static_cast<const T*>(p.output) +
                                                row_index(p, t + back, b) * output_ld + d * H;
    }
  }

  void add_chunk(int64_t first, int64_t count, bool start) {
    const int64_t ldg = p.shape.directions * 4 * p.shape.hidden_size, words = words_of<T>(count);
    point_at_rows(first, count);
    pack_rows_as_panel(w.grad_gates + first * ldg + d * 4 * p.shape.hidden_size + gate0, ldg, count,
                       gates, ld(), grad_gates_);
    for (const Part& part : parts_) {
      const auto split = PanelSplit<V>::of(part.n);
      for (int64_t panel = 0; panel < split.count; ++panel) {
        const int64_t column = split.column(panel);
        const int vecs = split.width_vecs(panel);
        const int64_t width = vecs * V::W;
        Word<T>* b = part.panels + column * words;
        pack_row_pointers_as_panel(part.rows, column, count, min_of(width, part.n - column), width,
                                   b);
        const auto tiles = RowTiles::of(gates, vecs);
        for (int64_t tile = 0; tile < tiles.tiles; ++tile) {
          const int64_t row = tiles.begin(tile);
          Acc<T>* sums = part.sums + column * gates + row * width;
          TileOperands<M> in;
          in.a = grad_gates_ + row;
          in.lda = ld();
          in.words = words;
          in.b = b;
          if (!start) in.init = sums, in.ld_init = width;
          run_tile<M, true>(tiles.rows(tile), vecs, in, StoreAccumulators<V>{sums, width});
        }
      }
    }
  }

  void write(const Part& part) const {
    const auto split = PanelSplit<V>::of(part.n);
    for (int64_t panel = 0; panel < split.count; ++panel) {
      const int64_t column = split.column(panel), width = split.width_vecs(panel) * V::W;
      for (int64_t row = 0; row < gates; ++row)
        convert(part.sums + column * gates + row * width,
                part.grad + (gate0 + row) * part.n + column, min_of(width, part.n - column));
    }
  }
};

template <class T>
void weight_gradients(const LstmBackward& p, const BackwardWorkspace<T>& w, double flops,
                      const Parallel& pool) {
  const LstmShape& s = p.shape;
  const int64_t gates = 4 * s.hidden_size;
  const int64_t threads = flops < kSerialFlops ? 1 : pool.threads;
  const int64_t share = ceil_div(threads, s.directions);
  const int64_t blocks = ceil_div(ceil_div(gates, WeightGradientRun<T>::kBlockRows), share) * share;
  const int64_t units = s.directions * blocks, shards = min_of(threads, units);
  parallel_for(pool, shards, [&](int64_t shard) {
    for (int64_t i = units * shard / shards; i < units * (shard + 1) / shards; ++i) {
      const int64_t block = i % blocks, first = gates * block / blocks;
      WeightGradientRun<T> run(p, w, i / blocks, first, gates * (block + 1) / blocks - first);
      run.run();
    }
  });
}

}  // namespace
}  // namespace fmk::FMK_ISA
