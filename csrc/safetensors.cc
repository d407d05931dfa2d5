#include "safetensors.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "dtype.h"
#include "error.h"
#include "json_text.h"
#include "unique.h"
#include "utf8.h"

namespace fastsd {
namespace {

constexpr std::size_t kLengthBytes = 8;

// Of values that are ignored; far from the end of any thread's stack.
constexpr int kDepthMax = 100;

std::string number(std::uint64_t value) { return std::to_string(value); }

[[noreturn]] void reject(const std::string& detail) { throw Error(Failure::kFormat, detail); }

// ---- Dtypes ----

struct NamedDType {
  std::string_view name;
  DType dtype;
};

constexpr NamedDType kNamedDTypes[] = {
    {"F32", DType::kFloat32},
    {"F16", DType::kFloat16},
    {"BF16", DType::kBFloat16},
    {"I64", DType::kInt64},
    {"U8", DType::kUInt8},
    {"I8", DType::kInt8},
    {"BOOL", DType::kBool},
    {"I32", DType::kInt32},
    {"I16", DType::kInt16},
    {"U16", DType::kUInt16},
    {"U32", DType::kUInt32},
    {"U64", DType::kUInt64},
    {"F64", DType::kFloat64},
    {"C64", DType::kComplex64},
    {"F8_E4M3", DType::kFloat8E4m3fn},
    {"F8_E5M2", DType::kFloat8E5m2},
    {"F8_E8M0", DType::kFloat8E8m0fnu},
    {"F8_E4M3FNUZ", DType::kFloat8E4m3fnuz},
    {"F8_E5M2FNUZ", DType::kFloat8E5m2fnuz},
    {"F4", DType::kFloat4E2m1fnX2},
};

std::string label_of(std::string_view name) { return "tensor `" + excerpt(name) + "`"; }

DType parse_dtype(std::string_view text, std::string_view tensor) {
  for (const NamedDType& named : kNamedDTypes) {
    if (named.name == text) return named.dtype;
  }
  const std::string what = label_of(tensor) + " has dtype " + excerpt(text);
  if (text == "F6_E2M3" || text == "F6_E3M2")
    throw Error(Failure::kUnsupported, what + ", which torch has none for");
  throw Error(Failure::kVersion, what + ", unknown to this release");
}

// ---- Tensors ----

struct Extent {
  std::uint64_t begin;
  std::uint64_t end;
};

// What the header says of one tensor.
struct Entry {
  std::optional<DType> dtype;
  std::vector<std::int64_t> dims;  // the shape; later followed by the strides
  std::optional<Extent> extent;    // in the data
  bool has_shape = false;
};

// Two values to a byte: torch counts the bytes, along the last dimension.
void halve_last(std::vector<std::int64_t>& shape, std::string_view tensor) {
  if (shape.empty() || shape.back() % 2 != 0)
    reject(label_of(tensor) +
           " has dtype F4 and no even last size, as torch needs: it has two in a byte");
  shape.back() /= 2;
}

// Adds contiguous strides, as torch gives them, to the shape in `dims`; returns the bytes. The
// product of all sizes but those of 0 fits 63 bits, as the container wants it.
std::uint64_t add_strides(std::vector<std::int64_t>& dims, std::uint64_t item_bytes,
                          std::string_view tensor) {
  const std::size_t rank = dims.size();
  std::int64_t stride = 1;
  bool is_empty = false;
  dims.resize(2 * rank);
  for (std::size_t d = rank; d-- > 0;) {
    dims[rank + d] = stride;
    is_empty = is_empty || dims[d] == 0;
    if (__builtin_mul_overflow(stride, std::max<std::int64_t>(dims[d], 1), &stride))
      reject(label_of(tensor) + " has a shape of more elements than 63 bits can count");
  }
  std::int64_t bytes = 0;
  if (__builtin_mul_overflow(stride, static_cast<std::int64_t>(item_bytes), &bytes))
    reject(label_of(tensor) + " has a shape of more bytes than 63 bits can count");
  return is_empty ? 0 : static_cast<std::uint64_t>(bytes);
}

// ---- The header ----

// What fastsd itself keeps in `__metadata__` (docs/FORMAT.md, "Safetensors files").
constexpr std::string_view kTiedKey = "fastsd.tied";
constexpr std::string_view kOrderedKey = "fastsd.ordered";
constexpr std::string_view kStateMetadataKey = "fastsd.state_metadata";

// A name that was left out, and the one under which the same tensor is stored.
using Tie = std::pair<std::string, std::string>;

class HeaderParser {
 public:
  // REQUIRES: a zero byte at `end`.
  HeaderParser(const char* begin, const char* end, Tables& tables, std::vector<Extent>& extents)
      : begin_(begin), end_(end), at_(begin), tables_(tables), extents_(extents) {}

  // What the metadata say of names that were left out: an object of strings, as a text.
  const std::string& tied() const { return tied_; }

  // The pairs of such a text, instead of parse().
  std::vector<Tie> parse_ties() {
    std::vector<Tie> ties;
    expect('{', "expected an object");
    if (!skip('}')) {
      do {
        std::string name(parse_string(text_));
        expect(':', "expected a colon");
        ties.emplace_back(std::move(name), parse_string(text_));
      } while (skip(','));
      expect('}', "expected a comma or the end of the object");
    }
    at_ = skip_space(at_);
    if (at_ != end_) fail("expected nothing more");
    return ties;
  }

  void parse() {
    expect('{', "expected an object");
    if (!skip('}')) {
      do {
        parse_member();
      } while (skip(','));
      expect('}', "expected a comma or the end of the header");
    }
    at_ = skip_space(at_);
    if (at_ != end_) fail("expected nothing more");
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    reject("the header is wrong at byte " + number(std::uint64_t(at_ - begin_) + kLengthBytes) +
           " of the file" + (tensor_.data() == nullptr ? "" : ", in " + label_of(tensor_)) + ": " +
           what);
  }

  bool skip(char wanted) {
    at_ = skip_space(at_);
    if (*at_ != wanted) return false;
    ++at_;
    return true;
  }

  void expect(char wanted, const char* what) {
    if (!skip(wanted)) fail(what);
  }

  void parse_member() {
    const std::string_view name = parse_string(name_);
    expect(':', "expected a colon");
    if (name == "__metadata__") {
      parse_metadata();
    } else {
      if (name.size() > kNameBytesMax) {
        throw Error(Failure::kLimit, "the name of " + label_of(name) + " has " +
                                         number(name.size()) + " bytes, more than the limit of " +
                                         number(kNameBytesMax));
      }
      tensor_ = name;
      parse_tensor();
      tensor_ = {};
    }
  }

  // ---- Strings ----

  // The text of a string: in the header or, if it is not all plain, in `buffer`.
  std::string_view parse_string(std::string& buffer) {
    expect('"', "expected a string");
    const char* first = at_;
    at_ = skip_plain(at_);
    if (*at_ == '"') return {first, static_cast<std::size_t>(at_++ - first)};
    buffer.clear();
    const char* copied = first;  // what precedes it is in the buffer
    while (*at_ != '"') {
      if (static_cast<unsigned char>(*at_) < 0x20) fail("expected the end of the string");
      if (*at_ != '\\') {
        ++at_;
        continue;
      }
      buffer.append(copied, at_);
      std::uint32_t code = 0;
      if (const char* problem = parse_escape(at_, code)) fail(problem);
      if (is_high_surrogate(code) || is_low_surrogate(code)) fail("half a character, escaped");
      append_utf8(buffer, code);
      copied = at_;
    }
    buffer.append(copied, at_);
    if (!is_utf8(buffer)) fail("the string that ends here is not UTF-8");
    ++at_;
    return buffer;
  }

  void parse_metadata() {
    if (has_metadata_) fail("__metadata__ occurs twice");
    has_metadata_ = true;
    at_ = skip_space(at_);
    if (*at_ == 'n') {
      skip_word("null");
      return;
    }
    const char* first = at_;
    expect('{', "expected __metadata__ to be an object");
    std::vector<std::string> names;
    if (!skip('}')) {
      do {
        names.emplace_back(parse_string(text_));
        expect(':', "expected a colon");
        take_own(names.back(), parse_string(text_));
      } while (skip(','));
      expect('}', "expected a comma or the end of __metadata__, which maps strings to strings");
    }
    if (find_repeated(names.size(), [&](std::size_t i) { return std::string_view(names[i]); }))
      fail("a name occurs twice in the __metadata__ that ends here");
    tables_.sections.emplace_back(Section::kMetadata, std::string(first, at_));
  }

  void take_own(std::string_view key, std::string_view value) {
    if (key == kTiedKey) tied_ = value;
    if (key == kOrderedKey) tables_.flags |= kFileRootIsOrderedDict;
    if (key == kStateMetadataKey)
      tables_.sections.emplace_back(Section::kStateMetadata, std::string(value));
  }

  // ---- Tensors ----

  void parse_tensor() {
    entry_.dtype.reset();
    entry_.dims.clear();
    entry_.extent.reset();
    entry_.has_shape = false;
    expect('{', "expected an object");
    if (!skip('}')) {
      do {
        const std::string_view name = parse_string(text_);
        expect(':', "expected a colon");
        parse_field(name);
      } while (skip(','));
      expect('}', "expected a comma or the end of the object");
    }
    if (!entry_.dtype || !entry_.has_shape || !entry_.extent)
      fail("expected dtype, shape and data_offsets before the end of the object");
    add_tensor();
  }

  void parse_field(std::string_view name) {
    if (name == "dtype") {
      if (entry_.dtype) fail("dtype occurs twice");
      entry_.dtype = parse_dtype(parse_string(text_), tensor_);
    } else if (name == "shape") {
      if (entry_.has_shape) fail("shape occurs twice");
      entry_.has_shape = true;
      parse_shape();
    } else if (name == "data_offsets") {
      if (entry_.extent) fail("data_offsets occur twice");
      expect('[', "expected data_offsets to be an array");
      const std::uint64_t begin = parse_unsigned();
      expect(',', "expected two data_offsets");
      const std::uint64_t end = parse_unsigned();
      expect(']', "expected two data_offsets");
      entry_.extent = Extent{begin, end};
    } else {
      skip_value(0);
    }
  }

  void parse_shape() {
    expect('[', "expected the shape to be an array");
    if (skip(']')) return;
    do {
      const std::uint64_t size = parse_unsigned();
      if (size > INT64_MAX) fail("a size is too large");
      if (entry_.dims.size() == kRankMax) {
        throw Error(Failure::kLimit, label_of(tensor_) + " has more than " + number(kRankMax) +
                                         " dimensions, the container's limit");
      }
      entry_.dims.push_back(static_cast<std::int64_t>(size));
    } while (skip(','));
    expect(']', "expected a comma or the end of the shape");
  }

  void add_tensor() {
    const DTypeInfo& dtype = *find_dtype(std::uint16_t(*entry_.dtype));
    const auto rank = static_cast<std::uint32_t>(entry_.dims.size());
    const Extent& extent = *entry_.extent;
    if (dtype.dtype == DType::kFloat4E2m1fnX2) halve_last(entry_.dims, tensor_);
    const std::uint64_t bytes = add_strides(entry_.dims, dtype.item_bytes, tensor_);
    if (extent.end < extent.begin || extent.end - extent.begin != bytes) {
      reject(label_of(tensor_) + " needs " + number(bytes) + " bytes and has data_offsets " +
             number(extent.begin) + " and " + number(extent.end));
    }
    tables_.add_tensor(tensor_, std::uint16_t(dtype.dtype), rank, entry_.dims.data(), 0, 0);
    extents_.push_back(extent);
  }

  // ---- Other values ----

  std::uint64_t parse_unsigned() {
    at_ = skip_space(at_);
    const char* first = at_;
    std::uint64_t value = 0;
    for (; is_digit(*at_); ++at_) {
      if (__builtin_mul_overflow(value, std::uint64_t{10}, &value) ||
          __builtin_add_overflow(value, static_cast<std::uint64_t>(*at_ - '0'), &value))
        fail("a number of more than 64 bits");
    }
    const bool is_number = at_ != first && (*first != '0' || at_ - first == 1);
    if (!is_number || *at_ == '.' || *at_ == 'e' || *at_ == 'E') fail("expected a whole number");
    return value;
  }

  void skip_word(std::string_view word) {
    if (std::string_view(at_, static_cast<std::size_t>(end_ - at_)).substr(0, word.size()) != word)
      fail("expected a value");
    at_ += word.size();
  }

  void skip_value(int depth) {
    at_ = skip_space(at_);
    bool is_whole = false;
    switch (*at_) {
      case '"':
        parse_string(text_);
        break;
      case '{':
      case '[':
        skip_container(depth);
        break;
      case 'n':
        skip_word("null");
        break;
      case 't':
        skip_word("true");
        break;
      case 'f':
        skip_word("false");
        break;
      default:
        if (const char* problem = skip_number(at_, is_whole)) fail(problem);
    }
  }

  void skip_container(int depth) {
    if (depth == kDepthMax) fail("nested too deeply");
    const bool is_object = *at_++ == '{';
    const char close = is_object ? '}' : ']';
    if (skip(close)) return;
    do {
      if (is_object) {
        parse_string(text_);
        expect(':', "expected a colon");
      }
      skip_value(depth + 1);
    } while (skip(','));
    expect(close, "expected a comma or the end of the value");
  }

  const char* begin_;
  const char* end_;
  const char* at_;
  Tables& tables_;
  std::vector<Extent>& extents_;  // of each tensor
  bool has_metadata_ = false;
  std::string tied_;
  std::string_view tensor_;  // the name of the one that is being read; null: none is
  Entry entry_;
  std::string name_;
  std::string text_;
};

// ---- Places ----

// Gives each tensor a storage, in the order of the file, where nothing is left out or used twice.
// Returns where the last one ends. Those without bytes come before those that start where they are.
std::uint64_t place_tensors(Tables& tables, const std::vector<Extent>& extents,
                            std::uint64_t data_begin) {
  std::vector<std::uint32_t> order(extents.size());
  std::iota(order.begin(), order.end(), 0);
  const auto is_before = [&](std::uint32_t a, std::uint32_t b) {
    return std::tuple(extents[a].begin, extents[a].end, a) <
           std::tuple(extents[b].begin, extents[b].end, b);
  };
  if (!std::is_sorted(order.begin(), order.end(), is_before))
    std::sort(order.begin(), order.end(), is_before);
  std::uint64_t end = 0;
  tables.storages.reserve(order.size());
  for (const std::uint32_t i : order) {
    const Extent& extent = extents[i];
    if (extent.begin != end) {
      reject(label_of(tables.index().name(tables.tensors[i])) + " has data_offsets " +
             number(extent.begin) + " and " + number(extent.end) + ", " +
             (extent.begin > end ? "which leaves a hole behind " : "but bytes are in use up to ") +
             number(end));
    }
    end = extent.end;
    tables.tensors[i].storage = static_cast<std::uint32_t>(tables.storages.size());
    tables.storages.push_back({data_begin + extent.begin, extent.end - extent.begin, 0, 0, 0, 0});
  }
  return end;
}

std::vector<Tie> parse_ties(Tables& tables, const std::string& text) {
  std::vector<Extent> none;
  try {
    return HeaderParser(text.data(), text.data() + text.size(), tables, none).parse_ties();
  } catch (const Error&) {
    reject("the metadata " + std::string(kTiedKey) + " are no JSON object of strings");
  }
}

// Adds the names that were left out, behind the others.
void add_tied(Tables& tables, const std::string& text) {
  std::unordered_map<std::string, std::uint32_t> numbers;
  for (std::uint32_t i = 0; i < tables.tensors.size(); ++i)
    numbers.emplace(tables.index().name(tables.tensors[i]), i);
  for (const auto& [name, kept] : parse_ties(tables, text)) {
    const auto found = numbers.find(kept);
    if (found == numbers.end() || numbers.count(name) != 0 || name.size() > kNameBytesMax) {
      reject("the metadata " + std::string(kTiedKey) + " tie " + label_of(name) + " to " +
             label_of(kept) + ", which cannot be");
    }
    TensorRecord tied = tables.tensors[found->second];
    tied.name_offset = tables.names.size();
    tied.name_bytes = static_cast<std::uint32_t>(name.size());
    tables.names += name;
    tables.tensors.push_back(tied);
  }
}

// The size of the header, checked as far as it can be without reading it.
std::uint64_t read_length(const File& file) {
  if (file.bytes() < kLengthBytes) {
    throw Error(Failure::kTruncated, "the file has " + number(file.bytes()) +
                                         " bytes, fewer than the 8 of the header's size");
  }
  std::uint64_t length = 0;
  file.read_at(&length, kLengthBytes, 0);
  if (length > kSafetensorsHeaderBytesMax) {
    throw Error(Failure::kLimit, "the header's size is given as " + number(length) +
                                     " bytes, more than safetensors' limit of " +
                                     number(kSafetensorsHeaderBytesMax));
  }
  if (length > file.bytes() - kLengthBytes) {
    throw Error(Failure::kTruncated, "the file has " + number(file.bytes()) +
                                         " bytes; with its header of " + number(length) +
                                         " it would have " + number(kLengthBytes + length));
  }
  return length;
}

}  // namespace

Tables read_safetensors(const File& file) {
  const std::uint64_t length = read_length(file);
  // Not value-initialized: each byte is overwritten at once.
  const std::unique_ptr<char[]> header(new char[length + 1]);
  file.read_at(header.get(), length, kLengthBytes);
  header[length] = '\0';
  if (header[0] != '{') reject("byte 8 of the file is not `{`, with which a header begins");

  Tables tables;
  tables.file_bytes = file.bytes();
  std::vector<Extent> extents;
  HeaderParser parser(header.get(), header.get() + length, tables, extents);
  parser.parse();
  check_names_unique(tables.index());
  const std::uint64_t data_begin = kLengthBytes + length;
  const std::uint64_t data_bytes = file.bytes() - data_begin;
  const std::uint64_t end = place_tensors(tables, extents, data_begin);
  if (end != data_bytes) {
    throw Error(end > data_bytes ? Failure::kTruncated : Failure::kFormat,
                "the file has " + number(file.bytes()) + " bytes, " + number(data_bytes) +
                    " behind its header, which accounts for " + number(end));
  }
  if (!parser.tied().empty()) {
    add_tied(tables, parser.tied());
    check_names_unique(tables.index());
  }
  return tables;
}

}  // namespace fastsd
