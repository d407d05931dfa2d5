#include "dtype.h"

namespace fastsd {

namespace {
constexpr dlpack::DataType kNone{0, 0, 0};
}

const DTypeInfo kDTypes[] = {
    {DType::kBool, "bool", 1, true, {dlpack::kBool, 8, 1}},
    {DType::kUInt8, "uint8", 1, true, {dlpack::kUInt, 8, 1}},
    {DType::kInt8, "int8", 1, true, {dlpack::kInt, 8, 1}},
    {DType::kUInt16, "uint16", 2, true, {dlpack::kUInt, 16, 1}},
    {DType::kInt16, "int16", 2, true, {dlpack::kInt, 16, 1}},
    {DType::kUInt32, "uint32", 4, true, {dlpack::kUInt, 32, 1}},
    {DType::kInt32, "int32", 4, true, {dlpack::kInt, 32, 1}},
    {DType::kUInt64, "uint64", 8, true, {dlpack::kUInt, 64, 1}},
    {DType::kInt64, "int64", 8, true, {dlpack::kInt, 64, 1}},
    {DType::kFloat16, "float16", 2, true, {dlpack::kFloat, 16, 1}},
    {DType::kBFloat16, "bfloat16", 2, true, {dlpack::kBfloat, 16, 1}},
    {DType::kFloat32, "float32", 4, true, {dlpack::kFloat, 32, 1}},
    {DType::kFloat64, "float64", 8, true, {dlpack::kFloat, 64, 1}},
    {DType::kComplex32, "complex32", 4, true, {dlpack::kComplex, 32, 1}},
    {DType::kComplex64, "complex64", 8, true, {dlpack::kComplex, 64, 1}},
    {DType::kComplex128, "complex128", 16, true, {dlpack::kComplex, 128, 1}},
    {DType::kFloat8E4m3fn, "float8_e4m3fn", 1, true, {dlpack::kFloat8E4m3fn, 8, 1}},
    {DType::kFloat8E4m3fnuz, "float8_e4m3fnuz", 1, true, {dlpack::kFloat8E4m3fnuz, 8, 1}},
    {DType::kFloat8E5m2, "float8_e5m2", 1, true, {dlpack::kFloat8E5m2, 8, 1}},
    {DType::kFloat8E5m2fnuz, "float8_e5m2fnuz", 1, true, {dlpack::kFloat8E5m2fnuz, 8, 1}},
    {DType::kFloat8E8m0fnu, "float8_e8m0fnu", 1, true, {dlpack::kFloat8E8m0fnu, 8, 1}},
    {DType::kFloat4E2m1fnX2, "float4_e2m1fn_x2", 1, true, {dlpack::kFloat4E2m1fn, 4, 2}},
    {DType::kBits8, "bits8", 1, false, kNone},
    {DType::kBits16, "bits16", 2, false, kNone},
    {DType::kBits1x8, "bits1x8", 1, false, kNone},
    {DType::kBits2x4, "bits2x4", 1, false, kNone},
    {DType::kBits4x2, "bits4x2", 1, false, kNone},
    {DType::kInt1, "int1", 1, false, kNone},
    {DType::kInt2, "int2", 1, false, kNone},
    {DType::kInt3, "int3", 1, false, kNone},
    {DType::kInt4, "int4", 1, false, kNone},
    {DType::kInt5, "int5", 1, false, kNone},
    {DType::kInt6, "int6", 1, false, kNone},
    {DType::kInt7, "int7", 1, false, kNone},
    {DType::kUInt1, "uint1", 1, false, kNone},
    {DType::kUInt2, "uint2", 1, false, kNone},
    {DType::kUInt3, "uint3", 1, false, kNone},
    {DType::kUInt4, "uint4", 1, false, kNone},
    {DType::kUInt5, "uint5", 1, false, kNone},
    {DType::kUInt6, "uint6", 1, false, kNone},
    {DType::kUInt7, "uint7", 1, false, kNone},
};

const std::size_t kDTypeCount = sizeof(kDTypes) / sizeof(kDTypes[0]);
static_assert(sizeof(kDTypes) / sizeof(kDTypes[0]) == static_cast<std::size_t>(DType::kUInt7),
              "the table has an entry for every number");

const DTypeInfo* find_dtype(std::uint16_t number) {
  return number >= 1 && number <= kDTypeCount ? &kDTypes[number - 1] : nullptr;
}

const DTypeInfo* find_dtype(const dlpack::DataType& type) {
  for (const DTypeInfo& info : kDTypes) {
    const dlpack::DataType& own = info.dlpack_type;
    if (info.in_dlpack && own.code == type.code && own.bits == type.bits && own.lanes == type.lanes)
      return &info;
  }
  return nullptr;
}

}  // namespace fastsd
