// From views of memory to storages: which bytes are stored. Where they go is a layout's affair.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "dtype.h"
#include "format.h"

namespace fastsd {

constexpr int kHost = -1;

// One tensor to be saved. Its memory must stay alive and unchanged until it has been written. What
// lies on GPUs is planned as the rest is: addresses are those of one space.
struct View {
  std::string_view name;  // UTF-8; need only live until add() returns
  const std::byte* data;  // the first element; nullptr for a meta tensor
  DType dtype;
  std::uint16_t flags;   // kTensor...
  std::uint16_t device;  // index into the plan's devices
  bool has_no_data;      // a meta tensor
  const void* identity;  // views with the same identity are the same object
  std::uint32_t rank;
  int gpu = kHost;  // the ordinal of that in whose memory it lies
};

// Tensors about to be written, and the storages that hold their bytes. One of the three finish...()
// is called once, after the last add().
class Plan {
 public:
  void reserve(std::size_t tensors);

  // `dims`: the view's sizes, then its strides. Throws kUnsupported, naming the tensor.
  void add(const View& view, const std::int64_t* dims);

  // Storages are the unions of views that overlap in memory, in the order of their first views;
  // each has the bytes from the first reachable one to the last. A storage of views that leave gaps
  // is written with zeros there, so that bytes which no tensor can reach stay private.
  void finish();

  // Each tensor has a storage of its own, of its elements in row-major order.
  void finish_apart();

  // The same, but tensors whose views are equal share the storage of the first, and storages of
  // wide items come before those of narrow ones. overlaps() then tells what was taken apart.
  void finish_apart_by_width();

  // Groups of tensors, by number, that overlap in memory and whose views are not equal.
  const std::vector<std::vector<std::uint32_t>>& overlaps() const { return overlaps_; }

  // Storages have places and checksums once a layout and the writer have given them those.
  std::vector<StorageRecord>& storages() { return storages_; }
  const std::vector<StorageRecord>& storages() const { return storages_; }
  Index index() const;

  // The GPU that a storage with bytes lies on, or kHost.
  int gpu(std::size_t storage) const { return views_[sources_[storage].tensor].gpu; }

  // The bytes [begin, end) of a storage, if they can be taken from memory as they are; otherwise
  // nullptr, and fill() makes them.
  const std::byte* bytes_in_place(std::size_t storage, std::uint64_t begin) const;

  // `copy`: of source(storage, begin, end), to be read in its place; nullptr: that is read itself.
  void fill(std::size_t storage, std::uint64_t begin, std::uint64_t end, std::byte* target,
            const std::byte* copy = nullptr) const;

  // The memory that fill() reads for the bytes [begin, end) of a storage, or more. All of it lies
  // between the first and the last byte that views reach.
  Span<std::byte> source(std::size_t storage, std::uint64_t begin, std::uint64_t end) const;

 private:
  struct Source {
    const std::byte* data = nullptr;  // byte 0 of the storage
    bool is_gapless = true;           // else the members say which bytes to take, or...
    std::uint32_t first_member = 0;
    std::uint32_t member_count = 0;  // ...where there are none, these are the elements of...
    std::uint32_t tensor = 0;        // ...this tensor in row-major order
  };
  struct Member {
    const std::byte* begin;
    const std::byte* end;
    std::uint32_t tensor;
  };

  Strided strided(std::uint32_t tensor) const { return index().view(tensors_[tensor]); }
  std::vector<Member> list_members();
  template <class Visit>
  void for_each_overlap(Visit visit);
  std::vector<std::uint32_t> find_equal_views();
  void add_apart(const std::vector<std::uint32_t>& tensors);
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
  std::vector<std::vector<std::uint32_t>> overlaps_;
};

}  // namespace fastsd
