// The native tests' own framework. A failed check is printed with its place and the test goes on.
#pragma once

#include <optional>

#include "error.h"

namespace fastsd::test {

// A test, in the list that main() walks.
struct Test {
  Test(const char* test_name, void (*test_body)()) noexcept : name(test_name), body(test_body) {
    *last = this;
    last = &next;
  }
  const char* name;
  void (*body)();
  Test* next = nullptr;
  static inline Test* first = nullptr;
  static inline Test** last = &first;
};

// Returns `is_right`; if it is not, prints and counts the failure. By the main thread only.
bool check(bool is_right, const char* what, const char* file, int line);

// The kind of Error that `call` throws; nothing if it returns.
template <class Call>
std::optional<Failure> failure_of(Call call) {
  try {
    static_cast<void>(call());
  } catch (const Error& error) {
    return error.kind;
  }
  return std::nullopt;
}

}  // namespace fastsd::test

#define TEST(name)                                      \
  static void name();                                   \
  static const fastsd::test::Test name##_(#name, name); \
  static void name()
#define CHECK(condition) fastsd::test::check((condition), #condition, __FILE__, __LINE__)
#define CHECK_THROWS(expression, failure) \
  CHECK(fastsd::test::failure_of([&] { return (expression, 0); }) == (failure))
