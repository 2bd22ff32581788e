// The part of the emulator that does not depend on how threads are scheduled.
#include "lab/emu/emulator.h"

#include <new>
#include <stdexcept>

#include "lab/emu/scheduler.h"

namespace fmk::emu {

namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kVectorBytes = 16;

size_t from_environment(const char* name, size_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

void* allocate(size_t bytes) {
  void* data = nullptr;
  if (posix_memalign(&data, kVectorBytes, bytes) != 0) throw std::bad_alloc();
  return data;
}

void perform(const PendingCopies::Copy& copy) {
  std::memcpy(copy.destination, copy.source, copy.bytes);
  std::memset(static_cast<char*>(copy.destination) + copy.bytes, 0, copy.size - copy.bytes);
}

}  // namespace

unsigned seed() { return static_cast<unsigned>(from_environment("FMK_EMU_SEED", 0)); }

Poisoned::Poisoned(size_t bytes) : data_(allocate(bytes), &std::free) {
  std::memset(data_.get(), 0xff, bytes);
}

Block::Block(const Launch& of, Dim3 at)
    : launch(&of),
      index(at),
      threads(volume(of.block)),
      dynamic(of.shared_bytes),
      exchange(threads / kWarpSize) {}

Device device() {
  return {static_cast<int>(from_environment("FMK_EMU_MULTIPROCESSORS", 132)),
          from_environment("FMK_EMU_SHARED", 232448)};
}

void check_launch(const Launch& launch) {
  const unsigned threads = volume(launch.block);
  const Device limits = device();
  if (volume(launch.grid) == 0) throw std::runtime_error("launch: an empty grid");
  if (threads == 0 || threads > kMaxThreads || threads % kWarpSize != 0) {
    throw std::runtime_error("launch: a block needs whole warps and at most 1024 threads");
  }
  if (launch.shared_bytes > limits.shared_per_block) {
    throw std::runtime_error("launch: too much shared memory");
  }
  if (launch.cooperative && volume(launch.grid) > static_cast<unsigned>(limits.multiprocessors)) {
    throw std::runtime_error("launch: too many blocks for a cooperative launch");
  }
}

Thread make_thread(Block& block, unsigned rank) {
  Thread thread;
  thread.thread_index = unravel(rank, block.launch->block);
  thread.block_index = block.index;
  thread.block = &block;
  thread.rank = rank;
  return thread;
}

Dim3 block_size() { return self().block->launch->block; }
Dim3 grid_size() { return self().block->launch->grid; }

void* dynamic_shared() { return self().block->dynamic.data(); }

void* static_shared(const void* key, size_t bytes) {
  Block& block = *self().block;
  std::lock_guard<std::mutex> lock(block.mutex);
  return block.statics.try_emplace(key, bytes).first->second.data();
}

const LaneData* warp_share(const LaneData& mine) {
  Thread& thread = self();
  auto& slot = thread.block->exchange[thread.rank / kWarpSize][thread.share_count++ % 2];
  slot[thread.lane()] = mine;
  warp_barrier();
  return slot.data();
}

void copy_async(void* destination, const void* source, size_t size, size_t bytes) {
  check_aligned(destination, size);
  if (bytes != 0) check_aligned(source, size);
  PendingCopies& copies = *self().copies;
  const PendingCopies::Copy copy{destination, source, size, bytes};
  // Half of them land at once and half when they must, so that both a missing wait and a barrier
  // missing before the memory's next use show.
  if (copies.issued++ == 0) copies.random.seed(1 + self().rank + 1024 * seed());
  if (copies.random() / 256 % 2 == 0) {
    perform(copy);
  } else {
    copies.groups.back().push_back(copy);
  }
}

void copy_async_commit() { self().copies->groups.emplace_back(); }

void copy_async_wait(unsigned groups_left) {
  auto& groups = self().copies->groups;
  while (groups.size() > groups_left + 1) {
    for (const PendingCopies::Copy& copy : groups.front()) perform(copy);
    groups.erase(groups.begin());
  }
}

}  // namespace fmk::emu
