// The parts of JSON's grammar (RFC 8259) that are the same whatever is made of a text. They read
// without looking for the end: the text ends with a zero byte, which nothing accepts.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace fastsd {

constexpr std::array<bool, 256> list_plain_bytes() {
  std::array<bool, 256> is_plain{};
  for (std::size_t byte = 0x20; byte < 0x80; ++byte) is_plain[byte] = byte != '"' && byte != '\\';
  return is_plain;
}
// Bytes that stand for themselves in a string, one for each character.
constexpr std::array<bool, 256> kIsPlain = list_plain_bytes();

inline bool is_digit(char c) { return c >= '0' && c <= '9'; }
inline bool is_high_surrogate(std::uint32_t unit) { return unit >= 0xD800 && unit < 0xDC00; }
inline bool is_low_surrogate(std::uint32_t unit) { return unit >= 0xDC00 && unit < 0xE000; }

inline const char* skip_space(const char* at) {
  while (*at == ' ' || *at == '\n' || *at == '\r' || *at == '\t') ++at;
  return at;
}

inline const char* skip_plain(const char* at) {
  while (kIsPlain[static_cast<unsigned char>(*at)]) ++at;
  return at;
}

// Moves `at`, which is at a backslash, behind the escape, or behind two that are the surrogates of
// one character; other surrogates are left as they are. Returns what is wrong, `at` being there,
// else nullptr.
const char* parse_escape(const char*& at, std::uint32_t& code);

// Moves `at` behind the number; `is_whole` says whether it has neither a fraction nor an exponent.
// Returns what is wrong, `at` being there, else nullptr.
const char* skip_number(const char*& at, bool& is_whole);

}  // namespace fastsd
