// The tables of an .fsd header, in a header that is right. Input: flags (4 bytes), then sections,
// each of them its kind, its flags (1 byte each), its size (2) and its content.
#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "error.h"
#include "fuzz.h"

namespace fastsd::fuzz {
namespace {

std::string build_header(std::string_view input) {
  Input numbers(input);
  Preamble preamble{{}, kVersionMajor, kVersionMinor, 0, 0, 0, numbers.take<std::uint32_t>(), 0, 0};
  std::copy(std::begin(kMagic), std::end(kMagic), preamble.magic);
  std::vector<SectionRecord> records;
  std::vector<std::string_view> contents;
  std::uint64_t file_bytes = 0;
  while (!numbers.rest().empty() && records.size() < kSectionCountMax) {
    const std::uint32_t kind = numbers.take<std::uint8_t>();
    const std::uint32_t flags = numbers.take<std::uint8_t>();
    contents.push_back(numbers.take(numbers.take<std::uint16_t>()));
    records.push_back({kind, flags, 0, contents.back().size()});
    const bool has_storage =
        Section{kind} == Section::kStorages && contents.back().size() >= sizeof(StorageRecord);
    if (has_storage) {  // the file ends where the last one does
      const std::string_view own = contents.back();
      const auto last = Input(own.substr(own.size() - sizeof(StorageRecord))).take<StorageRecord>();
      file_bytes = last.offset + last.bytes;
    }
  }
  std::string header(sizeof preamble + records.size() * sizeof(SectionRecord), '\0');
  for (std::size_t i = 0; i < records.size(); ++i) {
    records[i].offset = header.size();
    std::memcpy(&header[sizeof preamble + i * sizeof(SectionRecord)], &records[i],
                sizeof(SectionRecord));
    header += contents[i];
    header.resize(align_up(header.size(), kSectionAlignBytes));
  }
  header.resize(align_up(header.size(), kHeaderAlignBytes));
  preamble.section_count = static_cast<std::uint32_t>(records.size());
  preamble.header_bytes = header.size();
  preamble.file_bytes = std::max(file_bytes, preamble.header_bytes);
  std::memcpy(header.data(), &preamble, sizeof preamble);
  seal(header);
  return header;
}

Header decode(std::string_view bytes) {
  const Preamble preamble = decode_preamble(bytes.data(), bytes.size(), UINT64_MAX);
  std::unique_ptr<std::uint64_t[]> words(new std::uint64_t[bytes.size() / 8]);
  std::memcpy(words.get(), bytes.data(), bytes.size());
  return Header::decode(std::move(words), preamble);
}

template <class T>
bool is_same(const Span<T>& a, const Span<T>& b) {
  return a.size() == b.size() &&
         (a.size() == 0 || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// What is read is written again as it was.
void require_same_again(const Header& header) {
  HeaderContent content{header.index(), header.preamble().flags, header.devices(), {}};
  for (std::uint32_t kind = 6; kind <= std::uint32_t(Section::kPickle); ++kind) {
    const std::string_view own = header.section(Section{kind});
    if (own.data() != nullptr) content.sections.emplace_back(Section{kind}, own);
  }
  if (encoded_header_bytes(content) != header.preamble().header_bytes) return;  // it lacks a table
  const Header again = decode(encode_header(content));
  require(is_same(again.index().storages, header.index().storages) &&
              is_same(again.index().tensors, header.index().tensors) &&
              is_same(again.index().dims, header.index().dims) &&
              again.index().names == header.index().names && again.devices() == header.devices(),
          "a header that is decoded is encoded as it was");
}

}  // namespace

FUZZ_TARGET(fsd_tables) {
  try {
    const Header header = decode(build_header(input));
    require_sound(header.index(), header.preamble().file_bytes, header.devices().size());
    require_same_again(header);
  } catch (const Error& error) {
    require(*error.what() != '\0' && error.kind != Failure::kSystem, "an error says what is wrong");
  }
}

}  // namespace fastsd::fuzz
