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
  int64_t rows = 0;              // of the convolution, in all pieces
  const D** table = nullptr;     // [rows][y.taps]: where the input row under a tap starts
  const D** pointers = nullptr;  // work space
  const D* zeros = nullptr;  // what the table says where that row is padding: a row of zeros, or
                             // (in place) a pixel
};

// Fills in block->table for its pieces, staging the input rows that are needed unless they are read
// in place, and block->pointers with room for `pointers`. Uses the scratch slots kExtra and kRows.
template <class T, class D>
void gather_rows(const T* input, const Axis& y, const RowStage<T, D>& stage, bool in_place,
                 int64_t pointers, Block<D>* block) {
  constexpr int W = Vec<T>::W;
  const int64_t taps = y.taps, table = block->rows * taps;
  int64_t staged = 0, longest = 0;  // input rows under the windows, in all and of one piece
  for (int i = 0; i < block->piece_count; ++i) {
    const Piece& piece = block->pieces[i];
    if (piece.end == piece.begin || taps == 0) continue;
    const int64_t span = (piece.end - piece.begin - 1) * y.stride + (taps - 1) * y.step + 1;
    staged += min_of(span, (piece.end - piece.begin) * taps);
    longest = max_of(longest, span);
  }
  const int64_t image_row = stage.width * stage.groups * stage.channels;
  const int64_t pixel_words = stage.groups * stage.words();
  // Depthwise kernels read whole vectors, which may reach over the last pixel.
  const int64_t zero_words = (in_place ? pixel_words : stage.row_words()) + W;
  auto* memory = static_cast<char*>(scratch_bytes(
      Scratch::kExtra, zero_words * sizeof(D) + (table + pointers + longest) * sizeof(void*)));
  auto* zeros = reinterpret_cast<D*>(memory + (table + pointers + longest) * sizeof(void*));
  block->table = reinterpret_cast<const D**>(memory);
  block->pointers = block->table + table;
  const D** found = block->pointers + pointers;
  block->zeros = zeros;
  std::memset(static_cast<void*>(zeros), 0, zero_words * sizeof(D));
  D* next = nullptr;
  if (!in_place)
    next = static_cast<D*>(
        scratch_bytes(Scratch::kRows, (staged * stage.row_words() + W) * sizeof(D)));
  const D** entry = block->table;
  for (int i = 0; i < block->piece_count; ++i) {
    const Piece& piece = block->pieces[i];
    const T* image = input + piece.image * stage.height * image_row;
    const int64_t first = y.position(piece.begin, 0);
    if (!in_place) {
      const int64_t last = y.position(piece.end - 1, taps - 1);
      for (int64_t row = first; row <= last; ++row) found[row - first] = nullptr;
    }
    for (int64_t out = piece.begin; out < piece.end; ++out)
      for (int64_t tap = 0; tap < taps; ++tap, ++entry) {
        const int64_t row = y.position(out, tap);
        if (row < 0 || row >= stage.height) {
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
