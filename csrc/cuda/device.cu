#include "cuda/device.h"

#include "cuda/launch.cuh"

namespace fmk::cuda {

#if defined(FMK_EMULATE_CUDA)

DeviceLimits device_limits() {
  const emu::Device device = emu::device();
  return {device.multiprocessors, device.shared_per_block};
}

std::string device_architectures() { return ""; }

std::string device_problem(int) { return ""; }

void zero(void* data, size_t bytes, Stream) { std::memset(data, 0, bytes); }

#else

namespace {

__global__ void probe_kernel() {}

}  // namespace

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // so that the next call does not report it again
  throw Error(std::string(what) + ": " + cudaGetErrorString(status));
}

DeviceLimits device_limits() {
  int device = 0, multiprocessors = 0, shared = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  return {multiprocessors, static_cast<size_t>(shared)};
}

std::string device_architectures() {
  std::string text;
  for (const int architecture : {__CUDA_ARCH_LIST__}) {
    if (!text.empty()) text += ", ";
    text += std::to_string(architecture / 100) + "." + std::to_string(architecture % 100 / 10);
  }
  return text;
}

std::string device_problem(int index) {
  int driver = 0, runtime = 0, devices = 0, current = 0, major = 0, minor = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    return "no NVIDIA driver is installed";
  }
  cudaRuntimeGetVersion(&runtime);
  const auto version = [](int number) {
    return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
  };
  cudaError_t status = cudaGetDeviceCount(&devices);
  if (status == cudaErrorInsufficientDriver) {
    return "the driver is for CUDA " + version(driver) + ", the kernels were built with " +
           version(runtime);
  }
  if (status == cudaSuccess && index >= devices) return "there is no such device";
  if (status == cudaSuccess) status = cudaGetDevice(&current);
  if (status == cudaSuccess) status = cudaSetDevice(index);
  if (status == cudaSuccess) {
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
    // Whether the driver finds code for this device in the library.
    cudaFuncAttributes attributes;
    status = cudaFuncGetAttributes(&attributes, probe_kernel);
    cudaSetDevice(current);
  }
  if (status == cudaSuccess) return "";
  cudaGetLastError();
  if (status == cudaErrorNoKernelImageForDevice) {
    return "the kernels were built for compute capability " + device_architectures() +
           ", the device has " + std::to_string(major) + "." + std::to_string(minor);
  }
  return cudaGetErrorString(status);
}

void zero(void* data, size_t bytes, Stream stream) {
  check(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
}

#endif

}  // namespace fmk::cuda
