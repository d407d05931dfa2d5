// Where a plan's storages go in a file, and what is around them. A file is a head, the data, which
// are the storages in their order with gaps between them, and a tail.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "checksum.h"
#include "plan.h"

namespace fastsd {

class Layout {
 public:
  Layout(const Layout&) = delete;
  Layout& operator=(const Layout&) = delete;
  virtual ~Layout() = default;

  Plan& plan() { return plan_; }
  const Plan& plan() const { return plan_; }

  std::uint64_t data_begin() const { return data_begin_; }
  std::uint64_t data_end() const { return data_end_; }
  std::uint64_t file_bytes() const { return file_bytes_; }

  // What the storages are checksummed with, if the caller does or does not want it; nullptr: none.
  virtual const Checksum* checksum(bool is_wanted) const = 0;

  // The bytes before data_begin() and from data_end() on. Their number does not depend on
  // checksums. REQUIRES: the storages carry their checksums, if they are to have any.
  virtual std::string encode_head() const = 0;
  virtual std::string encode_tail() const { return {}; }

  // Whether gaps hold anything but zeros. Then encode_gap() adds the gap between a storage that has
  // bytes and the one before it that has, and that one's checksum, to `bytes`. Thread-safe.
  virtual bool has_gaps() const { return false; }
  virtual void encode_gap(std::size_t /*storage*/, std::uint32_t /*checksum*/,
                          std::string* /*bytes*/) const {}

 protected:
  explicit Layout(Plan&& plan) : plan_(std::move(plan)) {}

  // Called at the end of a constructor, with all storages placed.
  void set_places(std::uint64_t data_begin, std::uint64_t data_end, std::uint64_t file_bytes) {
    data_begin_ = data_begin;
    data_end_ = data_end;
    file_bytes_ = file_bytes;
  }

 private:
  Plan plan_;
  std::uint64_t data_begin_ = 0;
  std::uint64_t data_end_ = 0;
  std::uint64_t file_bytes_ = 0;
};

}  // namespace fastsd
