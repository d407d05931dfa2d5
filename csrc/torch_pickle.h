// What torch.save's pickle streams hold, in the terms of the container: nothing is imported or
// executed, and no Python object is made.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "format.h"

namespace fastsd {

struct PickledObject {
  // The tensors that dictionaries, lists, tuples and attributes of OrderedDicts lead to, by name,
  // over the storages given, which have their devices. Storages of meta tensors follow those given.
  // With `is_plain` also the section kTree or, for a flat dictionary, kStateMetadata or none, and
  // the flag kFileRootIsOrderedDict; names are then those that save() would give them, but for keys
  // other than str, int, bool and None, which are as in JSON. Without it, if there is a section
  // kTree, its nodes `{"$opaque": null}` stand for what is not plain, and all else is as it was.
  // `file_bytes` is left to the caller.
  Tables tables;
  // Whether the object is what a tree can hold: loading `tables` gives what torch.load gives. The
  // stream then refers to nothing that torch's restricted unpickler refuses; but that one knows
  // no opcodes of protocols above 2.
  bool is_plain = false;
  // "module.name" of what the stream refers to that is not known to make plain values: sorted, each
  // once.
  std::vector<std::string> globals;
};

// `by_key`: the storages as tensors of uint8 of rank 1, whole, named by key; several may lie in one
// storage record. Other tensors of it, and views that do not fit their storage or disagree with its
// size, are left out, and the object is not plain then. A stream that is malformed, or would give
// tables out of proportion to its size, gives no tensors.
//
// Takes time and memory in proportion to the stream and to `by_key`.
PickledObject read_torch_pickle(std::string_view stream, const Index& by_key);

}  // namespace fastsd
