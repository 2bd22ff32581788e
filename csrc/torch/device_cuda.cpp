// Whether the CUDA kernels run on a device: for the Python layer's choice of backend.
#include "torch/cuda.h"

// Not in the emulator's build: these operators tell whether the package has CUDA kernels.
#if !defined(FMK_EMULATE_CUDA)
namespace fmk::ops {
namespace {

// Empty, or why not; asked without a tensor, so that a machine without a driver can answer too.
std::string cuda_device_problem(int64_t device) {
  return cuda::device_problem(static_cast<int>(device));
}

std::string cuda_architectures() { return cuda::device_architectures(); }

}  // namespace
}  // namespace fmk::ops

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_device_problem", TORCH_BOX(&fmk::ops::cuda_device_problem));
  m.impl("cuda_architectures", TORCH_BOX(&fmk::ops::cuda_architectures));
}
#endif
