// The two CRCs of the formats: CRC32C (Castagnoli, reflected polynomial 0x82F63B78; RFC 3720
// appendix B.4) of every storage and of the header of .fsd, and CRC-32 (reflected polynomial
// 0xEDB88320) of the records of zip files. Hardware instructions are chosen at run time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastsd {

// The CRC of the bytes that gave `crc` (0: none yet) followed by `data[0, bytes)`.
std::uint32_t crc32c(std::uint32_t crc, const void* data, std::size_t bytes);
std::uint32_t crc32(std::uint32_t crc, const void* data, std::size_t bytes);

// The CRC of two runs of bytes, from that of each and the length of the second.
std::uint32_t crc32c_combine(std::uint32_t first, std::uint32_t second, std::uint64_t second_bytes);
std::uint32_t crc32_combine(std::uint32_t first, std::uint32_t second, std::uint64_t second_bytes);

// The paths without special instructions; the references that tests hold the others against.
std::uint32_t crc32c_portable(std::uint32_t crc, const void* data, std::size_t bytes);
std::uint32_t crc32_portable(std::uint32_t crc, const void* data, std::size_t bytes);

// What they use on this machine: "sse4.2", "armv8" or "portable"...
const char* crc32c_implementation();
// ..."pclmulqdq", "armv8" or "portable".
const char* crc32_implementation();

// One of the two, for code that works with either.
struct Checksum {
  std::uint32_t (*update)(std::uint32_t crc, const void* data, std::size_t bytes);
  std::uint32_t (*combine)(std::uint32_t first, std::uint32_t second, std::uint64_t second_bytes);
};
constexpr Checksum kCrc32c{crc32c, crc32c_combine};
constexpr Checksum kCrc32{crc32, crc32_combine};

}  // namespace fastsd
