// Threads of one parallel region that work in step, one barrier after another.
#pragma once

namespace fmk {

// A pool may run the shards of a region one after the other, on one thread. So members announce
// themselves, and whoever has come when a short wait is over makes up the team: no member waits for
// one that cannot come. Members that do come are running threads, so every barrier is reached.
class Team {
 public:
  explicit Team(int wanted) : wanted_(wanted) {}
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // This member's index, or -1 for one that has come too late: it has nothing to do.
  int join();
  // How many have joined; known once join() has returned an index.
  int size() const { return size_; }
  // Returns when all members have called it; what they wrote before is visible to all afterwards.
  void barrier();

 private:
  const int wanted_;
  int size_ = 0;
  alignas(64) int state_ = 0;  // members so far, kClosed when complete
  alignas(64) int arrived_ = 0;
  alignas(64) int round_ = 0;
};

}  // namespace fmk
