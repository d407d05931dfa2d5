#include "json_text.h"

#include <string_view>

namespace fastsd {
namespace {

// 16 for what is no hexadecimal digit.
std::uint32_t hex_value(char c) {
  constexpr std::string_view digits = "0123456789abcdefABCDEF";
  const std::size_t i = digits.find(c);
  if (i == std::string_view::npos) return 16;
  return static_cast<std::uint32_t>(i < 16 ? i : i - 6);
}

const char* parse_unit(const char*& at, std::uint32_t& unit) {
  unit = 0;
  for (const char* digit = at + 2; digit < at + 6; ++digit) {
    const std::uint32_t value = hex_value(*digit);
    if (value == 16) return "expected four hexadecimal digits in the escape";
    unit = unit << 4U | value;
  }
  at += 6;
  return nullptr;
}

// One `\uXXXX`, or two.
const char* parse_code(const char*& at, std::uint32_t& code) {
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

bool skip_digits(const char*& at) {
  const char* first = at;
  while (is_digit(*at)) ++at;
  return at != first;
}

}  // namespace

const char* parse_escape(const char*& at, std::uint32_t& code) {
  constexpr std::string_view names = "\"\\/bfnrt";
  constexpr std::string_view values = "\"\\/\b\f\n\r\t";
  if (at[1] == 'u') return parse_code(at, code);
  const std::size_t i = names.find(at[1]);
  if (i == std::string_view::npos) return "expected an escape";
  code = static_cast<unsigned char>(values[i]);
  at += 2;
  return nullptr;
}

const char* skip_number(const char*& at, bool& is_whole) {
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
