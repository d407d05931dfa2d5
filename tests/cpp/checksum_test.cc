#include "checksum.h"

#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "support.h"

namespace fastsd::test {
namespace {

// A bit at a time, from the definition.
std::uint32_t crc32c_by_definition(const std::vector<std::byte>& bytes) {
  std::uint32_t state = 0xFFFFFFFFU;
  for (const std::byte byte : bytes) {
    state ^= std::to_integer<std::uint32_t>(byte);
    for (int bit = 0; bit < 8; ++bit)
      state = (state >> 1U) ^ ((state & 1U) != 0 ? 0x82F63B78U : 0U);
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
}

TEST(checksum_agrees_with_the_definition) {
  Random random(1);
  for (const std::size_t bytes : {1U, 7U, 8U, 767U, 768U, 769U, 24575U, 24576U, 50001U}) {
    const std::vector<std::byte> data = random.bytes(bytes);
    CHECK(crc32c(0, data.data(), bytes) == crc32c_by_definition(data));
    CHECK(crc32c_portable(0, data.data(), bytes) == crc32c_by_definition(data));
  }
}

TEST(checksum_paths_agree_at_every_length_and_alignment) {
  Random random(2);
  const std::vector<std::byte> data = random.bytes(3016);
  for (std::size_t offset = 0; offset < 16; ++offset) {
    for (std::size_t bytes = 0; bytes <= 3000; ++bytes) {
      const std::byte* first = data.data() + offset;
      CHECK(crc32c(7, first, bytes) == crc32c_portable(7, first, bytes));
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
    CHECK(crc32c(0, data.data() + offset, bytes) ==
          crc32c_portable(0, data.data() + offset, bytes));
  }
}

TEST(checksum_of_parts_is_that_of_the_whole) {
  Random random(4);
  const std::vector<std::byte> data = random.bytes(20000);
  const std::uint32_t whole = crc32c(0, data.data(), data.size());
  const auto check_split = [&](std::size_t split) {
    const std::size_t rest = data.size() - split;
    const std::uint32_t first = crc32c(0, data.data(), split);
    const std::uint32_t second = crc32c(0, data.data() + split, rest);
    CHECK(crc32c(first, data.data() + split, rest) == whole);
    CHECK(crc32c_combine(first, second, rest) == whole);
  };
  for (std::size_t split = 0; split <= 300; ++split) check_split(split);
  for (int i = 0; i < 300; ++i) check_split(random.below(data.size() + 1));
  check_split(data.size());
}

// Zeros appended by squaring, against a second way to reach the same length.
TEST(checksum_combines_lengths_beyond_memory) {
  const std::uint64_t bytes = (std::uint64_t{1} << 40U) + 12345;
  const std::uint32_t first = 0x12345678U;
  std::uint32_t in_halves = crc32c_combine(first, 0, bytes / 2);
  in_halves = crc32c_combine(in_halves, 0, bytes - bytes / 2);
  CHECK(crc32c_combine(first, 0, bytes) == in_halves);
  CHECK(crc32c_combine(first, 0, 0) == first);
}

TEST(checksum_implementation_has_a_name) {
  const std::string name = crc32c_implementation();
  CHECK(name == "sse4.2" || name == "armv8" || name == "portable");
}

}  // namespace
}  // namespace fastsd::test
