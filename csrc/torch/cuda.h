// What the operators on CUDA tensors share: checks, the device, the stream. In the emulator's build
// (csrc/lab/emu) the same operators take CPU tensors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/device.h"
#include "torch/common.h"

#if defined(FMK_EMULATE_CUDA)
#define FMK_CUDA_KEY CPU
#else
#define FMK_CUDA_KEY CUDA
// Weak: the library also loads into a CPU build of torch, which does not have it.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace fmk::ops {

// For questions that are asked without a tensor.
inline DType dtype_named(const std::string& name) {
  if (name == "float32") return DType::kF32;
  if (name == "bfloat16") return DType::kBF16;
  FMK_CHECK(name == "float16", "dtype: expected float32, bfloat16 or float16, got ", name);
  return DType::kF16;
}

inline bool on_device(const Tensor& tensor) {
#if defined(FMK_EMULATE_CUDA)
  return tensor.is_cpu();
#else
  return tensor.is_cuda();
#endif
}

// A tensor on the device and of the dtype of `model`, contiguous, starting at a multiple of 16
// bytes (the kernels load vectors).
inline void check_operand(const Tensor& tensor, const char* name, const Tensor& model,
                          const std::vector<int64_t>& shape) {
  FMK_CHECK(on_device(tensor) && tensor.get_device() == model.get_device(), name,
            ": expected a tensor on the input's device");
  FMK_CHECK(tensor.scalar_type() == model.scalar_type(), name, ": expected the input's dtype");
  check_shape(tensor, name, shape);
  check_contiguous(tensor, name);
}

// Kernels load vectors of 16 bytes. A contiguous tensor that starts elsewhere, as a view may, is
// copied.
inline bool is_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}
inline Tensor aligned(const Tensor& tensor) {
  return is_aligned(tensor) ? tensor : torch::stable::clone(tensor);
}

// Makes the tensor's device current, as kernel launches want it, and knows its stream.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor) : OnDeviceOf(tensor.get_device()) {}
  explicit OnDeviceOf(int64_t device)
#if defined(FMK_EMULATE_CUDA)
  {
    (void)device;
  }
  cuda::Stream stream() const { return nullptr; }
#else
      : guard_(static_cast<int32_t>(device)), device_(static_cast<int32_t>(device)) {
  }
  cuda::Stream stream() const {
    FMK_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch is a CPU build");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return stream;
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  int32_t device_;
#endif
};

}  // namespace fmk::ops
