// How the forward pass's weights are packed: with the gates interleaved. For each block of hidden
// units a tile computes all gates of a few rows, in panels of one or two vectors; a panel holds all
// words of the reduction over x and then over h. Pre-activations of a block lie as
// [rows][positions][W].
#pragma once

#include "cpu/rnn_internal.h"

namespace fmk::FMK_ISA {
namespace {

// LSTM: positions i, f, g, o of one vector of units, panels {i, f} and {g, o}.
struct LstmBlocks {
  static constexpr int kGates = 4, kPositions = 4, kUnitVecs = 1, kPanels = 2;
  static constexpr int kWidth[kPanels] = {2, 2};
  FMK_INLINE constexpr int gate(int panel, int vec) { return 2 * panel + vec; }
  FMK_INLINE constexpr int unit_vec(int, int) { return 0; }
  FMK_INLINE constexpr int x_position(int panel) { return 2 * panel; }
  FMK_INLINE constexpr int h_position(int panel) { return 2 * panel; }
};
// GRU: positions r, z, W_in x, W_hn h; panels {r, z} and {n}, whose two products stay apart.
struct GruBlocks {
  static constexpr int kGates = 3, kPositions = 4, kUnitVecs = 1, kPanels = 2;
  static constexpr int kWidth[kPanels] = {2, 1};
  FMK_INLINE constexpr int gate(int panel, int vec) { return 2 * panel + vec; }
  FMK_INLINE constexpr int unit_vec(int, int) { return 0; }
  FMK_INLINE constexpr int x_position(int panel) { return 2 * panel; }
  FMK_INLINE constexpr int h_position(int panel) { return panel ? 3 : 0; }
};
// RNN: two vectors of units, one panel.
struct RnnBlocks {
  static constexpr int kGates = 1, kPositions = 2, kUnitVecs = 2, kPanels = 1;
  static constexpr int kWidth[kPanels] = {2};
  FMK_INLINE constexpr int gate(int, int) { return 0; }
  FMK_INLINE constexpr int unit_vec(int, int vec) { return vec; }
  FMK_INLINE constexpr int x_position(int) { return 0; }
  FMK_INLINE constexpr int h_position(int) { return 0; }
};

// Where things lie in packed weights; per direction the biases, the blocks, then W_hr's panels.
template <class T, class Blocks>
struct PackedLayout {
  static constexpr int W = Vec<T>::W;
  static constexpr int64_t kRow = Blocks::kPositions * W;  // pre-activations of a row of a block
  int64_t blocks, x_words, h_words, hr_words;

  FMK_INLINE PackedLayout of(const RnnShape& s) {
    const bool projected = s.output_size != s.hidden_size;
    return {ceil_div(s.hidden_size, Blocks::kUnitVecs * W), words_of<T>(s.input_size),
            words_of<T>(s.output_size),
            projected ? packed_words<T>(s.output_size, s.hidden_size) : 0};
  }
  int64_t block_words() const {
    int64_t vecs = 0;
    for (int width : Blocks::kWidth) vecs += width;
    return (x_words + h_words) * vecs * W;
  }
  int64_t h_bytes() const {
    return blocks * block_words() / max_of<int64_t>(1, x_words + h_words) * h_words *
           static_cast<int64_t>(sizeof(Word<T>));
  }
  size_t bias_bytes() const { return static_cast<size_t>(blocks * kRow) * sizeof(Acc<T>); }
  size_t direction_bytes() const {
    const size_t words = static_cast<size_t>(blocks * block_words() + hr_words);
    return (bias_bytes() + words * sizeof(Word<T>) + 63) / 64 * 64;
  }
  const Acc<T>* bias(const void* direction, int64_t block) const {
    return static_cast<const Acc<T>*>(direction) + block * kRow;
  }
  const Word<T>* x_panel(const void* direction, int64_t block, int panel) const {
    const char* panels = static_cast<const char*>(direction) + bias_bytes();
    const auto* words = reinterpret_cast<const Word<T>*>(panels) + block * block_words();
    for (int i = 0; i < panel; ++i) words += (x_words + h_words) * Blocks::kWidth[i] * W;
    return words;
  }
  const Word<T>* h_panel(const void* direction, int64_t block, int panel) const {
    return x_panel(direction, block, panel) + x_words * Blocks::kWidth[panel] * W;
  }
  const Word<T>* hr_panels(const void* direction) const { return x_panel(direction, blocks, 0); }
};

// `columns` rows of a weight matrix [...][k] into one vector's place of a panel.
template <class T>
FMK_NOINLINE void pack_vector(const T* weight, int64_t k, int64_t columns, int64_t ld,
                              Word<T>* to) {
  constexpr int W = Vec<T>::W;
  if constexpr (kWordsInPlace<T>) {
    pack_columns_into_panel(weight, k, k, columns, W, to, ld);
  } else {
    auto* wide = static_cast<Word<T>*>(
        scratch_bytes(Scratch::kRows, static_cast<size_t>(columns * k) * sizeof(Word<T>)));
    convert(weight, wide, columns * k);
    pack_columns_into_panel(wide, k, k, columns, W, to, ld);
  }
}

template <class T, class Blocks>
void pack_block(const RnnShape& s, bool layer_norm, const RnnWeights& weights,
                const PackedLayout<T, Blocks>& layout, int64_t block, char* direction) {
  constexpr int W = Vec<T>::W;
  const int64_t H = s.hidden_size;
  const auto units_from = [&](int vec) FMK_LAMBDA { return (block * Blocks::kUnitVecs + vec) * W; };
  for (int panel = 0; panel < Blocks::kPanels; ++panel) {
    const int64_t ld = Blocks::kWidth[panel] * W;
    auto* x = const_cast<Word<T>*>(layout.x_panel(direction, block, panel));
    auto* h = const_cast<Word<T>*>(layout.h_panel(direction, block, panel));
    for (int vec = 0; vec < Blocks::kWidth[panel]; ++vec) {
      const int64_t unit = units_from(Blocks::unit_vec(panel, vec));
      const int64_t columns = max_of<int64_t>(0, min_of<int64_t>(W, H - unit));
      const int64_t row = Blocks::gate(panel, vec) * H + min_of(unit, H - 1);
      pack_vector(static_cast<const T*>(weights.w_ih) + row * s.input_size, s.input_size, columns,
                  ld, x + vec * W);
      pack_vector(static_cast<const T*>(weights.w_hh) + row * s.output_size, s.output_size, columns,
                  ld, h + vec * W);
    }
  }
  auto* bias = const_cast<Acc<T>*>(layout.bias(direction, block));
  const auto* b_ih = static_cast<const T*>(layer_norm ? nullptr : weights.b_ih);
  const auto* b_hh = static_cast<const T*>(layer_norm ? nullptr : weights.b_hh);
  for (int position = 0; position < Blocks::kPositions; ++position) {
    const bool gru = Blocks::kGates == 3, rnn = Blocks::kGates == 1;
    const int gate = rnn ? 0 : min_of(position, Blocks::kGates - 1);
    const bool from_x = !gru || position != 3, from_h = !gru || position != 2;
    for (int64_t j = 0; j < W; ++j) {
      const int64_t unit = units_from(rnn ? position : 0) + j;
      Acc<T> sum = 0;
      if (b_ih && unit < H) {
        if (from_x) sum += widen(b_ih[gate * H + unit]);
        if (from_h) sum += widen(b_hh[gate * H + unit]);
      }
      bias[position * W + j] = sum;
    }
  }
}

template <class T>
void pack_projection(const RnnShape& s, const T* w_hr, Word<T>* panels) {
  const int64_t P = s.output_size, H = s.hidden_size, words = words_of<T>(H);
  const auto split = PanelSplit<Vec<T>>::of(P);
  for (int64_t panel = 0; panel < split.count; ++panel) {
    const int64_t column = split.column(panel), width = split.width_vecs(panel) * Vec<T>::W;
    pack_columns_as_panel(w_hr + column * H, H, H, min_of(width, P - column), width,
                          panels + column * words);
  }
}

template <class T, class Blocks>
void pack_typed(const RnnShape& s, bool layer_norm, const RnnWeights* weights, char* packed,
                const Parallel& pool) {
  const auto layout = PackedLayout<T, Blocks>::of(s);
  const int64_t count = s.directions * layout.blocks;
  const bool serial = s.directions * layout.direction_bytes() < 128 * 1024;
  const int64_t shards = serial ? 1 : min_of<int64_t>(pool.threads, count);
  parallel_for(pool, shards, [&](int64_t shard) {
    for (int64_t i = count * shard / shards; i < count * (shard + 1) / shards; ++i) {
      const int64_t d = i / layout.blocks, block = i % layout.blocks;
      char* direction = packed + d * layout.direction_bytes();
      pack_block(s, layer_norm, weights[d], layout, block, direction);
      if (block == 0 && layout.hr_words)
        pack_projection(s, static_cast<const T*>(weights[d].w_hr),
                        const_cast<Word<T>*>(layout.hr_panels(direction)));
    }
  });
}

}  // namespace
}  // namespace fmk::FMK_ISA
