// From a file to memory: mapped, read in parallel, or as a stream gives it. What kind of file it is
// its first bytes say, and nothing behind this knows.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "checksum.h"
#include "file.h"
#include "format.h"
#include "torch_pickle.h"
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

enum class Container {
  kFsd,
  kSafetensors,
  kTorch,  // the zip files of torch.save
};

// By the first `count` bytes of a file. What is nothing that is known counts as kFsd, whose reader
// says what is wrong with it.
Container find_container(const void* bytes, std::size_t count);

// Fills the front of `target`, which has room for `room` > 0 bytes; returns how much that is, and 0
// at the end. Whoever keeps the address keeps the owner.
using ReadSome = std::function<std::size_t(const Bytes& target, std::size_t room)>;

// An archive whose header, or what stands for one in its container, has been read and validated.
// Thread-safe.
//
// It has two indexes over the same storages: that of the container, and that of the object in it.
// They are one unless there is a pickle. Then the container knows storages by torch's keys, and the
// object's tensors are those that the stream, which is not unpickled for that, has names for.
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
  // an .fsd archive is asked for, while others reach to the end of the stream. `bytes`: what is
  // left of that, if it is known, or UINT64_MAX.
  Reader(const ReadSome& read_some, const std::string& name, std::uint64_t begin,
         std::uint64_t bytes);

  const File& file() const { return file_; }
  Container container() const { return container_; }
  const Header& header() const { return header_; }
  const Header& object() const { return object_ ? *object_ : header_; }
  const Index& index() const { return object().index(); }

  // Whether object() is all there is to load; otherwise torch has to unpickle the stream.
  bool is_plain() const { return is_plain_; }
  const std::vector<std::string>& globals() const { return globals_; }  // that the stream names

  const std::shared_ptr<Memory>& mapping() const { return mapping_; }  // nullptr: to be read

  // The bytes [begin, end) of a storage: of the mapping, or freshly read.
  Bytes bytes(std::size_t storage, std::uint64_t begin, std::uint64_t end,
              const Interrupt& interrupt) const;

  // The bytes of the storages that `is_wanted` marks, by number, in parallel; none of the others.
  // Those of a stream are handed out as they are, and the others given back, so that this can be
  // called once, and is to be called last. `done`, if any, counts what has been read. REQUIRES: a
  // mark for each storage.
  std::vector<Bytes> bytes_of(const std::vector<bool>& is_wanted, const Interrupt& interrupt,
                              std::atomic<std::uint64_t>* done = nullptr) const;

  // Fills pieces, which ascend in the file, in parallel.
  void read(const std::vector<File::Piece>& extents, const Interrupt& interrupt,
            std::atomic<std::uint64_t>* done = nullptr) const;

  // What the storages' checksums are made with.
  const Checksum& checksum() const { return container_ == Container::kTorch ? kCrc32 : kCrc32c; }

  // Reads every stored byte, in parallel; returns the storages whose bytes do not have the checksum
  // recorded for them. Storages without one are not read, nor are those that are known to be right
  // and marked so. Throws kFormat if there is no damage and an .fsd archive has padding that is not
  // zero. REQUIRES: a mark for each storage, or none at all.
  std::vector<std::size_t> find_damage(const std::vector<bool>& is_checked,
                                       const Interrupt& interrupt) const;
  std::vector<std::size_t> find_damage(const Interrupt& interrupt) const {
    return find_damage({}, interrupt);
  }

 private:
  void read_header(bool is_whole_file);
  void read_fsd(const unsigned char* first, std::size_t first_bytes, bool is_whole_file);
  void find_object();
  void read_stream(const ReadSome& read_some, std::uint64_t begin, std::uint64_t bytes);
  void map(Access access);
  void check_padding() const;

  File file_;
  Container container_ = Container::kFsd;
  Header header_;
  std::optional<Header> object_;  // nothing: header_ has it
  bool is_plain_ = true;
  std::vector<std::string> globals_;
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
