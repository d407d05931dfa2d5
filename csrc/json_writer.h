// The parts of JSON texts (RFC 8259), and of the container's own nodes in them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace fastsd {

// A string in quotes. REQUIRES: `text` is UTF-8.
void append_json_string(std::string& json, std::string_view text);

// A number with a fraction or an exponent, which reads as this float again. REQUIRES: it is finite.
void append_json_float(std::string& json, double value);

// The 8 bytes of a float in hexadecimal digits, most significant first.
void append_float_bits(std::string& json, double value);

// Base64 (RFC 4648, section 4) with padding.
void append_base64(std::string& json, std::string_view bytes);

// `0x...` or `-0x...`, of a two's complement number, least significant byte first. REQUIRES: it has
// bytes.
void append_hex_int(std::string& json, std::string_view bytes);

}  // namespace fastsd
