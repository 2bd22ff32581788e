// Units of work for threads that do not run equally fast: another program, or another guest on the
// same core, slows one of them for as long as a kernel runs, and equal shares wait for the slowest.
#pragma once

#include "core/parallel.h"
#include "cpu/simd.h"

namespace fmk::FMK_ISA {

// A thread takes runs of its own share, in order; when that is used up, from the end of the share
// with most left (Blumofe and Leiserson, "Scheduling Multithreaded Computations by Work Stealing",
// 1999). Which thread computes a unit varies from call to call, so a unit's result must not depend
// on it. Where it does (sums that a thread keeps over its units), the shares are kFixed.
class WorkShares {
 public:
  enum Kind { kStealing, kFixed };
  static constexpr int64_t kMaxShares = 256;

  WorkShares(int64_t shares, int64_t units, Kind kind = kStealing)
      : count_(shares < kMaxShares ? shares : kMaxShares), kind_(kind) {
    for (int64_t i = 0; i < count_; ++i)
      shares_[i].range = Range::of(units * i / count_, units * (i + 1) / count_).bits;
  }
  WorkShares(const WorkShares&) = delete;

  int64_t count() const { return count_; }

  // The next run for `share`, of at most `most` units: [*begin, *end). False when none is left.
  bool take(int64_t share, int64_t most, int64_t* begin, int64_t* end) {
    if (take_from(share, most, true, begin, end)) return true;
    while (kind_ == kStealing) {
      int64_t richest = 0, found = 0;
      for (int64_t i = 0; i < count_; ++i) {
        const int64_t left = load(i).left();
        if (left > found) richest = i, found = left;
      }
      if (found == 0) return false;
      if (take_from(richest, most, false, begin, end)) return true;
    }
    return false;
  }
  bool take(int64_t share, int64_t* unit) {
    int64_t end;
    return take(share, 1, unit, &end);
  }

 private:
  // In one word, so that it changes at once. `begin` only grows and `end` only shrinks: a word that
  // has not changed means what it meant.
  struct Range {
    uint64_t bits;
    static Range of(int64_t begin, int64_t end) {
      return {static_cast<uint64_t>(begin) << 32 | static_cast<uint64_t>(end)};
    }
    int64_t begin() const { return static_cast<int64_t>(bits >> 32); }
    int64_t end() const { return static_cast<int64_t>(bits & 0xffffffffu); }
    int64_t left() const { return end() - begin(); }
  };
  struct alignas(64) Share {  // a cache line of its own
    uint64_t range;
  };

  Range load(int64_t share) const {
    return {__atomic_load_n(&shares_[share].range, __ATOMIC_RELAXED)};
  }

  // Results reach the caller through the pool's own synchronisation, so relaxed order is enough.
  bool take_from(int64_t share, int64_t most, bool front, int64_t* begin, int64_t* end) {
    Range range = load(share);
    while (range.left() > 0) {
      // Half of what is left at most, so that the last runs are short; all of it where nobody else
      // takes any.
      const int64_t fair = count_ > 1 && kind_ == kStealing ? (range.left() + 1) / 2 : range.left();
      const int64_t size = fair < most ? fair : most;
      *begin = front ? range.begin() : range.end() - size;
      *end = *begin + size;
      const Range rest = front ? Range::of(*end, range.end()) : Range::of(range.begin(), *begin);
      if (__atomic_compare_exchange_n(&shares_[share].range, &range.bits, rest.bits, true,
                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        return true;
    }
    return false;
  }

  int64_t count_;
  Kind kind_;
  Share shares_[kMaxShares];
};

// body(shard, unit) for all units, each a run of its own.
template <class Body>
FMK_INLINE void share_out(const Parallel& pool, int64_t shards, int64_t units,
                          WorkShares::Kind kind, const Body& body) {
  WorkShares work(shards, units, kind);
  parallel_for(pool, work.count(), [&](int64_t shard) {
    for (int64_t unit; work.take(shard, &unit);) body(shard, unit);
  });
}

}  // namespace fmk::FMK_ISA
