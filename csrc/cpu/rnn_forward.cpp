// The forward pass of the recurrent layers, in one of two schedules. Items: each thread takes a
// direction or a slice of the batch through the whole sequence by itself. Team: where a slice would
// have few rows for the weights that it reads, the threads share the units of all rows, with one
// barrier per step; each then reads only its own part of the weights.
#include <type_traits>

#include "cpu/rnn_sequence.h"

namespace fmk::FMK_ISA {
namespace {

template <class T, class Blocks>
bool wants_team(const RnnForward& p, const PackedLayout<T, Blocks>& layout, int threads) {
  return layout.blocks >= 2 * threads &&
         shares_units(p.shape, p.variant, threads, layout.h_bytes());
}

template <class T, class Blocks>
void forward_in_a_team(const RnnForward& p, const PackedLayout<T, Blocks>& layout,
                       const char* packed, RowOrder order, const Parallel& pool) {
  const ItemRows rows{order, p.shape.batch, 0, 1};
  Arena sizes{nullptr};
  SharedState<T>::of(p.shape, rows.count, sizes);
  Arena arena{static_cast<char*>(scratch_bytes(Scratch::kCall2, sizes.used))};
  const auto state = SharedState<T>::of(p.shape, rows.count, arena);
  SequenceRun<T, Blocks>(p, layout, packed, 0, rows).begin(state);
  Team team(pool.threads);
  parallel_for(pool, pool.threads, [&](int64_t) {
    const int index = team.join();
    if (index < 0) return;
    SequenceRun<T, Blocks> run(p, layout, packed, 0, rows);
    run.run_in(team, index, state);
  });
}

template <class T, class Blocks>
void forward_typed(const RnnForward& p, const Parallel& pool) {
  const auto layout = PackedLayout<T, Blocks>::of(p.shape);
  const auto* packed = static_cast<const char*>(p.packed_weight);
  if (!packed) {
    auto* fresh = static_cast<char*>(
        scratch_bytes(Scratch::kCall, p.shape.directions * layout.direction_bytes()));
    pack_typed<T, Blocks>(p.shape, p.variant.layer_norm, p.weights, fresh, pool);
    packed = fresh;
  }
  void* memory =
      scratch_bytes(Scratch::kExtra, RowOrder::bytes(p.lengths, p.shape.batch, p.shape.steps) + 8);
  const auto order = RowOrder::of(p.lengths, p.shape.batch, p.shape.steps, memory);
  const double flops = rnn_flops(p.shape);
  if (flops >= kSerialFlops && wants_team(p, layout, pool.threads))
    return forward_in_a_team(p, layout, packed, order, pool);
  const bool alone = wants_team(p, layout, pool.threads);  // the same tiles as the team's
  Parallel serial;
  const auto items = SequenceItems::of(p.shape, order, alone ? serial : pool);
  for_each_item(items, flops, pool, [&](int64_t item) {
    const ItemRows rows = items.rows(item);
    if (rows.count == 0) return;
    const int64_t d = items.direction(item);
    SequenceRun<T, Blocks> run(p, layout, packed + d * layout.direction_bytes(), d, rows);
    run.run();
  });
}

template <class Body>
void with_type_and_blocks(const RnnShape& shape, const Body& body) {
  with_type(shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    switch (shape.kind) {
      case RnnKind::kLstm: return body(static_cast<T*>(nullptr), LstmBlocks{});
      case RnnKind::kGru: return body(static_cast<T*>(nullptr), GruBlocks{});
      default: return body(static_cast<T*>(nullptr), RnnBlocks{});
    }
  });
}

void rnn_forward(const RnnForward& p, const Parallel& pool) {
  if (rnn_cell_forward(p, pool)) return;
  with_type_and_blocks(p.shape, [&](auto* type, auto blocks) {
    forward_typed<std::remove_pointer_t<decltype(type)>, decltype(blocks)>(p, pool);
  });
}

size_t rnn_packed_bytes(const RnnShape& shape) {
  size_t bytes = 0;
  with_type_and_blocks(shape, [&](auto* type, auto blocks) {
    using T = std::remove_pointer_t<decltype(type)>;
    bytes = shape.directions * PackedLayout<T, decltype(blocks)>::of(shape).direction_bytes();
  });
  return bytes;
}

void rnn_pack_weight(const RnnShape& shape, bool layer_norm, const RnnWeights* weights,
                     void* packed, const Parallel& pool) {
  with_type_and_blocks(shape, [&](auto* type, auto blocks) {
    using T = std::remove_pointer_t<decltype(type)>;
    pack_typed<T, decltype(blocks)>(shape, layer_norm, weights, static_cast<char*>(packed), pool);
  });
}

}  // namespace

const RnnKernels& rnn_kernels() {
  static constexpr RnnKernels table{&rnn_forward, &rnn_backward, &rnn_backward_workspace,
                                    &rnn_packed_bytes, &rnn_pack_weight};
  return table;
}

}  // namespace fmk::FMK_ISA
