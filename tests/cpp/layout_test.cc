// Layouts of any plan: the file, buffered or not, is what a stream gets. Their contents are held
// against zipfile, torch and safetensors in Python.
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "file.h"
#include "layouts.h"
#include "support.h"
#include "writer.h"

namespace fastsd::test {
namespace {

// Storages that are empty, small, and of several windows, in any order.
std::vector<Tensor> make_tensors(Random& random, const std::vector<std::byte>& memory) {
  std::vector<Tensor> tensors;
  std::uint64_t at = 0;
  for (int i = 0; at < memory.size(); ++i) {
    const std::uint64_t sizes[] = {0, random.below(100), random.below(70000),
                                   random.below(5 << 20U)};
    const std::uint64_t bytes = std::min(sizes[random.below(4)], memory.size() - at);
    const auto columns = std::int64_t(bytes / 8 / 5);
    const bool is_transposed = random.below(5) == 0 && columns > 0;
    const std::string name = "data/" + std::to_string(i);
    const std::byte* data = memory.data() + at;
    if (is_transposed) {
      tensors.emplace_back(name, DType::kFloat64, data, Dims{5, columns}, Dims{1, 5});
    } else {
      tensors.emplace_back(name, DType::kUInt8, data, Dims{std::int64_t(bytes)});
    }
    at += bytes;
  }
  return tensors;
}

TEST(layouts_are_the_same_in_files_and_streams) {
  Random random(51);
  const Folder folder;
  const std::vector<std::byte> memory = random.bytes((35 << 20U) + 777);
  for (const LayOut lay_out_tensors : kLayOuts) {
    const std::vector<Tensor> tensors = make_tensors(random, memory);
    const auto write = [&](bool durable) {
      WriteOptions options;
      options.durable = durable;
      write_file(folder.path("x"), *lay_out_tensors(tensors), options, nullptr);
      return read_whole(folder.path("x"));
    };
    const std::unique_ptr<Layout> layout = lay_out_tensors(tensors);
    checksum_storages(*layout, {}, nullptr);
    const std::string stream = whole_file(*layout);
    CHECK(stream == write(false));
    CHECK(stream == write(true));
    Content content(*layout);
    for (int i = 0; i < 50; ++i) {
      const std::uint64_t begin = random.below(stream.size() + 1);
      const std::uint64_t end =
          begin + random.below(std::min(stream.size() - begin, 1UL << 20U) + 1);
      std::string part(end - begin, '\xEE');
      content.gather(begin, end, reinterpret_cast<std::byte*>(part.data()));
      CHECK(stream.compare(begin, end - begin, part) == 0);
    }
  }
}

// What is mapped is read from the file, and what is strided from pages that are given back.
TEST(layouts_of_a_mapped_file_are_the_same) {
  Random random(52);
  const Folder folder;
  const std::vector<std::byte> bytes = random.bytes((9 << 20U) + 77);
  write_whole(folder.path("source"),
              std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
  const File file(folder.path("source"));
  const std::shared_ptr<Memory> memory = Memory::map(file, bytes.size());
  const std::vector<Tensor> tensors = make_tensors(random, bytes);
  for (const LayOut lay_out_tensors : kLayOuts) {
    const std::string wanted = [&] {
      const std::unique_ptr<Layout> layout = lay_out_tensors(tensors);
      checksum_storages(*layout, {}, nullptr);
      return whole_file(*layout);
    }();
    std::vector<Tensor> mapped = tensors;
    for (Tensor& tensor : mapped) tensor.data = memory->data() + (tensor.data - bytes.data());
    WriteOptions options;
    options.sources.mappings = {{{memory->data(), bytes.size()}, &file}};
    std::atomic<std::uint64_t> written{0};
    options.written = &written;
    const std::unique_ptr<Layout> layout = lay_out_tensors(mapped);
    write_file(folder.path("x"), *layout, options, nullptr);
    CHECK(read_whole(folder.path("x")) == wanted);
    CHECK(written == layout->data_end() - layout->data_begin());
    checksum_storages(*layout, options, nullptr);
    std::string streamed(layout->file_bytes(), '\xEE');
    Content(*layout, options.sources)
        .gather(0, streamed.size(), reinterpret_cast<std::byte*>(streamed.data()));
    CHECK(streamed == wanted);
  }
}

TEST(layout_of_safetensors_refuses_what_it_cannot_name) {
  const std::vector<std::byte> memory(64);
  const auto with = [&](const Tensor& tensor) {
    return failure_of([&] { return lay_out_safetensors({tensor})->file_bytes(); });
  };
  CHECK(with({"x", DType::kFloat32, memory.data(), {3}}) == std::nullopt);
  CHECK(with({"x", DType::kComplex128, memory.data(), {3}}) == Failure::kUnsupported);
  CHECK(with({"x", DType::kFloat32, nullptr, {3}}) == Failure::kUnsupported);
  CHECK(with({"x", DType::kFloat4E2m1fnX2, memory.data(), {}}) == Failure::kUnsupported);
}

}  // namespace
}  // namespace fastsd::test
