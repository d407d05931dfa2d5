#include "utf8.h"

#include <string>

#include "check.h"

namespace fastsd::test {
namespace {

TEST(utf8_excerpts_are_short_and_well_formed) {
  CHECK(excerpt("").empty() && excerpt("a\xC3\xA9") == "a\xC3\xA9");
  CHECK(excerpt("a\xFF\xED\xA0\x80z") == "a????z");
  CHECK(excerpt(std::string(200, 'a')) == std::string(200, 'a'));
  CHECK(excerpt(std::string(201, 'a')) == std::string(200, 'a') + "...");
  // Cut before a character, never within one.
  const std::string wide = std::string(199, 'a') + "\xC3\xA9";
  CHECK(excerpt(wide) == std::string(199, 'a') + "...");
  CHECK(excerpt(std::string(300, '\x80')) == "...");
}

}  // namespace
}  // namespace fastsd::test
