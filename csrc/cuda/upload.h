// From a file to the memory of GPUs: threads read ahead into pinned slabs, from the page cache or
// past it, and streams copy out of these meanwhile. Never from a mapping of the file: its page
// faults would hold up the copies, and the file might be cut.
#pragma once

#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

#include "checksum.h"
#include "cuda/driver.h"
#include "file.h"
#include "workers.h"

namespace fastsd::cuda {

// Bytes of a file, and where in a GPU's memory they go.
struct Transfer {
  std::uint64_t offset;
  std::uint64_t bytes;
  int gpu;  // its ordinal
  Address target;
};

struct UploadOptions {
  // Of each GPU the stream that the targets' memory belongs to: what has been put into it before is
  // done before anything is copied.
  std::vector<std::pair<int, StreamHandle>> streams;
  const Checksum* checksum = nullptr;          // of each transfer's bytes, as they pass
  std::atomic<std::uint64_t>* done = nullptr;  // counts bytes
  bool direct_storage = false;  // for what is not in the page cache, where it is real
};

// Fills all targets, and returns when all are filled: the bytes' checksums, if that is asked for.
// Throws kDevice, kTruncated, kSystem and kInterrupted; nothing is being copied any more then.
// REQUIRES: transfers ascend in the file; targets do not overlap.
std::vector<std::uint32_t> upload(const File& file, const std::vector<Transfer>& transfers,
                                  const UploadOptions& options, const Interrupt& interrupt);

}  // namespace fastsd::cuda
