// What both directions of the recurrence share: a block's place in the grid, its slice of the
// recurrent weights, and the product with 8 columns of the batch.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/rnn.h"

namespace fmk::cuda {

constexpr int kRnnWarps = 8;
constexpr int kRnnThreads = kRnnWarps * kWarp;
constexpr int kUnits = 8;           // features of a group: the rows of a lane group of a fragment
constexpr int kColumns = 8;         // of the batch: a fragment's N
constexpr int kMaxGroups = 4;       // per block
constexpr int kMaxLargeGroups = 2;  // where one group's weights take half of the registers
constexpr int kSlots = kRnnWarps;   // (tile, group, column parity) combinations per pass
constexpr int kChunkBytes = 64;     // of the reduction: 16 bytes for each of a lane group's 4 lanes

// The reduction is cut into chunks of 64 bytes and these are dealt to the warps, so each warp keeps
// the weights of its own chunks. A lane takes 16 adjacent bytes of a chunk, of both operands: with
// fragments that permutes the reduction index, which changes no sum, and makes every load a vector.
template <class T>
inline constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(T));

// Half types keep of a block's first group this many pieces per warp in registers (16 bytes a lane:
// a row of a chunk; 96 registers at most) and everything else in shared memory; float keeps all in
// shared memory. More than these and the compiler spills.
constexpr int kOwnPieces = 24, kOwnSinglePieces = 16, kOwnSinglePiecesOfMany = 12;
constexpr int rnn_group_limit(bool fragments, int chunks_per_warp, int rows) {
  return fragments && chunks_per_warp * rows < kOwnPieces ? kMaxGroups : kMaxLargeGroups;
}
constexpr int rnn_own_chunks(bool fragments, int chunks_per_warp, int rows) {
  const bool many = rnn_group_limit(fragments, chunks_per_warp, rows) == kMaxGroups;
  const int single = many ? kOwnSinglePiecesOfMany : kOwnSinglePieces;
  const int most = rows == 1 ? single : kOwnPieces / rows;
  return !fragments ? 0 : chunks_per_warp < most ? chunks_per_warp : most;
}
constexpr int rnn_tiles_per_pass(int groups_per_block) {
  return groups_per_block >= kMaxGroups ? 1 : kMaxGroups / groups_per_block;
}
constexpr int rnn_passes(int groups_per_block, int batch_per_tile) {
  const int columns = rnn_tiles_per_pass(groups_per_block) * kColumns;
  return (batch_per_tile + columns - 1) / columns;
}
constexpr size_t rnn_weight_bytes(int groups_per_block, int chunks_per_warp, int own_chunks,
                                  int rows) {
  const int chunks = groups_per_block * chunks_per_warp - own_chunks;
  return size_t(chunks) * kRnnWarps * rows * kWarp * sizeof(Words4);
}
constexpr size_t rnn_partial_bytes(int rows) {
  return size_t(kSlots) * kRnnWarps * kWarp * rows * sizeof(float);
}

// Which features and sequences a block computes, and which of them this thread updates.
struct RnnPlace {
  int direction, first_group, groups, batch_begin, batch_end, tiles_per_pass, passes;
  unsigned counter;

  __device__ RnnPlace(const RnnShape& shape, const RnnPlan& plan) {
    direction = static_cast<int>(blockIdx.y);
    first_group = static_cast<int>(blockIdx.x) * plan.groups_per_block;
    const int rest = static_cast<int>(shape.hidden) / kUnits - first_group;
    groups = rest < plan.groups_per_block ? rest : plan.groups_per_block;
    batch_begin = static_cast<int>(blockIdx.z) * plan.batch_per_tile;
    const int batch = static_cast<int>(shape.batch);
    batch_end = batch_begin + plan.batch_per_tile;
    if (batch_end > batch) batch_end = batch;
    tiles_per_pass = rnn_tiles_per_pass(plan.groups_per_block);
    passes = rnn_passes(plan.groups_per_block, plan.batch_per_tile);
    counter = blockIdx.y * gridDim.z + blockIdx.z;
  }

  __device__ int column(int pass, int tile) const {
    return batch_begin + (pass * tiles_per_pass + tile) * kColumns;
  }
};

// The (feature, sequence) pair that a thread updates in a pass.
struct RnnElement {
  bool valid;
  int unit, batch;

  __device__ RnnElement(const RnnPlace& place, const RnnPlan& plan, int pass) {
    const int slot = static_cast<int>(threadIdx.x) / kWarp;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int tile = slot / (2 * plan.groups_per_block);
    const int group = slot / 2 % plan.groups_per_block;
    unit = (place.first_group + group) * kUnits + lane / 4;
    batch = place.column(pass, tile) + 2 * (lane % 4) + slot % 2;
    valid = tile < place.tiles_per_pass && group < place.groups && batch < place.batch_end;
  }
};

// Lengths are the caller's data on the device: one past the last step must not be believed.
__device__ inline int rnn_length(const int64_t* lengths, int sequence, int steps) {
  if (lengths == nullptr) return steps;
  const int64_t length = lengths[sequence];
  return length < 0 ? 0 : length < steps ? static_cast<int>(length) : steps;
}

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// One block's rows of the recurrent matrix. `kRows` of them belong to each feature: its four gates
// in the forward, itself in the backward. `kChunks` per warp; 0 for float, where the number is only
// known at run time.
template <class T, int kChunks, int kRows>
class WeightSlice {
 public:
  static constexpr bool kFragments = !std::is_same_v<T, float>;
  static constexpr int kOwnChunks = rnn_own_chunks(kFragments, kChunks, kRows);

  __device__ WeightSlice(unsigned char* shared, int groups, int chunks_per_warp, int reduction)
      : shared_(reinterpret_cast<Words4*>(shared)),
        groups_(groups),
        chunks_(kFragments ? kChunks : chunks_per_warp),
        reduction_(reduction),
        warp_(static_cast<int>(threadIdx.x) / kWarp),
        lane_(static_cast<int>(threadIdx.x) % kWarp) {}

  // load(group, row, unit, k): the weights of feature `unit` of a group from reduction index k on,
  // as many as 16 bytes hold.
  template <class Load>
  __device__ void fill(const Load& load) {
#pragma unroll
    for (int chunk = 0; chunk < kOwnChunks; ++chunk) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) own_[chunk][row] = piece(load, 0, row, chunk);
    }
    for (int group = 0; group < groups_; ++group) {
      for (int chunk = group == 0 ? kOwnChunks : 0; chunk < chunks_; ++chunk) {
        for (int row = 0; row < kRows; ++row) {
          store16(at(group, chunk, row), piece(load, group, row, chunk));
        }
      }
    }
  }

  // Adds this warp's share of the products with 8 vectors to `partials`, which hold
  // [group][column parity][warp][lane][row] from slot `first_slot` on. vector(n) is the n-th one,
  // null for zeros.
  template <class Vector>
  __device__ void multiply(const Vector& vector, float* partials, int first_slot) const {
    if constexpr (kFragments) {
      multiply_by_fragments(vector, partials, first_slot);
    } else {
      multiply_by_lanes(vector, partials, first_slot);
    }
  }

 private:
  static constexpr int kGroupLimit = rnn_group_limit(kFragments, kChunks, kRows);
  // Chunks loaded together: the loads' latencies overlap, and the registers suffice.
  static constexpr bool kCrowded = kChunks * kRows >= kOwnSinglePieces;
  static constexpr int kAtOnce = !kFragments ? 1 : kCrowded ? 2 : kChunks < 4 ? kChunks : 4;

  __device__ int first_index(int chunk) const {
    return (warp_ * chunks_ + chunk) * kChunk<T> + lane_ % 4 * kVectorElements<T>;
  }
  template <class Load>
  __device__ Words4 piece(const Load& load, int group, int row, int chunk) const {
    const int k = first_index(chunk);
    return k < reduction_ ? load(group, row, lane_ / 4, k) : Words4{};
  }
  __device__ Words4* at(int group, int chunk, int row) const {
    // The first group's chunks, then whole groups.
    const int rest = chunks_ - kOwnChunks;
    const int place = group == 0
                          ? warp_ * rest + chunk - kOwnChunks
                          : kRnnWarps * rest + ((group - 1) * kRnnWarps + warp_) * chunks_ + chunk;
    return shared_ + (place * kRows + row) * kWarp + lane_;
  }
  __device__ Words4 vector_piece(const T* vector, int chunk) const {
    const int k = first_index(chunk);
    return vector != nullptr && k < reduction_ ? load16_shared_by_grid(vector + k) : Words4{};
  }
  __device__ float* partial(float* partials, int slot) const {
    return partials + (slot * kRnnWarps + warp_) * kWarp * kRows + lane_ * kRows;
  }

  static constexpr int kTiles = kRows == 4 ? 2 : 1;  // fragments of 16 rows that a group takes

  // Adds kAtOnce chunks from `first` on; kOwn: the first group's weights are in registers.
  template <bool kOwn>
  __device__ void add_chunks(const T* vector, int first,
                             float (&sum)[kGroupLimit][kTiles][4]) const {
    Words4 b[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) b[i] = vector_piece(vector, first + i);
#pragma unroll
    for (int group = 0; group < kGroupLimit; ++group) {
      if (group >= groups_) break;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        Words4 a[kRows];
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          a[row] = kOwn && group == 0 ? own_[kOwn ? first + i : 0][row]
                                      : load16(at(group, first + i, row));
        }
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          const int k0 = 2 * step, k1 = 2 * step + 1;
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            // Rows g and g + 8 of the fragment: two gates of one feature. The backward has only one
            // row per feature, and leaves the second half empty.
            const Words4& upper = a[kRows == 4 ? 2 * tile : 0];
            const Words4 lower = kRows == 4 ? a[kRows == 4 ? 2 * tile + 1 : 0] : Words4{};
            multiply_fragments<T>(sum[group][tile], upper.word[k0], lower.word[k0], upper.word[k1],
                                  lower.word[k1], b[i].word[k0], b[i].word[k1]);
          }
        }
      }
    }
  }

  template <class Vector>
  __device__ void multiply_by_fragments(const Vector& vector, float* partials,
                                        int first_slot) const {
    static_assert(kOwnChunks % kAtOnce == 0 && kChunks % kAtOnce == 0);
    float sum[kGroupLimit][kTiles][4] = {};
    const T* own_vector = vector(lane_ / 4);
#pragma unroll
    for (int first = 0; first < kOwnChunks; first += kAtOnce) {
      add_chunks<true>(own_vector, first, sum);
    }
#pragma unroll 1
    for (int first = kOwnChunks; first < kChunks; first += kAtOnce) {
      add_chunks<false>(own_vector, first, sum);
    }
#pragma unroll
    for (int group = 0; group < kGroupLimit; ++group) {
      if (group >= groups_) break;
#pragma unroll
      for (int parity = 0; parity < 2; ++parity) {
        float* place = partial(partials, first_slot + 2 * group + parity);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          place[2 * tile] = sum[group][tile][parity];
          if (kRows == 4) place[2 * tile + 1] = sum[group][tile][2 + parity];
        }
      }
    }
  }

  template <class Vector>
  __device__ void multiply_by_lanes(const Vector& vector, float* partials, int first_slot) const {
    float sum[kGroupLimit][kColumns][kRows] = {};
    const T* vectors[kColumns];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) vectors[n] = vector(n);
    for (int chunk = 0; chunk < chunks_; ++chunk) {
      float b[kColumns][kVectorElements<float>];
#pragma unroll
      for (int n = 0; n < kColumns; ++n) unpack<float>(vector_piece(vectors[n], chunk), b[n]);
#pragma unroll
      for (int group = 0; group < kGroupLimit; ++group) {
        if (group >= groups_) break;
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          float a[kVectorElements<float>];
          unpack<float>(load16(at(group, chunk, row)), a);
#pragma unroll
          for (int n = 0; n < kColumns; ++n) {
#pragma unroll
            for (int i = 0; i < kVectorElements<float>; ++i) sum[group][n][row] += a[i] * b[n][i];
          }
        }
      }
    }
    // Each lane of a lane group has its own piece of the reduction; it keeps the sums of the
    // columns that it would have as part of a fragment.
#pragma unroll
    for (int group = 0; group < kGroupLimit; ++group) {
      if (group >= groups_) break;
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          float total = sum[group][n][row];
          total += __shfl_xor_sync(kFullWarp, total, 1);
          total += __shfl_xor_sync(kFullWarp, total, 2);
          if (n / 2 == lane_ % 4) partial(partials, first_slot + 2 * group + n % 2)[row] = total;
        }
      }
    }
  }

  Words4* shared_;
  int groups_, chunks_, reduction_, warp_, lane_;
  Words4 own_[kOwnChunks > 0 ? kOwnChunks : 1][kRows];
};

// The sum over the warps of what multiply() left for this thread's element.
template <int kRows>
__device__ inline void sum_partials(const float* partials, float (&sum)[kRows]) {
  const int slot = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int row = 0; row < kRows; ++row) sum[row] = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kRnnWarps; ++warp) {
    const float* place = partials + ((slot * kRnnWarps + warp) * kWarp + lane) * kRows;
    if constexpr (kRows == 4) {
      float part[4];
      unpack<float>(load16(place), part);
#pragma unroll
      for (int row = 0; row < kRows; ++row) sum[row] += part[row];
    } else {
      sum[0] += place[0];
    }
  }
}

}  // namespace fmk::cuda
