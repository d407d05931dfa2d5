// One target under libFuzzer: what it allocates in all, and its processor time, are in proportion
// to the input, or that is a finding.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <ctime>

#include "fuzz.h"

namespace {

// Generous by a small factor, measured on honest inputs; and what a few limits of the code allow
// whatever the input (slabs to verify with, the growth that a small pickle may have).
constexpr std::uint64_t kAllocatedPerByte = 1000;
constexpr std::uint64_t kAllocatedFree = std::uint64_t{128} << 20U;
constexpr double kSecondsPerByte = 20e-6;
constexpr double kSecondsFree = 1;

std::atomic<std::uint64_t> allocated_bytes{0};

void count_allocation(const volatile void* /*address*/, std::size_t bytes) {
  allocated_bytes += bytes;
}

double processor_seconds() {
  struct timespec now{};
  ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

}  // namespace

extern "C" int __sanitizer_install_malloc_and_free_hooks(  // NOLINT(bugprone-reserved-identifier)
    void (*malloc_hook)(const volatile void*, std::size_t),
    void (*free_hook)(const volatile void*));

extern "C" int LLVMFuzzerInitialize(int* /*argc*/, char*** /*argv*/) {
  __sanitizer_install_malloc_and_free_hooks(count_allocation, [](const volatile void*) {});
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  allocated_bytes = 0;
  const double begin = processor_seconds();
  fastsd::fuzz::Target::first->body({reinterpret_cast<const char*>(data), size});
  const double seconds = processor_seconds() - begin;
  if (allocated_bytes > kAllocatedFree + kAllocatedPerByte * size ||
      seconds > kSecondsFree + kSecondsPerByte * static_cast<double>(size)) {
    std::fprintf(stderr, "out of proportion: %zu bytes took %.3f s and allocated %llu bytes\n",
                 size, seconds, static_cast<unsigned long long>(allocated_bytes.load()));
    std::abort();
  }
  return 0;
}
