// What several tests share: pseudo-random numbers, a scratch folder, whole files, tensors for a
// plan.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "error.h"
#include "file.h"
#include "fsd_layout.h"
#include "plan.h"
#include "writer.h"

namespace fastsd::test {

// SplitMix64: the same numbers on every machine.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  std::uint64_t next() {
    state_ += 0x9E3779B97F4A7C15U;
    std::uint64_t z = state_;
    z = (z ^ (z >> 30U)) * 0xBF58476D1CE4E5B9U;
    z = (z ^ (z >> 27U)) * 0x94D049BB133111EBU;
    return z ^ (z >> 31U);
  }

  std::uint64_t below(std::uint64_t limit) { return next() % limit; }

  std::vector<std::byte> bytes(std::size_t count) {
    std::vector<std::byte> bytes(count);
    for (std::byte& byte : bytes) byte = static_cast<std::byte>(next() & 0xFFU);
    return bytes;
  }

 private:
  std::uint64_t state_;
};

// A new folder under TMPDIR, gone with all its files at the end of the scope.
class Folder {
 public:
  Folder() : Folder(default_parent()) {}
  explicit Folder(const std::string& parent) : path_(parent + "/fastsd-native-XXXXXX") {
    if (::mkdtemp(path_.data()) == nullptr) throw Error(Failure::kSystem, "mkdtemp", path_);
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  ~Folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }

  static std::string default_parent() {
    const char* parent = std::getenv("TMPDIR");
    return parent == nullptr ? "/tmp" : parent;
  }

  std::string path(const std::string& name) const { return path_ + "/" + name; }

  std::size_t file_count() const {
    const std::filesystem::directory_iterator files(path_);
    return static_cast<std::size_t>(std::distance(begin(files), end(files)));
  }

 private:
  std::string path_;
};

inline std::string read_whole(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

inline void write_whole(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary).write(bytes.data(), std::streamsize(bytes.size()));
}

// Changes one byte of a file, for good.
inline void flip_byte(const std::string& path, std::uint64_t offset) {
  std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
  file.seekg(std::streamoff(offset));
  const int byte = file.get();
  file.seekp(std::streamoff(offset));
  file.put(static_cast<char>(byte ^ 1));
}

// A file that is in memory.
inline File file_of(const std::string& bytes) {
  const std::shared_ptr<Memory> memory = Memory::allocate(bytes.size() + 1);
  std::memcpy(memory->data(), bytes.data(), bytes.size());
  return {memory, bytes.size(), "memory", 0};
}

// What an Error says; nothing was thrown: "".
template <class Call>
std::string message_of(Call call) {
  try {
    static_cast<void>(call());
  } catch (const Error& error) {
    return error.what();
  }
  return {};
}

// What Tables promise: storages ascend within the file, without overlaps, and every view lies
// within its storage.
inline bool is_sound(const Tables& tables) {
  std::uint64_t end = 0;
  for (const StorageRecord& storage : tables.storages) {
    if (storage.offset < end || storage.offset > tables.file_bytes) return false;
    if (storage.bytes > tables.file_bytes - storage.offset) return false;
    end = storage.offset + storage.bytes;
  }
  const Index index = tables.index();
  return std::all_of(index.tensors.begin(), index.tensors.end(), [&](const TensorRecord& tensor) {
    const auto extent = extent_bytes(index.view(tensor));
    return extent && tensor.storage < index.storages.size() &&
           *extent <= index.storages[tensor.storage].bytes;
  });
}

using Dims = std::vector<std::int64_t>;

inline Dims contiguous_strides(const Dims& shape) {
  Dims stride(shape.size(), 1);
  for (std::size_t d = shape.size(); d-- > 1;) stride[d - 1] = stride[d] * shape[d];
  return stride;
}

struct Tensor {
  Tensor(std::string tensor_name, DType tensor_dtype, const std::byte* first, Dims tensor_shape)
      : name(std::move(tensor_name)),
        dtype(tensor_dtype),
        data(first),
        shape(std::move(tensor_shape)),
        stride(contiguous_strides(shape)) {}
  Tensor(std::string tensor_name, DType tensor_dtype, const std::byte* first, Dims tensor_shape,
         Dims tensor_stride)
      : name(std::move(tensor_name)),
        dtype(tensor_dtype),
        data(first),
        shape(std::move(tensor_shape)),
        stride(std::move(tensor_stride)) {}

  std::uint64_t item_bytes() const { return find_dtype(std::uint16_t(dtype))->item_bytes; }
  Strided view() const {
    return {item_bytes(), std::uint32_t(shape.size()), shape.data(), stride.data()};
  }

  std::string name;
  DType dtype;
  const std::byte* data;  // nullptr: a meta tensor
  Dims shape;
  Dims stride;
  const void* identity = nullptr;  // nullptr: an object of its own
  std::uint16_t flags = 0;
  std::uint16_t device = 0;
  int gpu = kHost;
};

inline void add(Plan& plan, const Tensor& tensor) {
  thread_local std::deque<char> objects;  // as many threads may plan
  const void* identity = tensor.identity != nullptr ? tensor.identity : &objects.emplace_back();
  Dims dims = tensor.shape;
  dims.insert(dims.end(), tensor.stride.begin(), tensor.stride.end());
  const View view{tensor.name,   tensor.data,
                  tensor.dtype,  tensor.flags,
                  tensor.device, tensor.data == nullptr,
                  identity,      std::uint32_t(tensor.shape.size()),
                  tensor.gpu};
  plan.add(view, dims.data());
}

inline Plan make_plan(const std::vector<Tensor>& tensors) {
  Plan plan;
  for (const Tensor& tensor : tensors) add(plan, tensor);
  return plan;
}

// Ready to be written as .fsd.
inline FsdLayout lay_out(const std::vector<Tensor>& tensors) {
  Plan plan = make_plan(tensors);
  plan.finish();
  return FsdLayout(std::move(plan), 0, {"cpu", "cuda:0"}, {});
}

// The bytes [begin, end) of the file.
inline std::string gather(const Layout& layout, std::uint64_t begin, std::uint64_t end) {
  std::string bytes(end - begin, '\xEE');
  Content(layout).gather(begin, end, reinterpret_cast<std::byte*>(bytes.data()));
  return bytes;
}

inline std::string whole_file(const Layout& layout) {
  return gather(layout, 0, layout.file_bytes());
}

}  // namespace fastsd::test
