#include "pickle_graph.h"

#include <algorithm>
#include <cstring>

namespace fastsd {

double to_float(const Value& value) {
  double number = 0;
  std::memcpy(&number, &value.number, sizeof number);
  return number;
}

std::uint32_t Graph::add_container(const Value* values, std::size_t count) {
  Container container;
  container.first = static_cast<std::uint32_t>(items.size());
  container.count = container.capacity = static_cast<std::uint32_t>(count);
  items.insert(items.end(), values, values + count);
  containers.push_back(container);
  return static_cast<std::uint32_t>(containers.size() - 1);
}

void Graph::append(Container& container, const Value* values, std::size_t count) {
  const std::size_t needed = container.count + count;
  if (needed > container.capacity) {
    std::size_t capacity = needed;
    if (container.first + container.capacity != items.size()) {
      // Twice as large at the end, so that each value is moved a few times at most.
      capacity = std::max<std::size_t>(needed, 2 * std::size_t{container.count});
      const auto moved = static_cast<std::uint32_t>(items.size());
      items.resize(moved + capacity);
      std::copy_n(items.begin() + container.first, container.count, items.begin() + moved);
      container.first = moved;
    }
    items.resize(container.first + capacity);
    container.capacity = static_cast<std::uint32_t>(capacity);
  }
  std::copy_n(values, count, items.begin() + container.first + container.count);
  container.count = static_cast<std::uint32_t>(needed);
}

}  // namespace fastsd
