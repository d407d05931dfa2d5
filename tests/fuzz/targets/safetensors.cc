// A safetensors file, as it is; and one whose header is all of the input but its last 8 bytes,
// which are the size of the data.
#include "safetensors.h"

#include <algorithm>
#include <cstring>

#include "error.h"
#include "fuzz.h"

namespace fastsd::fuzz {
namespace {

void read(const File& file) {
  try {
    const Tables tables = read_safetensors(file);
    require_sound(tables);
    require(tables.file_bytes == file.bytes(), "a file is as large as it is");
    for (const auto& [kind, text] : tables.sections)
      if (kind == Section::kMetadata) require_json(text, std::nullopt);
  } catch (const Error& error) {
    require(*error.what() != '\0' && error.kind != Failure::kSystem, "an error says what is wrong");
  }
}

}  // namespace

FUZZ_TARGET(safetensors) {
  read(file_of(input));
  std::uint64_t data_bytes = 0;
  if (input.size() < sizeof data_bytes) return;
  std::uint64_t header_bytes = input.size() - sizeof data_bytes;
  input.copy(reinterpret_cast<char*>(&data_bytes), sizeof data_bytes, header_bytes);
  std::string file(reinterpret_cast<const char*>(&header_bytes), sizeof header_bytes);
  file += input.substr(0, header_bytes);
  read(file_of(file, file.size() + (data_bytes & INT64_MAX)));
}

}  // namespace fastsd::fuzz
