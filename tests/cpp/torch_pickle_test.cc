#include "torch_pickle.h"

#include <cstdint>
#include <string>
#include <vector>

#include "check.h"
#include "dtype.h"
#include "strided.h"
#include "support.h"

namespace fastsd::test {
namespace {

// ---- Streams ----

std::string repeat(const std::string& text, std::size_t count) {
  std::string all;
  for (std::size_t i = 0; i < count; ++i) all += text;
  return all;
}

std::string number32(std::uint32_t value) {
  return {char(value & 0xFFU), char(value >> 8U & 0xFFU), char(value >> 16U & 0xFFU),
          char(value >> 24U)};
}

std::string text(const std::string& value) {
  return "X" + number32(std::uint32_t(value.size())) + value;
}

std::string integer(std::int32_t value) { return "J" + number32(std::uint32_t(value)); }

std::string ints(const Dims& values) {
  std::string all = "(";
  for (const std::int64_t value : values) all += integer(std::int32_t(value));
  return all + "t";
}

std::string protocol() { return "\x80\x02"; }
std::string ordered_dict() { return "ccollections\nOrderedDict\n)R"; }

std::string storage(const std::string& key, std::int32_t numel,
                    const std::string& type = "torch\nFloatStorage",
                    const std::string& location = "cpu") {
  return "(" + text("storage") + "c" + type + "\n" + text(key) + text(location) + integer(numel) +
         "tQ";
}

struct View {
  std::int32_t offset = 0;
  Dims shape = {2};
  Dims stride = {1};
};

std::string tensor(const std::string& own_storage, const View& view) {
  return "ctorch._utils\n_rebuild_tensor_v2\n(" + own_storage + integer(view.offset) +
         ints(view.shape) + ints(view.stride) + "\x89" + ordered_dict() + "tR";
}

// A dictionary of one tensor.
std::string of_one(const std::string& value) { return protocol() + "}" + text("a") + value + "s."; }

// ---- Storages ----

struct Key {
  std::string name;
  std::int64_t bytes;
  std::uint32_t storage;
  std::uint64_t offset;
};

// Storages of so many bytes, and the keys that lie in them.
Tables by_key(const std::vector<std::uint64_t>& storages, const std::vector<Key>& keys) {
  Tables tables;
  for (const std::uint64_t bytes : storages) {
    tables.storages.push_back({tables.file_bytes, bytes, 7, 0, kStorageHasChecksum, 0});
    tables.file_bytes += bytes;
  }
  for (const Key& key : keys) {
    const std::int64_t dims[] = {key.bytes, 1};
    tables.add_tensor(key.name, std::uint16_t(DType::kUInt8), 1, dims, key.storage, key.offset);
  }
  return tables;
}

const Tables& one_storage() {
  static const Tables tables = by_key({40}, {{"0", 40, 0, 0}});
  return tables;
}

// Whether every view lies within its storage, and names and dims are used up in order.
bool is_sound(const Tables& tables) {
  const Index index = tables.index();
  std::uint64_t names = 0;
  for (const TensorRecord& record : index.tensors) {
    const Strided view = index.view(record);
    const auto extent = extent_bytes(view);
    if (!extent || record.storage >= index.storages.size() || record.name_offset != names)
      return false;
    const std::uint64_t bytes = index.storages[record.storage].bytes;
    const std::uint64_t begin = record.storage_offset * view.item_bytes;
    if (begin > bytes || *extent > bytes - begin) return false;
    names += record.name_bytes;
  }
  return names == index.names.size();
}

PickledObject read(const std::string& stream, const Tables& tables = one_storage()) {
  PickledObject object = read_torch_pickle(stream, tables.index());
  CHECK(is_sound(object.tables));
  const auto& sections = object.tables.sections;  // of what is not plain, as far as it can be told
  CHECK(object.is_plain || sections.empty() || sections[0].first == Section::kTree);
  return object;
}

bool is_plain(const std::string& stream) { return read(stream).is_plain; }

std::string tree(const std::string& stream) {
  const PickledObject object = read(stream);
  const auto& sections = object.tables.sections;
  return sections.empty() ? "" : sections[0].second;
}

bool is_nothing(const PickledObject& object) {
  return !object.is_plain && object.tables.tensors.empty();
}

// ---- Tests ----

TEST(a_tensor_of_a_storage) {
  const PickledObject object = read(of_one(tensor(storage("0", 10), {2, {2, 3}, {1, 2}})));
  CHECK(object.is_plain);
  CHECK(object.tables.sections.empty());
  const TensorRecord& record = object.tables.tensors.at(0);
  CHECK(object.tables.names == "a");
  CHECK(record.dtype == std::uint16_t(DType::kFloat32));
  CHECK(record.storage == 0 && record.storage_offset == 2 && record.same_as == 0);
  CHECK(object.tables.dims == Dims({2, 3, 1, 2}));
  CHECK(object.tables.storages[0].crc32c == 7);
}

TEST(views_that_do_not_fit_are_left_out) {
  const auto fits = [](const View& view) {
    const PickledObject object = read(of_one(tensor(storage("0", 10), view)));
    CHECK(object.is_plain == !object.tables.tensors.empty());
    return object.is_plain;
  };
  CHECK(fits({0, {10}, {1}}));
  CHECK(fits({9, {1}, {1}}));
  CHECK(fits({10, {0}, {1}}));
  CHECK(fits({0, {2, 2}, {8, 1}}));
  CHECK(!fits({0, {11}, {1}}));
  CHECK(!fits({10, {1}, {1}}));
  CHECK(!fits({11, {0}, {1}}));
  CHECK(!fits({0, {2, 2}, {9, 1}}));
  CHECK(!fits({-1, {1}, {1}}));
  CHECK(!fits({0, {-1}, {1}}));
  CHECK(!fits({0, {2}, {-1}}));
  CHECK(!fits({0, {2, 2}, {1}}));
  CHECK(!fits({0, Dims(5, INT32_MAX), Dims(5, INT32_MAX)}));
  CHECK(fits({0, Dims(64, 1), Dims(64, 1)}));
  CHECK(!fits({0, Dims(65, 1), Dims(65, 1)}));
}

TEST(storages_that_are_not_what_is_claimed) {
  const View view{0, {1}, {1}};
  CHECK(!is_plain(of_one(tensor(storage("1", 10), view))));
  CHECK(!is_plain(of_one(tensor(storage("0", 9), view))));
  CHECK(!is_plain(of_one(tensor(storage("0", 11), view))));
  CHECK(!is_plain(of_one(tensor(storage("0", -10), view))));
  CHECK(!is_plain(of_one(tensor(storage("0", 5, "torch\nFloatStorage"), view))));
  CHECK(!is_plain(of_one(tensor(storage("0", 40, "torch\nQInt8Storage"), view))));
  CHECK(!is_plain(of_one(tensor(storage("0", 10, "torch\nFloatStorage", ""), view))));
  CHECK(!is_plain(of_one(tensor(storage("0", 10, "torch\nFloatStorage", "meta"), view))));
  CHECK(is_plain(of_one(tensor(storage("0", 40, "torch.storage\nUntypedStorage"), view))));
}

TEST(one_key_has_one_type_and_one_device) {
  const auto two = [](const std::string& first, const std::string& second) {
    return read(protocol() + "}(" + text("a") + tensor(first, {}) + text("b") + tensor(second, {}) +
                "u.");
  };
  const PickledObject same = two(storage("0", 10, "torch\nFloatStorage", "cuda:1"),
                                 storage("0", 10, "torch\nFloatStorage", "cuda:1"));
  CHECK(same.is_plain && same.tables.tensors.size() == 2);
  CHECK(same.tables.devices.at(same.tables.storages[0].device) == "cuda:1");
  CHECK(!two(storage("0", 10), storage("0", 10, "torch\nIntStorage")).is_plain);
  CHECK(!two(storage("0", 10), storage("0", 10, "torch\nFloatStorage", "cuda:1")).is_plain);
}

TEST(keys_within_one_storage) {
  const Tables tables = by_key({100}, {{"0", 40, 0, 0}, {"1", 40, 0, 8}, {"2", 40, 0, 6}});
  const auto place = [&](const std::string& key) {
    const PickledObject object = read(of_one(tensor(storage(key, 10), {3, {7}, {1}})), tables);
    return object.is_plain ? std::int64_t(object.tables.tensors[0].storage_offset) : -1;
  };
  CHECK(place("0") == 3);
  CHECK(place("1") == 5);
  CHECK(place("2") == -1);
}

TEST(a_tensor_named_twice_is_one_object) {
  const PickledObject object = read(protocol() + "](" + tensor(storage("0", 10), {}) + "q\x01" +
                                    "h\x01" + tensor(storage("0", 10), {}) + "e.");
  CHECK(object.is_plain);
  CHECK(object.tables.names == "012");
  CHECK(object.tables.tensors.at(1).same_as == 0);
  CHECK(object.tables.tensors.at(2).same_as == 2);
  CHECK(object.tables.sections.at(0).second == "[{\"$tensor\":0},{\"$tensor\":1},{\"$tensor\":2}]");
}

TEST(a_key_set_twice) {
  CHECK(tree(protocol() + "}(" + text("a") + "K\x01" + text("b") + "K\x02" + text("a") +
             "K\x03u.") == "{\"a\":3,\"b\":2}");
  CHECK(tree(protocol() + "}(K\x05K\x01K\x05K\x02u.") == "{\"$dict\":[[5,2]]}");
  CHECK(!is_plain(protocol() + "}(K\x01K\x01\x88K\x02u."));  // 1 and True
  CHECK(!is_plain(protocol() + "}(K\x01K\x01G\x3F\xF0" + repeat({'\0'}, 6) + "K\x02u."));  // 1.0
  CHECK(!is_plain(protocol() + "}(K\x01\x85K\x01\x88\x85K\x02u."));  // (1,) and (True,)
}

TEST(keys_that_have_no_hash) {
  for (const char* key : {"]", "}", "]\x85", "\x8F"})
    CHECK(!is_plain(protocol() + "}" + key + "K\x01s."));
  CHECK(!is_plain(protocol() + "}" + tensor(storage("0", 10), {}) + "K\x01s."));
}

TEST(what_changes_after_it_was_used) {
  const std::string set =
      "cbuiltins\nset\n]q\x01"
      "K\x01"
      "a\x85R";
  CHECK(tree(protocol() + set + ".") == "{\"$set\":[1]}");
  CHECK(!is_plain(protocol() + "](" + set + "h\x01K\x02" + "ae."));
  const std::string state = ordered_dict() + "}q\x01" + text("x") + "K\x01sb";
  CHECK(is_plain(protocol() + state + "."));
  CHECK(!is_plain(protocol() + "](" + state + "h\x01" + text("y") + "K\x01se."));
}

TEST(attributes_that_a_class_has) {
  for (const char* name : {"keys", "__dict__", "__class__"})
    CHECK(!is_plain(protocol() + ordered_dict() + "}" + text(name) + "K\x01sb."));
}

TEST(malformed_streams) {
  for (const char* stream : {"",
                             ".",
                             "N",
                             "NN.",
                             "(N.",
                             "t.",
                             "(",
                             "a.",
                             "]a.",
                             "NNa.",
                             "h\x01.",
                             "q\x01.",
                             "\x85.",
                             "Nb.",
                             "R.",
                             "NR.",
                             "Q.",
                             "}Ns.",
                             "}(Nu.",
                             "K",
                             "J\x01.",
                             "X\xFF\xFF\xFF\xFF.",
                             "\x8D\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF.",
                             "\x8B\xFF\xFF\xFF\x7F.",
                             "cabc",
                             "cabc\ndef",
                             "\x80\x06N.",
                             "X\x01\0\0\0\xFF.",
                             "Nr\xFF\xFF\xFF\x7F.",
                             "\xFF.",
                             "\x93.",
                             "NN\x93.",
                             "(1",
                             "0.",
                             "\x94."}) {
    CHECK(is_nothing(read(protocol() + stream)));
  }
}

// As Python decodes with "surrogatepass".
TEST(texts_that_are_not_utf8) {
  CHECK(tree(protocol() + text("\xED\xA0\x80") + ".") == "{\"$str\":\"7aCA\"}");
  for (const char* bad : {"\xC0\x80", "\xED\xA0", "\xED\xA0\x80\xA0", "\xF4\x90\x80\x80", "\x80"})
    CHECK(is_nothing(read(protocol() + text(bad) + ".")));
}

std::string sample() {
  return protocol() + "}(" + text("w") + tensor(storage("0", 10), {1, {2, 3}, {3, 1}}) + "q\x09" +
         text("list") + "](K\x01G" + repeat("\x3F", 8) + "N\x88\x8A\x09" + repeat("\x7F", 9) +
         "]q\x01h\x01h\x09" + "e" + text("bytes") + "c_codecs\nencode\n" + text("a\xC3\xBF") +
         text("latin1") + "\x86R" + text("set") + "c__builtin__\nset\n](K\x01K\x02" + "e\x85R" +
         text("state") + ordered_dict() + text("x") + "K\x01s}" + text("_metadata") +
         ordered_dict() + "sbu.";
}

TEST(a_sample_is_plain) {
  CHECK(tree(sample()) ==
        "{\"w\":{\"$tensor\":0},\"list\":[1,0.0004767922794117647,null,true,"
        "{\"$int\":\"0x7f7f7f7f7f7f7f7f7f\"},{\"$def\":[0,[]]},{\"$ref\":0},{\"$tensor\":1}],"
        "\"bytes\":{\"$bytes\":\"Yf8=\"},\"set\":{\"$set\":[1,2]},"
        "\"state\":{\"$attributes\":[{\"$OrderedDict\":{\"x\":1}},"
        "{\"_metadata\":{\"$OrderedDict\":{}}}]}}");
}

TEST(every_truncation) {
  const std::string whole = sample();
  for (std::size_t size = 0; size < whole.size(); ++size)
    CHECK(is_nothing(read(whole.substr(0, size))));
}

TEST(every_byte_replaced) {
  const std::string whole = sample();
  std::size_t plain = 0;
  for (std::size_t i = 0; i < whole.size(); ++i) {
    std::string damaged = whole;
    for (unsigned byte = 0; byte < 256; ++byte) {
      damaged[i] = char(byte);
      plain += read(damaged).is_plain ? 1 : 0;
    }
  }
  CHECK(plain > whole.size());  // each byte is its own replacement once
}

TEST(random_opcodes) {
  const std::string known =
      "N\x88\x89KMJGX}]()\x85\x86\x87tqhaesubRQ0"
      "12\x8F\x90\x91\x81\x94";
  Random random(60);
  for (int i = 0; i < 20'000; ++i) {
    std::string stream = protocol();
    for (std::uint64_t left = random.below(60); left > 0; --left)
      stream += random.below(4) == 0 ? char(random.below(6)) : known[random.below(known.size())];
    read(stream + ".");
  }
}

// ---- Time and memory in proportion ----

TEST(depth_is_bounded) {
  CHECK(is_plain(protocol() + repeat("]", 250) + repeat("a", 249) + "."));
  CHECK(!is_plain(protocol() + repeat("]", 251) + repeat("a", 250) + "."));
  CHECK(!is_plain(protocol() + repeat("]", 1'000'000) + repeat("a", 999'999) + "."));
  CHECK(!is_plain(protocol() + "N" + repeat("\x85", 1'000'000) + "."));
  CHECK(!is_plain(protocol() + "}N" + repeat("\x85", 1'000'000) + "Ns."));
  CHECK(is_nothing(read(protocol() + repeat("(", 1'000'000) + ".")));
}

// Each tuple holds the one before twice.
std::string doubling(std::size_t levels) {
  return "K\x01" + repeat(std::string("q\0h\0", 4) + "\x86", levels);
}

TEST(shared_values_are_visited_once) {
  CHECK(is_plain(protocol() + doubling(200) + "."));
  CHECK(!is_plain(protocol() + "}" + doubling(200) + "Ns."));
  CHECK(!is_plain(protocol() + "}(" + doubling(200) + "NNNu."));
  CHECK(!is_plain(protocol() + "cbuiltins\nset\n](" + doubling(200) + "Ne\x85R."));
  CHECK(is_plain(protocol() + "}" + doubling(10) + "Ns."));
}

TEST(what_is_shared_is_not_written_without_end) {
  const std::string long_text = std::string("(") + text(std::string(100'000, 'x')) + "q\x01";
  CHECK(!is_plain(protocol() + "]" + long_text + repeat("h\x01", 100'000) + "e."));
  // Names and the dims of tensors likewise.
  const std::string one = tensor(storage("0", 10), {0, Dims(64, 1), Dims(64, 1)}) + "q\x02";
  CHECK(is_nothing(read(protocol() + "](" + one + repeat("h\x02", 100'000) + "e.")));
  CHECK(!is_plain(protocol() + "](" + tensor(storage("0", 10), {}) + "q\x02" +
                  text(std::string(100'000, 'x')) + "q\x01" + repeat("}h\x01h\x02s", 100'000) +
                  "e."));
  // A list that many sets are made of, and a state that many have.
  const std::string list = "](" + repeat("N", 100'000) + "e\x85q\x01";
  CHECK(!is_plain(protocol() + list + repeat("cbuiltins\nset\nh\x01R", 1000) + "(t" +
                  repeat("0", 1000) + "."));
}

// Each would read, or keep, a text of a megabyte for every few bytes.
TEST(long_texts_are_not_used_without_end) {
  const std::string long_text = text(std::string(1'000'000, 'x')) + "q\x01" + "0";
  const auto with = [&](const std::string& used) {
    return protocol() + long_text + "](" + repeat(used, 100'000) + "e.";
  };
  CHECK(!is_plain(with("h\x01h\x01\x93")));
  CHECK(!is_plain(with("c_codecs\nencode\nh\x01" + text("latin1") + "\x86R")));
  CHECK(!is_plain(
      with("(" + text("storage") + "ctorch\nFloatStorage\nh\x01" + text("cpu") + "K\x0AtQ")));
  CHECK(!is_plain(with("cx\ny\n}(h\x01NNNu")));
  CHECK(!is_plain(with("cbuiltins\nbytearray\nh\x01" + text("latin1") + "\x86R")));
}

}  // namespace
}  // namespace fastsd::test
