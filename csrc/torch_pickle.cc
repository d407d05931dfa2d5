#include "torch_pickle.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <utility>

#include "dtype.h"
#include "json_writer.h"
#include "pickle_graph.h"
#include "pickle_machine.h"
#include "strided.h"

namespace fastsd {
namespace {

constexpr std::uint32_t kDepthMax = 250;            // of containers, as save() has it
constexpr std::size_t kNameCharactersMax = 10'000;  // of nested tensors, likewise

// What is shared in a stream may be written often. A stream that makes more of it than this is left
// to torch, or gives nothing.
constexpr std::uint64_t kGrowthMax = 16;
constexpr std::uint64_t kGrowthFree = 1U << 20U;

constexpr std::int64_t kJsonIntMax = (std::int64_t{1} << 53U) - 1;

constexpr std::string_view kMetadata = "_metadata";

// Attributes that are not an OrderedDict's own: what its class has may not be set.
constexpr std::array<std::string_view, 12> kOrderedDictMembers = {
    "clear",       "copy", "fromkeys", "get",        "items",  "keys",
    "move_to_end", "pop",  "popitem",  "setdefault", "update", "values"};

// Texts that differ, by number. Open addressing; texts made to collide are given up.
class Texts {
 public:
  // Makes room for so many, and forgets those that are there.
  void reset(std::size_t count) {
    std::size_t slots = 16;
    while (slots < 2 * count) slots *= 2;
    slots_.assign(slots, 0);
    count_ = 0;
  }

  // The number of the same text, if it is there; else adds it and returns `number`. Nothing: too
  // many collide. `text_of` gives the text of a number that has been added.
  template <class TextOf>
  std::optional<std::uint32_t> find_or_add(std::uint32_t number, std::string_view text,
                                           const TextOf& text_of) {
    if (2 * (count_ + 1) > slots_.size()) grow(text_of);
    const std::optional<std::size_t> slot = find(text, text_of);
    if (!slot) return std::nullopt;
    if (slots_[*slot] != 0) return slots_[*slot] - 1;
    slots_[*slot] = number + 1;
    ++count_;
    return number;
  }

 private:
  static constexpr std::size_t kProbesMax = 256;

  template <class TextOf>
  std::optional<std::size_t> find(std::string_view text, const TextOf& text_of) const {
    std::size_t slot = std::hash<std::string_view>{}(text) & (slots_.size() - 1);
    for (std::size_t probes = 0; probes < kProbesMax; ++probes) {
      if (slots_[slot] == 0 || text_of(slots_[slot] - 1) == text) return slot;
      slot = (slot + 1) & (slots_.size() - 1);
    }
    return std::nullopt;
  }

  template <class TextOf>
  void grow(const TextOf& text_of) {
    std::vector<std::uint32_t> old(std::max<std::size_t>(2 * slots_.size(), 64));
    old.swap(slots_);
    for (const std::uint32_t entry : old) {
      if (entry == 0) continue;
      const std::optional<std::size_t> slot = find(text_of(entry - 1), text_of);
      if (slot) slots_[*slot] = entry;
    }
  }

  std::vector<std::uint32_t> slots_;  // 1 + number; 0: free
  std::size_t count_ = 0;
};

struct Item {
  Value key;
  Value value;
};

// Where a container lies in the JSON text, and under which number it is referred to.
struct Place {
  std::size_t begin = 0;
  std::size_t end = 0;
  std::uint32_t mark = kNoNumber;
};

// Surrogates as Python's "backslashreplace" writes them.
std::string replace_surrogates(std::string_view text) {
  constexpr std::string_view digits = "0123456789abcdef";
  std::string replaced;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const auto byte = [&](std::size_t j) { return static_cast<unsigned char>(text[j]); };
    if (byte(i) != 0xED || byte(i + 1) < 0xA0) {
      replaced += text[i];
      continue;
    }
    const unsigned code = 0xD000U | (byte(i + 1) & 0x3FU) << 6U | (byte(i + 2) & 0x3FU);
    replaced += "\\u";
    for (unsigned shift = 16; shift > 0; shift -= 4) replaced += digits[code >> (shift - 4) & 15U];
    i += 2;
  }
  return replaced;
}

// The first characters of a text. REQUIRES: UTF-8, perhaps with surrogates.
std::string_view first_characters(std::string_view text, std::size_t count) {
  if (text.size() <= count) return text;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const bool begins = (static_cast<unsigned char>(text[i]) & 0xC0U) != 0x80U;
    if (begins && count-- == 0) return text.substr(0, i);
  }
  return text;
}

std::string decode_latin1(std::string_view text) {
  std::string bytes;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    bytes += byte < 0x80 ? text[i]
                         : static_cast<char>((byte & 3U) << 6U |
                                             (static_cast<unsigned char>(text[++i]) & 0x3FU));
  }
  return bytes;
}

// One walk over a graph, each container once: the keys that lead to tensors make their names, and
// all of it the JSON text as long as it is plain.
class Walk {
 public:
  Walk(Graph&& graph, PickledObject& object)
      : graph_(std::move(graph)),
        object_(object),
        tables_(object.tables),
        has_text_(graph_.has_tree),
        text_max_(kGrowthMax * graph_.stream.size() + kGrowthFree) {
    set_storages();
  }

  void run() {
    if (!write_flat()) write_tree();
    if (is_over_limit_) {
      tables_.tensors.clear();
      tables_.dims.clear();
      tables_.names.clear();
      has_text_ = false;
    }
    object_.is_plain = has_text_ && !has_opaque_ && graph_.is_plain;
    if (!has_text_) {
      tables_.flags = 0;
      tables_.sections.clear();
    }
  }

 private:
  // ---- Storages and tensors ----

  void set_storages() {
    given_storages_ = static_cast<std::uint32_t>(tables_.storages.size());
    const auto device_number = [&](const std::string& name) {
      const auto found = std::find(tables_.devices.begin(), tables_.devices.end(), name);
      const auto number = static_cast<std::uint16_t>(found - tables_.devices.begin());
      if (found == tables_.devices.end()) tables_.devices.push_back(name);
      return number;
    };
    std::vector<std::uint16_t> numbers;
    numbers.reserve(graph_.devices.size());
    for (const std::string& name : graph_.devices) numbers.push_back(device_number(name));
    std::uint64_t end = 0;
    for (std::size_t i = 0; i < tables_.storages.size(); ++i) {
      StorageRecord& storage = tables_.storages[i];
      const std::uint16_t device = graph_.storage_devices[i];
      storage.device = device == UINT16_MAX ? 0 : numbers[device];
      end = std::max(end, storage.offset + stored_bytes(storage));
    }
    for (const std::uint64_t bytes : graph_.meta_storages) {
      tables_.storages.push_back({end, bytes, 0, device_number("meta"), kStorageHasNoData, 0});
    }
  }

  // Adds a tensor under a name that no other has.
  std::uint32_t add_record(TensorView& view, std::string_view name) {
    std::array<std::int64_t, std::size_t{2} * kRankMax> dims{};
    const Value* shape = graph_.begin(graph_.containers[view.shape]);
    const Value* stride = graph_.begin(graph_.containers[view.stride]);
    for (std::uint32_t d = 0; d < view.rank; ++d) {
      dims[d] = static_cast<std::int64_t>(shape[d].number);
      dims[view.rank + d] = static_cast<std::int64_t>(stride[d].number);
    }
    spend(name.size() + 16 * std::uint64_t{view.rank});
    is_over_limit_ |= tables_.tensors.size() == kTensorCountMax;
    const std::uint32_t storage =
        view.storage == kNoNumber ? given_storages_ + view.meta_storage : view.storage;
    const std::uint32_t number =
        tables_.add_tensor(name, view.dtype, view.rank, dims.data(), storage, view.storage_offset);
    if (view.record == kNoNumber) view.record = number;
    tables_.tensors[number].same_as = view.record;
    tables_.tensors[number].flags = view.flags;
    return number;
  }

  std::uint32_t add_named(TensorView& view) {
    std::string name(first_characters(path_, kNameCharactersMax));
    if (has_surrogates_) name = replace_surrogates(name);
    if (name.empty()) name = "tensor";
    const auto name_of = [&](std::uint32_t i) {
      return std::string_view(tables_.names)
          .substr(tables_.tensors[i].name_offset, tables_.tensors[i].name_bytes);
    };
    const auto number = static_cast<std::uint32_t>(tables_.tensors.size());
    name_counts_.push_back(1);
    const std::optional<std::uint32_t> first = names_.find_or_add(number, name, name_of);
    std::optional<std::uint32_t> same = first;
    const std::size_t length = name.size();
    while (same && *same != number) {
      name.resize(length);
      name += '#' + std::to_string(++name_counts_[*first]);
      same = names_.find_or_add(number, name, name_of);
    }
    is_over_limit_ |= !same;
    return add_record(view, name);
  }

  // ---- The root ----

  // A dictionary of strings to tensors needs no tree. False: it is none.
  bool write_flat() {
    const bool is_ordered = graph_.root.kind == Kind::kOrderedDict;
    if (!has_text_ || (graph_.root.kind != Kind::kDict && !is_ordered)) return false;
    const Container& dict = graph_.container(graph_.root);
    bool is_flat = collect(dict);
    for (const Item& item : items_) {
      is_flat = is_flat && item.value.kind == Kind::kTensor && item.key.bytes <= kNameBytesMax &&
                !graph_.tensors[item.value.number].is_opaque;
    }
    if (!is_flat || !has_text_ || !write_state_metadata(dict)) {
      start_again();
      return false;
    }
    tables_.tensors.reserve(items_.size());
    for (const Item& item : items_) {
      if (is_over_limit_) break;
      add_record(graph_.tensors[item.value.number], graph_.text(item.key));
    }
    if (is_ordered) tables_.flags = kFileRootIsOrderedDict;
    if (!json_.empty()) tables_.sections.emplace_back(Section::kStateMetadata, std::move(json_));
    return true;
  }

  // The attributes of a flat dictionary; false: there are others than a regular `_metadata`. They
  // have no tensors, as none has been added yet.
  bool write_state_metadata(const Container& dict) {
    if (dict.attributes == 0) return true;
    const std::size_t first = items_.size();
    const bool is_text = collect(graph_.containers[dict.attributes]);
    if (items_.size() == first) return true;
    const Item only = items_[first];
    const bool is_one = is_text && items_.size() == first + 1;
    items_.resize(first);
    if (!is_one || graph_.text(only.key) != kMetadata || only.value.kind != Kind::kOrderedDict)
      return false;
    const Container& metadata = graph_.container(only.value);
    if (metadata.attributes != 0) return false;
    write_items(metadata, "");
    return has_text_ && json_[0] == '{' && marks_.empty() && tables_.tensors.empty();
  }

  void start_again() {
    for (Container& container : graph_.containers) container.is_seen = false;
    tables_.tensors.clear();
    tables_.dims.clear();
    tables_.names.clear();
    for (TensorView& view : graph_.tensors) view.record = kNoNumber;
    names_.reset(0);
    name_counts_.clear();
    items_.clear();
    json_.clear();
    marks_.clear();
    has_text_ = graph_.has_tree;
    has_opaque_ = false;
  }

  void write_tree() {
    write(graph_.root);
    if (!has_text_) return;
    tables_.sections.emplace_back(Section::kTree, insert_definitions());
  }

  // The text with `$def` around what is referred to.
  std::string insert_definitions() {
    if (marks_.empty()) return std::move(json_);
    std::vector<std::pair<std::size_t, std::string>> insertions;
    for (const std::uint32_t number : marks_) {
      const Place& place = places_[number];
      insertions.emplace_back(place.begin, "{\"$def\":[" + std::to_string(place.mark) + ",");
      insertions.emplace_back(place.end, "]}");
    }
    std::sort(insertions.begin(), insertions.end());
    std::string text;
    std::size_t copied = 0;
    for (const auto& [at, inserted] : insertions) {
      text.append(json_, copied, at - copied);
      text += inserted;
      copied = at;
    }
    text.append(json_, copied);
    return text;
  }

  // ---- Limits ----

  void give_up_text() {
    has_text_ = false;
    json_.clear();
    json_.shrink_to_fit();
  }

  // Names, and the ways to them, are as bounded as the JSON text.
  void spend(std::uint64_t bytes) {
    is_over_limit_ |= bytes > text_max_ - spent_;
    if (!is_over_limit_) spent_ += bytes;
  }

  void put(std::string_view text) {
    if (has_text_) json_ += text;
  }

  // ---- Values ----

  void write(const Value& value) {
    if (has_text_ && json_.size() > text_max_) give_up_text();
    // No tensor in a key has a name, and what is shared in one is followed each time.
    if (is_over_limit_ || (is_in_key_ && !has_text_)) return;
    if (value.kind >= Kind::kTuple && value.kind <= Kind::kByteArray) {
      write_container(value);
    } else if (value.kind == Kind::kTensor) {
      write_tensor(graph_.tensors[value.number]);
    } else if (value.kind > Kind::kTensor) {
      write_opaque();
    } else if (has_text_) {
      write_scalar(value);
    }
  }

  void write_tensor(TensorView& view) {
    if (is_in_key_ || view.is_opaque) {
      write_opaque();
      return;
    }
    const std::uint32_t number = add_named(view);
    put("{\"$tensor\":");
    put(std::to_string(number));
    put("}");
  }

  // What nobody but an unpickler knows. Keys cannot be told from one another then.
  void write_opaque() {
    has_opaque_ = true;
    if (is_in_key_) give_up_text();
    put("{\"$opaque\":null}");
  }

  void write_scalar(const Value& value) {
    switch (value.kind) {
      case Kind::kNone:
        json_ += "null";
        break;
      case Kind::kBool:
        json_ += value.number != 0 ? "true" : "false";
        break;
      case Kind::kInt:
        write_int(static_cast<std::int64_t>(value.number));
        break;
      case Kind::kBigInt:
        write_big_int(graph_.text(value));
        break;
      case Kind::kFloat:
        write_float(to_float(value));
        break;
      case Kind::kStr:
        write_str(value);
        break;
      case Kind::kBytes:
      case Kind::kLatin1:
        write_base64("$bytes", bytes_of(value));
        break;
      case Kind::kDType:
        write_named("$dtype", graph_.text(value));
        break;
      case Kind::kLayout:
        write_named("$layout", graph_.text(value).substr(std::string_view("torch.").size()));
        break;
      case Kind::kDevice:
        write_named("$device", device_name(value));
        break;
      default:
        write_numbers(value);
    }
  }

  void write_int(std::int64_t number) {
    if (number >= -kJsonIntMax && number <= kJsonIntMax) {
      json_ += std::to_string(number);
    } else {
      write_big_int({reinterpret_cast<const char*>(&number), sizeof number});
    }
  }

  void write_big_int(std::string_view bytes) {
    json_ += "{\"$int\":\"";
    append_hex_int(json_, bytes);
    json_ += "\"}";
  }

  void write_float(double number) {
    if (std::isfinite(number)) {
      append_json_float(json_, number);
      return;
    }
    json_ += "{\"$float\":\"";
    append_float_bits(json_, number);
    json_ += "\"}";
  }

  void write_str(const Value& value) {
    if (value.has_surrogates) {
      write_base64("$str", graph_.text(value));
    } else {
      append_json_string(json_, graph_.text(value));
    }
  }

  void write_base64(std::string_view name, std::string_view bytes) {
    put("{\"");
    put(name);
    put("\":\"");
    if (has_text_) append_base64(json_, bytes);
    put("\"}");
  }

  void write_named(std::string_view name, std::string_view text) {
    json_ += "{\"";
    json_ += name;
    json_ += "\":";
    append_json_string(json_, text);
    json_ += '}';
  }

  // A complex or a torch.Size.
  void write_numbers(const Value& value) {
    const Container& numbers = graph_.container(value);
    const bool is_complex = value.kind == Kind::kComplex;
    json_ += is_complex ? "{\"$complex\":[" : "{\"$Size\":[";
    for (const Value* number = graph_.begin(numbers); number != graph_.end(numbers); ++number) {
      if (number != graph_.begin(numbers)) json_ += ',';
      if (is_complex) {
        json_ += '"';
        append_float_bits(json_, to_float(*number));
        json_ += '"';
      } else {
        json_ += std::to_string(number->number);
      }
    }
    json_ += "]}";
  }

  std::string bytes_of(const Value& value) const {
    const std::string_view text = graph_.text(value);
    return value.kind == Kind::kLatin1 ? decode_latin1(text) : std::string(text);
  }

  std::string device_name(const Value& value) const {
    std::string name(graph_.text(value));
    if (value.detail != 0) name += ':' + std::to_string(value.detail - 1);
    return name;
  }

  // ---- Containers ----

  void write_container(const Value& value) {
    Container& container = graph_.containers[value.number];
    const bool is_hashable = value.kind == Kind::kTuple || value.kind == Kind::kFrozenSet;
    if (container.is_open || depth_ == kDepthMax || (is_in_key_ && !is_hashable)) {
      give_up_text();
      return;
    }
    // Nothing in a key is shared with the rest; and an empty tuple is the same one everywhere.
    const bool may_be_shared = !is_in_key_ && (value.kind != Kind::kTuple || container.count != 0);
    if (may_be_shared && container.is_seen) {
      write_reference(container);
      return;
    }
    const std::size_t begin = json_.size();
    container.is_open = container.is_seen = true;
    ++depth_;
    write_content(value, container);
    --depth_;
    container.is_open = false;
    if (!may_be_shared) {
      container.is_seen = false;
    } else if (has_text_) {
      container.place = static_cast<std::uint32_t>(places_.size());
      places_.push_back({begin, json_.size()});
    }
  }

  void write_reference(const Container& container) {
    if (!has_text_) return;
    Place& place = places_[container.place];
    if (place.mark == kNoNumber) {
      place.mark = static_cast<std::uint32_t>(marks_.size());
      marks_.push_back(container.place);
    }
    json_ += "{\"$ref\":" + std::to_string(place.mark) + "}";
  }

  void write_content(const Value& value, const Container& container) {
    switch (value.kind) {
      case Kind::kTuple:
        put("{\"$tuple\":");
        write_list(container);
        put("}");
        break;
      case Kind::kList:
        write_list(container);
        break;
      case Kind::kDict:
        write_items(container, "{\"$dict\":");
        break;
      case Kind::kOrderedDict:
        write_ordered_dict(container);
        break;
      case Kind::kSet:
      case Kind::kFrozenSet:
        write_set(container, value.kind == Kind::kSet ? "{\"$set\":[" : "{\"$frozenset\":[");
        break;
      default:
        if (!has_text_) break;
        write_base64("$bytearray",
                     container.count == 0 ? std::string() : bytes_of(*graph_.begin(container)));
    }
  }

  void write_list(const Container& container) {
    put("[");
    for (std::uint32_t i = 0; i < container.count; ++i) {
      if (i > 0) put(",");
      const Value& value = graph_.begin(container)[i];
      write_below({Kind::kInt, false, 0, 0, i}, value);
    }
    put("]");
  }

  void write_ordered_dict(const Container& container) {
    const bool has_attributes =
        container.attributes != 0 && graph_.containers[container.attributes].count != 0;
    if (has_attributes) put("{\"$attributes\":[");
    put("{\"$OrderedDict\":");
    write_items(container, "");
    put("}");
    if (!has_attributes) return;
    put(",");
    const Container& attributes = graph_.containers[container.attributes];
    check_attributes(attributes);
    write_items(attributes, "");
    put("]}");
  }

  // An OrderedDict's own attributes have names that its class does not.
  void check_attributes(const Container& attributes) {
    for (std::uint32_t i = 0; i < attributes.count; i += 2) {
      const Value& name = graph_.begin(attributes)[i];
      const std::string_view text = name.kind == Kind::kStr ? graph_.text(name) : "__";
      const auto& members = kOrderedDictMembers;
      if (text.substr(0, 2) == "__" ||
          std::find(members.begin(), members.end(), text) != members.end()) {
        give_up_text();
      }
    }
  }

  // An object where that is unambiguous, else pairs, after `before_pairs` and with what closes it.
  void write_items(const Container& container, std::string_view before_pairs) {
    const std::size_t first = items_.size();
    const bool is_text = collect(container);
    const std::size_t end = items_.size();
    const bool is_special =
        end == first + 1 && is_text && graph_.text(items_[first].key).substr(0, 1) == "$";
    const bool is_object = is_text && !is_special;
    put(is_object ? "{" : before_pairs);
    if (!is_object) put("[");
    for (std::size_t i = first; i < end; ++i) {
      const Item item = items_[i];
      if (i > first) put(",");
      if (!is_object) put("[");
      write_key(item.key);
      put(is_object ? ":" : ",");
      write_below(item.key, item.value);
      if (!is_object) put("]");
    }
    put(is_object ? "}" : "]");
    if (!is_object && !before_pairs.empty()) put("}");
    items_.resize(first);
  }

  void write_key(const Value& key) {
    if (!has_text_) return;
    const bool was_in_key = std::exchange(is_in_key_, true);
    write(key);
    is_in_key_ = was_in_key;
  }

  // A value that a key leads to.
  void write_below(const Value& key, const Value& value) {
    if (value.kind < Kind::kTuple || is_in_key_) {
      write(value);
      return;
    }
    const std::size_t length = path_.size();
    const bool had_surrogates = has_surrogates_;
    if (length != 0) path_ += '.';
    append_to_path(key);
    spend(path_.size() - length);
    write(value);
    path_.resize(length);
    has_surrogates_ = had_surrogates;
  }

  // A key as Python's str() has it or, for rare ones, as JSON has it.
  void append_to_path(const Value& key) {
    switch (key.kind) {
      case Kind::kStr:
        path_ += graph_.text(key);
        has_surrogates_ |= key.has_surrogates;
        break;
      case Kind::kInt:
        path_ += std::to_string(static_cast<std::int64_t>(key.number));
        break;
      case Kind::kBool:
        path_ += key.number != 0 ? "True" : "False";
        break;
      case Kind::kNone:
        path_ += "None";
        break;
      default:
        if (!has_text_) break;
        const std::size_t begin = json_.size();
        write_key(key);
        if (!has_text_) break;
        path_.append(json_, begin);
        json_.resize(begin);
    }
  }

  // Sorted by their texts.
  void write_set(const Container& container, std::string_view opening) {
    if (!has_text_) return;
    const std::size_t first = items_.size();
    for (std::uint32_t i = 0; i < container.count; ++i)
      items_.push_back({graph_.begin(container)[i], {}});
    drop_repeated(first);
    std::vector<std::string> texts;
    const std::size_t begin = json_.size();
    for (std::size_t i = first; i < items_.size() && has_text_; ++i) {
      write_key(items_[i].key);
      if (!has_text_) break;
      texts.emplace_back(json_, begin);
      json_.resize(begin);
      spend(texts.back().size());
    }
    items_.resize(first);
    std::sort(texts.begin(), texts.end());
    put(opening);
    for (std::size_t i = 0; i < texts.size(); ++i) {
      if (i > 0) put(",");
      put(texts[i]);
    }
    put("]}");
  }

  // ---- Keys that are equal ----

  // Adds the items of a dictionary to items_, each key once, with the last of its values. Returns
  // whether all keys are texts that JSON can hold.
  bool collect(const Container& container) {
    const std::size_t first = items_.size();
    bool is_text = true;
    for (std::uint32_t i = 0; i + 1 < container.count; i += 2) {
      const Value* item = graph_.begin(container) + i;
      is_text = is_text && item[0].kind == Kind::kStr && !item[0].has_surrogates;
      items_.push_back({item[0], item[1]});
    }
    drop_repeated(first);
    return is_text;
  }

  // Of the items from `first` on.
  void drop_repeated(std::size_t first) {
    const std::size_t count = items_.size() - first;
    if (count < 2) return;
    const bool is_text =
        std::all_of(items_.begin() + static_cast<std::ptrdiff_t>(first), items_.end(),
                    [](const Item& item) { return item.key.kind == Kind::kStr; });
    key_text_.clear();
    key_ends_.assign(1, 0);
    for (std::size_t i = first; !is_text && i < items_.size(); ++i) {
      append_key_text(items_[i].key, 0);
      key_ends_.push_back(key_text_.size());
    }
    const auto key_text = [&](std::size_t i) {  // of an item that has not been moved
      if (is_text) return graph_.text(items_[first + i].key);
      return std::string_view(key_text_).substr(key_ends_[i], key_ends_[i + 1] - key_ends_[i]);
    };
    keys_.reset(count);
    kept_.clear();
    const auto kept_text = [&](std::uint32_t i) { return key_text(kept_[i]); };
    for (std::uint32_t i = 0; i < count; ++i) {
      const auto next = static_cast<std::uint32_t>(kept_.size());
      if (is_text) spend(key_text(i).size());
      if (is_over_limit_) break;
      const std::optional<std::uint32_t> found = keys_.find_or_add(next, key_text(i), kept_text);
      is_over_limit_ |= !found;
      if (!found || *found == next) {
        kept_.push_back(i);
      } else {
        replace_value(items_[first + kept_[*found]], items_[first + i]);
      }
    }
    for (std::size_t i = 0; i < kept_.size(); ++i) items_[first + i] = items_[first + kept_[i]];
    items_.resize(first + kept_.size());
  }

  // Equal keys of other types than these are rare, and not always the same.
  void replace_value(Item& item, const Item& later) {
    const bool is_same = item.key.kind == later.key.kind &&
                         (item.key.kind == Kind::kStr || item.key.kind == Kind::kInt);
    if (!is_same) give_up_text();
    item.value = later.value;
  }

  // A text that equal keys have in common, whatever their types.
  void append_key_text(const Value& key, std::uint32_t depth) {
    if (is_over_limit_) return;
    const std::size_t begin = key_text_.size();
    switch (key.kind) {
      case Kind::kNone:
        key_text_ += "None";
        break;
      case Kind::kBool:
      case Kind::kInt:
        key_text_ += std::to_string(static_cast<std::int64_t>(key.number)) + ';';
        break;
      case Kind::kBigInt:
        append_counted('I', graph_.text(key));
        break;
      case Kind::kFloat:
        append_key_float(to_float(key));
        break;
      case Kind::kStr:
        append_counted('s', graph_.text(key));
        break;
      case Kind::kBytes:
      case Kind::kLatin1:
        append_counted('b', bytes_of(key));
        break;
      case Kind::kDType:
        append_counted('d', graph_.text(key));
        break;
      case Kind::kLayout:
        append_counted('l', graph_.text(key));
        break;
      case Kind::kDevice:
        append_counted('D', device_name(key));
        break;
      default:
        append_key_container(key, depth);
    }
    spend(key_text_.size() - std::min(begin, key_text_.size()));
  }

  void append_counted(char kind, std::string_view text) {
    key_text_ += kind + std::to_string(text.size()) + ':';
    key_text_ += text;
  }

  void append_key_float(double number) {
    constexpr double limit = 9.2e18;  // of 64 bits
    if (std::trunc(number) != number) {
      append_float_bits(key_text_ += 'f', number);
    } else if (number > -limit && number < limit) {
      key_text_ += std::to_string(static_cast<std::int64_t>(number)) + ';';
    } else {
      give_up_text();  // infinite, or perhaps equal to some large int
    }
  }

  void append_key_container(const Value& key, std::uint32_t depth) {
    if (depth == kDepthMax || key.kind < Kind::kComplex || key.kind > Kind::kFrozenSet) {
      give_up_text();
      return;
    }
    const Container& container = graph_.container(key);
    const Value* values = graph_.begin(container);
    switch (key.kind) {
      case Kind::kComplex:
        if (to_float(values[1]) != 0) key_text_ += 'c';
        append_key_float(to_float(values[0]));
        if (to_float(values[1]) != 0) append_key_float(to_float(values[1]));
        break;
      case Kind::kSize:
      case Kind::kTuple:
        key_text_ += '(';
        for (std::uint32_t i = 0; i < container.count; ++i) append_key_text(values[i], depth + 1);
        key_text_ += ')';
        break;
      case Kind::kFrozenSet:
        append_key_set(container, depth);
        break;
      default:
        give_up_text();  // what has no hash
    }
  }

  void append_key_set(const Container& container, std::uint32_t depth) {
    std::vector<std::string> texts;
    const std::size_t begin = key_text_.size();
    for (const Value* value = graph_.begin(container); value != graph_.end(container); ++value) {
      append_key_text(*value, depth + 1);
      texts.emplace_back(key_text_, begin);
      key_text_.resize(begin);
    }
    std::sort(texts.begin(), texts.end());
    texts.erase(std::unique(texts.begin(), texts.end()), texts.end());
    key_text_ += '{';
    for (const std::string& text : texts) key_text_ += text;
    key_text_ += '}';
  }

  Graph graph_;
  PickledObject& object_;
  Tables& tables_;
  std::uint32_t given_storages_ = 0;

  bool has_text_;  // whether json_ can hold what has been walked
  bool has_opaque_ = false;
  bool is_over_limit_ = false;
  std::uint64_t text_max_;
  std::uint64_t spent_ = 0;

  std::string json_;
  std::vector<Place> places_;
  std::vector<std::uint32_t> marks_;  // places that are referred to
  std::uint32_t depth_ = 0;
  bool is_in_key_ = false;

  std::string path_;             // the keys on the way, joined by dots
  bool has_surrogates_ = false;  // in the path
  Texts names_;
  std::vector<std::uint32_t> name_counts_;  // by tensor: how many names begin with its name

  std::vector<Item> items_;  // of the dictionaries that are being written
  Texts keys_;               // and scratch of drop_repeated(), with the next three
  std::string key_text_;
  std::vector<std::size_t> key_ends_;
  std::vector<std::uint32_t> kept_;
};

}  // namespace

PickledObject read_torch_pickle(std::string_view stream, const Index& by_key) {
  PickledObject object;
  object.tables.storages.assign(by_key.storages.begin(), by_key.storages.end());
  for (StorageRecord& storage : object.tables.storages) storage.device = 0;
  std::optional<Graph> graph = read_pickle(stream, by_key);
  if (!graph) return object;
  std::sort(graph->globals.begin(), graph->globals.end());
  graph->globals.erase(std::unique(graph->globals.begin(), graph->globals.end()),
                       graph->globals.end());
  object.globals = std::move(graph->globals);
  Walk(*std::move(graph), object).run();
  return object;
}

}  // namespace fastsd
