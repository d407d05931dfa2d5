#include "torch_zip.h"

#include <string>

#include "check.h"
#include "support.h"
#include "zip_sample.h"

namespace fastsd::test {
namespace {

using Files = ZipBuilder::Files;

Tables read(const Files& files) { return read_torch_zip(file_of(ZipBuilder::build(files).bytes)); }

void check_refused(const Files& files, Failure failure, const std::string& part) {
  const auto call = [&] { return read(files); };
  const std::string message = message_of(call);
  const std::string shown = "expected \"" + part + "\", not \"" + message + "\"";
  check(failure_of(call) == failure && message.find(part) != std::string::npos, shown.c_str(),
        __FILE__, __LINE__);
}

using Sections = std::vector<std::pair<Section, std::string>>;

TEST(torch_zip_finds_storages_and_sections) {
  const Files files = {
      {"m/data.pkl", "pickle"},
      {"m/.format_version", "1"},
      {"m/.storage_alignment", "64"},
      {"m/byteorder", "big"},
      {"m/data/", ""},
      {"m/data/10", "0123456789"},
      {"m/data/2", ""},
      {"m/data/\xC3\xA9/x", "ab"},
      {"m/version", "3\n"},
      {"other/data/9", "zz"},
      {"m/.data/serialization_id", "0"},
  };
  const std::string bytes = ZipBuilder::build(files).bytes;
  const Tables tables = read_torch_zip(file_of(bytes));
  CHECK(tables.file_bytes == bytes.size() && tables.flags == 0);
  CHECK((tables.sections == Sections{{Section::kPickle, "pickle"}, {kByteOrder, "big"}}));
  if (!CHECK(tables.tensors.size() == 3 && tables.storages.size() == 3)) return;
  const Index index = tables.index();
  const char* names[] = {"10", "2", "\xC3\xA9/x"};
  const char* contents[] = {"0123456789", "", "ab"};
  for (std::uint32_t i = 0; i < 3; ++i) {
    const TensorRecord& tensor = index.tensors[i];
    const StorageRecord& storage = index.storages[i];
    CHECK(index.name(tensor) == names[i] && tensor.storage == i && tensor.same_as == i);
    CHECK(tensor.dtype == std::uint16_t(DType::kUInt8) && tensor.rank == 1);
    CHECK(index.dims[tensor.dims_offset] == std::int64_t(storage.bytes));
    CHECK(index.dims[tensor.dims_offset + 1] == 1);
    CHECK(bytes.substr(storage.offset, storage.bytes) == contents[i]);
    CHECK(storage.offset % 64 == 0 &&
          storage.flags == (storage.bytes > 0 ? kStorageHasChecksum : 0));
    CHECK(tables.storages.at(i).crc32c == ZipBuilder::crc32_of(contents[i]));
  }
}

TEST(torch_zip_may_lack_all_but_the_pickle) {
  const Tables tables = read({{"archive/data.pkl", ""}});
  CHECK((tables.sections == Sections{{Section::kPickle, ""}}));
  CHECK(tables.tensors.empty());
}

TEST(torch_zip_tells_torchscript) {
  const Tables tables =
      read({{"a/data.pkl", "p"}, {"a/constants.pkl", "c"}, {"a/data/0", "d"}, {"a/version", "99"}});
  CHECK((tables.sections == Sections{{kTorchScript, ""}}));
  CHECK(tables.tensors.empty());
}

TEST(torch_zip_refuses_other_zip_files) {
  const char* part = "not one that torch.save writes";
  check_refused({}, Failure::kFormat, part);
  check_refused({{"data.pkl", "p"}}, Failure::kFormat, part);
  check_refused({{"a/b/data.pkl", "p"}}, Failure::kFormat, part);
  check_refused({{"word/document.xml", "p"}}, Failure::kFormat, part);
  check_refused({{"a/data.pkl", "p"}, {"b/data.pkl", "q"}}, Failure::kFormat,
                "two records data.pkl");
}

TEST(torch_zip_refuses_what_it_does_not_know) {
  check_refused({{"a/data.pkl", "p"}, {"a/version", "11"}}, Failure::kVersion, "version 11");
  check_refused({{"a/data.pkl", "p"}, {"a/version", "x"}}, Failure::kFormat, "version");
  check_refused({{"a/data.pkl", "p"}, {"a/version", ""}}, Failure::kFormat, "version");
  check_refused({{"a/data.pkl", "p"}, {"a/version", "3 4"}}, Failure::kFormat, "version");
  check_refused({{"a/data.pkl", "p"}, {"a/version", std::string(33, '1')}}, Failure::kLimit, "32");
  check_refused({{"a/data.pkl", "p"}, {"a/byteorder", "middle"}}, Failure::kFormat, "byteorder");
  check_refused({{"a/data.pkl", "p"}, {"a/data/\xFF", "d"}}, Failure::kFormat, "not UTF-8");
}

TEST(torch_zip_refuses_compressed_records) {
  const Files files = {
      {"a/data.pkl", "p"}, {"a/data/0", "d"}, {"a/byteorder", "little"}, {"a/other", "o"}};
  for (std::size_t i = 0; i < files.size(); ++i) {
    ZipSample zip = ZipBuilder::build(files);
    zip.put(zip.centrals[i] + 10, std::uint16_t{8});
    zip.put(zip.locals[i] + 8, std::uint16_t{8});
    const auto call = [&] { return read_torch_zip(file_of(zip.bytes)); };
    const bool is_needed = files[i].first != "a/other";
    CHECK(failure_of(call) ==
          (is_needed ? std::optional(Failure::kUnsupported) : std::optional<Failure>()));
    if (is_needed)
      CHECK(message_of(call).find("`" + files[i].first + "` is compressed") != std::string::npos);
  }
}

TEST(torch_zip_survives_any_change_of_a_byte_and_any_cut) {
  const std::string file =
      ZipBuilder::build({{"a/data.pkl", "p"}, {"a/data/0", "12345"}, {"a/version", "3"}}).bytes;
  CHECK(is_sound(read_torch_zip(file_of(file))));
  for (std::size_t bytes = 0; bytes < file.size(); ++bytes) {
    CHECK(failure_of([&] { return read_torch_zip(file_of(file.substr(0, bytes))); }) ==
          Failure::kTruncated);
  }
  for (std::size_t i = 0; i < file.size(); ++i) {
    for (int value = 0; value < 256; ++value) {
      std::string changed = file;
      changed[i] = static_cast<char>(value);
      try {
        CHECK(is_sound(read_torch_zip(file_of(changed))));
      } catch (const Error& error) {
        CHECK(*error.what() != '\0' && error.kind != Failure::kSystem);
      }
    }
  }
}

}  // namespace
}  // namespace fastsd::test
