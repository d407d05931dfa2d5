// From a layout to bytes: in a file that appears all at once, or piece by piece for a stream.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cuda/download.h"
#include "file.h"
#include "layout.h"
#include "workers.h"

namespace fastsd {

// Memory that a file is mapped to, from its byte 0 on. What is to be written from there is read
// from the file: that takes up no memory, and a file that has become shorter meanwhile is an error,
// not a signal. Only what is strided is still taken from the memory, whose pages are given back.
// REQUIRES: nobody has changed the memory; the file outlives this.
struct Mapping {
  Span<std::byte> memory;
  const File* file;
};
using Mappings = std::vector<Mapping>;  // by address

// How to get at bytes that are not in memory, or are not to be taken from there.
struct Sources {
  Mappings mappings = {};
  cuda::Streams streams = {};  // of each GPU that the plan has bytes on
};

struct WriteOptions {
  bool durable = false;  // on the device, under its name, before returning
  bool checksum = true;  // record a checksum for each storage, where the layout leaves a choice
  Sources sources = {};
  std::atomic<std::uint64_t>* written = nullptr;  // counts the bytes of storages as they are done
};

// Writes a file that is complete and has yet to be committed to `path` (see AtomicFile for what
// happens to one that is there). Needs at most kWriteMemoryBytes of memory beyond the layout; from
// GPUs slabs of the ring and, where a tensor is not row-major and is to be, a copy of its extent
// for each thread.
std::unique_ptr<AtomicFile> prepare_file(const std::string& path, Layout& layout,
                                         const WriteOptions& options, const Interrupt& interrupt);

// Commits it, too.
void write_file(const std::string& path, Layout& layout, const WriteOptions& options,
                const Interrupt& interrupt);
constexpr std::uint64_t kWriteMemoryBytes = std::uint64_t{40} << 20U;

// For streams, which want the file in order: fills in the checksums, reading all bytes once, if
// there are to be any...
void checksum_storages(Layout& layout, const WriteOptions& options, const Interrupt& interrupt);

// ...and then gives its bytes, any number of times.
class Content {
 public:
  // REQUIRES: the storages carry their checksums, if they are to have any. The layout outlives
  // this.
  explicit Content(const Layout& layout, Sources sources = {});
  Content(const Content&) = delete;
  Content& operator=(const Content&) = delete;
  ~Content();

  // The bytes [begin, end) of the file. REQUIRES: begin <= end <= layout.file_bytes().
  void gather(std::uint64_t begin, std::uint64_t end, std::byte* target);

 private:
  void gather_data(std::uint64_t begin, std::uint64_t end, std::byte* target);

  const Layout& layout_;
  Sources sources_;
  std::string head_;
  std::string tail_;
  std::unique_ptr<class GpuReader> gpus_;
};

}  // namespace fastsd
