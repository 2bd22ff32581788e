// What the host needs to know of a CUDA device, without CUDA's headers: csrc/torch includes this.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

namespace fmk::cuda {

using Stream = void*;  // a cudaStream_t

// A CUDA call failed; the text names the call and gives CUDA's own explanation.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct DeviceLimits {
  int multiprocessors;
  size_t shared_per_block;  // with the opt-in beyond 48 KB
};

// Of the current device. Throws Error.
DeviceLimits device_limits();

// The compute capabilities that the kernels were compiled for: "8.0, 9.0, 10.0".
std::string device_architectures();

// Empty if the kernels of this build run on device `index`, else why not: no driver, one that is
// too old, a compute capability that they were not compiled for.
std::string device_problem(int index);

}  // namespace fmk::cuda
