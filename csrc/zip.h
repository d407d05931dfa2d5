// The directory of a zip file (PKWARE's APPNOTE.TXT), with the 64-bit extensions. Nothing is ever
// inflated.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "file.h"

namespace fastsd {

struct ZipRecord {
  std::string_view name;  // without zero bytes; otherwise as it was stored
  std::uint64_t offset;   // of the data in the file
  std::uint64_t bytes;    // that they take there
  std::uint32_t crc32;    // of the data before compression
  bool is_compressed;
};

struct ZipDirectory {
  std::vector<ZipRecord> records;  // in the order of the file
  std::unique_ptr<char[]> text;    // what the names lie in
};

// The records of an archive that is all of the file: it begins with a record and ends with the end
// of the directory and its comment. Records lie before the directory and do not overlap, each local
// header agrees with the directory, and no name occurs twice. Takes time and memory in proportion
// to the directory.
//
// Throws kFormat; kTruncated: there is no end of a directory; kLimit: a directory of more than
// kHeaderBytesMax; kUnsupported: several disks, or encrypted records.
ZipDirectory read_zip_directory(const File& file);

}  // namespace fastsd
