#include "cuda/direct_storage.h"

#include <dlfcn.h>
#include <sys/types.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <mutex>
#include <type_traits>
#include <utility>

#include "error.h"

namespace fastsd::cuda {
namespace {

constexpr const char* kSystemLibrary = "libcufile.so.0";
constexpr const char* kSystemModule = "/proc/driver/nvidia-fs/version";

// cufile.h: CUfileError_t, CUfileDescr_t, CU_FILE_HANDLE_TYPE_OPAQUE_FD, CUFILEOP_BASE_ERR.
struct Status {
  int error;
  int driver_error;
};
struct Description {
  int type;
  union {
    int descriptor;
    void* object;
  } handle;
  const void* operations;
};
constexpr int kTypeDescriptor = 1;
constexpr ssize_t kErrorBase = 5000;

[[noreturn]] void refuse(const std::string& why) {
  throw Error(Failure::kUnsupported, "off: " + why);
}

struct Process {
  std::mutex mutex;
  std::string library = kSystemLibrary;
  std::string module_path = kSystemModule;
  std::shared_ptr<const DirectStorage> storage;
};

Process& process() {
  static auto* known = new Process;
  return *known;
}

}  // namespace

struct DirectStorage::Functions {
  Status (*open_driver)() = nullptr;
  Status (*register_handle)(void** handle, Description* description) = nullptr;
  void (*deregister_handle)(void* handle) = nullptr;
  ssize_t (*read)(void* handle, void* target, std::size_t bytes, off_t offset,
                  off_t target_offset) = nullptr;
};

// ---- DirectStorage ----

DirectStorage::DirectStorage(const std::string& library, const std::string& module_path) {
  if (::access(module_path.c_str(), F_OK) != 0) refuse("the nvidia-fs module is not loaded");
  void* opened = ::dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (opened == nullptr) refuse(::dlerror());
  Functions found;
  const auto find = [&](const char* name, auto* function) {
    void* symbol = ::dlsym(opened, name);
    if (symbol == nullptr) refuse(library + " has no " + name);
    *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(symbol);
  };
  find("cuFileDriverOpen", &found.open_driver);
  find("cuFileHandleRegister", &found.register_handle);
  find("cuFileHandleDeregister", &found.deregister_handle);
  find("cuFileRead", &found.read);
  const Status status = found.open_driver();
  if (status.error != 0) refuse("cuFileDriverOpen failed: error " + std::to_string(status.error));
  functions_ = std::make_shared<Functions>(found);
}

std::shared_ptr<const DirectStorage> DirectStorage::open() {
  Process& known = process();
  const std::lock_guard<std::mutex> lock(known.mutex);
  if (!known.storage)
    known.storage = std::make_shared<DirectStorage>(known.library, known.module_path);
  return known.storage;
}

void DirectStorage::set_library(const std::string& library, const std::string& module_path) {
  Process& known = process();
  const std::lock_guard<std::mutex> lock(known.mutex);
  known.library = library.empty() ? kSystemLibrary : library;
  known.module_path = module_path.empty() ? kSystemModule : module_path;
  known.storage.reset();
}

// ---- DirectStorageFile ----

DirectStorageFile::DirectStorageFile(std::shared_ptr<const DirectStorage> storage,
                                     const DirectFile& file)
    : storage_(std::move(storage)), file_(file) {
  Description description{};
  description.type = kTypeDescriptor;
  description.handle.descriptor = file.descriptor();
  const Status status = storage_->functions_->register_handle(&handle_, &description);
  if (status.error != 0)
    refuse("cuFileHandleRegister failed: error " + std::to_string(status.error));
}

DirectStorageFile::~DirectStorageFile() { storage_->functions_->deregister_handle(handle_); }

void DirectStorageFile::read_at(const Gpu& gpu, Address target, std::uint64_t bytes,
                                std::uint64_t offset) const {
  const Current current(gpu);
  auto* memory = reinterpret_cast<void*>(target);  // NOLINT(performance-no-int-to-ptr)
  for (std::uint64_t done = 0; done < bytes;) {
    const auto at = static_cast<off_t>(file_.begin() + offset + done);
    const ssize_t got =
        storage_->functions_->read(handle_, memory, bytes - done, at, static_cast<off_t>(done));
    if (got <= -kErrorBase)
      throw Error(Failure::kDevice, "cuFileRead failed: error " + std::to_string(-got));
    if (got < 0) throw Error(Failure::kSystem, std::strerror(errno), file_.name(), errno);
    if (got == 0) {
      throw Error(Failure::kTruncated,
                  "the file ended at byte " + std::to_string(at) + ", while it was being read",
                  file_.name());
    }
    done += static_cast<std::uint64_t>(got);
  }
}

}  // namespace fastsd::cuda
