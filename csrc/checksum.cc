#include "checksum.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#include <wmmintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace fastsd {
namespace {

constexpr std::uint32_t kCastagnoli = 0x82F63B78U;
constexpr std::uint32_t kZip = 0xEDB88320U;

// Polynomials over GF(2) modulo the CRC polynomial, highest power in the lowest bit. The CRC of a
// run followed by n zero bytes is the run's CRC times x^(8n), which is what joins the CRCs of two
// runs.
template <std::uint32_t kPolynomial>
constexpr std::uint32_t multiply(std::uint32_t a, std::uint32_t b) {
  std::uint32_t product = 0;
  for (std::uint32_t bit = 0x80000000U; bit != 0; bit >>= 1U) {
    if ((a & bit) != 0) product ^= b;
    b = (b >> 1U) ^ ((b & 1U) != 0 ? kPolynomial : 0);
  }
  return product;
}

template <std::uint32_t kPolynomial>
constexpr std::uint32_t power_of_x8(std::uint64_t bytes) {
  std::uint32_t result = 0x80000000U;  // x^0
  std::uint32_t square = 0x00800000U;  // x^8
  for (; bytes != 0; bytes >>= 1U) {
    if ((bytes & 1U) != 0) result = multiply<kPolynomial>(result, square);
    square = multiply<kPolynomial>(square, square);
  }
  return result;
}

template <std::uint32_t kPolynomial>
std::uint32_t combine(std::uint32_t first, std::uint32_t second, std::uint64_t second_bytes) {
  return multiply<kPolynomial>(power_of_x8<kPolynomial>(second_bytes), first) ^ second;
}

// Eight tables of 256: table k advances a byte past k more bytes, so eight bytes take eight
// look-ups.
using Slices = std::array<std::array<std::uint32_t, 256>, 8>;

template <std::uint32_t kPolynomial>
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

template <std::uint32_t kPolynomial>
std::uint32_t portable(std::uint32_t state, const unsigned char* data, std::size_t bytes) {
  static const Slices slices = make_slices<kPolynomial>();
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

// ---- Instructions that advance a CRC by some bytes ----

#if defined(__x86_64__)
#define FASTSD_CRC_TARGET __attribute__((target("sse4.2")))
constexpr const char* kHardwareName = "sse4.2";
struct CastagnoliSteps {
  static constexpr std::uint32_t kPolynomial = kCastagnoli;
  FASTSD_CRC_TARGET static std::uint32_t step8(std::uint32_t state, std::uint64_t word) {
    return static_cast<std::uint32_t>(_mm_crc32_u64(state, word));
  }
  FASTSD_CRC_TARGET static std::uint32_t step1(std::uint32_t state, unsigned char byte) {
    return _mm_crc32_u8(state, byte);
  }
};
bool hardware_present() noexcept { return __builtin_cpu_supports("sse4.2") != 0; }
#else
#define FASTSD_CRC_TARGET __attribute__((target("+crc")))
constexpr const char* kHardwareName = "armv8";
struct CastagnoliSteps {
  static constexpr std::uint32_t kPolynomial = kCastagnoli;
  FASTSD_CRC_TARGET static std::uint32_t step8(std::uint32_t state, std::uint64_t word) {
    return __crc32cd(state, word);
  }
  FASTSD_CRC_TARGET static std::uint32_t step1(std::uint32_t state, unsigned char byte) {
    return __crc32cb(state, byte);
  }
};
struct ZipSteps {
  static constexpr std::uint32_t kPolynomial = kZip;
  FASTSD_CRC_TARGET static std::uint32_t step8(std::uint32_t state, std::uint64_t word) {
    return __crc32d(state, word);
  }
  FASTSD_CRC_TARGET static std::uint32_t step1(std::uint32_t state, unsigned char byte) {
    return __crc32b(state, byte);
  }
};
bool hardware_present() noexcept { return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0; }
#endif

inline std::uint64_t word_at(const unsigned char* data) {
  std::uint64_t word = 0;
  std::memcpy(&word, data, 8);
  return word;
}

// Multiplies a CRC by one fixed power of x with four look-ups.
using Shift = std::array<std::array<std::uint32_t, 256>, 4>;

template <std::uint32_t kPolynomial>
Shift make_shift(std::uint64_t bytes) {
  Shift shift{};
  const std::uint32_t factor = power_of_x8<kPolynomial>(bytes);
  for (std::uint32_t k = 0; k < 4; ++k) {
    for (std::uint32_t i = 0; i < 256; ++i)
      shift[k][i] = multiply<kPolynomial>(factor, i << (8 * k));
  }
  return shift;
}

inline std::uint32_t apply(const Shift& shift, std::uint32_t crc) {
  return shift[0][crc & 0xFFU] ^ shift[1][(crc >> 8U) & 0xFFU] ^ shift[2][(crc >> 16U) & 0xFFU] ^
         shift[3][crc >> 24U];
}

// The instruction takes three cycles and one can start each cycle, so three independent lanes of
// `lane_bytes` run at once and are joined by two shifts.
template <class Steps>
FASTSD_CRC_TARGET inline std::uint32_t three_lanes(std::uint32_t state, const unsigned char*& data,
                                                   std::size_t& bytes, std::size_t lane_bytes,
                                                   const Shift& one_lane) {
  for (; bytes >= 3 * lane_bytes; data += 3 * lane_bytes, bytes -= 3 * lane_bytes) {
    std::uint32_t second = 0;
    std::uint32_t third = 0;
    for (std::size_t i = 0; i < lane_bytes; i += 8) {
      state = Steps::step8(state, word_at(data + i));
      second = Steps::step8(second, word_at(data + lane_bytes + i));
      third = Steps::step8(third, word_at(data + 2 * lane_bytes + i));
    }
    state = apply(one_lane, apply(one_lane, state) ^ second) ^ third;
  }
  return state;
}

template <class Steps>
FASTSD_CRC_TARGET std::uint32_t in_lanes(std::uint32_t state, const unsigned char* data,
                                         std::size_t bytes) {
  constexpr std::size_t long_lane_bytes = 8192;
  constexpr std::size_t short_lane_bytes = 256;
  static const Shift long_shift = make_shift<Steps::kPolynomial>(long_lane_bytes);
  static const Shift short_shift = make_shift<Steps::kPolynomial>(short_lane_bytes);
  state = three_lanes<Steps>(state, data, bytes, long_lane_bytes, long_shift);
  state = three_lanes<Steps>(state, data, bytes, short_lane_bytes, short_shift);
  for (; bytes >= 8; data += 8, bytes -= 8) state = Steps::step8(state, word_at(data));
  for (; bytes != 0; ++data, --bytes) state = Steps::step1(state, *data);
  return state;
}

std::uint32_t castagnoli(std::uint32_t state, const unsigned char* data, std::size_t bytes) {
  return in_lanes<CastagnoliSteps>(state, data, bytes);
}

#else

constexpr const char* kHardwareName = "none";
bool hardware_present() noexcept { return false; }
std::uint32_t castagnoli(std::uint32_t state, const unsigned char*, std::size_t) { return state; }

#endif

// ---- CRC-32, which x86-64 has no instruction for ----

#if defined(__x86_64__)

// Folding: Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ
// Instruction", Intel, 2009. 128 bits that lie n bits before others add to the CRC what their
// products with x^(n + 32) and x^(n - 32), of the halves, add in the place of those others.
#define FASTSD_FOLD_TARGET __attribute__((target("pclmul,sse4.1")))
constexpr const char* kZipHardwareName = "pclmulqdq";

bool zip_hardware_present() noexcept {
  return __builtin_cpu_supports("pclmul") != 0 && __builtin_cpu_supports("sse4.1") != 0;
}

// A product of reflected operands comes out one bit too low, hence the shift.
constexpr std::uint64_t fold_factor(std::uint64_t bits) {
  return std::uint64_t{power_of_x8<kZip>(bits / 8)} << 1U;
}
static_assert(fold_factor(512 + 32) == 0x154442BD4 && fold_factor(128 - 32) == 0x0CCAA009E,
              "the constants that the paper gives for this polynomial");

FASTSD_FOLD_TARGET inline __m128i load(const unsigned char* data) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
}

FASTSD_FOLD_TARGET inline __m128i fold(__m128i value, __m128i factors, __m128i next) {
  const __m128i low = _mm_clmulepi64_si128(value, factors, 0x00);
  const __m128i high = _mm_clmulepi64_si128(value, factors, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

FASTSD_FOLD_TARGET inline __m128i factors_of(std::uint64_t bits) {
  return _mm_set_epi64x(static_cast<long long>(fold_factor(bits - 32)),
                        static_cast<long long>(fold_factor(bits + 32)));
}

// REQUIRES: bytes >= 64. The last 128 bits, and what is left behind them, go through the tables.
FASTSD_FOLD_TARGET std::uint32_t fold_all(std::uint32_t state, const unsigned char* data,
                                          std::size_t bytes) {
  static const __m128i four_on = factors_of(512);
  static const __m128i one_on = factors_of(128);
  __m128i a = _mm_xor_si128(load(data), _mm_cvtsi32_si128(static_cast<int>(state)));
  __m128i b = load(data + 16);
  __m128i c = load(data + 32);
  __m128i d = load(data + 48);
  for (data += 64, bytes -= 64; bytes >= 64; data += 64, bytes -= 64) {
    a = fold(a, four_on, load(data));
    b = fold(b, four_on, load(data + 16));
    c = fold(c, four_on, load(data + 32));
    d = fold(d, four_on, load(data + 48));
  }
  a = fold(fold(fold(a, one_on, b), one_on, c), one_on, d);
  for (; bytes >= 16; data += 16, bytes -= 16) a = fold(a, one_on, load(data));
  unsigned char rest[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(rest), a);
  return portable<kZip>(portable<kZip>(0, rest, sizeof rest), data, bytes);
}

std::uint32_t zip(std::uint32_t state, const unsigned char* data, std::size_t bytes) {
  return bytes < 64 ? portable<kZip>(state, data, bytes) : fold_all(state, data, bytes);
}

#elif defined(__aarch64__) && defined(__linux__)

constexpr const char* kZipHardwareName = kHardwareName;
bool zip_hardware_present() noexcept { return hardware_present(); }
std::uint32_t zip(std::uint32_t state, const unsigned char* data, std::size_t bytes) {
  return in_lanes<ZipSteps>(state, data, bytes);
}

#else

constexpr const char* kZipHardwareName = "none";
bool zip_hardware_present() noexcept { return false; }
std::uint32_t zip(std::uint32_t state, const unsigned char*, std::size_t) { return state; }

#endif

const bool kUseHardware = hardware_present();
const bool kUseZipHardware = zip_hardware_present();

const unsigned char* bytes_of(const void* data) { return static_cast<const unsigned char*>(data); }

}  // namespace

std::uint32_t crc32c(std::uint32_t crc, const void* data, std::size_t bytes) {
  return ~(kUseHardware ? castagnoli : portable<kCastagnoli>)(~crc, bytes_of(data), bytes);
}

std::uint32_t crc32(std::uint32_t crc, const void* data, std::size_t bytes) {
  return ~(kUseZipHardware ? zip : portable<kZip>)(~crc, bytes_of(data), bytes);
}

std::uint32_t crc32c_portable(std::uint32_t crc, const void* data, std::size_t bytes) {
  return ~portable<kCastagnoli>(~crc, bytes_of(data), bytes);
}

std::uint32_t crc32_portable(std::uint32_t crc, const void* data, std::size_t bytes) {
  return ~portable<kZip>(~crc, bytes_of(data), bytes);
}

std::uint32_t crc32c_combine(std::uint32_t first, std::uint32_t second,
                             std::uint64_t second_bytes) {
  return combine<kCastagnoli>(first, second, second_bytes);
}

std::uint32_t crc32_combine(std::uint32_t first, std::uint32_t second, std::uint64_t second_bytes) {
  return combine<kZip>(first, second, second_bytes);
}

const char* crc32c_implementation() { return kUseHardware ? kHardwareName : "portable"; }
const char* crc32_implementation() { return kUseZipHardware ? kZipHardwareName : "portable"; }

}  // namespace fastsd
