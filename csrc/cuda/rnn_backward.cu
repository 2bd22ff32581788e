// The recurrence backward: see rnn.h.
#include "cuda/rnn_product.cuh"

namespace fmk::cuda {
namespace {

// What an element needs of a step besides the recurrent product: the saved slots, the state before
// the step (c of an LSTM, h of a GRU), c after it, and the output's gradient.
template <class T>
struct Step {
  float slot[kRnnSlots] = {}, before = 0.0f, cell = 0.0f, grad_output = 0.0f;

  __device__ Step(const RnnBackward& p, const RnnElement& e, int direction, int t, int length) {
    // The last round, which has no step, is t = -1 or t = T.
    if (!e.valid || t < 0 || t >= length) return;
    const int hidden = static_cast<int>(p.shape.hidden), steps = static_cast<int>(p.shape.steps);
    const int64_t plane = p.shape.batch * hidden;
    const int64_t in_plane = static_cast<int64_t>(e.batch) * hidden + e.unit;
    const int64_t saved = (static_cast<int64_t>(direction) * steps + t) * plane;
    const bool reverse = direction == 1;
    const T* gates = static_cast<const T*>(p.gates) +
                     (saved + static_cast<int64_t>(e.batch) * hidden) * kRnnSlots + e.unit;
#pragma unroll
    for (int g = 0; g < kRnnSlots; ++g) slot[g] = to_float(gates[static_cast<int64_t>(g) * hidden]);
    grad_output = to_float(static_cast<const T*>(
        p.grad_output)[t * p.grad_output_step + e.batch * p.grad_output_batch + direction * hidden +
                       e.unit]);
    const bool first = reverse ? t + 1 >= length : t == 0;
    const int earlier = reverse ? t + 1 : t - 1;
    const int64_t in_state = direction * plane + in_plane;
    if (p.shape.cell == RnnCell::kLstm) {
      cell = p.cells[saved + in_plane];
      before = first ? p.c0[in_state] : p.cells[saved + (earlier - t) * plane + in_plane];
    } else {
      before = to_float(first ? static_cast<const T*>(p.h0)[in_state]
                              : static_cast<const T*>(
                                    p.output)[earlier * p.output_step + e.batch * p.output_batch +
                                              direction * hidden + e.unit]);
    }
  }
};

// The gradients before the activations, and what goes on to the step before besides the recurrent
// product: dc of an LSTM, dh * z of a GRU.
template <class T>
__device__ float cell_backward(const Step<T>& s, bool lstm, float dh, float carried,
                               float (&grad)[kRnnSlots]) {
  if (lstm) {
    const float i = s.slot[0], f = s.slot[1], g = s.slot[2], o = s.slot[3];
    const float c = tanhf(s.cell);
    const float dc = carried + dh * o * (1.0f - c * c);
    grad[0] = dc * g * i * (1.0f - i);
    grad[1] = dc * s.before * f * (1.0f - f);
    grad[2] = dc * i * (1.0f - g * g);
    grad[3] = dh * c * o * (1.0f - o);
    return dc * f;
  }
  const float r = s.slot[0], z = s.slot[1], n = s.slot[2], q = s.slot[3];
  const float dn = dh * (1.0f - z) * (1.0f - n * n);
  grad[0] = dn * q * r * (1.0f - r);
  grad[1] = dh * (s.before - n) * z * (1.0f - z);
  grad[2] = dn * r;
  grad[3] = dn;
  return dh * z;
}

template <class T, int kChunks>
__global__ void __launch_bounds__(kRnnThreads, 1)
    rnn_backward_kernel(const RnnBackward p, const RnnPlan plan) {
  using Weights = WeightSlice<T, kChunks, 1>;
  const RnnPlace place(p.shape, plan);
  const int hidden = static_cast<int>(p.shape.hidden), steps = static_cast<int>(p.shape.steps);
  const int d = place.direction;
  const bool reverse = d == 1, lstm = p.shape.cell == RnnCell::kLstm;
  const int64_t plane = p.shape.batch * hidden;
  const int reduction = rnn_gates(p.shape.cell) * hidden;

  unsigned char* shared = dynamic_shared();
  auto* partials = reinterpret_cast<float*>(shared + rnn_weight_bytes(plan.groups_per_block,
                                                                      plan.chunks_per_warp,
                                                                      Weights::kOwnChunks, 1));
  float* carried = partials + rnn_partial_bytes(1) / sizeof(float) + static_cast<int>(threadIdx.x);

  // Columns of w_hh: the gate rows are the reduction.
  const T* w_hh = static_cast<const T*>(p.w_hh[d]);
  Weights weights(shared, place.groups, plan.chunks_per_warp, reduction);
  weights.fill([&](int group, int, int unit, int k) {
    const T* column = w_hh + (place.first_group + group) * kUnits + unit;
    float values[kVectorElements<T>];
#pragma unroll
    for (int i = 0; i < kVectorElements<T>; ++i) {
      values[i] = to_float(column[static_cast<int64_t>(k + i) * hidden]);
    }
    return pack_vector<T>(values);
  });

  T* grad_gates =
      static_cast<T*>(p.grad_gates) + static_cast<int64_t>(d) * steps * plane * kRnnSlots;
  const auto length = [&](int b) { return rnn_length(p.lengths, b, steps); };

  GridBarrier barrier(p.counters + place.counter, gridDim.x);
  // One round more than steps: the last one carries the first step's gradient to the state.
  for (int round = 0; round <= steps; ++round) {
    const int t = reverse ? round : steps - 1 - round, later = reverse ? t - 1 : t + 1;
    for (int pass = 0; pass < place.passes; ++pass) {
      const RnnElement e(place, plan, pass);
      const int own_length = e.valid ? length(e.batch) : 0;
      const Step<T> step(p, e, d, t, round < steps ? own_length : 0);
      float product[1] = {0.0f};
      if (round > 0) {
        if (pass > 0) __syncthreads();  // the partial sums of the pass before have been read
        for (int tile = 0; tile < place.tiles_per_pass; ++tile) {
          const int column = place.column(pass, tile);
          if (column >= place.batch_end) break;
          weights.multiply(
              [&](int n) -> const T* {
                if (column + n >= place.batch_end) return nullptr;
                return grad_gates + later * p.grad_gates_step + (column + n) * p.grad_gates_batch;
              },
              partials, 2 * plan.groups_per_block * tile);
        }
        __syncthreads();  // all warps' partial sums are there
        if (e.valid) sum_partials(partials, product);
      }
      if (!e.valid) continue;

      const int64_t in_state = d * plane + static_cast<int64_t>(e.batch) * hidden + e.unit;
      const bool active = round < steps && t < own_length;
      // The sequence's last step, in its direction's order, is the first one that this loop meets.
      const bool enters = active && (reverse ? t == 0 : t == own_length - 1);
      float carry = enters || round == 0 ? 0.0f : carried[pass * kRnnThreads];
      float dh = product[0] + (lstm ? 0.0f : carry);
      if (enters || own_length == 0) {
        dh += to_float(static_cast<const T*>(p.grad_h_n)[in_state]);
        if (lstm) carry = p.grad_c_n[in_state];
      }
      if (round == (reverse ? own_length : steps)) {
        static_cast<T*>(p.grad_h0)[in_state] = from_float<T>(dh);
        if (lstm) p.grad_c0[in_state] = carry;
      }
      if (round == steps) continue;
      float grad[kRnnSlots] = {};
      if (active) carry = cell_backward(step, lstm, dh + step.grad_output, carry, grad);
      carried[pass * kRnnThreads] = carry;
      T* slots = grad_gates + t * p.grad_gates_step + e.batch * p.grad_gates_batch + e.unit;
#pragma unroll
      for (int g = 0; g < kRnnSlots; ++g) {
        slots[static_cast<int64_t>(g) * hidden] = from_float<T>(grad[g]);
      }
    }
    if (round < steps) barrier.wait();  // this step's gradients are complete
  }
}

template <class T, int kChunks>
void start(const RnnBackward& p, const RnnPlan& plan, Stream stream) {
  const Grid grid{static_cast<unsigned>(plan.blocks), static_cast<unsigned>(p.shape.directions),
                  static_cast<unsigned>(plan.batch_tiles)};
  launch_cooperative("rnn_backward", rnn_backward_kernel<T, kChunks>, grid, kRnnThreads,
                     plan.shared_bytes, stream, p, plan);
}

template <class T>
void start_by_chunks(const RnnBackward& p, const RnnPlan& plan, Stream stream) {
  switch (plan.chunks_per_warp) {
    case 4: return start<T, 4>(p, plan, stream);
    case 8: return start<T, 8>(p, plan, stream);
    case 16: return start<T, 16>(p, plan, stream);
    case 24: return start<T, 24>(p, plan, stream);
    default: return start<T, 32>(p, plan, stream);
  }
}

}  // namespace

void rnn_backward(const RnnBackward& p, const RnnPlan& plan, Stream stream) {
  zero(p.counters, static_cast<size_t>(rnn_counters(p.shape, plan)) * sizeof(unsigned), stream);
  switch (p.shape.dtype) {
    case DType::kF32: return start<float, 0>(p, plan, stream);
    case DType::kBF16: return start_by_chunks<bf16>(p, plan, stream);
    default: return start_by_chunks<f16>(p, plan, stream);
  }
}

}  // namespace fmk::cuda
