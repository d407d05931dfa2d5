// Which bytes a strided view can reach, and copying no others: to the same places, or in row-major
// order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

namespace fastsd {

// A view of memory as torch and DLPack describe it. Strides count items and are never negative.
struct Strided {
  std::uint64_t item_bytes;
  std::uint32_t rank;
  const std::int64_t* shape;
  const std::int64_t* stride;
};

// Bytes from the first reachable one to past the last; 0 for a view without elements. Nothing: a
// size or stride is negative, or a product does not fit 63 bits.
std::optional<std::uint64_t> extent_bytes(const Strided& view);

// Bytes of the elements alone, without gaps between them. REQUIRES: extent_bytes(view) has a value.
std::uint64_t row_major_bytes(const Strided& view);

// Whether the elements lie one after the other in row-major order.
bool is_contiguous(const Strided& view);

// Whether every byte of the extent is reachable. REQUIRES: extent_bytes(view) has a value > 0.
bool is_gapless(const Strided& view);

// Copies the reachable bytes among [begin, end) of the extent, which starts at `source`, to the
// same places of `target`, which stands for `begin`. Other bytes of `target` stay as they are.
// REQUIRES: extent_bytes(view) has a value, and end does not exceed it.
void copy_reachable(const Strided& view, const std::byte* source, std::uint64_t begin,
                    std::uint64_t end, std::byte* target);

// Copies the bytes [begin, end) of the elements in row-major order, one after the other, from an
// extent that starts at `source`. REQUIRES: extent_bytes(view) has a value, and end does not exceed
// row_major_bytes(view).
void copy_row_major(const Strided& view, const std::byte* source, std::uint64_t begin,
                    std::uint64_t end, std::byte* target);

}  // namespace fastsd
