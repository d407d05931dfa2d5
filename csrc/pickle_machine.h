// Pickle's stack machine (protocols 2 to 5), which here makes no objects.
#pragma once

#include <optional>
#include <string_view>

#include "format.h"
#include "pickle_graph.h"

namespace fastsd {

// The values that a stream describes. Nothing: it is malformed, or has an opcode that torch.save
// does not write. Takes time and memory in proportion to the stream. `by_key`: see
// read_torch_pickle().
std::optional<Graph> read_pickle(std::string_view stream, const Index& by_key);

}  // namespace fastsd
