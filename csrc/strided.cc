#include "strided.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace fastsd {
namespace {

// A dimension that moves: more than one element, and a stride that is not 0.
struct Step {
  std::uint64_t count;
  std::uint64_t bytes;
};

// The moving dimensions, widest stride first.
std::vector<Step> steps_of(const Strided& view) {
  std::vector<Step> steps;
  for (std::uint32_t d = 0; d < view.rank; ++d) {
    if (view.shape[d] > 1 && view.stride[d] > 0) {
      steps.push_back({static_cast<std::uint64_t>(view.shape[d]),
                       static_cast<std::uint64_t>(view.stride[d]) * view.item_bytes});
    }
  }
  std::sort(steps.begin(), steps.end(),
            [](const Step& a, const Step& b) { return a.bytes > b.bytes; });
  return steps;
}

// One walk over a view's runs of bytes, entering only those parts that meet the window.
struct Walk {
  std::vector<Step> steps;
  std::vector<std::uint64_t> inner_bytes;  // the extent of one element of step i
  std::uint64_t begin;
  std::uint64_t end;
  const std::byte* source;
  std::byte* target;

  void visit(std::size_t depth, std::uint64_t base) const {
    if (depth == steps.size()) {
      const std::uint64_t from = std::max(base, begin);
      const std::uint64_t to = std::min(base + inner_bytes[depth], end);
      if (from < to) std::memcpy(target + (from - begin), source + from, to - from);
      return;
    }
    const Step& step = steps[depth];
    const std::uint64_t inner = inner_bytes[depth + 1];
    const std::uint64_t needed = base + inner <= begin ? begin - base - inner + 1 : 0;
    const std::uint64_t first = (needed + step.bytes - 1) / step.bytes;
    for (std::uint64_t i = first; i < step.count && base + i * step.bytes < end; ++i) {
      visit(depth + 1, base + i * step.bytes);
    }
  }
};

// A dimension in row-major order: `bytes` apart in the source, `packed_bytes` in the target.
struct Dimension {
  std::uint64_t count;
  std::uint64_t bytes;
  std::uint64_t packed_bytes;
};

// The dimensions, outermost first, without those of one element; those that one step walks through
// are one.
std::vector<Dimension> dimensions_of(const Strided& view) {
  std::vector<Dimension> dimensions;  // innermost first
  std::uint64_t packed_bytes = view.item_bytes;
  for (std::uint32_t d = view.rank; d-- > 0;) {
    const auto count = static_cast<std::uint64_t>(view.shape[d]);
    const std::uint64_t bytes = static_cast<std::uint64_t>(view.stride[d]) * view.item_bytes;
    if (count == 1) continue;
    if (!dimensions.empty() && bytes == dimensions.back().count * dimensions.back().bytes) {
      dimensions.back().count *= count;
    } else {
      dimensions.push_back({count, bytes, packed_bytes});
    }
    packed_bytes *= count;
  }
  std::reverse(dimensions.begin(), dimensions.end());
  return dimensions;
}

template <std::size_t kBytes>
void copy_items(const std::byte* source, std::uint64_t step, std::uint64_t count,
                std::byte* target) {
  for (std::uint64_t i = 0; i < count; ++i)
    std::memcpy(target + i * kBytes, source + i * step, kBytes);
}

void copy_items(const std::byte* source, std::uint64_t step, std::uint64_t count,
                std::uint64_t item_bytes, std::byte* target) {
  switch (item_bytes) {
    case 1:
      return copy_items<1>(source, step, count, target);
    case 2:
      return copy_items<2>(source, step, count, target);
    case 4:
      return copy_items<4>(source, step, count, target);
    case 8:
      return copy_items<8>(source, step, count, target);
    default:
      for (std::uint64_t i = 0; i < count; ++i)
        std::memcpy(target + i * item_bytes, source + i * step, item_bytes);
  }
}

// One walk in row-major order, entering only those parts that meet the window.
struct RowMajorWalk {
  std::vector<Dimension> dimensions;
  std::uint64_t run_bytes;  // of the innermost elements that lie one after the other
  std::uint64_t begin;
  std::uint64_t end;
  std::byte* target;

  // `place`: that of the first element in row-major order.
  void visit(std::size_t depth, const std::byte* source, std::uint64_t place) const {
    if (depth == dimensions.size()) {
      const std::uint64_t from = std::max(place, begin);
      const std::uint64_t to = std::min(place + run_bytes, end);
      if (from < to) std::memcpy(target + (from - begin), source + (from - place), to - from);
      return;
    }
    const Dimension& dimension = dimensions[depth];
    const std::uint64_t packed = dimension.packed_bytes;
    std::uint64_t i = begin > place ? (begin - place) / packed : 0;
    if (depth + 1 == dimensions.size()) {
      if (begin > place + i * packed) {  // within an item
        visit(depth + 1, source + i * dimension.bytes, place + i * packed);
        ++i;
      }
      const std::uint64_t last =
          end > place ? std::min(dimension.count, (end - place) / packed) : 0;
      if (i < last) {
        copy_items(source + i * dimension.bytes, dimension.bytes, last - i, packed,
                   target + (place + i * packed - begin));
        i = last;
      }
    }
    for (; i < dimension.count && place + i * packed < end; ++i)
      visit(depth + 1, source + i * dimension.bytes, place + i * packed);
  }
};

}  // namespace

bool is_contiguous(const Strided& view) {
  std::int64_t expected = 1;
  for (std::uint32_t d = view.rank; d-- > 0;) {
    if (view.shape[d] == 1) continue;
    if (view.stride[d] != expected) return false;
    expected *= view.shape[d];
  }
  return true;
}

std::uint64_t row_major_bytes(const Strided& view) {
  std::uint64_t bytes = view.item_bytes;
  for (std::uint32_t d = 0; d < view.rank; ++d) bytes *= static_cast<std::uint64_t>(view.shape[d]);
  return bytes;
}

std::optional<std::uint64_t> extent_bytes(const Strided& view) {
  std::int64_t numel = 1;
  std::int64_t last = 0;  // the last element's distance from the first, in items
  bool is_empty = false;
  bool overflows = false;
  for (std::uint32_t d = 0; d < view.rank; ++d) {
    const std::int64_t count = view.shape[d];
    std::int64_t steps = 0;
    if (count < 0 || view.stride[d] < 0) return std::nullopt;
    is_empty = is_empty || count == 0;
    if (count <= 1) continue;
    overflows |= __builtin_mul_overflow(numel, count, &numel);
    overflows |= __builtin_mul_overflow(count - 1, view.stride[d], &steps);
    overflows |= __builtin_add_overflow(last, steps, &last);
  }
  const auto item_bytes = static_cast<std::int64_t>(view.item_bytes);
  std::int64_t bytes = 0;
  overflows |= __builtin_mul_overflow(numel, item_bytes, &numel);
  overflows |= __builtin_add_overflow(last, 1, &last);
  overflows |= __builtin_mul_overflow(last, item_bytes, &bytes);
  if (overflows) return std::nullopt;
  return is_empty ? 0 : static_cast<std::uint64_t>(bytes);
}

bool is_gapless(const Strided& view) {
  if (is_contiguous(view)) return true;
  const std::vector<Step> steps = steps_of(view);
  std::uint64_t covered = view.item_bytes;
  for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
    if (step->bytes > covered) return false;
    covered += (step->count - 1) * step->bytes;
  }
  return true;
}

void copy_reachable(const Strided& view, const std::byte* source, std::uint64_t begin,
                    std::uint64_t end, std::byte* target) {
  Walk walk{steps_of(view), {}, begin, end, source, target};
  // Steps that touch or overlap the bytes within them make one run.
  std::uint64_t run = view.item_bytes;
  while (!walk.steps.empty() && walk.steps.back().bytes <= run) {
    run += (walk.steps.back().count - 1) * walk.steps.back().bytes;
    walk.steps.pop_back();
  }
  walk.inner_bytes.assign(walk.steps.size() + 1, run);
  for (std::size_t i = walk.steps.size(); i-- > 0;) {
    walk.inner_bytes[i] = walk.inner_bytes[i + 1] + (walk.steps[i].count - 1) * walk.steps[i].bytes;
  }
  if (*extent_bytes(view) > 0) walk.visit(0, 0);
}

void copy_row_major(const Strided& view, const std::byte* source, std::uint64_t begin,
                    std::uint64_t end, std::byte* target) {
  if (begin == end) return;
  RowMajorWalk walk{dimensions_of(view), view.item_bytes, begin, end, target};
  if (!walk.dimensions.empty() && walk.dimensions.back().bytes == view.item_bytes) {
    walk.run_bytes *= walk.dimensions.back().count;
    walk.dimensions.pop_back();
  }
  walk.visit(0, source, 0);
}

}  // namespace fastsd
