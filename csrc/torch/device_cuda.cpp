// Whether the CUDA kernels run on a device: for the Python layer's choice of backend.
#include "torch/cuda.h"

namespace fmk::ops {
namespace {

// Empty, or why not; asked without a tensor, so that a machine without a driver can answer too.
std::string cuda_device_problem(int64_t device) {
  return cuda::device_problem(static_cast<int>(device));
}

}  // namespace
}  // namespace fmk::ops

// Not in the emulator's build: this operator tells whether the package has CUDA kernels.
#if !defined(FMK_EMULATE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fmkernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_device_problem", TORCH_BOX(&fmk::ops::cuda_device_problem));
}
#endif
