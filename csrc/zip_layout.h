// The layout of what torch.save writes: a zip file (PKWARE's APPNOTE 6.3) of uncompressed records
// whose bytes are aligned. Except for the serialization id it is byte for byte the same.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "layout.h"

namespace fastsd {

class ZipLayout final : public Layout {
 public:
  using Records = std::vector<std::pair<std::string, std::string>>;  // names and bytes

  // The records come before the storages, whose own are called as the tensors are; all are in the
  // folder `archive`. REQUIRES: plan.finish_apart() has been called, names and records have fewer
  // than 65,000 bytes and 4 GiB, and `align_bytes` is below 32768. Throws kLimit.
  ZipLayout(Plan&& plan, std::string archive, const Records& records, std::uint64_t align_bytes);

  const Checksum* checksum(bool /*is_wanted*/) const override { return &kCrc32; }
  std::string encode_head() const override;
  std::string encode_tail() const override;
  bool has_gaps() const override { return true; }
  void encode_gap(std::size_t storage, std::uint32_t checksum, std::string* bytes) const override;

 private:
  // What local header, descriptor and directory say of a record.
  struct Entry {
    std::string name;
    std::uint64_t header_offset;
    std::uint64_t bytes;
    std::uint32_t crc32;
  };

  Entry entry(std::size_t storage) const;
  std::uint64_t data_offset(const Entry& entry) const;
  void append_header(const Entry& entry, std::string* out) const;
  void append_record(const std::string& name, const std::string& bytes, std::string* out,
                     std::vector<Entry>* entries, std::uint64_t begin) const;
  void append_headers_from(std::size_t storage, std::string* out) const;
  void append_directory(const std::vector<Entry>& last, std::string* out, std::uint64_t at) const;
  std::string serialization_id() const;

  std::string archive_;
  std::uint64_t align_bytes_;
  std::string head_;                           // the records before the storages
  std::vector<Entry> entries_;                 // of these records
  std::vector<std::uint64_t> header_offsets_;  // of the storages
};

}  // namespace fastsd
