#include "core/team.h"

#include <sched.h>

#include <chrono>

namespace fmk {
namespace {

constexpr int kClosed = 1 << 30;
// How long the first member waits for the others: longer than it takes to wake a sleeping thread.
constexpr auto kPatience = std::chrono::microseconds(200);
// Spins before the processor is offered to others: about 20 us.
constexpr int kSpins = 1000;

void relax(int spins) {
#if defined(__x86_64__)
  if (spins < kSpins) return __builtin_ia32_pause();
#else
  if (spins < kSpins) return;
#endif
  sched_yield();
}

}  // namespace

int Team::join() {
  int seen = __atomic_load_n(&state_, __ATOMIC_ACQUIRE);
  int own;
  do {
    if (seen & kClosed) return -1;
    own = seen;
    const int next = own + 1 == wanted_ ? (own + 1) | kClosed : own + 1;
    if (__atomic_compare_exchange_n(&state_, &seen, next, false, __ATOMIC_ACQ_REL,
                                    __ATOMIC_ACQUIRE)) {
      seen = next;
      break;
    }
  } while (true);
  const auto start = std::chrono::steady_clock::now();
  for (int spins = 0; !(seen & kClosed); ++spins) {
    if (std::chrono::steady_clock::now() - start > kPatience) {
      if (__atomic_compare_exchange_n(&state_, &seen, seen | kClosed, false, __ATOMIC_ACQ_REL,
                                      __ATOMIC_ACQUIRE)) {
        seen |= kClosed;
        break;
      }
      continue;
    }
    relax(spins);
    seen = __atomic_load_n(&state_, __ATOMIC_ACQUIRE);
  }
  // Every member writes the same value.
  __atomic_store_n(&size_, seen & ~kClosed, __ATOMIC_RELAXED);
  return own;
}

void Team::barrier() {
  if (size_ == 1) return;
  const int round = __atomic_load_n(&round_, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == size_) {
    __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&round_, round + 1, __ATOMIC_RELEASE);
    return;
  }
  for (int spins = 0; __atomic_load_n(&round_, __ATOMIC_ACQUIRE) == round; ++spins) relax(spins);
}

}  // namespace fmk
