// The parts of JSON's grammar (RFC 8259) that are the same whatever is made of a text. They read
// without looking for the end: the text ends with a zero byte, which nothing accepts.
// In a header, as a call for each escape and number would be a tenth of the parser's time.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

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

// 16 for what is no hexadecimal digit.
inline std::uint32_t hex_value(char c) {
  constexpr std::string_view digits = "0123456789abcdefABCDEF";
  const std::size_t i = digits.find(c);
  if (i == std::string_view::npos) return 16;
  return static_cast<std::uint32_t>(i < 16 ? i : i - 6);
}

// One `\uXXXX`.
inline const char* parse_unit(const char*& at, std::uint32_t& unit) {
  unit = 0;
  for (const char* digit = at + 2; digit < at + 6; ++digit) {
    const std::uint32_t value = hex_value(*digit);
    if (value == 16) return "expected four hexadecimal digits in the escape";
    unit = unit << 4U | value;
  }
  at += 6;
  return nullptr;
}

// One `\uXXXX`, or two that are the surrogates of one character.
inline const char* parse_code(const char*& at, std::uint32_t& code) {
  if (const char* problem = parse_unit(at, code)) return problem;
  if (!is_high_surrogate(code) || at[0] != '\\' || at[1] != 'u') return nullptr;
  const char* next = at;
  std::uint32_t low = 0;
  if (const char* problem = parse_unit(next, low)) return problem;
  if (!is_low_surrogate(low)) return nullptr;
  code = 0x10000 + ((code - 0xD800) << 10U) + (low - 0xDC00);
  at = next;
  return nullptr;
}

// Moves `at`, which is at a backslash, behind the escape, or behind two that are the surrogates of
// one character; other surrogates are left as they are. Returns what is wrong, `at` being there,
// else nullptr.
inline const char* parse_escape(const char*& at, std::uint32_t& code) {
  constexpr std::string_view names = "\"\\/bfnrt";
  constexpr std::string_view values = "\"\\/\b\f\n\r\t";
  if (at[1] == 'u') return parse_code(at, code);
  const std::size_t i = names.find(at[1]);
  if (i == std::string_view::npos) return "expected an escape";
  code = static_cast<unsigned char>(values[i]);
  at += 2;
  return nullptr;
}

// Moves `at` behind digits; returns whether there are any.
inline bool skip_digits(const char*& at) {
  const char* first = at;
  while (is_digit(*at)) ++at;
  return at != first;
}

// Moves `at` behind the number; `is_whole` says whether it has neither a fraction nor an exponent.
// Returns what is wrong, `at` being there, else nullptr.
inline const char* skip_number(const char*& at, bool& is_whole) {
  if (*at == '-') ++at;
  if (*at == '0') {
    ++at;
  } else if (!skip_digits(at)) {
    return "expected a value";
  }
  const char* whole = at;
  if (*at == '.') {
    ++at;
    if (!skip_digits(at)) return "expected a digit";
  }
  if (*at == 'e' || *at == 'E') {
    ++at;
    if (*at == '+' || *at == '-') ++at;
    if (!skip_digits(at)) return "expected a digit";
  }
  is_whole = at == whole;
  return nullptr;
}

}  // namespace fastsd
