// The binary interface of DLPack 1.x, as far as fastsd uses it: the structures through which memory
// becomes a torch.Tensor and back. Declared from the specification, https://dmlc.github.io/dlpack;
// names and order of the members are the specification's.
#pragma once

#include <cstdint>

namespace fastsd::dlpack {

constexpr std::int32_t kDeviceCpu = 1;

enum TypeCode : std::uint8_t {
  kInt = 0,
  kUInt = 1,
  kFloat = 2,
  kBfloat = 4,
  kComplex = 5,
  kBool = 6,
  kFloat8E4m3fn = 10,
  kFloat8E4m3fnuz = 11,
  kFloat8E5m2 = 12,
  kFloat8E5m2fnuz = 13,
  kFloat8E8m0fnu = 14,
  kFloat4E2m1fn = 17,
};

struct Version {
  std::uint32_t major;
  std::uint32_t minor;
};

struct Device {
  std::int32_t device_type;
  std::int32_t device_id;
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

// DLManagedTensor: what a "dltensor" capsule holds; every torch release reads it.
struct ManagedTensor {
  Tensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(ManagedTensor* self);
};

// DLManagedTensorVersioned, which the exchange table speaks.
struct ManagedTensorVersioned {
  Version version;
  void* manager_ctx;
  void (*deleter)(ManagedTensorVersioned* self);
  std::uint64_t flags;
  Tensor dl_tensor;
};

// DLPackExchangeAPI, found in the capsule `torch.Tensor.__dlpack_c_exchange_api__`. Functions
// return 0, or -1 with a Python exception set; members that fastsd never calls are untyped.
struct ExchangeApi {
  Version version;
  void* prev_api;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  int (*managed_tensor_to_py_object_no_sync)(ManagedTensorVersioned* tensor, void** py_object);
  int (*dltensor_from_py_object_no_sync)(void* py_object, Tensor* tensor);
  void* current_work_stream;
};

constexpr std::uint32_t kMajorVersion = 1;
constexpr const char* kExchangeCapsuleName = "dlpack_exchange_api";

}  // namespace fastsd::dlpack
