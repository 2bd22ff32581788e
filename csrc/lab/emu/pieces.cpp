// The emulator's pieces one by one, as operators for tests/test_emu.py, and kernels that break a
// rule on purpose.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda/launch.cuh"

namespace fmk::emu {
namespace {

using torch::stable::Tensor;

// A (16, 16) times B (16, 8), both float with values that bf16 holds, through the fragments.
Tensor multiply_fragments(const Tensor& a, const Tensor& b) {
  Tensor result = torch::stable::new_empty(a, {16, 8});
  const auto* left = static_cast<const float*>(a.const_data_ptr());
  const auto* right = static_cast<const float*>(b.const_data_ptr());
  auto* sums = static_cast<float*>(result.mutable_data_ptr());
  launch({{1, 1, 1}, {kWarpSize, 1, 1}, 0, false}, [=] {
    // As PTX ISA's figures for mma.m16n8k16 have it.
    const int group = static_cast<int>(threadIdx.x) / 4,
              in_group = static_cast<int>(threadIdx.x) % 4;
    uint32_t of_a[4], of_b[2];
    for (int i = 0; i < 4; ++i) {
      const int row = group + (i % 2 == 0 ? 0 : 8), column = 2 * in_group + (i < 2 ? 0 : 8);
      of_a[i] = cuda::pack<bf16>(left[row * 16 + column], left[row * 16 + column + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      const int row = 2 * in_group + 8 * i;
      of_b[i] = cuda::pack<bf16>(right[row * 8 + group], right[(row + 1) * 8 + group]);
    }
    float d[4] = {};
    cuda::multiply_fragments<bf16>(d, of_a[0], of_a[1], of_a[2], of_a[3], of_b[0], of_b[1]);
    for (int i = 0; i < 4; ++i) {
      sums[(group + i / 2 * 8) * 8 + 2 * in_group + i % 2] = d[i];
    }
  });
  return result;
}

// What each lane gets of four 8x8 matrices of int16: (32, 4, 2).
Tensor load_matrices(const Tensor& matrices, bool transposed) {
  Tensor result = torch::stable::new_empty(matrices, {kWarpSize, 4, 2});
  const auto* source = static_cast<const uint16_t*>(matrices.const_data_ptr());
  auto* lanes = static_cast<uint16_t*>(result.mutable_data_ptr());
  launch({{1, 1, 1}, {kWarpSize, 1, 1}, 4 * 64 * sizeof(uint16_t), false}, [=] {
    auto* shared = reinterpret_cast<uint16_t*>(cuda::dynamic_shared());
    const int lane = static_cast<int>(threadIdx.x);
    for (int i = lane; i < 4 * 64; i += static_cast<int>(kWarpSize)) shared[i] = source[i];
    __syncthreads();
    uint32_t words[4];
    if (transposed) {
      cuda::load_matrices<true>(words, shared + lane * 8);
    } else {
      cuda::load_matrices<false>(words, shared + lane * 8);
    }
    for (int m = 0; m < 4; ++m) {
      lanes[(lane * 4 + m) * 2] = static_cast<uint16_t>(words[m]);
      lanes[(lane * 4 + m) * 2 + 1] = static_cast<uint16_t>(words[m] >> 16);
    }
  });
  return result;
}

// Rows: the lane's own value, xor 5, down 3, from lane 7, how many are positive.
Tensor warp_functions(const Tensor& values) {
  Tensor result = torch::stable::new_empty(values, {5, kWarpSize});
  const auto* source = static_cast<const float*>(values.const_data_ptr());
  auto* rows = static_cast<float*>(result.mutable_data_ptr());
  launch({{1, 1, 1}, {kWarpSize, 1, 1}, 0, false}, [=] {
    const unsigned lane = threadIdx.x;
    const float own = source[lane];
    rows[lane] = own;
    rows[32 + lane] = __shfl_xor_sync(cuda::kFullWarp, own, 5);
    rows[64 + lane] = __shfl_down_sync(cuda::kFullWarp, own, 3);
    rows[96 + lane] = __shfl_sync(cuda::kFullWarp, own, 7);
    unsigned ballot = __ballot_sync(cuda::kFullWarp, own > 0.0f);
    float count = 0;
    for (; ballot != 0; ballot &= ballot - 1) ++count;
    rows[128 + lane] = count;
  });
  return result;
}

// Every block adds its threads' numbers, meets the others, and reads the total: (blocks).
Tensor grid_sums(const Tensor& like, int64_t blocks) {
  Tensor result = torch::stable::new_empty(like, {blocks});
  auto* sums = static_cast<float*>(result.mutable_data_ptr());
  float total = 0.0f;
  unsigned arrivals = 0;
  launch({{static_cast<unsigned>(blocks), 1, 1}, {64, 1, 1}, 0, true}, [&] {
    cuda::GridBarrier barrier(&arrivals, gridDim.x);
    atomicAdd(&total, static_cast<float>(threadIdx.x));
    barrier.wait();
    const float seen = total;
    barrier.wait();
    atomicAdd(&total, 1.0f);
    if (threadIdx.x == 0) sums[blockIdx.x] = seen;
  });
  return result;
}

// What shared memory holds before anybody wrote to it: dynamic, static.
Tensor fresh_shared(const Tensor& like) {
  Tensor result = torch::stable::new_empty(like, {2});
  auto* values = static_cast<float*>(result.mutable_data_ptr());
  launch({{1, 1, 1}, {kWarpSize, 1, 1}, 64, false}, [=] {
    FMK_SHARED(float, fixed, 4);
    if (threadIdx.x == 0) {
      values[0] = reinterpret_cast<const float*>(cuda::dynamic_shared())[3];
      values[1] = fixed[3];
    }
  });
  return result;
}

// Ones copied by 16 bytes, before and after waiting for them: (2, 4 copies).
Tensor asynchronous_copies(const Tensor& like, int64_t copies) {
  Tensor result = torch::stable::new_empty(like, {2, 4 * copies});
  auto* values = static_cast<float*>(result.mutable_data_ptr());
  alignas(16) const float ones[4] = {1, 1, 1, 1};
  launch({{1, 1, 1}, {kWarpSize, 1, 1}, static_cast<size_t>(copies) * sizeof ones, false}, [&] {
    auto* shared = reinterpret_cast<float*>(cuda::dynamic_shared());
    if (threadIdx.x == 0) {
      for (int64_t i = 0; i < copies; ++i) cuda::copy_async16(shared + 4 * i, ones, true);
      cuda::copy_async_commit();
      std::memcpy(values, shared, static_cast<size_t>(copies) * sizeof ones);
      cuda::copy_async_wait<0>();
      std::memcpy(values + 4 * copies, shared, static_cast<size_t>(copies) * sizeof ones);
    }
  });
  return result;
}

// Kernels that no device would run to their end. Returns if the emulator lets them.
void broken(std::string what) {
  alignas(16) static float data[8] = {};
  const Launch one_block{{1, 1, 1}, {64, 1, 1}, 0, false};
  if (what == "divergent barrier") {
    launch(one_block, [] {
      if (threadIdx.x < 40) __syncthreads();
    });
  } else if (what == "different barriers") {
    launch(one_block, [] {
      if (threadIdx.x < 40) {
        __syncthreads();
      } else {
        __syncthreads();
      }
    });
  } else if (what == "divergent shuffle") {
    launch(one_block, [] {
      if (threadIdx.x != 3) __shfl_xor_sync(cuda::kFullWarp, 1.0f, 1);
    });
  } else if (what == "endless wait") {
    unsigned never = 0;
    launch(one_block, [&] {
      while (cuda::load_acquire(&never) == 0) {
      }
    });
  } else if (what == "misaligned vector") {
    launch(one_block, [] { cuda::load16(data + 1); });
  } else if (what == "too many blocks") {
    launch({{1000, 1, 1}, {64, 1, 1}, 0, true}, [] {});
  } else if (what == "too much shared memory") {
    launch({{1, 1, 1}, {64, 1, 1}, 1 << 20, false}, [] {});
  }
}

}  // namespace
}  // namespace fmk::emu

STABLE_TORCH_LIBRARY(fmkernels_emulator, m) {
  m.def("multiply_fragments(Tensor a, Tensor b) -> Tensor");
  m.def("load_matrices(Tensor matrices, bool transposed) -> Tensor");
  m.def("warp_functions(Tensor values) -> Tensor");
  m.def("grid_sums(Tensor like, int blocks) -> Tensor");
  m.def("fresh_shared(Tensor like) -> Tensor");
  m.def("asynchronous_copies(Tensor like, int copies) -> Tensor");
  m.def("broken(str what) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fmkernels_emulator, CompositeExplicitAutograd, m) {
  m.impl("multiply_fragments", TORCH_BOX(&fmk::emu::multiply_fragments));
  m.impl("load_matrices", TORCH_BOX(&fmk::emu::load_matrices));
  m.impl("warp_functions", TORCH_BOX(&fmk::emu::warp_functions));
  m.impl("grid_sums", TORCH_BOX(&fmk::emu::grid_sums));
  m.impl("fresh_shared", TORCH_BOX(&fmk::emu::fresh_shared));
  m.impl("asynchronous_copies", TORCH_BOX(&fmk::emu::asynchronous_copies));
  m.impl("broken", TORCH_BOX(&fmk::emu::broken));
}
