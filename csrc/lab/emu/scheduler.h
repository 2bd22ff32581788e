// What the two schedulers share: a block's memory and the place where its warps exchange data.
#pragma once

#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

#include "lab/emu/emulator.h"

namespace fmk::emu {

// Memory of exactly `bytes` bytes, filled with NaN (of float and of both half types).
class Poisoned {
 public:
  explicit Poisoned(size_t bytes);
  void* data() const { return data_.get(); }

 private:
  std::unique_ptr<void, decltype(&std::free)> data_;
};

struct Block {
  Block(const Launch& launch, Dim3 index);

  const Launch* launch;
  Dim3 index;
  unsigned threads;
  Poisoned dynamic;
  std::mutex mutex;  // guards `statics`
  std::map<const void*, Poisoned> statics;
  // [warp][parity][lane]: a lane that is one exchange ahead of another writes to the other half.
  std::vector<std::array<std::array<LaneData, kWarpSize>, 2>> exchange;
};

struct PendingCopies {
  struct Copy {
    void* destination;
    const void* source;
    size_t size, bytes;
  };
  std::vector<std::vector<Copy>> groups{1};  // the last one is still open
  size_t issued = 0;
  std::minstd_rand random;
};

// $FMK_EMU_SEED: results must not depend on it.
unsigned seed();

// Refuses what no device launches: an empty grid, too many threads, too much shared memory, a
// cooperative grid that is not resident as a whole.
void check_launch(const Launch& launch);

Thread make_thread(Block& block, unsigned rank);
inline unsigned volume(Dim3 size) { return size.x * size.y * size.z; }
inline Dim3 unravel(unsigned index, Dim3 size) {
  return {index % size.x, index / size.x % size.y, index / (size.x * size.y)};
}

}  // namespace fmk::emu
