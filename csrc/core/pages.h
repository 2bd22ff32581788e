// Large pages under large buffers.
#pragma once

#include <cstddef>

namespace fmk {

constexpr size_t kLargePage = size_t{2} << 20;

// Asks for large pages under fresh memory that a kernel is about to fill, where the system leaves
// that to the program: else the page faults of a layer's saved activations cost as much as a good
// part of its arithmetic. Does nothing for little memory.
void prefer_large_pages(void* data, size_t bytes);

}  // namespace fmk
