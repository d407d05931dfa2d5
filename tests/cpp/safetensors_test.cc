#include "safetensors.h"

#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "support.h"

namespace fastsd::test {
namespace {

std::string encode(const std::string& header, std::uint64_t data_bytes) {
  const std::uint64_t length = header.size();
  std::string file(reinterpret_cast<const char*>(&length), sizeof length);
  return file + header + std::string(data_bytes, 'x');
}

std::string entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  std::uint64_t begin, std::uint64_t end) {
  return "\"" + name + R"(":{"dtype":")" + dtype + R"(","shape":)" + shape +
         R"(,"data_offsets":[)" + std::to_string(begin) + "," + std::to_string(end) + "]}";
}

Tables read(const std::string& header, std::uint64_t data_bytes) {
  return read_safetensors(file_of(encode(header, data_bytes)));
}

// That reading fails in this way, with a message that holds `part`.
void check_refused(const std::string& file, Failure failure, const std::string& part) {
  const auto call = [&] { return read_safetensors(file_of(file)); };
  const std::string message = message_of(call);
  const std::string shown = file.substr(0, 200) + ": " + message;
  check(failure_of(call) == failure, shown.c_str(), __FILE__, __LINE__);
  check(message.find(part) != std::string::npos, shown.c_str(), __FILE__, __LINE__);
}

Dims dims_of(const Tables& tables, std::size_t i) {
  const auto first = tables.dims.begin() + std::ptrdiff_t(tables.tensors[i].dims_offset);
  return {first, first + 2 * std::ptrdiff_t(tables.tensors[i].rank)};
}

TEST(safetensors_finds_tensors_storages_and_metadata) {
  const std::string header =
      R"({ "__metadata__" : {"format":"pt","\u00e9":"\"$\n"},)"
      R"("b":{"dtype":"F32","shape":[2,3],"data_offsets":[3,27]},)"
      R"("\u00e9\ud83d\ude00\/\n":{"data_offsets" : [ 0 , 3 ],"shape":[3],"dtype":"U8"},)"
      R"("scalar":{"dtype":"I64","shape":[],"x":{"y":[1e5,-0.5,null,true,false,"z",{}]},)"
      R"("data_offsets":[27,35]},)"
      R"("":{"dtype":"BF16","shape":[4,0,5,1],"data_offsets":[27,27]}})"
      "\n  ";
  const Tables tables = read(header, 35);
  const std::uint64_t begin = 8 + header.size();
  CHECK(is_sound(tables));
  CHECK(tables.file_bytes == begin + 35);
  CHECK(tables.devices == std::vector<std::string>{"cpu"} && tables.flags == 0);
  if (!CHECK(tables.tensors.size() == 4 && tables.storages.size() == 4)) return;
  const std::uint64_t places[4][2] = {{0, 3}, {3, 27}, {27, 27}, {27, 35}};
  for (std::size_t i = 0; i < 4; ++i) {
    CHECK(tables.storages[i].offset == begin + places[i][0]);
    CHECK(tables.storages[i].bytes == places[i][1] - places[i][0]);
    CHECK(tables.storages[i].flags == 0 && tables.storages[i].device == 0);
  }
  const Index index = tables.index();
  const char* names[] = {"b", "\xC3\xA9\xF0\x9F\x98\x80/\n", "scalar", ""};
  const std::uint32_t storages[] = {1, 0, 3, 2};
  const DType dtypes[] = {DType::kFloat32, DType::kUInt8, DType::kInt64, DType::kBFloat16};
  const Dims dims[] = {{2, 3, 3, 1}, {3, 1}, {}, {4, 0, 5, 1, 5, 5, 1, 1}};
  for (std::uint32_t i = 0; i < 4; ++i) {
    CHECK(index.name(index.tensors[i]) == names[i]);
    CHECK(index.tensors[i].storage == storages[i] && index.tensors[i].storage_offset == 0);
    CHECK(index.tensors[i].dtype == std::uint16_t(dtypes[i]) && index.tensors[i].same_as == i);
    CHECK(dims_of(tables, i) == dims[i]);
  }
  if (!CHECK(tables.sections.size() == 1)) return;
  CHECK(tables.sections[0].first == Section::kMetadata);
  CHECK(tables.sections[0].second == R"({"format":"pt","\u00e9":"\"$\n"})");
}

TEST(safetensors_may_hold_nothing) {
  CHECK(read("{}", 0).tensors.empty() && read("{} ", 0).sections.empty());
  CHECK(read(R"({"__metadata__":null})", 0).sections.empty());
  CHECK(read(R"({"__metadata__":{}})", 0).sections.at(0).second == "{}");
}

TEST(safetensors_knows_every_dtype) {
  const struct {
    const char* name;
    DType dtype;
    std::uint64_t bytes;
  } expected[] = {
      {"BOOL", DType::kBool, 1},
      {"U8", DType::kUInt8, 1},
      {"I8", DType::kInt8, 1},
      {"F8_E5M2", DType::kFloat8E5m2, 1},
      {"F8_E4M3", DType::kFloat8E4m3fn, 1},
      {"F8_E8M0", DType::kFloat8E8m0fnu, 1},
      {"F8_E4M3FNUZ", DType::kFloat8E4m3fnuz, 1},
      {"F8_E5M2FNUZ", DType::kFloat8E5m2fnuz, 1},
      {"I16", DType::kInt16, 2},
      {"U16", DType::kUInt16, 2},
      {"F16", DType::kFloat16, 2},
      {"BF16", DType::kBFloat16, 2},
      {"I32", DType::kInt32, 4},
      {"U32", DType::kUInt32, 4},
      {"F32", DType::kFloat32, 4},
      {"C64", DType::kComplex64, 8},
      {"I64", DType::kInt64, 8},
      {"U64", DType::kUInt64, 8},
      {"F64", DType::kFloat64, 8},
  };
  for (const auto& item : expected) {
    const Tables tables =
        read("{" + entry("t", item.name, "[3]", 0, 3 * item.bytes) + "}", 3 * item.bytes);
    CHECK(tables.tensors.at(0).dtype == std::uint16_t(item.dtype));
    CHECK(tables.storages.at(0).bytes == 3 * item.bytes);
  }
}

// As safetensors' own loader for torch has it: torch's type holds two values, along the last
// dimension.
TEST(safetensors_halves_the_last_size_of_f4) {
  const Tables tables =
      read("{" + entry("a", "F4", "[3,4]", 0, 6) + "," + entry("b", "F4", "[3,0]", 6, 6) + "}", 6);
  CHECK(tables.tensors.at(0).dtype == std::uint16_t(DType::kFloat4E2m1fnX2));
  CHECK((dims_of(tables, 0) == Dims{3, 2, 2, 1}));
  CHECK((dims_of(tables, 1) == Dims{3, 0, 1, 1}));
  for (const char* shape : {"[]", "[3]", "[4,1]"})
    check_refused(encode("{" + entry("t", "F4", shape, 0, 2) + "}", 2), Failure::kFormat,
                  "tensor `t` has dtype F4 and no even last size");
}

TEST(safetensors_refuses_dtypes_that_it_does_not_know) {
  for (const char* dtype : {"F6_E2M3", "F6_E3M2"})
    check_refused(encode("{" + entry("t", dtype, "[4]", 0, 3) + "}", 3), Failure::kUnsupported,
                  std::string("tensor `t` has dtype ") + dtype);
  check_refused(encode("{" + entry("t", "C128", "[1]", 0, 16) + "}", 16), Failure::kVersion,
                "tensor `t` has dtype C128");
}

TEST(safetensors_refuses_holes_overlaps_and_other_sizes) {
  const struct {
    std::string header;
    std::uint64_t data_bytes;
    Failure failure;
    const char* part;
  } cases[] = {
      {entry("a", "U8", "[2]", 1, 3), 3, Failure::kFormat, "hole behind 0"},
      {entry("a", "U8", "[2]", 0, 2) + "," + entry("b", "U8", "[1]", 3, 4), 4, Failure::kFormat,
       "tensor `b` has data_offsets 3 and 4, which leaves a hole behind 2"},
      {entry("a", "U8", "[2]", 0, 2) + "," + entry("b", "U8", "[2]", 1, 3), 3, Failure::kFormat,
       "tensor `b` has data_offsets 1 and 3, but bytes are in use up to 2"},
      {entry("a", "U8", "[2]", 0, 2) + "," + entry("b", "U8", "[2]", 0, 2), 2, Failure::kFormat,
       "in use up to 2"},
      {entry("a", "U8", "[2]", 0, 2) + "," + entry("b", "U8", "[0]", 1, 1), 2, Failure::kFormat,
       "in use up to 2"},
      {entry("a", "U8", "[0]", 5, 5), 2, Failure::kFormat, "hole"},
      {entry("a", "U8", "[2]", 0, 2), 3, Failure::kFormat,
       "3 behind its header, which accounts for 2"},
      {entry("a", "U8", "[2]", 0, 2), 1, Failure::kTruncated,
       "1 behind its header, which accounts for 2"},
      {"", 1, Failure::kFormat, "accounts for 0"},
      {entry("a", "U16", "[2]", 0, 2), 2, Failure::kFormat, "tensor `a` needs 4 bytes"},
      {entry("a", "U8", "[0]", 2, 0), 0, Failure::kFormat, "tensor `a` needs 0 bytes"},
      {entry("a", "U8", "[4294967296,4294967296]", 0, 0), 0, Failure::kFormat,
       "tensor `a` has a shape of more elements"},
      {entry("a", "U8", "[0,4294967296,4294967296]", 0, 0), 0, Failure::kFormat, "tensor `a`"},
      {entry("a", "F64", "[4611686018427387904]", 0, 0), 0, Failure::kFormat,
       "tensor `a` has a shape of more bytes"},
      {entry("a", "U8", "[9223372036854775808]", 0, 0), 0, Failure::kFormat, "tensor `a`"},
      {entry("a", "U8", "[9223372036854775807]", 0, INT64_MAX), 9, Failure::kTruncated,
       "accounts for 9223372036854775807"},
      {entry("a", "U8", "[9223372036854775807]", 0, INT64_MAX) + "," +
           entry("b", "U8", "[9223372036854775807]", INT64_MAX, UINT64_MAX - 1) + "," +
           entry("c", "U8", "[3]", UINT64_MAX - 1, 1),
       9, Failure::kFormat, "tensor `c` needs 3 bytes"},
      {entry("a", "U8", "[2]", 0, 2) + "," + entry("a", "U8", "[1]", 2, 3), 3, Failure::kFormat,
       "two tensors are named a"},
  };
  for (const auto& item : cases)
    check_refused(encode("{" + item.header + "}", item.data_bytes), item.failure, item.part);
}

TEST(safetensors_refuses_numbers_that_are_none) {
  for (const char* value : {"-2", "-0", "2.0", "2e0", "02", "NaN", "\"2\"", "null", "[2]", "true",
                            "18446744073709551616", "", "2 2", "Infinity"}) {
    check_refused(encode("{" + entry("n.w", "U8", std::string("[") + value + "]", 0, 2) + "}", 2),
                  Failure::kFormat, value[0] == '\0' ? "needs 1 bytes" : "in tensor `n.w`: ");
    check_refused(encode(R"({"n.w":{"dtype":"U8","shape":[2],"data_offsets":[0,)" +
                             std::string(value) + "]}}",
                         2),
                  Failure::kFormat, "in tensor `n.w`: ");
  }
}

TEST(safetensors_refuses_headers_of_another_form) {
  const std::string tensor = R"({"dtype":"U8","shape":[2],"data_offsets":[0,2]})";
  const std::pair<std::string, const char*> cases[] = {
      {" {}", "byte 8 of the file is not `{`"},
      {"[]", "byte 8 of the file is not `{`"},
      {"{", "expected a string"},
      {"{}x", "expected nothing more"},
      {std::string("{}\0", 3), "expected nothing more"},
      {"{}{}", "expected nothing more"},
      {R"({"a")", "expected a colon"},
      {R"({"a":)" + tensor, "expected a comma or the end of the header"},
      {R"({"a":)" + tensor + ",}", "expected a string"},
      {R"({a:)" + tensor + "}", "expected a string"},
      {R"({"a":["U8",[2],[0,2]]})", "in tensor `a`: expected an object"},
      {R"({"a":{}})", "expected dtype, shape and data_offsets"},
      {R"({"a":{"dtype":"U8","shape":[2]}})", "expected dtype, shape and data_offsets"},
      {R"({"a":{"dtype":"U8","dtype":"U8"}})", "dtype occurs twice"},
      {R"({"a":{"shape":[2],"shape":[2]}})", "shape occurs twice"},
      {R"({"a":{"data_offsets":[0,2],"data_offsets":[0,2]}})", "data_offsets occur twice"},
      {R"({"a":{"data_offsets":[0,2,2]}})", "expected two data_offsets"},
      {R"({"a":{"data_offsets":[0]}})", "expected two data_offsets"},
      {R"({"a":{"dtype":8}})", "expected a string"},
      {R"({"a":{"shape":{}}})", "expected the shape to be an array"},
      {R"({"a":{"x":nul}})", "expected a value"},
      {R"({"a":{"x":-}})", "expected a value"},
      {R"({"a":{"x":[1 2]}})", "expected a comma or the end of the value"},
      {R"({"a":{"x":)" + std::string(5000, '['), "nested too deeply"},
      {R"({"a":{"x":)" + std::string(101, '[') + std::string(101, ']'), "nested too deeply"},
      {"{\"a\tb\":1}", "expected the end of the string"},
      {"{\"a\xFF\":1}", "is not UTF-8"},
      {"{\"\xED\xA0\x80\":1}", "is not UTF-8"},
      {R"({"\ud800":1})", "half a character"},
      {R"({"\udc00\ud800":1})", "half a character"},
      {R"({"\u12g4":1})", "expected four hexadecimal digits"},
      {R"({"\x":1})", "expected an escape"},
      {R"({"__metadata__":[]})", "expected __metadata__ to be an object"},
      {R"({"__metadata__":{"a":1}})", "expected a string"},
      {R"({"__metadata__":{"a":null}})", "expected a string"},
      {R"({"__metadata__":{"a":"b","\u0061":"c"}})", "a name occurs twice in the __metadata__"},
      {R"({"__metadata__":{},"__metadata__":null})", "__metadata__ occurs twice"},
  };
  for (const auto& [header, part] : cases) check_refused(encode(header, 2), Failure::kFormat, part);
}

TEST(safetensors_refuses_what_is_beyond_its_limits) {
  check_refused(std::string("{}{}{", 5), Failure::kTruncated, "the file has 5 bytes");
  check_refused("", Failure::kTruncated, "the file has 0 bytes");
  check_refused(encode("", 0), Failure::kFormat, "byte 8");
  const auto with_length = [](std::uint64_t length) {
    return std::string(reinterpret_cast<const char*>(&length), sizeof length) + "{}";
  };
  check_refused(with_length(3), Failure::kTruncated, "header of 3 it would have 11");
  check_refused(with_length(100'000'000), Failure::kTruncated, "the file has 10 bytes");
  check_refused(with_length(100'000'001), Failure::kLimit, "100000001");
  check_refused(with_length(UINT64_MAX), Failure::kLimit, "18446744073709551615");
  std::string ones = "[1";
  for (int i = 1; i < 64; ++i) ones += ",1";
  CHECK(read("{" + entry("a", "U8", ones + "]", 0, 1) + "}", 1).tensors.at(0).rank == 64);
  check_refused(encode("{" + entry("a", "U8", ones + ",1]", 0, 1) + "}", 1), Failure::kLimit,
                "tensor `a` has more than 64 dimensions");
  const std::string name(kNameBytesMax, 'n');
  CHECK(read("{" + entry(name, "U8", "[1]", 0, 1) + "}", 1).tensors.size() == 1);
  check_refused(encode("{" + entry(name + "n", "U8", "[1]", 0, 1) + "}", 1), Failure::kLimit,
                "has 65537 bytes");
}

TEST(safetensors_survives_any_change_of_a_byte_and_any_cut) {
  const std::string file =
      encode(R"({"__metadata__":{"k":"\u00e9"},)" + entry("a", "F32", "[1,2]", 0, 8) + "," +
                 entry("b\\n", "F4", "[4]", 8, 10) + R"(,"c":{"x":[{"y":1.5e3}],"dtype":"BOOL",)" +
                 R"("shape":[],"data_offsets":[10,11]}} )",
             11);
  CHECK(is_sound(read_safetensors(file_of(file))));
  for (std::size_t bytes = 0; bytes < file.size(); ++bytes) {
    CHECK(failure_of([&] { return read_safetensors(file_of(file.substr(0, bytes))); }) ==
          Failure::kTruncated);
  }
  for (std::size_t i = 0; i < file.size(); ++i) {
    for (int value = 0; value < 256; ++value) {
      std::string changed = file;
      changed[i] = static_cast<char>(value);
      try {
        CHECK(is_sound(read_safetensors(file_of(changed))));
      } catch (const Error& error) {
        CHECK(*error.what() != '\0' && error.kind != Failure::kSystem);
      }
    }
  }
}

}  // namespace
}  // namespace fastsd::test
