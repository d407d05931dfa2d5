// Pickle streams that no unpickler should be given, told from their opcodes alone.
#pragma once

#include <string_view>

namespace fastsd {

// Hashing a tuple takes a frame of the C stack a level, and follows every path to what is in it: a
// few thousand bytes of nested tuples end the process, a few dozen that refer to one another keep
// it busy for ever. torch's restricted unpickler takes both for keys of dictionaries.
//
// A call of a class of torch's, or of bytearray, takes as much memory as a number in the stream
// says, and what tensors have there is whatever was in it before.
//
// Returns what is wrong with a stream that has such tuples or calls, else nullptr. What this walk
// does not know, or is cut short, is left to that unpickler, which knows no other opcodes either.
// Takes time in proportion to the stream.
const char* find_bad_nesting(std::string_view stream);

}  // namespace fastsd
