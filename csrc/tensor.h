// torch.Tensor objects from memory and back, through DLPack's exchange table: no torch at build
// time, no libtorch linked, and a third of a microsecond a tensor (docs/ARCHITECTURE.md,
// "Tensors").
//
// All functions need the GIL. Those that return a PyObject* return a new reference, or nullptr with
// a Python exception set.
#pragma once

#include <Python.h>

#include <cstdint>
#include <string>
#include <vector>

#include "dtype.h"
#include "file.h"
#include "format.h"

namespace fastsd {

// Called once, before anything else. `uint8` and `int8` are torch's dtypes, under whose DLPack
// types torch exports narrower integers too; `from_dlpack` is for an older torch, for which
// `exchange` is nullptr. Returns false with a Python exception set.
bool set_torch(PyObject* tensor_type, PyObject* uint8, PyObject* int8, PyObject* from_dlpack,
               const dlpack::ExchangeApi* exchange);

// The exchange table in torch.Tensor.__dlpack_c_exchange_api__; nullptr, without an exception, if
// it has a version that is not known here.
const dlpack::ExchangeApi* find_exchange(PyObject* capsule);

// A tensor over memory, which lives as long as the tensor. The tensor has a torch storage of its
// own. REQUIRES: dtype.in_dlpack, and the view fits the memory.
PyObject* make_tensor(const Bytes& bytes, const DTypeInfo& dtype, std::uint32_t rank,
                      const std::int64_t* shape, const std::int64_t* stride);

// A plain tensor: exactly torch.Tensor, strided, in CPU memory, of a DLPack dtype, with no flag
// that a file records. Everything else is for Python to describe.
struct PlainTensor {
  const std::byte* data;
  const DTypeInfo* dtype;
  std::uint32_t rank;
  const std::int64_t* shape;  // these two live as long as the tensor
  const std::int64_t* stride;
};

// Returns whether `tensor` is plain; never leaves an exception set. `has_refused`, false before the
// first of many tensors, is carried from one to the next: DLPack takes a millisecond to refuse one,
// as it does with meta tensors, so that after the first they are asked where they are.
bool describe_plain(PyObject* tensor, bool* has_refused, PlainTensor* plain);

// What load() starts from: tensors by name, in file order.
struct LoadedTensors {
  PyObject* by_name = nullptr;  // dict, or OrderedDict; None for each tensor listed in `rest`
  PyObject* rest = nullptr;   // list of tensor numbers that need more than DLPack: those that share
                              // a storage, carry flags, are meta, or have a dtype that DLPack lacks
  PyObject* bases = nullptr;  // dict: storage number -> uint8 tensor of all its bytes, for the rest
};

// Whether a tensor stays in host memory, wherever others go.
inline bool is_host_only(const TensorRecord& tensor) {
  return (tensor.flags & kTensorIsArray) != 0;
}

// `numbers`: of the tensors to make. `bytes`: of each storage that they lie in, by number, unless
// it is marked as placed: then the tensors in it, but for those that stay in host memory, are among
// the rest without a base. `is_ordered`: makes an OrderedDict. `is_all_rest`: makes no tensor but
// the bases. Returns false with a Python exception set.
bool load_tensors(const Index& index, const std::vector<std::size_t>& numbers,
                  const std::vector<Bytes>& bytes, const std::vector<bool>& is_placed,
                  bool is_ordered, bool is_all_rest, LoadedTensors* loaded);

// The storages of a pickle section: a dict from key to all bytes of the storage, as a uint8 tensor.
// `by_key`: the container's index; what is in it and is no such storage is left out.
PyObject* load_storages(const Index& by_key, const std::vector<Bytes>& bytes);

}  // namespace fastsd
