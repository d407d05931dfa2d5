#include "zip.h"

#include <string>
#include <vector>

#include "check.h"
#include "support.h"
#include "zip_sample.h"

namespace fastsd::test {
namespace {

using Files = ZipBuilder::Files;
using Change = void (*)(ZipSample&);

Files some_files() { return {{"a/one", "1234567"}, {"a/none", ""}, {"b", std::string(5000, 'b')}}; }

bool is_sound(const ZipDirectory& directory, std::uint64_t file_bytes) {
  std::uint64_t end = 0;
  for (const ZipRecord& record : directory.records) {
    if (record.offset < end || record.offset > file_bytes) return false;
    if (record.bytes > file_bytes - record.offset) return false;
    end = record.offset + record.bytes;
  }
  return true;
}

void check_records(const std::string& bytes, const Files& files) {
  const File file = file_of(bytes);
  const ZipDirectory directory = read_zip_directory(file);
  CHECK(is_sound(directory, bytes.size()));
  if (!CHECK(directory.records.size() == files.size())) return;
  for (std::size_t i = 0; i < files.size(); ++i) {
    const ZipRecord& record = directory.records[i];
    CHECK(record.name == files[i].first && !record.is_compressed);
    CHECK(bytes.substr(record.offset, record.bytes) == files[i].second);
    CHECK(record.crc32 == ZipBuilder::crc32_of(files[i].second));
  }
}

void check_refused(const std::string& bytes, Failure failure, const std::string& part, int line) {
  const auto call = [&] { return read_zip_directory(file_of(bytes)).records.size(); };
  const std::string message = message_of(call);
  const std::string shown = "expected \"" + part + "\", not \"" + message + "\"";
  check(failure_of(call) == failure && message.find(part) != std::string::npos, shown.c_str(),
        __FILE__, line);
}

// That the sample with this change is refused in this way.
void check_refused(Change change, Failure failure, const std::string& part, int line) {
  ZipSample zip = ZipBuilder::build(some_files());
  change(zip);
  check_refused(zip.bytes, failure, part, line);
}

#define REFUSED(change, failure, part) \
  check_refused([](ZipSample& zip) { change; }, Failure::failure, part, __LINE__)

TEST(zip_finds_records) {
  for (const bool is_wide : {false, true}) {
    check_records(ZipBuilder::build(some_files(), is_wide).bytes, some_files());
    check_records(ZipBuilder::build({}, is_wide).bytes, {});
  }
}

TEST(zip_finds_the_end_before_a_comment) {
  for (const std::size_t bytes : {1U, 100U, 65535U})
    check_records(ZipBuilder::build(some_files(), true, std::string(bytes, 'c')).bytes,
                  some_files());
}

// Readers that look from the end, and those that look for a comment that fits, would find
// different directories.
TEST(zip_refuses_an_end_within_a_comment) {
  const ZipSample inner = ZipBuilder::build(some_files(), false);
  const std::string end = inner.bytes.substr(inner.end);
  check_refused(ZipBuilder::build(some_files(), false, end + "x").bytes, Failure::kFormat,
                "1 follow the end of the directory", __LINE__);
  check_refused(ZipBuilder::build(some_files(), false, end).bytes, Failure::kFormat,
                "and its end is at byte", __LINE__);
}

TEST(zip_finds_records_in_any_order) {
  ZipSample zip = ZipBuilder::build({{"x", "1"}, {"y", "2"}});
  zip.put(zip.centrals[0] + 42, std::uint32_t(zip.locals[1]));
  zip.put(zip.centrals[1] + 42, std::uint32_t(zip.locals[0]));
  zip.bytes[zip.centrals[0] + 46] = 'y';
  zip.bytes[zip.centrals[1] + 46] = 'x';
  const ZipDirectory directory = read_zip_directory(file_of(zip.bytes));
  CHECK(directory.records.at(0).name == "x" && directory.records.at(1).name == "y");
}

// A directory whose only record has its sizes, its offset and its disk in the extension.
ZipSample with_wide_fields(std::size_t extra_bytes) {
  ZipSample zip = ZipBuilder::build({{"x", "12345"}});
  const std::size_t central = zip.centrals[0];
  std::string extra("\x99\x99\x02\x00zz\x01\x00", 8);
  const std::uint64_t fields[] = {5, 5, 0, 0};
  const auto field_bytes = std::uint16_t(extra_bytes);
  extra.append(reinterpret_cast<const char*>(&field_bytes), 2);
  extra.append(reinterpret_cast<const char*>(fields), extra_bytes);
  zip.put(central + 20, std::uint64_t{UINT64_MAX});
  zip.put(central + 42, std::uint32_t{UINT32_MAX});
  zip.put(central + 34, std::uint16_t{UINT16_MAX});
  zip.put(central + 30, std::uint16_t(extra.size()));
  zip.bytes.insert(central + 46 + 1, extra);
  const std::size_t shift = extra.size();
  zip.put(zip.end64 + shift + 40, zip.get<std::uint64_t>(zip.end64 + shift + 40) + shift);
  zip.put(zip.locator + shift + 8, std::uint64_t{zip.end64 + shift});
  zip.put(zip.end + shift + 12, std::uint32_t{UINT32_MAX});
  zip.put(zip.end + shift + 16, std::uint32_t{UINT32_MAX});
  zip.put(zip.end + shift + 8, std::uint32_t{UINT32_MAX});  // both counts
  return zip;
}

TEST(zip_reads_wide_fields) {
  check_records(with_wide_fields(28).bytes, {{"x", "12345"}});
  for (const std::size_t bytes : {0U, 8U, 16U, 24U, 27U})
    check_refused(with_wide_fields(bytes).bytes, Failure::kFormat, "lacks the 64-bit sizes",
                  __LINE__);
}

TEST(zip_refuses_an_end_that_lies) {
  REFUSED(zip.put(zip.end64 + 32, std::uint64_t{4}), kFormat, "is 3, and in 64 bits 4");
  REFUSED(zip.put(zip.end64 + 24, std::uint64_t{1}), kUnsupported, "one of several");
  REFUSED(zip.put(zip.end64 + 16, std::uint32_t{1}), kUnsupported, "one of several");
  REFUSED(zip.put(zip.end + 4, std::uint16_t{1}), kUnsupported, "one of several");
  REFUSED(zip.put(zip.locator + 16, std::uint32_t{2}), kUnsupported, "one of several");
  REFUSED(zip.put(zip.end + 10, std::uint16_t{4}), kFormat, "number of records is 4, and in");
  REFUSED(zip.put(zip.end + 12, std::uint32_t{4}), kFormat, "size is 4, and in 64 bits");
  REFUSED(zip.put(zip.end + 16, std::uint32_t{4}), kFormat, "offset is 4, and in 64 bits");
  REFUSED(zip.put(zip.locator + 8, std::uint64_t{0}), kFormat, "no zip64 end of directory");
  REFUSED(zip.put(zip.locator + 8, std::uint64_t{UINT64_MAX}), kFormat, "not before itself");
  REFUSED(zip.put(zip.end64 + 4, std::uint64_t{45}), kFormat, "no zip64 end of directory");
  REFUSED(zip.bytes += 'x', kFormat, "1 follow the end of the directory");
  REFUSED(zip.bytes.insert(zip.end64, "x"), kFormat, "no zip64 end of directory");
  REFUSED(zip.bytes.insert(0, "x"), kFormat, "no zip64 end of directory");
}

TEST(zip_refuses_counts_that_lie) {
  const auto with_count = [](std::uint16_t count) {
    ZipSample zip = ZipBuilder::build(some_files(), false);
    zip.put(zip.end + 8, count);
    zip.put(zip.end + 10, count);
    return zip.bytes;
  };
  check_refused(with_count(2), Failure::kFormat, "goes on for 47 bytes behind its 2 records",
                __LINE__);
  check_refused(with_count(4), Failure::kFormat, "too few for its 4 records", __LINE__);
  check_refused(with_count(65535), Failure::kFormat, "too few for its 65535 records", __LINE__);
  const auto with_offset = [](std::uint32_t shift) {
    ZipSample zip = ZipBuilder::build(some_files(), false);
    zip.put(zip.end + 16, std::uint32_t(zip.directory) + shift);
    return zip.bytes;
  };
  for (const std::uint32_t shift : {1U, 0U - 1U, 1U << 30U})
    check_refused(with_offset(shift), Failure::kFormat, "and its end is at byte", __LINE__);
}

TEST(zip_refuses_what_precedes_the_first_record) {
  ZipSample zip = ZipBuilder::build(some_files(), false);
  zip.bytes.insert(0, "#!/bin/sh\n");
  zip.put(zip.end + 10 + 16, std::uint32_t(zip.directory + 10));
  for (std::size_t i = 0; i < some_files().size(); ++i)
    zip.put(zip.centrals[i] + 10 + 42, std::uint32_t(zip.locals[i] + 10));
  check_refused(zip.bytes, Failure::kFormat, "does not begin with a record", __LINE__);
}

TEST(zip_refuses_records_that_lie) {
  REFUSED(zip.put(zip.centrals[1], std::uint32_t{0}), kFormat, "no record where it must");
  REFUSED(zip.put(zip.centrals[0] + 8, std::uint16_t{1}), kUnsupported, "`a/one` is encrypted");
  REFUSED(zip.put(zip.locals[0] + 6, std::uint16_t{1}), kFormat, "or contradicts");
  REFUSED(zip.put(zip.locals[0] + 8, std::uint16_t{8}), kFormat, "or contradicts");
  REFUSED(zip.put(zip.locals[2] + 30, 'c'), kFormat, "is not that of zip record `b`");
  REFUSED(zip.put(zip.locals[0] + 26, std::uint16_t{4}), kFormat, "is not that of");
  REFUSED(zip.put(zip.locals[0], std::uint32_t{0}), kFormat, "is not that of");
  REFUSED(zip.put(zip.locals[0] + 6, std::uint16_t{0}), kFormat, "or contradicts");
  REFUSED(zip.put(zip.locals[0] + 28, std::uint16_t{60000}), kFormat, "does not fit before");
  REFUSED(zip.put(zip.centrals[0] + 20, std::uint32_t{6}), kFormat, "takes 6 bytes for 7");
  REFUSED(zip.put(zip.centrals[0] + 24, std::uint32_t{100'000'000}), kFormat, "takes 7 bytes");
  REFUSED(zip.put(zip.centrals[0] + 34, std::uint16_t{1}), kUnsupported, "one of several");
  REFUSED(zip.put(zip.centrals[2] + 28, std::uint16_t{2}), kFormat, "ends within a record");
  REFUSED(zip.put(zip.centrals[2] + 32, std::uint16_t{1}), kFormat, "ends within a record");
  REFUSED(zip.put(zip.centrals[0] + 46, '\0'), kFormat, "a zero byte");
  REFUSED(zip.put(zip.centrals[0] + 20, std::uint64_t{UINT64_MAX}), kFormat, "lacks the 64-bit");
}

TEST(zip_refuses_records_that_overlap) {
  const auto with_bytes = [](std::size_t i, std::uint32_t bytes) {
    ZipSample zip = ZipBuilder::build(some_files());
    zip.put(zip.centrals[i] + 20, bytes);
    zip.put(zip.centrals[i] + 24, bytes);
    return zip.bytes;
  };
  check_refused(with_bytes(0, 100), Failure::kFormat, "`a/one` has 100 bytes and its header at 0",
                __LINE__);
  check_refused(with_bytes(2, 5100), Failure::kFormat, "does not fit before", __LINE__);
  check_refused(with_bytes(2, UINT32_MAX - 1), Failure::kFormat, "does not fit before", __LINE__);
  REFUSED(zip.put(zip.centrals[2] + 42, std::uint32_t(zip.locals[0])), kFormat, "does not fit");
  REFUSED(zip.put(zip.centrals[2] + 42, std::uint32_t(zip.directory)), kFormat, "does not fit");
  REFUSED(zip.put(zip.centrals[2] + 42, std::uint32_t{UINT32_MAX - 1}), kFormat, "does not fit");
}

TEST(zip_refuses_names_that_occur_twice) {
  check_refused(ZipBuilder::build({{"x", "1"}, {"y", "2"}, {"x", "3"}}).bytes, Failure::kFormat,
                "two zip records are named `x`", __LINE__);
}

TEST(zip_messages_are_text) {
  check_refused(ZipBuilder::build({{"\xFFx", "1"}, {"\xFFx", "3"}}).bytes, Failure::kFormat,
                "two zip records are named `?x`", __LINE__);
}

TEST(zip_says_what_is_compressed_and_inflates_nothing) {
  ZipSample zip = ZipBuilder::build(some_files());
  zip.put(zip.centrals[0] + 10, std::uint16_t{8});
  zip.put(zip.locals[0] + 8, std::uint16_t{8});
  zip.put(zip.centrals[0] + 24, std::uint32_t{UINT32_MAX - 1});
  const ZipDirectory directory = read_zip_directory(file_of(zip.bytes));
  CHECK(directory.records.at(0).is_compressed && directory.records.at(0).bytes == 7);
}

TEST(zip_survives_any_change_of_a_byte_and_any_cut) {
  for (const bool is_wide : {false, true}) {
    const std::string file =
        ZipBuilder::build({{"a", "1234567"}, {"b", ""}}, is_wide, "comment").bytes;
    for (std::size_t bytes = 0; bytes < file.size(); ++bytes) {
      const auto failure =
          failure_of([&] { return read_zip_directory(file_of(file.substr(0, bytes))).text; });
      CHECK(failure == Failure::kTruncated ||
            (failure == Failure::kFormat && bytes + 8 > file.size()));
    }
    for (std::size_t i = 0; i < file.size(); ++i) {
      for (int value = 0; value < 256; ++value) {
        std::string changed = file;
        changed[i] = static_cast<char>(value);
        try {
          CHECK(is_sound(read_zip_directory(file_of(changed)), file.size()));
        } catch (const Error& error) {
          CHECK(*error.what() != '\0' && error.kind != Failure::kSystem);
        }
      }
    }
  }
}

}  // namespace
}  // namespace fastsd::test
