#include "zip.h"

#include <algorithm>
#include <optional>
#include <string>

#include "error.h"
#include "format.h"
#include "unique.h"
#include "utf8.h"

namespace fastsd {
namespace {

// ---- Records, as they lie in the file (little-endian) ----

#define FASTSD_PACKED __attribute__((packed))

struct FASTSD_PACKED LocalHeader {
  std::uint32_t signature;
  std::uint16_t version;
  std::uint16_t flags;
  std::uint16_t method;
  std::uint32_t time;
  std::uint32_t crc32;
  std::uint32_t bytes;  // compressed
  std::uint32_t full_bytes;
  std::uint16_t name_bytes;
  std::uint16_t extra_bytes;
};

struct FASTSD_PACKED CentralHeader {
  std::uint32_t signature;
  std::uint16_t made_by;
  std::uint16_t version;
  std::uint16_t flags;
  std::uint16_t method;
  std::uint32_t time;
  std::uint32_t crc32;
  std::uint32_t bytes;  // compressed
  std::uint32_t full_bytes;
  std::uint16_t name_bytes;
  std::uint16_t extra_bytes;
  std::uint16_t comment_bytes;
  std::uint16_t disk;
  std::uint16_t attributes;
  std::uint32_t outer_attributes;
  std::uint32_t offset;  // of the local header
};

struct FASTSD_PACKED End {
  std::uint32_t signature;
  std::uint16_t disk;
  std::uint16_t directory_disk;
  std::uint16_t disk_count;  // records on this disk
  std::uint16_t count;
  std::uint32_t bytes;
  std::uint32_t offset;
  std::uint16_t comment_bytes;
};

struct FASTSD_PACKED Locator64 {
  std::uint32_t signature;
  std::uint32_t disk;
  std::uint64_t offset;
  std::uint32_t disks;
};

struct FASTSD_PACKED End64 {
  std::uint32_t signature;
  std::uint64_t rest_bytes;  // of this record, behind this field
  std::uint16_t made_by;
  std::uint16_t version;
  std::uint32_t disk;
  std::uint32_t directory_disk;
  std::uint64_t disk_count;
  std::uint64_t count;
  std::uint64_t bytes;
  std::uint64_t offset;
};

#undef FASTSD_PACKED

static_assert(sizeof(LocalHeader) == 30 && sizeof(CentralHeader) == 46 && sizeof(End) == 22);
static_assert(sizeof(Locator64) == 20 && sizeof(End64) == 56);

constexpr std::uint32_t kLocalSignature = 0x04034B50;
constexpr std::uint32_t kCentralSignature = 0x02014B50;
constexpr std::uint32_t kEndSignature = 0x06054B50;
constexpr std::uint32_t kLocator64Signature = 0x07064B50;
constexpr std::uint32_t kEnd64Signature = 0x06064B50;

// Encrypted; strongly encrypted; with a masked directory.
constexpr std::uint32_t kEncryptedFlags = 1U << 0U | 1U << 6U | 1U << 13U;
constexpr std::uint32_t kSizesFollowFlag = 1U << 3U;  // in a data descriptor

constexpr std::uint16_t kStored = 0;
constexpr std::uint16_t kExtra64 = 1;

// Fields that say so are in a wider field elsewhere.
constexpr std::uint16_t kWide16 = 0xFFFF;
constexpr std::uint32_t kWide32 = 0xFFFFFFFF;

std::string number(std::uint64_t value) { return std::to_string(value); }

[[noreturn]] void reject(const std::string& detail) { throw Error(Failure::kFormat, detail); }

std::string label_of(std::string_view name) { return "zip record `" + excerpt(name) + "`"; }

// REQUIRES: so many bytes.
template <class T>
T load(std::string_view bytes) {
  T value;
  bytes.copy(reinterpret_cast<char*>(&value), sizeof value);
  return value;
}

template <class T>
T read(const File& file, std::uint64_t offset) {
  T value;
  file.read_at(&value, sizeof value, offset);
  return value;
}

// ---- The end of the directory ----

// Where it is: as other readers have it, the last place that looks like one. Its comment must be
// the rest of the file, so that what others take for it, with more or less tolerance, is the same.
std::uint64_t find_end(const File& file) {
  constexpr std::uint64_t tail_bytes_max = sizeof(End) + 0xFFFF;
  if (file.bytes() >= sizeof(End)) {
    const std::uint64_t last = file.bytes() - sizeof(End);
    if (read<std::uint32_t>(file, last) == kEndSignature) return last;
    const std::uint64_t bytes = std::min(file.bytes(), tail_bytes_max);
    std::string tail(bytes, '\0');
    file.read_at(tail.data(), bytes, file.bytes() - bytes);
    const std::size_t at = tail.rfind(std::string_view("PK\5\6", 4), bytes - sizeof(End));
    if (at != std::string::npos) return file.bytes() - bytes + at;
  }
  throw Error(Failure::kTruncated,
              "the file has " + number(file.bytes()) +
                  " bytes and no zip directory at its end: it was cut, or is no zip file");
}

struct Directory {
  std::uint64_t count;
  std::uint64_t bytes;
  std::uint64_t offset;
};

[[noreturn]] void refuse_disks() {
  throw Error(Failure::kUnsupported, "the zip file is one of several that belong together");
}

// The record of the 64-bit extensions that lies before the end; nothing: there is none.
std::optional<End64> read_end64(const File& file, std::uint64_t end, std::uint64_t* begin) {
  if (end < sizeof(Locator64)) return std::nullopt;
  const std::uint64_t locator_at = end - sizeof(Locator64);
  const auto locator = read<Locator64>(file, locator_at);
  if (locator.signature != kLocator64Signature) return std::nullopt;
  if (locator.disk != 0 || locator.disks > 1) refuse_disks();
  *begin = locator.offset;
  if (*begin > locator_at || locator_at - *begin < sizeof(End64))
    reject("the zip64 locator points to byte " + number(*begin) + ", not before itself");
  const auto end64 = read<End64>(file, *begin);
  if (end64.signature != kEnd64Signature || end64.rest_bytes != locator_at - *begin - 12)
    reject("no zip64 end of directory is at byte " + number(*begin) +
           ", where its locator points to");
  return end64;
}

void check_agree(std::uint64_t narrow, std::uint64_t narrow_max, std::uint64_t wide,
                 const char* what) {
  if (narrow != narrow_max && narrow != wide) {
    reject(std::string("the zip directory's ") + what + " is " + number(narrow) +
           ", and in 64 bits " + number(wide));
  }
}

Directory find_directory(const File& file) {
  const std::uint64_t end_at = find_end(file);
  const auto end = read<End>(file, end_at);
  if (end.comment_bytes != file.bytes() - end_at - sizeof(End)) {
    reject("the zip file's comment has " + number(end.comment_bytes) + " bytes; " +
           number(file.bytes() - end_at - sizeof(End)) + " follow the end of the directory");
  }
  std::uint64_t limit = end_at;
  Directory directory{end.count, end.bytes, end.offset};
  std::uint64_t disks = end.disk | end.directory_disk;
  std::uint64_t disk_count = end.disk_count;
  if (const auto end64 = read_end64(file, end_at, &limit)) {
    check_agree(end.count, kWide16, end64->count, "number of records");
    check_agree(end.bytes, kWide32, end64->bytes, "size");
    check_agree(end.offset, kWide32, end64->offset, "offset");
    directory = {end64->count, end64->bytes, end64->offset};
    // All ones here: look into the wider record.
    disks = end64->disk | end64->directory_disk | (disks == kWide16 ? 0 : disks);
    disk_count = end64->disk_count;
  }
  if (disks != 0 || disk_count != directory.count) refuse_disks();
  if (directory.offset > limit || directory.bytes != limit - directory.offset) {
    reject("the zip directory has " + number(directory.bytes) + " bytes at " +
           number(directory.offset) + ", and its end is at byte " + number(limit));
  }
  if (directory.count > directory.bytes / sizeof(CentralHeader)) {
    reject("the zip directory has " + number(directory.bytes) + " bytes, too few for its " +
           number(directory.count) + " records");
  }
  if (directory.bytes > kHeaderBytesMax) {
    throw Error(Failure::kLimit, "the zip directory has " + number(directory.bytes) +
                                     " bytes, more than the limit of " + number(kHeaderBytesMax));
  }
  return directory;
}

// ---- The directory ----

struct Entry {
  std::string_view name;
  std::uint64_t header_at;
  std::uint64_t bytes;
  std::uint32_t crc32;
  std::uint16_t method;
};

// What the fields of a header that are too narrow say instead, in the order of the extension.
struct Wide {
  std::uint64_t full_bytes;
  std::uint64_t bytes;
  std::uint64_t offset;
  std::uint64_t disk;
};

Wide widen(const CentralHeader& header, std::string_view extra, std::string_view name) {
  Wide wide{header.full_bytes, header.bytes, header.offset, header.disk};
  std::string_view fields;
  while (extra.size() >= 4) {
    const auto id = load<std::uint16_t>(extra);
    const auto bytes = load<std::uint16_t>(extra.substr(2));
    extra.remove_prefix(4);
    if (bytes > extra.size()) reject(label_of(name) + " has an extra field that leaves its place");
    if (id == kExtra64 && fields.data() == nullptr) fields = extra.substr(0, bytes);
    extra.remove_prefix(bytes);
  }
  const auto take = [&](std::uint64_t* value, std::uint64_t narrow_max, std::size_t bytes) {
    if (*value != narrow_max) return;
    if (fields.size() < bytes) reject(label_of(name) + " lacks the 64-bit sizes that it refers to");
    *value = 0;
    fields.copy(reinterpret_cast<char*>(value), bytes);
    fields.remove_prefix(bytes);
  };
  take(&wide.full_bytes, kWide32, 8);
  take(&wide.bytes, kWide32, 8);
  take(&wide.offset, kWide32, 8);
  take(&wide.disk, kWide16, 4);
  return wide;
}

// Takes an entry off `text`.
Entry parse_entry(std::string_view& text) {
  if (text.size() < sizeof(CentralHeader)) reject("the zip directory ends within a record");
  const auto header = load<CentralHeader>(text);
  if (header.signature != kCentralSignature)
    reject("the zip directory has no record where it must");
  text.remove_prefix(sizeof header);
  const std::size_t name_bytes = header.name_bytes;
  const std::size_t extra_bytes = header.extra_bytes;
  const std::size_t all_bytes = name_bytes + extra_bytes + header.comment_bytes;
  if (all_bytes > text.size()) reject("the zip directory ends within a record");
  const std::string_view name = text.substr(0, name_bytes);
  if (name.empty() || name.find('\0') != std::string_view::npos)
    reject("a zip record has an empty name, or one with a zero byte");
  const Wide wide = widen(header, text.substr(name_bytes, extra_bytes), name);
  text.remove_prefix(all_bytes);
  if (wide.disk != 0) refuse_disks();
  if ((header.flags & kEncryptedFlags) != 0)
    throw Error(Failure::kUnsupported, label_of(name) + " is encrypted");
  if (header.method == kStored && wide.bytes != wide.full_bytes) {
    reject(label_of(name) + " is not compressed and takes " + number(wide.bytes) + " bytes for " +
           number(wide.full_bytes));
  }
  return {name, wide.offset, wide.bytes, header.crc32, header.method};
}

// In the order of the file.
std::vector<Entry> parse_directory(std::string_view text, std::uint64_t count) {
  std::vector<Entry> entries;
  entries.reserve(count);
  for (std::uint64_t i = 0; i < count; ++i) entries.push_back(parse_entry(text));
  if (!text.empty()) {
    reject("the zip directory goes on for " + number(text.size()) + " bytes behind its " +
           number(count) + " records");
  }
  if (const auto name =
          find_repeated(entries.size(), [&](std::size_t i) { return entries[i].name; }))
    reject("two zip records are named `" + excerpt(*name) + "`");
  std::sort(entries.begin(), entries.end(),
            [](const Entry& a, const Entry& b) { return a.header_at < b.header_at; });
  return entries;
}

// That `bytes` behind the fixed part of a record's header end before the next one starts.
void check_room(const Entry& entry, std::uint64_t bytes, std::uint64_t limit) {
  if (entry.header_at > limit || limit - entry.header_at < sizeof(LocalHeader) ||
      bytes > limit - entry.header_at - sizeof(LocalHeader) ||
      entry.bytes > limit - entry.header_at - sizeof(LocalHeader) - bytes) {
    reject(label_of(entry.name) + " has " + number(entry.bytes) + " bytes and its header at " +
           number(entry.header_at) + ", which does not fit before byte " + number(limit) +
           ", where the next record or the directory starts");
  }
}

// ---- Local headers ----

void check_local(const Entry& entry, const LocalHeader& header, std::string_view name) {
  const bool is_same = header.signature == kLocalSignature && header.method == entry.method &&
                       (header.flags & kEncryptedFlags) == 0 &&
                       header.name_bytes == entry.name.size() && name == entry.name;
  const bool is_same_size = (header.flags & kSizesFollowFlag) != 0 || header.bytes == kWide32 ||
                            (header.bytes == entry.bytes && header.crc32 == entry.crc32);
  if (!is_same || !is_same_size) {
    reject("the header at byte " + number(entry.header_at) + " is not that of " +
           label_of(entry.name) + ", or contradicts the zip directory");
  }
}

// Reads the headers of all records, with their names, in few calls.
std::unique_ptr<char[]> read_local_headers(const File& file, const std::vector<Entry>& entries,
                                           std::vector<File::Piece>& pieces) {
  std::uint64_t total = 0;
  for (const Entry& entry : entries) {
    const std::uint64_t bytes = sizeof(LocalHeader) + entry.name.size();
    pieces.push_back({nullptr, bytes, entry.header_at});
    total += bytes;
  }
  std::unique_ptr<char[]> headers(new char[total]);
  auto* target = reinterpret_cast<std::byte*>(headers.get());
  for (File::Piece& piece : pieces) {
    piece.target = target;
    target += piece.bytes;
  }
  if (!pieces.empty()) file.read_run(pieces.data(), pieces.size());
  return headers;
}

std::vector<ZipRecord> locate(const File& file, const std::vector<Entry>& entries,
                              std::uint64_t directory_at) {
  const auto limit_of = [&](std::size_t i) {
    return i + 1 < entries.size() ? entries[i + 1].header_at : directory_at;
  };
  if (entries.empty() ? directory_at > 0 : entries[0].header_at > 0)
    reject("the zip file does not begin with a record");
  for (std::size_t i = 0; i < entries.size(); ++i)
    check_room(entries[i], entries[i].name.size(), limit_of(i));
  std::vector<File::Piece> pieces;
  pieces.reserve(entries.size());
  const std::unique_ptr<char[]> headers = read_local_headers(file, entries, pieces);
  std::vector<ZipRecord> records;
  records.reserve(entries.size());
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const Entry& entry = entries[i];
    const std::string_view text(reinterpret_cast<const char*>(pieces[i].target), pieces[i].bytes);
    const auto header = load<LocalHeader>(text);
    check_local(entry, header, text.substr(sizeof header));
    const std::uint64_t variable_bytes = std::uint64_t{header.name_bytes} + header.extra_bytes;
    check_room(entry, variable_bytes, limit_of(i));
    records.push_back({entry.name, entry.header_at + sizeof header + variable_bytes, entry.bytes,
                       entry.crc32, entry.method != kStored});
  }
  return records;
}

}  // namespace

ZipDirectory read_zip_directory(const File& file) {
  const Directory directory = find_directory(file);
  ZipDirectory result;
  result.text.reset(new char[directory.bytes]);
  file.read_at(result.text.get(), directory.bytes, directory.offset);
  const std::vector<Entry> entries =
      parse_directory({result.text.get(), directory.bytes}, directory.count);
  result.records = locate(file, entries, directory.offset);
  return result;
}

}  // namespace fastsd
