#include "safetensors_layout.h"

#include <array>
#include <cstdio>

#include "error.h"

namespace fastsd {
namespace {

constexpr std::uint64_t kHeaderAlignBytesInFile = 8;

void append(std::string& text, std::uint64_t value) {
  char digits[20];
  char* begin = std::end(digits);
  do {
    *--begin = static_cast<char>('0' + value % 10);
    value /= 10;
  } while (value != 0);
  text.append(begin, static_cast<std::size_t>(std::end(digits) - begin));
}

// A JSON string of UTF-8.
void append_quoted(std::string& text, std::string_view value) {
  text += '"';
  for (const char c : value) {
    if (c == '"' || c == '\\') {
      text += '\\';
      text += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\u%04x", static_cast<unsigned>(c));
      text += escape;
    } else {
      text += c;
    }
  }
  text += '"';
}

void append_shape(std::string& text, DType dtype, const Strided& view) {
  text += '[';
  for (std::uint32_t d = 0; d < view.rank; ++d) {
    if (d > 0) text += ',';
    // An item of torch's type is two elements there.
    const bool is_pair = dtype == DType::kFloat4E2m1fnX2 && d + 1 == view.rank;
    append(text, static_cast<std::uint64_t>(view.shape[d]) * (is_pair ? 2 : 1));
  }
  text += ']';
}

void append_tensor(std::string& text, std::string_view name, const TensorRecord& tensor,
                   const Strided& view, const StorageRecord& storage) {
  const auto refuse = [&](const std::string& why) {
    throw Error(Failure::kUnsupported, "tensor \"" + std::string(name) + "\" " + why);
  };
  const DType dtype{tensor.dtype};
  const char* dtype_name = safetensors_dtype(dtype);
  if (dtype_name == nullptr)
    refuse("has dtype " + std::string(find_dtype(tensor.dtype)->name) +
           ", which safetensors has no name for");
  if (dtype == DType::kFloat4E2m1fnX2 && view.rank == 0)
    refuse("is a pair of numbers, which is no whole tensor in safetensors");
  if ((storage.flags & kStorageHasNoData) != 0) refuse("is a meta tensor, which has no data");
  append_quoted(text, name);
  text += R"(:{"dtype":")";
  text += dtype_name;
  text += R"(","shape":)";
  append_shape(text, dtype, view);
  text += R"(,"data_offsets":[)";
  append(text, storage.offset);
  text += ',';
  append(text, storage.offset + storage.bytes);
  text += "]}";
}

// REQUIRES: offsets of storages count from the first.
std::string encode_header(const Index& index, const std::string& metadata) {
  std::vector<bool> is_written(index.storages.size());
  std::string text = "{";
  if (!metadata.empty()) text += R"("__metadata__":)" + metadata;
  for (const TensorRecord& tensor : index.tensors) {
    if (is_written[tensor.storage]) continue;
    is_written[tensor.storage] = true;
    if (text.size() > 1) text += ',';
    append_tensor(text, index.name(tensor), tensor, index.view(tensor),
                  index.storages[tensor.storage]);
  }
  text += '}';
  text.resize(align_up(text.size(), kHeaderAlignBytesInFile), ' ');
  return text;
}

}  // namespace

const char* safetensors_dtype(DType dtype) {
  switch (dtype) {
    case DType::kBool:
      return "BOOL";
    case DType::kUInt8:
      return "U8";
    case DType::kInt8:
      return "I8";
    case DType::kUInt16:
      return "U16";
    case DType::kInt16:
      return "I16";
    case DType::kUInt32:
      return "U32";
    case DType::kInt32:
      return "I32";
    case DType::kUInt64:
      return "U64";
    case DType::kInt64:
      return "I64";
    case DType::kFloat16:
      return "F16";
    case DType::kBFloat16:
      return "BF16";
    case DType::kFloat32:
      return "F32";
    case DType::kFloat64:
      return "F64";
    case DType::kComplex64:
      return "C64";
    case DType::kFloat8E4m3fn:
      return "F8_E4M3";
    case DType::kFloat8E4m3fnuz:
      return "F8_E4M3FNUZ";
    case DType::kFloat8E5m2:
      return "F8_E5M2";
    case DType::kFloat8E5m2fnuz:
      return "F8_E5M2FNUZ";
    case DType::kFloat8E8m0fnu:
      return "F8_E8M0";
    case DType::kFloat4E2m1fnX2:
      return "F4";
    default:
      return nullptr;
  }
}

SafetensorsLayout::SafetensorsLayout(Plan&& finished, const std::string& metadata)
    : Layout(std::move(finished)) {
  std::uint64_t data_bytes = 0;
  for (StorageRecord& storage : plan().storages()) {
    storage.offset = data_bytes;
    if (__builtin_add_overflow(data_bytes, stored_bytes(storage), &data_bytes) ||
        data_bytes > INT64_MAX - kSafetensorsHeaderBytesMax)
      throw Error(Failure::kLimit, "the tensors have more bytes than a file can");
  }
  const std::string header = encode_header(plan().index(), metadata);
  if (header.size() > kSafetensorsHeaderBytesMax) {
    throw Error(Failure::kLimit, "the header would have " + std::to_string(header.size()) +
                                     " bytes; safetensors reads at most " +
                                     std::to_string(kSafetensorsHeaderBytesMax));
  }
  const std::uint64_t bytes = header.size();
  head_.assign(reinterpret_cast<const char*>(&bytes), sizeof bytes);
  head_ += header;
  for (StorageRecord& storage : plan().storages()) storage.offset += head_.size();
  set_places(head_.size(), head_.size() + data_bytes, head_.size() + data_bytes);
}

}  // namespace fastsd
