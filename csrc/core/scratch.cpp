#include "core/scratch.h"

#include <cstdlib>
#include <new>

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
    const size_t capacity = (bytes + 4095) / 4096 * 4096;
    void* data = nullptr;
    if (posix_memalign(&data, 64, capacity) != 0) throw std::bad_alloc();
    std::free(buffer.data);
    buffer.data = data;
    buffer.capacity = capacity;
  }
  return buffer.data;
}

}  // namespace fmk
