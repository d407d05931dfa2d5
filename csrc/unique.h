// Names that must differ.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string_view>
#include <vector>

namespace fastsd {

// A name that occurs twice among name_of(0) ... name_of(count - 1); nothing: all differ. Open
// addressing, with few probes on honest names. Names made to collide fall back to sorting, so the
// time stays below O(n log n) whatever they are. REQUIRES: count < 2^32.
template <class NameOf>
std::optional<std::string_view> find_repeated(std::size_t count, NameOf name_of) {
  constexpr std::size_t probes_max = 64;
  std::size_t slots = 16;
  while (slots < 2 * count) slots *= 2;
  std::vector<std::uint32_t> table(slots);  // the name's number + 1; 0: free
  for (std::uint32_t i = 0; i < count; ++i) {
    const std::string_view name = name_of(i);
    std::size_t slot = std::hash<std::string_view>{}(name) & (slots - 1);
    std::size_t probes = 0;
    for (; table[slot] != 0 && probes < probes_max; ++probes) {
      if (name_of(table[slot] - 1) == name) return name;
      slot = (slot + 1) & (slots - 1);
    }
    if (probes == probes_max) {
      std::vector<std::string_view> names;
      names.reserve(count);
      for (std::uint32_t j = 0; j < count; ++j) names.push_back(name_of(j));
      std::sort(names.begin(), names.end());
      const auto repeated = std::adjacent_find(names.begin(), names.end());
      return repeated == names.end() ? std::nullopt : std::optional(*repeated);
    }
    table[slot] = i + 1;
  }
  return std::nullopt;
}

}  // namespace fastsd
