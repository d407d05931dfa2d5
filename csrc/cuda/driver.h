// GPUs through the CUDA driver, which is found at run time: building and importing need no CUDA.
// The only code that calls the driver. Functions throw Error(kDevice) with the driver's own name
// for what went wrong. Function names and meanings: "CUDA Driver API", docs.nvidia.com/cuda.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace fastsd::cuda {

using Address = std::uint64_t;  // CUdeviceptr: in the memory of a GPU

// What the driver gives to tell its objects apart.
using ContextHandle = struct ContextTag*;
using StreamHandle = struct StreamTag*;
using EventHandle = struct EventTag*;

// The driver's functions: those that CUDA 12 and 13 both have, under the names that their library
// exports.
struct DriverFunctions {
  int (*init)(unsigned flags);
  int (*get_version)(int* version);
  int (*get_error_name)(int error, const char** name);
  int (*get_device_count)(int* count);
  int (*get_device)(int* device, int ordinal);
  int (*retain_context)(ContextHandle* context, int device);
  int (*release_context)(int device);
  int (*push_context)(ContextHandle context);
  int (*pop_context)(ContextHandle* context);
  int (*create_stream)(StreamHandle* stream, unsigned flags);
  int (*destroy_stream)(StreamHandle stream);
  int (*synchronize_stream)(StreamHandle stream);
  int (*wait_event)(StreamHandle stream, EventHandle event, unsigned flags);
  int (*create_event)(EventHandle* event, unsigned flags);
  int (*destroy_event)(EventHandle event);
  int (*record_event)(EventHandle event, StreamHandle stream);
  int (*query_event)(EventHandle event);
  int (*synchronize_event)(EventHandle event);
  int (*register_host)(void* memory, std::size_t bytes, unsigned flags);
  int (*unregister_host)(void* memory);
  int (*copy_to_device)(Address target, const void* source, std::size_t bytes, StreamHandle stream);
  int (*copy_to_host)(void* target, Address source, std::size_t bytes, StreamHandle stream);
};

class Driver {
 public:
  // Opens the driver's library, which then stays in the process. Throws kUnsupported with the
  // reason where there is none, or no GPU.
  explicit Driver(const std::string& library);

  // The process's own, opened when it is first asked for, or that of set_library().
  static std::shared_ptr<const Driver> open();

  // What open() opens from now on; for tests, which bring a library of their own.
  static void set_library(const std::string& library);

  const DriverFunctions& functions() const { return functions_; }
  int version() const { return version_; }  // 13000: CUDA 13.0
  int device_count() const { return device_count_; }

  // Throws unless `result`, of the named function, is success.
  void check(int result, const char* function) const;

 private:
  DriverFunctions functions_{};
  int version_ = 0;
  int device_count_ = 0;
};

// A GPU by its ordinal, which is torch's index, in its primary context, which is the one that torch
// uses. Thread-safe.
class Gpu {
 public:
  Gpu(std::shared_ptr<const Driver> driver, int ordinal);
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;
  ~Gpu();

  const Driver& driver() const { return *driver_; }
  int ordinal() const { return ordinal_; }

  // Locks pages of memory, so that copies need not wait for the processor. Returns whether the
  // system allows that; without it copies are right, and slower.
  bool pin(void* memory, std::size_t bytes) const;
  void unpin(void* memory) const noexcept;  // does nothing once the driver, or the GPU, is gone

 private:
  friend class Current;
  const DriverFunctions& functions() const { return driver_->functions(); }

  std::shared_ptr<const Driver> driver_;
  int ordinal_;
  int device_ = 0;
  ContextHandle context_ = nullptr;
};

// Makes a GPU's context that of the calling thread, and then the one again that was there before.
class Current {
 public:
  explicit Current(const Gpu& gpu);
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
  ~Current();

 private:
  const DriverFunctions& functions_;
};

// A point in a stream's work. Movable; thread-safe as far as it is const.
class Event {
 public:
  Event(std::shared_ptr<const Gpu> gpu, StreamHandle stream);
  Event(Event&& other) noexcept;
  Event& operator=(Event&& other) noexcept;
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event();

  EventHandle handle() const { return handle_; }
  bool has_passed() const;
  void wait() const;  // in the calling thread

 private:
  std::shared_ptr<const Gpu> gpu_;
  EventHandle handle_ = nullptr;
};

// Work that a GPU does in its order, beside that of other streams. Thread-safe.
class Stream {
 public:
  explicit Stream(std::shared_ptr<const Gpu> gpu);
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream();  // waits for its work

  const Gpu& gpu() const { return *gpu_; }

  // Does nothing before what has been put into another stream until now is done.
  void follow(StreamHandle other);

  // Copies, later on. Memory that is not pinned has been read when this returns; what is pinned
  // must stay as it is until the copy is done.
  void copy_to_device(Address target, const void* source, std::size_t bytes);

  // Copies, later on if the memory is pinned.
  void copy_to_host(void* target, Address source, std::size_t bytes);

  Event record();      // behind all that has been put in
  void synchronize();  // waits for that; throws what has failed in it

 private:
  std::shared_ptr<const Gpu> gpu_;
  StreamHandle handle_ = nullptr;
};

}  // namespace fastsd::cuda
