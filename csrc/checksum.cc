#include "checksum.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace fastsd {
namespace {

constexpr std::uint32_t kPolynomial = 0x82F63B78U;

// Polynomials over GF(2) modulo the CRC polynomial, highest power in the lowest bit. The CRC of a
// run followed by n zero bytes is the run's CRC times x^(8n), which is what joins the CRCs of two
// runs.
constexpr std::uint32_t multiply(std::uint32_t a, std::uint32_t b) {
  std::uint32_t product = 0;
  for (std::uint32_t bit = 0x80000000U; bit != 0; bit >>= 1U) {
    if ((a & bit) != 0) product ^= b;
    b = (b >> 1U) ^ ((b & 1U) != 0 ? kPolynomial : 0);
  }
  return product;
}

constexpr std::uint32_t power_of_x8(std::uint64_t bytes) {
  std::uint32_t result = 0x80000000U;  // x^0
  std::uint32_t square = 0x00800000U;  // x^8
  for (; bytes != 0; bytes >>= 1U) {
    if ((bytes & 1U) != 0) result = multiply(result, square);
    square = multiply(square, square);
  }
  return result;
}

// Eight tables of 256: table k advances a byte past k more bytes, so eight bytes take eight
// look-ups.
using Slices = std::array<std::array<std::uint32_t, 256>, 8>;

Slices make_slices() {
  Slices slices{};
  for (std::uint32_t i = 0; i < 256; ++i) {
    std::uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1U) ^ ((crc & 1U) != 0 ? kPolynomial : 0);
    slices[0][i] = crc;
  }
  for (std::size_t k = 1; k < 8; ++k) {
    for (std::size_t i = 0; i < 256; ++i) {
      slices[k][i] = (slices[k - 1][i] >> 8U) ^ slices[0][slices[k - 1][i] & 0xFFU];
    }
  }
  return slices;
}

std::uint32_t portable(std::uint32_t state, const unsigned char* data, std::size_t bytes) {
  static const Slices slices = make_slices();
  for (; bytes >= 8; data += 8, bytes -= 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, data, 8);
    word ^= state;
    state = 0;
    for (std::size_t k = 0; k < 8; ++k) state ^= slices[7 - k][(word >> (8 * k)) & 0xFFU];
  }
  for (; bytes != 0; ++data, --bytes) state = (state >> 8U) ^ slices[0][(state ^ *data) & 0xFFU];
  return state;
}

#if defined(__x86_64__) || (defined(__aarch64__) && defined(__linux__))

#if defined(__x86_64__)
#define FASTSD_CRC_TARGET __attribute__((target("sse4.2")))
constexpr const char* kHardwareName = "sse4.2";
FASTSD_CRC_TARGET inline std::uint32_t step8(std::uint32_t state, std::uint64_t word) {
  return static_cast<std::uint32_t>(_mm_crc32_u64(state, word));
}
FASTSD_CRC_TARGET inline std::uint32_t step1(std::uint32_t state, unsigned char byte) {
  return _mm_crc32_u8(state, byte);
}
bool hardware_present() noexcept { return __builtin_cpu_supports("sse4.2") != 0; }
#else
#define FASTSD_CRC_TARGET __attribute__((target("+crc")))
constexpr const char* kHardwareName = "armv8";
FASTSD_CRC_TARGET inline std::uint32_t step8(std::uint32_t state, std::uint64_t word) {
  return __crc32cd(state, word);
}
FASTSD_CRC_TARGET inline std::uint32_t step1(std::uint32_t state, unsigned char byte) {
  return __crc32cb(state, byte);
}
bool hardware_present() noexcept { return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0; }
#endif

inline std::uint64_t word_at(const unsigned char* data) {
  std::uint64_t word = 0;
  std::memcpy(&word, data, 8);
  return word;
}

// Multiplies a CRC by one fixed power of x with four look-ups.
using Shift = std::array<std::array<std::uint32_t, 256>, 4>;

Shift make_shift(std::uint64_t bytes) {
  Shift shift{};
  const std::uint32_t factor = power_of_x8(bytes);
  for (std::uint32_t k = 0; k < 4; ++k) {
    for (std::uint32_t i = 0; i < 256; ++i) shift[k][i] = multiply(factor, i << (8 * k));
  }
  return shift;
}

inline std::uint32_t apply(const Shift& shift, std::uint32_t crc) {
  return shift[0][crc & 0xFFU] ^ shift[1][(crc >> 8U) & 0xFFU] ^ shift[2][(crc >> 16U) & 0xFFU] ^
         shift[3][crc >> 24U];
}

// The instruction takes three cycles and one can start each cycle, so three independent lanes of
// `lane_bytes` run at once and are joined by two shifts.
FASTSD_CRC_TARGET inline std::uint32_t three_lanes(std::uint32_t state, const unsigned char*& data,
                                                   std::size_t& bytes, std::size_t lane_bytes,
                                                   const Shift& one_lane) {
  for (; bytes >= 3 * lane_bytes; data += 3 * lane_bytes, bytes -= 3 * lane_bytes) {
    std::uint32_t second = 0;
    std::uint32_t third = 0;
    for (std::size_t i = 0; i < lane_bytes; i += 8) {
      state = step8(state, word_at(data + i));
      second = step8(second, word_at(data + lane_bytes + i));
      third = step8(third, word_at(data + 2 * lane_bytes + i));
    }
    state = apply(one_lane, apply(one_lane, state) ^ second) ^ third;
  }
  return state;
}

FASTSD_CRC_TARGET std::uint32_t hardware(std::uint32_t state, const unsigned char* data,
                                         std::size_t bytes) {
  constexpr std::size_t long_lane_bytes = 8192;
  constexpr std::size_t short_lane_bytes = 256;
  static const Shift long_shift = make_shift(long_lane_bytes);
  static const Shift short_shift = make_shift(short_lane_bytes);
  state = three_lanes(state, data, bytes, long_lane_bytes, long_shift);
  state = three_lanes(state, data, bytes, short_lane_bytes, short_shift);
  for (; bytes >= 8; data += 8, bytes -= 8) state = step8(state, word_at(data));
  for (; bytes != 0; ++data, --bytes) state = step1(state, *data);
  return state;
}

#else

constexpr const char* kHardwareName = "none";
bool hardware_present() noexcept { return false; }
std::uint32_t hardware(std::uint32_t state, const unsigned char*, std::size_t) { return state; }

#endif

const bool kUseHardware = hardware_present();

}  // namespace

std::uint32_t crc32c(std::uint32_t crc, const void* data, std::size_t bytes) {
  const auto* first = static_cast<const unsigned char*>(data);
  return ~(kUseHardware ? hardware(~crc, first, bytes) : portable(~crc, first, bytes));
}

std::uint32_t crc32c_portable(std::uint32_t crc, const void* data, std::size_t bytes) {
  return ~portable(~crc, static_cast<const unsigned char*>(data), bytes);
}

std::uint32_t crc32c_combine(std::uint32_t first, std::uint32_t second,
                             std::uint64_t second_bytes) {
  return multiply(power_of_x8(second_bytes), first) ^ second;
}

const char* crc32c_implementation() { return kUseHardware ? kHardwareName : "portable"; }

}  // namespace fastsd
