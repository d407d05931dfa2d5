#include "checksum.h"

#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "support.h"

namespace fastsd::test {
namespace {

using Update = std::uint32_t (*)(std::uint32_t crc, const void* data, std::size_t bytes);

// A CRC with its reference and its polynomial.
struct Kind {
  Checksum checksum;
  Update portable;
  std::uint32_t polynomial;
};
constexpr Kind kKinds[] = {{kCrc32c, crc32c_portable, 0x82F63B78U},
                           {kCrc32, crc32_portable, 0xEDB88320U}};

// A bit at a time.
std::uint32_t by_definition(std::uint32_t polynomial, const std::vector<std::byte>& bytes) {
  std::uint32_t state = 0xFFFFFFFFU;
  for (const std::byte byte : bytes) {
    state ^= std::to_integer<std::uint32_t>(byte);
    for (int bit = 0; bit < 8; ++bit) state = (state >> 1U) ^ ((state & 1U) != 0 ? polynomial : 0U);
  }
  return ~state;
}

// RFC 3720, appendix B.4, and the usual check value.
TEST(checksum_of_known_bytes) {
  std::string ascending;
  for (char c = 0; c < 32; ++c) ascending += c;
  const std::string descending(ascending.rbegin(), ascending.rend());
  const std::pair<std::string, std::uint32_t> known[] = {
      {std::string(32, '\0'), 0x8A9136AAU},
      {std::string(32, '\xFF'), 0x62A8AB43U},
      {ascending, 0x46DD794EU},
      {descending, 0x113FDB5CU},
      {"123456789", 0xE3069283U},
      {"", 0},
  };
  for (const auto& [bytes, crc] : known) {
    CHECK(crc32c(0, bytes.data(), bytes.size()) == crc);
    CHECK(crc32c_portable(0, bytes.data(), bytes.size()) == crc);
  }
  CHECK(crc32(0, "123456789", 9) == 0xCBF43926U);
  CHECK(crc32(0, "", 0) == 0);
}

TEST(checksum_agrees_with_the_definition) {
  Random random(1);
  for (const std::size_t bytes : {1U, 7U, 8U, 767U, 768U, 769U, 24575U, 24576U, 50001U}) {
    const std::vector<std::byte> data = random.bytes(bytes);
    for (const Kind& kind : kKinds) {
      const std::uint32_t crc = by_definition(kind.polynomial, data);
      CHECK(kind.checksum.update(0, data.data(), bytes) == crc);
      CHECK(kind.portable(0, data.data(), bytes) == crc);
    }
  }
}

TEST(checksum_paths_agree_at_every_length_and_alignment) {
  Random random(2);
  const std::vector<std::byte> data = random.bytes(3016);
  for (std::size_t offset = 0; offset < 16; ++offset) {
    for (std::size_t bytes = 0; bytes <= 3000; ++bytes) {
      const std::byte* first = data.data() + offset;
      for (const Kind& kind : kKinds)
        CHECK(kind.checksum.update(7, first, bytes) == kind.portable(7, first, bytes));
    }
  }
}

// Lanes of 8192 bytes start at 24576.
TEST(checksum_paths_agree_on_long_runs) {
  Random random(3);
  const std::vector<std::byte> data = random.bytes(200000);
  for (int i = 0; i < 60; ++i) {
    const std::size_t offset = random.below(64);
    const std::size_t bytes = random.below(data.size() - offset);
    for (const Kind& kind : kKinds) {
      CHECK(kind.checksum.update(0, data.data() + offset, bytes) ==
            kind.portable(0, data.data() + offset, bytes));
    }
  }
}

TEST(checksum_of_parts_is_that_of_the_whole) {
  Random random(4);
  const std::vector<std::byte> data = random.bytes(20000);
  const auto check_split = [&](const Checksum& checksum, std::size_t split) {
    const std::uint32_t whole = checksum.update(0, data.data(), data.size());
    const std::size_t rest = data.size() - split;
    const std::uint32_t first = checksum.update(0, data.data(), split);
    const std::uint32_t second = checksum.update(0, data.data() + split, rest);
    CHECK(checksum.update(first, data.data() + split, rest) == whole);
    CHECK(checksum.combine(first, second, rest) == whole);
  };
  for (const Kind& kind : kKinds) {
    for (std::size_t split = 0; split <= 300; ++split) check_split(kind.checksum, split);
    for (int i = 0; i < 300; ++i) check_split(kind.checksum, random.below(data.size() + 1));
    check_split(kind.checksum, data.size());
  }
}

// Zeros appended by squaring, against a second way to reach the same length.
TEST(checksum_combines_lengths_beyond_memory) {
  const std::uint64_t bytes = (std::uint64_t{1} << 40U) + 12345;
  const std::uint32_t first = 0x12345678U;
  for (const Kind& kind : kKinds) {
    std::uint32_t in_halves = kind.checksum.combine(first, 0, bytes / 2);
    in_halves = kind.checksum.combine(in_halves, 0, bytes - bytes / 2);
    CHECK(kind.checksum.combine(first, 0, bytes) == in_halves);
    CHECK(kind.checksum.combine(first, 0, 0) == first);
  }
}

TEST(checksum_implementation_has_a_name) {
  const std::string name = crc32c_implementation();
  CHECK(name == "sse4.2" || name == "armv8" || name == "portable");
  const std::string zip_name = crc32_implementation();
  CHECK(zip_name == "pclmulqdq" || zip_name == "armv8" || zip_name == "portable");
}

}  // namespace
}  // namespace fastsd::test
