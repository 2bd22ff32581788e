// Launches that check for errors, on the device and in the emulator.
#pragma once

#include <tuple>

#include "cuda/arch.cuh"
#include "cuda/device.h"

namespace fmk::cuda {

struct Grid {
  unsigned x = 1, y = 1, z = 1;
};

#if !defined(FMK_EMULATE_CUDA)
// Throws Error unless `status` is success.
void check(cudaError_t status, const char* what);
#endif

namespace detail {

template <class... P, class... A>
void launch(bool cooperative, const char* name, void (*kernel)(P...), Grid grid, unsigned threads,
            size_t shared_bytes, Stream stream, const A&... arguments) {
#if defined(FMK_EMULATE_CUDA)
  (void)name, (void)stream;
  try {
    emu::launch({{grid.x, grid.y, grid.z}, {threads, 1, 1}, shared_bytes, cooperative},
                [&] { kernel(P(arguments)...); });
  } catch (const std::runtime_error& error) {
    throw Error(std::string(name) + ": " + error.what());
  }
#else
  constexpr size_t kWithoutOptIn = 48 << 10;
  if (shared_bytes > kWithoutOptIn) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          name);
  }
  std::tuple<P...> values(arguments...);
  void* pointers[sizeof...(P)];
  std::apply(
      [&](P&... value) {
        size_t i = 0;
        ((pointers[i++] = const_cast<void*>(static_cast<const void*>(&value))), ...);
      },
      values);
  const dim3 blocks(grid.x, grid.y, grid.z);
  const auto* function = reinterpret_cast<const void*>(kernel);
  const auto queue = static_cast<cudaStream_t>(stream);
  check(cooperative
            ? cudaLaunchCooperativeKernel(function, blocks, dim3(threads), pointers, shared_bytes,
                                          queue)
            : cudaLaunchKernel(function, blocks, dim3(threads), pointers, shared_bytes, queue),
        name);
#endif
}

}  // namespace detail

// `name` is for the error's text. Throws Error if the launch is refused.
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), Grid grid, unsigned threads,
            size_t shared_bytes, Stream stream, const A&... arguments) {
  detail::launch(false, name, kernel, grid, threads, shared_bytes, stream, arguments...);
}

// All blocks resident at once, or Error: only then may they wait for one another.
template <class... P, class... A>
void launch_cooperative(const char* name, void (*kernel)(P...), Grid grid, unsigned threads,
                        size_t shared_bytes, Stream stream, const A&... arguments) {
  detail::launch(true, name, kernel, grid, threads, shared_bytes, stream, arguments...);
}

// Fills with zero bytes, in order with the stream's kernels.
void zero(void* data, size_t bytes, Stream stream);

}  // namespace fmk::cuda
