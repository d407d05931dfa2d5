// The element types of the container, in one table.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dlpack_abi.h"

namespace fastsd {

// Stored in files: numbers are never changed nor used again (docs/FORMAT.md, "Dtypes").
enum class DType : std::uint16_t {
  kBool = 1,
  kUInt8 = 2,
  kInt8 = 3,
  kUInt16 = 4,
  kInt16 = 5,
  kUInt32 = 6,
  kInt32 = 7,
  kUInt64 = 8,
  kInt64 = 9,
  kFloat16 = 10,
  kBFloat16 = 11,
  kFloat32 = 12,
  kFloat64 = 13,
  kComplex32 = 14,
  kComplex64 = 15,
  kComplex128 = 16,
  kFloat8E4m3fn = 17,
  kFloat8E4m3fnuz = 18,
  kFloat8E5m2 = 19,
  kFloat8E5m2fnuz = 20,
  kFloat8E8m0fnu = 21,
  kFloat4E2m1fnX2 = 22,
  kBits8 = 23,
  kBits16 = 24,
  kBits1x8 = 25,
  kBits2x4 = 26,
  kBits4x2 = 27,
  kInt1 = 28,
  kInt2 = 29,
  kInt3 = 30,
  kInt4 = 31,
  kInt5 = 32,
  kInt6 = 33,
  kInt7 = 34,
  kUInt1 = 35,
  kUInt2 = 36,
  kUInt3 = 37,
  kUInt4 = 38,
  kUInt5 = 39,
  kUInt6 = 40,
  kUInt7 = 41,
};

struct DTypeInfo {
  DType dtype;
  const char* name;          // torch's name, without "torch."
  std::uint16_t item_bytes;  // what torch calls itemsize
  bool in_dlpack;            // whether DLPack names exactly this type
  dlpack::DataType dlpack_type;
};

// Sorted by number, without gaps: entry i describes number i + 1.
extern const DTypeInfo kDTypes[];
extern const std::size_t kDTypeCount;

// nullptr: no such type.
const DTypeInfo* find_dtype(std::uint16_t number);

// nullptr: not a type of the container. Eight-bit integers stand for themselves here, though torch
// exports its narrower integers under the same DLPack type.
const DTypeInfo* find_dtype(const dlpack::DataType& type);

}  // namespace fastsd
