#include "workers.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "error.h"

namespace fastsd {
namespace {

constexpr std::size_t kThreadsMax = 16;
constexpr auto kInterruptPeriod = std::chrono::milliseconds(50);

struct Run {
  std::size_t count;
  const std::function<void(std::size_t, std::size_t)>& task;
  std::atomic<std::size_t> next{0};
  std::mutex mutex;
  std::exception_ptr failure;

  void fail(std::exception_ptr cause) {
    next = count;
    const std::lock_guard<std::mutex> lock(mutex);
    if (!failure) failure = std::move(cause);
  }

  // `poll` is called between tasks and may throw.
  template <class Poll>
  void work(std::size_t worker, Poll poll) {
    try {
      for (std::size_t i = next++; i < count; i = next++) {
        task(worker, i);
        poll();
      }
    } catch (...) {
      fail(std::current_exception());
    }
  }
};

}  // namespace

std::size_t processor_count() {
  cpu_set_t set;
  const bool known = ::sched_getaffinity(0, sizeof set, &set) == 0;
  const std::size_t count = known ? static_cast<std::size_t>(CPU_COUNT(&set))
                                  : std::size_t{std::thread::hardware_concurrency()};
  return std::clamp<std::size_t>(count, 1, kThreadsMax);
}

void run_parallel(std::size_t count, std::size_t threads, const Interrupt& interrupt,
                  const std::function<void(std::size_t, std::size_t)>& task) {
  Run run{count, task, {}, {}, {}};
  std::vector<std::thread> helpers;
  helpers.reserve(threads);
  for (std::size_t worker = 1; worker < std::min(threads, count); ++worker) {
    try {
      helpers.emplace_back([&run, worker] { run.work(worker, [] {}); });
    } catch (const std::exception&) {
      break;  // the system has no more threads to give; those there are do the work
    }
  }
  auto last_poll = std::chrono::steady_clock::now();
  run.work(0, [&] {
    const auto now = std::chrono::steady_clock::now();
    if (!interrupt || now - last_poll < kInterruptPeriod) return;
    last_poll = now;
    if (interrupt()) throw Error(Failure::kInterrupted, "interrupted");
  });
  for (std::thread& helper : helpers) helper.join();
  if (run.failure) std::rethrow_exception(run.failure);
}

}  // namespace fastsd
