#include "nesting.h"

#include <string>

#include "check.h"

namespace fastsd::test {
namespace {

std::string repeat(const std::string& text, std::size_t count) {
  std::string all;
  for (std::size_t i = 0; i < count; ++i) all += text;
  return all;
}

bool is_bad(const std::string& stream) { return find_bad_nesting(stream) != nullptr; }

constexpr char kOne[] = "\x85";    // TUPLE1
constexpr char kTwo[] = "\x86";    // TUPLE2
constexpr char kLeaf[] = "K\x01";  // BININT1

// A tuple of twice the one before, and so on.
std::string doubling(std::size_t levels) {
  std::string stream = kLeaf;
  for (std::size_t i = 0; i < levels; ++i) stream += std::string("q\0h\0", 4) + kTwo;
  return stream;
}

TEST(depth_of_tuples) {
  CHECK(!is_bad(kLeaf + repeat(kOne, 1000) + "."));
  CHECK(is_bad(kLeaf + repeat(kOne, 1001) + "."));
  CHECK(is_bad(repeat("(", 1001) + repeat("t", 1001) + "."));
}

TEST(tuples_that_refer_to_one_another) {
  CHECK(!is_bad(doubling(16) + "."));
  CHECK(is_bad(doubling(17) + "."));
  CHECK(is_bad(doubling(64) + "."));
}

TEST(tuples_that_only_follow_one_another) {
  CHECK(!is_bad("(" + repeat(std::string(kLeaf) + kOne, 200'000) + "t."));
}

TEST(keys_of_dictionaries) {
  const std::string key = doubling(16);  // costs 2^16 - 1
  const std::string item = std::string("h\x01") + kLeaf;
  CHECK(!is_bad(key + "q\x01" + "}(" + repeat(item, 152) + "u."));
  CHECK(is_bad(key + "q\x01" + "}(" + repeat(item, 153) + "u."));
  CHECK(is_bad(key + "q\x01" + "}" + repeat(item + "s", 153) + "."));
}

TEST(what_is_left_to_the_unpickler) {
  for (const char* stream : {"", ".", "t", "u", "e", "s", "a", "R", "Q", "h\x05", "q", "\x85",
                             "X\xff\xff\xff\xff", "c", "cx\ny", "(", "\xff", "K"}) {
    CHECK(!is_bad(stream));
  }
}

}  // namespace
}  // namespace fastsd::test
