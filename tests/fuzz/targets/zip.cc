// A zip file, as it is; and with the places in its directory as its records have them.
#include "zip.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <vector>

#include "error.h"
#include "fuzz.h"
#include "torch_zip.h"

namespace fastsd::fuzz {
namespace {

void require_sound_directory(const File& file, const ZipDirectory& directory) {
  std::uint64_t end = 0;
  std::set<std::string_view> names;
  for (const ZipRecord& record : directory.records) {
    require(!record.name.empty() && record.name.find('\0') == std::string_view::npos,
            "a zip record has a name without zero bytes");
    require(names.insert(record.name).second, "names of zip records are unique");
    require(record.offset >= end && record.offset <= file.bytes() &&
                record.bytes <= file.bytes() - record.offset,
            "zip records ascend within the file and do not overlap");
    end = record.offset + record.bytes;
  }
}

void read(std::string_view bytes) {
  const File file = file_of(bytes);
  try {
    require_sound_directory(file, read_zip_directory(file));
    const Tables tables = read_torch_zip(file);
    require_sound(tables);
    require(tables.file_bytes == file.bytes(), "a file is as large as it is");
  } catch (const Error& error) {
    require(*error.what() != '\0' && error.kind != Failure::kSystem, "an error says what is wrong");
  }
}

// Lets each entry of the directory point to the record of the same number, and the end of the
// directory to the first entry.
std::string repair(std::string_view input) {
  std::string bytes(input);
  seal(bytes);
  const auto locals = find_all(input, std::string_view("PK\3\4", 4));
  const auto centrals = find_all(input, std::string_view("PK\1\2", 4));
  const auto ends = find_all(input, std::string_view("PK\5\6", 4));
  const auto wide_ends = find_all(input, std::string_view("PK\6\6", 4));
  const auto locators = find_all(input, std::string_view("PK\6\7", 4));
  if (centrals.empty() || ends.empty()) return bytes;
  for (std::size_t i = 0; i < std::min(locals.size(), centrals.size()); ++i)
    put(bytes, centrals[i] + 42, static_cast<std::uint32_t>(locals[i]));
  const std::size_t begin = centrals.front();
  const std::size_t end = wide_ends.empty() ? ends.back() : wide_ends.back();
  const std::uint64_t count = centrals.size();
  put(bytes, ends.back() + 8, static_cast<std::uint16_t>(count));
  put(bytes, ends.back() + 10, static_cast<std::uint16_t>(count));
  put(bytes, ends.back() + 12, static_cast<std::uint32_t>(end - begin));
  put(bytes, ends.back() + 16, static_cast<std::uint32_t>(begin));
  if (wide_ends.empty() || locators.empty()) return bytes;
  put(bytes, end + 24, count);
  put(bytes, end + 32, count);
  put(bytes, end + 40, std::uint64_t{end - begin});
  put(bytes, end + 48, std::uint64_t{begin});
  put(bytes, locators.back() + 8, std::uint64_t{end});
  return bytes;
}

}  // namespace

FUZZ_TARGET(zip) {
  read(input);
  read(repair(input));
}

}  // namespace fastsd::fuzz
