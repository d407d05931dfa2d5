// From views of memory to an archive: which bytes are stored, once each, and where.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "dtype.h"
#include "format.h"

namespace fastsd {

// One tensor to be saved. Its memory must stay alive and unchanged until it has been written.
struct View {
  std::string_view name;  // UTF-8; need only live until add() returns
  const std::byte* data;  // the first element; nullptr for a meta tensor
  DType dtype;
  std::uint16_t flags;   // kTensor...
  std::uint16_t device;  // index into the plan's devices
  bool has_no_data;      // a meta tensor
  const void* identity;  // views with the same identity are the same object
  std::uint32_t rank;
};

// An archive about to be written. Storages are the unions of views that overlap in memory, in the
// order of their first views; each has the bytes from the first reachable one to the last. A
// storage of views that leave gaps is written with zeros there, so that bytes which no tensor can
// reach stay private.
class Plan {
 public:
  std::uint32_t file_flags = 0;
  std::vector<std::string> devices;
  std::vector<std::pair<Section, std::string>> sections;

  void reserve(std::size_t tensors);

  // `dims`: the view's sizes, then its strides. Throws kUnsupported, naming the tensor.
  void add(const View& view, const std::int64_t* dims);

  // Finds the storages and their places. Called once, after the last add() and with all members
  // set.
  void finish();

  std::uint64_t header_bytes() const { return header_bytes_; }
  std::uint64_t file_bytes() const { return file_bytes_; }
  std::vector<StorageRecord>& storages() { return storages_; }
  const std::vector<StorageRecord>& storages() const { return storages_; }

  // The bytes [begin, end) of a storage, if they can be taken from memory as they are; otherwise
  // nullptr, and fill() makes them.
  const std::byte* bytes_in_place(std::size_t storage, std::uint64_t begin) const;
  void fill(std::size_t storage, std::uint64_t begin, std::uint64_t end, std::byte* target) const;

  // REQUIRES: the storages carry their checksums, if they are to have any.
  std::string encode_header() const;

 private:
  struct Source {
    const std::byte* data = nullptr;  // byte 0 of the storage
    bool is_gapless = true;           // else the members say which bytes to take
    std::uint32_t first_member = 0;
    std::uint32_t member_count = 0;
  };
  struct Member {
    const std::byte* begin;
    const std::byte* end;
    std::uint32_t tensor;
  };

  Index index() const;
  HeaderContent content() const;
  std::vector<Member> list_members();
  void add_storage(const Member* first, std::size_t count);
  void find_same_objects(const Span<Member>& members);
  std::optional<std::uint64_t> leading_bytes(const Span<Member>& members) const;
  void add_empty_storages();
  void number_by_first_use();

  std::string names_;
  std::vector<std::int64_t> dims_;
  std::vector<View> views_;
  std::vector<std::uint64_t> extents_;  // of each view, in bytes
  std::vector<TensorRecord> tensors_;
  std::vector<StorageRecord> storages_;
  std::vector<Source> sources_;
  std::vector<Member> members_;
  std::uint64_t header_bytes_ = 0;
  std::uint64_t file_bytes_ = 0;
};

}  // namespace fastsd
