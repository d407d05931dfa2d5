#include "format.h"

#include <algorithm>
#include <cstring>

#include "checksum.h"
#include "dtype.h"
#include "error.h"
#include "unique.h"
#include "utf8.h"

namespace fastsd {
namespace {

std::string number(std::uint64_t value) { return std::to_string(value); }

[[noreturn]] void reject(const std::string& detail) { throw Error(Failure::kFormat, detail); }
[[noreturn]] void exceed(const std::string& what, std::uint64_t value, std::uint64_t limit) {
  throw Error(Failure::kLimit,
              what + " is " + number(value) + ", more than the format's limit of " + number(limit));
}

[[noreturn]] void refuse_unknown(const std::string& record) {
  throw Error(Failure::kVersion, record + " has flags or fields that this release does not know");
}

const char* section_name(std::uint32_t kind) {
  constexpr const char* names[] = {"storages", "tensors",        "dims",     "names", "devices",
                                   "tree",     "state_metadata", "metadata", "pickle"};
  return kind >= 1 && kind <= std::size(names) ? names[kind - 1] : "unknown";
}

// ---- Validation ----

void check_section(const SectionRecord& section, std::uint64_t position, std::uint32_t previous,
                   std::uint64_t header_bytes) {
  const std::string label =
      std::string("section ") + number(section.kind) + " (" + section_name(section.kind) + ")";
  const bool is_known = section.kind >= 1 && section.kind <= std::uint32_t(Section::kPickle);
  if (section.kind <= previous)
    reject(label + " follows section " + number(previous) + "; kinds must ascend");
  if ((section.flags & ~kSectionFlagsKnown) != 0 ||
      (!is_known && (section.flags & kSectionRequired) != 0)) {
    throw Error(Failure::kVersion, label + " with flags " + number(section.flags) +
                                       " must be understood to read the file, and is not known to "
                                       "this release");
  }
  if (section.offset != position)
    reject(label + " starts at byte " + number(section.offset) + ", expected " + number(position));
  if (section.bytes > header_bytes - section.offset) {
    reject(label + " has " + number(section.bytes) + " bytes at " + number(section.offset) +
           ", beyond the header's " + number(header_bytes));
  }
}

void check_zeros(const unsigned char* bytes, std::uint64_t begin, std::uint64_t end) {
  for (std::uint64_t i = begin; i < end; ++i) {
    if (bytes[i] != 0) reject("byte " + number(i) + " of the header is padding and not zero");
  }
}

template <class T>
Span<T> table(std::string_view section, const char* name, std::uint64_t count_max) {
  if (section.size() % sizeof(T) != 0) {
    reject(std::string("section ") + name + " has " + number(section.size()) +
           " bytes, no multiple of " + number(sizeof(T)));
  }
  const std::size_t count = section.size() / sizeof(T);
  if (count > count_max) exceed(std::string("number of ") + name, count, count_max);
  return {reinterpret_cast<const T*>(section.data()), count};
}

std::vector<std::string> decode_devices(std::string_view section) {
  struct Name {
    char text[kDeviceNameBytes];
  };
  std::vector<std::string> devices;
  for (const Name& name : table<Name>(section, "devices", kDeviceCountMax)) {
    const auto* end = static_cast<const char*>(std::memchr(name.text, 0, kDeviceNameBytes));
    const std::string device(name.text, end == nullptr ? name.text + kDeviceNameBytes : end);
    const bool is_padded = std::all_of(name.text + device.size(), name.text + kDeviceNameBytes,
                                       [](char c) { return c == 0; });
    if (device.empty() || !is_padded || !is_utf8(device))
      reject("device " + number(devices.size()) + " is not a zero-padded UTF-8 name");
    devices.push_back(device);
  }
  return devices;
}

// Storages lie one after another without gaps but for alignment, and end where the file ends.
void check_storages(Span<StorageRecord> storages, std::size_t devices, const Preamble& preamble) {
  std::uint64_t end = preamble.header_bytes;
  for (std::size_t i = 0; i < storages.size(); ++i) {
    const StorageRecord& storage = storages[i];
    const std::string label = "storage " + number(i);
    if ((storage.flags & ~kStorageFlagsKnown) != 0 || storage.reserved != 0) refuse_unknown(label);
    if (storage.device >= devices)
      reject(label + " names device " + number(storage.device) + " of " + number(devices));
    if (storage.bytes > INT64_MAX) reject(label + " has " + number(storage.bytes) + " bytes");
    if (end > preamble.file_bytes || storage.offset != align_up(end, kStorageAlignBytes))
      reject(label + " starts at byte " + number(storage.offset) + ", expected " +
             number(align_up(end, kStorageAlignBytes)));
    const std::uint64_t bytes = stored_bytes(storage);
    if (bytes == 0) {
      if (storage.crc32c != 0) reject(label + " has a checksum but no bytes");
      continue;  // takes no place, so that the next storage is expected where this one is
    }
    if (storage.offset > preamble.file_bytes || bytes > preamble.file_bytes - storage.offset) {
      reject(label + " has " + number(bytes) + " bytes at " + number(storage.offset) +
             ", beyond the file's " + number(preamble.file_bytes));
    }
    if ((storage.flags & kStorageHasChecksum) == 0 && storage.crc32c != 0)
      reject(label + " has a checksum and no flag that says so");
    end = storage.offset + bytes;
  }
  if (end != preamble.file_bytes) {
    reject("the last storage ends at byte " + number(end) + " of a file of " +
           number(preamble.file_bytes));
  }
}

void check_view(const TensorRecord& tensor, const Index& index, const std::string& label) {
  const DTypeInfo* dtype = find_dtype(tensor.dtype);
  if (dtype == nullptr) {
    throw Error(Failure::kVersion,
                label + " has dtype number " + number(tensor.dtype) + ", unknown to this release");
  }
  const std::optional<std::uint64_t> extent = extent_bytes(index.view(tensor));
  if (!extent) reject(label + " has a negative or overflowing shape or stride");
  const std::uint64_t bytes = index.storages[tensor.storage].bytes;
  if (tensor.storage_offset > bytes / dtype->item_bytes ||
      *extent > bytes - tensor.storage_offset * dtype->item_bytes) {
    reject(label + " needs " + number(*extent) + " bytes from item " +
           number(tensor.storage_offset) + " of a storage of " + number(bytes) + " bytes");
  }
}

// That a record is the same object as an earlier one adds nothing but the name.
void check_same_as(const TensorRecord& tensor, std::size_t i, const Index& index,
                   const std::string& label) {
  if (tensor.same_as == i) return;
  if (tensor.same_as > i || index.tensors[tensor.same_as].same_as != tensor.same_as)
    reject(label + " is the same as tensor " + number(tensor.same_as) +
           ", not an earlier original");
  const TensorRecord& original = index.tensors[tensor.same_as];
  const std::int64_t* dims = index.dims.data();
  const bool is_equal = tensor.storage == original.storage &&
                        tensor.storage_offset == original.storage_offset &&
                        tensor.dtype == original.dtype && tensor.flags == original.flags &&
                        tensor.rank == original.rank &&
                        std::equal(dims + tensor.dims_offset,
                                   dims + tensor.dims_offset + 2 * std::uint64_t{tensor.rank},
                                   dims + original.dims_offset);
  if (!is_equal)
    reject(label + " differs from tensor " + number(tensor.same_as) + ", its original");
}

// Names and dimensions are used up in the order of the tensors, to the last byte. Every storage but
// those is reached by some tensor.
void check_tensors(const Index& index) {
  std::uint64_t names = 0;
  std::uint64_t dims = 0;
  std::vector<bool> is_reached(index.storages.size());
  for (std::size_t i = 0; i < index.tensors.size(); ++i) {
    const TensorRecord& tensor = index.tensors[i];
    const std::string label = "tensor " + number(i);
    if (tensor.name_bytes > kNameBytesMax)
      exceed("length of the name of " + label, tensor.name_bytes, kNameBytesMax);
    if (tensor.rank > kRankMax) exceed("rank of " + label, tensor.rank, kRankMax);
    if ((tensor.flags & ~kTensorFlagsKnown) != 0 || tensor.reserved != 0) refuse_unknown(label);
    if (tensor.name_offset != names || tensor.name_bytes > index.names.size() - names)
      reject(label + " has its name at byte " + number(tensor.name_offset) + " of " +
             number(index.names.size()) + ", expected " + number(names));
    if (tensor.dims_offset != dims || 2 * std::uint64_t{tensor.rank} > index.dims.size() - dims)
      reject(label + " has its dimensions at number " + number(tensor.dims_offset) + " of " +
             number(index.dims.size()) + ", expected " + number(dims));
    if (tensor.storage >= index.storages.size())
      reject(label + " lies in storage " + number(tensor.storage) + " of " +
             number(index.storages.size()));
    names += tensor.name_bytes;
    dims += 2 * std::uint64_t{tensor.rank};
    is_reached[tensor.storage] = true;
    if (!is_utf8(index.name(tensor))) reject("the name of " + label + " is not UTF-8");
    check_view(tensor, index, label);
    check_same_as(tensor, i, index, label);
  }
  if (names != index.names.size() || dims != index.dims.size())
    reject("the tensors account for " + number(names) + " of " + number(index.names.size()) +
           " bytes of names and " + number(dims) + " of " + number(index.dims.size()) +
           " dimensions");
  const auto unreached = std::find(is_reached.begin(), is_reached.end(), false);
  if (unreached != is_reached.end())
    reject("no tensor lies in storage " + number(std::uint64_t(unreached - is_reached.begin())));
}

// ---- Encoding ----

template <class T>
std::string_view as_bytes(Span<T> table) {
  return {reinterpret_cast<const char*>(table.data()), table.size() * sizeof(T)};
}

std::string encode_devices(const std::vector<std::string>& devices) {
  std::string section;
  for (const std::string& device : devices) {
    if (device.empty() || device.size() > kDeviceNameBytes)
      exceed("length of the device name " + device, device.size(), kDeviceNameBytes);
    section += device;
    section.resize(align_up(section.size(), kDeviceNameBytes));
  }
  return section;
}

// All sections of a header in the order of their kinds, with their bytes.
std::vector<std::pair<Section, std::string_view>> list_sections(const HeaderContent& content,
                                                                const std::string& devices) {
  std::vector<std::pair<Section, std::string_view>> sections = {
      {Section::kStorages, as_bytes(content.index.storages)},
      {Section::kTensors, as_bytes(content.index.tensors)},
      {Section::kDims, as_bytes(content.index.dims)},
      {Section::kNames, content.index.names},
      {Section::kDevices, devices},
  };
  for (const auto& [kind, bytes] : content.sections) sections.emplace_back(kind, bytes);
  std::sort(sections.begin(), sections.end(),
            [](const auto& a, const auto& b) { return a.first < b.first; });
  return sections;
}

}  // namespace

Strided Index::view(const TensorRecord& tensor) const {
  const DTypeInfo* dtype = find_dtype(tensor.dtype);
  const std::int64_t* shape = dims.data() + tensor.dims_offset;
  return {dtype == nullptr ? 1U : dtype->item_bytes, tensor.rank, shape, shape + tensor.rank};
}

bool is_stored_storage(const Index& index, const TensorRecord& tensor) {
  const bool is_bytes = tensor.dtype == static_cast<std::uint16_t>(DType::kUInt8) &&
                        tensor.rank == 1 && tensor.flags == 0;
  const bool has_data = (index.storages[tensor.storage].flags & kStorageHasNoData) == 0;
  return is_bytes && has_data && index.dims[tensor.dims_offset + 1] == 1;
}

void check_names_unique(const Index& index) {
  const auto repeated = find_repeated(
      index.tensors.size(), [&](std::uint32_t i) { return index.name(index.tensors[i]); });
  if (repeated) reject("two tensors are named " + std::string(*repeated));
}

std::uint32_t Tables::add_tensor(std::string_view name, std::uint16_t dtype, std::uint32_t rank,
                                 const std::int64_t* own_dims, std::uint32_t storage,
                                 std::uint64_t storage_offset) {
  const auto own_number = static_cast<std::uint32_t>(tensors.size());
  TensorRecord record{};
  record.name_offset = names.size();
  record.name_bytes = static_cast<std::uint32_t>(name.size());
  record.dims_offset = dims.size();
  record.storage_offset = storage_offset;
  record.storage = storage;
  record.same_as = own_number;
  record.dtype = dtype;
  record.rank = rank;
  tensors.push_back(record);
  names += name;
  dims.insert(dims.end(), own_dims, own_dims + std::size_t{2} * rank);
  return own_number;
}

std::uint64_t encoded_header_bytes(const HeaderContent& content) {
  if (content.index.tensors.size() > kTensorCountMax)
    exceed("number of tensors", content.index.tensors.size(), kTensorCountMax);
  const std::string devices = encode_devices(content.devices);
  const auto sections = list_sections(content, devices);
  std::uint64_t bytes = sizeof(Preamble) + sections.size() * sizeof(SectionRecord);
  for (const auto& section : sections)
    bytes = align_up(bytes + section.second.size(), kSectionAlignBytes);
  bytes = align_up(bytes, kHeaderAlignBytes);
  if (bytes > kHeaderBytesMax) exceed("size of the header in bytes", bytes, kHeaderBytesMax);
  return bytes;
}

std::uint64_t place_storages(std::vector<StorageRecord>& storages, std::uint64_t header_bytes) {
  std::uint64_t end = header_bytes;
  for (StorageRecord& storage : storages) {
    storage.offset = align_up(end, kStorageAlignBytes);
    const std::uint64_t bytes = stored_bytes(storage);
    if (bytes > INT64_MAX - kStorageAlignBytes - storage.offset)
      exceed("size of the file in bytes", bytes, INT64_MAX);
    if (bytes > 0) end = storage.offset + bytes;
  }
  return end;
}

std::string encode_header(const HeaderContent& content) {
  const std::string devices = encode_devices(content.devices);
  const auto sections = list_sections(content, devices);
  std::string header(encoded_header_bytes(content), '\0');
  Preamble preamble{};
  std::copy(std::begin(kMagic), std::end(kMagic), preamble.magic);
  preamble.version_major = kVersionMajor;
  preamble.version_minor = kVersionMinor;
  preamble.header_bytes = header.size();
  preamble.file_bytes = header.size();
  for (const StorageRecord& storage : content.index.storages) {
    if (stored_bytes(storage) > 0) preamble.file_bytes = storage.offset + storage.bytes;
  }
  preamble.flags = content.flags;
  preamble.section_count = static_cast<std::uint32_t>(sections.size());

  std::uint64_t record_at = sizeof(Preamble);
  std::uint64_t bytes_at = record_at + sections.size() * sizeof(SectionRecord);
  for (const auto& [kind, bytes] : sections) {
    const SectionRecord record{static_cast<std::uint32_t>(kind), 0, bytes_at, bytes.size()};
    std::memcpy(&header[record_at], &record, sizeof record);
    bytes.copy(&header[bytes_at], bytes.size());
    record_at += sizeof record;
    bytes_at = align_up(bytes_at + bytes.size(), kSectionAlignBytes);
  }
  std::memcpy(header.data(), &preamble, sizeof preamble);
  preamble.header_crc32c = crc32c(0, header.data(), header.size());
  std::memcpy(header.data(), &preamble, sizeof preamble);
  return header;
}

Preamble decode_preamble(const void* bytes, std::size_t count, std::uint64_t file_bytes) {
  Preamble preamble{};
  if (count > 0) std::memcpy(&preamble, bytes, std::min(count, sizeof preamble));
  if (count < sizeof kMagic || std::memcmp(preamble.magic, kMagic, sizeof kMagic) != 0)
    reject("the first 8 bytes are not those of an .fsd file");
  if (count < sizeof preamble) {
    throw Error(Failure::kTruncated, "the file has " + number(file_bytes) +
                                         " bytes, fewer than the preamble's " +
                                         number(sizeof preamble));
  }
  if (preamble.version_major != kVersionMajor) {
    throw Error(Failure::kVersion, "the file has format version " + number(preamble.version_major) +
                                       "." + number(preamble.version_minor) +
                                       "; this release reads version " + number(kVersionMajor) +
                                       ".x");
  }
  if ((preamble.flags & kFileFlagsRequired) != 0) {
    throw Error(Failure::kVersion, "the file needs features of a newer release (flags " +
                                       number(preamble.flags & kFileFlagsRequired) + ")");
  }
  if (preamble.header_bytes > kHeaderBytesMax)
    exceed("size of the header in bytes", preamble.header_bytes, kHeaderBytesMax);
  if (preamble.header_bytes < sizeof preamble || preamble.header_bytes % kHeaderAlignBytes != 0)
    reject("the header's size is given as " + number(preamble.header_bytes) +
           " bytes, not a positive multiple of " + number(kHeaderAlignBytes));
  if (preamble.file_bytes < preamble.header_bytes)
    reject("the file's size is given as " + number(preamble.file_bytes) +
           " bytes, fewer than the header's " + number(preamble.header_bytes));
  if (file_bytes < preamble.file_bytes) {
    throw Error(Failure::kTruncated, "the file has " + number(file_bytes) +
                                         " bytes; its header promises " +
                                         number(preamble.file_bytes));
  }
  return preamble;
}

Header Header::decode(std::unique_ptr<std::uint64_t[]> bytes, const Preamble& preamble) {
  Header header;
  header.preamble_ = preamble;
  header.bytes_ = std::move(bytes);
  auto* first = reinterpret_cast<unsigned char*>(header.bytes_.get());
  Preamble unsealed = preamble;
  unsealed.header_crc32c = 0;
  std::memcpy(first, &unsealed, sizeof unsealed);
  const std::uint32_t crc = crc32c(0, first, preamble.header_bytes);
  if (crc != preamble.header_crc32c) {
    reject("the header is damaged: its checksum is " + number(crc) + ", recorded as " +
           number(preamble.header_crc32c));
  }
  if (preamble.reserved != 0) reject("a reserved field of the preamble is in use");
  if (preamble.section_count > kSectionCountMax)
    exceed("number of sections", preamble.section_count, kSectionCountMax);

  const auto* records = reinterpret_cast<const SectionRecord*>(first + sizeof(Preamble));
  std::uint64_t position = sizeof(Preamble) + preamble.section_count * sizeof(SectionRecord);
  std::uint32_t previous = 0;
  for (const SectionRecord& record : Span<SectionRecord>(records, preamble.section_count)) {
    check_section(record, position, previous, preamble.header_bytes);
    const char* content = reinterpret_cast<const char*>(first + record.offset);
    header.sections_.emplace_back(Section{record.kind}, std::string_view(content, record.bytes));
    previous = record.kind;
    const std::uint64_t end = position + record.bytes;
    position = std::min(align_up(end, kSectionAlignBytes), preamble.header_bytes);
    check_zeros(first, end, position);
  }
  if (preamble.header_bytes - position >= kHeaderAlignBytes)
    reject("the sections end at byte " + number(position) + " of a header of " +
           number(preamble.header_bytes));
  check_zeros(first, position, preamble.header_bytes);

  header.devices_ = decode_devices(header.section(Section::kDevices));
  Index& index = header.index_;
  index.storages =
      table<StorageRecord>(header.section(Section::kStorages), "storages", kStorageCountMax);
  index.tensors =
      table<TensorRecord>(header.section(Section::kTensors), "tensors", kTensorCountMax);
  index.dims =
      table<std::int64_t>(header.section(Section::kDims), "dims", 2 * kTensorCountMax * kRankMax);
  index.names = header.section(Section::kNames);
  check_storages(index.storages, header.devices_.size(), preamble);
  check_tensors(index);
  check_names_unique(index);
  return header;
}

Header::Header(Tables&& tables)
    : tables_(std::make_unique<Tables>(std::move(tables))),
      index_(tables_->index()),
      devices_(tables_->devices) {
  preamble_.file_bytes = tables_->file_bytes;
  preamble_.flags = tables_->flags;
  for (const auto& [kind, bytes] : tables_->sections) sections_.emplace_back(kind, bytes);
}

std::string_view Header::section(Section kind) const {
  for (const auto& [own, bytes] : sections_) {
    if (own == kind) return bytes;
  }
  return {};
}

}  // namespace fastsd
