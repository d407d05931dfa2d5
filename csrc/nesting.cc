#include "nesting.h"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <unordered_map>
#include <vector>

namespace fastsd {
namespace {

constexpr std::uint64_t kDepthMax = 1000;  // tuples in tuples; Python itself pickles no more

// How many tuples hashing one may visit, each as often as it is referred to, beyond those in the
// stream; and the same for all keys of dictionaries together.
constexpr std::uint64_t kCostMax = 100'000;
constexpr std::uint64_t kKeysCostMax = 10'000'000;

// What a value is, as far as calls of it, or with it, take memory.
enum class Role : std::uint8_t {
  kOther,
  kNumber,
  kBytes,    // bytearray, which takes as many bytes as a number says
  kMemory,   // a class of tensors or storages, which takes what it is told to, and fills nothing
  kRebuild,  // what calls the first of its arguments
};

// A value on the stack: zeros for what hashing does not look into.
struct Value {
  std::uint64_t depth = 0;
  std::uint64_t cost = 0;
  std::size_t container = 0;  // number of the one that it is, or that a tuple has first; 0 for none
  Role role = Role::kOther;
  Role first = Role::kOther;  // of a tuple: that of its first element
  bool has_number = false;    // of a tuple: directly in it
};

// torch pickles such classes as arguments, and never calls of them.
Role role_of(std::string_view module, std::string_view name) {
  const auto ends_with = [&](std::string_view end) {
    return name.size() >= end.size() && name.substr(name.size() - end.size()) == end;
  };
  if (module == "builtins" || module == "__builtin__")
    return name == "bytearray" ? Role::kBytes : Role::kOther;
  if (module == "torch._tensor" && name == "_rebuild_from_type_v2") return Role::kRebuild;
  for (const std::string_view own :
       {"torch", "torch.cuda", "torch.sparse", "torch.cuda.sparse", "torch.storage"}) {
    if (module == own && (ends_with("Tensor") || ends_with("Storage"))) return Role::kMemory;
  }
  return Role::kOther;
}

// A list, dictionary or set: what hashing its elements, or keys, costs, as a set or a dictionary
// made from it does. Of pairs in a list the first is hashed.
struct Container {
  std::uint64_t cost = 0;
  std::uint64_t inner = 0;  // containers among the elements, whatever becomes of them later
};

class Walk {
 public:
  explicit Walk(std::string_view stream) : stream_(stream) {}

  const char* run() {
    while (problem_ == nullptr && !is_over_ && at_ < stream_.size()) {
      const auto op = static_cast<unsigned char>(stream_[at_++]);
      if (!constant(op) && !memo(op) && !tuple(op)) effect(op);
    }
    return problem_;
  }

 private:
  // Opcodes that push something without looking at the stack.
  bool constant(unsigned char op) {
    switch (op) {
      case 'N':
      case ')':
      case 0x88:  // NEWTRUE
      case 0x89:  // NEWFALSE
        return push_constant(0);
      case ']':
      case '}':
      case 0x8F:  // EMPTY_SET
        return push_container();
      case 'K':
        return push_constant(1, Role::kNumber);
      case 'M':
        return push_constant(2, Role::kNumber);
      case 'J':
        return push_constant(4, Role::kNumber);
      case 'G':
        return push_constant(8);
      case 'X':  // BINUNICODE
        return push_constant(read_number(4));
      case 'U':  // SHORT_BINSTRING
        return push_constant(read_number(1));
      case 0x8A:  // LONG1
        return push_constant(read_number(1), Role::kNumber);
      case 'c': {  // GLOBAL
        const std::string_view module = read_line();
        return push_constant(0, role_of(module, read_line()));
      }
      default:
        return false;
    }
  }

  bool memo(unsigned char op) {
    switch (op) {
      case 'q':
        return put(read_number(1));
      case 'r':
        return put(read_number(4));
      case 'h':
        return get(read_number(1));
      case 'j':
        return get(read_number(4));
      default:
        return false;
    }
  }

  bool tuple(unsigned char op) {
    switch (op) {
      case 't':
        push_tuple(take_mark());
        return true;
      case 0x85:
      case 0x86:
      case 0x87: {
        const std::size_t count = op - 0x84U;
        if (stack_.size() - base() < count)
          is_over_ = true;
        else
          push_tuple(stack_.size() - count);
        return true;
      }
      default:
        return false;
    }
  }

  void effect(unsigned char op) {
    switch (op) {
      case 0x80:  // PROTO
        skip(1);
        break;
      case '(':
        marks_.push_back(stack_.size());
        break;
      case 'R':
      case 0x81: {  // NEWOBJ: a named tuple, for one, is hashed as the tuple of its arguments
        Value made = pop();
        check_call(pop().role, made);
        const Container hashed = made.container == 0 ? Container{} : containers_[made.container];
        use_keys(made.cost + hashed.cost + hashed.inner * element_cost_max_);
        if (made.container == 0) made.container = add_container();
        stack_.push_back({made.depth, made.cost, made.container});
        break;
      }
      case 'b':
        pop();
        break;
      case 'a':
        add_elements(above(1));
        break;
      case 'e':
        add_elements(take_mark());
        break;
      case 's':
        add_keys(above(2));
        break;
      case 'u':
        add_keys(take_mark());
        break;
      case 'Q':  // BINPERSID: a storage
        pop();
        stack_.emplace_back();
        break;
      default:  // the end, or unknown
        is_over_ = true;
    }
  }

  // ---- The stream ----

  void skip(std::uint64_t bytes) {
    if (bytes > stream_.size() - at_)
      is_over_ = true;
    else
      at_ += bytes;
  }

  std::uint64_t read_number(std::size_t bytes) {
    const std::size_t begin = at_;
    skip(bytes);
    std::uint64_t number = 0;
    for (std::size_t i = begin; i < at_; ++i)
      number |= std::uint64_t{static_cast<unsigned char>(stream_[i])} << 8U * (i - begin);
    return number;
  }

  std::string_view read_line() {
    const std::size_t begin = at_;
    const std::size_t end = stream_.find('\n', at_);
    if (end == std::string_view::npos)
      is_over_ = true;
    else
      at_ = end + 1;
    return stream_.substr(begin, end - begin);
  }

  // ---- The stack. Where there is less than is asked for, the walk is over ----

  std::size_t base() const { return marks_.empty() ? 0 : marks_.back(); }

  // Where the values above the last mark begin; the mark is gone then.
  std::size_t take_mark() {
    const std::size_t first = base();
    if (marks_.empty())
      is_over_ = true;
    else
      marks_.pop_back();
    return first;
  }

  // Where the topmost values begin.
  std::size_t above(std::size_t count) {
    if (stack_.size() - base() >= count) return stack_.size() - count;
    is_over_ = true;
    return base();
  }

  // The container below the values from `first` on.
  Container& container_below(std::size_t first) {
    if (first > base()) return containers_[stack_[first - 1].container];
    is_over_ = true;
    return containers_[0];
  }

  std::size_t add_container() {
    containers_.emplace_back();
    return containers_.size() - 1;
  }

  bool push_container() {
    stack_.push_back({0, 0, add_container()});
    return true;
  }

  Value pop() {
    if (stack_.size() == base()) {
      is_over_ = true;
      return {};
    }
    const Value value = stack_.back();
    stack_.pop_back();
    return value;
  }

  bool push_constant(std::uint64_t bytes, Role role = Role::kOther) {
    skip(bytes);
    Value value;
    value.role = role;
    stack_.push_back(value);
    return true;
  }

  bool put(std::uint64_t key) {
    if (stack_.size() == base())
      is_over_ = true;
    else
      memo_[key] = stack_.back();
    return true;
  }

  bool get(std::uint64_t key) {
    const auto found = memo_.find(key);
    if (found == memo_.end())
      is_over_ = true;
    else
      stack_.push_back(found->second);
    return true;
  }

  // Moves what is on the stack from `first` on into the list below.
  void add_elements(std::size_t first) {
    Container& target = container_below(first);
    for (std::size_t i = first; i < stack_.size(); ++i) {
      const Value& element = stack_[i];
      target.cost += element.cost;
      if (element.container != 0 && element.cost == 0) ++target.inner;
      element_cost_max_ = std::max(element_cost_max_, element.cost);
    }
    stack_.resize(first);
  }

  // The same for keys and values, into a dictionary.
  void add_keys(std::size_t first) {
    Container& target = container_below(first);
    std::uint64_t cost = 0;
    for (std::size_t i = first; i < stack_.size(); i += 2) cost += stack_[i].cost;
    target.cost += cost;
    use_keys(cost);
    stack_.resize(first);
  }

  // Puts a tuple of what is on the stack from `first` on in the place of that.
  void push_tuple(std::size_t first) {
    ++tuples_;
    Value made{1, 1, 0};
    if (first < stack_.size()) made.first = stack_[first].role;
    for (std::size_t i = first; i < stack_.size(); ++i) {
      made.has_number = made.has_number || stack_[i].role == Role::kNumber;
      if (made.container == 0) made.container = stack_[i].container;
      made.depth = std::max(made.depth, stack_[i].depth + 1);
      made.cost += stack_[i].cost;
    }
    if (made.depth > kDepthMax || made.cost > kCostMax + tuples_)
      problem_ = "tuples are nested too deeply";
    stack_.resize(first);
    stack_.push_back(made);
  }

  void check_call(Role called, const Value& arguments) {
    const bool takes_memory =
        called == Role::kMemory || (called == Role::kBytes && arguments.has_number) ||
        (called == Role::kRebuild &&
         (arguments.first == Role::kMemory || arguments.first == Role::kBytes));
    if (takes_memory) problem_ = "it asks for memory that it does not fill";
  }

  void use_keys(std::uint64_t cost) {
    keys_cost_ += cost;
    if (keys_cost_ > kKeysCostMax + tuples_) problem_ = "the keys of dictionaries are too large";
  }

  std::string_view stream_;
  std::size_t at_ = 0;
  bool is_over_ = false;
  const char* problem_ = nullptr;
  std::vector<Value> stack_;
  std::vector<std::size_t> marks_;
  std::unordered_map<std::uint64_t, Value> memo_;
  std::vector<Container> containers_ = std::vector<Container>(1);  // the first for what is none
  std::uint64_t tuples_ = 0;
  std::uint64_t keys_cost_ = 0;
  std::uint64_t element_cost_max_ = 0;
};

}  // namespace

const char* find_bad_nesting(std::string_view stream) { return Walk(stream).run(); }

}  // namespace fastsd
