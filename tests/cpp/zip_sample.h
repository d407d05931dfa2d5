// A zip file as torch writes it, with the places of its parts, for tests to change.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "checksum.h"

namespace fastsd::test {

struct ZipSample {
  std::string bytes;
  std::vector<std::size_t> locals;
  std::vector<std::size_t> centrals;
  std::size_t directory = 0;
  std::size_t end64 = 0;
  std::size_t locator = 0;
  std::size_t end = 0;

  template <class T>
  void put(std::size_t at, T value) {
    std::memcpy(&bytes[at], &value, sizeof value);
  }
  template <class T>
  T get(std::size_t at) const {
    T value;
    std::memcpy(&value, &bytes[at], sizeof value);
    return value;
  }
};

class ZipBuilder {
 public:
  using Files = std::vector<std::pair<std::string, std::string>>;

  static ZipSample build(const Files& files, bool is_wide = true, const std::string& comment = {}) {
    ZipBuilder builder;
    ZipSample& zip = builder.zip_;
    for (const auto& file : files) builder.add_local(file.first, file.second);
    zip.directory = zip.bytes.size();
    for (std::size_t i = 0; i < files.size(); ++i)
      builder.add_central(i, files[i].first, files[i].second);
    builder.add_end(files.size(), is_wide, comment);
    return zip;
  }

  static std::uint32_t crc32_of(const std::string& data) {
    return crc32(0, data.data(), data.size());
  }

 private:
  template <class... Values>
  void append(Values... values) {
    (zip_.bytes.append(reinterpret_cast<const char*>(&values), sizeof values), ...);
  }

  // The part that local and central headers share, from the version on.
  void append_common(std::uint16_t flags, std::uint32_t crc32, std::uint32_t bytes,
                     const std::string& name, std::uint16_t extra_bytes) {
    append(std::uint16_t{0}, flags, std::uint16_t{0}, std::uint32_t{0}, crc32, bytes, bytes,
           std::uint16_t(name.size()), extra_bytes);
  }

  // With sizes that follow the data, which start at a multiple of 64.
  void add_local(const std::string& name, const std::string& data) {
    zip_.locals.push_back(zip_.bytes.size());
    const std::size_t unaligned = zip_.bytes.size() + 30 + name.size() + 4;
    const std::size_t padding = (64 - unaligned % 64) % 64;
    append(std::uint32_t{0x04034B50});
    append_common(0x808, 0, 0, name, std::uint16_t(4 + padding));
    zip_.bytes += name + "FB";
    append(std::uint16_t(padding));
    zip_.bytes += std::string(padding, 'Z') + data;
    const auto bytes = std::uint32_t(data.size());
    append(std::uint32_t{0x08074B50}, crc32_of(data), bytes, bytes);
  }

  void add_central(std::size_t i, const std::string& name, const std::string& data) {
    zip_.centrals.push_back(zip_.bytes.size());
    append(std::uint32_t{0x02014B50}, std::uint16_t{0});
    append_common(0x808, crc32_of(data), std::uint32_t(data.size()), name, 0);
    append(std::uint16_t{0}, std::uint16_t{0}, std::uint16_t{0}, std::uint32_t{0},
           std::uint32_t(zip_.locals[i]));
    zip_.bytes += name;
  }

  void add_end(std::uint64_t count, bool is_wide, const std::string& comment) {
    const std::uint64_t offset = zip_.directory;
    const std::uint64_t bytes = zip_.bytes.size() - offset;
    if (is_wide) {
      zip_.end64 = zip_.bytes.size();
      append(std::uint32_t{0x06064B50}, std::uint64_t{44}, std::uint16_t{0}, std::uint16_t{0},
             std::uint32_t{0}, std::uint32_t{0}, count, count, bytes, offset);
      zip_.locator = zip_.bytes.size();
      append(std::uint32_t{0x07064B50}, std::uint32_t{0}, std::uint64_t{zip_.end64},
             std::uint32_t{1});
    }
    zip_.end = zip_.bytes.size();
    append(std::uint32_t{0x06054B50}, std::uint16_t{0}, std::uint16_t{0}, std::uint16_t(count),
           std::uint16_t(count), std::uint32_t(bytes), std::uint32_t(offset),
           std::uint16_t(comment.size()));
    zip_.bytes += comment;
  }

  ZipSample zip_;
};

}  // namespace fastsd::test
