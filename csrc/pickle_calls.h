// What a torch pickle stream's names and calls stand for, of those that are known to make plain
// values. Nothing is imported or called.
#pragma once

#include <optional>
#include <string_view>
#include <vector>

#include "format.h"
#include "pickle_graph.h"

namespace fastsd {

// What is not known, or given other arguments than torch.save writes, makes an opaque value.
class Calls {
 public:
  // `by_key`: see read_torch_pickle().
  Calls(Graph& graph, const Index& by_key);

  // What a module has under a name.
  Value find_global(std::string_view module, std::string_view name);

  // A function or class called with arguments.
  Value call(const Value& function, const Value& arguments);

  // The state that an object is given after it has been made.
  void set_state(const Value& object, const Value& state);

  // What a persistent id stands for.
  Value find_storage(const Value& id);

 private:
  struct Key {
    std::string_view name;
    std::uint32_t tensor;
    std::uint16_t dtype;        // of the first id that names it; 0: none yet
    std::string_view location;  // likewise
    bool is_usable;             // on a device that a file can name
  };

  bool may_read(std::uint64_t bytes);
  Value encode_bytes(const Value* arguments, std::size_t count);
  Value make_bytearray(const Value* arguments, std::size_t count);
  Value make_set(const Value* arguments, std::size_t count);
  Value make_size(const Value* arguments, std::size_t count);
  Value make_device(const Value* arguments, std::size_t count);
  Value find_layout(const Value* arguments, std::size_t count);
  Value rebuild_tensor(const Value* arguments, std::size_t count);
  Value rebuild_tensor_with_flags(const Value* arguments, std::size_t count, bool has_dtype);
  Value rebuild_parameter(const Value* arguments, std::size_t count);
  Value rebuild_meta_tensor(const Value* arguments, std::size_t count);

  std::optional<TensorView> view_storage(const Value* arguments, std::uint16_t dtype) const;
  std::optional<std::uint64_t> set_dims(TensorView& view, const Value& shape,
                                        const Value& stride) const;
  static bool set_requires_grad(TensorView& view, const Value& value);
  bool set_bits(TensorView& view, const Value& bits) const;
  bool take_hooks(const Value& hooks);
  Value add_tensor(const TensorView& view);
  bool is_text(const Value& value, std::string_view text) const;
  static bool is_plain_text(const Value& value);
  bool holds(const Key& key, std::uint16_t dtype, std::uint64_t numel) const;
  std::optional<std::size_t> find_slot(std::string_view name) const;
  Key* find_key(std::string_view name);
  bool set_device(std::uint32_t storage, std::string_view name);

  Graph& graph_;
  Index by_key_;
  std::uint64_t bytes_left_;          // of texts, each counted as often as it is used
  std::vector<Key> keys_;             // by tensor
  std::vector<std::uint32_t> slots_;  // 1 + a number of keys_; 0: free
};

}  // namespace fastsd
