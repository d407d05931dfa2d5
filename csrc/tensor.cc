#include "tensor.h"

#include <memory>
#include <optional>

#include "pyobject.h"

namespace fastsd {
namespace {

// What torch lends; references are kept for ever.
struct Torch {
  const dlpack::ExchangeApi* exchange = nullptr;
  PyObject* tensor_type = nullptr;
  PyObject* uint8 = nullptr;
  PyObject* int8 = nullptr;
  PyObject* from_dlpack = nullptr;
  PyObject* dtype = nullptr;  // this and the following are descriptors of torch.Tensor
  PyObject* is_cpu = nullptr;
  PyObject* requires_grad = nullptr;
  PyObject* is_neg = nullptr;
  PyObject* is_conj = nullptr;
  PyObject* untyped_storage = nullptr;
  PyObject* storage_offset = nullptr;
};
Torch g_torch;

// A managed tensor of either kind, with what keeps its memory. Whoever consumes it copies shape and
// strides, which are therefore only lent.
template <class Managed>
struct Lease {
  Managed managed{};
  std::shared_ptr<const void> owner;

  static void end(Managed* managed) { delete static_cast<Lease*>(managed->manager_ctx); }
};

template <class Managed>
Lease<Managed>* make_lease(const Bytes& bytes, const DTypeInfo& dtype, std::uint32_t rank,
                           const std::int64_t* shape, const std::int64_t* stride) {
  auto* lease = new Lease<Managed>;
  lease->owner = bytes.owner;
  lease->managed.manager_ctx = lease;
  lease->managed.deleter = &Lease<Managed>::end;
  dlpack::Tensor& tensor = lease->managed.dl_tensor;
  tensor.data = bytes.data;
  tensor.device = {dlpack::kDeviceCpu, 0};
  tensor.ndim = static_cast<std::int32_t>(rank);
  tensor.dtype = dtype.dlpack_type;
  tensor.shape = const_cast<std::int64_t*>(shape);
  tensor.strides = const_cast<std::int64_t*>(stride);
  return lease;
}

PyObject* make_through_exchange(const Bytes& bytes, const DTypeInfo& dtype, std::uint32_t rank,
                                const std::int64_t* shape, const std::int64_t* stride) {
  auto* lease = make_lease<dlpack::ManagedTensorVersioned>(bytes, dtype, rank, shape, stride);
  lease->managed.version = {dlpack::kMajorVersion, 0};
  void* tensor = nullptr;
  // On failure torch may or may not have taken the lease; leaking a few bytes is the safe choice.
  if (g_torch.exchange->managed_tensor_to_py_object_no_sync(&lease->managed, &tensor) != 0)
    return nullptr;
  return static_cast<PyObject*>(tensor);
}

constexpr const char* kCapsuleName = "dltensor";

void end_unused_capsule(PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, kCapsuleName) == 0) return;  // consumed: it was renamed
  auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, kCapsuleName));
  managed->deleter(managed);
}

PyObject* make_through_capsule(const Bytes& bytes, const DTypeInfo& dtype, std::uint32_t rank,
                               const std::int64_t* shape, const std::int64_t* stride) {
  auto* lease = make_lease<dlpack::ManagedTensor>(bytes, dtype, rank, shape, stride);
  const Reference capsule(PyCapsule_New(&lease->managed, kCapsuleName, &end_unused_capsule));
  if (capsule.get() == nullptr) {
    delete lease;
    return nullptr;
  }
  return PyObject_CallOneArg(g_torch.from_dlpack, capsule.get());
}

// Reads an attribute of torch.Tensor, or calls a method without arguments; true if it gives
// `expected`. With descriptors looked up once this takes half the time of doing it by name.
bool gives(PyObject* tensor, PyObject* getter, PyObject* expected) {
  const descrgetfunc get = Py_TYPE(getter)->tp_descr_get;
  const Reference result(get(getter, tensor, reinterpret_cast<PyObject*>(Py_TYPE(tensor))));
  if (result.get() == nullptr) PyErr_Clear();
  return result.get() == expected;
}

bool returns_false(PyObject* tensor, PyObject* method) {
  const Reference result(PyObject_CallOneArg(method, tensor));
  if (result.get() == nullptr) PyErr_Clear();
  return result.get() == Py_False;
}

bool has_no_flags(PyObject* tensor, const DTypeInfo& dtype) {
  const bool is_complex = dtype.dlpack_type.code == dlpack::kComplex;
  return gives(tensor, g_torch.requires_grad, Py_False) && returns_false(tensor, g_torch.is_neg) &&
         (!is_complex || returns_false(tensor, g_torch.is_conj));
}

// A storage can be made smaller under a tensor, which then reaches past its end.
bool is_within_storage(PyObject* tensor, const Strided& view) {
  const Reference storage(PyObject_CallOneArg(g_torch.untyped_storage, tensor));
  const Reference offset(PyObject_CallOneArg(g_torch.storage_offset, tensor));
  const Py_ssize_t bytes = storage.get() == nullptr ? -1 : PyObject_Size(storage.get());
  const Py_ssize_t items = offset.get() == nullptr ? -1 : PyLong_AsSsize_t(offset.get());
  if (bytes < 0 || items < 0) {
    PyErr_Clear();
    return false;
  }
  const auto available = static_cast<std::uint64_t>(bytes);
  const auto skipped = static_cast<std::uint64_t>(items);
  const std::optional<std::uint64_t> extent = extent_bytes(view);
  return extent && (*extent == 0 || (skipped <= available / view.item_bytes &&
                                     *extent <= available - skipped * view.item_bytes));
}

// Torch exports int4 as int8, and so on; only the attribute tells.
bool is_eight_bit_impostor(PyObject* tensor, const DTypeInfo& info) {
  if (info.dtype == DType::kUInt8) return !gives(tensor, g_torch.dtype, g_torch.uint8);
  return info.dtype == DType::kInt8 && !gives(tensor, g_torch.dtype, g_torch.int8);
}

// Releases without the exchange table read only the types of DLPack 0.8.
bool can_make(const DTypeInfo& dtype) {
  return dtype.in_dlpack &&
         (g_torch.exchange != nullptr || dtype.dlpack_type.code <= dlpack::kBool);
}

// How many tensors that are objects of their own lie in each storage.
std::vector<std::uint32_t> count_tensors(const Index& index) {
  std::vector<std::uint32_t> counts(index.storages.size());
  for (std::size_t i = 0; i < index.tensors.size(); ++i) {
    if (index.tensors[i].same_as == i) ++counts[index.tensors[i].storage];
  }
  return counts;
}

// Whether a tensor reaches all bytes of its storage; torch's storages may be larger.
bool is_whole(const Index& index, const TensorRecord& tensor, const StorageRecord& storage) {
  return tensor.storage_offset == 0 && extent_bytes(index.view(tensor)) == storage.bytes;
}

bool append_number(PyObject* list, std::size_t number) {
  const Reference object(PyLong_FromSize_t(number));
  return object.get() != nullptr && PyList_Append(list, object.get()) == 0;
}

bool add_base(PyObject* bases, std::size_t storage, const StorageRecord& record,
              const Bytes& bytes) {
  if ((record.flags & kStorageHasNoData) != 0) return true;
  const Reference number(PyLong_FromSize_t(storage));
  if (number.get() == nullptr) return false;
  const int known = PyDict_Contains(bases, number.get());
  if (known != 0) return known > 0;
  const auto shape = static_cast<std::int64_t>(record.bytes);
  const std::int64_t stride = 1;
  const Reference base(make_tensor(bytes, *find_dtype(static_cast<std::uint16_t>(DType::kUInt8)), 1,
                                   &shape, &stride));
  return base.get() != nullptr && PyDict_SetItem(bases, number.get(), base.get()) == 0;
}

}  // namespace

bool set_torch(PyObject* tensor_type, PyObject* uint8, PyObject* int8, PyObject* from_dlpack,
               const dlpack::ExchangeApi* exchange) {
  Torch torch;
  torch.exchange = exchange;
  const auto keep = [](PyObject* object) {
    Py_INCREF(object);
    return object;
  };
  const auto find = [&](const char* name) { return PyObject_GetAttrString(tensor_type, name); };
  torch.tensor_type = keep(tensor_type);
  torch.uint8 = keep(uint8);
  torch.int8 = keep(int8);
  torch.from_dlpack = keep(from_dlpack);
  torch.dtype = find("dtype");
  torch.is_cpu = find("is_cpu");
  torch.requires_grad = find("requires_grad");
  torch.is_neg = find("is_neg");
  torch.is_conj = find("is_conj");
  torch.untyped_storage = find("untyped_storage");
  torch.storage_offset = find("storage_offset");
  if (PyErr_Occurred() != nullptr) return false;
  g_torch = torch;
  return true;
}

const dlpack::ExchangeApi* find_exchange(PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, dlpack::kExchangeCapsuleName) == 0) return nullptr;
  const auto* api = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule, dlpack::kExchangeCapsuleName));
  const bool is_known = api->version.major == dlpack::kMajorVersion &&
                        api->managed_tensor_to_py_object_no_sync != nullptr &&
                        api->dltensor_from_py_object_no_sync != nullptr;
  return is_known ? api : nullptr;
}

PyObject* make_tensor(const Bytes& bytes, const DTypeInfo& dtype, std::uint32_t rank,
                      const std::int64_t* shape, const std::int64_t* stride) {
  const auto make = g_torch.exchange != nullptr ? make_through_exchange : make_through_capsule;
  return make(bytes, dtype, rank, shape, stride);
}

bool describe_plain(PyObject* tensor, bool* has_refused, PlainTensor* plain) {
  if (g_torch.exchange == nullptr ||
      reinterpret_cast<PyObject*>(Py_TYPE(tensor)) != g_torch.tensor_type ||
      (*has_refused && !gives(tensor, g_torch.is_cpu, Py_True))) {
    return false;
  }
  dlpack::Tensor described{};
  if (g_torch.exchange->dltensor_from_py_object_no_sync(tensor, &described) != 0) {
    PyErr_Clear();
    *has_refused = true;
    return false;
  }
  if (described.device.device_type != dlpack::kDeviceCpu) return false;
  const DTypeInfo* dtype = find_dtype(described.dtype);
  if (dtype == nullptr || is_eight_bit_impostor(tensor, *dtype) || !has_no_flags(tensor, *dtype))
    return false;
  const Strided view{dtype->item_bytes, static_cast<std::uint32_t>(described.ndim), described.shape,
                     described.strides};
  if (!is_within_storage(tensor, view)) return false;
  *plain = {static_cast<const std::byte*>(described.data) + described.byte_offset, dtype,
            static_cast<std::uint32_t>(described.ndim), described.shape, described.strides};
  return true;
}

bool load_tensors(const Index& index, const std::vector<std::size_t>& numbers,
                  const std::vector<Bytes>& bytes, const std::vector<bool>& is_placed,
                  bool is_ordered, bool is_all_rest, LoadedTensors* loaded) {
  const CollectionPause pause;
  const auto set_item = is_ordered ? PyODict_SetItem : PyDict_SetItem;
  Reference by_name(is_ordered ? PyODict_New() : PyDict_New());
  Reference rest(PyList_New(0));
  Reference bases(PyDict_New());
  if (by_name.get() == nullptr || rest.get() == nullptr || bases.get() == nullptr) return false;
  const std::vector<std::uint32_t> counts = count_tensors(index);
  for (const std::size_t i : numbers) {
    const TensorRecord& tensor = index.tensors[i];
    const DTypeInfo& dtype = *find_dtype(tensor.dtype);
    const std::string_view text = index.name(tensor);
    const Reference name(
        PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), nullptr));
    if (name.get() == nullptr) return false;
    const StorageRecord& storage = index.storages[tensor.storage];
    const bool has_base = !is_placed[tensor.storage] || is_host_only(tensor);
    const bool is_plain = has_base && !is_all_rest && can_make(dtype) && tensor.same_as == i &&
                          counts[tensor.storage] == 1 && tensor.flags == 0 &&
                          (storage.flags & kStorageHasNoData) == 0 &&
                          is_whole(index, tensor, storage);
    if (!is_plain) {
      if (set_item(by_name.get(), name.get(), Py_None) != 0 || !append_number(rest.get(), i) ||
          (has_base && !add_base(bases.get(), tensor.storage, storage, bytes[tensor.storage]))) {
        return false;
      }
      continue;
    }
    const std::int64_t* shape = index.dims.data() + tensor.dims_offset;
    const Reference object(
        make_tensor(bytes[tensor.storage], dtype, tensor.rank, shape, shape + tensor.rank));
    if (object.get() == nullptr || set_item(by_name.get(), name.get(), object.get()) != 0)
      return false;
  }
  *loaded = {by_name.release(), rest.release(), bases.release()};
  return true;
}

PyObject* load_storages(const Index& by_key, const std::vector<Bytes>& bytes) {
  const CollectionPause pause;
  Reference storages(PyDict_New());
  if (storages.get() == nullptr) return nullptr;
  for (const TensorRecord& tensor : by_key.tensors) {
    if (!is_stored_storage(by_key, tensor)) continue;
    const std::string_view text = by_key.name(tensor);
    const Reference key(
        PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), nullptr));
    const std::int64_t* shape = by_key.dims.data() + tensor.dims_offset;
    const Bytes& whole = bytes[tensor.storage];
    const Reference storage(make_tensor({whole.data + tensor.storage_offset, whole.owner},
                                        *find_dtype(tensor.dtype), 1, shape, shape + 1));
    if (key.get() == nullptr || storage.get() == nullptr ||
        PyDict_SetItem(storages.get(), key.get(), storage.get()) != 0) {
      return nullptr;
    }
  }
  return storages.release();
}

}  // namespace fastsd
