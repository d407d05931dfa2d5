#include "json_writer.h"

#include <charconv>
#include <cstddef>
#include <cstring>
#ifndef __cpp_lib_to_chars
#include <locale>
#include <sstream>
#endif

namespace fastsd {
namespace {

constexpr std::string_view kHexDigits = "0123456789abcdef";

unsigned byte_at(std::string_view bytes, std::size_t i) {
  return static_cast<unsigned char>(bytes[i]);
}

void append_escape(std::string& json, char c) {
  const auto byte = static_cast<unsigned char>(c);
  if (c == '"' || c == '\\') {
    json += '\\';
    json += c;
  } else {
    json += "\\u00";
    json += kHexDigits[byte >> 4U];
    json += kHexDigits[byte & 15U];
  }
}

}  // namespace

void append_json_string(std::string& json, std::string_view text) {
  json += '"';
  std::size_t copied = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (static_cast<unsigned char>(c) >= 0x20 && c != '"' && c != '\\') continue;
    json.append(text, copied, i - copied);
    append_escape(json, c);
    copied = i + 1;
  }
  json.append(text, copied);
  json += '"';
}

void append_json_float(std::string& json, double value) {
  const std::size_t begin = json.size();
#ifdef __cpp_lib_to_chars
  char text[32];
  json.append(text, std::to_chars(text, text + sizeof text, value).ptr);
#else
  std::ostringstream text;
  text.imbue(std::locale::classic());
  text.precision(17);
  text << value;
  json += text.str();
#endif
  if (json.find_first_of(".e", begin) == std::string::npos) json += ".0";
}

void append_float_bits(std::string& json, double value) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof bits);
  for (unsigned shift = 64; shift > 0; shift -= 4) json += kHexDigits[bits >> (shift - 4) & 15U];
}

void append_base64(std::string& json, std::string_view bytes) {
  constexpr std::string_view digits =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  for (std::size_t i = 0; i < bytes.size(); i += 3) {
    const std::size_t count = bytes.size() - i < 3 ? bytes.size() - i : 3;
    unsigned group = 0;
    for (std::size_t j = 0; j < 3; ++j)
      group = group << 8U | (j < count ? byte_at(bytes, i + j) : 0);
    for (std::size_t j = 0; j < 4; ++j)
      json += j <= count ? digits[group >> (18 - 6 * j) & 63U] : '=';
  }
}

void append_hex_int(std::string& json, std::string_view bytes) {
  const bool is_negative = (byte_at(bytes, bytes.size() - 1) & 0x80U) != 0;
  std::string magnitude(bytes);
  if (is_negative) {  // the complement, plus one
    unsigned carry = 1;
    for (char& byte : magnitude) {
      carry += ~static_cast<unsigned>(static_cast<unsigned char>(byte)) & 0xFFU;
      byte = static_cast<char>(carry & 0xFFU);
      carry >>= 8U;
    }
  }
  json += is_negative ? "-0x" : "0x";
  for (std::size_t i = magnitude.size(); i-- > 0;) {
    json += kHexDigits[byte_at(magnitude, i) >> 4U];
    json += kHexDigits[byte_at(magnitude, i) & 15U];
  }
}

}  // namespace fastsd
