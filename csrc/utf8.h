// UTF-8 (RFC 3629).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace fastsd {

// Whether `text` is well-formed: no overlong forms, no surrogates, nothing above U+10FFFF.
bool is_utf8(std::string_view text);

// Surrogates are encoded as if they were characters. REQUIRES: code < 0x110000.
void append_utf8(std::string& text, std::uint32_t code);

}  // namespace fastsd
