// From a container to memory: mapped, read in parallel, or as a stream gives it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
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

// Only archives that start at a multiple of this in their file are mapped: what is mapped is
// aligned as it is in the file, and torch's own allocator aligns to this.
constexpr std::uint64_t kMapAlignBytes = 64;

// Fills the front of `target`, which has room for `room` > 0 bytes; returns how much that is, and 0
// at the end. Whoever keeps the address keeps the owner.
using ReadSome = std::function<std::size_t(const Bytes& target, std::size_t room)>;

// An .fsd archive whose header has been read and validated. Thread-safe.
class Reader {
 public:
  // Each throws Error with the name, which is what messages call the file. Places that they name
  // are counted from the start of the archive, unless they say otherwise.

  // A file that is one archive, without anything behind it. Reads the header, and maps the data
  // unless it is to be read.
  Reader(const std::string& path, const std::string& name, Access access);
  Reader(const std::string& path, Access access) : Reader(path, path, access) {}

  // The archive at `begin` of the file of a descriptor, whatever is around it.
  Reader(int descriptor, const std::string& name, std::uint64_t begin, Access access);

  // The archive that comes next in a stream, in which it starts at `begin`, as far as that is
  // known. Its data are read, too, into memory that becomes that of the tensors; not a byte behind
  // the archive is asked for. `bytes`: what is left of the stream, if that is known, or UINT64_MAX.
  Reader(const ReadSome& read_some, const std::string& name, std::uint64_t begin,
         std::uint64_t bytes);

  const File& file() const { return file_; }
  const Header& header() const { return header_; }
  const Index& index() const { return header_.index(); }
  const std::shared_ptr<Memory>& mapping() const { return mapping_; }  // nullptr: to be read

  // The bytes [begin, end) of a storage: of the mapping, or freshly read.
  Bytes bytes(std::size_t storage, std::uint64_t begin, std::uint64_t end,
              const Interrupt& interrupt) const;

  // The bytes of the storages that `is_wanted` marks, by number, in parallel; none of the others.
  // Those of a stream are handed out as they are, and the others given back, so that this can be
  // called once, and is to be called last. REQUIRES: a mark for each storage.
  std::vector<Bytes> bytes_of(const std::vector<bool>& is_wanted, const Interrupt& interrupt) const;

  // Reads every stored byte, in parallel; returns the storages whose bytes do not have the checksum
  // recorded for them. Storages without one are not read. Throws kFormat if padding is not zero.
  std::vector<std::size_t> find_damage(const Interrupt& interrupt) const;

 private:
  void read_header(bool is_whole_file);
  void read_stream(const ReadSome& read_some, std::uint64_t begin, std::uint64_t bytes);
  void map(Access access);
  void read(const std::vector<File::Piece>& extents, const Interrupt& interrupt) const;
  void check_padding() const;

  File file_;
  Header header_;
  std::shared_ptr<Memory> mapping_;
  mutable std::atomic<bool> is_handed_out_{false};  // the memory of a stream
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
