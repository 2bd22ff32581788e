// Per-thread work space: grows on demand, is kept for the next call and freed with the thread.
#pragma once

#include <cstddef>

namespace fmk {

// One thread may hold one buffer per slot at a time; a second request for a slot invalidates the
// first.
enum class Scratch : int { kPanel, kRows, kAccumulator, kTile, kExtra, kCall, kCall2, kCount };

// At least `bytes` bytes, aligned to 64, contents undefined. Never null: aborts the request with
// std::bad_alloc.
void* scratch_bytes(Scratch slot, size_t bytes);

}  // namespace fmk
