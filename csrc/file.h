// Files, mappings and memory: the only code that calls the operating system.
// Every function throws Error(kSystem) with the path and errno where the system refuses.
#pragma once

#include <sys/stat.h>
#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace fastsd {

// What fastsd needs to know of a file system. Types that are not in the table (file.cc) count as
// local.
struct FileSystem {
  const char* name;
  bool maps_well;          // mapping is quick, and safe while others change the file
  bool preallocates;       // fallocate() makes buffered writes faster, and O_DIRECT is worth it
  bool is_memory = false;  // there is no device behind the page cache
};

// By the f_type of statfs(2).
FileSystem find_file_system(std::uint64_t type);

class Descriptor {
 public:
  Descriptor() = default;
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept : fd_(other.release()) {}
  Descriptor& operator=(Descriptor&& other) noexcept;
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor();

  int get() const { return fd_; }
  int release();

 private:
  int fd_ = -1;
};

class Memory;

// What offsets, lengths and addresses must be multiples of to bypass the page cache.
constexpr std::size_t kDirectAlignBytes = 4096;

// Bytes to be read at offsets, which count from `begin` in a regular file or, where that is none,
// in memory that holds what was read of it. Thread-safe.
class File {
 public:
  // `name`: what messages call it.
  File(const std::string& path, const std::string& name);
  explicit File(const std::string& path) : File(path, path) {}

  // The file of a descriptor, from `begin` on. Has a descriptor of its own.
  File(int descriptor, const std::string& name, std::uint64_t begin);

  // The first `bytes` bytes of memory, which stand for those from `begin` on.
  File(std::shared_ptr<Memory> memory, std::uint64_t bytes, const std::string& name,
       std::uint64_t begin);

  const std::string& name() const { return name_; }
  std::uint64_t begin() const { return begin_; }
  std::uint64_t bytes() const { return bytes_; }  // from `begin` on, when it was opened
  const std::shared_ptr<Memory>& memory() const { return memory_; }  // nullptr: a regular file
  FileSystem file_system() const;                                    // of a regular file

  // Fills `target`; throws kTruncated if the file ends first.
  void read_at(void* target, std::size_t bytes, std::uint64_t offset) const;

  // Fills each of `count` > 0 pieces, which ascend in the file, with few calls: what lies between
  // them is read too, and thrown away, where that is at most kGapBytesMax.
  struct Piece {
    std::byte* target;
    std::uint64_t bytes;
    std::uint64_t offset;
  };
  void read_run(const Piece* pieces, std::size_t count) const;
  static constexpr std::size_t kGapBytesMax = 4096;

  // Whether all of [begin, begin + bytes) is known to be in the page cache, or in memory anyway.
  // REQUIRES: bytes > 0.
  bool is_cached(std::uint64_t begin, std::uint64_t bytes) const;

  // Starts to bring [begin, begin + bytes) into the page cache. A hint.
  void read_ahead(std::uint64_t begin, std::uint64_t bytes) const;

  int descriptor() const { return descriptor_.get(); }

 private:
  void measure();
  void read_pieces(struct iovec* pieces, std::size_t count, std::uint64_t offset) const;

  std::string name_;
  Descriptor descriptor_;
  std::shared_ptr<Memory> memory_;
  std::uint64_t begin_ = 0;
  std::uint64_t bytes_ = 0;
};

// A regular file, read past the page cache: for what is not in it. Thread-safe.
class DirectFile {
 public:
  // Empty where that cannot be done, or is not worth it: over networks, and in memory.
  explicit DirectFile(const File& file);
  explicit operator bool() const { return descriptor_.get() >= 0; }

  // Fills `target` with the blocks of kDirectAlignBytes that [offset, offset + bytes) of the file
  // lies in, and returns where in `target` `offset` is then; throws kTruncated if the file ends
  // first, and kSystem with EINVAL where the device does not read in such blocks. REQUIRES:
  // `target` is aligned to that and has room for the blocks.
  std::size_t read_at(std::byte* target, std::uint64_t bytes, std::uint64_t offset) const;

  const std::string& name() const { return name_; }
  std::uint64_t begin() const { return begin_; }
  int descriptor() const { return descriptor_.get(); }

 private:
  std::string name_;
  std::uint64_t begin_;
  Descriptor descriptor_;
};

// A run of memory that is given back when the last owner drops it. Pages of a mapped file are
// private: writing to them changes neither the file nor other mappings.
class Memory {
 public:
  // Maps the first `bytes` bytes of a regular file. The memory is aligned as the place in the file
  // is, up to the size of a page.
  static std::shared_ptr<Memory> map(const File& file, std::uint64_t bytes);

  // Fresh memory, aligned to 64 bytes; large runs ask for huge pages. Contents are undefined.
  // Throws std::bad_alloc, which Python knows as MemoryError.
  static std::shared_ptr<Memory> allocate(std::uint64_t bytes);

  // Fresh memory in whole pages, huge ones where the system has them. Processes that are forked do
  // not get it: a device may be using it.
  static std::shared_ptr<Memory> allocate_pages(std::uint64_t bytes);

  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory();

  std::byte* data() const { return data_; }

  // An owner of all of `memory` that gives [begin, begin + bytes) back, as far as it is whole
  // pages, when it is dropped, while others keep the rest. For memory from allocate().
  static std::shared_ptr<const void> own_part(const std::shared_ptr<Memory>& memory,
                                              std::uint64_t begin, std::uint64_t bytes);

 private:
  Memory(std::byte* data, std::uint64_t bytes, bool is_mapped)
      : data_(data), bytes_(bytes), is_mapped_(is_mapped) {}

  void discard(std::uint64_t begin, std::uint64_t bytes);

  std::byte* data_;
  std::uint64_t bytes_;
  bool is_mapped_;
};

// Where Memory::map has the bytes of a descriptor's file, from `offset` on, in memory now.
// Thread-safe.
struct Mapped {
  const std::byte* begin;
  const std::byte* end;
};
std::vector<Mapped> find_mappings(int descriptor, std::uint64_t offset);

// Gives the pages of mapped memory that hold [begin, begin + bytes) back to the system; what is
// there is read from the file when it is needed again. REQUIRES: nobody has written to them.
void drop_pages(const std::byte* begin, std::uint64_t bytes);

// Bytes in memory, kept there by their owner.
struct Bytes {
  std::byte* data = nullptr;
  std::shared_ptr<const void> owner;
};

// A file that appears under its name all at once, or not at all. Until commit() its bytes are in a
// file without a name where the system has those, so that even a killed process leaves nothing
// behind, and in a hidden one beside the target elsewhere. What a killed process left goes with the
// next AtomicFile on the same host: a hidden file with any in its directory, and one that was about
// to be renamed with the next for its target.
//
// An existing target keeps its mode and, where permitted, its owner; if it is a symbolic link, what
// the link points to is replaced.
class AtomicFile {
 public:
  // Throws if the target exists and is not a regular file or not writable.
  explicit AtomicFile(const std::string& path);
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  ~AtomicFile();

  bool is_in_memory() const { return file_system_.is_memory; }

  // Allocates the file's blocks where that helps; throws early if there are too few.
  void reserve(std::uint64_t bytes);

  // Tries to bypass the page cache. From then on offsets, lengths and addresses given to write_at()
  // are multiples of kDirectAlignBytes. Returns whether the file system can.
  bool bypass_cache();

  // Thread-safe. `pieces` is used up in the process.
  void write_at(struct iovec* pieces, std::size_t count, std::uint64_t offset);
  void write_at(const void* source, std::size_t bytes, std::uint64_t offset);
  void truncate(std::uint64_t bytes);

  // Called once everything has been written: throws what file systems tell only then. If `durable`,
  // the bytes are on the device when this returns.
  void complete(bool durable);

  // Gives the file its name, if `durable` on the device; if it throws then, the file may have its
  // name already. REQUIRES: complete() has been called.
  void commit(bool durable);

 private:
  AtomicFile() = default;
  bool open_unnamed();
  void open_hidden();
  void keep_owner_and_mode(const struct stat& old);
  Descriptor link_hidden();

  std::string path_;  // as given, for messages
  std::string name_;  // within the directory
  std::string hidden_name_;
  Descriptor directory_;
  Descriptor descriptor_;
  FileSystem file_system_{};
};

}  // namespace fastsd
