#include "format.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "check.h"
#include "checksum.h"
#include "dtype.h"
#include "support.h"

namespace fastsd::test {
namespace {

using Outcome = std::optional<Failure>;  // nothing: accepted
constexpr Outcome kAccepted = std::nullopt;

// ---- A header to be taken apart ----

struct Tables {
  std::vector<StorageRecord> storages;
  std::vector<TensorRecord> tensors;
  std::vector<std::int64_t> dims;
  std::string names;
  std::vector<std::string> devices;
  std::vector<std::pair<Section, std::string>> sections;
  std::uint32_t flags = 0;

  void add_storage(std::uint64_t bytes, std::uint32_t crc, std::uint16_t flag,
                   std::uint16_t device = 0) {
    storages.push_back({0, bytes, crc, device, flag, 0});
  }

  TensorRecord& add_tensor(const std::string& name, DType dtype, std::uint32_t storage,
                           std::uint64_t storage_offset, const Dims& shape, const Dims& stride) {
    TensorRecord record{};
    record.name_offset = names.size();
    record.name_bytes = std::uint32_t(name.size());
    record.dims_offset = dims.size();
    record.storage = storage;
    record.storage_offset = storage_offset;
    record.same_as = std::uint32_t(tensors.size());
    record.dtype = std::uint16_t(dtype);
    record.rank = std::uint32_t(shape.size());
    names += name;
    dims.insert(dims.end(), shape.begin(), shape.end());
    dims.insert(dims.end(), stride.begin(), stride.end());
    tensors.push_back(record);
    return tensors.back();
  }

  HeaderContent content() const {
    const Index index{{storages.data(), storages.size()},
                      {tensors.data(), tensors.size()},
                      {dims.data(), dims.size()},
                      names};
    return {index, flags, devices, sections};
  }

  // The whole file; its data are zeros.
  std::string encode() {
    const std::uint64_t file_bytes = place_storages(storages, encoded_header_bytes(content()));
    std::string file = encode_header(content());
    file.resize(file_bytes);
    return file;
  }
};

// One of everything.
Tables make_sample() {
  Tables sample;
  sample.flags = kFileRootIsOrderedDict;
  sample.devices = {"cpu", "cuda:0"};
  sample.sections = {{Section::kMetadata, R"({"a":"b"})"}, {Section::kStateMetadata, "{}"}};
  sample.add_storage(24, 0x12345678, kStorageHasChecksum);
  sample.add_storage(0, 0, 0, 1);
  sample.add_storage(64, 0, kStorageHasNoData);
  sample.add_storage(100, 0, 0);
  sample.add_tensor("weight", DType::kFloat32, 0, 0, {2, 3}, {3, 1}).flags = kTensorRequiresGrad;
  TensorRecord& tied = sample.add_tensor("tied", DType::kFloat32, 0, 0, {2, 3}, {3, 1});
  tied.flags = kTensorRequiresGrad;
  tied.same_as = 0;
  sample.add_tensor("empty", DType::kFloat16, 1, 0, {0, 4}, {4, 1});
  sample.add_tensor("meta", DType::kInt64, 2, 0, {8}, {1});
  sample.add_tensor("bi\xC3\xA4s", DType::kUInt8, 3, 9, {10}, {9});
  sample.add_tensor("", DType::kComplex128, 3, 5, {}, {}).flags = kTensorIsConj;
  return sample;
}

// ---- Taking it apart ----

Preamble preamble_of(const std::string& file) {
  Preamble preamble{};
  std::memcpy(&preamble, file.data(), sizeof preamble);
  return preamble;
}

template <class Change>
void change_preamble(std::string& file, Change change) {
  Preamble preamble = preamble_of(file);
  change(preamble);
  std::memcpy(file.data(), &preamble, sizeof preamble);
}

std::size_t section_record_at(std::size_t i) {
  return sizeof(Preamble) + i * sizeof(SectionRecord);
}

SectionRecord section_of(const std::string& file, std::size_t i) {
  SectionRecord section{};
  std::memcpy(&section, &file[section_record_at(i)], sizeof section);
  return section;
}

// `section` counts from 0, which in the sample is its kind less one.
template <class Record, class Change>
void change_record(std::string& file, Section section, std::size_t i, Change change) {
  const std::size_t number = std::size_t(section) - 1;
  char* at = &file[section_of(file, number).offset + i * sizeof(Record)];
  Record record{};
  std::memcpy(&record, at, sizeof record);
  change(record);
  std::memcpy(at, &record, sizeof record);
}

// Makes the header's checksum right again.
void seal(std::string& file) {
  change_preamble(file, [&](Preamble& p) { p.header_crc32c = 0; });
  const std::uint64_t bytes = preamble_of(file).header_bytes;
  if (bytes > file.size()) return;
  const std::uint32_t crc = crc32c(0, file.data(), bytes);
  change_preamble(file, [&](Preamble& p) { p.header_crc32c = crc; });
}

// As a reader does it; in memory that ends where the header does.
Header decode(const std::string& file) {
  const Preamble preamble =
      decode_preamble(file.data(), std::min(file.size(), sizeof(Preamble)), file.size());
  std::unique_ptr<std::uint64_t[]> bytes(new std::uint64_t[preamble.header_bytes / 8]);
  std::memcpy(bytes.get(), file.data(), preamble.header_bytes);
  return Header::decode(std::move(bytes), preamble);
}

Outcome outcome(const std::string& file) {
  return failure_of([&] {
    decode(file);
    return 0;
  });
}

Outcome outcome(Tables tables) { return outcome(tables.encode()); }

// What becomes of the sample once `change` has been made to its bytes.
template <class Change>
Outcome after(Change change) {
  std::string file = make_sample().encode();
  change(file);
  seal(file);
  return outcome(file);
}

template <class Change>
Outcome after_preamble(Change change) {
  return after([&](std::string& file) { change_preamble(file, change); });
}

template <class Change>
Outcome after_section(std::size_t i, Change change) {
  return after([&](std::string& file) {
    SectionRecord section = section_of(file, i);
    change(section);
    std::memcpy(&file[section_record_at(i)], &section, sizeof section);
  });
}

template <class Change>
Outcome after_storage(std::size_t i, Change change) {
  return after([&](std::string& file) {
    change_record<StorageRecord>(file, Section::kStorages, i, change);
  });
}

template <class Change>
Outcome after_tensor(std::size_t i, Change change) {
  return after(
      [&](std::string& file) { change_record<TensorRecord>(file, Section::kTensors, i, change); });
}

Outcome after_dim(std::size_t i, std::int64_t value) {
  return after([&](std::string& file) {
    change_record<std::int64_t>(file, Section::kDims, i, [&](std::int64_t& dim) { dim = value; });
  });
}

// One tensor of bytes without data, of this shape.
Tables make_meta(std::uint64_t bytes, DType dtype, const Dims& shape, const Dims& stride) {
  Tables tables;
  tables.devices = {"meta"};
  tables.add_storage(bytes, 0, kStorageHasNoData);
  tables.add_tensor("x", dtype, 0, 0, shape, stride);
  return tables;
}

// ---- Round trips ----

TEST(format_round_trip) {
  Tables sample = make_sample();
  const std::string file = sample.encode();
  const Header header = decode(file);
  const Index& index = header.index();
  CHECK(header.preamble().file_bytes == file.size());
  CHECK(header.preamble().flags == sample.flags);
  CHECK(header.devices() == sample.devices);
  CHECK(index.storages.size() == 4 && index.tensors.size() == 6);
  CHECK(std::memcmp(index.storages.data(), sample.storages.data(), 4 * sizeof(StorageRecord)) == 0);
  CHECK(std::memcmp(index.tensors.data(), sample.tensors.data(), 6 * sizeof(TensorRecord)) == 0);
  CHECK(std::equal(index.dims.begin(), index.dims.end(), sample.dims.begin(), sample.dims.end()));
  CHECK(index.names == sample.names);
  CHECK(index.name(index.tensors[3]) == "meta");
  CHECK(index.view(index.tensors[0]).item_bytes == 4);
  CHECK(index.view(index.tensors[0]).stride[0] == 3);
  CHECK(header.section(Section::kMetadata) == R"({"a":"b"})");
  CHECK(header.section(Section::kTree).data() == nullptr);
  CHECK(file.size() == index.storages[3].offset + 100);
}

TEST(format_round_trip_of_nothing) {
  const Header header = decode(Tables{}.encode());
  CHECK(header.preamble().file_bytes == kHeaderAlignBytes);
  CHECK(header.index().tensors.size() == 0 && header.devices().empty());
}

TEST(format_round_trip_of_many) {
  for (const std::size_t count : {1U, 2U, 40U, 41U, 1000U}) {
    Tables tables;
    tables.devices = {std::string(kDeviceNameBytes, 'd')};
    for (std::uint32_t i = 0; i < count; ++i) {
      tables.add_storage(i % 700, 0, 0);
      tables.add_tensor("layers." + std::to_string(i), DType::kInt8, i, 0, {i % 700}, {1});
    }
    const std::string file = tables.encode();
    const Header header = decode(file);
    CHECK(header.index().tensors.size() == count);
    CHECK(header.index().name(header.index().tensors[count - 1]) ==
          "layers." + std::to_string(count - 1));
    for (const StorageRecord& storage : header.index().storages) CHECK(storage.offset % 256 == 0);
  }
}

TEST(format_empty_section_is_not_an_absent_one) {
  Tables tables;
  tables.sections = {{Section::kTree, ""}, {Section::kPickle, std::string(4096, 'p')}};
  const Header header = decode(tables.encode());
  CHECK(header.section(Section::kTree).data() != nullptr);
  CHECK(header.section(Section::kTree).empty());
  CHECK(header.section(Section::kPickle).size() == 4096);
}

TEST(format_tables_may_be_absent) {
  std::string file(kHeaderAlignBytes, '\0');
  change_preamble(file, [](Preamble& p) {
    std::copy(std::begin(kMagic), std::end(kMagic), p.magic);
    p.version_major = kVersionMajor;
    p.header_bytes = p.file_bytes = kHeaderAlignBytes;
  });
  seal(file);
  CHECK(outcome(file) == kAccepted);
}

TEST(format_encoding_keeps_the_limits) {
  const TensorRecord record{};
  HeaderContent content;
  content.index.tensors = {&record, kTensorCountMax + 1};  // only counted
  CHECK_THROWS(encoded_header_bytes(content), Failure::kLimit);

  std::vector<StorageRecord> storages = {{0, INT64_MAX, 0, 0, kStorageHasNoData, 0},
                                         {0, 1000, 0, 0, 0, 0}};
  CHECK(place_storages(storages, 4096) == 5096);
  storages.push_back({0, 0, 0, 0, 0, 0});  // what has no bytes moves nothing
  CHECK(place_storages(storages, 4096) == 5096 && storages[2].offset == 5120);
  storages[0].flags = 0;
  CHECK_THROWS(place_storages(storages, 4096), Failure::kLimit);
  storages[0].bytes = storages[1].bytes = std::uint64_t{1} << 62U;
  CHECK_THROWS(place_storages(storages, 4096), Failure::kLimit);

  Tables tables;
  tables.devices = {std::string(kDeviceNameBytes + 1, 'd')};
  CHECK_THROWS(tables.encode(), Failure::kLimit);
  tables.devices = {""};
  CHECK_THROWS(tables.encode(), Failure::kLimit);
}

// ---- The preamble ----

TEST(format_rejects_a_wrong_preamble) {
  CHECK(after([](std::string&) {}) == kAccepted);
  for (std::uint32_t bit = 0; bit < 8 * sizeof kMagic; ++bit) {
    const auto flip = [&](Preamble& p) {
      p.magic[bit / 8] = static_cast<unsigned char>(p.magic[bit / 8] ^ (1U << (bit % 8)));
    };
    CHECK(after_preamble(flip) == Failure::kFormat);
  }
  for (const int major : {0, 2, 0xFFFF}) {
    CHECK(after_preamble([&](Preamble& p) { p.version_major = std::uint16_t(major); }) ==
          Failure::kVersion);
  }
  CHECK(after_preamble([](Preamble& p) { p.version_minor = 7; }) == kAccepted);
  for (std::uint32_t bit = 0; bit < 32; ++bit) {
    const Outcome expected = bit < 16 ? kAccepted : Outcome(Failure::kVersion);
    CHECK(after_preamble([&](Preamble& p) { p.flags |= 1U << bit; }) == expected);
  }
  CHECK(after_preamble([](Preamble& p) { p.reserved = 1; }) == Failure::kFormat);
}

TEST(format_names_a_newer_version_whatever_follows) {
  std::string file = make_sample().encode();
  change_preamble(file, [](Preamble& p) { p.version_major = 2; });
  std::fill(file.begin() + 12, file.end(), '\xA5');
  CHECK(outcome(file) == Failure::kVersion);
}

TEST(format_rejects_a_wrong_header_size) {
  for (const std::uint64_t bytes : {0U, 8U, 47U, 48U, 2048U, 4095U, 4097U, 4104U}) {
    CHECK(after_preamble([&](Preamble& p) { p.header_bytes = bytes; }) == Failure::kFormat);
  }
  for (const std::uint64_t bytes : {kHeaderBytesMax + 4096, UINT64_MAX - 4095, UINT64_MAX}) {
    CHECK(after_preamble([&](Preamble& p) { p.header_bytes = bytes; }) == Failure::kLimit);
  }
  // More than the file; exactly the file; a page more than the sections need.
  CHECK(after_preamble([](Preamble& p) { p.header_bytes = kHeaderBytesMax; }) == Failure::kFormat);
  Tables tables;
  std::string file = tables.encode();
  file.resize(2 * kHeaderAlignBytes);
  change_preamble(file, [](Preamble& p) { p.header_bytes = p.file_bytes = 2 * kHeaderAlignBytes; });
  seal(file);
  CHECK(outcome(file) == Failure::kFormat);
}

TEST(format_rejects_a_wrong_file_size) {
  const std::uint64_t bytes = make_sample().encode().size();
  const auto with = [](std::uint64_t value) {
    return after_preamble([&](Preamble& p) { p.file_bytes = value; });
  };
  CHECK(with(bytes + 1) == Failure::kTruncated);
  CHECK(with(UINT64_MAX) == Failure::kTruncated);
  CHECK(with(bytes - 1) == Failure::kFormat);  // the last storage would end beyond it
  CHECK(with(4096) == Failure::kFormat);
  CHECK(with(4095) == Failure::kFormat);
  CHECK(with(0) == Failure::kFormat);
  std::string longer = make_sample().encode() + std::string(512, '\0');
  change_preamble(longer, [&](Preamble& p) { p.file_bytes = bytes + 512; });
  seal(longer);
  CHECK(outcome(longer) == Failure::kFormat);  // bytes that no storage explains
}

TEST(format_rejects_every_truncation) {
  const std::string file = make_sample().encode();
  for (std::size_t bytes = 0; bytes < file.size(); ++bytes) {
    const Failure expected = bytes < sizeof kMagic ? Failure::kFormat : Failure::kTruncated;
    CHECK(outcome(file.substr(0, bytes)) == expected);
  }
  CHECK(outcome(file) == kAccepted);
}

TEST(format_rejects_every_flipped_bit_of_the_header) {
  std::string file = make_sample().encode();
  for (std::size_t bit = 0; bit < 8 * kHeaderAlignBytes; ++bit) {
    const auto mask = static_cast<char>(1U << (bit % 8));
    file[bit / 8] = static_cast<char>(file[bit / 8] ^ mask);
    CHECK(outcome(file).has_value());
    file[bit / 8] = static_cast<char>(file[bit / 8] ^ mask);
  }
}

// ---- Sections ----

TEST(format_rejects_wrong_sections) {
  using S = SectionRecord;
  CHECK(after_section(0, [](S& s) { s.kind = 0; }) == Failure::kFormat);
  CHECK(after_section(1, [](S& s) { s.kind = 1; }) == Failure::kFormat);  // twice
  CHECK(after_section(1, [](S& s) { s.kind = 3; }) == Failure::kFormat);  // then 3 again
  CHECK(after_section(0, [](S& s) { s.kind = 9; }) == Failure::kFormat);
  for (const std::size_t i : {0U, 2U, 6U}) {
    CHECK(after_section(i, [](S& s) { s.offset += 8; }) == Failure::kFormat);  // a gap
    CHECK(after_section(i, [](S& s) { s.offset -= 8; }) == Failure::kFormat);  // an overlap
    CHECK(after_section(i, [](S& s) { s.offset += 1; }) == Failure::kFormat);
    CHECK(after_section(i, [](S& s) { s.offset = 0; }) == Failure::kFormat);
    CHECK(after_section(i, [](S& s) { s.offset = UINT64_MAX; }) == Failure::kFormat);
    CHECK(after_section(i, [](S& s) { s.bytes = 4097; }) == Failure::kFormat);
    CHECK(after_section(i, [](S& s) { s.bytes = UINT64_MAX; }) == Failure::kFormat);
    CHECK(after_section(i, [](S& s) { s.bytes = UINT64_MAX - s.offset + 1; }) == Failure::kFormat);
  }
  for (std::uint32_t bit = 1; bit < 32; ++bit) {
    CHECK(after_section(0, [&](S& s) { s.flags = 1U << bit; }) == Failure::kVersion);
  }
  CHECK(after_section(0, [](S& s) { s.flags = kSectionRequired; }) == kAccepted);
}

TEST(format_rejects_sections_that_occur_twice) {
  Tables tables;
  tables.sections = {{Section::kTree, "[]"}, {Section::kMetadata, "{}"}};
  CHECK(outcome(tables) == kAccepted);
  tables.sections[0].first = Section::kMetadata;
  CHECK(outcome(tables) == Failure::kFormat);
  tables.sections[0].first = Section{0};
  CHECK(outcome(tables) == Failure::kFormat);
}

TEST(format_ignores_unknown_sections_unless_required) {
  using S = SectionRecord;
  CHECK(after_section(6, [](S& s) { s.kind = 10; }) == kAccepted);
  CHECK(after_section(6, [](S& s) { s.kind = UINT32_MAX; }) == kAccepted);
  const auto require = [](S& s) {
    s.kind = 10;
    s.flags = kSectionRequired;
  };
  CHECK(after_section(6, require) == Failure::kVersion);
}

TEST(format_rejects_tables_of_broken_records) {
  // One byte less, which was 0, leaves the following section where it is.
  for (const std::size_t i : {0U, 1U, 2U, 4U}) {
    CHECK(after_section(i, [](SectionRecord& s) { s.bytes -= 1; }) == Failure::kFormat);
  }
}

TEST(format_rejects_a_wrong_section_count) {
  const std::uint32_t count = preamble_of(make_sample().encode()).section_count;
  for (const std::uint32_t wrong : {0U, 1U, count - 1, count + 1, kSectionCountMax}) {
    CHECK(after_preamble([&](Preamble& p) { p.section_count = wrong; }) == Failure::kFormat);
  }
  for (const std::uint32_t wrong : {kSectionCountMax + 1, UINT32_MAX}) {
    CHECK(after_preamble([&](Preamble& p) { p.section_count = wrong; }) == Failure::kLimit);
  }
}

TEST(format_rejects_padding_that_is_not_zero) {
  const std::string file = make_sample().encode();
  std::vector<bool> is_used(kHeaderAlignBytes);
  const std::uint32_t count = preamble_of(file).section_count;
  std::fill_n(is_used.begin(), section_record_at(count), true);
  for (std::size_t i = 0; i < count; ++i) {
    const SectionRecord section = section_of(file, i);
    std::fill_n(is_used.begin() + std::ptrdiff_t(section.offset), section.bytes, true);
  }
  int padding = 0;
  for (std::size_t i = 0; i < kHeaderAlignBytes; ++i) {
    if (is_used[i]) continue;
    ++padding;
    CHECK(after([&](std::string& f) { f[i] = '\x80'; }) == Failure::kFormat);
  }
  CHECK(padding > 3000);
  const auto between = is_used.begin() + std::ptrdiff_t(section_of(file, count - 1).offset);
  CHECK(std::find(is_used.begin(), between, false) != between);
}

TEST(format_rejects_wrong_devices) {
  const auto with = [](const std::string& device) {
    return after([&](std::string& file) {
      device.copy(&file[section_of(file, 4).offset], kDeviceNameBytes);
    });
  };
  const std::string zeros(kDeviceNameBytes, '\0');
  CHECK(with("gpu" + zeros) == kAccepted);
  CHECK(with(std::string(kDeviceNameBytes, 'd')) == kAccepted);
  CHECK(with(zeros) == Failure::kFormat);
  CHECK(with("a" + std::string(1, '\0') + "b" + zeros) == Failure::kFormat);
  CHECK(with(zeros.substr(1) + "b") == Failure::kFormat);
  CHECK(with("\xC0\x80" + zeros) == Failure::kFormat);
  CHECK(with(std::string(kDeviceNameBytes - 1, 'd') + "\xC3") == Failure::kFormat);
}

TEST(format_rejects_too_many_devices) {
  Tables tables;
  tables.devices.assign(kDeviceCountMax, "cpu");
  CHECK(outcome(tables) == kAccepted);
  tables.devices.emplace_back("cpu");
  CHECK(outcome(tables) == Failure::kLimit);
}

// ---- Storages ----

TEST(format_rejects_wrong_storages) {
  using S = StorageRecord;
  for (const std::size_t i : {0U, 1U, 2U, 3U}) {
    for (const std::uint64_t by : {std::uint64_t{256}, std::uint64_t{1}, -std::uint64_t{256}}) {
      CHECK(after_storage(i, [&](S& s) { s.offset += by; }) == Failure::kFormat);
    }
    CHECK(after_storage(i, [](S& s) { s.offset = 0; }) == Failure::kFormat);
    CHECK(after_storage(i, [](S& s) { s.offset = UINT64_MAX - 255; }) == Failure::kFormat);
    CHECK(after_storage(i, [](S& s) { s.bytes = UINT64_MAX; }) == Failure::kFormat);
    CHECK(after_storage(i, [](S& s) { s.bytes = std::uint64_t{1} << 63U; }) == Failure::kFormat);
    CHECK(after_storage(i, [](S& s) { s.device = 2; }) == Failure::kFormat);
    CHECK(after_storage(i, [](S& s) { s.device = 0xFFFF; }) == Failure::kFormat);
    CHECK(after_storage(i, [](S& s) { s.reserved = 1; }) == Failure::kVersion);
    for (std::uint32_t bit = 2; bit < 16; ++bit) {
      CHECK(after_storage(i, [&](S& s) { s.flags = std::uint16_t(s.flags | (1U << bit)); }) ==
            Failure::kVersion);
    }
  }
  CHECK(after_storage(0, [](S& s) { s.bytes = 257; }) == Failure::kFormat);  // into the next
  CHECK(after_storage(3, [](S& s) { s.bytes -= 1; }) == Failure::kFormat);   // short of the end
  CHECK(after_storage(3, [](S& s) { s.bytes += 1; }) == Failure::kFormat);
  CHECK(after_storage(3, [](S& s) { s.bytes = INT64_MAX; }) == Failure::kFormat);
  CHECK(after_storage(3, [](S& s) { s.flags = kStorageHasNoData; }) == Failure::kFormat);
  CHECK(after_storage(2, [](S& s) { s.flags = 0; }) == Failure::kFormat);
}

TEST(format_rejects_checksums_that_check_nothing) {
  using S = StorageRecord;
  CHECK(after_storage(0, [](S& s) { s.flags = 0; }) == Failure::kFormat);
  CHECK(after_storage(1, [](S& s) { s.crc32c = 1; }) == Failure::kFormat);
  CHECK(after_storage(2, [](S& s) { s.crc32c = 1; }) == Failure::kFormat);
  CHECK(after_storage(3, [](S& s) { s.crc32c = 1; }) == Failure::kFormat);
  CHECK(after_storage(3, [](S& s) { s.flags = kStorageHasChecksum; }) == kAccepted);
}

TEST(format_rejects_storages_that_nobody_uses) {
  Tables tables = make_sample();
  tables.add_storage(8, 0, 0);
  CHECK(outcome(tables) == Failure::kFormat);
  CHECK(after_tensor(2, [](TensorRecord& t) { t.storage = 0; }) == Failure::kFormat);
}

// ---- Tensors ----

TEST(format_rejects_wrong_tensor_fields) {
  using T = TensorRecord;
  for (const int dtype : {0, 42, 0xFFFF}) {
    CHECK(after_tensor(4, [&](T& t) { t.dtype = std::uint16_t(dtype); }) == Failure::kVersion);
  }
  for (std::uint32_t bit = 0; bit < 16; ++bit) {
    const Outcome expected = bit < 5 ? kAccepted : Outcome(Failure::kVersion);
    CHECK(after_tensor(4, [&](T& t) { t.flags = std::uint16_t(1U << bit); }) == expected);
  }
  CHECK(after_tensor(0, [](T& t) { t.reserved = 1; }) == Failure::kVersion);
  CHECK(after_tensor(4, [](T& t) { t.storage = 4; }) == Failure::kFormat);
  CHECK(after_tensor(4, [](T& t) { t.storage = UINT32_MAX; }) == Failure::kFormat);
}

TEST(format_rejects_a_wrong_rank) {
  using T = TensorRecord;
  for (const std::uint32_t rank : {65U, 0x80000000U, UINT32_MAX}) {
    CHECK(after_tensor(4, [&](T& t) { t.rank = rank; }) == Failure::kLimit);
  }
  for (const std::uint32_t rank : {0U, 2U, 64U}) {
    CHECK(after_tensor(4, [&](T& t) { t.rank = rank; }) == Failure::kFormat);
  }
  CHECK(after_tensor(5, [](T& t) { t.rank = 1; }) == Failure::kFormat);  // beyond the dims
  CHECK(outcome(make_meta(4, DType::kInt32, Dims(64, 1), Dims(64, 1))) == kAccepted);
  CHECK(outcome(make_meta(4, DType::kInt32, Dims(65, 1), Dims(65, 1))) == Failure::kLimit);
}

TEST(format_rejects_dims_and_names_elsewhere) {
  using T = TensorRecord;
  for (const std::size_t i : {0U, 1U, 5U}) {
    for (const std::uint64_t by : {std::uint64_t{1}, -std::uint64_t{1}, std::uint64_t{1} << 61U}) {
      CHECK(after_tensor(i, [&](T& t) { t.dims_offset += by; }) == Failure::kFormat);
      CHECK(after_tensor(i, [&](T& t) { t.name_offset += by; }) == Failure::kFormat);
    }
  }
  // The same dims for two tensors, with as many left over.
  CHECK(after_tensor(1, [](T& t) { t.dims_offset = 0; }) == Failure::kFormat);
  CHECK(after_tensor(4, [](T& t) { t.name_bytes -= 1; }) == Failure::kFormat);
  CHECK(after_tensor(5, [](T& t) { t.name_bytes = 1; }) == Failure::kFormat);
  CHECK(after_tensor(5, [](T& t) { t.name_bytes = kNameBytesMax; }) == Failure::kFormat);
  CHECK(after_tensor(5, [](T& t) { t.name_bytes = kNameBytesMax + 1; }) == Failure::kLimit);
  CHECK(after_tensor(5, [](T& t) { t.name_bytes = UINT32_MAX; }) == Failure::kLimit);
}

TEST(format_rejects_names_and_dims_left_over) {
  Tables tables = make_sample();
  tables.names += 'x';
  CHECK(outcome(tables) == Failure::kFormat);
  tables = make_sample();
  tables.dims.push_back(1);
  CHECK(outcome(tables) == Failure::kFormat);
}

TEST(format_keeps_the_limit_of_names) {
  Tables tables;
  tables.devices = {"cpu"};
  tables.add_storage(0, 0, 0);
  tables.add_tensor(std::string(kNameBytesMax, 'n'), DType::kInt8, 0, 0, {0}, {1});
  CHECK(outcome(tables) == kAccepted);
  tables.add_tensor(std::string(kNameBytesMax + 1, 'n'), DType::kInt8, 0, 0, {0}, {1});
  CHECK(outcome(tables) == Failure::kLimit);
}

TEST(format_rejects_wrong_dims) {
  // dims: weight 2 3 3 1, tied 2 3 3 1, empty 0 4 4 1, meta 8 1, bias 10 9
  for (const std::size_t i : {0U, 2U, 8U, 9U, 10U, 12U, 13U, 14U, 15U}) {
    CHECK(after_dim(i, -1) == Failure::kFormat);
    CHECK(after_dim(i, INT64_MIN) == Failure::kFormat);
  }
  CHECK(after_dim(12, 9) == Failure::kFormat);
  CHECK(after_dim(12, 7) == kAccepted);  // a view need not use all of its storage
  CHECK(after_dim(12, INT64_MAX) == Failure::kFormat);
  CHECK(after_dim(14, 11) == kAccepted);  // to the last byte
  CHECK(after_dim(14, 12) == Failure::kFormat);
  CHECK(after_dim(15, 10) == kAccepted);
  CHECK(after_dim(15, 11) == Failure::kFormat);
  CHECK(after_dim(15, INT64_MAX) == Failure::kFormat);
  CHECK(after_dim(9, INT64_MAX / 2) == kAccepted);  // {0, 2^62 - 1} of two bytes each
  CHECK(after_dim(9, INT64_MAX / 2 + 1) == Failure::kFormat);
}

TEST(format_rejects_products_that_overflow) {
  constexpr std::int64_t half = std::int64_t{1} << 32U;
  const auto with = [](DType dtype, const Dims& shape, const Dims& stride) {
    return outcome(make_meta(INT64_MAX, dtype, shape, stride));
  };
  CHECK(with(DType::kInt8, {INT64_MAX}, {1}) == kAccepted);
  CHECK(with(DType::kInt16, {INT64_MAX}, {1}) == Failure::kFormat);
  CHECK(with(DType::kInt16, {INT64_MAX}, {0}) == Failure::kFormat);
  CHECK(with(DType::kInt8, {half, half}, {0, 0}) == Failure::kFormat);
  CHECK(with(DType::kInt8, {0, half, half}, {0, 0, 0}) == Failure::kFormat);
  CHECK(with(DType::kInt8, {2, 2}, {INT64_MAX, INT64_MAX}) == Failure::kFormat);
  CHECK(with(DType::kInt8, {2, 2, 2}, Dims(3, INT64_MAX - 1)) == Failure::kFormat);
  CHECK(with(DType::kInt8, {half, half}, {half, half}) == Failure::kFormat);
  CHECK(with(DType::kComplex128, {2}, {INT64_MAX / 16}) == Failure::kFormat);
}

TEST(format_rejects_tensors_that_leave_their_storage) {
  using T = TensorRecord;
  CHECK(after_tensor(4, [](T& t) { t.storage_offset = 18; }) == kAccepted);
  for (const std::uint64_t offset : {std::uint64_t{19}, std::uint64_t{100}, std::uint64_t{101},
                                     std::uint64_t{INT64_MAX}, UINT64_MAX, UINT64_MAX - 80}) {
    CHECK(after_tensor(4, [&](T& t) { t.storage_offset = offset; }) == Failure::kFormat);
  }
  // In bytes this offset wraps to one within the storage.
  CHECK(after_tensor(5, [](T& t) { t.storage_offset = std::uint64_t{1} << 60U; }) ==
        Failure::kFormat);
  CHECK(after_tensor(5, [](T& t) { t.storage_offset = 6; }) == Failure::kFormat);
  CHECK(after_tensor(3, [](T& t) { t.storage_offset = 1; }) == Failure::kFormat);
  // An empty tensor may start where its storage ends, not beyond.
  CHECK(after_tensor(2, [](T& t) { t.storage_offset = 1; }) == Failure::kFormat);
}

TEST(format_rejects_lies_about_sameness) {
  using T = TensorRecord;
  CHECK(after_tensor(1, [](T& t) { t.same_as = 1; }) == kAccepted);
  CHECK(after_tensor(1, [](T& t) { t.same_as = 2; }) == Failure::kFormat);  // a later one
  CHECK(after_tensor(0, [](T& t) { t.same_as = 1; }) == Failure::kFormat);
  CHECK(after_tensor(1, [](T& t) { t.same_as = 6; }) == Failure::kFormat);
  CHECK(after_tensor(1, [](T& t) { t.same_as = UINT32_MAX; }) == Failure::kFormat);
  CHECK(after_tensor(5, [](T& t) { t.same_as = 4; }) == Failure::kFormat);
  CHECK(after_tensor(1, [](T& t) { t.dtype = std::uint16_t(DType::kInt32); }) == Failure::kFormat);
  CHECK(after_tensor(1, [](T& t) { t.flags = 0; }) == Failure::kFormat);
  CHECK(after_tensor(1, [](T& t) { t.storage = 3; }) == Failure::kFormat);
  CHECK(after_dim(5, 2) == Failure::kFormat);
  CHECK(after_dim(6, 2) == Failure::kFormat);

  // The original of the original: 0 <- 1 <- 2.
  Tables tables = make_meta(9, DType::kInt8, {8}, {1});
  tables.add_tensor("y", DType::kInt8, 0, 0, {8}, {1}).same_as = 0;
  tables.add_tensor("z", DType::kInt8, 0, 0, {8}, {1}).same_as = 0;
  CHECK(outcome(tables) == kAccepted);
  tables.tensors[2].same_as = 1;
  CHECK(outcome(tables) == Failure::kFormat);
  tables.tensors[2].same_as = 0;
  tables.tensors[1].storage_offset = 1;
  CHECK(outcome(tables) == Failure::kFormat);
  tables.tensors[1].storage_offset = 0;
  CHECK(outcome(tables) == kAccepted);
  tables.add_tensor("scalar", DType::kInt8, 0, 0, {}, {}).same_as = 0;  // of another rank
  CHECK(outcome(tables) == Failure::kFormat);
}

// ---- Names ----

// One character at the start of `text`: its length, or 0. By computing the code point and asking
// whether this is how one writes it.
std::size_t reference_character(const std::string& text) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned first = byte(0);
  const std::size_t bytes = first < 0x80 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
  if ((first & 0xC0U) == 0x80 || first >= 0xF8 || bytes > text.size()) return 0;
  std::uint32_t point = bytes == 1 ? first : first & (0x7FU >> bytes);
  for (std::size_t i = 1; i < bytes; ++i) {
    if ((byte(i) & 0xC0U) != 0x80) return 0;
    point = (point << 6U) | (byte(i) & 0x3FU);
  }
  const std::uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
  const bool is_surrogate = point >= 0xD800 && point <= 0xDFFF;
  return point < least[bytes] || is_surrogate || point > 0x10FFFF ? 0 : bytes;
}

bool reference_utf8(std::string text) {
  while (!text.empty()) {
    const std::size_t bytes = reference_character(text);
    if (bytes == 0) return false;
    text.erase(0, bytes);
  }
  return true;
}

Outcome with_name(const std::string& name) {
  Tables tables;
  tables.devices = {"cpu"};
  tables.add_storage(0, 0, 0);
  tables.add_tensor(name, DType::kInt8, 0, 0, {0}, {1});
  return outcome(tables);
}

TEST(format_rejects_names_that_are_not_utf8) {
  for (const char* name : {"\x80",
                           "\xBF",
                           "\xC0\x80",
                           "\xC1\xBF",
                           "\xE0\x80\x80",
                           "\xE0\x9F\xBF",
                           "\xF0\x80\x80\x80",
                           "\xF0\x8F\xBF\xBF",  // overlong
                           "\xED\xA0\x80",
                           "\xED\xBF\xBF",
                           "\xED\xA0\x80\xED\xB0\x80",  // surrogates
                           "\xC3",
                           "\xE2\x82",
                           "\xF0\x9F\x98",
                           "\xE2\x28\xA1",  // cut short
                           "\xF4\x90\x80\x80",
                           "\xF5\x80\x80\x80",
                           "\xF8\x88\x80\x80\x80",
                           "\xFF",
                           "\xFE"}) {
    for (const char* before : {"", "layer.0", "layer.01", "layer.01."}) {
      CHECK(with_name(std::string(before) + name) == Failure::kFormat);
      CHECK(with_name(before + std::string(name) + "weights!") == Failure::kFormat);
    }
  }
  for (const char* name :
       {"\x7F", "\xC2\x80", "\xDF\xBF", "\xE0\xA0\x80", "\xED\x9F\xBF", "\xEE\x80\x80",
        "\xEF\xBF\xBF", "\xF0\x90\x80\x80", "\xF4\x8F\xBF\xBF"}) {
    CHECK(with_name(std::string("layer.01") + name) == kAccepted);
  }
  CHECK(with_name(std::string("a\0b", 3)) == kAccepted);
}

TEST(format_knows_utf8_as_the_reference_does) {
  const std::string seconds("\x00\x28\x7F\x80\x8F\x90\x9F\xA0\xBF\xC0\xC3\xFF", 12);
  const std::string others("\x41\x7F\x80\xBF\xC0", 5);
  for (unsigned first = 0; first < 256; ++first) {
    const std::string one(1, static_cast<char>(first));
    CHECK((with_name(one) == kAccepted) == reference_utf8(one));
    for (const char second : seconds) {
      const std::string two = one + second;
      CHECK((with_name(two) == kAccepted) == reference_utf8(two));
      for (const char third : others) {
        const std::string three = two + third;
        CHECK((with_name(three) == kAccepted) == reference_utf8(three));
        if (first < 0xF0) continue;
        const std::string four = three + '\x80';
        CHECK((with_name(four) == kAccepted) == reference_utf8(four));
      }
    }
  }
}

Tables make_named(const std::vector<std::string>& names) {
  Tables tables;
  tables.devices = {"cpu"};
  tables.add_storage(0, 0, 0);
  for (const std::string& name : names) tables.add_tensor(name, DType::kInt8, 0, 0, {0}, {1});
  return tables;
}

TEST(format_rejects_names_that_occur_twice) {
  CHECK(outcome(make_named({"", "a", "b", "ab"})) == kAccepted);
  CHECK(outcome(make_named({"a", "b", "a"})) == Failure::kFormat);
  CHECK(outcome(make_named({"", "b", ""})) == Failure::kFormat);
  std::vector<std::string> names;
  names.reserve(30000);
  for (int i = 0; i < 30000; ++i) names.push_back(std::to_string(i));
  CHECK(outcome(make_named(names)) == kAccepted);
  names.back() = "17";
  CHECK(outcome(make_named(names)) == Failure::kFormat);
}

// Names that all fall into one place of a hash table.
TEST(format_is_quick_with_names_made_to_collide) {
  constexpr std::size_t mask = 0x3FF;
  std::vector<std::string> names;
  for (int i = 0; names.size() < 300; ++i) {
    std::string name = std::to_string(i);
    if ((std::hash<std::string_view>{}(name)&mask) == 0) names.push_back(std::move(name));
  }
  CHECK(outcome(make_named(names)) == kAccepted);
  names.back() = names.front();
  CHECK(outcome(make_named(names)) == Failure::kFormat);
  names.back() = "another";
  names[298] = names[70];
  CHECK(outcome(make_named(names)) == Failure::kFormat);
}

// ---- Random damage that the checksum does not show ----

template <class T>
T interesting_number(Random& random, T now) {
  const T special[] = {0,
                       1,
                       T(now + 1),
                       T(now - 1),
                       T(now ^ (T{1} << random.below(8 * sizeof(T)))),
                       std::numeric_limits<T>::max(),
                       T(std::numeric_limits<T>::max() / 2),
                       T(std::numeric_limits<T>::max() / 2 + 1),
                       T(now * 2),
                       T(now + 256),
                       T(now + 4096),
                       T(random.below(64)),
                       T(random.next())};
  return special[random.below(std::size(special))];
}

template <class T>
void mutate_number(Random& random, std::string& file, std::size_t begin, std::size_t end) {
  const std::size_t at = begin + random.below((end - begin) / sizeof(T)) * sizeof(T);
  T value = 0;
  std::memcpy(&value, &file[at], sizeof value);
  value = interesting_number(random, value);
  std::memcpy(&file[at], &value, sizeof value);
}

// Changes a number of any width among [begin, end).
void mutate(Random& random, std::string& file, std::size_t begin, std::size_t end) {
  switch (random.below(4)) {
    case 0:
      return mutate_number<std::uint8_t>(random, file, begin, end);
    case 1:
      return mutate_number<std::uint16_t>(random, file, begin, end);
    case 2:
      return mutate_number<std::uint32_t>(random, file, begin, end);
    default:
      return mutate_number<std::uint64_t>(random, file, begin, end);
  }
}

// That a header which has been accepted is safe to use, checked without format.cc's own arithmetic.
bool is_sound(const Header& header, std::uint64_t file_bytes) {
  std::uint64_t end = 0;
  const Index& index = header.index();
  for (const StorageRecord& storage : index.storages) {
    const bool has_data = (storage.flags & kStorageHasNoData) == 0;
    if (has_data && storage.bytes > 0 &&
        (__builtin_add_overflow(storage.offset, storage.bytes, &end) || end > file_bytes))
      return false;
    if (storage.device >= header.devices().size()) return false;
  }
  std::set<std::string_view> names;
  for (const TensorRecord& tensor : index.tensors) {
    const DTypeInfo* dtype = find_dtype(tensor.dtype);
    if (dtype == nullptr || !names.insert(index.name(tensor)).second) return false;
    std::uint64_t items = tensor.storage_offset + 1;
    bool is_empty = false;
    for (std::uint32_t d = 0; d < tensor.rank; ++d) {
      const std::int64_t size = index.dims[tensor.dims_offset + d];
      const std::int64_t stride = index.dims[tensor.dims_offset + tensor.rank + d];
      std::uint64_t reach = 0;
      if (size < 0 || stride < 0) return false;
      is_empty = is_empty || size == 0;
      if (size > 1 && (__builtin_mul_overflow(size - 1, stride, &reach) ||
                       __builtin_add_overflow(items, reach, &items)))
        return false;
    }
    if (is_empty) items = tensor.storage_offset;
    if (items < tensor.storage_offset || __builtin_mul_overflow(items, dtype->item_bytes, &end) ||
        end > index.storages[tensor.storage].bytes)
      return false;
  }
  return true;
}

// Every byte of a header is accounted for: what was read, written again, gives the same bytes. Not
// if it has something that this release ignores.
bool is_canonical(const Header& header, const std::string& file) {
  const std::uint32_t count = header.preamble().section_count;
  HeaderContent content{header.index(), header.preamble().flags, header.devices(), {}};
  bool ignores = header.preamble().version_minor != kVersionMinor;
  std::uint32_t tables = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const SectionRecord section = section_of(file, i);
    ignores = ignores || section.flags != 0 || section.kind > std::uint32_t(Section::kPickle);
    tables += section.kind <= std::uint32_t(Section::kDevices) ? 1 : 0;
    if (section.kind > std::uint32_t(Section::kDevices))
      content.sections.emplace_back(Section{section.kind},
                                    file.substr(section.offset, section.bytes));
  }
  if (ignores || tables != 5) return true;
  const std::string again = encode_header(content);
  return file.compare(0, again.size(), again) == 0;
}

TEST(format_survives_random_damage) {
  Random random(20);
  const std::string original = make_sample().encode();
  const SectionRecord last = section_of(original, preamble_of(original).section_count - 1);
  const std::size_t used_bytes = (last.offset + last.bytes + 15) / 8 * 8;
  int accepted = 0;
  for (int i = 0; i < 20000; ++i) {
    std::string file = original;
    // Damage to the preamble or the section table stops a reader before it sees any other.
    const std::size_t begin = random.below(4) == 0 ? 0 : section_of(file, 0).offset;
    for (std::uint64_t times = 1 + random.below(3); times > 0; --times)
      mutate(random, file, begin, used_bytes);
    seal(file);
    try {
      const Header header = decode(file);
      ++accepted;
      CHECK(is_sound(header, file.size()));
      CHECK(is_canonical(header, file));
    } catch (const Error&) {
    }
  }
  CHECK(accepted > 200 && accepted < 15000);  // the damage is neither too much nor too little
}

TEST(format_survives_noise) {
  Random random(21);
  for (int i = 0; i < 2000; ++i) {
    std::string file = make_sample().encode();
    const std::size_t first = random.below(2) == 0 ? sizeof(Preamble) : sizeof kMagic;
    for (std::size_t at = first; at < 4096; ++at)
      file[at] = static_cast<char>(random.next() & 0xFFU);
    seal(file);
    CHECK(outcome(file).has_value());
  }
}

}  // namespace
}  // namespace fastsd::test
