// What a pickle stream describes, as values that refer to one another: no Python objects. Texts are
// places in the stream.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace fastsd {

enum class Kind : std::uint8_t {
  kNothing,  // no value at all
  kNone,
  kBool,
  kInt,     // of 64 bits
  kBigInt,  // its bytes, as pickle has them
  kFloat,
  kStr,
  kBytes,
  kLatin1,  // bytes, each encoded as the character of that number
  kDType,
  kLayout,
  kDevice,
  // In a container.
  kComplex,  // two floats
  kSize,     // numbers, none negative
  kTuple,
  kList,
  kDict,  // keys and values in turn, a key perhaps several times
  kOrderedDict,
  kSet,  // an element perhaps several times
  kFrozenSet,
  kByteArray,  // its bytes, or nothing
  kTensor,
  // What no tree can hold.
  kGlobal,
  kStorageClass,
  kStorage,
  kOpaque,
};

struct Value {
  Kind kind = Kind::kNothing;
  bool has_surrogates = false;  // of a str
  std::uint16_t detail = 0;     // dtype; Callable; 1 + the index of a device, 0 for none
  std::uint32_t bytes = 0;      // of a text
  // A bool or int; the bits of a float; where a text begins in the stream; the number of a
  // container, a tensor, or a storage's key.
  std::uint64_t number = 0;
};

double to_float(const Value& value);

// Values that follow one another, and what the walk over them notes.
struct Container {
  std::uint32_t first = 0;  // among Graph::items
  std::uint32_t count = 0;
  std::uint32_t capacity = 0;
  std::uint32_t attributes = 0;  // number of the container with names and values; 0 for none
  std::uint32_t place = 0;       // in what is written
  bool is_used_up = false;       // something was made of what it holds, which must not change since
  bool is_seen = false;
  bool is_open = false;
};

constexpr std::uint32_t kNoNumber = UINT32_MAX;

struct TensorView {
  std::uint32_t storage = kNoNumber;  // kNoNumber: a meta tensor
  std::uint32_t meta_storage = 0;
  std::uint64_t storage_offset = 0;  // of the first element, in items
  std::uint32_t rank = 0;
  std::uint32_t shape = 0;  // containers of as many ints
  std::uint32_t stride = 0;
  std::uint16_t dtype = 0;
  std::uint16_t flags = 0;
  std::uint32_t record = kNoNumber;  // the first that was made of it
  bool is_opaque = false;
};

struct Graph {
  explicit Graph(std::string_view own_stream) : stream(own_stream) {}

  std::string_view text(const Value& value) const {
    return stream.substr(value.number, value.bytes);
  }
  const Container& container(const Value& value) const { return containers[value.number]; }
  const Value* begin(const Container& container) const { return items.data() + container.first; }
  const Value* end(const Container& container) const { return begin(container) + container.count; }

  std::uint32_t add_container(const Value* values, std::size_t count);
  void append(Container& container, const Value* values, std::size_t count);

  // A value of which nothing is known, so that the whole is no plain object.
  Value opaque() {
    is_plain = false;
    return {Kind::kOpaque};
  }

  std::string_view stream;
  std::vector<Value> items;
  std::vector<Container> containers = std::vector<Container>(1);  // the first for what is none
  std::vector<TensorView> tensors;
  std::vector<std::uint64_t> meta_storages;    // their bytes
  std::vector<std::string> devices;            // names
  std::vector<std::uint16_t> storage_devices;  // by number of the storage
  std::vector<std::string> globals;            // that are not known, as they come
  Value root;
  bool is_plain = true;
  bool has_tree = true;  // whether all is as it says, but for what is opaque
};

}  // namespace fastsd
