// The container's bytes: its records, how they are encoded and decoded, and what a reader rejects.
// docs/FORMAT.md is the normative text; this file and format.cc implement all of it. They know no
// file and no Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "strided.h"

namespace fastsd {

// ---- Constants of the format ----

constexpr unsigned char kMagic[8] = {0x8F, 'F', 'S', 'D', 0x0D, 0x0A, 0x1A, 0x0A};
constexpr std::uint16_t kVersionMajor = 1;
constexpr std::uint16_t kVersionMinor = 0;

constexpr std::uint64_t kHeaderAlignBytes = 4096;  // the data section starts at a multiple
constexpr std::uint64_t kStorageAlignBytes = 256;
constexpr std::uint64_t kSectionAlignBytes = 8;

constexpr std::uint64_t kHeaderBytesMax = std::uint64_t{1} << 30U;
constexpr std::uint32_t kSectionCountMax = 64;
constexpr std::uint64_t kTensorCountMax = std::uint64_t{1} << 24U;
constexpr std::uint64_t kStorageCountMax = kTensorCountMax;
constexpr std::uint32_t kNameBytesMax = 65536;
constexpr std::uint32_t kRankMax = 64;
constexpr std::uint64_t kDeviceCountMax = 65535;
constexpr std::size_t kDeviceNameBytes = 32;

enum class Section : std::uint32_t {
  kStorages = 1,
  kTensors = 2,
  kDims = 3,
  kNames = 4,
  kDevices = 5,
  kTree = 6,           // JSON: how tensors and plain values nest; absent for a flat dictionary
  kStateMetadata = 7,  // JSON: `_metadata` of a flat state_dict
  kMetadata = 8,       // JSON: the user's own strings
  kPickle = 9,         // torch's data.pkl stream
};

// What files of other formats have beside those: numbers that are never written to a file.
constexpr Section kByteOrder{0x10000};    // "little" or "big": of the storages of a pickle
constexpr Section kTorchScript{0x10001};  // empty: a TorchScript archive, which torch.jit reads

// Flags of the preamble. The lower half may be ignored by a reader that does not know them; a file
// with an unknown flag of the upper half is refused.
constexpr std::uint32_t kFileRootIsOrderedDict = 1U << 0U;
constexpr std::uint32_t kFileFlagsKnown = kFileRootIsOrderedDict;
constexpr std::uint32_t kFileFlagsRequired = 0xFFFF0000U;

constexpr std::uint32_t kSectionRequired = 1U << 0U;  // a reader that does not know it must refuse
constexpr std::uint32_t kSectionFlagsKnown = kSectionRequired;

constexpr std::uint16_t kStorageHasChecksum = 1U << 0U;
constexpr std::uint16_t kStorageHasNoData = 1U << 1U;  // a meta storage: a size without bytes
constexpr std::uint16_t kStorageFlagsKnown = kStorageHasChecksum | kStorageHasNoData;

constexpr std::uint16_t kTensorRequiresGrad = 1U << 0U;
constexpr std::uint16_t kTensorIsParameter = 1U << 1U;
constexpr std::uint16_t kTensorIsConj = 1U << 2U;
constexpr std::uint16_t kTensorIsNeg = 1U << 3U;
constexpr std::uint16_t kTensorIsArray = 1U << 4U;  // a numpy array: stays in host memory
constexpr std::uint16_t kTensorFlagsKnown =
    kTensorRequiresGrad | kTensorIsParameter | kTensorIsConj | kTensorIsNeg | kTensorIsArray;

// ---- Records, as they lie in the file (little-endian) ----

struct Preamble {
  unsigned char magic[8];
  std::uint16_t version_major;
  std::uint16_t version_minor;
  std::uint32_t header_crc32c;  // of the whole header, with this field 0
  std::uint64_t header_bytes;   // also where the data section starts
  std::uint64_t file_bytes;
  std::uint32_t flags;
  std::uint32_t section_count;
  std::uint64_t reserved;
};

struct SectionRecord {
  std::uint32_t kind;
  std::uint32_t flags;
  std::uint64_t offset;
  std::uint64_t bytes;
};

struct StorageRecord {
  std::uint64_t offset;  // in the file
  std::uint64_t bytes;
  std::uint32_t crc32c;
  std::uint16_t device;  // index into the devices section
  std::uint16_t flags;
  std::uint64_t reserved;
};

struct TensorRecord {
  std::uint64_t name_offset;  // in the names section
  std::uint64_t dims_offset;  // in the dims section, in numbers: `rank` sizes, then `rank` strides
  std::uint64_t storage_offset;  // of the first element, in items of the dtype
  std::uint32_t name_bytes;
  std::uint32_t storage;
  std::uint32_t
      same_as;  // the first tensor record that is the same object; its own number if it is
  std::uint16_t dtype;
  std::uint16_t flags;
  std::uint32_t rank;
  std::uint32_t reserved;
};

static_assert(sizeof(Preamble) == 48 && sizeof(SectionRecord) == 24);
static_assert(sizeof(StorageRecord) == 32 && sizeof(TensorRecord) == 48);
#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "fastsd reads and writes its records in place, which needs a little-endian machine"
#endif

// ---- An index of an archive: where its storages and tensors are ----

template <class T>
class Span {
 public:
  Span() = default;
  Span(const T* first, std::size_t count) : first_(first), count_(count) {}
  const T& operator[](std::size_t i) const { return first_[i]; }
  const T* data() const { return first_; }
  std::size_t size() const { return count_; }
  const T* begin() const { return first_; }
  const T* end() const { return first_ + count_; }

 private:
  const T* first_ = nullptr;
  std::size_t count_ = 0;
};

// The tables of an archive. A decoded header's lie in its bytes, a plan's in vectors.
struct Index {
  Span<StorageRecord> storages;
  Span<TensorRecord> tensors;
  Span<std::int64_t> dims;
  std::string_view names;

  std::string_view name(const TensorRecord& tensor) const {
    return names.substr(tensor.name_offset, tensor.name_bytes);
  }
  Strided view(const TensorRecord& tensor) const;
};

// Whether a tensor is a storage of the pickle section (docs/FORMAT.md, "Pickle"): bytes, in a row.
bool is_stored_storage(const Index& index, const TensorRecord& tensor);

// Throws kFormat, naming it, if a name occurs twice. Every name must lie within `names`.
void check_names_unique(const Index& index);

// Bytes of the file that a storage takes: none for a meta storage.
inline std::uint64_t stored_bytes(const StorageRecord& storage) {
  return (storage.flags & kStorageHasNoData) != 0 ? 0 : storage.bytes;
}

constexpr std::uint64_t align_up(std::uint64_t value, std::uint64_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

// The tables of an archive of another format, with the memory that they lie in: what a reader of
// that format fills in. Storages ascend in the file and do not overlap, and each view lies within
// its storage; names are unique. Flags and sections are those of this format; checksums may be of
// another kind.
struct Tables {
  std::uint64_t file_bytes = 0;  // of the archive
  std::uint32_t flags = 0;
  std::vector<StorageRecord> storages;
  std::vector<TensorRecord> tensors;
  std::vector<std::int64_t> dims;
  std::string names;
  std::vector<std::string> devices = {"cpu"};
  std::vector<std::pair<Section, std::string>> sections;

  // Adds a tensor, an object of its own, whose view is `dims`: sizes, then strides. Returns its
  // number.
  std::uint32_t add_tensor(std::string_view name, std::uint16_t dtype, std::uint32_t rank,
                           const std::int64_t* own_dims, std::uint32_t storage,
                           std::uint64_t storage_offset);

  Index index() const {
    return {{storages.data(), storages.size()},
            {tensors.data(), tensors.size()},
            {dims.data(), dims.size()},
            names};
  }
};

// ---- Encoding ----

// What a header says. Sections are those other than the four tables.
struct HeaderContent {
  Index index;
  std::uint32_t flags = 0;
  std::vector<std::string> devices;
  std::vector<std::pair<Section, std::string>> sections;
};

// The size of the header that encode_header() makes. Throws kLimit.
std::uint64_t encoded_header_bytes(const HeaderContent& content);

// Gives each storage its place in the file, after a header of `header_bytes`; returns the file's
// size.
std::uint64_t place_storages(std::vector<StorageRecord>& storages, std::uint64_t header_bytes);

// REQUIRES: the storages have been placed and carry their checksums.
std::string encode_header(const HeaderContent& content);

// ---- Decoding ----

// Checks what the first 48 bytes alone can tell; `bytes` holds `count` of them, fewer if the file
// is shorter. Returns them with header_bytes known to lie within the file and its limit. Throws
// kFormat, kVersion, kTruncated or kLimit.
Preamble decode_preamble(const void* bytes, std::size_t count, std::uint64_t file_bytes);

// A validated header, with the memory that it lies in.
class Header {
 public:
  Header() = default;

  // REQUIRES: decode_preamble() accepted these bytes, of which `preamble.header_bytes` are given,
  // in memory aligned to 8. Throws Error unless every rule of docs/FORMAT.md that can be checked
  // without the data section holds.
  static Header decode(std::unique_ptr<std::uint64_t[]> bytes, const Preamble& preamble);

  // What stands for the header of a file of another format: version 0, and no bytes of its own.
  explicit Header(Tables&& tables);

  const Preamble& preamble() const { return preamble_; }
  const Index& index() const { return index_; }
  const std::vector<std::string>& devices() const { return devices_; }

  // Nothing: the header has no such section. A null data() tells it from an empty one.
  std::string_view section(Section kind) const;

 private:
  std::unique_ptr<std::uint64_t[]> bytes_;
  std::unique_ptr<Tables> tables_;
  Preamble preamble_{};
  Index index_;
  std::vector<std::string> devices_;
  std::vector<std::pair<Section, std::string_view>> sections_;
};

}  // namespace fastsd
