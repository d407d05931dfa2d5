// JSON (RFC 8259) to Python objects: the same ones that Python's json makes, several times as fast.
#pragma once

#include <Python.h>

namespace fastsd {

// The value of a text, which is `bytes` in UTF-8. NaN, Infinity, names that occur twice in an
// object, integers of more than 4300 digits and nesting deeper than 2000 are refused. Takes time
// and memory in proportion to the text.
//
// An object with one member whose name starts with "$" is a node (docs/FORMAT.md, "JSON sections"),
// innermost first: `{"$tensor": n}` is item n of the list `tensors`, any other is what
// `decode(name, value)` returns. With `decode` None there are no nodes, only objects.
//
// Needs the GIL. Returns a new reference, or nullptr with an exception set: ValueError or
// RecursionError, with the place in bytes, or what `decode` has raised.
PyObject* parse_json(PyObject* text, PyObject* tensors, PyObject* decode);

}  // namespace fastsd
