#include "zip_layout.h"

#include <algorithm>
#include <cstdio>
#include <limits>

#include "error.h"

namespace fastsd {
namespace {

// The signatures of the format's structures.
constexpr std::uint32_t kLocalHeader = 0x04034B50U;
constexpr std::uint32_t kDescriptor = 0x08074B50U;
constexpr std::uint32_t kDirectoryHeader = 0x02014B50U;
constexpr std::uint32_t kEnd64 = 0x06064B50U;
constexpr std::uint32_t kEnd64Locator = 0x07064B50U;
constexpr std::uint32_t kEnd = 0x06054B50U;

constexpr std::uint64_t kLocalHeaderBytes = 30;
constexpr std::uint16_t kExtra64 = 1;           // sizes and offsets that do not fit 32 bits
constexpr std::uint16_t kPadding = 0x4246U;     // "FB", an extra field of torch's
constexpr std::uint64_t kExtraHeaderBytes = 4;  // each starts with its kind and its size

constexpr std::uint16_t kNamesAreUtf8 = 1U << 11U;
constexpr std::uint16_t kHasDescriptor = 1U << 3U;

constexpr std::uint32_t kMax32 = std::numeric_limits<std::uint32_t>::max();
constexpr std::uint16_t kMax16 = std::numeric_limits<std::uint16_t>::max();

// What says in 32 bits that 64 are elsewhere.
bool is_large(std::uint64_t value) { return value >= kMax32; }
std::uint32_t clamp32(std::uint64_t value) {
  return static_cast<std::uint32_t>(std::min<std::uint64_t>(value, kMax32));
}
std::uint16_t clamp16(std::uint64_t value) {
  return static_cast<std::uint16_t>(std::min<std::uint64_t>(value, kMax16));
}

// Little-endian, as the machine is (format.h).
template <class... Values>
void put(std::string* out, Values... values) {
  (out->append(reinterpret_cast<const char*>(&values), sizeof values), ...);
}

std::uint16_t flags_of(std::uint64_t bytes) {
  return static_cast<std::uint16_t>(kNamesAreUtf8 | (bytes > 0 ? kHasDescriptor : 0));
}

bool needs_64(std::uint64_t bytes, std::uint64_t header_offset) {
  return is_large(bytes) || is_large(header_offset);
}

std::string encode_extra64(std::uint64_t bytes, std::uint64_t header_offset) {
  std::string values;
  if (is_large(bytes)) put(&values, bytes, bytes);  // with and without compression
  if (is_large(header_offset)) put(&values, header_offset);
  if (values.empty()) return {};
  std::string extra;
  put(&extra, kExtra64, static_cast<std::uint16_t>(values.size()));
  return extra + values;
}

std::uint64_t descriptor_bytes(std::uint64_t bytes, std::uint64_t header_offset) {
  if (bytes == 0) return 0;
  return needs_64(bytes, header_offset) ? 24 : 16;
}

// Behind a record's bytes.
void append_descriptor(std::uint64_t bytes, std::uint64_t header_offset, std::uint32_t crc32,
                       std::string* out) {
  if (bytes == 0) return;
  put(out, kDescriptor, crc32);
  if (needs_64(bytes, header_offset)) {
    put(out, bytes, bytes);
  } else {
    put(out, static_cast<std::uint32_t>(bytes), static_cast<std::uint32_t>(bytes));
  }
}

// FNV-1a.
void hash(std::uint64_t* state, const void* data, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; ++i)
    *state = (*state ^ static_cast<const unsigned char*>(data)[i]) * 0x100000001B3U;
}

}  // namespace

ZipLayout::ZipLayout(Plan&& finished, std::string archive, const Records& records,
                     std::uint64_t align_bytes)
    : Layout(std::move(finished)), archive_(std::move(archive)), align_bytes_(align_bytes) {
  for (const auto& [name, bytes] : records) append_record(name, bytes, &head_, &entries_, 0);
  std::vector<StorageRecord>& storages = plan().storages();
  header_offsets_.reserve(storages.size());
  std::uint64_t at = head_.size();
  std::uint64_t data_begin = 0;
  std::uint64_t data_end = 0;
  for (std::size_t i = 0; i < storages.size(); ++i) {
    header_offsets_.push_back(at);
    const std::uint64_t bytes = stored_bytes(storages[i]);
    storages[i].offset = data_offset(entry(i));
    if (bytes > INT64_MAX / 2 - storages[i].offset)
      throw Error(Failure::kLimit, "the storages have more bytes than a file can");
    at = storages[i].offset + bytes + descriptor_bytes(bytes, header_offsets_[i]);
    if (bytes == 0) continue;
    if (data_begin == 0) data_begin = storages[i].offset;
    data_end = storages[i].offset + bytes;
  }
  if (data_begin == 0) data_begin = data_end = head_.size();
  set_places(data_begin, data_end, 0);
  set_places(data_begin, data_end, data_end + encode_tail().size());
}

ZipLayout::Entry ZipLayout::entry(std::size_t storage) const {
  const StorageRecord& record = plan().storages()[storage];
  const Index index = plan().index();
  std::string name = archive_ + '/';
  name += index.name(index.tensors[storage]);
  return {std::move(name), header_offsets_[storage], stored_bytes(record), record.crc32c};
}

// Where a record's bytes start: behind the header, the name, what needs 64 bits, and padding.
std::uint64_t ZipLayout::data_offset(const Entry& entry) const {
  const std::uint64_t end = entry.header_offset + kLocalHeaderBytes + entry.name.size() +
                            encode_extra64(entry.bytes, entry.header_offset).size() +
                            kExtraHeaderBytes;
  return align_up(end, align_bytes_);
}

// What precedes a record's bytes. Sizes and checksum stand in the descriptor and the directory.
void ZipLayout::append_header(const Entry& entry, std::string* out) const {
  const std::string extra64 = encode_extra64(entry.bytes, entry.header_offset);
  const std::uint64_t end =
      entry.header_offset + kLocalHeaderBytes + entry.name.size() + extra64.size();
  const std::uint64_t padded = data_offset(entry) - end;  // with the header of the extra field
  const std::uint16_t zero16 = 0;
  const std::uint32_t zero32 = 0;
  put(out, kLocalHeader, zero16, flags_of(entry.bytes), zero16, zero16, zero16, zero32, zero32,
      zero32, static_cast<std::uint16_t>(entry.name.size()),
      static_cast<std::uint16_t>(extra64.size() + padded));
  *out += entry.name;
  *out += extra64;
  put(out, kPadding, static_cast<std::uint16_t>(padded - kExtraHeaderBytes));
  out->append(padded - kExtraHeaderBytes, 'Z');
}

// `out` starts at `begin` of the file.
void ZipLayout::append_record(const std::string& name, const std::string& bytes, std::string* out,
                              std::vector<Entry>* entries, std::uint64_t begin) const {
  const Entry entry{archive_ + '/' + name, begin + out->size(), bytes.size(),
                    crc32(0, bytes.data(), bytes.size())};
  append_header(entry, out);
  *out += bytes;
  append_descriptor(entry.bytes, entry.header_offset, entry.crc32, out);
  entries->push_back(entry);
}

// The headers of a storage and, while those are empty, of the storages behind it.
void ZipLayout::append_headers_from(std::size_t storage, std::string* out) const {
  const std::vector<StorageRecord>& storages = plan().storages();
  for (; storage < storages.size(); ++storage) {
    append_header(entry(storage), out);
    if (stored_bytes(storages[storage]) > 0) return;
  }
}

std::string ZipLayout::encode_head() const {
  std::string head = head_;
  if (data_end() > data_begin()) append_headers_from(0, &head);
  return head;
}

void ZipLayout::encode_gap(std::size_t storage, std::uint32_t checksum, std::string* bytes) const {
  const std::vector<StorageRecord>& storages = plan().storages();
  std::size_t before = storage - 1;
  while (stored_bytes(storages[before]) == 0) --before;
  append_descriptor(storages[before].bytes, header_offsets_[before], checksum, bytes);
  append_headers_from(before + 1, bytes);
}

std::string ZipLayout::encode_tail() const {
  const std::vector<StorageRecord>& storages = plan().storages();
  std::size_t next = storages.size();  // the first of the empty ones at the end
  while (next > 0 && stored_bytes(storages[next - 1]) == 0) --next;
  std::string tail;
  if (next > 0) {
    const StorageRecord& last = storages[next - 1];
    append_descriptor(last.bytes, header_offsets_[next - 1], last.crc32c, &tail);
  }
  append_headers_from(next, &tail);
  std::vector<Entry> entries;
  append_record("version", "3\n", &tail, &entries, data_end());
  // torch, too, has it here if it was not among the records.
  const auto is_byte_order = [&](const Entry& entry) {
    return entry.name == archive_ + "/byteorder";
  };
  if (std::none_of(entries_.begin(), entries_.end(), is_byte_order))
    append_record("byteorder", "little", &tail, &entries, data_end());
  append_record(".data/serialization_id", serialization_id(), &tail, &entries, data_end());
  append_directory(entries, &tail, data_end() + tail.size());
  return tail;
}

// `last`: the records behind the storages. The directory starts at `at` of the file.
void ZipLayout::append_directory(const std::vector<Entry>& last, std::string* out,
                                 std::uint64_t at) const {
  const std::size_t begin = out->size();
  const std::uint16_t zero16 = 0;
  const std::uint32_t zero32 = 0;
  const auto append = [&](const Entry& entry) {
    const std::string extra = encode_extra64(entry.bytes, entry.header_offset);
    put(out, kDirectoryHeader, zero16, zero16, flags_of(entry.bytes), zero16, zero16, zero16,
        entry.crc32, clamp32(entry.bytes), clamp32(entry.bytes),
        static_cast<std::uint16_t>(entry.name.size()), static_cast<std::uint16_t>(extra.size()),
        zero16, zero16, zero16, zero32, clamp32(entry.header_offset));
    *out += entry.name;
    *out += extra;
  };
  for (const Entry& entry : entries_) append(entry);
  for (std::size_t i = 0; i < header_offsets_.size(); ++i) append(entry(i));
  for (const Entry& entry : last) append(entry);

  // The 64-bit end is always there, as torch has it.
  const std::uint64_t count = entries_.size() + header_offsets_.size() + last.size();
  const std::uint64_t bytes = out->size() - begin;
  constexpr std::uint64_t rest_bytes = 44;           // of the 64-bit end, behind this number
  constexpr std::uint16_t version_made_by = 0x031E;  // Unix, 3.0
  constexpr std::uint16_t version_needed = 0x002D;   // 4.5, which has 64-bit ends
  put(out, kEnd64, rest_bytes, version_made_by, version_needed, zero32, zero32, count, count, bytes,
      at);
  put(out, kEnd64Locator, zero32, at + bytes, std::uint32_t{1});
  put(out, kEnd, zero16, zero16, clamp16(count), clamp16(count), clamp32(bytes), clamp32(at),
      zero16);
}

// Forty digits that tell files of different records apart, and are the same for the same ones.
std::string ZipLayout::serialization_id() const {
  std::uint64_t names = 0xCBF29CE484222325U;
  std::uint64_t contents = names;
  const auto add = [&](const Entry& entry) {
    hash(&names, entry.name.data() + archive_.size(), entry.name.size() - archive_.size());
    hash(&contents, &entry.bytes, sizeof entry.bytes);
    hash(&contents, &entry.crc32, sizeof entry.crc32);
  };
  for (const Entry& entry : entries_) add(entry);
  for (std::size_t i = 0; i < header_offsets_.size(); ++i) add(entry(i));
  char digits[41];
  std::snprintf(digits, sizeof digits, "%020llu%020llu", static_cast<unsigned long long>(names),
                static_cast<unsigned long long>(contents));
  return digits;
}

}  // namespace fastsd
