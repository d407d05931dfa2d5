// Fuzz targets: each reads what a stranger wrote, and checks what the code under attack promises of
// it. libfuzzer.cc runs one of them for as long as one likes, corpus_test.cc all of them over the
// inputs that are kept here.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "file.h"
#include "format.h"

namespace fastsd::fuzz {

// A target, in the list of those that are linked.
struct Target {
  using Body = void (*)(std::string_view input);
  Target(const char* target_name, Body target_body) noexcept
      : name(target_name), body(target_body), next(first) {
    first = this;
  }
  const char* name;
  Body body;
  Target* next;
  static inline Target* first = nullptr;
};

// A promise that was broken. Not an Error: no target catches it.
struct Broken : std::logic_error {
  using std::logic_error::logic_error;
};

inline void require(bool is_kept, const char* promise) {
  if (!is_kept) throw Broken(promise);
}

// Memory of just so many bytes, so that AddressSanitizer sees a read behind them. `bytes`: how much
// the file claims to have, which may be more.
File file_of(std::string_view content, std::uint64_t bytes);
inline File file_of(std::string_view content) { return file_of(content, content.size()); }

// That an index is what format.h says, walked over as its users do: every storage within the file,
// in order; every name within the names, UTF-8 and unique; every view within its storage.
void require_sound(const Index& index, std::uint64_t file_bytes, std::size_t devices);
void require_sound(const Tables& tables);

// That a text is JSON (RFC 8259) and, if it is a tree, names tensors `{"$tensor":N}` only below
// `tensors`.
void require_json(std::string_view text, std::optional<std::uint64_t> tensors);

// Numbers taken from the front of an input; zeros behind its end.
class Input {
 public:
  explicit Input(std::string_view bytes) : rest_(bytes) {}

  template <class T>
  T take() {
    T value{};
    rest_.copy(reinterpret_cast<char*>(&value), sizeof value);
    rest_.remove_prefix(std::min(sizeof value, rest_.size()));
    return value;
  }
  std::string_view take(std::size_t bytes) {
    const std::string_view taken = rest_.substr(0, bytes);
    rest_.remove_prefix(taken.size());
    return taken;
  }
  std::string_view rest() const { return rest_; }

 private:
  std::string_view rest_;
};

// Makes the checksum of an .fsd header right, and takes those of a zip file's records away, so that
// what they cover is looked at.
void seal(std::string& file);

std::vector<std::size_t> find_all(std::string_view bytes, std::string_view part);

// Nothing happens where there is no room.
template <class T>
void put(std::string& bytes, std::size_t at, T value) {
  if (at <= bytes.size() && sizeof value <= bytes.size() - at)
    std::memcpy(&bytes[at], &value, sizeof value);
}

}  // namespace fastsd::fuzz

#define FUZZ_TARGET(name)                                       \
  static void name(std::string_view input);                     \
  static const fastsd::fuzz::Target name##_target(#name, name); \
  static void name(std::string_view input)
