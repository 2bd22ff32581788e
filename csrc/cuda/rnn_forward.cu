// The recurrence forward: see rnn.h.
#include "cuda/rnn_product.cuh"

namespace fmk::cuda {
namespace {

constexpr int kGateRows = kRnnSlots;  // a GRU's fourth row is zero

// What an element of the state needs of a step besides the recurrent product.
template <class T>
struct Step {
  float gate[kGateRows];

  __device__ Step(const RnnForward& p, const RnnElement& element, int direction, int t) {
    const T* projected = static_cast<const T*>(p.projected) + direction * p.projected_direction +
                         t * p.projected_step + element.batch * p.projected_batch + element.unit;
    const int gates = rnn_gates(p.shape.cell);
#pragma unroll
    for (int g = 0; g < kGateRows; ++g) {
      gate[g] = element.valid && g < gates ? to_float(projected[g * p.shape.hidden]) : 0.0f;
    }
  }
};

template <class T, int kChunks>
__global__ void __launch_bounds__(kRnnThreads, 1)
    rnn_forward_kernel(const RnnForward p, const RnnPlan plan) {
  using Weights = WeightSlice<T, kChunks, kGateRows>;
  const RnnPlace place(p.shape, plan);
  const int hidden = static_cast<int>(p.shape.hidden), batch = static_cast<int>(p.shape.batch);
  const int steps = static_cast<int>(p.shape.steps), d = place.direction;
  const bool reverse = d == 1, lstm = p.shape.cell == RnnCell::kLstm;
  const int64_t plane = static_cast<int64_t>(batch) * hidden;  // of one direction or step

  unsigned char* shared = dynamic_shared();
  auto* partials = reinterpret_cast<float*>(
      shared + rnn_weight_bytes(plan.groups_per_block, plan.chunks_per_warp, Weights::kOwnChunks,
                                kGateRows));
  // Of the elements that a thread updates in each pass: c of an LSTM, h of a GRU.
  float* state =
      partials + rnn_partial_bytes(kGateRows) / sizeof(float) + static_cast<int>(threadIdx.x);

  const T* w_hh = static_cast<const T*>(p.w_hh[d]);
  Weights weights(shared, place.groups, plan.chunks_per_warp, hidden);
  weights.fill([&](int group, int gate, int unit, int k) {
    if (gate >= rnn_gates(p.shape.cell)) return Words4{};
    const int row = gate * hidden + (place.first_group + group) * kUnits + unit;
    return load16(w_hh + static_cast<int64_t>(row) * hidden + k);
  });

  const T* h0 = static_cast<const T*>(p.h0) + d * plane;
  T* output = static_cast<T*>(p.output) + d * hidden;
  const auto length = [&](int b) { return rnn_length(p.lengths, b, steps); };

  for (int pass = 0; pass < place.passes; ++pass) {
    const RnnElement e(place, plan, pass);
    if (!e.valid) continue;
    const int64_t at = static_cast<int64_t>(d) * plane + static_cast<int64_t>(e.batch) * hidden;
    const T first_h = static_cast<const T*>(p.h0)[at + e.unit];
    const float first_c = lstm ? p.c0[at + e.unit] : 0.0f;
    state[pass * kRnnThreads] = lstm ? first_c : to_float(first_h);
    if (length(e.batch) == 0) {
      static_cast<T*>(p.h_n)[at + e.unit] = first_h;
      if (lstm) p.c_n[at + e.unit] = first_c;
    }
  }

  GridBarrier barrier(p.counters + place.counter, gridDim.x);
  for (int step = 0; step < steps; ++step) {
    const int t = reverse ? steps - 1 - step : step;
    // The hidden state before this step, of sequence b.
    const auto previous = [&](int b) -> const T* {
      if (b >= place.batch_end) return nullptr;
      const bool first = reverse ? t + 1 >= length(b) : t == 0;
      if (first) return h0 + static_cast<int64_t>(b) * hidden;
      return output + (reverse ? t + 1 : t - 1) * p.output_step + b * p.output_batch;
    };
    for (int pass = 0; pass < place.passes; ++pass) {
      if (pass > 0) __syncthreads();  // the partial sums of the pass before have been read
      const RnnElement e(place, plan, pass);
      const Step<T> input(p, e, d, t);  // asked for now, needed after the product
      for (int tile = 0; tile < place.tiles_per_pass; ++tile) {
        const int column = place.column(pass, tile);
        if (column >= place.batch_end) break;
        weights.multiply([&](int n) { return previous(column + n); }, partials,
                         2 * plan.groups_per_block * tile);
      }
      __syncthreads();  // all warps' partial sums are there
      if (!e.valid) continue;

      float sum[kGateRows];
      sum_partials(partials, sum);
      const int64_t at = static_cast<int64_t>(d) * plane + static_cast<int64_t>(e.batch) * hidden;
      const bool active = t < length(e.batch);
      float& kept = state[pass * kRnnThreads];
      float gate[kRnnSlots], h;
      if (lstm) {
        gate[0] = sigmoid(input.gate[0] + sum[0]);
        gate[1] = sigmoid(input.gate[1] + sum[1]);
        gate[2] = tanhf(input.gate[2] + sum[2]);
        gate[3] = sigmoid(input.gate[3] + sum[3]);
        const float c = gate[1] * kept + gate[0] * gate[2];
        h = gate[3] * tanhf(c);
        if (active) kept = c;
      } else {
        const T* bias = static_cast<const T*>(p.b_hn[d]);
        gate[0] = sigmoid(input.gate[0] + sum[0]);
        gate[1] = sigmoid(input.gate[1] + sum[1]);
        gate[3] = sum[2] + (bias == nullptr ? 0.0f : to_float(bias[e.unit]));
        gate[2] = tanhf(input.gate[2] + gate[0] * gate[3]);
        h = (1.0f - gate[1]) * gate[2] + gate[1] * kept;
        if (active) kept = to_float(from_float<T>(h));
      }
      const T rounded = from_float<T>(active ? h : 0.0f);
      output[t * p.output_step + e.batch * p.output_batch + e.unit] = rounded;
      const int64_t saved =
          (static_cast<int64_t>(d) * steps + t) * plane + static_cast<int64_t>(e.batch) * hidden;
      if (p.gates != nullptr) {
        T* gates = static_cast<T*>(p.gates) + saved * kRnnSlots + e.unit;
#pragma unroll
        for (int g = 0; g < kRnnSlots; ++g) {
          gates[static_cast<int64_t>(g) * hidden] = from_float<T>(active ? gate[g] : 0.0f);
        }
      }
      if (lstm && p.cells != nullptr) p.cells[saved + e.unit] = active ? kept : 0.0f;
      const bool last = reverse ? t == 0 : t == length(e.batch) - 1;
      if (active && last) {
        static_cast<T*>(p.h_n)[at + e.unit] = rounded;
        if (lstm) p.c_n[at + e.unit] = kept;
      }
    }
    if (step + 1 < steps) barrier.wait();  // this step's h is complete
  }
}

template <class T, int kChunks>
void start(const RnnForward& p, const RnnPlan& plan, Stream stream) {
  const Grid grid{static_cast<unsigned>(plan.blocks), static_cast<unsigned>(p.shape.directions),
                  static_cast<unsigned>(plan.batch_tiles)};
  launch_cooperative("rnn_forward", rnn_forward_kernel<T, kChunks>, grid, kRnnThreads,
                     plan.shared_bytes, stream, p, plan);
}

template <class T>
void start_by_chunks(const RnnForward& p, const RnnPlan& plan, Stream stream) {
  switch (plan.chunks_per_warp) {
    case 1: return start<T, 1>(p, plan, stream);
    case 2: return start<T, 2>(p, plan, stream);
    case 4: return start<T, 4>(p, plan, stream);
    case 6: return start<T, 6>(p, plan, stream);
    default: return start<T, 8>(p, plan, stream);
  }
}

}  // namespace

void rnn_forward(const RnnForward& p, const RnnPlan& plan, Stream stream) {
  zero(p.counters, static_cast<size_t>(rnn_counters(p.shape, plan)) * sizeof(unsigned), stream);
  switch (p.shape.dtype) {
    case DType::kF32: return start<float, 0>(p, plan, stream);
    case DType::kBF16: return start_by_chunks<bf16>(p, plan, stream);
    default: return start_by_chunks<f16>(p, plan, stream);
  }
}

}  // namespace fmk::cuda
