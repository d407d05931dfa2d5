// CRC32C (Castagnoli, reflected polynomial 0x82F63B78; RFC 3720 appendix B.4), the checksum of
// every storage and of the header. Hardware instructions are chosen at run time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastsd {

// The CRC32C of the bytes that gave `crc` (0: none yet) followed by `data[0, bytes)`.
std::uint32_t crc32c(std::uint32_t crc, const void* data, std::size_t bytes);

// The CRC32C of two runs of bytes, from that of each and the length of the second.
std::uint32_t crc32c_combine(std::uint32_t first, std::uint32_t second, std::uint64_t second_bytes);

// The path without special instructions; the reference that tests hold the others against.
std::uint32_t crc32c_portable(std::uint32_t crc, const void* data, std::size_t bytes);

// "sse4.2", "armv8" or "portable": what crc32c() uses on this machine.
const char* crc32c_implementation();

}  // namespace fastsd
