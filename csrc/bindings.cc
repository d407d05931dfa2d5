// The Python face of the native core, fastsd._core: registration only. The GIL is released around
// all reading and writing, and Ctrl-C is honoured during it. _core.pyi documents what is registered
// here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "checksum.h"
#include "cuda/direct_storage.h"
#include "cuda/driver.h"
#include "cuda/ring.h"
#include "cuda/upload.h"
#include "dtype.h"
#include "error.h"
#include "file.h"
#include "format.h"
#include "fsd_layout.h"
#include "json.h"
#include "nesting.h"
#include "plan.h"
#include "reader.h"
#include "safetensors_layout.h"
#include "tensor.h"
#include "torch_pickle.h"
#include "workers.h"
#include "writer.h"
#include "zip_layout.h"

namespace py = pybind11;

namespace fastsd {
namespace {

// ---- Errors ----

const char* error_class(Failure kind) {
  switch (kind) {
    case Failure::kVersion:
      return "VersionError";
    case Failure::kTruncated:
      return "TruncatedError";
    case Failure::kLimit:
      return "LimitError";
    case Failure::kUnsupported:
      return "UnsupportedError";
    case Failure::kDevice:
      return "DeviceError";
    default:
      return "FormatError";
  }
}

// Paths are bytes here; in Python they are str, as os.fsdecode makes them.
py::object decode_path(const std::string& path) {
  return py::reinterpret_steal<py::object>(
      PyUnicode_DecodeFSDefaultAndSize(path.data(), static_cast<Py_ssize_t>(path.size())));
}

void raise(const Error& error) {
  // The handler of the signal has already set the exception to raise.
  if (PyErr_Occurred() != nullptr) return;
  if (error.kind == Failure::kSystem) {
    const py::object type = py::reinterpret_borrow<py::object>(PyExc_OSError);
    // OSError chooses its subclass (FileNotFoundError, ...) by errno.
    const py::object value = error.path.empty()
                                 ? type(error.system_errno, error.what())
                                 : type(error.system_errno, error.what(), decode_path(error.path));
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(value.ptr())), value.ptr());
    return;
  }
  const py::object type = py::module_::import("fastsd.errors").attr(error_class(error.kind));
  const py::object value = type(error.what(), py::arg("path") = decode_path(error.path));
  PyErr_SetObject(type.ptr(), value.ptr());
}

// Called from native code without the GIL.
bool check_signals() {
  const py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

// Also tells `on_done`, unless that is None, how many bytes are done. What it raises stands, and is
// a reason to stop.
Interrupt check_signals_and_tell(const py::object& on_done,
                                 const std::atomic<std::uint64_t>& done) {
  if (on_done.is_none()) return check_signals;
  return [&on_done, &done] {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) return true;
    try {
      on_done(done.load());
      return false;
    } catch (py::error_already_set& error) {
      error.restore();
      return true;
    }
  };
}

// ---- Saving ----

// A GPU by its ordinal, and the handle of the stream that its memory belongs to.
using Place = std::pair<int, std::uintptr_t>;

// A view that Python describes: (address or None for a meta tensor, dtype number, shape, stride,
// flags, device number, identity, the GPU that it lies on).
using Described = std::tuple<std::optional<std::uintptr_t>, std::uint16_t,
                             std::vector<std::int64_t>, std::vector<std::int64_t>, std::uint16_t,
                             std::uint16_t, std::uintptr_t, std::optional<Place>>;

void add_described(Plan& plan, std::string_view name, const Described& described) {
  const auto& [address, dtype, shape, stride, flags, device, identity, place] = described;
  if (find_dtype(dtype) == nullptr || shape.size() != stride.size())
    throw py::value_error("bad description of tensor " + std::string(name));
  std::vector<std::int64_t> dims(shape);
  dims.insert(dims.end(), stride.begin(), stride.end());
  const auto pointer = [](std::uintptr_t number) {
    return reinterpret_cast<const std::byte*>(number);  // NOLINT(performance-no-int-to-ptr)
  };
  plan.add(
      {name, pointer(address.value_or(0)), DType{dtype}, flags, device, !address, pointer(identity),
       static_cast<std::uint32_t>(shape.size()), place ? place->first : kHost},
      dims.data());
}

template <class Places>
cuda::Streams streams_of(const Places& places) {
  cuda::Streams streams;
  for (const auto& [gpu, handle] : places)
    streams.emplace_back(
        gpu, reinterpret_cast<cuda::StreamHandle>(handle));  // NOLINT(performance-no-int-to-ptr)
  return streams;
}

std::string_view utf8(const py::handle& text) {
  Py_ssize_t bytes = 0;
  const char* data = PyUnicode_AsUTF8AndSize(text.ptr(), &bytes);
  if (data == nullptr) throw py::error_already_set();
  return {data, static_cast<std::size_t>(bytes)};
}

// A file and the memory that it is mapped to, from which what lies there can be read.
class MappedFile {
 public:
  MappedFile(const File& file, std::shared_ptr<Memory> memory, std::uint64_t bytes)
      : file_(file.descriptor(), file.name(), file.begin()),
        memory_(std::move(memory)),
        bytes_(bytes) {}

  Span<std::byte> memory() const { return {memory_->data(), bytes_}; }
  const File& file() const { return file_; }

  void read(std::uint64_t begin, const py::buffer& buffer) const {
    const py::buffer_info target = buffer.request(/*writable=*/true);
    const auto bytes = static_cast<std::uint64_t>(target.size * target.itemsize);
    const py::gil_scoped_release no_gil;
    file_.read_at(target.ptr, bytes, begin);
  }

  py::object tensor() const {
    const auto shape = static_cast<std::int64_t>(bytes_);
    const std::int64_t stride = 1;
    const DTypeInfo& uint8 = *find_dtype(static_cast<std::uint16_t>(DType::kUInt8));
    PyObject* tensor = make_tensor({memory_->data(), memory_}, uint8, 1, &shape, &stride);
    if (tensor == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(tensor);
  }

 private:
  File file_;
  std::shared_ptr<Memory> memory_;
  std::uint64_t bytes_;
};

std::unique_ptr<MappedFile> map_descriptor(int descriptor, const std::string& name) {
  const File file(descriptor, name, 0);
  return std::make_unique<MappedFile>(file, Memory::map(file, file.bytes()), file.bytes());
}

// A plan with the tensors whose memory it writes.
class TensorPlan {
 public:
  TensorPlan(const py::list& names, const py::list& tensors, const py::function& describe)
      : tensors_(tensors), describe_(describe) {
    if (names.size() != tensors.size()) throw py::value_error("as many names as tensors");
    plan_.reserve(names.size());
    std::vector<std::int64_t> dims;
    bool has_refused = false;
    constexpr std::size_t prefetch_distance = 16;
    for (std::size_t i = 0; i < names.size(); ++i) {
      if (i + prefetch_distance < tensors.size())
        __builtin_prefetch(PyList_GET_ITEM(tensors.ptr(), i + prefetch_distance));
      const py::handle tensor = PyList_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i));
      const std::string_view name = utf8(PyList_GET_ITEM(names.ptr(), static_cast<Py_ssize_t>(i)));
      PlainTensor plain{};
      if (!describe_plain(tensor.ptr(), &has_refused, &plain)) {
        const auto described =
            describe(py::str(name.data(), name.size()), tensor).cast<Described>();
        add_described(plan_, name, described);
        const std::optional<Place>& place = std::get<std::optional<Place>>(described);
        if (place) places_.insert(*place);
        continue;
      }
      dims.assign(plain.shape, plain.shape + plain.rank);
      dims.insert(dims.end(), plain.stride, plain.stride + plain.rank);
      plan_.add(
          {name, plain.data, plain.dtype->dtype, 0, 0, false, tensor.ptr(), plain.rank, kHost},
          dims.data());
    }
  }

  void finish(std::uint32_t file_flags, std::vector<std::string> devices,
              const std::vector<std::pair<std::uint32_t, std::string>>& sections) {
    FsdLayout::Sections own;
    for (const auto& [kind, bytes] : sections) own.emplace_back(Section{kind}, bytes);
    plan_.finish();
    layout_ = std::make_unique<FsdLayout>(std::move(plan_), file_flags, std::move(devices),
                                          std::move(own));
  }

  void finish_zip(std::string archive, const ZipLayout::Records& records,
                  std::uint64_t align_bytes) {
    plan_.finish_apart();
    layout_ =
        std::make_unique<ZipLayout>(std::move(plan_), std::move(archive), records, align_bytes);
  }

  // The two steps of safetensors: the metadata say which tensors share a storage.
  std::vector<std::vector<std::uint32_t>> find_shared() {
    plan_.finish_apart_by_width();
    return plan_.overlaps();
  }

  std::vector<std::pair<std::size_t, std::size_t>> tied() const {
    std::vector<std::pair<std::size_t, std::size_t>> found;
    const Index index = layout_ ? layout_->plan().index() : plan_.index();
    std::vector<std::size_t> firsts(index.storages.size(), SIZE_MAX);
    for (std::size_t i = 0; i < index.tensors.size(); ++i) {
      std::size_t& first = firsts[index.tensors[i].storage];
      if (first == SIZE_MAX) {
        first = i;
      } else {
        found.emplace_back(i, first);
      }
    }
    return found;
  }

  void finish_safetensors(const std::string& metadata) {
    layout_ = std::make_unique<SafetensorsLayout>(std::move(plan_), metadata);
  }

  std::unique_ptr<AtomicFile> write(const std::string& path, bool durable, bool checksum,
                                    const std::vector<const MappedFile*>& mapped,
                                    const py::object& on_written) {
    std::atomic<std::uint64_t> written{0};
    const WriteOptions options{durable, checksum, sources(mapped), &written};
    const Interrupt poll = check_signals_and_tell(on_written, written);
    const py::gil_scoped_release no_gil;
    return prepare_file(path, *layout_, options, poll);
  }

  bool reads_from(int descriptor, std::uint64_t offset) const {
    const Plan& plan = layout_->plan();
    const std::vector<Mapped> mappings = find_mappings(descriptor, offset);
    for (std::size_t i = 0; i < plan.storages().size() && !mappings.empty(); ++i) {
      if (stored_bytes(plan.storages()[i]) == 0) continue;
      const Span<std::byte> source = plan.source(i, 0, plan.storages()[i].bytes);
      for (const Mapped& mapped : mappings)
        if (source.begin() < mapped.end && mapped.begin < source.end()) return true;
    }
    return false;
  }

  void prepare(bool checksum, const std::vector<const MappedFile*>& mapped) {
    const WriteOptions options{false, checksum, sources(mapped)};
    const py::gil_scoped_release no_gil;
    checksum_storages(*layout_, options, check_signals);
    content_.emplace(*layout_, options.sources);
  }

  void gather_into(std::uint64_t begin, const py::buffer& buffer) {
    const py::buffer_info target = buffer.request(/*writable=*/true);
    const auto bytes = static_cast<std::uint64_t>(target.size * target.itemsize);
    if (begin > layout_->file_bytes() || bytes > layout_->file_bytes() - begin)
      throw py::value_error("range outside the file");
    const py::gil_scoped_release no_gil;
    content_.value().gather(begin, begin + bytes, static_cast<std::byte*>(target.ptr));
  }

  std::uint64_t file_bytes() const { return layout_->file_bytes(); }

 private:
  Sources sources(const std::vector<const MappedFile*>& files) const {
    Mappings mappings;
    for (const MappedFile* file : files) mappings.push_back({file->memory(), &file->file()});
    std::sort(mappings.begin(), mappings.end(), [](const Mapping& a, const Mapping& b) {
      return a.memory.begin() < b.memory.begin();
    });
    return {std::move(mappings), streams_of(places_)};
  }

  py::list tensors_;
  py::function describe_;                 // keeps the copies that it has made
  std::map<int, std::uintptr_t> places_;  // the GPUs that tensors lie on, and their streams
  Plan plan_;                             // until it is laid out
  std::unique_ptr<Layout> layout_;
  std::optional<Content> content_;
};

// ---- Loading ----

py::tuple tensor_record(const Index& index, std::size_t i) {
  if (i >= index.tensors.size()) throw py::index_error("tensor " + std::to_string(i));
  const TensorRecord& tensor = index.tensors[i];
  const Strided view = index.view(tensor);
  py::tuple shape(view.rank);
  py::tuple stride(view.rank);
  for (std::uint32_t d = 0; d < view.rank; ++d) {
    shape[d] = view.shape[d];
    stride[d] = view.stride[d];
  }
  return py::make_tuple(tensor.dtype, shape, stride, tensor.storage, tensor.storage_offset,
                        tensor.flags, tensor.same_as);
}

py::tuple storage_record(const Reader& reader, std::size_t i) {
  const Index& index = reader.index();
  if (i >= index.storages.size()) throw py::index_error("storage " + std::to_string(i));
  const StorageRecord& storage = index.storages[i];
  const bool has_checksum = (storage.flags & kStorageHasChecksum) != 0;
  return py::make_tuple(reader.file().begin() + storage.offset, storage.bytes,
                        has_checksum ? py::object(py::int_(storage.crc32c)) : py::none(),
                        reader.object().devices()[storage.device],
                        (storage.flags & kStorageHasNoData) != 0);
}

py::list tensor_names(const Index& index) {
  py::list names;
  for (const TensorRecord& tensor : index.tensors) {
    const std::string_view name = index.name(tensor);
    names.append(py::str(name.data(), name.size()));
  }
  return names;
}

const char* container_name(const Reader& reader) {
  switch (reader.container()) {
    case Container::kSafetensors:
      return "safetensors";
    case Container::kTorch:
      return "pth";
    default:
      return "fsd";
  }
}

py::object find_section(const Reader& reader, std::uint32_t kind) {
  std::string_view bytes = reader.object().section(Section{kind});
  if (bytes.data() == nullptr) bytes = reader.header().section(Section{kind});
  if (bytes.data() == nullptr) return py::none();
  return py::bytes(bytes.data(), bytes.size());
}

// Numbers of tensors, ascending; nothing stands for all.
using Numbers = std::optional<std::vector<std::size_t>>;

std::vector<std::size_t> checked_numbers(const Index& index, Numbers&& wanted) {
  if (!wanted) {
    std::vector<std::size_t> all(index.tensors.size());
    std::iota(all.begin(), all.end(), std::size_t{0});
    return all;
  }
  std::vector<std::size_t> numbers = *std::move(wanted);
  if (std::adjacent_find(numbers.begin(), numbers.end(), std::greater_equal<>()) != numbers.end())
    throw py::value_error("numbers of tensors must ascend");
  if (!numbers.empty() && numbers.back() >= index.tensors.size())
    throw py::index_error("tensor " + std::to_string(numbers.back()));
  return numbers;
}

// Marks the storages that tensors lie in.
std::vector<bool> storages_of(const Index& index, const std::vector<std::size_t>& numbers) {
  std::vector<bool> marks(index.storages.size());
  for (const std::size_t number : numbers) marks[index.tensors[number].storage] = true;
  return marks;
}

// Marks storages by their numbers.
std::vector<bool> marks_of(const Index& index, const std::vector<std::size_t>& storages) {
  std::vector<bool> marks(index.storages.size());
  for (const std::size_t storage : storages) {
    if (storage >= marks.size()) throw py::index_error("storage " + std::to_string(storage));
    marks[storage] = true;
  }
  return marks;
}

py::tuple load(const Reader& reader, bool is_ordered, bool bases_only, Numbers wanted,
               const std::vector<std::size_t>& placed, const py::object& on_done) {
  const Index& index = reader.index();
  const std::vector<std::size_t> numbers = checked_numbers(index, std::move(wanted));
  const std::vector<bool> is_placed = marks_of(index, placed);
  std::vector<bool> is_wanted(index.storages.size());
  for (const std::size_t number : numbers) {
    const TensorRecord& tensor = index.tensors[number];
    if (!is_placed[tensor.storage] || is_host_only(tensor)) is_wanted[tensor.storage] = true;
  }
  std::vector<Bytes> bytes;
  {
    std::atomic<std::uint64_t> done{0};
    const Interrupt poll = check_signals_and_tell(on_done, done);
    const py::gil_scoped_release no_gil;
    bytes = reader.bytes_of(is_wanted, poll, &done);
  }
  LoadedTensors loaded;
  if (!load_tensors(index, numbers, bytes, is_placed, is_ordered, bases_only, &loaded))
    throw py::error_already_set();
  return py::make_tuple(py::reinterpret_steal<py::dict>(loaded.by_name),
                        py::reinterpret_steal<py::list>(loaded.rest),
                        py::reinterpret_steal<py::dict>(loaded.bases));
}

// Those that tensors lie in which may be put elsewhere than in host memory, each with its number.
py::list list_storages(const Reader& reader, Numbers wanted) {
  const Index& index = reader.index();
  std::vector<bool> is_wanted(index.storages.size());
  for (const std::size_t number : checked_numbers(index, std::move(wanted))) {
    const TensorRecord& tensor = index.tensors[number];
    const bool has_data = (index.storages[tensor.storage].flags & kStorageHasNoData) == 0;
    if (has_data && !is_host_only(tensor)) is_wanted[tensor.storage] = true;
  }
  py::list storages;
  for (std::size_t i = 0; i < is_wanted.size(); ++i)
    if (is_wanted[i]) storages.append(py::make_tuple(i, storage_record(reader, i)));
  return storages;
}

py::dict load_keyed_storages(const Reader& reader) {
  std::vector<Bytes> bytes;
  {
    const py::gil_scoped_release no_gil;
    const std::vector<bool> all(reader.index().storages.size(), true);
    bytes = reader.bytes_of(all, check_signals);
  }
  PyObject* storages = load_storages(reader.header().index(), bytes);
  if (storages == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::dict>(storages);
}

py::dict storage_places(const Reader& reader) {
  const Index& by_key = reader.header().index();
  py::dict places;
  for (const TensorRecord& tensor : by_key.tensors) {
    if (!is_stored_storage(by_key, tensor)) continue;
    const std::uint64_t offset =
        reader.file().begin() + by_key.storages[tensor.storage].offset + tensor.storage_offset;
    const std::string_view key = by_key.name(tensor);
    places[py::str(key.data(), key.size())] =
        py::make_tuple(offset, by_key.dims[tensor.dims_offset]);
  }
  return places;
}

py::object load_base(const Reader& reader, std::size_t storage, std::uint64_t begin,
                     std::uint64_t end) {
  const Index& index = reader.index();
  if (storage >= index.storages.size() || begin > end ||
      end > stored_bytes(index.storages[storage])) {
    throw py::index_error("bytes outside storage " + std::to_string(storage));
  }
  Bytes bytes;
  {
    const py::gil_scoped_release no_gil;
    bytes = reader.bytes(storage, begin, end, check_signals);
  }
  const auto shape = static_cast<std::int64_t>(end - begin);
  const std::int64_t stride = 1;
  const DTypeInfo& uint8 = *find_dtype(static_cast<std::uint16_t>(DType::kUInt8));
  PyObject* base = make_tensor(bytes, uint8, 1, &shape, &stride);
  if (base == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(base);
}

// ---- Reading to addresses ----

// Offsets are those of the file, wherever the archive starts. Throws ValueError for what is not
// within it.
std::uint64_t checked_offset(const Reader& reader, std::uint64_t offset, std::uint64_t bytes) {
  const std::uint64_t begin = reader.file().begin();
  const std::uint64_t file_bytes = reader.header().preamble().file_bytes;
  if (offset < begin || offset - begin > file_bytes || bytes > file_bytes - (offset - begin))
    throw py::value_error("a transfer outside the archive");
  return offset - begin;
}

void check_ascending(std::uint64_t end, std::uint64_t offset) {
  if (offset < end) throw py::value_error("transfers must ascend, and not overlap");
}

using HostTransfer = std::tuple<std::uint64_t, std::uint64_t, std::uintptr_t>;

void read_transfers(const Reader& reader, const std::vector<HostTransfer>& transfers,
                    const py::object& on_done) {
  std::vector<File::Piece> pieces;
  pieces.reserve(transfers.size());
  std::uint64_t end = 0;
  for (const auto& [offset, bytes, address] : transfers) {
    check_ascending(end, offset);
    end = offset + bytes;
    pieces.push_back({reinterpret_cast<std::byte*>(address),  // NOLINT(performance-no-int-to-ptr)
                      bytes, checked_offset(reader, offset, bytes)});
  }
  std::atomic<std::uint64_t> done{0};
  const Interrupt poll = check_signals_and_tell(on_done, done);
  const py::gil_scoped_release no_gil;
  reader.read(pieces, poll, &done);
}

// (offset, bytes, GPU, address)
using GpuTransfer = std::tuple<std::uint64_t, std::uint64_t, int, cuda::Address>;

std::vector<std::uint32_t> upload_transfers(
    const Reader& reader, const std::vector<GpuTransfer>& transfers,
    const std::vector<std::pair<int, std::uintptr_t>>& streams, bool checksums, bool direct_storage,
    const py::object& on_done) {
  std::vector<cuda::Transfer> uploads;
  uploads.reserve(transfers.size());
  std::uint64_t end = 0;
  for (const auto& [offset, bytes, gpu, address] : transfers) {
    check_ascending(end, offset);
    end = offset + bytes;
    uploads.push_back({checked_offset(reader, offset, bytes), bytes, gpu, address});
  }
  std::atomic<std::uint64_t> done{0};
  cuda::UploadOptions options;
  options.streams = streams_of(streams);
  if (checksums) options.checksum = &reader.checksum();
  options.done = &done;
  options.direct_storage = direct_storage;
  const Interrupt poll = check_signals_and_tell(on_done, done);
  const py::gil_scoped_release no_gil;
  return cuda::upload(reader.file(), uploads, options, poll);
}

std::unique_ptr<Prefetch> start_prefetch(const Reader& reader, Numbers wanted) {
  const std::vector<std::size_t> numbers = checked_numbers(reader.index(), std::move(wanted));
  return std::make_unique<Prefetch>(reader, storages_of(reader.index(), numbers));
}

std::unique_ptr<MappedFile> mapped_file(const Reader& reader) {
  if (reader.mapping() == nullptr) return nullptr;
  return std::make_unique<MappedFile>(reader.file(), reader.mapping(),
                                      reader.header().preamble().file_bytes);
}

std::vector<std::size_t> find_damage(const Reader& reader,
                                     const std::vector<std::size_t>& checked) {
  const std::vector<bool> is_checked = marks_of(reader.index(), checked);
  const py::gil_scoped_release no_gil;
  return reader.find_damage(is_checked, check_signals);
}

Access access_of(std::optional<bool> mmap) {
  return !mmap ? Access::kAuto : *mmap ? Access::kMap : Access::kRead;
}

std::unique_ptr<Reader> open_reader(const std::string& path, const std::string& name,
                                    std::optional<bool> mmap) {
  const py::gil_scoped_release no_gil;
  return std::make_unique<Reader>(path, name, access_of(mmap));
}

std::unique_ptr<Reader> open_descriptor(int descriptor, const std::string& name,
                                        std::uint64_t begin, std::optional<bool> mmap) {
  const py::gil_scoped_release no_gil;
  return std::make_unique<Reader>(descriptor, name, begin, access_of(mmap));
}

// What a stream fills. Views of it keep the memory alive, whatever the stream does with them.
struct Room {
  Bytes bytes;
  std::size_t count;
};

std::unique_ptr<Reader> open_stream(const py::function& read_into, const std::string& name,
                                    std::uint64_t begin, std::optional<std::uint64_t> bytes) {
  const ReadSome read_some = [&](const Bytes& target, std::size_t room) {
    const py::memoryview view(py::cast(Room{target, room}));
    const auto got = read_into(view).cast<std::size_t>();
    if (got > room) throw py::value_error("more bytes than there is room for");
    return got;
  };
  return std::make_unique<Reader>(read_some, name, begin, bytes.value_or(UINT64_MAX));
}

// ---- Registration ----

void register_torch(py::module_& module) {
  module.def(
      "set_torch",
      [](const py::object& tensor_type, const py::object& uint8, const py::object& int8,
         const py::object& from_dlpack, const py::object& exchange) {
        const dlpack::ExchangeApi* api = find_exchange(exchange.ptr());
        if (!set_torch(tensor_type.ptr(), uint8.ptr(), int8.ptr(), from_dlpack.ptr(), api))
          throw py::error_already_set();
        return api != nullptr;
      },
      py::arg("tensor_type"), py::arg("uint8"), py::arg("int8"), py::arg("from_dlpack"),
      py::arg("exchange"));
  py::list dtypes;
  for (std::size_t i = 0; i < kDTypeCount; ++i) {
    dtypes.append(py::make_tuple(static_cast<std::uint16_t>(kDTypes[i].dtype), kDTypes[i].name,
                                 kDTypes[i].item_bytes));
  }
  module.attr("DTYPES") = py::tuple(dtypes);
}

void register_checksum(py::module_& module) {
  const auto define = [&](const char* name, const Checksum& checksum) {
    module.def(
        name,
        [checksum](const py::buffer& buffer, std::uint32_t value) {
          const py::buffer_info bytes = buffer.request();
          const py::gil_scoped_release no_gil;
          return checksum.update(value, bytes.ptr,
                                 static_cast<std::size_t>(bytes.size * bytes.itemsize));
        },
        py::arg("data"), py::arg("value") = 0);
  };
  define("crc32c", kCrc32c);
  define("crc32", kCrc32);
  module.attr("CRC32C_IMPLEMENTATION") = crc32c_implementation();
  module.attr("CRC32_IMPLEMENTATION") = crc32_implementation();
}

void register_json(py::module_& module) {
  module.def(
      "parse_json",
      [](const py::bytes& text, const py::list& tensors, const py::object& decode) {
        PyObject* value = parse_json(text.ptr(), tensors.ptr(), decode.ptr());
        if (value == nullptr) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(value);
      },
      py::arg("text"), py::arg("tensors"), py::arg("decode"));
}

void register_nesting(py::module_& module) {
  module.def(
      "find_bad_nesting",
      [](const py::bytes& stream) { return find_bad_nesting(std::string_view(stream)); },
      py::arg("stream"));
}

// The storages of a torch file, each in a record of its own.
Tables tables_by_key(const std::vector<std::pair<std::string, std::uint64_t>>& sizes) {
  Tables tables;
  for (const auto& [key, bytes] : sizes) {
    const std::int64_t dims[] = {static_cast<std::int64_t>(bytes), 1};
    tables.add_tensor(key, static_cast<std::uint16_t>(DType::kUInt8), 1, dims,
                      static_cast<std::uint32_t>(tables.storages.size()), 0);
    tables.storages.push_back({tables.file_bytes, bytes, 0, 0, 0, 0});
    tables.file_bytes += bytes;
  }
  return tables;
}

void register_torch_pickle(py::module_& module) {
  module.def(
      "read_torch_pickle",
      [](const py::bytes& stream, const std::vector<std::pair<std::string, std::uint64_t>>& sizes) {
        const Tables by_key = tables_by_key(sizes);
        const PickledObject object = read_torch_pickle(std::string_view(stream), by_key.index());
        const Tables& tables = object.tables;
        py::list records;
        for (std::size_t i = 0; i < tables.tensors.size(); ++i)
          records.append(tensor_record(tables.index(), i));
        py::list devices;
        for (const StorageRecord& storage : tables.storages)
          devices.append(tables.devices[storage.device]);
        py::dict sections;
        for (const auto& [kind, bytes] : tables.sections)
          sections[py::int_(static_cast<std::uint32_t>(kind))] = py::bytes(bytes);
        return py::make_tuple(tensor_names(tables.index()), records, devices, tables.flags,
                              sections, object.is_plain, object.globals);
      },
      py::arg("stream"), py::arg("sizes"));
}

void register_plan(py::module_& module) {
  py::class_<AtomicFile>(module, "PendingFile")
      .def("commit", &AtomicFile::commit, py::arg("durable"),
           py::call_guard<py::gil_scoped_release>());
  module.def(
      "write_bytes",
      [](const std::string& path, const std::string& bytes, bool durable) {
        auto file = std::make_unique<AtomicFile>(path);
        file->write_at(bytes.data(), bytes.size(), 0);
        file->complete(durable);
        return file;
      },
      py::arg("path"), py::arg("data"), py::arg("durable"),
      py::call_guard<py::gil_scoped_release>());
  py::class_<TensorPlan>(module, "Plan")
      .def(py::init<const py::list&, const py::list&, const py::function&>(), py::arg("names"),
           py::arg("tensors"), py::arg("describe"))
      .def("finish", &TensorPlan::finish, py::arg("file_flags"), py::arg("devices"),
           py::arg("sections"))
      .def("finish_zip", &TensorPlan::finish_zip, py::arg("archive"), py::arg("records"),
           py::arg("align_bytes"))
      .def("find_shared", &TensorPlan::find_shared)
      .def_property_readonly("tied", &TensorPlan::tied)
      .def("finish_safetensors", &TensorPlan::finish_safetensors, py::arg("metadata"))
      .def("write", &TensorPlan::write, py::arg("path"), py::arg("durable"), py::arg("checksum"),
           py::arg("mapped") = py::tuple(), py::arg("on_written") = py::none())
      .def("reads_from", &TensorPlan::reads_from, py::arg("descriptor"), py::arg("offset"))
      .def("prepare", &TensorPlan::prepare, py::arg("checksum"), py::arg("mapped") = py::tuple(),
           py::keep_alive<1, 3>())
      .def("gather", &TensorPlan::gather_into, py::arg("begin"), py::arg("target"))
      .def_property_readonly("file_bytes", &TensorPlan::file_bytes);
  module.def(
      "has_safetensors_dtype",
      [](std::uint16_t number) { return safetensors_dtype(DType{number}) != nullptr; },
      py::arg("number"));
}

void register_mapped_file(py::module_& module) {
  py::class_<MappedFile>(module, "MappedFile")
      .def(py::init(&map_descriptor), py::arg("descriptor"), py::arg("name"))
      .def_property_readonly("begin",
                             [](const MappedFile& self) {
                               return reinterpret_cast<std::uintptr_t>(self.memory().begin());
                             })
      .def_property_readonly("nbytes", [](const MappedFile& self) { return self.memory().size(); })
      .def_property_readonly("offset", [](const MappedFile& self) { return self.file().begin(); })
      .def("read", &MappedFile::read, py::arg("begin"), py::arg("target"))
      .def("drop_pages",
           [](const MappedFile& self) { drop_pages(self.memory().begin(), self.memory().size()); })
      .def("tensor", &MappedFile::tensor);
}

void register_reader(py::module_& module) {
  py::class_<Room>(module, "Room", py::buffer_protocol()).def_buffer([](const Room& room) {
    return py::buffer_info(reinterpret_cast<unsigned char*>(room.bytes.data),
                           static_cast<py::ssize_t>(room.count));
  });
  py::class_<Reader>(module, "Reader")
      .def(py::init(&open_reader), py::arg("path"), py::arg("name"), py::arg("mmap"))
      .def_static("from_descriptor", &open_descriptor, py::arg("descriptor"), py::arg("name"),
                  py::arg("begin"), py::arg("mmap"))
      .def_static("from_stream", &open_stream, py::arg("read_into"), py::arg("name"),
                  py::arg("begin"), py::arg("bytes"))
      .def_property_readonly("name",
                             [](const Reader& self) { return decode_path(self.file().name()); })
      .def_property_readonly("is_mapped",
                             [](const Reader& self) { return self.mapping() != nullptr; })
      .def_property_readonly("is_from_stream",
                             [](const Reader& self) { return self.file().memory() != nullptr; })
      .def_property_readonly("version",
                             [](const Reader& self) {
                               const Preamble& preamble = self.header().preamble();
                               return std::make_pair(preamble.version_major,
                                                     preamble.version_minor);
                             })
      .def_property_readonly("file_flags",
                             [](const Reader& self) { return self.object().preamble().flags; })
      .def_property_readonly("file_bytes",
                             [](const Reader& self) { return self.header().preamble().file_bytes; })
      .def_property_readonly(
          "header_bytes", [](const Reader& self) { return self.header().preamble().header_bytes; })
      .def_property_readonly("format", &container_name)
      .def_property_readonly("is_plain", &Reader::is_plain)
      .def_property_readonly("globals", &Reader::globals)
      .def_property_readonly("devices", [](const Reader& self) { return self.object().devices(); })
      .def_property_readonly("tensor_count",
                             [](const Reader& self) { return self.index().tensors.size(); })
      .def_property_readonly("storage_count",
                             [](const Reader& self) { return self.index().storages.size(); })
      .def("section", &find_section, py::arg("kind"))
      .def("names", [](const Reader& self) { return tensor_names(self.index()); })
      .def(
          "tensor",
          [](const Reader& self, std::size_t number) {
            return tensor_record(self.index(), number);
          },
          py::arg("number"))
      .def("storage", &storage_record, py::arg("number"))
      .def("load", &load, py::arg("is_ordered"), py::arg("bases_only"),
           py::arg("numbers") = py::none(), py::arg("placed") = py::tuple(),
           py::arg("on_done") = py::none())
      .def("storages", &list_storages, py::arg("numbers") = py::none())
      .def("read", &read_transfers, py::arg("transfers"), py::arg("on_done") = py::none())
      .def("upload", &upload_transfers, py::arg("transfers"), py::arg("streams"),
           py::arg("checksums") = false, py::arg("direct_storage") = false,
           py::arg("on_done") = py::none())
      .def("load_storages", &load_keyed_storages)
      .def("storage_places", &storage_places)
      .def("base", &load_base, py::arg("storage"), py::arg("begin"), py::arg("end"))
      .def("mapped_file", &mapped_file)
      .def("find_damage", &find_damage, py::arg("checked") = py::tuple());
  py::class_<Prefetch>(module, "Prefetch")
      .def(py::init(&start_prefetch), py::arg("reader"), py::arg("numbers") = py::none(),
           py::keep_alive<1, 2>())
      .def("stop", &Prefetch::stop, py::call_guard<py::gil_scoped_release>());
}

void register_cuda(py::module_& module) {
  module.def("set_cuda_library", &cuda::Driver::set_library, py::arg("path"));
  module.def("open_direct_storage", [] { cuda::DirectStorage::open(); });
  module.def("cuda_version", [] { return cuda::Driver::open()->version(); });
  module.def("cuda_device_count", [] { return cuda::Driver::open()->device_count(); });
  module.def(
      "set_pinned_bytes_max",
      [](std::uint64_t bytes) { cuda::Ring::shared().set_bytes_max(bytes); }, py::arg("bytes"));
  module.def("pinned_bytes", [] { return cuda::Ring::shared().bytes(); });
  module.def("pinned_bytes_max", [] { return cuda::Ring::shared().bytes_max(); });
  module.def("release_pinned", [] { cuda::Ring::shared().empty(); });
}

void register_file_systems(py::module_& module) {
  module.def(
      "file_system",
      [](const std::string& path) {
        const FileSystem found = File(path).file_system();
        return std::make_pair(std::string(found.name), found.maps_well);
      },
      py::arg("path"));
}

}  // namespace
}  // namespace fastsd

PYBIND11_MODULE(_core, module) {
  py::register_exception_translator(
      [](std::exception_ptr pointer) {  // NOLINT(performance-unnecessary-value-param):
                                        // pybind11's type
        try {
          if (pointer) std::rethrow_exception(pointer);
        } catch (const fastsd::Error& error) {
          fastsd::raise(error);
        }
      });
  fastsd::register_torch(module);
  fastsd::register_checksum(module);
  fastsd::register_json(module);
  fastsd::register_nesting(module);
  fastsd::register_torch_pickle(module);
  fastsd::register_mapped_file(module);
  fastsd::register_plan(module);
  fastsd::register_reader(module);
  fastsd::register_cuda(module);
  fastsd::register_file_systems(module);
}
