#include "reader.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "checksum.h"
#include "support.h"
#include "writer.h"

namespace fastsd::test {
namespace {

// More than a step of 4 MiB, many small ones, one with gaps, one empty, one meta; with padding
// between.
class Sample {
 public:
  Sample() : memory_(Random(50).bytes(7 << 20U)) {
    const auto add = [&](std::int64_t begin, std::int64_t bytes) {
      const std::string name = "t" + std::to_string(tensors_.size());
      tensors_.push_back({name, DType::kUInt8, memory_.data() + begin, {bytes}});
    };
    add(0, (4 << 20) + 777);
    tensors_.push_back({"gaps", DType::kInt16, memory_.data() + (5 << 20), {100, 3}, {50, 2}});
    add(6 << 20, 0);
    tensors_.push_back({"meta", DType::kInt16, nullptr, {1000}});
    for (std::int64_t i = 0; i < 50; ++i) add((6 << 20) + 1000 * i, 1 + 17 * i);
    add((6 << 20) + 60000, 300000);
  }

  FsdLayout layout() const { return lay_out(tensors_); }

  void write(const std::string& path, bool checksum = true, bool durable = false) const {
    FsdLayout layout = lay_out(tensors_);
    WriteOptions options;
    options.checksum = checksum;
    options.durable = durable;
    write_file(path, layout, options, nullptr);
  }

 private:
  std::vector<std::byte> memory_;
  std::vector<Tensor> tensors_;
};

const Sample& sample() {
  static const Sample sample;
  return sample;
}

std::string text(const Bytes& bytes, std::uint64_t count) {
  return {reinterpret_cast<const char*>(bytes.data), count};
}

std::vector<bool> every_storage(const Reader& reader) {
  return std::vector<bool>(reader.index().storages.size(), true);
}

Failure failure_of_reading(const std::string& path) {
  try {
    const Reader reader(path, Access::kRead);
  } catch (const Error& error) {
    CHECK(error.path == path);
    return error.kind;
  }
  CHECK(false);
  return Failure::kSystem;
}

void check_same_bytes(const Reader& reader, const std::string& archive) {
  const std::vector<Bytes> all = reader.bytes_of(every_storage(reader), nullptr);
  if (!CHECK(all.size() == reader.index().storages.size())) return;
  for (std::size_t i = 0; i < all.size(); ++i) {
    const StorageRecord& storage = reader.index().storages[i];
    const std::uint64_t bytes = stored_bytes(storage);
    CHECK(all[i].owner != nullptr);
    CHECK(text(all[i], bytes) == archive.substr(bytes > 0 ? storage.offset : 0, bytes));
    CHECK(reinterpret_cast<std::uintptr_t>(all[i].data) % kMapAlignBytes == 0);
  }
}

TEST(reader_maps_and_reads_the_same) {
  const Folder folder;
  const std::string path = folder.path("f");
  sample().write(path);
  const std::string file = read_whole(path);
  for (const Access access : {Access::kMap, Access::kRead, Access::kAuto}) {
    const Reader reader(path, access);
    CHECK(access == Access::kAuto || (reader.mapping() != nullptr) == (access == Access::kMap));
    CHECK(reader.header().preamble().file_bytes == file.size());
    check_same_bytes(reader, file);
    for (std::size_t i = 0; i < reader.index().storages.size(); ++i) {
      const StorageRecord& storage = reader.index().storages[i];
      const std::uint64_t bytes = stored_bytes(storage);
      if (bytes < 3) continue;
      CHECK(text(reader.bytes(i, 1, bytes - 1, nullptr), bytes - 2) ==
            file.substr(storage.offset + 1, bytes - 2));
    }
    CHECK(reader.find_damage(nullptr).empty());
  }
}

TEST(reader_gives_the_bytes_of_some_storages) {
  const Folder folder;
  const std::string path = folder.path("f");
  sample().write(path);
  const std::string file = read_whole(path);
  for (const Access access : {Access::kMap, Access::kRead}) {
    const Reader reader(path, access);
    for (const std::size_t step : {2U, 3U, 7U, 1000U}) {
      std::vector<bool> is_wanted(reader.index().storages.size());
      for (std::size_t i = step - 2; i < is_wanted.size(); i += step) is_wanted[i] = true;
      const std::vector<Bytes> some = reader.bytes_of(is_wanted, nullptr);
      if (!CHECK(some.size() == is_wanted.size())) return;
      for (std::size_t i = 0; i < some.size(); ++i) {
        CHECK((some[i].owner != nullptr) == is_wanted[i]);
        const StorageRecord& storage = reader.index().storages[i];
        const std::uint64_t bytes = is_wanted[i] ? stored_bytes(storage) : 0;
        CHECK(text(some[i], bytes) == file.substr(bytes > 0 ? storage.offset : 0, bytes));
      }
    }
  }
}

TEST(reader_reads_only_what_is_wanted) {
  const Folder folder;
  const std::string path = folder.path("f");
  sample().write(path);
  const Reader reader(path, Access::kRead);
  std::vector<bool> is_wanted = every_storage(reader);
  is_wanted.back() = false;
  const StorageRecord& last = reader.index().storages[is_wanted.size() - 1];
  // Whoever reads the last one now fails.
  CHECK(::truncate(path.c_str(), static_cast<off_t>(last.offset)) == 0);
  CHECK(reader.bytes_of(is_wanted, nullptr).size() == is_wanted.size());
  CHECK_THROWS(reader.bytes_of(every_storage(reader), nullptr), Failure::kTruncated);
}

TEST(reader_gives_bytes_that_outlive_it) {
  const Folder folder;
  const std::string path = folder.path("f");
  sample().write(path);
  for (const Access access : {Access::kMap, Access::kRead}) {
    std::vector<Bytes> all;
    {
      const Reader reader(path, access);
      all = reader.bytes_of(every_storage(reader), nullptr);
    }
    all[0].data[0] ^= std::byte{1};  // and may be written to, without the file changing
    CHECK(text(all[0], 2) != read_whole(path).substr(4096, 2) || access == Access::kRead);
  }
  CHECK(Reader(path, Access::kMap).find_damage(nullptr).empty());
}

// A stream that gives what a string has, in pieces of varied sizes.
class StringStream {
 public:
  explicit StringStream(const std::string& content) : content_(&content) {}

  ReadSome read_some() {
    return [this](const Bytes& target, std::size_t room) {
      CHECK(room > 0 && target.owner != nullptr);
      const std::size_t bytes = std::min({room, content_->size() - position_, next_bytes_});
      content_->copy(reinterpret_cast<char*>(target.data), bytes, position_);
      position_ += bytes;
      next_bytes_ = next_bytes_ * 5 % 999983 + 1;
      return bytes;
    };
  }

  std::uint64_t position() const { return position_; }

 private:
  const std::string* content_;
  std::size_t position_ = 0;
  std::size_t next_bytes_ = 1;
};

// Mapped where that gives aligned tensors, and never more than the archive.
TEST(reader_reads_archives_that_start_anywhere) {
  const Folder folder;
  const std::string path = folder.path("f");
  sample().write(path);
  const std::string archive = read_whole(path);
  for (const std::size_t begin : {0U, 1U, 32U, 64U, 4095U, 4096U, 10048U, 70001U}) {
    for (const std::string& behind : {std::string(), std::string(5000, 'b')}) {
      std::string content(begin, 'a');
      content.append(archive).append(behind);
      write_whole(path, content);
      const File file(path);
      for (const Access access : {Access::kMap, Access::kRead}) {
        const Reader reader(file.descriptor(), path, begin, access);
        const bool is_mapped = access == Access::kMap && begin % kMapAlignBytes == 0;
        CHECK((reader.mapping() != nullptr) == is_mapped);
        const std::uint64_t header_bytes = reader.header().preamble().header_bytes;
        CHECK(text(reader.bytes(0, 7, 9, nullptr), 2) == archive.substr(header_bytes + 7, 2));
        CHECK(reader.find_damage(nullptr).empty());
        check_same_bytes(reader, archive);
        const Prefetch prefetch(reader, every_storage(reader));
      }
    }
  }
}

TEST(reader_reads_streams_and_not_a_byte_more) {
  const Folder folder;
  const std::string path = folder.path("f");
  sample().write(path);
  const std::string archive = read_whole(path);
  const std::string content = archive + std::string(5000, 'b');
  for (const std::uint64_t bytes : {std::uint64_t{UINT64_MAX}, std::uint64_t{content.size()}}) {
    StringStream stream(content);
    const Reader reader(stream.read_some(), "stream", 77, bytes);
    CHECK(stream.position() == archive.size());
    CHECK(reader.mapping() == nullptr);
    CHECK(reader.file().begin() == 77 && reader.file().name() == "stream");
    const Bytes copy = reader.bytes(0, 7, 9, nullptr);
    copy.data[0] ^= std::byte{1};  // a copy of what is kept
    CHECK(reader.find_damage(nullptr).empty());
    check_same_bytes(reader, archive);
  }
}

TEST(reader_gives_bytes_of_a_stream_that_outlive_it) {
  const Folder folder;
  const std::string path = folder.path("f");
  sample().write(path);
  const std::string archive = read_whole(path);
  std::vector<Bytes> all;
  {
    StringStream stream(archive);
    const Reader reader(stream.read_some(), "stream", 0, UINT64_MAX);
    all = reader.bytes_of(every_storage(reader), nullptr);
  }
  const Bytes last = all.back();
  all.clear();  // gives the memory of the others back
  CHECK(text(last, 300000) == archive.substr(archive.size() - 300000));
}

TEST(reader_tells_of_archives_cut_short_where_they_start) {
  const Folder folder;
  const std::string path = folder.path("f");
  sample().write(path);
  const std::string archive = read_whole(path);
  const auto detail_of = [](const auto& open) -> std::string {
    try {
      open();
    } catch (const Error& error) {
      CHECK(error.path == "name" && error.kind == Failure::kTruncated);
      return error.what();
    }
    return "";
  };
  for (const std::size_t bytes : {8U, 47U, 48U, 4095U, 4096U, 100000U}) {
    const std::string cut = archive.substr(0, bytes);
    write_whole(path, std::string(64, 'a') + cut);
    const File file(path);
    const std::string of_file =
        detail_of([&] { return Reader(file.descriptor(), "name", 64, Access::kMap); });
    CHECK(of_file.find("has " + std::to_string(bytes) + " bytes") != std::string::npos);
    CHECK(of_file.find("at byte 64") != std::string::npos);
    for (const std::uint64_t known : {std::uint64_t{UINT64_MAX}, std::uint64_t{bytes}}) {
      StringStream stream(cut);
      CHECK(detail_of([&] { return Reader(stream.read_some(), "name", 64, known); }) == of_file);
      CHECK(known == UINT64_MAX || stream.position() <= sizeof(Preamble));
    }
  }
}

// A stream that stays open must not be waited for once its archive is known to be none.
TEST(reader_stops_reading_a_stream_that_is_wrong) {
  const Folder folder;
  const std::string path = folder.path("f");
  sample().write(path);
  std::string archive = read_whole(path);
  const auto position_after = [&](Failure failure) {
    StringStream stream(archive);
    CHECK_THROWS(Reader(stream.read_some(), "name", 0, UINT64_MAX), failure);
    return stream.position();
  };
  archive[1000] ^= 1;  // in the header
  const std::uint64_t header_bytes = sample().layout().data_begin();
  CHECK(position_after(Failure::kFormat) == header_bytes);
  archive[8] ^= 2;  // the version
  CHECK(position_after(Failure::kVersion) == sizeof(Preamble));
  archive[0] ^= 1;
  CHECK(position_after(Failure::kFormat) == sizeof(Preamble));
}

TEST(reader_gives_some_storages_of_a_stream) {
  const Folder folder;
  const std::string path = folder.path("f");
  sample().write(path);
  const std::string archive = read_whole(path);
  StringStream stream(archive);
  const Reader reader(stream.read_some(), "stream", 0, UINT64_MAX);
  std::vector<bool> is_wanted = every_storage(reader);
  is_wanted.front() = false;
  const std::vector<Bytes> some = reader.bytes_of(is_wanted, nullptr);
  CHECK(some.front().owner == nullptr);
  CHECK(text(some.back(), 300000) == archive.substr(archive.size() - 300000));
}

// Headers come with one read if they are small, and with two if not.
TEST(reader_reads_headers_of_any_size) {
  const Folder folder;
  const std::byte byte{7};
  for (const std::size_t count : {0U, 1U, 100U, 130U, 1000U}) {
    std::vector<Tensor> tensors;
    tensors.reserve(count);
    for (std::size_t i = 0; i < count; ++i) {
      tensors.push_back({std::to_string(i) + std::string(20, 'n'), DType::kUInt8, &byte, {1}});
    }
    const std::string path = folder.path(std::to_string(count));
    FsdLayout layout = lay_out(tensors);
    write_file(path, layout, {}, nullptr);
    const Reader reader(path, Access::kMap);
    CHECK(reader.index().tensors.size() == count);
    CHECK(reader.header().preamble().header_bytes == layout.data_begin());
  }
}

TEST(reader_names_the_file_that_it_refuses) {
  const Folder folder;
  const std::string path = folder.path("f");
  sample().write(path);
  const std::string file = read_whole(path);
  const auto with = [&](const std::string& bytes) {
    write_whole(path, bytes);
    return failure_of_reading(path);
  };
  CHECK(with("") == Failure::kFormat);
  CHECK(with("\x8F") == Failure::kFormat);
  CHECK(with("version https://git-lfs.github.com/spec/v1") == Failure::kFormat);
  for (const std::size_t bytes :
       {std::size_t{8}, std::size_t{47}, std::size_t{4096}, file.size() - 1})
    CHECK(with(file.substr(0, bytes)) == Failure::kTruncated);
  CHECK(with(file + '\0') == Failure::kFormat);
  CHECK(with(file + file) == Failure::kFormat);
  write_whole(path, file);
  flip_byte(path, 1000);
  CHECK(failure_of_reading(path) == Failure::kFormat);
  CHECK(failure_of_reading(folder.path("missing")) == Failure::kSystem);
}

// Bytes that are overwritten, not flipped one by one, to spare the disk.
TEST(reader_finds_exactly_the_damaged_storage) {
  const Folder folder;
  const std::string path = folder.path("f");
  sample().write(path);
  const Reader reader(path, Access::kMap);
  Random random(51);
  for (std::size_t i = 0; i < reader.index().storages.size(); ++i) {
    const StorageRecord& storage = reader.index().storages[i];
    const std::uint64_t bytes = stored_bytes(storage);
    if (bytes == 0) continue;
    for (const std::uint64_t at : {std::uint64_t{0}, bytes - 1, random.below(bytes)}) {
      if (i > 5 && at != bytes - 1) continue;  // each search reads the whole file
      flip_byte(path, storage.offset + at);
      CHECK(reader.find_damage(nullptr) == std::vector<std::size_t>{i});
      flip_byte(path, storage.offset + at);
    }
  }
  flip_byte(path, reader.index().storages[1].offset);
  flip_byte(path, reader.index().storages[7].offset);
  CHECK(reader.find_damage(nullptr) == (std::vector<std::size_t>{1, 7}));
}

TEST(reader_finds_damaged_padding) {
  const Folder folder;
  for (const bool checksum : {true, false}) {
    const std::string path = folder.path("f");
    sample().write(path, checksum);
    const Reader reader(path, Access::kRead);
    std::uint64_t end = reader.header().preamble().header_bytes;
    for (const StorageRecord& storage : reader.index().storages) {
      if (stored_bytes(storage) == 0) continue;
      if (storage.offset > end) {
        flip_byte(path, storage.offset - 1);
        CHECK_THROWS(reader.find_damage(nullptr), Failure::kFormat);
        flip_byte(path, storage.offset - 1);
      }
      end = storage.offset + storage.bytes;
    }
    CHECK(reader.find_damage(nullptr).empty());
  }
}

TEST(reader_cannot_find_damage_without_checksums) {
  const Folder folder;
  const std::string path = folder.path("f");
  sample().write(path, false);
  const Reader reader(path, Access::kMap);
  flip_byte(path, reader.index().storages[0].offset);
  CHECK(reader.find_damage(nullptr).empty());
}

// FORMAT.md lets a storage without bytes have the flag, with a checksum of 0.
TEST(reader_verifies_no_bytes_of_a_meta_storage) {
  const Folder folder;
  const std::string path = folder.path("f");
  const std::vector<std::byte> memory = Random(52).bytes(100);
  FsdLayout layout = lay_out(
      {{"meta", DType::kUInt8, nullptr, {1 << 20}}, {"data", DType::kUInt8, memory.data(), {100}}});
  layout.plan().storages()[0].flags |= kStorageHasChecksum;
  write_file(path, layout, {}, nullptr);
  const Reader reader(path, Access::kMap);
  CHECK(failure_of([&] { return reader.find_damage(nullptr); }) == std::nullopt);
}

TEST(reader_tells_when_the_file_shrank) {
  const Folder folder;
  const std::string path = folder.path("f");
  sample().write(path);
  const Reader mapped(path, Access::kMap);
  const Reader reading(path, Access::kRead);
  CHECK(::truncate(path.c_str(), 1 << 20) == 0);
  CHECK_THROWS(reading.bytes_of(every_storage(reading), nullptr), Failure::kTruncated);
  CHECK_THROWS(reading.bytes(0, 0, 2 << 20, nullptr), Failure::kTruncated);
  CHECK_THROWS(mapped.find_damage(nullptr), Failure::kTruncated);
}

TEST(prefetch_may_be_stopped_at_any_time) {
  const Folder folder;
  const std::string path = folder.path("f");
  sample().write(path, true, true);
  for (const Access access : {Access::kMap, Access::kRead}) {
    const Reader reader(path, access);
    // Out of the page cache, or there is nothing to do.
    CHECK(::posix_fadvise(reader.file().descriptor(), 0, 0, POSIX_FADV_DONTNEED) == 0);
    Prefetch prefetch(reader, every_storage(reader));
    const Prefetch other(reader, std::vector<bool>(reader.index().storages.size()));
    prefetch.stop();
    prefetch.stop();
    CHECK(reader.find_damage(nullptr).empty());
  }
}

TEST(writing_is_stopped_by_an_interrupt) {
  const Folder folder;
  const std::string path = folder.path("f");
  FsdLayout layout = sample().layout();
  std::size_t asked = 0;
  const auto interrupt = [&] { return ++asked > 0; };
  // It is asked every 50 ms at most: a quick machine is done before.
  const std::optional<Failure> failure = failure_of([&] {
    write_file(path, layout, {}, interrupt);
    return 0;
  });
  CHECK(failure == (asked > 0 ? std::optional(Failure::kInterrupted) : std::nullopt));
  CHECK(folder.file_count() == (asked > 0 ? 0U : 1U));
}

}  // namespace
}  // namespace fastsd::test
