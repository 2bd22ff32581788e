// The recurrence of an LSTM or GRU layer in one launch: the recurrent weights stay in registers and
// shared memory for all time steps, and the blocks meet at a barrier after each.
//
// The input's share of the gates comes in ready (one GEMM over all steps before), and the backward
// returns the gates' gradients (from which weights' and input's gradients are GEMMs after).
//
// Letters: T steps, B batch, H hidden features, D directions, G gates of the cell. Matrices are
// contiguous unless strides are given, strides count elements, vectors of H features are
// contiguous, and every pointer and stride is a multiple of 16 bytes. H is a multiple of 8. No
// pointers alias.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "core/types.h"
#include "cuda/device.h"

namespace fmk::cuda {

// Gates in torch's order: i, f, g, o and r, z, n.
enum class RnnCell : int { kLstm, kGru };
constexpr int rnn_gates(RnnCell cell) { return cell == RnnCell::kLstm ? 4 : 3; }
// What the forward saves per feature: the activated i, f, g, o, or r, z, n of a GRU and
// q = W_hn h + b_hn, which r multiplies.
constexpr int kRnnSlots = 4;
constexpr int kMaxDirections = 2;

struct RnnShape {
  DType dtype;  // not kF64
  RnnCell cell;
  int64_t steps, batch, hidden, directions;
};

struct RnnForward {
  RnnShape shape;
  // W_ih x + b_ih (+ b_hh, but for a GRU's n gate): feature g * H + j of gate g.
  const void* projected;
  int64_t projected_direction, projected_step, projected_batch;  // strides
  const void* w_hh[kMaxDirections];                              // (G * H, H)
  const void* b_hn[kMaxDirections];                              // GRU: (H) or null
  const void* h0;                                                // (D, B, H)
  const float* c0;                                               // LSTM: (D, B, H)
  const int64_t* lengths;  // (B): steps of each sequence, cut off at T; null: all T
  void* output;            // direction d at feature d * H; 0 past a sequence's length
  int64_t output_step, output_batch;
  void* h_n;           // (D, B, H)
  float* c_n;          // LSTM: (D, B, H)
  void* gates;         // (D, T, B, 4 H), see kRnnSlots; null: not saved
  float* cells;        // LSTM: (D, T, B, H), null: not saved
  unsigned* counters;  // rnn_counters() words of scratch
};

struct RnnBackward {
  RnnShape shape;
  const void* grad_output;
  int64_t grad_output_step, grad_output_batch;
  const void* grad_h_n;   // (D, B, H)
  const float* grad_c_n;  // LSTM
  const void* w_hh[kMaxDirections];
  const void* h0;   // GRU
  const float* c0;  // LSTM
  const int64_t* lengths;
  const void* output;  // GRU: the forward's
  int64_t output_step, output_batch;
  const void* gates;   // the forward's
  const float* cells;  // LSTM: the forward's
  // (D, T, B, 4 H) in any order of T and B: gradients before the activations of i, f, g, o, or of
  // r, z, of q = W_hn h + b_hn, and of n's W_in x + b_in. 0 past a length.
  void* grad_gates;
  int64_t grad_gates_step, grad_gates_batch;
  void* grad_h0;   // (D, B, H)
  float* grad_c0;  // LSTM
  unsigned* counters;
};

// How a recurrence is spread over the device.
struct RnnPlan {
  int groups_per_block;  // of 8 features
  int blocks;            // per direction and batch tile
  int batch_tiles, batch_per_tile;
  int chunks_per_warp;  // 64-byte pieces of the reduction
  size_t shared_bytes;
};

// Fills *plan, or returns why this recurrence does not fit the device. With 64 sequences there fit,
// in 16 bits with one and two directions, 1536 and 864 features on an A100, 2048 and 1056 on an
// H100, 2048 and 1184 on a B200; in float32 864 and 432, 1056 and 640, 1184 and 640.
//
// Of all plans that fit: the fewest features per block, because a step's time is that of one block
// plus the barrier.
std::string plan_rnn(const RnnShape& shape, bool backward, const DeviceLimits& limits,
                     RnnPlan* plan);
inline int64_t rnn_counters(const RnnShape& shape, const RnnPlan& plan) {
  return shape.directions * plan.batch_tiles;
}

// Throw Error if the launch fails.
void rnn_forward(const RnnForward& problem, const RnnPlan& plan, Stream stream);
void rnn_backward(const RnnBackward& problem, const RnnPlan& plan, Stream stream);

}  // namespace fmk::cuda
