// The way to GPUs, over the stub driver.
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "checksum.h"
#include "cuda/direct_storage.h"
#include "cuda/driver.h"
#include "cuda/ring.h"
#include "cuda/upload.h"
#include "error.h"
#include "faults.h"
#include "file.h"
#include "stub.h"
#include "support.h"

namespace fastsd::cuda {
namespace {

using test::Folder;
using test::Random;
using test::Stub;

// A file of random bytes, and memory that stands for that of a GPU.
struct Sample {
  explicit Sample(std::size_t count, std::uint64_t seed = 1)
      : bytes(Random(seed).bytes(count)), target(count, std::byte{0xEE}) {
    const auto* text = reinterpret_cast<const char*>(bytes.data());
    test::write_whole(folder.path("file"), std::string(text, count));
  }

  File file() const { return File(folder.path("file")); }

  // [begin, begin + count) of the file, to the same place of the target.
  Transfer transfer(std::size_t begin, std::size_t count, int gpu = 0) {
    return {begin, count, gpu, Stub::address(target.data() + begin)};
  }

  // Whether the target has the file's bytes there, and only there.
  bool has(const std::vector<Transfer>& transfers) const {
    std::vector<std::byte> expected(bytes.size(), std::byte{0xEE});
    for (const Transfer& transfer : transfers) {
      std::copy_n(bytes.begin() + static_cast<std::ptrdiff_t>(transfer.offset), transfer.bytes,
                  expected.begin() + static_cast<std::ptrdiff_t>(transfer.offset));
    }
    return target == expected;
  }

  Folder folder;
  std::vector<std::byte> bytes;
  std::vector<std::byte> target;
};

UploadOptions to_gpus(int count = 1) {
  UploadOptions options;
  for (int gpu = 0; gpu < count; ++gpu) options.streams.emplace_back(gpu, nullptr);
  return options;
}

void forget_cached(const std::string& path) {
  const File file(path);
  ::fsync(file.descriptor());
  ::posix_fadvise(file.descriptor(), 0, 0, POSIX_FADV_DONTNEED);
}

constexpr std::size_t kMiB = std::size_t{1} << 20U;

// ---- The driver ----

TEST(cuda_driver_that_is_not_there_says_so) {
  CHECK_THROWS(Driver("no-such-library.so"), Failure::kUnsupported);
  CHECK_THROWS(Driver("libc.so.6"), Failure::kUnsupported);  // one without its functions
}

TEST(cuda_driver_too_old_or_without_gpus) {
  Stub stub;
  stub.set("version", 11080);
  CHECK_THROWS(Driver(FASTSD_STUB_CUDA), Failure::kUnsupported);
  stub.set("version", 12000);
  CHECK(Driver(FASTSD_STUB_CUDA).version() == 12000);
  stub.set("init_error", 100);
  CHECK_THROWS(Driver(FASTSD_STUB_CUDA), Failure::kUnsupported);
}

TEST(cuda_gpu_that_does_not_exist) {
  const Stub stub;
  CHECK_THROWS(Gpu(Driver::open(), 2), Failure::kDevice);
}

// ---- Upload ----

TEST(cuda_upload_puts_every_byte_where_it_goes) {
  Stub stub;
  stub.set("copy_delay_us", 200);
  Sample sample(40 * kMiB + 123);
  const std::vector<Transfer> transfers = {
      sample.transfer(0, 1),
      sample.transfer(1, 4095),
      sample.transfer(5000, 0),
      sample.transfer(5000, 30 * kMiB + 7),  // several slabs
      sample.transfer(33 * kMiB + 1, 2),     // behind a large gap
      sample.transfer(40 * kMiB + 100, 23),  // to the last byte
  };
  upload(sample.file(), transfers, to_gpus(), {});
  CHECK(sample.has(transfers));
  CHECK(stub.get("streams") == 0 && stub.get("events") == 0 && stub.get("misuses") == 0);
}

TEST(cuda_upload_of_files_that_are_not_cached) {
  Stub stub;
  for (const std::size_t begin : {std::size_t{0}, std::size_t{4096}, std::size_t{777}}) {
    Sample sample(20 * kMiB + 5, begin);
    const std::vector<Transfer> transfers = {sample.transfer(3, 10 * kMiB),
                                             sample.transfer(11 * kMiB, 9 * kMiB + 5)};
    forget_cached(sample.folder.path("file"));
    const File whole(sample.folder.path("file"));
    const File file(whole.descriptor(), "file", begin);
    std::vector<Transfer> moved = transfers;
    for (Transfer& transfer : moved)
      transfer.offset -= std::min<std::uint64_t>(begin, transfer.offset);
    moved[0].bytes -= begin > 3 ? begin - 3 : 0;
    moved[0].target += begin > 3 ? begin - 3 : 0;
    upload(file, moved, to_gpus(), {});
    const std::size_t first = std::max<std::size_t>(begin, 3);
    CHECK(sample.has({sample.transfer(first, 10 * kMiB + 3 - first), transfers[1]}));
  }
}

TEST(cuda_upload_of_random_pieces_to_two_gpus) {
  Stub stub;
  stub.set("copy_delay_us", 50);
  for (std::uint64_t seed = 0; seed < 30; ++seed) {
    Random random(seed);
    Sample sample(1 + random.below(12 * kMiB), seed);
    std::vector<Transfer> transfers;
    for (std::size_t at = 0; at < sample.bytes.size();) {
      const std::size_t left = sample.bytes.size() - at;
      const std::size_t room = random.below(2) == 0 ? 5000 : left;
      const std::size_t count = random.below(std::min(left, room) + 1);
      transfers.push_back(sample.transfer(at, count, static_cast<int>(random.below(2))));
      at += count + random.below(3) * random.below(100000);
    }
    if (seed % 2 == 0) forget_cached(sample.folder.path("file"));
    upload(sample.file(), transfers, to_gpus(2), {});
    CHECK(sample.has(transfers));
  }
  CHECK(stub.get("misuses") == 0);
}

TEST(cuda_upload_from_memory) {
  const Stub stub;
  Sample sample(3 * kMiB);
  const std::shared_ptr<Memory> memory = Memory::allocate(sample.bytes.size());
  std::memcpy(memory->data(), sample.bytes.data(), sample.bytes.size());
  const std::vector<Transfer> transfers = {sample.transfer(17, 2 * kMiB)};
  upload(File(memory, sample.bytes.size(), "stream", 0), transfers, to_gpus(), {});
  CHECK(sample.has(transfers));
}

TEST(cuda_upload_of_nothing) {
  const Stub stub;
  Sample sample(10);
  upload(sample.file(), {}, to_gpus(), {});
  upload(sample.file(), {sample.transfer(4, 0)}, to_gpus(), {});
  CHECK(sample.has({}));
}

TEST(cuda_upload_comes_after_the_work_of_the_callers_stream) {
  Stub stub;
  Sample sample(2 * kMiB);
  stub.write_late(0, sample.target.data(), 0x55, sample.target.size());
  const std::vector<Transfer> transfers = {sample.transfer(0, sample.bytes.size())};
  upload(sample.file(), transfers, to_gpus(), {});
  CHECK(sample.has(transfers));
}

TEST(cuda_upload_checksums_what_it_copies) {
  const Stub stub;
  Sample sample(21 * kMiB);
  const std::vector<Transfer> transfers = {
      sample.transfer(0, 17 * kMiB + 9), sample.transfer(18 * kMiB, 0),
      sample.transfer(19 * kMiB, 777), sample.transfer(21 * kMiB, 0)};
  UploadOptions options = to_gpus();
  options.checksum = &kCrc32c;
  const std::vector<std::uint32_t> crcs = upload(sample.file(), transfers, options, {});
  CHECK(crcs.size() == transfers.size());
  for (std::size_t i = 0; i < crcs.size(); ++i)
    CHECK(crcs[i] == crc32c(0, sample.bytes.data() + transfers[i].offset, transfers[i].bytes));
}

TEST(cuda_upload_counts_bytes) {
  const Stub stub;
  Sample sample(3 * kMiB);
  std::atomic<std::uint64_t> done{0};
  UploadOptions options = to_gpus();
  options.done = &done;
  upload(sample.file(), {sample.transfer(0, 3 * kMiB)}, options, {});
  CHECK(done == 3 * kMiB);
  done = 0;
  upload(sample.file(), {sample.transfer(0, 10), sample.transfer(1000, 10)}, options, {});
  CHECK(done == 20);  // not what lies between them
}

// ---- The ring ----

TEST(cuda_ring_is_bounded_and_used_again) {
  Stub stub;
  stub.set("copy_delay_us", 500);
  Ring::shared().set_bytes_max(3 * kSlabBytes);
  Sample sample(40 * kMiB);
  const std::vector<Transfer> transfers = {sample.transfer(0, 40 * kMiB)};
  upload(sample.file(), transfers, to_gpus(), {});
  CHECK(sample.has(transfers));
  CHECK(stub.get("pinned_peak") <= static_cast<long>(3 * kSlabBytes));
  CHECK(Ring::shared().bytes() <= 3 * kSlabBytes);
  const long copies = stub.get("unpinned_copies");
  upload(sample.file(), transfers, to_gpus(), {});
  CHECK(stub.get("pinned_peak") <= static_cast<long>(3 * kSlabBytes));
  CHECK(stub.get("unpinned_copies") == copies);
  Ring::shared().set_bytes_max(Ring::kBytesMaxDefault);
}

TEST(cuda_pinned_memory_of_a_driver_that_is_gone) {
  Stub stub;
  Sample sample(20 * kMiB);
  upload(sample.file(), {sample.transfer(0, 20 * kMiB)}, to_gpus(), {});
  CHECK(stub.get("pinned") > 0);
  stub.set("is_gone", 1);
  Ring::shared().empty();
  CHECK(Ring::shared().bytes() == 0);
}

TEST(cuda_ring_shrinks) {
  Stub stub;
  stub.set("copy_delay_us", 500);
  Sample sample(60 * kMiB);
  upload(sample.file(), {sample.transfer(0, 60 * kMiB)}, to_gpus(), {});
  CHECK(Ring::shared().bytes() > 2 * kSlabBytes);
  Ring::shared().set_bytes_max(1);
  CHECK(Ring::shared().bytes() == 2 * kSlabBytes);
  CHECK(stub.get("pinned") == static_cast<long>(2 * kSlabBytes));
  Ring::shared().set_bytes_max(Ring::kBytesMaxDefault);
}

TEST(cuda_little_work_pins_nothing) {
  Stub stub;
  Sample sample(kMiB);
  upload(sample.file(), {sample.transfer(0, kMiB)}, to_gpus(), {});
  CHECK(stub.get("pinned_peak") == 0);
}

TEST(cuda_upload_without_memory_to_pin) {
  Stub stub;
  stub.set("fail_pin", 1);
  Sample sample(30 * kMiB);
  const std::vector<Transfer> transfers = {sample.transfer(0, 30 * kMiB)};
  upload(sample.file(), transfers, to_gpus(), {});
  CHECK(sample.has(transfers));
  CHECK(stub.get("unpinned_copies") > 0 && stub.get("pinned_peak") == 0);
}

// ---- GPUDirect Storage ----

// While this lives, the stub's.
struct StubStorage {
  StubStorage() { DirectStorage::set_library(FASTSD_STUB_CUDA, "/proc/self/exe"); }
  ~StubStorage() { DirectStorage::set_library("", ""); }
};

TEST(cuda_direct_storage_that_is_not_real_says_so) {
  CHECK_THROWS(DirectStorage("libc.so.6", "/no/such/module"), Failure::kUnsupported);
  CHECK_THROWS(DirectStorage("no-such-library.so", "/proc/self/exe"), Failure::kUnsupported);
  CHECK_THROWS(DirectStorage("libc.so.6", "/proc/self/exe"), Failure::kUnsupported);
}

TEST(cuda_direct_storage_reads_what_is_not_cached) {
  Stub stub;
  const StubStorage storage;
  UploadOptions options = to_gpus(2);
  options.direct_storage = true;
  Sample sample(30 * kMiB);
  const std::vector<Transfer> transfers = {sample.transfer(5, 10 * kMiB),
                                           sample.transfer(11 * kMiB, 19 * kMiB, 1)};
  upload(sample.file(), transfers, options, {});  // it has just been written
  CHECK(sample.has(transfers) && stub.get("direct_reads") == 0);
  forget_cached(sample.folder.path("file"));
  std::fill(sample.target.begin(), sample.target.end(), std::byte{0xEE});
  stub.write_late(0, sample.target.data() + 5, 0x55, 10 * kMiB);  // comes first
  upload(sample.file(), transfers, options, {});
  CHECK(sample.has(transfers) && stub.get("direct_reads") > 0);
  CHECK(stub.get("files") == 0 && stub.get("misuses") == 0 && stub.get("streams") == 0);
}

TEST(cuda_direct_storage_refused_for_a_file) {
  Stub stub;
  const StubStorage storage;
  stub.set("fail_file", 1);
  UploadOptions options = to_gpus();
  options.direct_storage = true;
  Sample sample(3 * kMiB);
  forget_cached(sample.folder.path("file"));
  const std::vector<Transfer> transfers = {sample.transfer(0, 3 * kMiB)};
  upload(sample.file(), transfers, options, {});
  CHECK(sample.has(transfers) && stub.get("direct_reads") == 0);
}

TEST(cuda_direct_storage_of_a_file_that_becomes_shorter) {
  Stub stub;
  const StubStorage storage;
  UploadOptions options = to_gpus();
  options.direct_storage = true;
  Sample sample(20 * kMiB);
  const File file = sample.file();
  forget_cached(sample.folder.path("file"));
  std::filesystem::resize_file(sample.folder.path("file"), 13 * kMiB);
  CHECK_THROWS(upload(file, {sample.transfer(0, 20 * kMiB)}, options, {}), Failure::kTruncated);
  CHECK(stub.get("files") == 0 && stub.get("streams") == 0);
}

// ---- Failures ----

TEST(cuda_errors_name_the_file) {
  Stub stub;
  stub.set("fail_copy", 1);
  Sample sample(10);
  try {
    upload(sample.file(), {sample.transfer(0, 10)}, to_gpus(), {});
    CHECK(false);
  } catch (const Error& error) {
    CHECK(error.path == sample.file().name());
  }
  Ring::shared().empty();
  stub.recover();
}

TEST(cuda_copy_that_fails_in_the_middle) {
  Stub stub;
  for (const long fail_copy : {1L, 3L, 6L}) {
    stub.set("copies", 0);
    stub.set("fail_copy", fail_copy);
    stub.set("copy_delay_us", 100);
    {
      Sample sample(60 * kMiB);
      CHECK_THROWS(upload(sample.file(), {sample.transfer(0, 60 * kMiB)}, to_gpus(), {}),
                   Failure::kDevice);
      CHECK(stub.get("streams") == 0);
    }
    Ring::shared().empty();
    CHECK(stub.get("events") == 0 && stub.get("contexts") <= 3);
    stub.recover();
  }
}

TEST(cuda_file_that_becomes_shorter) {
  Stub stub;
  stub.set("copy_delay_us", 100);
  for (const bool is_cached : {true, false}) {
    Sample sample(50 * kMiB);
    const File file = sample.file();
    if (!is_cached) forget_cached(sample.folder.path("file"));
    std::filesystem::resize_file(sample.folder.path("file"), 31 * kMiB + 100);
    CHECK_THROWS(upload(file, {sample.transfer(0, 50 * kMiB)}, to_gpus(), {}), Failure::kTruncated);
    CHECK(stub.get("streams") == 0 && stub.get("events") == 0);
    // Nothing is on its way any more: the target may go.
    const std::vector<std::byte> then = sample.target;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    CHECK(then == sample.target);
  }
}

TEST(cuda_reads_that_stop_short_or_are_interrupted) {
  Stub stub;
  for (const bool is_cached : {true, false}) {
    Sample sample(9 * kMiB + 77);
    const std::vector<Transfer> transfers = {sample.transfer(100, 9 * kMiB - 23)};
    const File file = sample.file();
    if (!is_cached) forget_cached(sample.folder.path("file"));
    test::Injection injection;
    injection.fault = test::Fault::kShort;
    injection.is_repeated = true;
    injection.only = "preadv";
    {
      const test::InjectionScope scope(injection);
      upload(file, transfers, to_gpus(), {});
    }
    CHECK(sample.has(transfers));
    injection.fault = test::Fault::kError;
    injection.error = EINTR;
    injection.is_repeated = false;
    injection.call = 1;
    const test::InjectionScope scope(injection);
    upload(file, transfers, to_gpus(), {});
    CHECK(sample.has(transfers));
  }
}

TEST(cuda_read_that_fails) {
  Stub stub;
  for (const bool is_cached : {true, false}) {
    Sample sample(9 * kMiB);
    const File file = sample.file();
    if (!is_cached) forget_cached(sample.folder.path("file"));
    test::Injection injection;
    injection.fault = test::Fault::kError;
    injection.error = EIO;
    injection.call = 1;
    injection.only = "preadv";
    const test::InjectionScope scope(injection);
    CHECK_THROWS(upload(file, {sample.transfer(0, 9 * kMiB)}, to_gpus(), {}), Failure::kSystem);
    CHECK(stub.get("streams") == 0 && stub.get("events") == 0);
  }
}

TEST(cuda_upload_that_is_interrupted) {
  Stub stub;
  stub.set("copy_delay_us", 20000);
  Ring::shared().set_bytes_max(2 * kSlabBytes);
  Sample sample(100 * kMiB);
  CHECK_THROWS(
      upload(sample.file(), {sample.transfer(0, 100 * kMiB)}, to_gpus(), [] { return true; }),
      Failure::kInterrupted);
  CHECK(stub.get("streams") == 0 && stub.get("events") == 0 && stub.get("copies") < 13);
  Ring::shared().set_bytes_max(Ring::kBytesMaxDefault);
}

// ---- Threads and processes ----

TEST(cuda_uploads_of_several_threads_share_the_ring) {
  Stub stub;
  stub.set("copy_delay_us", 300);
  Ring::shared().set_bytes_max(4 * kSlabBytes);
  std::vector<std::unique_ptr<Sample>> samples(4);
  for (std::size_t i = 0; i < 4; ++i) samples[i] = std::make_unique<Sample>(20 * kMiB, i);
  std::vector<std::thread> threads;
  threads.reserve(samples.size());
  for (const auto& sample : samples) {
    threads.emplace_back([&sample] {
      for (int i = 0; i < 3; ++i) {
        std::fill(sample->target.begin(), sample->target.end(), std::byte{0xEE});
        upload(sample->file(), {sample->transfer(5, 19 * kMiB, i % 2)}, to_gpus(2), {});
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& sample : samples) CHECK(sample->has({sample->transfer(5, 19 * kMiB)}));
  CHECK(stub.get("pinned_peak") <= static_cast<long>(4 * kSlabBytes));
  CHECK(stub.get("misuses") == 0 && stub.get("streams") == 0 && stub.get("events") == 0);
  Ring::shared().set_bytes_max(Ring::kBytesMaxDefault);
}

TEST(cuda_in_a_forked_process_is_an_error_and_harms_nobody) {
  Stub stub;
  Sample sample(30 * kMiB);
  const std::vector<Transfer> transfers = {sample.transfer(0, 30 * kMiB)};
  upload(sample.file(), transfers, to_gpus(), {});
  const pid_t child = ::fork();
  if (child == 0) {
    bool is_right = Ring::shared().bytes() == 0;
    try {
      upload(sample.file(), transfers, to_gpus(), {});
      is_right = false;
    } catch (const Error& error) {
      is_right = is_right && error.kind == Failure::kDevice;
    }
    ::_exit(is_right ? 0 : 1);
  }
  int status = -1;
  ::waitpid(child, &status, 0);
  CHECK(status == 0);
  std::fill(sample.target.begin(), sample.target.end(), std::byte{0xEE});
  upload(sample.file(), transfers, to_gpus(), {});
  CHECK(sample.has(transfers));
}

}  // namespace
}  // namespace fastsd::cuda
