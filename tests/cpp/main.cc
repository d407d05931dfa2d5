// Runs every test, or those whose names contain the first argument.
#include <cstdio>
#include <cstring>
#include <exception>

#include "check.h"

namespace fastsd::test {

static int failures = 0;  // of the test that runs

bool check(bool is_right, const char* what, const char* file, int line) {
  constexpr int printed_max = 10;  // a check in a loop need not fill the screen
  if (!is_right && ++failures <= printed_max) std::printf("%s:%d: %s\n", file, line, what);
  return is_right;
}

static bool passes(const Test& test) try {
  failures = 0;
  test.body();
  return failures == 0;
} catch (const std::exception& error) {
  return check(false, error.what(), "exception", 0);
}

}  // namespace fastsd::test

int main(int argc, char** argv) {
  int counts[2] = {};  // failed, passed
  for (const auto* test = fastsd::test::Test::first; test != nullptr; test = test->next) {
    if (argc > 1 && std::strstr(test->name, argv[1]) == nullptr) continue;
    const bool is_passed = passes(*test);
    ++counts[is_passed ? 1 : 0];
    if (!is_passed) std::printf("FAILED %s\n", test->name);
  }
  std::printf("%d passed, %d failed\n", counts[1], counts[0]);
  return counts[0] == 0 && counts[1] > 0 ? 0 : 1;
}
