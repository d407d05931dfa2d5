#include "fuzz.h"

#include <cstring>
#include <memory>
#include <set>

#include "checksum.h"
#include "dtype.h"
#include "json_text.h"
#include "strided.h"
#include "utf8.h"

namespace fastsd::fuzz {
namespace {

void require_sound_storages(const Index& index, std::uint64_t file_bytes, std::size_t devices) {
  std::uint64_t end = 0;
  for (const StorageRecord& storage : index.storages) {
    require(storage.device < devices, "a storage's device is in the list");
    require(storage.bytes <= INT64_MAX, "the size of a storage fits 63 bits");
    const std::uint64_t bytes = stored_bytes(storage);
    if (bytes == 0) continue;
    require(storage.offset >= end, "storages ascend and do not overlap");
    require(storage.offset <= file_bytes && bytes <= file_bytes - storage.offset,
            "a storage lies within the file");
    end = storage.offset + bytes;
  }
}

void require_sound_view(const Index& index, const TensorRecord& tensor) {
  const DTypeInfo* dtype = find_dtype(tensor.dtype);
  require(dtype != nullptr, "a dtype is known");
  require(tensor.rank <= kRankMax, "a rank is within its limit");
  const std::uint64_t dims = index.dims.size();
  require(tensor.dims_offset <= dims && 2 * std::uint64_t{tensor.rank} <= dims - tensor.dims_offset,
          "dimensions lie within the dimensions");
  require(tensor.storage < index.storages.size(), "a tensor's storage is in the list");
  const auto extent = extent_bytes(index.view(tensor));
  require(extent.has_value(), "an extent fits 63 bits");
  const std::uint64_t bytes = index.storages[tensor.storage].bytes;
  require(tensor.storage_offset <= bytes / dtype->item_bytes &&
              *extent <= bytes - tensor.storage_offset * dtype->item_bytes,
          "a view lies within its storage");
}

// A walk over a text that must be JSON.
class Json {
 public:
  Json(const std::string& text, std::optional<std::uint64_t> tensors)
      : at_(text.data()), end_(at_ + text.size()), tensors_(tensors) {}

  void run() {
    value(0);
    at_ = skip_space(at_);
    require(at_ == end_, "a JSON text ends with its value");
  }

 private:
  bool skip(char wanted) {
    at_ = skip_space(at_);
    if (*at_ != wanted) return false;
    ++at_;
    return true;
  }

  void expect(char wanted) { require(skip(wanted), "a JSON text has what its grammar wants"); }

  std::string_view string() {
    expect('"');
    const char* first = at_;
    while (*at_ != '"') {
      require(static_cast<unsigned char>(*at_) >= 0x20, "a JSON string has no control characters");
      std::uint32_t code = 0;
      if (*at_ == '\\')
        require(parse_escape(at_, code) == nullptr, "a JSON escape is right");
      else
        ++at_;
    }
    return {first, static_cast<std::size_t>(at_++ - first)};
  }

  void value(int depth) {
    constexpr int depth_max = 4000;  // more than any limit in the code
    require(depth < depth_max, "a JSON text is not too deep");
    at_ = skip_space(at_);
    if (*at_ == '"') {
      string();
    } else if (*at_ == '{' || *at_ == '[') {
      container(depth);
    } else if (!word("null") && !word("true") && !word("false")) {
      bool is_whole = false;
      require(skip_number(at_, is_whole) == nullptr, "a JSON value is one");
    }
  }

  bool word(std::string_view wanted) {
    if (std::string_view(at_, static_cast<std::size_t>(end_ - at_)).substr(0, wanted.size()) !=
        wanted)
      return false;
    at_ += wanted.size();
    return true;
  }

  void container(int depth) {
    const bool is_object = *at_++ == '{';
    const char close = is_object ? '}' : ']';
    if (skip(close)) return;
    std::string_view key;
    const char* first = nullptr;
    int members = 0;
    do {
      if (is_object) key = string();
      if (is_object) expect(':');
      if (members++ == 0) first = at_;
      value(depth + 1);
    } while (skip(','));
    expect(close);
    // Among other members that name says nothing.
    if (tensors_ && key == "$tensor" && members == 1) require_tensor(skip_space(first));
  }

  void require_tensor(const char* digit) const {
    require(is_digit(*digit), "a tensor of a tree has a number");
    std::uint64_t number = 0;
    for (; is_digit(*digit) && number < *tensors_; ++digit)
      number = 10 * number + static_cast<std::uint64_t>(*digit - '0');
    require(number < *tensors_, "a tensor of a tree is in the list");
  }

  const char* at_;
  const char* end_;
  std::optional<std::uint64_t> tensors_;
};

// A zip file's checksums of 0 stand for none.
void seal_zip(std::string& file) {
  for (const std::size_t at : find_all(file, std::string_view("PK\3\4", 4)))
    put(file, at + 14, std::uint32_t{0});
  for (const std::size_t at : find_all(file, std::string_view("PK\1\2", 4)))
    put(file, at + 16, std::uint32_t{0});
}

}  // namespace

File file_of(std::string_view content, std::uint64_t bytes) {
  const std::shared_ptr<Memory> memory = Memory::allocate(content.size());
  if (!content.empty()) std::memcpy(memory->data(), content.data(), content.size());
  return {memory, bytes, "memory", 0};
}

void require_sound(const Index& index, std::uint64_t file_bytes, std::size_t devices) {
  require_sound_storages(index, file_bytes, devices);
  std::set<std::string_view> names;
  for (std::size_t i = 0; i < index.tensors.size(); ++i) {
    const TensorRecord& tensor = index.tensors[i];
    require(tensor.name_offset <= index.names.size() &&
                tensor.name_bytes <= index.names.size() - tensor.name_offset,
            "a name lies within the names");
    require(tensor.name_bytes <= kNameBytesMax, "a name is within its limit");
    require(is_utf8(index.name(tensor)), "a name is UTF-8");
    require(names.insert(index.name(tensor)).second, "names are unique");
    require(tensor.same_as <= i && index.tensors[tensor.same_as].same_as == tensor.same_as,
            "what a tensor is the same as comes earlier");
    require_sound_view(index, tensor);
  }
}

void require_sound(const Tables& tables) {
  for (const std::string& device : tables.devices)
    require(!device.empty() && is_utf8(device), "a device has a name");
  require_sound(tables.index(), tables.file_bytes, tables.devices.size());
}

void require_json(std::string_view text, std::optional<std::uint64_t> tensors) {
  require(is_utf8(text), "a JSON text is UTF-8");
  Json(std::string(text), tensors).run();
}

std::vector<std::size_t> find_all(std::string_view bytes, std::string_view part) {
  std::vector<std::size_t> places;
  for (std::size_t at = bytes.find(part); at != std::string_view::npos;
       at = bytes.find(part, at + 1))
    places.push_back(at);
  return places;
}

void seal(std::string& file) {
  seal_zip(file);
  Preamble preamble{};
  if (file.size() < sizeof preamble) return;
  std::memcpy(&preamble, file.data(), sizeof preamble);
  if (preamble.header_bytes < sizeof preamble || preamble.header_bytes > file.size()) return;
  preamble.header_crc32c = 0;
  std::memcpy(file.data(), &preamble, sizeof preamble);
  preamble.header_crc32c = crc32c(0, file.data(), preamble.header_bytes);
  std::memcpy(file.data(), &preamble, sizeof preamble);
}

}  // namespace fastsd::fuzz
