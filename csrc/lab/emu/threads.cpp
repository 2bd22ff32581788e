// Runs every CUDA thread on an OS thread of its own: slow, and ThreadSanitizer sees each access.
#include <pthread.h>
#include <sched.h>

#include <cstdio>

#include "lab/emu/scheduler.h"

namespace fmk::emu {
namespace {

class Barrier {
 public:
  explicit Barrier(unsigned threads) { pthread_barrier_init(&barrier_, nullptr, threads); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

struct ResidentBlock {
  ResidentBlock(const Launch& launch, Dim3 index) : block(launch, index), all(block.threads) {
    for (unsigned warp = 0; warp < block.threads / kWarpSize; ++warp) {
      warps.push_back(std::make_unique<Barrier>(kWarpSize));
    }
  }
  Block block;
  Barrier all;
  std::vector<std::unique_ptr<Barrier>> warps;
};

struct Start {
  ResidentBlock* resident;
  unsigned rank;
  const std::function<void()>* kernel;
};

thread_local Thread current;
thread_local ResidentBlock* current_block;

void* thread_main(void* argument) {
  const Start& start = *static_cast<const Start*>(argument);
  PendingCopies copies;
  current = make_thread(start.resident->block, start.rank);
  current.copies = &copies;
  current_block = start.resident;
  (*start.kernel)();
  return nullptr;
}

}  // namespace

Thread& self() { return current; }
void block_barrier(int) { current_block->all.wait(); }
void warp_barrier() { current_block->warps[current.rank / kWarpSize]->wait(); }
void spin() { sched_yield(); }

// The other threads may wait at a barrier for this one: there is nothing to return to.
void fail(const std::string& message) {
  std::fprintf(stderr, "emulated CUDA thread: %s\n", message.c_str());
  std::abort();
}

void launch(const Launch& launch, const std::function<void()>& kernel) {
  check_launch(launch);
  const unsigned blocks = volume(launch.grid);
  const unsigned resident = launch.cooperative ? blocks : 1;
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, 1 << 20);
  for (unsigned first = 0; first < blocks; first += resident) {
    std::vector<std::unique_ptr<ResidentBlock>> batch;
    std::vector<Start> starts;
    for (unsigned i = first; i < first + resident; ++i) {
      batch.push_back(std::make_unique<ResidentBlock>(launch, unravel(i, launch.grid)));
      for (unsigned rank = 0; rank < volume(launch.block); ++rank) {
        starts.push_back({batch.back().get(), rank, &kernel});
      }
    }
    std::vector<pthread_t> threads(starts.size());
    for (size_t i = 0; i < starts.size(); ++i) {
      if (pthread_create(&threads[i], &attributes, &thread_main, &starts[i]) != 0) {
        fail("no more OS threads");
      }
    }
    for (pthread_t thread : threads) pthread_join(thread, nullptr);
  }
  pthread_attr_destroy(&attributes);
}

}  // namespace fmk::emu
