#include "dtype.h"

#include <set>
#include <string>

#include "check.h"

namespace fastsd::test {
namespace {

TEST(dtype_numbers_name_their_entries) {
  std::set<std::string> names;
  for (std::size_t i = 0; i < kDTypeCount; ++i) {
    const auto number = static_cast<std::uint16_t>(i + 1);
    const DTypeInfo* info = find_dtype(number);
    if (!CHECK(info != nullptr)) continue;
    CHECK(static_cast<std::uint16_t>(info->dtype) == number);
    CHECK(names.insert(info->name).second);
    // Alignment to 256 and the leading bytes of a plan (plan.cc) count on it.
    CHECK(info->item_bytes > 0 && 16 % info->item_bytes == 0);
  }
  CHECK(find_dtype(std::uint16_t{0}) == nullptr);
  CHECK(find_dtype(static_cast<std::uint16_t>(kDTypeCount + 1)) == nullptr);
  CHECK(find_dtype(std::uint16_t{0xFFFF}) == nullptr);
}

TEST(dtype_is_found_by_its_dlpack_type) {
  for (std::size_t i = 0; i < kDTypeCount; ++i) {
    const DTypeInfo& info = kDTypes[i];
    if (!info.in_dlpack) continue;
    CHECK(find_dtype(info.dlpack_type) == &info);
    CHECK(info.dlpack_type.bits * info.dlpack_type.lanes == 8 * info.item_bytes);
  }
  CHECK(find_dtype(dlpack::DataType{0, 0, 0}) == nullptr);
  CHECK(find_dtype(dlpack::DataType{dlpack::kFloat, 32, 4}) == nullptr);
  CHECK(find_dtype(dlpack::DataType{99, 8, 1}) == nullptr);
}

}  // namespace
}  // namespace fastsd::test
