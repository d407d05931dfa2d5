// What is promised to be thread-safe, from several threads: for the thread sanitizer above all.
#include <fcntl.h>

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "layouts.h"
#include "reader.h"

namespace fastsd::test {
namespace {

constexpr std::size_t kThreads = 4;
constexpr int kRounds = 5;

// Runs work(thread) in several threads; checks that each returns true every time.
template <class Work>
void check_in_threads(Work work) {
  std::atomic<int> right{0};
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (std::size_t thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&, thread] {
      for (int round = 0; round < kRounds; ++round) right += work(thread) ? 1 : 0;
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(right == int(kThreads) * kRounds);
}

// Two tensors, of which the first is read and written by several threads at once.
std::vector<Tensor> make_tensors(const std::vector<std::byte>& memory) {
  const auto half = std::int64_t(memory.size() / 2);
  return {{"data/0", DType::kUInt8, memory.data(), {half}},
          {"data/1", DType::kUInt8, memory.data() + half, {half}}};
}

bool has(const Bytes& bytes, const std::byte* expected, std::size_t count) {
  return std::equal(bytes.data, bytes.data + count, expected);
}

TEST(threads_share_a_reader) {
  const Folder folder;
  const std::string path = folder.path("x");
  const std::vector<std::byte> memory = Random(71).bytes(8U << 20U);
  const std::size_t half = memory.size() / 2;
  write_file(path, *lay_out_fsd(make_tensors(memory)), {}, nullptr);
  for (const Access access : {Access::kMap, Access::kRead}) {
    const Reader reader(path, access);
    check_in_threads([&](std::size_t thread) {
      const std::vector<bool> is_wanted = {true, thread % 2 == 0};
      const std::vector<Bytes> all = reader.bytes_of(is_wanted, nullptr);
      const Bytes part = reader.bytes(1, 100, 5000, nullptr);
      return has(all[0], memory.data(), half) && has(part, memory.data() + half + 100, 4900) &&
             (thread != 0 || reader.find_damage(nullptr).empty());
    });
  }
}

TEST(threads_open_and_close_a_file_each) {
  const Folder folder;
  const std::string path = folder.path("x");
  const std::vector<std::byte> memory = Random(72).bytes(100'000);
  write_file(path, *lay_out_fsd(make_tensors(memory)), {}, nullptr);
  const File file(path);
  check_in_threads([&](std::size_t) {
    std::vector<Bytes> all;
    {
      const Reader reader(path, Access::kMap);
      const Prefetch prefetch(reader, {true, true});
      all = reader.bytes_of({true, true}, nullptr);
    }
    return !find_mappings(file.descriptor(), 0).empty() &&
           has(all[0], memory.data(), memory.size() / 2);
  });
  CHECK(find_mappings(file.descriptor(), 0).empty());
}

TEST(threads_save_to_one_path) {
  const Folder folder;
  const std::string path = folder.path("x");
  const std::vector<std::byte> memory = Random(73).bytes(100'000);
  std::vector<std::string> contents;
  for (const LayOut lay_out_tensors : kLayOuts) {
    const std::unique_ptr<Layout> layout = lay_out_tensors(make_tensors(memory));
    checksum_storages(*layout, {}, nullptr);
    contents.push_back(whole_file(*layout));
  }
  check_in_threads([&](std::size_t thread) {
    const LayOut lay_out_tensors = kLayOuts[thread % std::size(kLayOuts)];
    write_file(path, *lay_out_tensors(make_tensors(memory)), {}, nullptr);
    const std::string found = read_whole(path);
    return std::find(contents.begin(), contents.end(), found) != contents.end();
  });
  CHECK(folder.file_count() == 1);
}

// Of several windows: two threads write and checksum them, or four that bypass the cache.
TEST(threads_write_a_large_file) {
  const Folder folder;
  const std::vector<std::byte> memory = Random(74).bytes(66U << 20U);
  for (const LayOut lay_out_tensors : kLayOuts) {
    for (const bool durable : {false, true}) {
      WriteOptions options;
      options.durable = durable;
      const std::unique_ptr<Layout> layout = lay_out_tensors(make_tensors(memory));
      write_file(folder.path("x"), *layout, options, nullptr);
      CHECK(Reader(folder.path("x"), Access::kMap).find_damage(nullptr).empty());
    }
  }
}

// Where bytes of the file are in memory, from an offset on.
TEST(mappings_are_known_while_they_are_there) {
  const Folder folder;
  write_whole(folder.path("f"), std::string(20'000, 'x'));
  const File whole(folder.path("f"));
  const File late(whole.descriptor(), "late", 5000);
  CHECK(find_mappings(whole.descriptor(), 0).empty());
  std::shared_ptr<Memory> memory = Memory::map(late, 10'000);
  const auto starts_at = [&](std::uint64_t offset, std::ptrdiff_t skipped) {
    const std::vector<Mapped> found = find_mappings(whole.descriptor(), offset);
    return found.size() == 1 && found[0].begin == memory->data() + skipped &&
           found[0].end == memory->data() + 10'000;
  };
  CHECK(starts_at(0, 0) && starts_at(5000, 0) && starts_at(14'999, 9999));
  CHECK(find_mappings(whole.descriptor(), 15'000).empty());
  write_whole(folder.path("g"), "another");
  CHECK(find_mappings(File(folder.path("g")).descriptor(), 0).empty());
  memory.reset();
  CHECK(find_mappings(whole.descriptor(), 0).empty());
}

}  // namespace
}  // namespace fastsd::test
