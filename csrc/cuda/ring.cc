#include "cuda/ring.h"

#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <utility>

#include "error.h"

namespace fastsd::cuda {

// ---- Slab ----

void Slab::pin(const std::shared_ptr<const Gpu>& gpu) {
  if (pin_ || !gpu->pin(data(), kSlabBytes)) return;
  pin_ = std::shared_ptr<void>(data(), [gpu](void* memory) { gpu->unpin(memory); });
}

// ---- Ring ----

Ring& Ring::shared() {
  // Never destroyed: the driver may be gone before, and a child must not touch its parent's. No
  // lock, as another thread might have held it when the process was forked.
  struct Owned {
    pid_t owner;
    Ring ring;
  };
  static std::atomic<Owned*> current{nullptr};
  Owned* known = current;
  while (known == nullptr || known->owner != ::getpid()) {
    auto* own = new Owned{::getpid(), {}};
    if (known != nullptr) own->ring.bytes_max_ = known->ring.bytes_max();
    if (current.compare_exchange_strong(known, own)) return own->ring;
    delete own;
  }
  return known->ring;
}

void Ring::set_bytes_max(std::uint64_t bytes) {
  bytes_max_ = std::max(bytes, 2 * kSlabBytes);
  collect();
}

std::uint64_t Ring::bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return count_ * kSlabBytes;
}

Slab Ring::take() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    if (!free_.empty()) {
      Slab slab = std::move(free_.back());
      free_.pop_back();
      return slab;
    }
    const bool is_full = count_ >= count_max();
    if (!lent_.empty() && (is_full || lent_.front().event.has_passed())) {
      Lent oldest = std::move(lent_.front());
      lent_.pop_front();
      lock.unlock();
      try {
        oldest.event.wait();
      } catch (...) {
        abandon(std::move(oldest.slab));
        throw;
      }
      return std::move(oldest.slab);
    }
    if (!is_full) {
      ++count_;
      lock.unlock();
      return make();
    }
    is_changed_.wait(lock);
  }
}

// REQUIRES: it has been counted.
Slab Ring::make() {
  try {
    return Slab(Memory::allocate_pages(kSlabBytes));
  } catch (...) {
    forget();
    throw;
  }
}

void Ring::give_back(Slab slab) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (count_ <= count_max()) {
    free_.push_back(std::move(slab));
  } else {
    --count_;
  }
  is_changed_.notify_one();
}

void Ring::give_back(Slab slab, Event event) {
  const std::lock_guard<std::mutex> lock(mutex_);
  lent_.push_back({std::move(slab), std::move(event)});
  is_changed_.notify_one();
}

void Ring::abandon(Slab slab) {
  const std::lock_guard<std::mutex> lock(mutex_);
  abandoned_.push_back(std::move(slab));
  --count_;
  is_changed_.notify_one();
}

void Ring::forget() {
  const std::lock_guard<std::mutex> lock(mutex_);
  --count_;
  is_changed_.notify_one();
}

void Ring::collect() {
  trim(count_max());
  std::deque<Lent> all;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    all.swap(lent_);
  }
  std::deque<Lent> pending;
  for (Lent& lent : all) {
    try {
      if (lent.event.has_passed()) {
        give_back(std::move(lent.slab));
      } else {
        pending.push_back(std::move(lent));
      }
    } catch (const Error&) {
      abandon(std::move(lent.slab));
    }
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  lent_.insert(lent_.begin(), std::make_move_iterator(pending.begin()),
               std::make_move_iterator(pending.end()));
  is_changed_.notify_all();
}

void Ring::empty() {
  collect();
  trim(0);
}

void Ring::trim(std::size_t count) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (; count_ > count && !free_.empty(); --count_) free_.pop_back();
}

}  // namespace fastsd::cuda
