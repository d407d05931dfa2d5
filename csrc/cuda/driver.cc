#include "cuda/driver.h"

#include <dlfcn.h>

#include <mutex>
#include <utility>

#include "error.h"

namespace fastsd::cuda {
namespace {

constexpr const char* kSystemLibrary = "libcuda.so.1";

// cuda.h: CUresult, CUstream_flags, CUevent_flags, CU_MEMHOSTREGISTER_PORTABLE.
constexpr int kSuccess = 0;
constexpr int kErrorNotInitialized = 3;
constexpr int kErrorNotReady = 600;
constexpr unsigned kStreamNonBlocking = 1;
constexpr unsigned kEventDisableTiming = 2;
constexpr unsigned kRegisterPortable = 1;  // for all contexts

constexpr int kVersionMin = 12000;

[[noreturn]] void refuse(const std::string& why) {
  throw Error(Failure::kUnsupported, "no CUDA driver: " + why);
}

template <class Function>
void find(void* library, const char* name, Function* function) {
  void* found = ::dlsym(library, name);
  if (found == nullptr) refuse(std::string("it has no ") + name + "; CUDA 12 or newer is needed");
  *function = reinterpret_cast<Function>(found);
}

DriverFunctions find_functions(void* library) {
  DriverFunctions f{};
  find(library, "cuInit", &f.init);
  find(library, "cuDriverGetVersion", &f.get_version);
  find(library, "cuGetErrorName", &f.get_error_name);
  find(library, "cuDeviceGetCount", &f.get_device_count);
  find(library, "cuDeviceGet", &f.get_device);
  find(library, "cuDevicePrimaryCtxRetain", &f.retain_context);
  find(library, "cuDevicePrimaryCtxRelease_v2", &f.release_context);
  find(library, "cuCtxPushCurrent_v2", &f.push_context);
  find(library, "cuCtxPopCurrent_v2", &f.pop_context);
  find(library, "cuStreamCreate", &f.create_stream);
  find(library, "cuStreamDestroy_v2", &f.destroy_stream);
  find(library, "cuStreamSynchronize", &f.synchronize_stream);
  find(library, "cuStreamWaitEvent", &f.wait_event);
  find(library, "cuEventCreate", &f.create_event);
  find(library, "cuEventDestroy_v2", &f.destroy_event);
  find(library, "cuEventRecord", &f.record_event);
  find(library, "cuEventQuery", &f.query_event);
  find(library, "cuEventSynchronize", &f.synchronize_event);
  find(library, "cuMemHostRegister_v2", &f.register_host);
  find(library, "cuMemHostUnregister", &f.unregister_host);
  find(library, "cuMemcpyHtoDAsync_v2", &f.copy_to_device);
  find(library, "cuMemcpyDtoHAsync_v2", &f.copy_to_host);
  return f;
}

std::string error_name(const DriverFunctions& functions, int error) {
  const char* name = nullptr;
  functions.get_error_name(error, &name);
  return name != nullptr ? name : "error " + std::to_string(error);
}

struct Process {
  std::mutex mutex;
  std::string library = kSystemLibrary;
  std::shared_ptr<const Driver> driver;
};

Process& process() {
  static auto* known = new Process;  // streams may outlive statics
  return *known;
}

}  // namespace

// ---- Driver ----

Driver::Driver(const std::string& library) {
  void* opened = ::dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (opened == nullptr) refuse(::dlerror());
  functions_ = find_functions(opened);
  const int result = functions_.init(0);
  if (result != kSuccess) refuse(error_name(functions_, result));
  check(functions_.get_version(&version_), "cuDriverGetVersion");
  if (version_ < kVersionMin)
    refuse("it is for CUDA " + std::to_string(version_ / 1000) + "; 12 or newer is needed");
  check(functions_.get_device_count(&device_count_), "cuDeviceGetCount");
}

std::shared_ptr<const Driver> Driver::open() {
  Process& known = process();
  const std::lock_guard<std::mutex> lock(known.mutex);
  if (!known.driver) known.driver = std::make_shared<Driver>(known.library);
  return known.driver;
}

void Driver::set_library(const std::string& library) {
  Process& known = process();
  const std::lock_guard<std::mutex> lock(known.mutex);
  known.library = library.empty() ? kSystemLibrary : library;
  known.driver.reset();
}

void Driver::check(int result, const char* function) const {
  if (result == kSuccess) return;
  std::string detail = std::string(function) + " failed: " + error_name(functions_, result);
  if (result == kErrorNotInitialized)
    detail += " (a process that was forked cannot use a GPU that its parent has used)";
  throw Error(Failure::kDevice, detail);
}

// ---- Current ----

Current::Current(const Gpu& gpu) : functions_(gpu.functions()) {
  gpu.driver().check(functions_.push_context(gpu.context_), "cuCtxPushCurrent");
}

Current::~Current() {
  ContextHandle popped = nullptr;
  functions_.pop_context(&popped);
}

// ---- Gpu ----

Gpu::Gpu(std::shared_ptr<const Driver> driver, int ordinal)
    : driver_(std::move(driver)), ordinal_(ordinal) {
  driver_->check(functions().get_device(&device_, ordinal), "cuDeviceGet");
  driver_->check(functions().retain_context(&context_, device_), "cuDevicePrimaryCtxRetain");
}

Gpu::~Gpu() { functions().release_context(device_); }

bool Gpu::pin(void* memory, std::size_t bytes) const {
  const Current current(*this);
  return functions().register_host(memory, bytes, kRegisterPortable) == kSuccess;
}

void Gpu::unpin(void* memory) const noexcept {
  ContextHandle popped = nullptr;
  if (functions().push_context(context_) != kSuccess) return;
  functions().unregister_host(memory);
  functions().pop_context(&popped);
}

// ---- Event ----

Event::Event(std::shared_ptr<const Gpu> gpu, StreamHandle stream) : gpu_(std::move(gpu)) {
  const Driver& driver = gpu_->driver();
  const Current current(*gpu_);
  driver.check(driver.functions().create_event(&handle_, kEventDisableTiming), "cuEventCreate");
  const int result = driver.functions().record_event(handle_, stream);
  if (result != kSuccess) driver.functions().destroy_event(handle_);
  driver.check(result, "cuEventRecord");
}

Event::Event(Event&& other) noexcept
    : gpu_(std::move(other.gpu_)), handle_(std::exchange(other.handle_, nullptr)) {}

Event& Event::operator=(Event&& other) noexcept {
  std::swap(gpu_, other.gpu_);
  std::swap(handle_, other.handle_);
  return *this;
}

Event::~Event() {
  if (handle_ != nullptr) gpu_->driver().functions().destroy_event(handle_);
}

bool Event::has_passed() const {
  const Driver& driver = gpu_->driver();
  const int result = driver.functions().query_event(handle_);
  if (result == kErrorNotReady) return false;
  driver.check(result, "cuEventQuery");
  return true;
}

void Event::wait() const {
  const Driver& driver = gpu_->driver();
  driver.check(driver.functions().synchronize_event(handle_), "cuEventSynchronize");
}

// ---- Stream ----

Stream::Stream(std::shared_ptr<const Gpu> gpu) : gpu_(std::move(gpu)) {
  const Current current(*gpu_);
  gpu_->driver().check(gpu_->driver().functions().create_stream(&handle_, kStreamNonBlocking),
                       "cuStreamCreate");
}

Stream::~Stream() {
  const DriverFunctions& functions = gpu_->driver().functions();
  functions.synchronize_stream(handle_);  // what fails here has failed where it was asked for
  functions.destroy_stream(handle_);
}

void Stream::follow(StreamHandle other) {
  const Event event(gpu_, other);
  const Current current(*gpu_);
  gpu_->driver().check(gpu_->driver().functions().wait_event(handle_, event.handle(), 0),
                       "cuStreamWaitEvent");
}

void Stream::copy_to_device(Address target, const void* source, std::size_t bytes) {
  const Current current(*gpu_);
  gpu_->driver().check(gpu_->driver().functions().copy_to_device(target, source, bytes, handle_),
                       "cuMemcpyHtoDAsync");
}

void Stream::copy_to_host(void* target, Address source, std::size_t bytes) {
  const Current current(*gpu_);
  gpu_->driver().check(gpu_->driver().functions().copy_to_host(target, source, bytes, handle_),
                       "cuMemcpyDtoHAsync");
}

Event Stream::record() { return {gpu_, handle_}; }

void Stream::synchronize() {
  const Current current(*gpu_);
  gpu_->driver().check(gpu_->driver().functions().synchronize_stream(handle_),
                       "cuStreamSynchronize");
}

}  // namespace fastsd::cuda
