#include "torch_zip.h"

#include <algorithm>
#include <charconv>
#include <string>
#include <string_view>
#include <vector>

#include "checksum.h"
#include "dtype.h"
#include "error.h"
#include "utf8.h"
#include "zip.h"

namespace fastsd {
namespace {

// Of the record `version`: what torch itself reads.
constexpr std::uint64_t kTorchVersionMax = 10;

constexpr std::string_view kPickleName = "data.pkl";

std::string number(std::uint64_t value) { return std::to_string(value); }

[[noreturn]] void reject(const std::string& detail) { throw Error(Failure::kFormat, detail); }

// The records below the folder that holds all of an archive, by their names there.
class Records {
 public:
  explicit Records(const std::vector<ZipRecord>& all) : all_(all) {
    bool is_found = false;
    for (const ZipRecord& record : all) {
      const std::size_t slash = record.name.find('/');
      if (slash == std::string_view::npos || record.name.substr(slash + 1) != kPickleName) continue;
      if (is_found) reject("a zip file with two records data.pkl, in different folders");
      is_found = true;
      folder_ = record.name.substr(0, slash + 1);
    }
    if (!is_found) reject("a zip file, but not one that torch.save writes: it has no data.pkl");
  }

  // "" for a record elsewhere.
  std::string_view name(const ZipRecord& record) const {
    const bool is_inside = record.name.substr(0, folder_.size()) == folder_;
    return is_inside ? record.name.substr(folder_.size()) : std::string_view();
  }

  // nullptr: there is none.
  const ZipRecord* find(std::string_view wanted) const {
    const auto found = std::find_if(
        all_.begin(), all_.end(), [&](const ZipRecord& record) { return name(record) == wanted; });
    return found == all_.end() ? nullptr : &*found;
  }

 private:
  const std::vector<ZipRecord>& all_;
  std::string_view folder_;  // with its slash
};

// torch can be told not to compute checksums, and writes zeros then.
bool has_checksum(const ZipRecord& record) { return record.bytes > 0 && record.crc32 != 0; }

void check_stored(const ZipRecord& record) {
  if (!record.is_compressed) return;
  throw Error(Failure::kUnsupported,
              "zip record `" + excerpt(record.name) +
                  "` is compressed, which torch.save never does; load the file with torch.load and "
                  "save it again");
}

std::string read_record(const File& file, const ZipRecord& record, std::uint64_t bytes_max) {
  check_stored(record);
  if (record.bytes > bytes_max) {
    throw Error(Failure::kLimit, "zip record `" + excerpt(record.name) + "` has " +
                                     number(record.bytes) + " bytes, more than the limit of " +
                                     number(bytes_max));
  }
  std::string bytes(record.bytes, '\0');
  file.read_at(bytes.data(), bytes.size(), record.offset);
  if (has_checksum(record) && crc32(0, bytes.data(), bytes.size()) != record.crc32)
    reject("zip record `" + excerpt(record.name) + "` is damaged: its checksum is another");
  return bytes;
}

void check_version(const File& file, const Records& records) {
  constexpr std::uint64_t bytes_max = 32;
  const ZipRecord* record = records.find("version");
  if (record == nullptr) return;
  const std::string text = read_record(file, *record, bytes_max);
  std::uint64_t version = 0;
  const char* end = text.data() + text.size();
  const auto [rest, problem] = std::from_chars(text.data(), end, version);
  if (problem != std::errc() || (rest != end && *rest != '\n'))
    reject("the record version of the torch file is no number");
  if (version > kTorchVersionMax) {
    throw Error(Failure::kVersion, "the torch file has version " + number(version) +
                                       "; this release reads up to " + number(kTorchVersionMax));
  }
}

void add_byte_order(const File& file, const Records& records, Tables& tables) {
  constexpr std::uint64_t bytes_max = 32;
  const ZipRecord* record = records.find("byteorder");
  if (record == nullptr) return;
  std::string order = read_record(file, *record, bytes_max);
  if (order != "little" && order != "big")
    reject("the record byteorder of the torch file says neither little nor big");
  tables.sections.emplace_back(kByteOrder, std::move(order));
}

void add_storage(const ZipRecord& record, std::string_view key, Tables& tables) {
  check_stored(record);
  if (!is_utf8(key)) reject("the name of a storage of the torch file is not UTF-8");
  const std::int64_t dims[] = {static_cast<std::int64_t>(record.bytes), 1};
  const auto storage = static_cast<std::uint32_t>(tables.storages.size());
  const std::uint16_t flags = has_checksum(record) ? kStorageHasChecksum : std::uint16_t{0};
  tables.storages.push_back({record.offset, record.bytes, record.crc32, 0, flags, 0});
  tables.add_tensor(key, std::uint16_t(DType::kUInt8), 1, dims, storage, 0);
}

}  // namespace

Tables read_torch_zip(const File& file) {
  constexpr std::string_view data = "data/";
  const ZipDirectory directory = read_zip_directory(file);
  const Records records(directory.records);
  if (directory.records.size() > kStorageCountMax) {
    throw Error(Failure::kLimit, "the zip file has " + number(directory.records.size()) +
                                     " records, more than the limit of " +
                                     number(kStorageCountMax));
  }
  Tables tables;
  tables.file_bytes = file.bytes();
  if (records.find("constants.pkl") != nullptr) {
    tables.sections.emplace_back(kTorchScript, "");
    return tables;
  }
  check_version(file, records);
  tables.sections.emplace_back(Section::kPickle,
                               read_record(file, *records.find(kPickleName), kHeaderBytesMax));
  add_byte_order(file, records, tables);
  for (const ZipRecord& record : directory.records) {
    const std::string_view name = records.name(record);
    // Archivers also write records for folders.
    if (name.substr(0, data.size()) == data && name.back() != '/')
      add_storage(record, name.substr(data.size()), tables);
  }
  return tables;
}

}  // namespace fastsd
