// From an opened container to memory: mapped, or read in parallel.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "file.h"
#include "format.h"
#include "workers.h"

namespace fastsd {

enum class Access {
  kAuto,  // map where that is quick and safe (FileSystem::maps_well), read elsewhere
  kMap,
  kRead,
};

// An .fsd file whose header has been read and validated. Thread-safe.
class Reader {
 public:
  // Reads the header, and maps the data unless it is to be read. Throws Error with the file's name,
  // which is what messages call it.
  Reader(const std::string& path, const std::string& name, Access access);
  Reader(const std::string& path, Access access) : Reader(path, path, access) {}

  const File& file() const { return file_; }
  const Header& header() const { return header_; }
  const Index& index() const { return header_.index(); }
  const std::shared_ptr<Memory>& mapping() const { return mapping_; }  // nullptr: to be read

  // The bytes [begin, end) of a storage: of the mapping, or freshly read.
  Bytes bytes(std::size_t storage, std::uint64_t begin, std::uint64_t end,
              const Interrupt& interrupt) const;

  // The bytes of the storages that `is_wanted` marks, by number, in parallel; none of the others.
  // REQUIRES: a mark for each storage.
  std::vector<Bytes> bytes_of(const std::vector<bool>& is_wanted, const Interrupt& interrupt) const;

  // Reads every stored byte, in parallel; returns the storages whose bytes do not have the checksum
  // recorded for them. Storages without one are not read. Throws kFormat if padding is not zero.
  std::vector<std::size_t> find_damage(const Interrupt& interrupt) const;

 private:
  void read_header(Access access);
  void read(const std::vector<File::Piece>& extents, const Interrupt& interrupt) const;
  void check_padding() const;

  File file_;
  Header header_;
  std::shared_ptr<Memory> mapping_;
};

// A thread that brings storages of a mapped file from the device into the page cache, in the order
// of the file and ahead of another thread that uses them. If all of the file is there already there
// is nothing to do: a second thread in the page tables would only be in the way. Stops when told
// to, or destroyed. REQUIRES: a mark for each storage; the reader outlives it.
class Prefetch {
 public:
  Prefetch(const Reader& reader, const std::vector<bool>& is_wanted);
  Prefetch(const Prefetch&) = delete;
  Prefetch& operator=(const Prefetch&) = delete;
  ~Prefetch();

  void stop();

 private:
  std::atomic<bool> is_stopped_{false};
  std::thread thread_;
};

}  // namespace fastsd
