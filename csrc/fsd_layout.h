// The layout of .fsd (docs/FORMAT.md): a header, then storages at multiples of 256 bytes.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "layout.h"

namespace fastsd {

class FsdLayout final : public Layout {
 public:
  using Sections = std::vector<std::pair<Section, std::string>>;

  // REQUIRES: plan.finish() has been called. Throws kLimit.
  FsdLayout(Plan&& plan, std::uint32_t flags, std::vector<std::string> devices, Sections sections);

  const Checksum* checksum(bool is_wanted) const override { return is_wanted ? &kCrc32c : nullptr; }
  std::string encode_head() const override;

 private:
  HeaderContent content() const { return {plan().index(), flags_, devices_, sections_}; }

  std::uint32_t flags_;
  std::vector<std::string> devices_;
  Sections sections_;
};

}  // namespace fastsd
