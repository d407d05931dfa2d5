#include "pickle_calls.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <iterator>
#include <string>

#include "dtype.h"
#include "strided.h"

namespace fastsd {
namespace {

enum class Callable : std::uint16_t {
  kOrderedDict,
  kEncode,
  kSet,
  kByteArray,
  kComplex,
  kSize,
  kDevice,
  kGetLayout,
  kRebuildTensor,
  kRebuildTensorV2,
  kRebuildTensorV3,
  kRebuildParameter,
  kRebuildMetaTensor,
};

struct Global {
  std::string_view module;
  std::string_view name;
  Callable callable;
};

constexpr Global kGlobals[] = {
    {"collections", "OrderedDict", Callable::kOrderedDict},
    {"_codecs", "encode", Callable::kEncode},
    {"builtins", "set", Callable::kSet},
    {"builtins", "bytearray", Callable::kByteArray},
    {"builtins", "complex", Callable::kComplex},
    {"torch", "Size", Callable::kSize},
    {"torch", "device", Callable::kDevice},
    {"torch.serialization", "_get_layout", Callable::kGetLayout},
    {"torch._utils", "_rebuild_tensor", Callable::kRebuildTensor},
    {"torch._utils", "_rebuild_tensor_v2", Callable::kRebuildTensorV2},
    {"torch._utils", "_rebuild_tensor_v3", Callable::kRebuildTensorV3},
    {"torch._utils", "_rebuild_parameter", Callable::kRebuildParameter},
    {"torch._utils", "_rebuild_meta_tensor_no_storage", Callable::kRebuildMetaTensor},
};

struct StorageClass {
  std::string_view name;
  DType dtype;
};

constexpr StorageClass kStorageClasses[] = {
    {"FloatStorage", DType::kFloat32},
    {"HalfStorage", DType::kFloat16},
    {"BFloat16Storage", DType::kBFloat16},
    {"DoubleStorage", DType::kFloat64},
    {"LongStorage", DType::kInt64},
    {"IntStorage", DType::kInt32},
    {"ShortStorage", DType::kInt16},
    {"CharStorage", DType::kInt8},
    {"ByteStorage", DType::kUInt8},
    {"BoolStorage", DType::kBool},
    {"ComplexFloatStorage", DType::kComplex64},
    {"ComplexDoubleStorage", DType::kComplex128},
};

constexpr std::string_view kQuantizedDTypes[] = {"qint8", "quint8", "qint32", "quint4x2",
                                                 "quint2x4"};

constexpr std::string_view kLayouts[] = {"torch.strided",    "torch.sparse_coo", "torch.sparse_csr",
                                         "torch.sparse_csc", "torch.sparse_bsr", "torch.sparse_bsc",
                                         "torch._mkldnn",    "torch.jagged"};

constexpr std::string_view kDeviceTypes[] = {"cpu", "cuda", "meta", "mps", "xpu",   "hpu",
                                             "xla", "mtia", "hip",  "ipu", "vulkan"};
constexpr std::uint64_t kDeviceIndexMax = 127;
constexpr std::string_view kMeta = "meta";
// A long text may be used many times: so many times the stream is read.
constexpr std::uint64_t kReadsMax = 16;
constexpr std::size_t kProbesMax = 64;    // of names that were not made to collide there are few
constexpr std::size_t kDevicesMax = 256;  // of the storages of one file: they are looked up in turn

template <class List>
bool contains(const List& list, std::string_view name) {
  return std::find(std::begin(list), std::end(list), name) != std::end(list);
}

const DTypeInfo* find_dtype_named(std::string_view name) {
  const DTypeInfo* end = kDTypes + kDTypeCount;
  const DTypeInfo* found =
      std::find_if(kDTypes, end, [&](const DTypeInfo& info) { return info.name == name; });
  return found == end ? nullptr : found;
}

bool is_complex(std::uint16_t dtype) {
  return dtype >= static_cast<std::uint16_t>(DType::kComplex32) &&
         dtype <= static_cast<std::uint16_t>(DType::kComplex128);
}

bool can_require_grad(std::uint16_t dtype) {
  return dtype >= static_cast<std::uint16_t>(DType::kFloat16) &&
         dtype <= static_cast<std::uint16_t>(DType::kFloat4E2m1fnX2);
}

// Whether all characters are below U+0100. REQUIRES: UTF-8.
bool is_latin1(std::string_view text) {
  return std::all_of(text.begin(), text.end(),
                     [](char c) { return static_cast<unsigned char>(c) < 0xC4; });
}

bool is_true(const Value& value) { return value.kind == Kind::kBool && value.number != 0; }

bool is_number(const Value& value) {
  return value.kind == Kind::kInt && static_cast<std::int64_t>(value.number) >= 0;
}

}  // namespace

Calls::Calls(Graph& graph, const Index& by_key)
    : graph_(graph), by_key_(by_key), bytes_left_(kReadsMax * graph.stream.size()) {
  graph_.storage_devices.assign(by_key.storages.size(), UINT16_MAX);
  std::size_t slots = 16;
  while (slots < 2 * by_key.tensors.size()) slots *= 2;
  slots_.resize(slots);
  for (std::uint32_t i = 0; i < by_key.tensors.size(); ++i) {
    keys_.push_back({by_key.name(by_key.tensors[i]), i, 0, {}, false});
    const std::optional<std::size_t> slot = find_slot(keys_[i].name);
    if (slot) slots_[*slot] = i + 1;
  }
}

std::optional<std::size_t> Calls::find_slot(std::string_view name) const {
  std::size_t slot = std::hash<std::string_view>{}(name) & (slots_.size() - 1);
  for (std::size_t probes = 0; probes < kProbesMax; ++probes) {
    if (slots_[slot] == 0 || keys_[slots_[slot] - 1].name == name) return slot;
    slot = (slot + 1) & (slots_.size() - 1);
  }
  return std::nullopt;
}

Calls::Key* Calls::find_key(std::string_view name) {
  const std::optional<std::size_t> slot = find_slot(name);
  return !slot || slots_[*slot] == 0 ? nullptr : &keys_[slots_[*slot] - 1];
}

bool Calls::may_read(std::uint64_t bytes) {
  if (bytes > bytes_left_) return false;
  bytes_left_ -= bytes;
  return true;
}

// ---- Names ----

Value Calls::find_global(std::string_view module, std::string_view name) {
  const auto place = [&](Kind kind, std::uint16_t detail) {
    // REQUIRES: `name` lies in the stream.
    return Value{kind, false, detail, static_cast<std::uint32_t>(name.size()),
                 static_cast<std::uint64_t>(name.data() - graph_.stream.data())};
  };
  if (!may_read(module.size() + name.size())) return graph_.opaque();
  if (module == "__builtin__") module = "builtins";  // as Python 2, and protocol 2, have it
  if (module == "torch.storage" && name == "UntypedStorage")
    return place(Kind::kStorageClass, static_cast<std::uint16_t>(DType::kUInt8));
  if (module == "torch" || module == "torch.cuda") {
    for (const StorageClass& known : kStorageClasses) {
      if (known.name == name)
        return place(Kind::kStorageClass, static_cast<std::uint16_t>(known.dtype));
    }
  }
  if (module == "torch") {
    const DTypeInfo* info = find_dtype_named(name);
    if (info != nullptr) return place(Kind::kDType, static_cast<std::uint16_t>(info->dtype));
    if (contains(kQuantizedDTypes, name)) return place(Kind::kDType, 0);
  }
  for (const Global& known : kGlobals) {
    if (known.name == name && known.module == module)
      return place(Kind::kGlobal, static_cast<std::uint16_t>(known.callable));
  }
  graph_.globals.push_back(std::string(module) + '.' + std::string(name));
  return graph_.opaque();
}

// ---- Calls ----

Value Calls::call(const Value& function, const Value& arguments) {
  if (function.kind != Kind::kGlobal || arguments.kind != Kind::kTuple) return graph_.opaque();
  const Container& tuple = graph_.container(arguments);
  const Value* first = graph_.begin(tuple);
  const std::size_t count = tuple.count;
  switch (static_cast<Callable>(function.detail)) {
    case Callable::kOrderedDict:
      if (count != 0) break;
      return {Kind::kOrderedDict, false, 0, 0, graph_.add_container(nullptr, 0)};
    case Callable::kEncode:
      return encode_bytes(first, count);
    case Callable::kSet:
      return make_set(first, count);
    case Callable::kByteArray:
      return make_bytearray(first, count);
    case Callable::kComplex:
      if (count != 2 || first[0].kind != Kind::kFloat || first[1].kind != Kind::kFloat) break;
      return {Kind::kComplex, false, 0, 0, arguments.number};
    case Callable::kSize:
      return make_size(first, count);
    case Callable::kDevice:
      return make_device(first, count);
    case Callable::kGetLayout:
      return find_layout(first, count);
    case Callable::kRebuildTensor:
      return rebuild_tensor(first, count);
    case Callable::kRebuildTensorV2:
      return rebuild_tensor_with_flags(first, count, false);
    case Callable::kRebuildTensorV3:
      return rebuild_tensor_with_flags(first, count, true);
    case Callable::kRebuildParameter:
      return rebuild_parameter(first, count);
    case Callable::kRebuildMetaTensor:
      return rebuild_meta_tensor(first, count);
  }
  return graph_.opaque();
}

// How protocol 2 writes bytes: as a text of as many characters.
Value Calls::encode_bytes(const Value* arguments, std::size_t count) {
  const bool is_known = count == 2 && arguments[0].kind == Kind::kStr &&
                        may_read(arguments[0].bytes) && is_latin1(graph_.text(arguments[0])) &&
                        (is_text(arguments[1], "latin1") || is_text(arguments[1], "latin-1"));
  if (!is_known) return graph_.opaque();
  return {Kind::kLatin1, false, 0, arguments[0].bytes, arguments[0].number};
}

Value Calls::make_bytearray(const Value* arguments, std::size_t count) {
  Value bytes{Kind::kBytes};
  if (count == 2) {
    bytes = encode_bytes(arguments, count);  // older releases of Python
  } else if (count == 1) {
    bytes = arguments[0];
  }
  if (count > 2 || (bytes.kind != Kind::kBytes && bytes.kind != Kind::kLatin1))
    return graph_.opaque();
  return {Kind::kByteArray, false, 0, 0, graph_.add_container(&bytes, 1)};
}

Value Calls::make_set(const Value* arguments, std::size_t count) {
  if (count == 0) return {Kind::kSet, false, 0, 0, graph_.add_container(nullptr, 0)};
  if (count != 1 || arguments[0].kind != Kind::kList) return graph_.opaque();
  Container& list = graph_.containers[arguments[0].number];
  if (list.is_used_up) return graph_.opaque();
  list.is_used_up = true;
  const std::uint32_t number = graph_.add_container(nullptr, 0);
  Container& set = graph_.containers[number];
  const Container& elements = graph_.containers[arguments[0].number];
  set.first = elements.first;
  set.count = set.capacity = elements.count;
  return {Kind::kSet, false, 0, 0, number};
}

Value Calls::make_size(const Value* arguments, std::size_t count) {
  if (count != 1 || arguments[0].kind != Kind::kTuple) return graph_.opaque();
  const Container& sizes = graph_.container(arguments[0]);
  // torch keeps no longer ones: a tensor's rank is at most this.
  if (sizes.count > kRankMax || !std::all_of(graph_.begin(sizes), graph_.end(sizes), is_number))
    return graph_.opaque();
  return {Kind::kSize, false, 0, 0, arguments[0].number};
}

Value Calls::make_device(const Value* arguments, std::size_t count) {
  const bool is_known =
      (count == 1 || count == 2) && arguments[0].kind == Kind::kStr &&
      contains(kDeviceTypes, graph_.text(arguments[0])) &&
      (count == 1 || (is_number(arguments[1]) && arguments[1].number <= kDeviceIndexMax));
  if (!is_known) return graph_.opaque();
  Value device = arguments[0];
  device.kind = Kind::kDevice;
  device.detail = static_cast<std::uint16_t>(count == 1 ? 0 : arguments[1].number + 1);
  return device;
}

Value Calls::find_layout(const Value* arguments, std::size_t count) {
  if (count != 1 || arguments[0].kind != Kind::kStr ||
      !contains(kLayouts, graph_.text(arguments[0]))) {
    return graph_.opaque();
  }
  Value layout = arguments[0];
  layout.kind = Kind::kLayout;
  return layout;
}

// ---- Storages ----

Value Calls::find_storage(const Value& id) {
  if (id.kind != Kind::kTuple || graph_.container(id).count != 5) return graph_.opaque();
  const Value* parts = graph_.begin(graph_.container(id));
  const Value& type = parts[1];
  const Value& location = parts[3];
  const bool is_known = is_text(parts[0], "storage") && type.kind == Kind::kStorageClass &&
                        is_plain_text(parts[2]) && is_plain_text(location) && is_number(parts[4]);
  Key* key = is_known && may_read(parts[2].bytes) ? find_key(graph_.text(parts[2])) : nullptr;
  if (key == nullptr || !holds(*key, type.detail, parts[4].number)) return graph_.opaque();
  // The first id decides what torch makes of the others.
  if (key->dtype == 0) {
    key->dtype = type.detail;
    key->location = graph_.text(location);
    key->is_usable = set_device(by_key_.tensors[key->tensor].storage, key->location);
  }
  if (!key->is_usable || key->dtype != type.detail || key->location != graph_.text(location))
    return graph_.opaque();
  return {Kind::kStorage, false, type.detail, 0, key->tensor};
}

bool Calls::is_text(const Value& value, std::string_view text) const {
  return value.kind == Kind::kStr && graph_.text(value) == text;
}

bool Calls::is_plain_text(const Value& value) {
  return value.kind == Kind::kStr && !value.has_surrogates;
}

// Whether the key is all bytes of a storage of so many items.
bool Calls::holds(const Key& key, std::uint16_t dtype, std::uint64_t numel) const {
  const TensorRecord& tensor = by_key_.tensors[key.tensor];
  const Strided bytes = by_key_.view(tensor);
  const auto count = static_cast<std::uint64_t>(tensor.rank == 1 ? bytes.shape[0] : 0);
  const std::uint64_t item_bytes = find_dtype(dtype)->item_bytes;
  return tensor.dtype == static_cast<std::uint16_t>(DType::kUInt8) && tensor.rank == 1 &&
         tensor.flags == 0 && (count <= 1 || bytes.stride[0] == 1) && count % item_bytes == 0 &&
         count / item_bytes == numel &&
         (by_key_.storages[tensor.storage].flags & kStorageHasNoData) == 0;
}

// False: the storage is on another device already, or the name is none that a file can hold.
bool Calls::set_device(std::uint32_t storage, std::string_view name) {
  std::vector<std::string>& devices = graph_.devices;
  const auto found = std::find(devices.begin(), devices.end(), name);
  const auto number = static_cast<std::uint16_t>(found - devices.begin());
  std::uint16_t& own = graph_.storage_devices[storage];
  if (own != UINT16_MAX) return own == number;
  if (found == devices.end()) {
    const bool is_name = !name.empty() && name.size() <= kDeviceNameBytes && name != kMeta &&
                         name.find('\0') == std::string_view::npos;
    if (!is_name || devices.size() == kDevicesMax) return false;
    devices.emplace_back(name);
  }
  own = number;
  return true;
}

// ---- Tensors ----

Value Calls::add_tensor(const TensorView& view) {
  graph_.tensors.push_back(view);
  return {Kind::kTensor, false, 0, 0, graph_.tensors.size() - 1};
}

// (storage, offset, shape, stride)
Value Calls::rebuild_tensor(const Value* arguments, std::size_t count) {
  if (count != 4) return graph_.opaque();
  const std::optional<TensorView> view = view_storage(arguments, arguments[0].detail);
  return view ? add_tensor(*view) : graph_.opaque();
}

// (storage, offset, shape, stride, requires_grad, hooks[, dtype][, bits])
Value Calls::rebuild_tensor_with_flags(const Value* arguments, std::size_t count, bool has_dtype) {
  const std::size_t least = has_dtype ? 7 : 6;
  if (count < least || count > least + 1) return graph_.opaque();
  if (has_dtype && arguments[6].kind != Kind::kDType) return graph_.opaque();
  std::optional<TensorView> view = view_storage(arguments, arguments[has_dtype ? 6 : 0].detail);
  const bool is_known = view && set_requires_grad(*view, arguments[4]) &&
                        (count == least || set_bits(*view, arguments[least])) &&
                        take_hooks(arguments[5]);
  return is_known ? add_tensor(*view) : graph_.opaque();
}

// (tensor, requires_grad, hooks)
Value Calls::rebuild_parameter(const Value* arguments, std::size_t count) {
  if (count != 3 || arguments[0].kind != Kind::kTensor) return graph_.opaque();
  TensorView view = graph_.tensors[arguments[0].number];
  view.flags &= kTensorIsConj | kTensorIsNeg;
  view.flags |= kTensorIsParameter;
  const bool is_known =
      !view.is_opaque && set_requires_grad(view, arguments[1]) && take_hooks(arguments[2]);
  return is_known ? add_tensor(view) : graph_.opaque();
}

// (dtype, shape, stride, requires_grad)
Value Calls::rebuild_meta_tensor(const Value* arguments, std::size_t count) {
  if (count != 4 || arguments[0].kind != Kind::kDType || arguments[0].detail == 0)
    return graph_.opaque();
  TensorView view;
  view.dtype = arguments[0].detail;
  const std::optional<std::uint64_t> bytes = set_dims(view, arguments[1], arguments[2]);
  if (!bytes || !set_requires_grad(view, arguments[3])) return graph_.opaque();
  view.meta_storage = static_cast<std::uint32_t>(graph_.meta_storages.size());
  graph_.meta_storages.push_back(*bytes);
  return add_tensor(view);
}

// The view of (storage, offset, shape, stride) as items of a dtype; nothing: it does not fit.
std::optional<TensorView> Calls::view_storage(const Value* arguments, std::uint16_t dtype) const {
  if (arguments[0].kind != Kind::kStorage || dtype == 0 || !is_number(arguments[1]))
    return std::nullopt;
  const TensorRecord& key = by_key_.tensors[arguments[0].number];
  TensorView view;
  view.dtype = dtype;
  view.storage = key.storage;
  const std::optional<std::uint64_t> extent = set_dims(view, arguments[2], arguments[3]);
  const std::uint64_t item_bytes = find_dtype(dtype)->item_bytes;
  const auto bytes = static_cast<std::uint64_t>(by_key_.view(key).shape[0]);
  const std::uint64_t offset = arguments[1].number;
  if (!extent || offset > bytes / item_bytes || *extent > bytes - offset * item_bytes ||
      key.storage_offset % item_bytes != 0) {
    return std::nullopt;
  }
  view.storage_offset = key.storage_offset / item_bytes + offset;
  return view;
}

// How many bytes the view reaches over; nothing: these are no dims of a tensor.
std::optional<std::uint64_t> Calls::set_dims(TensorView& view, const Value& shape,
                                             const Value& stride) const {
  const auto is_dims = [](const Value& value) {
    return value.kind == Kind::kTuple || value.kind == Kind::kSize;
  };
  if (!is_dims(shape) || !is_dims(stride)) return std::nullopt;
  const Container& sizes = graph_.container(shape);
  const Container& steps = graph_.container(stride);
  if (sizes.count > kRankMax || sizes.count != steps.count) return std::nullopt;
  std::int64_t dims[2][kRankMax];
  for (std::uint32_t d = 0; d < sizes.count; ++d) {
    const Value& size = graph_.begin(sizes)[d];
    const Value& step = graph_.begin(steps)[d];
    if (!is_number(size) || !is_number(step)) return std::nullopt;
    dims[0][d] = static_cast<std::int64_t>(size.number);
    dims[1][d] = static_cast<std::int64_t>(step.number);
  }
  view.rank = sizes.count;
  view.shape = static_cast<std::uint32_t>(shape.number);
  view.stride = static_cast<std::uint32_t>(stride.number);
  return extent_bytes({find_dtype(view.dtype)->item_bytes, view.rank, dims[0], dims[1]});
}

bool Calls::set_requires_grad(TensorView& view, const Value& value) {
  if (value.kind != Kind::kBool || (is_true(value) && !can_require_grad(view.dtype))) return false;
  if (is_true(value)) view.flags |= kTensorRequiresGrad;
  return true;
}

// None or a dict of names of bits that are set.
bool Calls::set_bits(TensorView& view, const Value& bits) const {
  if (bits.kind == Kind::kNone) return true;
  if (bits.kind != Kind::kDict) return false;
  const Container& dict = graph_.container(bits);
  for (const Value* item = graph_.begin(dict); item != graph_.end(dict); item += 2) {
    const bool is_conj = is_text(item[0], "conj") && is_complex(view.dtype);
    if (!(is_conj || is_text(item[0], "neg")) || !is_true(item[1])) return false;
    view.flags |= is_conj ? kTensorIsConj : kTensorIsNeg;
  }
  return true;
}

// Hooks are not kept; torch writes an empty OrderedDict, which must stay so.
bool Calls::take_hooks(const Value& hooks) {
  if (hooks.kind != Kind::kOrderedDict) return false;
  Container& dict = graph_.containers[hooks.number];
  if (dict.count != 0 || dict.attributes != 0) return false;
  dict.is_used_up = true;
  return true;
}

// ---- States ----

void Calls::set_state(const Value& object, const Value& state) {
  Container* attributes = state.kind == Kind::kDict ? &graph_.containers[state.number] : nullptr;
  if (object.kind == Kind::kOrderedDict && attributes != nullptr && !attributes->is_used_up) {
    Container& dict = graph_.containers[object.number];
    if (dict.attributes == 0 && !dict.is_used_up) {
      dict.attributes = static_cast<std::uint32_t>(state.number);
      attributes->is_used_up = true;
      return;
    }
  }
  if (object.kind == Kind::kTensor) graph_.tensors[object.number].is_opaque = true;
  if (object.kind < Kind::kTensor) graph_.has_tree = false;
  graph_.is_plain = false;
}

}  // namespace fastsd
