// The header of an .fsd file, as it is and with what a stranger can compute, too: its own size and
// its checksum.
#include <algorithm>
#include <cstring>
#include <memory>

#include "error.h"
#include "fuzz.h"

namespace fastsd::fuzz {
namespace {

void decode(std::string_view bytes, std::uint64_t file_bytes) {
  try {
    const Preamble preamble = decode_preamble(bytes.data(), bytes.size(), file_bytes);
    require(preamble.header_bytes <= kHeaderBytesMax && preamble.header_bytes <= file_bytes,
            "a header lies within the file");
    if (preamble.header_bytes > bytes.size()) return;
    std::unique_ptr<std::uint64_t[]> words(new std::uint64_t[preamble.header_bytes / 8]);
    std::memcpy(words.get(), bytes.data(), preamble.header_bytes);
    const Header header = Header::decode(std::move(words), preamble);
    require_sound(header.index(), preamble.file_bytes, header.devices().size());
    for (std::uint32_t kind = 0; kind < 16; ++kind)
      require(header.section(Section{kind}).size() <= preamble.header_bytes,
              "a section lies within the header");
  } catch (const Error& error) {
    require(*error.what() != '\0' && error.kind != Failure::kSystem, "an error says what is wrong");
  }
}

}  // namespace

FUZZ_TARGET(fsd_header) {
  decode(input, input.size());
  if (input.size() < sizeof(Preamble)) return;
  std::string bytes(input);
  bytes.resize(align_up(bytes.size(), kHeaderAlignBytes));
  const std::uint64_t header_bytes = bytes.size();
  std::memcpy(&bytes[offsetof(Preamble, header_bytes)], &header_bytes, sizeof header_bytes);
  seal(bytes);
  decode(bytes, UINT64_MAX);
}

}  // namespace fastsd::fuzz
