// A block of a correlation whose tiles are runs of pixels of one staged row: images of few
// channels.
#pragma once

#include "cpu/conv_plan.h"

namespace fmk::FMK_ISA {

template <class T, class D>
struct RowMultiplier {
  using V = Vec<T>;
  using A = Acc<T>;
  const CorrelationPlan<T, D, false>& plan;

  // Panels [panel0, panel1) of the block, whose first pixel is `first_pixel` of the output.
  void run(const Block<D>& block, int64_t panel0, int64_t panel1, int64_t first_pixel) const {
    const Correlation<T>& p = plan.p;
    for (int64_t panel = panel0; panel < panel1; ++panel) {
      if (!plan.direct) {
        finish(block, panel);
        continue;
      }
      const int64_t column = plan.split.column(panel), width = plan.split.width_vecs(panel) * V::W;
      multiply(block, panel, 0, block.rows,
               plan.panel_epilogue(0, column, width, first_pixel, nullptr, 0));
      if (p.moments.wanted())
        p.moments.add(block.shard, 0, first_pixel, first_pixel + block.rows * p.x.out_size, column,
                      min_of(column + width, plan.out_channels));
    }
  }

 private:
  // One panel, whose output goes through a Finisher.
  void finish(const Block<D>& block, int64_t panel) const {
    const Correlation<T>& p = plan.p;
    const int64_t out = p.x.out_size, column = plan.split.column(panel);
    const int64_t width = plan.split.width_vecs(panel) * V::W;
    // A pool takes the rows as they come, and those that the next windows need are kept.
    const bool pooled = plan.finished && p.pool.kernel_h > 0;
    constexpr int64_t kPoolRows = 2;
    const int64_t room = pooled ? (kPoolRows - 1) * p.pool.stride_h + p.pool.kernel_h : block.rows;
    auto* rows = static_cast<A*>(scratch_bytes(Scratch::kTile, room * out * width * sizeof(A)));
    const Epilogue<A> epilogue = plan.rows_epilogue(column, width, rows);
    if (!pooled) {
      multiply(block, panel, 0, block.rows, epilogue);
      return plan.finish_rows(block, 0, column, width, rows);
    }
    const Finisher<T> finisher{p, column, min_of(width, plan.out_channels - column), width, true};
    for (int i = 0; i < block.piece_count; ++i) {
      const Piece& piece = block.pieces[i];
      int64_t done = piece.begin, kept = 0;  // rows before `done` have been computed; the last
                                             // `kept` of them are the first in `rows`
      for (int64_t row = piece.out_begin; row < piece.out_end; row += kPoolRows) {
        Piece part;
        find_window_rows(p, piece.image, row, min_of(piece.out_end, row + kPoolRows), &part);
        const int64_t overlap = max_of<int64_t>(0, done - part.begin);
        if (overlap > 0)
          std::memmove(rows, rows + (kept - overlap) * out * width,
                       overlap * out * width * sizeof(A));
        const int64_t first = max_of(done, part.begin), shift = piece.first_row - piece.begin;
        if (part.end > first)
          multiply(block, panel, first + shift, part.end + shift, epilogue.at_row(overlap * out));
        finisher.run(part, rows);
        done = max_of(done, part.end);
        kept = max_of<int64_t>(0, part.end - part.begin);
      }
    }
  }

  // Rows [row0, row1) of the block, through the epilogue of the first of them.
  template <class E>
  void multiply(const Block<D>& block, int64_t panel, int64_t row0, int64_t row1,
                const Epilogue<E>& epilogue) const {
    const int vecs = plan.split.width_vecs(panel);
    const int64_t out = plan.p.x.out_size;
    const auto tiles = EvenSplit::of(out, ceil_div(out, int64_t{kRowTilePixels}));
    RowTileOperands<Mac<T>> in;
    in.count = plan.elements;
    in.step = plan.p.x.stride * plan.pixel_words;
    in.words = plan.words;
    in.panel = static_cast<const Word<T>*>(plan.p.weight) +
               plan.split.column(panel) * plan.elements * plan.words;
    for (int64_t row = row0; row < row1; ++row) {
      in.rows = block.table + row * plan.elements;
      for (int64_t x = 0, t = 0; x < out; x += tiles.size(t++)) {
        const int64_t pixel = (row - row0) * out + x;
        in.offset = x * in.step;
        run_row_tile(static_cast<int>(tiles.size(t)), vecs, in,
                     RowFinish<E>{epilogue.at_row(pixel), plan.streams});
      }
    }
  }
};

}  // namespace fmk::FMK_ISA
