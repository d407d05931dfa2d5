// GPUDirect Storage: devices that write straight into the memory of GPUs, through NVIDIA's
// libcufile, which is found at run time. Used only where that is real: where the nvidia-fs module
// is loaded. Without it the library would read into host memory, as fastsd does, and more slowly.
// Functions and their meanings: "cuFile API Reference Guide", docs.nvidia.com/gpudirect-storage.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "cuda/driver.h"
#include "file.h"

namespace fastsd::cuda {

class DirectStorage {
 public:
  // `module_path`: a file that is there when the module is. Throws kUnsupported: why it is off.
  DirectStorage(const std::string& library, const std::string& module_path);
  DirectStorage(const DirectStorage&) = delete;
  DirectStorage& operator=(const DirectStorage&) = delete;

  // The process's own, opened when it is first asked for, or that of set_library().
  static std::shared_ptr<const DirectStorage> open();

  // What open() opens from now on; empty: the system's. For tests.
  static void set_library(const std::string& library, const std::string& module_path);

 private:
  friend class DirectStorageFile;
  struct Functions;
  std::shared_ptr<const Functions> functions_;
};

// A file that is read in this way. Thread-safe.
class DirectStorageFile {
 public:
  // Throws kUnsupported if the file system, or the device, cannot. REQUIRES: `file` is open, and
  // outlives this.
  DirectStorageFile(std::shared_ptr<const DirectStorage> storage, const DirectFile& file);
  DirectStorageFile(const DirectStorageFile&) = delete;
  DirectStorageFile& operator=(const DirectStorageFile&) = delete;
  ~DirectStorageFile();

  // Fills memory of a GPU, and returns when it is filled. Throws kTruncated if the file ends first,
  // and kDevice.
  void read_at(const Gpu& gpu, Address target, std::uint64_t bytes, std::uint64_t offset) const;

 private:
  std::shared_ptr<const DirectStorage> storage_;
  const DirectFile& file_;
  void* handle_ = nullptr;
};

}  // namespace fastsd::cuda
