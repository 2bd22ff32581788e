// What the backward pass computes after its time loop: the gradients of the weight matrices and of
// the input, each a single product over all steps and rows.
#include "cpu/rnn_backward_internal.h"

namespace fmk::FMK_ISA {
namespace {

// dW = dG^T X for a range of columns of dG and one or two operands X, a chunk of rows at a time: dG
// is the largest thing there is, and panel by panel as in gemm() it would come from memory for
// each. A chunk of X is packed once and meets the chunk's columns of dG block by block.
template <class T>
class WeightGradientRun {
 public:
  using M = Mac<T>;
  using V = Vec<T>;

  // Columns of a block at most, and rows of dG in a chunk: a block of dG and a panel of X stay in
  // L2; the sums pass by once per chunk.
  static constexpr int64_t kBlockColumns = 256, kChunk = 256;

  // Where row (t, b) of an operand lies.
  enum class Source { kInput, kHidden, kGated };
  struct Part {
    Source source;
    int64_t n;
    T* grad;          // [weight rows][n], or null
    Word<T>* panels;  // of the chunk's rows of X
    Acc<T>* sums;     // [block][panel][columns of the block][width]
    const T* rows[kChunk];
  };

  FMK_LAMBDA WeightGradientRun(const RnnBackward& problem, const BackwardWorkspace<T>& workspace,
                               int64_t direction, const Operand<T>* gradients, int64_t row_step,
                               int64_t start_of_map, int64_t first_column, int64_t column_count,
                               GateMap map, int64_t row_count)
      : p(problem),
        w(workspace),
        d(direction),
        grads(gradients),
        ld_grads(row_step),
        map_start(start_of_map),
        column0(first_column),
        columns(column_count),
        map_(map),
        rows_(row_count) {}

  FMK_LAMBDA void add_operand(Source source, int64_t n, void* grad) {
    if (!grad) return;
    Part& part = parts_[part_count_++];
    part.source = source;
    part.n = n;
    part.grad = static_cast<T*>(grad);
  }

  void run() {
    if (part_count_ == 0) return;
    Arena sizes{nullptr};
    plan(sizes);
    Arena arena{static_cast<char*>(scratch_bytes(Scratch::kTile, sizes.used))};
    plan(arena);
    const int64_t chunks = max_of<int64_t>(1, ceil_div(rows_, kChunk));
    for (int64_t i = 0; i < chunks; ++i) {
      // Chunks start at even rows, where pairs do.
      const int64_t first = i * kChunk;
      add_chunk(first, min_of(kChunk, rows_ - first), i == 0);
    }
    for (int i = 0; i < part_count_; ++i) write(parts_[i]);
  }

 private:
  const RnnBackward& p;
  const BackwardWorkspace<T>& w;
  const int64_t d;
  const Operand<T>* grads;
  const int64_t ld_grads, map_start, column0, columns;
  const GateMap map_;
  const int64_t rows_;
  Part parts_[2];
  int part_count_ = 0;
  Word<T>* packed_grads_;  // [words][ld()] of the chunk
  const Operand<T>* grad_rows_[kChunk];

  int64_t blocks() const { return ceil_div(columns, kBlockColumns); }
  int64_t first_of(int64_t block) const { return columns * block / blocks(); }
  int64_t count_of(int64_t block) const { return first_of(block + 1) - first_of(block); }
  Acc<T>* sums_of(const Part& part, int64_t block) const {
    return part.sums + first_of(block) * PanelSplit<V>::of(part.n).padded_columns();
  }
  int64_t ld() const {  // + W: rows a power of two apart share L1 sets
    return ceil_div(min_of(columns, kBlockColumns), V::W) * V::W + V::W;
  }

  void plan(Arena& arena) {
    const int64_t words = words_of<T>(kChunk);
    packed_grads_ = arena.take<Word<T>>(words * ld());
    for (int i = 0; i < part_count_; ++i) {
      Part& part = parts_[i];
      const int64_t padded = PanelSplit<V>::of(part.n).padded_columns();
      part.panels = arena.take<Word<T>>(words * padded);
      part.sums = arena.take<Acc<T>>(columns * padded);
    }
  }

  const T* operand_row(Source source, int64_t row) const {
    const RnnShape& s = p.shape;
    const int64_t t = time_of(p, row), b = batch_of(p, row);
    switch (source) {
      case Source::kInput:
        return static_cast<const T*>(p.input) + t * p.input_strides.step + b * p.input_strides.row;
      case Source::kGated: return w.gated + (row * s.directions + d) * s.hidden_size;
      default: break;
    }
    if (p.variant.recurrent_mask) return w.masked + (row * s.directions + d) * s.output_size;
    return hidden_before<T>(p, d, t, b);
  }

  void add_chunk(int64_t first, int64_t count, bool start) {
    const int64_t words = words_of<T>(count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = p.lengths ? w.active_rows[first + i] : first + i;
      grad_rows_[i] = grads + row * ld_grads;
      for (int part = 0; part < part_count_; ++part)
        parts_[part].rows[i] = operand_row(parts_[part].source, row);
    }
    for (int index = 0; index < part_count_; ++index) {
      const Part& part = parts_[index];
      const auto split = PanelSplit<V>::of(part.n);
      for (int64_t panel = 0; panel < split.count; ++panel) {
        const int64_t column = split.column(panel), width = split.width_vecs(panel) * V::W;
        pack_row_pointers_as_panel(part.rows, column, count, min_of(width, part.n - column), width,
                                   part.panels + column * words);
      }
    }
    for (int64_t block = 0; block < blocks(); ++block) {
      pack_row_pointers_as_panel(grad_rows_, column0 + first_of(block), count, count_of(block),
                                 ld(), packed_grads_);
      for (int index = 0; index < part_count_; ++index)
        add_block(parts_[index], block, words, start);
    }
  }

  void add_block(const Part& part, int64_t block, int64_t words, bool start) const {
    const auto split = PanelSplit<V>::of(part.n);
    for (int64_t panel = 0; panel < split.count; ++panel) {
      const int64_t column = split.column(panel);
      const int vecs = split.width_vecs(panel);
      const int64_t width = vecs * V::W;
      const auto tiles = RowTiles::of(count_of(block), vecs);
      for (int64_t tile = 0; tile < tiles.tiles; ++tile) {
        const int64_t row = tiles.begin(tile);
        Acc<T>* sums = sums_of(part, block) + column * count_of(block) + row * width;
        TileOperands<M> in;
        in.a = packed_grads_ + row;
        in.lda = ld();
        in.words = words;
        in.b = part.panels + column * words;
        if (!start) in.init = sums, in.ld_init = width;
        run_tile<M, true>(tiles.rows(tile), vecs, in, StoreAccumulators<V>{sums, width});
      }
    }
  }

  void write(const Part& part) const {
    const auto split = PanelSplit<V>::of(part.n);
    for (int64_t block = 0; block < blocks(); ++block)
      for (int64_t panel = 0; panel < split.count; ++panel) {
        const int64_t column = split.column(panel), width = split.width_vecs(panel) * V::W;
        const Acc<T>* sums = sums_of(part, block) + column * count_of(block);
        for (int64_t i = 0; i < count_of(block); ++i) {
          // The map counts from the first column of the whole product.
          const int64_t row = map_.row(column0 - map_start + first_of(block) + i);
          if (row >= 0)
            convert(sums + i * width, part.grad + row * part.n + column,
                    min_of(width, part.n - column));
        }
      }
  }
};

// All weight matrices' gradients.
template <class T>
void weight_gradients(const RnnBackward& p, const BackwardWorkspace<T>& w, int64_t rows,
                      double flops, const Parallel& pool) {
  using Run = WeightGradientRun<T>;
  using Source = typename Run::Source;
  const RnnShape& s = p.shape;
  // LSTM and RNN read the same dG for both matrices; else each has its own product.
  const bool joint = w.grad_x == w.grad_gates && w.hh_first == 0;
  const bool projects = w.hr_words > 0;
  const int64_t columns = w.hh.columns();
  const int64_t threads = flops < kSerialFlops ? 1 : pool.threads;
  const int64_t products = joint ? 1 : 2;
  const int64_t ranges = ceil_div(threads, s.directions * products);  // of columns, of a product
  const int64_t per_direction = products * ranges + (projects ? 1 : 0);
  const int64_t units = s.directions * per_direction, shards = min_of(threads, units);
  const int64_t ld = w.row_length(s), direction_columns = w.gates * w.gate_step;
  parallel_for(pool, shards, [&](int64_t shard) {
    for (int64_t i = units * shard / shards; i < units * (shard + 1) / shards; ++i) {
      const int64_t d = i / per_direction, unit = i % per_direction;
      const RnnWeightGrads& out = p.grad_weights[d];
      if (unit == products * ranges) {
        const GateMap plain{s.output_size, w.projected_step, 1, {0, 0, 0, 0}};
        Run run(p, w, d, w.grad_projected, s.directions * w.projected_step, d * w.projected_step,
                d * w.projected_step, w.projected_step, plain, rows);
        run.add_operand(Source::kGated, s.hidden_size, out.w_hr);
        run.run();
        continue;
      }
      const bool of_hidden = unit >= ranges;
      const int64_t range = unit % ranges, first = columns * range / ranges;
      const int64_t count = columns * (range + 1) / ranges - first;
      const int64_t start = d * direction_columns + (of_hidden ? w.hh_first : 0);
      Run run(p, w, d, of_hidden ? w.grad_gates : w.grad_x, ld, start, start + first, count,
              of_hidden ? w.hh : w.ih, rows);
      if (!of_hidden) run.add_operand(Source::kInput, s.input_size, out.w_ih);
      if (of_hidden || joint) run.add_operand(Source::kHidden, s.output_size, out.w_hh);
      run.run();
    }
  });
}

template <class T>
void input_gradient(const RnnBackward& p, const BackwardWorkspace<T>& w, const Parallel& pool) {
  using O = Operand<T>;
  const RnnShape& s = p.shape;
  GemmProblem<O> g;
  g.m = s.steps * s.batch;
  g.n = s.input_size;
  g.k = s.directions * w.ih.columns();
  g.a = w.grad_x;
  g.lda = w.row_length(s);
  g.packed_b = w.ih_panels;
  if constexpr (std::is_same_v<T, O>)
    g.epilogue.out = static_cast<T*>(p.grad_input);
  else
    g.epilogue.out = w.wide_input_grad;
  g.epilogue.ld_out = s.input_size;
  gemm(g, pool);
  if constexpr (!std::is_same_v<T, O>)
    convert(w.wide_input_grad, static_cast<T*>(p.grad_input), g.m * g.n);
}

}  // namespace

void rnn_products(const RnnBackward& p, int64_t rows, const Parallel& pool) {
  with_type(p.shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Arena arena{static_cast<char*>(p.workspace)};
    const auto w = BackwardWorkspace<T>::of(p, arena);
    if (p.grad_weights[0].w_hh) weight_gradients(p, w, rows, rnn_flops(p.shape), pool);
    if (p.grad_input) input_gradient(p, w, pool);
  });
}

}  // namespace fmk::FMK_ISA
