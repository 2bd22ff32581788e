// Schedules a grid's threads as fibers of one OS thread.
#include <sys/mman.h>

#include <new>
#include <random>
#include <stdexcept>
#include <utility>

#include "lab/emu/scheduler.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#error "fibers.cpp switches stacks in x86-64 assembly; link threads.cpp on other processors"
#endif

// Saves the callee-saved registers and the stack pointer to *save, and continues at `load`.
extern "C" void fmk_emu_switch(void** save, void* load);
asm(R"(
.text
.type fmk_emu_switch, @function
fmk_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace fmk::emu {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;  // its stack frames are larger
#else
constexpr size_t kStackBytes = 64 << 10;
#endif
constexpr int kSavedRegisters = 6;
// After so many rounds in which every thread that can run only waits, none will ever go on.
constexpr int kIdleRounds = 1000;

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  Thread thread;
  PendingCopies copies;
};

// A barrier that lets its threads go when all have come.
struct Barrier {
  std::vector<Fiber*> waiting;
  int line = 0;  // of the kernel's source, where the waiting ones came from
};

class Scheduler {
 public:
  explicit Scheduler(const std::function<void()>& kernel) : kernel_(kernel), random_(seed()) {}
  ~Scheduler() {
    if (stacks_ == nullptr) return;
    forget_frames();
    munmap(stacks_, fibers_.size() * kStackBytes);
  }

  void run(std::vector<std::unique_ptr<Block>>& blocks);
  void wait(Barrier& barrier, unsigned expected, int line = 0);
  void spin();
  void enter();
  void record_failure(const std::string& message) {
    if (failure_.empty()) failure_ = message;
  }
  Fiber* current() { return current_; }
  Barrier& block_barrier() { return block_barriers_[current_->thread.block]; }
  Barrier& warp_barrier() {
    return warp_barriers_[{current_->thread.block, current_->thread.rank / kWarpSize}];
  }

 private:
  // Fibers never return from their first function, so AddressSanitizer has notes of their frames,
  // which must not outlive the memory.
  void forget_frames() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stacks_, fibers_.size() * kStackBytes);
#endif
  }
  void prepare(Fiber& fiber);
  void resume(Fiber& fiber);
  void suspend();

  const std::function<void()>& kernel_;
  std::minstd_rand random_;
  std::vector<Fiber> fibers_;
  std::vector<Fiber*> ready_, spinning_;
  std::map<Block*, Barrier> block_barriers_;
  std::map<std::pair<Block*, unsigned>, Barrier> warp_barriers_;
  char* stacks_ = nullptr;
  void* own_stack_pointer_ = nullptr;
  Fiber* current_ = nullptr;
  size_t running_ = 0;  // fibers that have not returned
  bool progress_ = false;
  std::string failure_;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack_ = nullptr;
  const void* own_bottom_ = nullptr;
  size_t own_size_ = 0;
#endif
};

thread_local Scheduler* scheduler = nullptr;

void fiber_main() {
  scheduler->enter();
  std::abort();  // enter() never returns
}

void Scheduler::prepare(Fiber& fiber) {
  // As fmk_emu_switch left it: registers on top of a return address, and the alignment that a
  // function is entered with.
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_main);
  fiber.stack_pointer = top - kSavedRegisters;
}

void Scheduler::resume(Fiber& fiber) {
  current_ = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fake_stack_, fiber.stack, kStackBytes);
#endif
  fmk_emu_switch(&own_stack_pointer_, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
}

void Scheduler::suspend() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(nullptr, own_bottom_, own_size_);
#endif
  fmk_emu_switch(&current_->stack_pointer, own_stack_pointer_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &own_bottom_, &own_size_);
#endif
}

void Scheduler::enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &own_bottom_, &own_size_);
#endif
  try {
    kernel_();
  } catch (const std::exception& error) {
    record_failure(error.what());
  }
  --running_;
  progress_ = true;
  suspend();
}

void Scheduler::wait(Barrier& barrier, unsigned expected, int line) {
  if (!barrier.waiting.empty() && barrier.line != line) {
    fail("threads of a block wait at different barriers, in lines " + std::to_string(barrier.line) +
         " and " + std::to_string(line));
  }
  barrier.line = line;
  barrier.waiting.push_back(current_);
  if (barrier.waiting.size() == expected) {
    ready_.insert(ready_.end(), barrier.waiting.begin(), barrier.waiting.end());
    barrier.waiting.clear();
    progress_ = true;
  }
  suspend();
}

void Scheduler::spin() {
  spinning_.push_back(current_);
  suspend();
}

void Scheduler::run(std::vector<std::unique_ptr<Block>>& blocks) {
  for (auto& block : blocks) running_ += block->threads;
  fibers_.resize(running_);
  void* stacks = mmap(nullptr, running_ * kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) throw std::bad_alloc();
  stacks_ = static_cast<char*>(stacks);
  forget_frames();
  size_t next = 0;
  for (auto& block : blocks) {
    for (unsigned rank = 0; rank < block->threads; ++rank, ++next) {
      Fiber& fiber = fibers_[next];
      fiber.stack = stacks_ + next * kStackBytes;
      fiber.thread = make_thread(*block, rank);
      fiber.thread.copies = &fiber.copies;
      prepare(fiber);
      ready_.push_back(&fiber);
    }
  }
  int idle_rounds = 0;
  while (running_ > 0 && failure_.empty()) {
    if (ready_.empty()) {
      ready_.swap(spinning_);
      idle_rounds = std::exchange(progress_, false) ? 0 : idle_rounds + 1;
      if (ready_.empty()) {
        throw std::runtime_error("deadlock: " + std::to_string(running_) +
                                 " threads wait at barriers that others never reach");
      }
      if (idle_rounds > kIdleRounds) {
        throw std::runtime_error("deadlock: threads wait for a store that never comes");
      }
    }
    const size_t pick = random_() % ready_.size();
    std::swap(ready_[pick], ready_.back());
    Fiber* fiber = ready_.back();
    ready_.pop_back();
    resume(*fiber);
  }
  if (!failure_.empty()) throw std::runtime_error(failure_);
}

}  // namespace

Thread& self() { return scheduler->current()->thread; }
void block_barrier(int line) {
  scheduler->wait(scheduler->block_barrier(), self().block->threads, line);
}
void warp_barrier() { scheduler->wait(scheduler->warp_barrier(), kWarpSize); }
void spin() { scheduler->spin(); }
void fail(const std::string& message) { throw std::runtime_error(message); }

void launch(const Launch& launch, const std::function<void()>& kernel) {
  check_launch(launch);
  const unsigned blocks = volume(launch.grid);
  const unsigned resident = launch.cooperative ? blocks : 1;
  for (unsigned first = 0; first < blocks; first += resident) {
    std::vector<std::unique_ptr<Block>> batch;
    for (unsigned i = first; i < first + resident; ++i) {
      batch.push_back(std::make_unique<Block>(launch, unravel(i, launch.grid)));
    }
    Scheduler own(kernel);
    scheduler = &own;
    own.run(batch);
  }
}

}  // namespace fmk::emu
