// A pickle stream of torch's, over storages that are as such a file may have them.
#include <algorithm>

#include "dtype.h"
#include "fuzz.h"
#include "torch_pickle.h"
#include "utf8.h"

namespace fastsd::fuzz {
namespace {

// Storages of several sizes, an empty one and one of two keys.
Tables make_storages() {
  Tables tables;
  const std::uint64_t sizes[] = {40, 0, 4096, 3, std::uint64_t{1} << 40U};
  for (const std::uint64_t bytes : sizes) {
    tables.storages.push_back({tables.file_bytes, bytes, 0, 0, 0, 0});
    tables.file_bytes += bytes;
  }
  const auto add_key = [&](const char* name, std::int64_t bytes, std::uint32_t storage,
                           std::uint64_t offset) {
    const std::int64_t dims[] = {bytes, 1};
    tables.add_tensor(name, std::uint16_t(DType::kUInt8), 1, dims, storage, offset);
  };
  add_key("0", 40, 0, 0);
  add_key("1", 0, 1, 0);
  add_key("2", 4096, 2, 0);
  add_key("3", 3, 3, 0);
  add_key("4", std::int64_t{1} << 40U, 4, 0);
  add_key("5", 1024, 2, 3072);
  return tables;
}

bool is_text(Section kind) { return kind == Section::kTree || kind == Section::kStateMetadata; }

}  // namespace

FUZZ_TARGET(pickle) {
  static const Tables storages = make_storages();
  PickledObject object = read_torch_pickle(input, storages.index());
  Tables& tables = object.tables;
  require(tables.storages.size() >= storages.storages.size(), "storages stay");
  for (std::size_t i = 0; i < storages.storages.size(); ++i)
    require(tables.storages[i].offset == storages.storages[i].offset &&
                tables.storages[i].bytes == storages.storages[i].bytes,
            "storages stay as they were given");
  tables.file_bytes = storages.file_bytes;
  require_sound(tables);
  for (const auto& [kind, text] : tables.sections) {
    require(is_text(kind), "sections are those of an object");
    require_json(text, tables.tensors.size());
  }
  require(!object.is_plain || object.globals.empty(), "what is plain names nothing unknown");
  require(
      std::is_sorted(object.globals.begin(), object.globals.end()) &&
          std::adjacent_find(object.globals.begin(), object.globals.end()) == object.globals.end(),
      "globals are sorted, each once");
}

}  // namespace fastsd::fuzz
