#include "workers.h"

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"

namespace fastsd::test {
namespace {

TEST(run_parallel_visits_every_index_once) {
  CHECK(processor_count() >= 1);
  for (const std::size_t threads : {0U, 1U, 2U, 7U}) {
    for (const std::size_t count : {0U, 1U, 2U, 5U, 1000U}) {
      std::vector<std::atomic<int>> visits(count);
      std::atomic<std::size_t> worker_max{0};
      run_parallel(count, threads, nullptr, [&](std::size_t worker, std::size_t i) {
        ++visits[i];
        std::size_t known = worker_max;
        while (worker > known && !worker_max.compare_exchange_weak(known, worker)) {
        }
      });
      for (const std::atomic<int>& visit : visits) CHECK(visit == 1);
      CHECK(worker_max < std::max<std::size_t>(threads, 1));
    }
  }
}

TEST(run_parallel_hands_indices_out_in_order) {
  std::size_t expected = 0;
  bool is_ordered = true;
  run_parallel(100, 1, nullptr, [&](std::size_t worker, std::size_t i) {
    is_ordered = is_ordered && worker == 0 && i == expected++;
  });
  CHECK(is_ordered && expected == 100);
}

TEST(run_parallel_rethrows_and_hands_out_no_more) {
  for (const std::size_t threads : {1U, 2U, 4U}) {
    std::atomic<std::size_t> done{0};
    std::string caught;
    try {
      run_parallel(100000, threads, nullptr, [&](std::size_t, std::size_t i) {
        if (i == 10) throw std::runtime_error("task 10");
        ++done;
        if (i > 10) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      });
    } catch (const std::runtime_error& error) {
      caught = error.what();
    }
    CHECK(caught == "task 10");
    CHECK(done < 10000);
  }
}

TEST(run_parallel_rethrows_the_first_of_two) {
  std::atomic<int> started{0};
  std::string caught;
  try {
    run_parallel(2, 2, nullptr, [&](std::size_t, std::size_t i) {
      for (++started; started < 2;) std::this_thread::yield();
      if (i == 1) std::this_thread::sleep_for(std::chrono::milliseconds(200));
      throw std::runtime_error(i == 0 ? "first" : "second");
    });
  } catch (const std::runtime_error& error) {
    caught = error.what();
  }
  CHECK(caught == "first");
}

TEST(run_parallel_stops_when_interrupted) {
  const auto caller = std::this_thread::get_id();
  for (const std::size_t threads : {1U, 3U}) {
    std::atomic<std::size_t> done{0};
    bool is_asked_by_caller = true;
    const auto interrupt = [&] {
      is_asked_by_caller = is_asked_by_caller && std::this_thread::get_id() == caller;
      return true;
    };
    const auto task = [&](std::size_t, std::size_t) {
      ++done;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    };
    CHECK_THROWS(run_parallel(100000, threads, interrupt, task), Failure::kInterrupted);
    CHECK(is_asked_by_caller);
    CHECK(done > 0 && done < 10000);
  }
}

TEST(run_parallel_goes_on_when_not_interrupted) {
  std::atomic<std::size_t> done{0};
  std::size_t asked = 0;
  const auto interrupt = [&] {
    ++asked;
    return false;
  };
  run_parallel(150, 1, interrupt, [&](std::size_t, std::size_t) {
    ++done;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  });
  CHECK(done == 150);
  CHECK(asked > 0 && asked < 150);
}

}  // namespace
}  // namespace fastsd::test
