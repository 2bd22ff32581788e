// CUDA's vocabulary for g++: what the files of csrc/cuda need so that the same source runs on the
// CPU, thread by thread, in tests.
//
// A kernel runs once per CUDA thread. Two schedulers are there, and a library is linked with one:
//   fibers.cpp   all threads on one OS thread, switched at barriers in a random but repeatable
//                order ($FMK_EMU_SEED). Finds divergent barriers and deadlocks.
//   threads.cpp  one OS thread per CUDA thread, for ThreadSanitizer on small cases.
//
// What it adds to a plain run: shared memory starts as NaN and is allocated to the byte, so that
// AddressSanitizer sees its ends; misaligned vector accesses fail; of the asynchronous copies some
// land at once and some as late as the kernel allows, so that a missing wait reads NaN. What it
// cannot show: bank conflicts, weak memory ordering, register pressure, speed.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

namespace fmk::emu {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

constexpr unsigned kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;

struct Block;

// What a CUDA thread knows about itself.
struct Thread {
  Dim3 thread_index, block_index;
  Block* block = nullptr;
  unsigned rank = 0;  // within the block
  unsigned share_count = 0;
  struct PendingCopies* copies = nullptr;

  unsigned lane() const { return rank % kWarpSize; }
};

struct Launch {
  Dim3 grid, block;
  size_t shared_bytes = 0;
  // All blocks are resident at once and may wait for one another.
  bool cooperative = false;
};

// Runs `kernel` for every thread. Throws std::runtime_error when the kernel breaks a rule: a
// barrier that some threads never reach, a misaligned access, a grid that does not fit.
void launch(const Launch& launch, const std::function<void()>& kernel);

// The device that is emulated: an H100, unless $FMK_EMU_MULTIPROCESSORS or $FMK_EMU_SHARED says
// otherwise.
struct Device {
  int multiprocessors;
  size_t shared_per_block;
};
Device device();

// --- what kernels call, through the macros below and arch.cuh ---

Thread& self();
Dim3 block_size();
Dim3 grid_size();
// `line` tells one barrier of a kernel from another: all threads of a block have to meet at the
// same.
void block_barrier(int line);
void warp_barrier();
// Called in a loop that waits for another thread's store.
void spin();
[[noreturn]] void fail(const std::string& message);

void* dynamic_shared();
// `key` tells one declaration from another.
void* static_shared(const void* key, size_t bytes);

// Every lane of the warp gives `mine` and gets everybody's: entry i is lane i's. Valid until the
// lane's next-but-one call.
using LaneData = std::array<uint32_t, 8>;
const LaneData* warp_share(const LaneData& mine);

// cp.async: `bytes` of `source` (fewer than `size`: the rest becomes zero) go to `destination`, at
// once or when a wait demands it.
void copy_async(void* destination, const void* source, size_t size, size_t bytes);
void copy_async_commit();
void copy_async_wait(unsigned groups_left);

inline void check_aligned(const void* pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) fail("misaligned vector access");
}

template <class V>
V shuffle(unsigned mask, V value, unsigned source) {
  static_assert(sizeof(V) == sizeof(uint32_t));
  if (mask != kFullMask) fail("shuffle of part of a warp");
  LaneData mine{};
  std::memcpy(mine.data(), &value, sizeof value);
  const LaneData* lanes = warp_share(mine);
  std::memcpy(&value, lanes[source % kWarpSize].data(), sizeof value);
  return value;
}

template <class V>
V atomic_add(V* address, V value) {
  return std::atomic_ref<V>(*address).fetch_add(value, std::memory_order_relaxed);
}

}  // namespace fmk::emu

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (::fmk::emu::self().thread_index)
#define blockIdx (::fmk::emu::self().block_index)
#define blockDim (::fmk::emu::block_size())
#define gridDim (::fmk::emu::grid_size())

inline void __syncthreads(int line = __builtin_LINE()) { fmk::emu::block_barrier(line); }
inline void __syncwarp() { fmk::emu::warp_barrier(); }
inline void __threadfence() {}  // the atomics that follow one order memory themselves

template <class V>
V __shfl_sync(unsigned mask, V value, int source) {
  return fmk::emu::shuffle(mask, value, static_cast<unsigned>(source));
}
template <class V>
V __shfl_xor_sync(unsigned mask, V value, int lanes) {
  return fmk::emu::shuffle(mask, value, fmk::emu::self().lane() ^ static_cast<unsigned>(lanes));
}
template <class V>
V __shfl_down_sync(unsigned mask, V value, unsigned lanes) {
  const unsigned lane = fmk::emu::self().lane(), source = lane + lanes;
  return fmk::emu::shuffle(mask, value, source < fmk::emu::kWarpSize ? source : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned ballot = 0;
  if (mask != fmk::emu::kFullMask) fmk::emu::fail("vote of part of a warp");
  const fmk::emu::LaneData* lanes = fmk::emu::warp_share({predicate != 0});
  for (unsigned lane = 0; lane < fmk::emu::kWarpSize; ++lane) ballot |= lanes[lane][0] << lane;
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == fmk::emu::kFullMask;
}
template <class V>
V atomicAdd(V* address, V value) {
  return fmk::emu::atomic_add(address, value);
}
