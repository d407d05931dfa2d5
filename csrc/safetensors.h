// The safetensors format: a header in JSON, then the tensors' bytes without gaps.
#pragma once

#include "file.h"
#include "format.h"

namespace fastsd {

// More is refused, as safetensors itself does.
constexpr std::uint64_t kSafetensorsHeaderBytesMax = 100'000'000;

// The tensors of a file, in the order of its header; `__metadata__`, unless it is null, becomes the
// section kMetadata. Each tensor has a storage of its own, contiguous, not aligned to anything, and
// possibly empty. Takes time and memory in proportion to the header.
//
// What is refused, always naming the tensor: what safetensors refuses (anything but one name for
// every byte behind the header, and every byte named once), names that occur twice, of which
// safetensors takes the last, tensors written as arrays rather than objects, and sizes beyond the
// limits of the container. Unknown members of a tensor are ignored. kVersion: a dtype unknown here.
// kUnsupported: one that torch lacks. kTruncated: the file ends before what its header promises.
Tables read_safetensors(const File& file);

}  // namespace fastsd
