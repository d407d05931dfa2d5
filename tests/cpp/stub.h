// The stub driver (tests/stub_cuda) for native tests: loaded in the place of CUDA's.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <memory>
#include <string>

#include "cuda/driver.h"
#include "cuda/ring.h"
#include "error.h"

namespace fastsd::test {

// While this lives the stub is the driver, as it is at first, and the ring is empty at the end.
class Stub {
 public:
  Stub() : library_(::dlopen(FASTSD_STUB_CUDA, RTLD_NOW)) {
    if (library_ == nullptr) throw Error(Failure::kSystem, ::dlerror());
    cuda::Driver::set_library(FASTSD_STUB_CUDA);
    find<void (*)()>("stub_reset")();
    cuda::Driver::open();
  }
  Stub(const Stub&) = delete;
  Stub& operator=(const Stub&) = delete;
  ~Stub() {
    cuda::Ring::shared().empty();
    cuda::Driver::set_library("");
    ::dlclose(library_);
  }

  void set(const char* setting, long value) {
    find<void (*)(const char*, long)>("stub_set")(setting, value);
  }
  long get(const char* count) { return find<long (*)(const char*)>("stub_get")(count); }

  // After a failure. REQUIRES: no stream and no event is left.
  void recover() { find<void (*)()>("stub_reset")(); }

  // Puts a pause, and then a write, into the default stream of a GPU.
  void write_late(int gpu, void* target, unsigned char value, std::size_t bytes) {
    const cuda::DriverFunctions& driver = cuda::Driver::open()->functions();
    int device = 0;
    cuda::ContextHandle context = nullptr;
    driver.get_device(&device, gpu);
    driver.retain_context(&context, device);
    driver.push_context(context);
    find<void (*)(void*, long)>("stub_sleep")(nullptr, 20000);
    find<int (*)(std::uint64_t, unsigned char, std::size_t, void*)>("cuMemsetD8Async")(
        address(target), value, bytes, nullptr);
    driver.pop_context(&context);
    driver.release_context(device);
  }

  static cuda::Address address(const void* memory) {
    return reinterpret_cast<std::uintptr_t>(memory);
  }

 private:
  template <class Function>
  Function find(const char* name) {
    return reinterpret_cast<Function>(::dlsym(library_, name));
  }

  void* library_;
};

}  // namespace fastsd::test
