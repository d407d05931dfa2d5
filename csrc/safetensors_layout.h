// The layout of safetensors: the length of a JSON header, the header, padded with spaces to a
// multiple of 8 bytes, and the tensors without gaps.
#pragma once

#include <string>

#include "layout.h"

namespace fastsd {

// What safetensors calls a dtype; nullptr: it has none for it.
const char* safetensors_dtype(DType dtype);

class SafetensorsLayout final : public Layout {
 public:
  // `metadata`: the JSON of `__metadata__`, or nothing. Of tensors that share a storage only the
  // first is in the header; tensors are there in the plan's order. REQUIRES:
  // plan.finish_apart_by_width() has been called. Throws kUnsupported for a dtype that has no name
  // there and for a tensor without data, kLimit for a header that safetensors would refuse.
  SafetensorsLayout(Plan&& plan, const std::string& metadata);

  const Checksum* checksum(bool /*is_wanted*/) const override { return nullptr; }
  std::string encode_head() const override { return head_; }

 private:
  std::string head_;
};

// The number in safetensors' own code.
constexpr std::uint64_t kSafetensorsHeaderBytesMax = 100'000'000;

}  // namespace fastsd
