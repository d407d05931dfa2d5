// The threads that reads and writes share.
#pragma once

#include <cstddef>
#include <functional>

namespace fastsd {

// Asked now and then, by the calling thread only, whether to stop.
using Interrupt = std::function<bool()>;

// Threads worth starting for work that is bound by memory: the processors this process may run on,
// at most 16.
std::size_t processor_count();

// Runs task(worker, i) once for every i in [0, count), on up to `threads` threads of which the
// caller is worker 0. Indices are handed out in ascending order. Returns when all have ended;
// rethrows the first exception, after which no new index is handed out. Throws kInterrupted if
// `interrupt` says so. Threads live as long as the call, so that nothing is left for a fork to
// lose.
void run_parallel(std::size_t count, std::size_t threads, const Interrupt& interrupt,
                  const std::function<void(std::size_t worker, std::size_t i)>& task);

}  // namespace fastsd
