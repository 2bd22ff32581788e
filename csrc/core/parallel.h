// How a torch-free kernel runs on the caller's threads: the caller passes its pool as a `Parallel`,
// the kernel calls parallel_for(pool, shards, body) at most once per call. libtorch's pool is
// plugged in by csrc/torch/parallel.h.
#pragma once

#include <cstdint>

namespace fmk {

struct Parallel {
  using Body = void (*)(void* context, int64_t begin, int64_t end);
  int threads = 1;
  void (*run)(int64_t count, Body body, void* context) = nullptr;  // null: serial
};

// Calls body(shard) for every shard in [0, shards), each exactly once, shards being spread over the
// pool's threads. `Body` is a lambda local to a kernel, so each instantiation belongs to that
// kernel's translation unit.
template <class Body>
static inline void parallel_for(const Parallel& pool, int64_t shards, const Body& body) {
  if (shards <= 0) return;
  if (shards == 1 || pool.threads <= 1 || !pool.run) {
    for (int64_t shard = 0; shard < shards; ++shard) body(shard);
    return;
  }
  pool.run(
      shards,
      [](void* context, int64_t begin, int64_t end) {
        const Body& run_shard = *static_cast<const Body*>(context);
        for (int64_t shard = begin; shard < end; ++shard) run_shard(shard);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace fmk
