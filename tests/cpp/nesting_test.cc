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

// Calls of what takes as much memory as it is told to.
TEST(memory_that_is_not_filled) {
  const std::string kCall = std::string(kLeaf) + kOne + "R.";
  CHECK(is_bad("cbuiltins\nbytearray\n" + kCall));
  CHECK(is_bad("c__builtin__\nbytearray\n" + kCall));
  CHECK(is_bad("ctorch\nTensor\n" + kCall));
  CHECK(is_bad("ctorch\nTensor\n)\x81."));
  CHECK(is_bad("ctorch.cuda.sparse\nFloatTensor\n" + kCall));
  CHECK(is_bad("ctorch.storage\nUntypedStorage\nq\x01h\x01" + kCall));
  CHECK(is_bad("ctorch._tensor\n_rebuild_from_type_v2\n(ctorch\nTensor\n" + kCall));
  // What torch and pickle write.
  CHECK(!is_bad("cbuiltins\nbytearray\nc_codecs\nencode\nX\1" + std::string(3, '\0') + "aN" + kTwo +
                "R" + kOne + "R."));
  CHECK(!is_bad("cbuiltins\nbytearray\n)R."));
  CHECK(
      !is_bad("ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_tensor_v2\n"
              "ctorch\nTensor\n(tNtR."));
  CHECK(!is_bad("ctorch\nSize\n" + kCall));
  CHECK(!is_bad("cmy\nTensor\n" + kCall));
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

// What is made of a list, or of pairs, hashes what is in it: set, OrderedDict, Counter.
TEST(containers_made_of_lists) {
  const std::string key = doubling(16) + "q\x01";
  const std::string callable = "cbuiltins\nset\n";
  const auto list_of = [](std::size_t count) { return "](" + repeat("h\x01", count) + "e"; };
  CHECK(!is_bad(key + callable + list_of(152) + kOne + "R."));
  CHECK(is_bad(key + callable + list_of(153) + kOne + "R."));
  CHECK(is_bad(key + callable + list_of(76) + kOne + "q\x02" + "R" +
               repeat(callable + "h\x02" + "R", 2) + "."));
  CHECK(!is_bad(key + list_of(1000) + "."));
  // A list that is filled after it has become an argument.
  CHECK(is_bad(key + "]q\x03" + kOne + "q\x04" + "h\x03(" + repeat("h\x01", 153) + "e" + callable +
               "h\x04R."));
  // Pairs, and a tuple that is called for itself.
  const std::string pair = "](h\x01" + std::string(kLeaf) + "e";
  CHECK(is_bad(key + callable + "](" + repeat(pair, 153) + "e" + kOne + "R."));
  CHECK(is_bad(key + repeat(callable + "h\x01R", 153) + "."));
}

TEST(what_is_left_to_the_unpickler) {
  for (const char* stream : {"", ".", "t", "u", "e", "s", "a", "R", "Q", "h\x05", "q", "\x85",
                             "X\xff\xff\xff\xff", "c", "cx\ny", "(", "\xff", "K"}) {
    CHECK(!is_bad(stream));
  }
}

}  // namespace
}  // namespace fastsd::test
