#include "plan.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "checksum.h"
#include "support.h"
#include "writer.h"

namespace fastsd::test {
namespace {

// A layout's file, read again.
struct Archive {
  explicit Archive(const Layout& layout) : file(whole_file(layout)) {
    const Preamble preamble = decode_preamble(file.data(), file.size(), file.size());
    std::unique_ptr<std::uint64_t[]> bytes(new std::uint64_t[preamble.header_bytes / 8]);
    std::memcpy(bytes.get(), file.data(), preamble.header_bytes);
    header = Header::decode(std::move(bytes), preamble);
  }

  const TensorRecord& tensor(std::size_t i) const { return header.index().tensors[i]; }
  const StorageRecord& storage(std::size_t i) const { return header.index().storages[i]; }
  std::size_t storage_count() const { return header.index().storages.size(); }

  std::string bytes(std::size_t i) const {
    const std::uint64_t bytes = stored_bytes(storage(i));
    return bytes == 0 ? "" : file.substr(storage(i).offset, bytes);
  }

  // Whether the tensor has the values that it had in memory, and its own name and dtype.
  bool holds(std::size_t i, const Tensor& original) const {
    const TensorRecord& record = tensor(i);
    const Strided view = header.index().view(record);
    const bool is_described =
        header.index().name(record) == original.name &&
        record.dtype == std::uint16_t(original.dtype) && view.rank == original.shape.size() &&
        std::equal(view.shape, view.shape + view.rank, original.shape.begin()) &&
        std::equal(view.stride, view.stride + view.rank, original.stride.begin());
    const std::uint64_t extent = *extent_bytes(original.view());
    std::vector<std::byte> expected(extent);
    std::vector<std::byte> actual(extent);
    if (extent == 0) return is_described;
    const char* first = file.data() + storage(record.storage).offset +
                        record.storage_offset * original.item_bytes();
    copy_reachable(original.view(), original.data, 0, extent, expected.data());
    copy_reachable(view, reinterpret_cast<const std::byte*>(first), 0, extent, actual.data());
    return is_described && expected == actual;
  }

  std::string file;
  Header header;
};

std::vector<std::byte> make_memory() { return Random(30).bytes(4096); }

std::string text(const std::byte* first, std::size_t bytes) {
  return {reinterpret_cast<const char*>(first), bytes};
}

TEST(plan_joins_views_that_overlap) {
  const std::vector<std::byte> memory = make_memory();
  const std::vector<Tensor> tensors = {
      {"whole", DType::kFloat32, memory.data(), {8}},
      {"transposed", DType::kFloat32, memory.data(), {4, 2}, {1, 4}},
      {"tail", DType::kInt64, memory.data() + 16, {4}},  // from within, beyond the end
      {"apart", DType::kUInt8, memory.data() + 100, {5}},
  };
  const Archive archive(lay_out(tensors));
  CHECK(archive.storage_count() == 2);
  CHECK(archive.tensor(1).storage == 0 && archive.tensor(2).storage == 0);
  CHECK(archive.tensor(2).storage_offset == 2);
  CHECK(archive.tensor(3).storage == 1);
  CHECK(archive.bytes(0) == text(memory.data(), 48));
  CHECK(archive.bytes(1) == text(memory.data() + 100, 5));
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    CHECK(archive.holds(i, tensors[i]));
    CHECK(archive.tensor(i).same_as == i);
  }
}

TEST(plan_stores_only_what_is_reachable) {
  const std::vector<std::byte> memory = make_memory();
  const FsdLayout layout = lay_out({{"slice", DType::kFloat16, memory.data() + 1000, {10}}});
  const Archive archive(layout);
  CHECK(archive.storage(0).bytes == 20 && archive.tensor(0).storage_offset == 0);
  CHECK(archive.file.size() == kHeaderAlignBytes + 20);
  CHECK(layout.plan().bytes_in_place(0, 7) == memory.data() + 1007);
}

TEST(plan_orders_storages_by_first_use) {
  const std::vector<std::byte> memory = make_memory();
  const std::vector<Tensor> tensors = {
      {"high", DType::kUInt8, memory.data() + 3000, {7}},
      {"empty", DType::kUInt8, memory.data() + 10, {0}},
      {"low", DType::kUInt8, memory.data(), {9}},
      {"middle", DType::kUInt8, memory.data() + 2000, {8}},
      {"high again", DType::kUInt8, memory.data() + 3001, {2}},
  };
  const Archive archive(lay_out(tensors));
  const std::uint32_t expected[] = {0, 1, 2, 3, 0};
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    CHECK(archive.tensor(i).storage == expected[i]);
    CHECK(archive.holds(i, tensors[i]));
  }
  CHECK(archive.storage(0).offset < archive.storage(2).offset);
  CHECK(archive.storage(2).offset < archive.storage(3).offset);
}

TEST(plan_does_not_join_neighbours) {
  const std::vector<std::byte> memory = make_memory();
  const Archive archive(lay_out(
      {{"a", DType::kInt32, memory.data(), {4}}, {"b", DType::kInt32, memory.data() + 16, {4}}}));
  CHECK(archive.storage_count() == 2);
  CHECK(archive.storage(0).bytes == 16 && archive.storage(1).bytes == 16);
}

TEST(plan_puts_leading_bytes_before_views_at_odd_distances) {
  const std::vector<std::byte> memory = make_memory();
  // The first view starts 4 bytes before the second, whose items have 8: 4 bytes come before both.
  const std::vector<Tensor> tensors = {{"narrow", DType::kInt32, memory.data() + 4, {6}},
                                       {"wide", DType::kInt64, memory.data() + 8, {2}}};
  const FsdLayout layout = lay_out(tensors);
  const Archive archive(layout);
  CHECK(archive.storage_count() == 1 && archive.storage(0).bytes == 28);
  CHECK(archive.tensor(0).storage_offset == 1 && archive.tensor(1).storage_offset == 1);
  CHECK(archive.bytes(0) == std::string(4, '\0') + text(memory.data() + 4, 24));
  CHECK(archive.holds(0, tensors[0]) && archive.holds(1, tensors[1]));
  CHECK(layout.plan().bytes_in_place(0, 0) == nullptr);
}

TEST(plan_gives_misaligned_views_storages_of_their_own) {
  const std::vector<std::byte> memory = make_memory();
  const char object = 0;
  std::vector<Tensor> tensors = {{"a", DType::kInt32, memory.data(), {6}},
                                 {"b", DType::kInt32, memory.data() + 2, {6}},
                                 {"b again", DType::kInt32, memory.data() + 2, {6}},
                                 {"c", DType::kInt32, memory.data() + 4, {1}}};
  tensors[1].identity = tensors[2].identity = &object;
  const Archive archive(lay_out(tensors));
  CHECK(archive.storage_count() == 3);
  CHECK(archive.tensor(2).storage == archive.tensor(1).storage);
  CHECK(archive.tensor(2).same_as == 1);
  for (std::size_t i = 0; i < tensors.size(); ++i) CHECK(archive.holds(i, tensors[i]));
}

TEST(plan_keeps_what_is_the_same_object) {
  const std::vector<std::byte> memory = make_memory();
  const char objects[4] = {};
  std::vector<Tensor> tensors = {{"a", DType::kInt8, memory.data(), {4}},
                                 {"equal", DType::kInt8, memory.data(), {4}},
                                 {"same", DType::kInt8, memory.data(), {4}},
                                 {"empty", DType::kInt8, memory.data(), {0}},
                                 {"empty again", DType::kInt8, memory.data(), {0}},
                                 {"another", DType::kInt8, memory.data(), {0}},
                                 {"meta", DType::kInt8, nullptr, {9}},
                                 {"meta again", DType::kInt8, nullptr, {9}},
                                 {"meta apart", DType::kInt8, nullptr, {9}}};
  tensors[0].identity = tensors[2].identity = &objects[0];
  tensors[3].identity = tensors[4].identity = &objects[1];
  tensors[6].identity = tensors[7].identity = &objects[2];
  const Archive archive(lay_out(tensors));
  const std::uint32_t same_as[] = {0, 1, 0, 3, 3, 5, 6, 6, 8};
  const std::uint32_t storage[] = {0, 0, 0, 1, 1, 2, 3, 3, 4};
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    CHECK(archive.tensor(i).same_as == same_as[i]);
    CHECK(archive.tensor(i).storage == storage[i]);
  }
}

// More of them than a sort keeps in order by chance.
TEST(plan_keeps_the_first_of_many_as_the_original) {
  const std::vector<std::byte> memory = make_memory();
  std::vector<Tensor> tensors;
  for (int i = 0; i < 100; ++i) {
    Tensor& tensor =
        tensors.emplace_back("t" + std::to_string(i), DType::kInt8, memory.data() + 200, Dims{4});
    tensor.identity = &memory;
  }
  tensors.emplace_back("lower", DType::kInt8, memory.data() + 100, Dims{4});
  const Archive archive(lay_out(tensors));
  for (std::size_t i = 0; i < 100; ++i) CHECK(archive.tensor(i).same_as == 0);
  CHECK(archive.tensor(100).same_as == 100 && archive.tensor(100).storage == 1);
}

TEST(plan_writes_zeros_where_no_view_reaches) {
  std::vector<std::byte> memory(64, std::byte{'s'});
  const std::vector<Tensor> tensors = {{"even", DType::kUInt8, memory.data(), {8}, {4}},
                                       {"odd", DType::kUInt8, memory.data() + 2, {4}, {4}}};
  const FsdLayout layout = lay_out(tensors);
  const Archive archive(layout);
  std::string expected;
  for (int i = 0; i < 4; ++i) expected += std::string("s\0s\0", 4);
  for (int i = 0; i < 3; ++i) expected += std::string("s\0\0\0", 4);
  CHECK(archive.bytes(0) == expected + "s");
  CHECK(layout.plan().bytes_in_place(0, 0) == nullptr);
}

TEST(plan_takes_bytes_in_place_where_another_view_fills_the_gaps) {
  const std::vector<std::byte> memory = make_memory();
  const FsdLayout layout = lay_out({{"whole", DType::kUInt8, memory.data(), {32}},
                                    {"column", DType::kUInt8, memory.data() + 1, {8}, {4}}});
  CHECK(layout.plan().storages().size() == 1);
  CHECK(layout.plan().bytes_in_place(0, 0) == memory.data());
  CHECK(gather(layout, layout.data_begin(), layout.file_bytes()) == text(memory.data(), 32));
}

TEST(plan_of_meta_and_empty_views) {
  const std::vector<std::byte> memory = make_memory();
  Tensor meta("meta", DType::kFloat64, nullptr, {3, 5});
  meta.device = 1;
  const std::vector<Tensor> tensors = {meta,
                                       {"meta empty", DType::kFloat64, nullptr, {3, 0}},
                                       {"no memory", DType::kFloat32, memory.data(), {0, 7}},
                                       {"scalar", DType::kFloat32, memory.data() + 8, {}}};
  const Archive archive(lay_out(tensors));
  CHECK(archive.storage_count() == 4);
  CHECK(archive.storage(0).bytes == 120 && archive.storage(0).flags == kStorageHasNoData);
  CHECK(archive.storage(0).device == 1);
  CHECK(archive.storage(1).bytes == 0 && archive.storage(1).flags == kStorageHasNoData);
  CHECK(archive.storage(2).bytes == 0 && archive.storage(2).flags == 0);
  CHECK(archive.storage(3).bytes == 4);
  CHECK(archive.file.size() == kHeaderAlignBytes + 4);
  CHECK(archive.holds(3, tensors[3]));
}

TEST(plan_of_nothing) {
  const Archive archive(lay_out({}));
  CHECK(archive.file.size() == kHeaderAlignBytes);
  CHECK(archive.storage_count() == 0);
}

TEST(plan_carries_flags_devices_and_sections) {
  const std::vector<std::byte> memory = make_memory();
  Tensor tensor("p", DType::kFloat32, memory.data(), {2});
  tensor.flags = kTensorIsParameter | kTensorRequiresGrad;
  tensor.device = 1;
  Plan plan;
  add(plan, tensor);
  plan.finish();
  const Archive archive(FsdLayout(std::move(plan), kFileRootIsOrderedDict, {"cpu", "cuda:3"},
                                  {{Section::kMetadata, R"({"k":"v"})"}, {Section::kTree, "[]"}}));
  CHECK(archive.tensor(0).flags == tensor.flags);
  CHECK(archive.storage(0).device == 1 && archive.header.devices()[1] == "cuda:3");
  CHECK(archive.header.preamble().flags == kFileRootIsOrderedDict);
  CHECK(archive.header.section(Section::kTree) == "[]");
  CHECK(archive.header.section(Section::kMetadata) == R"({"k":"v"})");
}

TEST(plan_refuses_what_the_container_cannot_hold) {
  const std::vector<std::byte> memory = make_memory();
  const auto with = [&](const Tensor& tensor) {
    Plan plan;
    return failure_of([&] {
      add(plan, tensor);
      return 0;
    });
  };
  const std::byte* data = memory.data();
  CHECK(with({"x", DType::kInt8, data, Dims(64, 1)}) == std::nullopt);
  CHECK(with({"x", DType::kInt8, data, Dims(65, 1)}) == Failure::kUnsupported);
  CHECK(with({"x", DType::kInt8, data, {-1}}) == Failure::kUnsupported);
  CHECK(with({"x", DType::kInt8, data, {2}, {INT64_MAX}}) == Failure::kUnsupported);
  CHECK(with({std::string(kNameBytesMax, 'n'), DType::kInt8, data, {1}}) == std::nullopt);
  CHECK(with({std::string(kNameBytesMax + 1, 'n'), DType::kInt8, data, {1}}) ==
        Failure::kUnsupported);

  const Dims dims = {3, 1};
  const View freed{"freed", nullptr, DType::kInt8, 0, 0, false, &dims, 1};
  Plan plan;
  CHECK_THROWS(plan.add(freed, dims.data()), Failure::kUnsupported);
}

// ---- Plans of any kind ----

Tensor random_tensor(Random& random, const std::vector<std::byte>& memory, std::size_t i) {
  const DType dtypes[] = {DType::kUInt8, DType::kBFloat16, DType::kFloat32, DType::kFloat64,
                          DType::kComplex128};
  const DType dtype = dtypes[random.below(std::size(dtypes))];
  const std::string name = "t" + std::to_string(i);
  const std::uint64_t item_bytes = find_dtype(std::uint16_t(dtype))->item_bytes;
  Dims shape;
  for (std::uint64_t rank = random.below(4); rank > 0; --rank)
    shape.push_back(std::int64_t(random.below(16) == 0 ? 0 : 1 + random.below(4)));
  Dims stride = contiguous_strides(shape);
  if (random.below(2) == 0) std::reverse(stride.begin(), stride.end());
  if (random.below(3) == 0) {
    for (std::int64_t& step : stride) step = std::int64_t(random.below(7));
  }
  // Most views are aligned as torch's are; others make storages of their own necessary.
  std::uint64_t offset = random.below(memory.size() - 1024);
  if (random.below(8) != 0) offset = offset / item_bytes * item_bytes;
  return {name, dtype, memory.data() + offset, shape, stride};
}

// What the storages hold, by address: every byte that a view reaches, and zeros elsewhere.
void check_storages(const Archive& archive, const std::vector<Tensor>& tensors) {
  for (std::size_t s = 0; s < archive.storage_count(); ++s) {
    std::vector<std::byte> expected(archive.storage(s).bytes);
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      if (archive.tensor(i).storage != s) continue;
      const std::uint64_t at = archive.tensor(i).storage_offset * tensors[i].item_bytes();
      const std::uint64_t extent = *extent_bytes(tensors[i].view());
      copy_reachable(tensors[i].view(), tensors[i].data, 0, extent, expected.data() + at);
    }
    CHECK(archive.bytes(s) == text(expected.data(), expected.size()));
  }
}

// The views that are linked to view `first` by a chain of overlaps.
std::vector<std::size_t> find_group(const std::vector<Tensor>& tensors, std::size_t first) {
  const auto overlap = [](const Tensor& a, const Tensor& b) {
    const std::uint64_t a_bytes = *extent_bytes(a.view());
    const std::uint64_t b_bytes = *extent_bytes(b.view());
    return a_bytes > 0 && b_bytes > 0 && a.data < b.data + b_bytes && b.data < a.data + a_bytes;
  };
  std::vector<std::size_t> group = {first};
  for (std::size_t known = 0; known < group.size(); ++known) {
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      if (std::find(group.begin(), group.end(), i) == group.end() &&
          overlap(tensors[group[known]], tensors[i]))
        group.push_back(i);
    }
  }
  return group;
}

// Views linked by overlaps share a storage if their distances allow all of them to start at whole
// items; others share nothing.
void check_sharing(const Archive& archive, const std::vector<Tensor>& tensors) {
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const std::vector<std::size_t> group = find_group(tensors, i);
    bool is_aligned = true;
    for (const std::size_t a : group) {
      for (const std::size_t b : group) {
        const auto item_bytes = std::min(tensors[a].item_bytes(), tensors[b].item_bytes());
        const auto distance = std::uint64_t(std::abs(tensors[a].data - tensors[b].data));
        is_aligned = is_aligned && distance % item_bytes == 0;
      }
    }
    for (std::size_t j = 0; j < tensors.size(); ++j) {
      const bool is_member = std::find(group.begin(), group.end(), j) != group.end();
      const bool is_shared = archive.tensor(i).storage == archive.tensor(j).storage;
      CHECK(is_shared == (i == j || (is_member && is_aligned)));
    }
  }
}

TEST(plans_of_random_views_hold_what_memory_held) {
  Random random(31);
  const std::vector<std::byte> memory = random.bytes(3072);
  std::size_t shared = 0;
  for (int round = 0; round < 400; ++round) {
    std::vector<Tensor> tensors;
    const std::size_t count = random.below(12);
    tensors.reserve(count);
    for (std::size_t i = 0; i < count; ++i) tensors.push_back(random_tensor(random, memory, i));
    const FsdLayout layout = lay_out(tensors);
    const Archive archive(layout);
    CHECK(archive.file.size() == layout.file_bytes());
    for (std::size_t i = 0; i < count; ++i) CHECK(archive.holds(i, tensors[i]));
    check_storages(archive, tensors);
    check_sharing(archive, tensors);
    shared += count - archive.storage_count();
    for (int window = 0; window < 8; ++window) {
      const std::uint64_t data_bytes = layout.file_bytes() - layout.data_begin();
      const std::uint64_t begin = layout.data_begin() + random.below(data_bytes + 1);
      const std::uint64_t end = begin + random.below(layout.file_bytes() - begin + 1);
      CHECK(gather(layout, begin, end) == archive.file.substr(begin, end - begin));
    }
  }
  CHECK(shared > 100);
}

TEST(plan_with_checksums_decodes) {
  Random random(32);
  const std::vector<std::byte> memory =
      random.bytes(3 << 20U);  // three steps of checksum_storages()
  FsdLayout layout = lay_out({{"large", DType::kUInt8, memory.data() + 1, {5 << 19}},
                              {"gaps", DType::kUInt8, memory.data() + (11 << 18), {1000}, {3}},
                              {"empty", DType::kUInt8, memory.data(), {0}},
                              {"meta", DType::kUInt8, nullptr, {10}}});
  checksum_storages(layout, {}, nullptr);
  const Archive archive(layout);
  for (std::size_t i = 0; i < 2; ++i) {
    const std::string bytes = archive.bytes(i);
    CHECK(archive.storage(i).flags == kStorageHasChecksum);
    CHECK(archive.storage(i).crc32c == crc32c(0, bytes.data(), bytes.size()));
  }
  CHECK(archive.storage(2).flags == 0 && archive.storage(3).flags == kStorageHasNoData);
}

}  // namespace
}  // namespace fastsd::test
