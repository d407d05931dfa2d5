#include "strided.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "check.h"
#include "support.h"

namespace fastsd::test {
namespace {

constexpr std::byte kUntouched{0xEE};

struct Sample {
  std::uint64_t item_bytes = 1;
  Dims shape;
  Dims stride;

  Strided view() const {
    return {item_bytes, std::uint32_t(shape.size()), shape.data(), stride.data()};
  }
};

// Which bytes are reachable, by visiting every element. As long as the extent.
std::vector<bool> enumerate(const Sample& sample) {
  std::vector<bool> is_reachable;
  Dims position(sample.shape.size(), 0);
  const bool is_empty =
      std::any_of(sample.shape.begin(), sample.shape.end(), [](auto size) { return size == 0; });
  while (!is_empty) {
    std::int64_t item = 0;
    for (std::size_t d = 0; d < position.size(); ++d) item += position[d] * sample.stride[d];
    const std::size_t begin = std::size_t(item) * sample.item_bytes;
    if (is_reachable.size() < begin + sample.item_bytes)
      is_reachable.resize(begin + sample.item_bytes);
    std::fill_n(is_reachable.begin() + std::ptrdiff_t(begin), sample.item_bytes, true);
    std::size_t d = 0;
    while (d < position.size() && ++position[d] == sample.shape[d]) position[d++] = 0;
    if (d == position.size()) break;
  }
  return is_reachable;
}

void check_window(const Sample& sample, const std::vector<bool>& is_reachable,
                  const std::vector<std::byte>& source, std::size_t begin, std::size_t end) {
  // Exactly as large as it may be, so that a sanitizer sees a byte too far.
  std::vector<std::byte> target(end - begin, kUntouched);
  copy_reachable(sample.view(), source.data(), begin, end, target.data());
  bool is_right = true;
  for (std::size_t i = begin; i < end; ++i)
    is_right = is_right && target[i - begin] == (is_reachable[i] ? source[i] : kUntouched);
  CHECK(is_right);
}

// The bytes of the elements in row-major order, by visiting every one.
std::vector<std::byte> pack(const Sample& sample, const std::vector<std::byte>& source) {
  std::vector<std::byte> packed;
  const bool is_empty =
      std::any_of(sample.shape.begin(), sample.shape.end(), [](auto size) { return size == 0; });
  Dims position(sample.shape.size(), 0);
  while (!is_empty) {
    std::int64_t item = 0;
    for (std::size_t d = 0; d < position.size(); ++d) item += position[d] * sample.stride[d];
    const auto first = source.begin() + item * std::int64_t(sample.item_bytes);
    packed.insert(packed.end(), first, first + std::int64_t(sample.item_bytes));
    std::size_t d = position.size();
    while (d > 0 && ++position[d - 1] == sample.shape[d - 1]) position[--d] = 0;
    if (d == 0) break;
  }
  return packed;
}

// Contiguous, permuted, or with strides of any kind: 0, overlapping, with gaps.
Sample make_sample(Random& random, std::size_t rank_max, std::uint64_t size_max,
                   std::uint64_t stride_max) {
  Sample sample;
  sample.item_bytes = std::uint64_t{1} << random.below(5);
  const std::size_t rank = random.below(rank_max + 1);
  for (std::size_t d = 0; d < rank; ++d) {
    const bool may_be_empty = random.below(12) == 0;
    sample.shape.push_back(std::int64_t(may_be_empty ? 0 : 1 + random.below(size_max)));
  }
  sample.stride = contiguous_strides(sample.shape);
  switch (random.below(4)) {
    case 0:
      break;
    case 1:  // the same memory with its dimensions in another order
      for (std::size_t d = rank; d-- > 1;) {
        const std::size_t other = random.below(d + 1);
        std::swap(sample.shape[d], sample.shape[other]);
        std::swap(sample.stride[d], sample.stride[other]);
      }
      break;
    case 2:  // expanded
      for (std::int64_t& stride : sample.stride)
        if (random.below(2) == 0) stride = 0;
      break;
    default:
      for (std::int64_t& stride : sample.stride)
        stride = std::int64_t(random.below(stride_max + 1));
  }
  return sample;
}

TEST(strided_views_reach_what_enumeration_finds) {
  Random random(10);
  int gapless = 0;
  int empty = 0;
  for (int i = 0; i < 6000; ++i) {
    const Sample sample = make_sample(random, 5, 4, 14);
    const std::vector<bool> is_reachable = enumerate(sample);
    CHECK(extent_bytes(sample.view()) == is_reachable.size());
    if (is_reachable.empty()) {
      ++empty;
      copy_reachable(sample.view(), nullptr, 0, 0, nullptr);
      continue;
    }
    const bool expected =
        std::all_of(is_reachable.begin(), is_reachable.end(), [](bool b) { return b; });
    CHECK(is_gapless(sample.view()) == expected);
    gapless += expected ? 1 : 0;
    const std::vector<std::byte> source = random.bytes(is_reachable.size());
    check_window(sample, is_reachable, source, 0, source.size());
    for (int window = 0; window < 3; ++window) {
      const std::size_t begin = random.below(source.size() + 1);
      const std::size_t end = begin + random.below(source.size() - begin + 1);
      check_window(sample, is_reachable, source, begin, end);
    }
  }
  CHECK(gapless > 500 && gapless < 5500 && empty > 100);  // the samples are of all kinds
}

TEST(strided_copies_every_window) {
  Random random(11);
  for (int samples = 0; samples < 250;) {
    const Sample sample = make_sample(random, 4, 3, 5);
    const std::vector<bool> is_reachable = enumerate(sample);
    if (is_reachable.size() > 48) continue;
    ++samples;
    const std::vector<std::byte> source = random.bytes(is_reachable.size());
    for (std::size_t begin = 0; begin <= source.size(); ++begin) {
      for (std::size_t end = begin; end <= source.size(); ++end)
        check_window(sample, is_reachable, source, begin, end);
    }
  }
}

TEST(strided_copies_every_window_in_row_major_order) {
  Random random(12);
  int contiguous = 0;
  for (int samples = 0; samples < 600;) {
    const Sample sample = make_sample(random, 4, 4, 9);
    const std::vector<std::byte> source = random.bytes(enumerate(sample).size());
    const std::vector<std::byte> packed = pack(sample, source);
    if (packed.size() > 100) continue;
    ++samples;
    CHECK(packed.empty() || row_major_bytes(sample.view()) == packed.size());
    if (!packed.empty() && is_contiguous(sample.view())) {
      ++contiguous;
      CHECK(packed == source);
    }
    for (std::size_t begin = 0; begin <= packed.size(); ++begin) {
      for (std::size_t end = begin; end <= packed.size(); ++end) {
        std::vector<std::byte> target(end - begin, kUntouched);
        copy_row_major(sample.view(), source.data(), begin, end, target.data());
        CHECK(std::equal(target.begin(), target.end(), packed.begin() + std::ptrdiff_t(begin)));
      }
    }
  }
  CHECK(contiguous > 50 && contiguous < 550);
}

// A window costs what it holds, however vast the view.
TEST(strided_copies_a_window_of_a_vast_view) {
  const Sample sample{4, {1 << 20, 1 << 20, 5, 3}, {1 << 24, 16, 3, 1}};
  std::vector<std::byte> source(64, std::byte{1});
  std::vector<std::byte> target(64, kUntouched);
  copy_reachable(sample.view(), source.data(), 0, 64, target.data());
  CHECK(std::count(target.begin(), target.end(), kUntouched) == 4);  // 15 of 16 items
  CHECK(!is_gapless(sample.view()));
}

std::optional<std::uint64_t> extent_of(std::uint64_t item_bytes, Dims shape, Dims stride) {
  return extent_bytes(Sample{item_bytes, std::move(shape), std::move(stride)}.view());
}

TEST(strided_extents_of_simple_views) {
  CHECK(extent_of(4, {}, {}) == 4U);
  CHECK(extent_of(4, {0}, {1}) == 0U);
  CHECK(extent_of(4, {3}, {1}) == 12U);
  CHECK(extent_of(4, {3}, {0}) == 4U);
  CHECK(extent_of(4, {3}, {5}) == 44U);
  CHECK(extent_of(4, {1}, {INT64_MAX}) == 4U);  // a stride that takes no step
  CHECK(extent_of(4, {0, 7}, {INT64_MAX, 1}) == 0U);
}

TEST(strided_extents_are_refused_when_negative) {
  for (const std::int64_t negative : {std::int64_t{-1}, INT64_MIN}) {
    CHECK(!extent_of(1, {negative}, {1}));
    CHECK(!extent_of(1, {2}, {negative}));
    CHECK(!extent_of(1, {1}, {negative}));
    CHECK(!extent_of(1, {0}, {negative}));
    CHECK(!extent_of(1, {0, negative}, {1, 1}));
  }
}

TEST(strided_extents_are_refused_when_they_overflow) {
  constexpr std::int64_t max = INT64_MAX;
  constexpr std::int64_t half = std::int64_t{1} << 32U;
  CHECK(extent_of(1, {max}, {1}) == std::uint64_t{max});
  CHECK(extent_of(1, {max}, {0}) == 1U);
  CHECK(!extent_of(2, {max}, {1}));
  CHECK(!extent_of(2, {max}, {0}));  // the items alone are too many bytes
  CHECK(extent_of(2, {max / 2}, {1}) == std::uint64_t{max} - 1);
  CHECK(!extent_of(2, {max / 2 + 1}, {1}));
  CHECK(!extent_of(1, {half, half}, {0, 0}));
  CHECK(!extent_of(1, {half, half}, {half, 1}));
  CHECK(
      !extent_of(1, {0, half, half}, {1, 0, 0}));  // sizes other than 0 are multiplied all the same
  CHECK(!extent_of(1, {3}, {max}));
  CHECK(!extent_of(1, {2}, {max}));  // reaches byte max, so it has max + 1
  CHECK(extent_of(1, {2}, {max - 1}) == std::uint64_t{max});
  CHECK(!extent_of(1, {2, 2}, {max / 2 + 1, max / 2 + 1}));
  CHECK(!extent_of(1, {2, 2, 2}, {max - 1, max - 1, max - 1}));  // 64 bits wrap to fewer than max
  CHECK(!extent_of(16, {2}, {max / 16}));
  CHECK(extent_of(16, {2}, {max / 16 - 1}) == std::uint64_t{max} / 16 * 16);
  CHECK(!extent_of(1, Dims(64, 2), Dims(64, 0)));
  CHECK(extent_of(1, Dims(62, 2), Dims(62, 0)) == 1U);
}

}  // namespace
}  // namespace fastsd::test
