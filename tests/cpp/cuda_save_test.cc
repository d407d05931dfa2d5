// Saving what lies on GPUs, over the stub driver: the file is what it would be from host memory.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "cuda/download.h"
#include "cuda/ring.h"
#include "error.h"
#include "faults.h"
#include "layouts.h"
#include "stub.h"
#include "stub_cuda.h"
#include "support.h"
#include "workers.h"
#include "writer.h"

namespace fastsd::test {
namespace {

using cuda::kSlabBytes;
using cuda::Ring;

constexpr std::size_t kMiB = std::size_t{1} << 20U;

// The tensor as one of a GPU, whose memory the processor cannot read.
Tensor on_gpu(Tensor tensor, int gpu = 0) {
  const std::uintptr_t address = Stub::address(tensor.data) | kStubDeviceBit;
  tensor.data = reinterpret_cast<const std::byte*>(address);  // NOLINT(performance-no-int-to-ptr)
  tensor.gpu = gpu;
  return tensor;
}

std::vector<Tensor> on_gpus(const std::vector<Tensor>& tensors, int gpus) {
  std::vector<Tensor> moved = tensors;
  for (std::size_t i = 0; i < moved.size(); ++i)
    moved[i] = on_gpu(moved[i], static_cast<int>(i) % gpus);
  return moved;
}

WriteOptions from_gpus(int gpus = 1, bool durable = false) {
  WriteOptions options;
  options.durable = durable;
  for (int gpu = 0; gpu < gpus; ++gpu) options.sources.streams.emplace_back(gpu, nullptr);
  return options;
}

// One tensor, of random bytes.
struct Model {
  explicit Model(std::size_t bytes, std::uint64_t seed = 1) : memory(Random(seed).bytes(bytes)) {}

  Tensor tensor() const {
    return {"x", DType::kUInt8, memory.data(), {static_cast<std::int64_t>(memory.size())}};
  }
  void save(const std::string& path, const WriteOptions& options,
            const Interrupt& interrupt = {}) const {
    FsdLayout layout = lay_out({on_gpu(tensor())});
    write_file(path, layout, options, interrupt);
  }
  std::string file() const {
    FsdLayout layout = lay_out({tensor()});
    checksum_storages(layout, {}, {});
    return whole_file(layout);
  }

  std::vector<std::byte> memory;
};

// Sets the ring's size, and back.
struct RingSize {
  explicit RingSize(std::uint64_t slabs) { Ring::shared().set_bytes_max(slabs * kSlabBytes); }
  ~RingSize() { Ring::shared().set_bytes_max(Ring::kBytesMaxDefault); }
  RingSize(const RingSize&) = delete;
  RingSize& operator=(const RingSize&) = delete;
};

bool is_clean(Stub& stub) {
  return stub.get("streams") == 0 && stub.get("events") == 0 && stub.get("misuses") == 0;
}

// Files and streams from GPUs against a file from the host.
bool gives_the_same(const LayOut lay_out_tensors, const std::vector<Tensor>& host,
                    const std::vector<Tensor>& moved, int gpus) {
  const Folder folder;
  write_file(folder.path("x"), *lay_out_tensors(host), {}, {});
  const std::string wanted = read_whole(folder.path("x"));
  for (const bool durable : {false, true}) {
    write_file(folder.path("x"), *lay_out_tensors(moved), from_gpus(gpus, durable), {});
    if (read_whole(folder.path("x")) != wanted) return false;
  }
  const std::unique_ptr<Layout> layout = lay_out_tensors(moved);
  const WriteOptions options = from_gpus(gpus);
  checksum_storages(*layout, options, {});
  Content content(*layout, options.sources);
  std::string streamed(wanted.size(), '\xEE');
  auto* target = reinterpret_cast<std::byte*>(streamed.data());
  const std::uint64_t middle = wanted.size() / 3;
  content.gather(0, middle, target);
  content.gather(middle, wanted.size(), target + middle);
  return streamed == wanted;
}

// Row-major and transposed, small and of several windows, side by side.
std::vector<Tensor> make_tensors(Random& random, const std::vector<std::byte>& memory) {
  std::vector<Tensor> tensors;
  for (std::uint64_t at = 0; at < memory.size();) {
    const std::uint64_t sizes[] = {0, random.below(100), random.below(70000),
                                   random.below(5 << 20U)};
    const std::uint64_t bytes = std::min(sizes[random.below(4)], memory.size() - at);
    const auto columns = std::int64_t(bytes / 8 / 5);
    const std::string name = std::to_string(tensors.size());
    if (random.below(5) == 0 && columns > 0) {
      tensors.emplace_back(name, DType::kFloat64, memory.data() + at, Dims{5, columns}, Dims{1, 5});
    } else {
      tensors.emplace_back(name, DType::kUInt8, memory.data() + at, Dims{std::int64_t(bytes)});
    }
    at += bytes;
  }
  return tensors;
}

TEST(cuda_save_writes_the_bytes_of_gpus) {
  Stub stub;
  stub.set("copy_delay_us", 100);
  Random random(71);
  const std::vector<std::byte> memory = random.bytes((14 << 20U) + 777);
  for (const LayOut lay_out_tensors : kLayOuts) {
    const std::vector<Tensor> tensors = make_tensors(random, memory);
    CHECK(gives_the_same(lay_out_tensors, tensors, on_gpus(tensors, 2), 2));
  }
  CHECK(is_clean(stub));
}

TEST(cuda_save_of_what_lies_on_gpus_and_on_the_host) {
  Stub stub;
  stub.set("copy_delay_us", 100);
  Random random(72);
  const std::vector<std::byte> memory = random.bytes(12 << 20U);
  for (const LayOut lay_out_tensors : kLayOuts) {
    const std::vector<Tensor> tensors = make_tensors(random, memory);
    std::vector<Tensor> some = tensors;
    for (std::size_t i = 0; i < some.size(); i += 2) some[i] = on_gpu(some[i]);
    CHECK(gives_the_same(lay_out_tensors, tensors, some, 1));
  }
}

TEST(cuda_save_of_strided_views) {
  Stub stub;
  const std::vector<std::byte> memory = Random(73).bytes(13 << 20U);
  const std::byte* data = memory.data();
  const std::vector<std::vector<Tensor>> cases = {
      // Gaps, in small and over many windows.
      {{"a", DType::kUInt8, data, {8}, {4}}, {"b", DType::kUInt8, data + 2, {4}, {4}}},
      {{"columns", DType::kFloat32, data + 4, {1000, 1000}, {2500, 1}}},
      {{"far", DType::kInt16, data + 2, {3}, {3 << 20U}}},
      // Bytes before the first view, which belong to none.
      {{"narrow", DType::kInt32, data + 4, {6}}, {"wide", DType::kInt64, data + 8, {2}}},
      // Transposed, larger than a window.
      {{"t", DType::kFloat32, data, {1100, 1000}, {1, 1100}}, {"u", DType::kInt8, data, {9}}},
      {{"expanded", DType::kFloat32, data, {700, 900}, {0, 1}}},
  };
  for (const std::vector<Tensor>& tensors : cases) {
    for (const LayOut lay_out_tensors : kLayOuts)
      CHECK(gives_the_same(lay_out_tensors, tensors, on_gpus(tensors, 1), 1));
  }
  CHECK(is_clean(stub));
}

TEST(cuda_save_keeps_bytes_that_no_view_reaches_private) {
  const Stub stub;
  const std::vector<std::byte> memory(64, std::byte{'s'});
  const FsdLayout layout = lay_out({on_gpu({"a", DType::kUInt8, memory.data(), {16}, {4}})});
  Content content(layout, from_gpus().sources);
  std::string bytes(61, '\xEE');
  content.gather(layout.data_begin(), layout.data_begin() + 61,
                 reinterpret_cast<std::byte*>(bytes.data()));
  std::string expected;
  for (int i = 0; i < 15; ++i) expected += std::string("s\0\0\0", 4);
  CHECK(bytes == expected + "s");
}

TEST(cuda_save_comes_after_the_work_of_the_callers_stream) {
  Stub stub;
  for (const bool durable : {false, true}) {
    const Folder folder;
    Model model(20 * kMiB);
    stub.write_late(0, model.memory.data(), 0x55, model.memory.size());
    model.save(folder.path("x"), from_gpus(1, durable));
    CHECK(model.memory.back() == std::byte{0x55});
    CHECK(read_whole(folder.path("x")) == model.file());
  }
}

TEST(cuda_save_copies_while_it_writes) {
  Stub stub;
  stub.set("copy_delay_us", 1000);
  const Folder folder;
  const Model model(12 * kMiB);
  // The first write waits until another window has come: alone, it would wait forever.
  bool has_come = false;
  Injection injection;
  injection.fault = Fault::kMeanwhile;
  injection.only = "pwritev";
  injection.meanwhile = [&] {
    const long copies = stub.get("copies");
    for (int i = 0; i < 10000 && stub.get("copies") == copies; ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    has_come = stub.get("copies") > copies;
  };
  {
    const InjectionScope scope(injection);
    model.save(folder.path("x"), from_gpus());
  }
  CHECK(has_come || processor_count() == 1);
  CHECK(read_whole(folder.path("x")) == model.file());
}

// ---- The ring ----

TEST(cuda_save_takes_no_more_than_the_ring_has) {
  Stub stub;
  stub.set("copy_delay_us", 300);
  const RingSize size(2);
  const Folder folder;
  const Model model(40 * kMiB);
  for (const bool durable : {false, true}) {  // four threads, when durable, and two slabs
    model.save(folder.path("x"), from_gpus(1, durable));
    CHECK(read_whole(folder.path("x")) == model.file());
    CHECK(stub.get("pinned_peak") <= static_cast<long>(2 * kSlabBytes));
    CHECK(stub.get("unpinned_copies") == 0);
  }
  FsdLayout layout = lay_out({on_gpu(model.tensor())});
  const WriteOptions options = from_gpus();
  checksum_storages(layout, options, {});
  std::string streamed(layout.file_bytes(), '\0');
  Content(layout, options.sources)
      .gather(0, streamed.size(), reinterpret_cast<std::byte*>(streamed.data()));
  CHECK(streamed == model.file());
  CHECK(stub.get("pinned_peak") <= static_cast<long>(2 * kSlabBytes));
}

TEST(cuda_save_gives_a_slab_back_once_nothing_is_on_its_way) {
  Stub stub;
  const std::vector<std::byte> bytes = Random(75).bytes(kSlabBytes);
  cuda::Download download({{0, nullptr}}, 2 * kSlabBytes);
  stub.set("copy_delay_us", 20000);
  const std::byte* slab = nullptr;
  {
    const cuda::Landing landing(&download);
    download.copy(landing.data(), on_gpu({"x", DType::kUInt8, bytes.data(), {1}}).data, kSlabBytes,
                  0);
    slab = landing.data();  // which the ring keeps
  }
  CHECK(std::equal(bytes.begin(), bytes.end(), slab));
}

TEST(cuda_save_of_little_pins_nothing) {
  Stub stub;
  const Folder folder;
  const Model model(kMiB);
  model.save(folder.path("x"), from_gpus());
  CHECK(read_whole(folder.path("x")) == model.file());
  CHECK(stub.get("pinned_peak") == 0);
}

TEST(cuda_save_without_memory_to_pin) {
  Stub stub;
  stub.set("fail_pin", 1);
  const Folder folder;
  const Model model(20 * kMiB);
  model.save(folder.path("x"), from_gpus());
  CHECK(read_whole(folder.path("x")) == model.file());
  CHECK(stub.get("unpinned_copies") > 0);
}

TEST(cuda_saves_of_several_threads_share_the_ring) {
  Stub stub;
  stub.set("copy_delay_us", 100);
  const RingSize size(3);
  const Folder folder;
  std::vector<std::thread> threads;
  std::atomic<int> right{0};
  threads.reserve(4);
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      const Model model(20 * kMiB, static_cast<std::uint64_t>(i));
      const std::string path = folder.path(std::to_string(i));
      for (const bool durable : {false, true}) {
        model.save(path, from_gpus(2, durable));
        right += read_whole(path) == model.file() ? 1 : 0;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(right == 8);
  CHECK(stub.get("pinned_peak") <= static_cast<long>(3 * kSlabBytes));
  CHECK(is_clean(stub));
}

// ---- Failures ----

// A save over an old file that ends as `fail` says: that stays, and nothing else is there.
bool keeps_the_old_file(const Folder& folder, Failure kind, const std::function<void()>& fail) {
  try {
    fail();
    return false;
  } catch (const Error& error) {
    if (error.kind != kind) return false;
  }
  return read_whole(folder.path("x")) == "old" && folder.file_count() == 1;
}

TEST(cuda_save_whose_copy_fails_in_the_middle) {
  Stub stub;
  const RingSize size(2);
  const Model model(60 * kMiB);
  for (const long fail_copy : {1L, 3L, 6L}) {
    for (const bool durable : {false, true}) {
      stub.set("copies", 0);
      stub.set("fail_copy", fail_copy);
      stub.set("copy_delay_us", 100);
      const Folder folder;
      write_whole(folder.path("x"), "old");
      CHECK(keeps_the_old_file(folder, Failure::kDevice,
                               [&] { model.save(folder.path("x"), from_gpus(1, durable)); }));
      CHECK(is_clean(stub));
      Ring::shared().empty();
      stub.recover();
    }
  }
}

TEST(cuda_save_on_a_full_device_gives_its_slabs_back) {
  Stub stub;
  stub.set("copy_delay_us", 100);
  const RingSize size(2);
  const Model model(60 * kMiB);
  for (const bool durable : {false, true}) {
    const Folder folder;
    write_whole(folder.path("x"), "old");
    Injection injection;
    injection.fault = Fault::kError;
    injection.error = ENOSPC;
    injection.only = "pwritev";
    injection.call = 2;
    injection.is_repeated = true;
    CHECK(keeps_the_old_file(folder, Failure::kSystem, [&] {
      const InjectionScope scope(injection);
      model.save(folder.path("x"), from_gpus(1, durable));
    }));
    CHECK(is_clean(stub));
    model.save(folder.path("x"), from_gpus(1, durable));  // would wait forever for lost slabs
    CHECK(read_whole(folder.path("x")) == model.file());
  }
}

TEST(cuda_save_that_is_interrupted) {
  Stub stub;
  stub.set("copy_delay_us", 30000);
  const Folder folder;
  write_whole(folder.path("x"), "old");
  const Model model(100 * kMiB);
  CHECK(keeps_the_old_file(folder, Failure::kInterrupted, [&] {
    model.save(folder.path("x"), from_gpus(), [] { return true; });
  }));
  CHECK(is_clean(stub) && stub.get("copies") < 40);
}

TEST(cuda_save_in_a_forked_process_is_an_error) {
  Stub stub;
  const Folder folder;
  const Model model(20 * kMiB);
  model.save(folder.path("first"), from_gpus());
  std::filesystem::remove(folder.path("first"));
  write_whole(folder.path("x"), "old");
  const pid_t child = ::fork();
  if (child == 0) {
    ::_exit(keeps_the_old_file(folder, Failure::kDevice,
                               [&] { model.save(folder.path("x"), from_gpus()); })
                ? 0
                : 1);
  }
  int status = -1;
  ::waitpid(child, &status, 0);
  CHECK(status == 0);
  model.save(folder.path("x"), from_gpus());
  CHECK(read_whole(folder.path("x")) == model.file());
}

}  // namespace
}  // namespace fastsd::test
