// A CUDA driver over host memory, as far as fastsd calls it: each stream is a thread that carries
// out copies, events and waits in their order and, as a GPU does, some time after they were asked
// for. Pinned memory is read only then, so that whoever writes to it too early is found out.
#include "stub_cuda.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace {

// cuda.h, CUresult.
enum Result {
  kSuccess = 0,
  kInvalidValue = 1,
  kNotInitialized = 3,
  kInvalidDevice = 101,
  kInvalidContext = 201,
  kInvalidHandle = 400,
  kNotReady = 600,
  kIllegalAddress = 700,
  kAlreadyRegistered = 712,
  kNotRegistered = 713,
};

struct Context {
  int device;
  long retained = 0;
};

struct Event {
  Context* context;
  bool is_pending = false;
};

struct Stream {
  Context* context;
  std::deque<std::function<void()>> work;
  bool is_busy = false;
  bool is_ended = false;
  std::thread thread;
};

// Everything is under one lock, but for the copies themselves.
struct Stub {
  std::mutex mutex;
  std::condition_variable changed;
  std::map<std::string, long> numbers;
  std::map<int, std::unique_ptr<Context>> contexts;
  std::set<Stream*> streams;
  std::map<Context*, Stream*> default_streams;
  std::set<std::shared_ptr<Event>> events;
  std::map<std::uintptr_t, std::size_t> pinned;
  int failure = kSuccess;  // sticky
  pid_t owner = 0;
};

Stub& stub() {
  static auto* one = new Stub;
  return *one;
}

thread_local std::vector<Context*> current_contexts;

using Lock = std::unique_lock<std::mutex>;

long& number(const char* name) { return stub().numbers[name]; }

int misuse(int result) {
  ++number("misuses");
  return result;
}

// What every call but cuInit() meets first.
int check_ready() {
  if (stub().owner != ::getpid()) return kNotInitialized;
  return stub().failure;
}

int check_current() {
  const int result = check_ready();
  if (result != kSuccess) return result;
  return current_contexts.empty() ? misuse(kInvalidContext) : kSuccess;
}

bool is_pinned(const void* memory, std::size_t bytes) {
  const auto address = reinterpret_cast<std::uintptr_t>(memory);
  auto range = stub().pinned.upper_bound(address);
  if (range == stub().pinned.begin()) return false;
  --range;
  return address + bytes <= range->first + range->second;
}

void work(Stream* stream) {
  Lock lock(stub().mutex);
  for (;;) {
    stub().changed.wait(lock, [&] { return !stream->work.empty() || stream->is_ended; });
    if (stream->work.empty()) return;
    const std::function<void()> task = std::move(stream->work.front());
    stream->work.pop_front();
    stream->is_busy = true;
    lock.unlock();
    task();
    lock.lock();
    stream->is_busy = false;
    stub().changed.notify_all();
  }
}

Stream* add_stream(Context* context) {
  auto* stream = new Stream{context, {}, false, false, {}};
  stream->thread = std::thread(work, stream);
  stub().streams.insert(stream);
  return stream;
}

// The stream of a handle, of which null is the context's own; nullptr: there is no such stream.
Stream* find_stream(void* handle) {
  if (handle != nullptr) {
    auto* stream = static_cast<Stream*>(handle);
    return stub().streams.count(stream) > 0 ? stream : nullptr;
  }
  Stream*& own = stub().default_streams[current_contexts.back()];
  if (own == nullptr) own = add_stream(current_contexts.back());
  return own;
}

std::shared_ptr<Event> find_event(void* handle) {
  for (const std::shared_ptr<Event>& event : stub().events)
    if (event.get() == handle) return event;
  return nullptr;
}

void put(Stream* stream, std::function<void()> task) {
  stream->work.push_back(std::move(task));
  stub().changed.notify_all();
}

void sleep(long microseconds) {
  if (microseconds > 0) std::this_thread::sleep_for(std::chrono::microseconds(microseconds));
}

void carry_out(void* target, const void* source, std::size_t bytes) {
  {
    const Lock lock(stub().mutex);
    const long fail_copy = number("fail_copy");
    if (++number("copies") == fail_copy && fail_copy > 0) stub().failure = kIllegalAddress;
    if (stub().failure != kSuccess) return;
    number("bytes") += static_cast<long>(bytes);
  }
  std::memcpy(target, source, bytes);
}

int copy(void* target, const void* source, std::size_t bytes, const void* host, void* handle,
         bool is_from_host) {
  Lock lock(stub().mutex);
  const int result = check_current();
  if (result != kSuccess) return result;
  Stream* stream = find_stream(handle);
  if (stream == nullptr || stream->context != current_contexts.back())
    return misuse(kInvalidHandle);
  if (is_pinned(host, bytes)) {
    put(stream, [=, delay = number("copy_delay_us")] {
      sleep(delay);
      carry_out(target, source, bytes);
    });
    return kSuccess;
  }
  ++number("unpinned_copies");
  if (is_from_host) {
    auto staged = std::make_shared<std::vector<char>>(static_cast<const char*>(source),
                                                      static_cast<const char*>(source) + bytes);
    put(stream, [=] { carry_out(target, staged->data(), bytes); });
    return kSuccess;
  }
  put(stream, [=] { carry_out(target, source, bytes); });
  stub().changed.wait(lock, [&] { return stream->work.empty() && !stream->is_busy; });
  return stub().failure;
}

void* pointer(std::uint64_t address) {
  return reinterpret_cast<void*>(address & ~kStubDeviceBit);  // NOLINT(performance-no-int-to-ptr)
}

}  // namespace

#define STUB __attribute__((visibility("default")))

extern "C" {

// ---- For the tests ----

STUB void stub_reset() {
  Stub& s = stub();
  Lock lock(s.mutex);
  std::map<Context*, Stream*> own;
  own.swap(s.default_streams);
  for (const auto& entry : own) {
    entry.second->is_ended = true;
    s.changed.notify_all();
    lock.unlock();
    entry.second->thread.join();
    lock.lock();
    s.streams.erase(entry.second);
    delete entry.second;
  }
  s.numbers.clear();
  s.numbers["devices"] = 2;
  s.numbers["version"] = 13000;
  s.pinned.clear();
  for (const auto& entry : s.contexts) entry.second->retained = 0;
  s.failure = kSuccess;
}

STUB void stub_set(const char* setting, long value) {
  const Lock lock(stub().mutex);
  number(setting) = value;
}

STUB long stub_get(const char* count) {
  const Lock lock(stub().mutex);
  const std::string name = count;
  if (name == "streams")
    return static_cast<long>(stub().streams.size() - stub().default_streams.size());
  if (name == "events") return static_cast<long>(stub().events.size());
  if (name == "contexts") {
    long all = 0;
    for (const auto& entry : stub().contexts) all += entry.second->retained;
    return all;
  }
  return number(count);
}

STUB void stub_sleep(void* stream, long microseconds) {
  const Lock lock(stub().mutex);
  put(find_stream(stream), [=] { sleep(microseconds); });
}

// ---- The driver ----

STUB int cuInit(unsigned) {
  {
    const Lock lock(stub().mutex);
    if (stub().owner != 0 && stub().owner != ::getpid()) return kNotInitialized;
    if (stub().owner != 0) return static_cast<int>(number("init_error"));
    stub().owner = ::getpid();
  }
  stub_reset();
  return kSuccess;
}

STUB int cuDriverGetVersion(int* version) {
  const Lock lock(stub().mutex);
  *version = static_cast<int>(number("version"));
  return kSuccess;
}

STUB int cuGetErrorName(int error, const char** name) {
  static const std::map<int, const char*> names = {
      {kInvalidValue, "CUDA_ERROR_INVALID_VALUE"},
      {kNotInitialized, "CUDA_ERROR_NOT_INITIALIZED"},
      {kInvalidDevice, "CUDA_ERROR_INVALID_DEVICE"},
      {kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT"},
      {kInvalidHandle, "CUDA_ERROR_INVALID_HANDLE"},
      {kIllegalAddress, "CUDA_ERROR_ILLEGAL_ADDRESS"},
  };
  const auto found = names.find(error);
  *name = found == names.end() ? nullptr : found->second;
  return found == names.end() ? kInvalidValue : kSuccess;
}

STUB int cuDeviceGetCount(int* count) {
  const Lock lock(stub().mutex);
  *count = static_cast<int>(number("devices"));
  return check_ready();
}

STUB int cuDeviceGet(int* device, int ordinal) {
  const Lock lock(stub().mutex);
  *device = ordinal + 100;  // not the ordinal, which is another thing
  const int result = check_ready();
  if (result != kSuccess) return result;
  return ordinal < 0 || ordinal >= number("devices") ? kInvalidDevice : kSuccess;
}

STUB int cuDevicePrimaryCtxRetain(void** context, int device) {
  const Lock lock(stub().mutex);
  const int result = check_ready();
  if (result != kSuccess) return result;
  std::unique_ptr<Context>& primary = stub().contexts[device];
  if (!primary) primary = std::make_unique<Context>(Context{device});
  ++primary->retained;
  *context = primary.get();
  return kSuccess;
}

STUB int cuDevicePrimaryCtxRelease_v2(int device) {
  const Lock lock(stub().mutex);
  std::unique_ptr<Context>& primary = stub().contexts[device];
  if (!primary || primary->retained == 0) return misuse(kInvalidContext);
  --primary->retained;
  return kSuccess;
}

STUB int cuCtxPushCurrent_v2(void* context) {
  const Lock lock(stub().mutex);
  if (stub().owner != ::getpid() || number("is_gone") != 0) return kNotInitialized;
  current_contexts.push_back(static_cast<Context*>(context));
  return kSuccess;
}

STUB int cuCtxPopCurrent_v2(void** context) {
  const Lock lock(stub().mutex);
  if (current_contexts.empty()) return misuse(kInvalidContext);
  *context = current_contexts.back();
  current_contexts.pop_back();
  return kSuccess;
}

STUB int cuStreamCreate(void** stream, unsigned) {
  const Lock lock(stub().mutex);
  const int result = check_current();
  if (result == kSuccess) *stream = add_stream(current_contexts.back());
  return result;
}

STUB int cuStreamSynchronize(void* handle) {
  Lock lock(stub().mutex);
  if (stub().owner != ::getpid()) return kNotInitialized;
  if (handle == nullptr && current_contexts.empty()) return misuse(kInvalidContext);
  Stream* stream = find_stream(handle);
  if (stream == nullptr) return misuse(kInvalidHandle);
  stub().changed.wait(lock, [&] { return stream->work.empty() && !stream->is_busy; });
  return stub().failure;
}

STUB int cuStreamDestroy_v2(void* handle) {
  auto* stream = static_cast<Stream*>(handle);
  {
    const Lock lock(stub().mutex);
    if (stub().owner != ::getpid()) return kNotInitialized;
    if (stub().streams.erase(stream) == 0) return misuse(kInvalidHandle);
    stream->is_ended = true;
    stub().changed.notify_all();
  }
  stream->thread.join();
  delete stream;
  return kSuccess;
}

STUB int cuStreamWaitEvent(void* handle, void* event_handle, unsigned) {
  const Lock lock(stub().mutex);
  const int result = check_current();
  if (result != kSuccess) return result;
  Stream* stream = find_stream(handle);
  const std::shared_ptr<Event> event = find_event(event_handle);
  if (stream == nullptr || event == nullptr) return misuse(kInvalidHandle);
  put(stream, [event] {
    Lock waiting(stub().mutex);
    stub().changed.wait(waiting, [&] { return !event->is_pending; });
  });
  return kSuccess;
}

STUB int cuEventCreate(void** handle, unsigned) {
  const Lock lock(stub().mutex);
  const int result = check_current();
  if (result != kSuccess) return result;
  const auto event = std::make_shared<Event>(Event{current_contexts.back()});
  stub().events.insert(event);
  *handle = event.get();
  return kSuccess;
}

STUB int cuEventDestroy_v2(void* handle) {
  const Lock lock(stub().mutex);
  if (stub().owner != ::getpid()) return kNotInitialized;
  const std::shared_ptr<Event> event = find_event(handle);
  if (event == nullptr) return misuse(kInvalidHandle);
  stub().events.erase(event);  // what waits for it still has it
  return kSuccess;
}

STUB int cuEventRecord(void* handle, void* stream_handle) {
  const Lock lock(stub().mutex);
  const int result = check_current();
  if (result != kSuccess) return result;
  const std::shared_ptr<Event> event = find_event(handle);
  Stream* stream = find_stream(stream_handle);
  if (event == nullptr || stream == nullptr || event->context != stream->context)
    return misuse(kInvalidHandle);
  event->is_pending = true;
  put(stream, [event] {
    const Lock recording(stub().mutex);
    event->is_pending = false;
    stub().changed.notify_all();
  });
  return kSuccess;
}

STUB int cuEventQuery(void* handle) {
  const Lock lock(stub().mutex);
  const int result = check_ready();
  if (result != kSuccess) return result;
  const std::shared_ptr<Event> event = find_event(handle);
  if (event == nullptr) return misuse(kInvalidHandle);
  return event->is_pending ? kNotReady : kSuccess;
}

STUB int cuEventSynchronize(void* handle) {
  Lock lock(stub().mutex);
  if (stub().owner != ::getpid()) return kNotInitialized;
  const std::shared_ptr<Event> event = find_event(handle);
  if (event == nullptr) return misuse(kInvalidHandle);
  stub().changed.wait(lock, [&] { return !event->is_pending; });
  return stub().failure;
}

STUB int cuMemHostRegister_v2(void* memory, std::size_t bytes, unsigned) {
  const Lock lock(stub().mutex);
  const int result = check_current();
  if (result != kSuccess) return result;
  if (number("fail_pin") != 0) return kInvalidValue;
  if (!stub().pinned.emplace(reinterpret_cast<std::uintptr_t>(memory), bytes).second)
    return misuse(kAlreadyRegistered);
  number("pinned") += static_cast<long>(bytes);
  number("pinned_peak") = std::max(number("pinned_peak"), number("pinned"));
  return kSuccess;
}

STUB int cuMemHostUnregister(void* memory) {
  const Lock lock(stub().mutex);
  const auto range = stub().pinned.find(reinterpret_cast<std::uintptr_t>(memory));
  if (range == stub().pinned.end()) return misuse(kNotRegistered);
  number("pinned") -= static_cast<long>(range->second);
  stub().pinned.erase(range);
  return kSuccess;
}

STUB int cuMemcpyHtoDAsync_v2(std::uint64_t target, const void* source, std::size_t bytes,
                              void* stream) {
  return copy(pointer(target), source, bytes, source, stream, true);
}

STUB int cuMemcpyDtoHAsync_v2(void* target, std::uint64_t source, std::size_t bytes, void* stream) {
  return copy(target, pointer(source), bytes, target, stream, false);
}

STUB int cuMemsetD8Async(std::uint64_t target, unsigned char value, std::size_t count,
                         void* handle) {
  const Lock lock(stub().mutex);
  const int result = check_current();
  if (result != kSuccess) return result;
  Stream* stream = find_stream(handle);
  if (stream == nullptr) return misuse(kInvalidHandle);
  put(stream, [=] { std::memset(pointer(target), value, count); });
  return kSuccess;
}

// ---- libcufile: reads by the system, into what stands for a GPU's memory ----

struct FileStatus {
  int error;
  int driver_error;
};
struct FileDescription {
  int type;
  union {
    int descriptor;
    void* object;
  } handle;
  const void* operations;
};

STUB FileStatus cuFileDriverOpen() { return {kSuccess, kSuccess}; }

STUB FileStatus cuFileHandleRegister(void** handle, FileDescription* description) {
  const Lock lock(stub().mutex);
  if (number("fail_file") != 0 || description->type != 1) return {5000 + kInvalidValue, 0};
  ++number("files");
  *handle = new int(description->handle.descriptor);
  return {kSuccess, kSuccess};
}

STUB void cuFileHandleDeregister(void* handle) {
  const Lock lock(stub().mutex);
  --number("files");
  delete static_cast<int*>(handle);
}

STUB ssize_t cuFileRead(void* handle, void* target, std::size_t bytes, off_t offset,
                        off_t target_offset) {
  {
    const Lock lock(stub().mutex);
    if (current_contexts.empty()) misuse(kInvalidContext);
    ++number("direct_reads");
  }
  // With the page cache, as the memory is not aligned as the device would have it.
  const std::string path = "/proc/self/fd/" + std::to_string(*static_cast<int*>(handle));
  const int file = ::open(path.c_str(), O_RDONLY);
  const std::size_t part = std::min<std::size_t>(bytes, std::size_t{3} << 20U);  // fewer than asked
  const ssize_t got = ::pread(file, static_cast<char*>(target) + target_offset, part, offset);
  ::close(file);
  return got;
}
}
