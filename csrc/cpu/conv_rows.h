// A block of output rows, and the input rows that lie under it.
#pragma once

#include "cpu/conv_internal.h"
#include "cpu/conv_stage.h"

namespace fmk::FMK_ISA {

// Consecutive rows of one image within a block: output rows [out_begin, out_end), which are pooled
// rows if there is a pool, and the convolution rows [begin, end) that they need.
struct Piece {
  int64_t image, out_begin, out_end, begin, end;
  int64_t first_row;  // of the block's convolution rows
  int64_t own_begin;  // rows from here on are not computed by an earlier piece as well
};

constexpr int kMaxPieces = 32;

template <class D>
struct Block {
  Piece pieces[kMaxPieces];
  int piece_count = 0;
  int64_t shard = 0;             // of the work
  int64_t rows = 0;              // of the convolution, in all pieces
  const D** table = nullptr;     // [rows][y.taps]: where the input row under a tap starts
  const D** pointers = nullptr;  // work space
  const D* zeros = nullptr;  // what the table says where that row is padding: a row of zeros, or
                             // (in place) a pixel
};

// The convolution rows under output rows [out_begin, out_end) of an image, as a piece of a block's
// first rows.
template <class T>
void find_window_rows(const Correlation<T>& p, int64_t image, int64_t out_begin, int64_t out_end,
                      Piece* piece) {
  const PoolShape& s = p.pool;
  *piece = {image, out_begin, out_end, out_begin, out_end, 0, out_begin};
  if (s.kernel_h == 0) return;
  const auto end_of = [&](int64_t out) {  // of the window of pooled row `out`
    return max_of<int64_t>(0, min_of(p.y.out_size, out * s.stride_h - s.padding_h + s.kernel_h));
  };
  piece->begin = max_of<int64_t>(0, out_begin * s.stride_h - s.padding_h);
  piece->end = end_of(out_end - 1);
  piece->own_begin = out_begin == 0 ? 0 : end_of(out_begin - 1);
}

// Output rows [row0, row1), image_rows to an image, as the pieces of a block.
template <class T, class D>
void find_pieces(const Correlation<T>& p, int64_t image_rows, int64_t row0, int64_t row1,
                 Block<D>* block) {
  for (int64_t row = row0; row < row1;) {
    Piece piece;
    const int64_t image = row / image_rows, out_begin = row - image * image_rows;
    find_window_rows(p, image, out_begin, min_of(image_rows, out_begin + row1 - row), &piece);
    if (p.pool.kernel_h && p.preactivation) {  // wanted of the rows that no window covers, too
      piece.begin = min_of(piece.begin, piece.own_begin);
      if (piece.out_end == image_rows) piece.end = p.y.out_size;
    }
    piece.first_row = block->rows;
    block->rows += piece.end - piece.begin;
    block->pieces[block->piece_count++] = piece;
    row += piece.out_end - piece.out_begin;
  }
}

// Rows from the first to the last that one piece reaches: exact only where rows of one plane, not
// repeated by the padding, lie under it; else all rows of the image do at most.
template <class D>
int64_t longest_reach(const Axis& z, const Axis& y, PaddingMode padding, const Block<D>& block) {
  if (z.in_size != 1 || z.taps != 1 || padding != PaddingMode::kZeros) return INT64_MAX;
  int64_t longest = 0;
  for (int i = 0; i < block.piece_count; ++i) {
    const Piece& piece = block.pieces[i];
    if (piece.end > piece.begin && y.taps > 0)
      longest = max_of(longest, y.position(piece.end - 1, y.taps - 1) - y.position(piece.begin, 0));
  }
  return longest + 1;
}

// An upper bound of the input rows under a block.
template <class D>
int64_t rows_under(const Axis& z, const Axis& y, int64_t height, const Block<D>& block) {
  int64_t total = 0;
  for (int i = 0; i < block.piece_count; ++i) {
    const Piece& piece = block.pieces[i];
    const int64_t rows = piece.end - piece.begin;
    if (rows == 0 || y.taps == 0 || z.taps == 0) continue;
    const int64_t planes = ceil_div(rows, y.out_size) + 1;  // that the piece has rows in
    const int64_t in_plane = (min_of(rows, y.out_size) - 1) * y.stride + (y.taps - 1) * y.step + 1;
    int64_t reached = min_of(rows * y.taps, planes * in_plane) * z.taps;
    if (z.in_size == 1 && z.taps == 1) reached = min_of(rows * y.taps, in_plane);
    total += min_of(height, reached);
  }
  return total;
}

// The input row, counted over all planes, under tap `tap` of output row `out`; -1: zeros.
FMK_INLINE int64_t input_row(const Axis& z, const Axis& y, PaddingMode padding, int64_t out,
                             int64_t tap) {
  const int64_t oz = out / y.out_size, tz = tap / y.taps;
  const int64_t row =
      padded_position(padding, y.position(out - oz * y.out_size, tap - tz * y.taps), y.in_size);
  const int64_t plane = padded_position(padding, z.position(oz, tz), z.in_size);
  return row < 0 || plane < 0 ? -1 : plane * y.in_size + row;
}

// Fills in block->table for its pieces, staging the input rows that are needed unless they are read
// in place, and block->pointers with room for `pointers`. Uses the scratch slots kExtra and kRows.
template <class T, class D>
void gather_rows(const T* input, const Axis& z, const Axis& y, const RowStage<T, D>& stage,
                 bool in_place, int64_t pointers, Block<D>* block) {
  constexpr int W = Vec<T>::W;
  const int64_t taps = z.taps * y.taps, table = block->rows * taps;
  const int64_t image_row = stage.width * stage.groups * stage.channels;
  const int64_t pixel_words = stage.groups * stage.words();
  // Depthwise kernels read whole vectors, which may reach over the last pixel.
  const int64_t zero_words = (in_place ? pixel_words : stage.row_words()) + W;
  // Staged rows by input row: of one piece at a time, which may reach over the whole image.
  const int64_t room =
      in_place ? 0 : min_of(stage.height, longest_reach(z, y, stage.padding, *block));
  auto* memory = static_cast<char*>(scratch_bytes(
      Scratch::kExtra, zero_words * sizeof(D) + (table + pointers + room) * sizeof(void*)));
  auto* zeros = reinterpret_cast<D*>(memory + (table + pointers + room) * sizeof(void*));
  block->table = reinterpret_cast<const D**>(memory);
  block->pointers = block->table + table;
  const D** found = block->pointers + pointers;
  block->zeros = zeros;
  std::memset(static_cast<void*>(zeros), 0, zero_words * sizeof(D));
  D* next = nullptr;
  if (!in_place)
    next = static_cast<D*>(scratch_bytes(
        Scratch::kRows,
        (rows_under(z, y, stage.height, *block) * stage.row_words() + W) * sizeof(D)));
  const D** entry = block->table;
  for (int i = 0; i < block->piece_count; ++i) {
    const Piece& piece = block->pieces[i];
    const T* image = input + piece.image * stage.height * image_row;
    int64_t first = 0;
    if (!in_place && piece.end > piece.begin && taps > 0) {
      first = room == stage.height ? 0 : y.position(piece.begin, 0);
      for (int64_t row = 0; row < room; ++row) found[row] = nullptr;
    }
    for (int64_t out = piece.begin; out < piece.end; ++out)
      for (int64_t tap = 0; tap < taps; ++tap, ++entry) {
        const int64_t row = input_row(z, y, stage.padding, out, tap);
        if (row < 0) {
          *entry = zeros;
        } else if (in_place) {
          *entry = reinterpret_cast<const D*>(image + row * image_row);
        } else {
          if (!found[row - first]) {
            stage.run(image, row, next);
            found[row - first] = next;
            next += stage.row_words();
          }
          *entry = found[row - first];
        }
      }
  }
}

}  // namespace fmk::FMK_ISA
