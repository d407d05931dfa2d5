#include "fsd_layout.h"

namespace fastsd {

FsdLayout::FsdLayout(Plan&& finished, std::uint32_t flags, std::vector<std::string> devices,
                     Sections sections)
    : Layout(std::move(finished)),
      flags_(flags),
      devices_(std::move(devices)),
      sections_(std::move(sections)) {
  const std::uint64_t header_bytes = encoded_header_bytes(content());
  const std::uint64_t file_bytes = place_storages(plan().storages(), header_bytes);
  set_places(header_bytes, file_bytes, file_bytes);
}

std::string FsdLayout::encode_head() const { return encode_header(content()); }

}  // namespace fastsd
