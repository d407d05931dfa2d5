// What the parts that use Python's C API share.
#pragma once

#include <Python.h>

#include <utility>

namespace fastsd {

// A reference that is owned; empty if what made it failed. Needs the GIL.
class Reference {
 public:
  explicit Reference(PyObject* object = nullptr) : object_(object) {}
  Reference(const Reference&) = delete;
  Reference& operator=(const Reference&) = delete;
  ~Reference() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }
  void reset(PyObject* object) { Py_XDECREF(std::exchange(object_, object)); }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_;
};

// Keeps the garbage collector from walking thousands of objects that have only just been made.
class CollectionPause {
 public:
  CollectionPause() : was_enabled_(PyGC_Disable() != 0) {}
  CollectionPause(const CollectionPause&) = delete;
  CollectionPause& operator=(const CollectionPause&) = delete;
  ~CollectionPause() {
    if (was_enabled_) PyGC_Enable();
  }

 private:
  bool was_enabled_;
};

}  // namespace fastsd
