// Which blocks a recurrence takes: see rnn.h.
#include "cuda/rnn_product.cuh"

namespace fmk::cuda {
namespace {

constexpr int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Chunks of the reduction per warp: for half types one of those that the kernels are compiled for,
// 0 if none suffices.
int chunks_per_warp(const RnnShape& shape, bool backward) {
  const int64_t element = shape.dtype == DType::kF32 ? sizeof(float) : sizeof(bf16);
  const int64_t vectors = backward ? rnn_gates(shape.cell) : 1;
  const int needed = ceil_div(vectors * shape.hidden * element, kChunkBytes * kRnnWarps);
  if (shape.dtype == DType::kF32) return needed;
  constexpr int kCompiled[] = {1, 2, 4, 6, 8}, kBackwardScale = 4;
  for (int chunks : kCompiled) {
    const int scaled = backward ? kBackwardScale * chunks : chunks;
    if (scaled >= needed) return scaled;
  }
  return 0;
}

}  // namespace

std::string plan_rnn(const RnnShape& shape, bool backward, const DeviceLimits& limits,
                     RnnPlan* plan) {
  if (shape.dtype == DType::kF64) return "computes in float32, bfloat16 and float16, not float64";
  if (shape.hidden % kUnits != 0) {
    return "takes hidden sizes that are multiples of 8, got " + std::to_string(shape.hidden);
  }
  constexpr int64_t kIndexLimit = int64_t{1} << 30;
  if (shape.steps >= kIndexLimit || shape.batch >= kIndexLimit) {
    return "takes fewer than 2^30 steps and sequences";
  }
  plan->chunks_per_warp = chunks_per_warp(shape, backward);
  if (plan->chunks_per_warp == 0) {
    return "keeps hidden sizes up to 2048 on chip, got " + std::to_string(shape.hidden);
  }
  const int rows = backward ? 1 : kRnnSlots, groups = static_cast<int>(shape.hidden / kUnits);
  const int directions = static_cast<int>(shape.directions);
  const bool fragments = shape.dtype != DType::kF32;
  const int own_chunks = rnn_own_chunks(fragments, plan->chunks_per_warp, rows);
  const int most = rnn_group_limit(fragments, plan->chunks_per_warp, rows);
  for (int per_block = 1; per_block <= most; ++per_block) {
    plan->groups_per_block = per_block;
    plan->blocks = ceil_div(groups, per_block);
    if (plan->blocks * directions > limits.multiprocessors) continue;
    const int batch_tiles = ceil_div(shape.batch, kColumns);
    const int room = limits.multiprocessors / (plan->blocks * directions);
    plan->batch_per_tile =
        ceil_div(batch_tiles, batch_tiles < room ? batch_tiles : room) * kColumns;
    plan->batch_tiles = ceil_div(shape.batch, plan->batch_per_tile);
    plan->shared_bytes =
        rnn_weight_bytes(per_block, plan->chunks_per_warp, own_chunks, rows) +
        rnn_partial_bytes(rows) +
        size_t(rnn_passes(per_block, plan->batch_per_tile)) * kRnnThreads * sizeof(float);
    if (plan->shared_bytes <= limits.shared_per_block) return "";
  }
  return "the recurrent weights of " + std::to_string(shape.hidden) + " features in " +
         std::to_string(directions) + " direction(s) and the states of " +
         std::to_string(shape.batch) + " sequences do not fit the registers and shared memory of " +
         std::to_string(limits.multiprocessors) + " multiprocessors";
}

}  // namespace fmk::cuda
