// Slabs of pinned memory that bytes pass through on their way to and from GPUs. Pinning pages costs
// more than filling them, so slabs stay with the process; a slab is made only while all others are
// in use, so that there are as many as the work has needed.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda/driver.h"
#include "file.h"

namespace fastsd::cuda {

// Large enough that a copy takes far longer than to ask for it, and small enough that several are
// under way in little memory.
constexpr std::uint64_t kSlabBytes = std::uint64_t{8} << 20U;

// Pinning a slab takes milliseconds: little work goes without.
constexpr std::uint64_t kPinBytesMin = kSlabBytes;

// Memory of kSlabBytes, aligned for direct I/O.
class Slab {
 public:
  explicit Slab(std::shared_ptr<Memory> memory) : memory_(std::move(memory)) {}

  std::byte* data() const { return memory_->data(); }

  // Pins it, unless it is, if the system allows that.
  void pin(const std::shared_ptr<const Gpu>& gpu);

 private:
  std::shared_ptr<Memory> memory_;
  std::shared_ptr<void> pin_;  // goes first
};

// Thread-safe.
class Ring {
 public:
  // That of the process. A forked one has its own: what its parent's GPUs use is not there.
  static Ring& shared();

  static constexpr std::uint64_t kBytesMaxDefault = std::uint64_t{512} << 20U;

  // How much all slabs may take; never less than two of them. Slabs beyond it go once they are
  // given back.
  void set_bytes_max(std::uint64_t bytes);
  std::uint64_t bytes_max() const { return bytes_max_; }
  std::uint64_t bytes() const;  // that slabs take now

  // A slab that nobody uses; waits for one if there may be no more. Whoever takes it gives it back
  // or abandons it.
  Slab take();

  void give_back(Slab slab);               // to be used again at once
  void give_back(Slab slab, Event event);  // ...once this has passed
  void abandon(Slab slab);                 // to stay as it is: something may still be using it

  // Takes back those whose events have passed: to be called when work has been waited for, as
  // events hold on to their GPUs.
  void collect();

  // Gives up every slab that nobody uses.
  void empty();

 private:
  struct Lent {
    Slab slab;
    Event event;
  };

  std::size_t count_max() const { return bytes_max_ / kSlabBytes; }
  Slab make();
  void forget();
  void trim(std::size_t count);

  mutable std::mutex mutex_;
  std::condition_variable is_changed_;
  std::atomic<std::uint64_t> bytes_max_{kBytesMaxDefault};
  std::size_t count_ = 0;   // of all slabs: here, lent to copies, or taken
  std::vector<Slab> free_;  // the last one is the warmest
  std::deque<Lent> lent_;   // in the order in which they came
  std::vector<Slab> abandoned_;
};

}  // namespace fastsd::cuda
