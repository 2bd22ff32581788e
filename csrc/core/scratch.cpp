#include "core/scratch.h"

#include <cstdlib>
#include <new>

#include "core/pages.h"

namespace fmk {
namespace {

struct Buffer {
  void* data = nullptr;
  size_t capacity = 0;
  ~Buffer() { std::free(data); }
};

thread_local Buffer buffers[static_cast<int>(Scratch::kCount)];

}  // namespace

void* scratch_bytes(Scratch slot, size_t bytes) {
  Buffer& buffer = buffers[static_cast<int>(slot)];
  if (bytes > buffer.capacity) {
    const bool large = bytes >= kLargePage;
    const size_t unit = large ? kLargePage : 4096;
    const size_t capacity = (bytes + unit - 1) / unit * unit;
    void* data = nullptr;
    if (posix_memalign(&data, large ? kLargePage : 64, capacity) != 0) throw std::bad_alloc();
    if (large) prefer_large_pages(data, capacity);
    std::free(buffer.data);
    buffer.data = data;
    buffer.capacity = capacity;
  }
  return buffer.data;
}

}  // namespace fmk
