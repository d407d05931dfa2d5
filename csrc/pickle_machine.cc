#include "pickle_machine.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "pickle_calls.h"
#include "utf8.h"

namespace fastsd {
namespace {

constexpr std::uint64_t kStreamBytesMax = kHeaderBytesMax;  // so that values have 32-bit numbers
constexpr unsigned kProtocolMax = 5;

// The characters of a surrogate, as Python's "surrogatepass" encodes it: ED A0..BF 80..BF.
constexpr std::size_t kSurrogateBytes = 3;
bool is_surrogate(std::string_view text) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  return text.size() >= kSurrogateBytes && byte(0) == 0xED && byte(1) >= 0xA0 && byte(1) <= 0xBF &&
         byte(2) >= 0x80 && byte(2) <= 0xBF;
}

// The first surrogate of a text; npos if there is none. REQUIRES: no other byte is ED than the
// first of a character, which is so in UTF-8.
std::size_t find_surrogate(std::string_view text) {
  std::size_t at = text.find('\xED');
  while (at != std::string_view::npos && !is_surrogate(text.substr(at)))
    at = text.find('\xED', at + 1);
  return at;
}

class Machine {
 public:
  Machine(std::string_view stream, const Index& by_key)
      : graph_(stream), calls_(graph_, by_key), stream_(stream) {
    // Of what a stream of tensors takes, half: growing twice costs more than reading.
    graph_.items.reserve(stream.size() / 8);
    graph_.containers.reserve(stream.size() / 16);
    memo_.reserve(stream.size() / 16);
  }
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;
  ~Machine() = default;

  std::optional<Graph> run() {
    while (!has_failed_ && at_ < stream_.size()) {
      const auto op = static_cast<unsigned char>(stream_[at_++]);
      if (op == '.') {
        if (stack_.size() != 1 || !marks_.empty()) return std::nullopt;
        graph_.root = stack_[0];
        return std::move(graph_);
      }
      // The most frequent first.
      if (!use_memo(op) && !push_number(op) && !push_container(op) && !push_text(op) &&
          !make_object(op) && !fill_container(op)) {
        use_frame(op);
      }
    }
    return std::nullopt;
  }

 private:
  // ---- Opcodes. Each function says whether it knows the opcode ----

  bool push_number(unsigned char op) {
    switch (op) {
      case 'N':
        return push({Kind::kNone});
      case 0x88:  // NEWTRUE
      case 0x89:  // NEWFALSE
        return push({Kind::kBool, false, 0, 0, op == 0x88 ? 1U : 0U});
      case 'K':
        return push_int(read_number(1));
      case 'M':
        return push_int(read_number(2));
      case 'J': {
        const auto number = static_cast<std::int32_t>(read_number(4));
        return push_int(static_cast<std::uint64_t>(std::int64_t{number}));
      }
      case 'G': {
        std::uint64_t bits = 0;
        for (const char c : read_bytes(8)) bits = bits << 8U | static_cast<unsigned char>(c);
        return push({Kind::kFloat, false, 0, 0, bits});
      }
      case 0x8A:  // LONG1
        return push_long(read_bytes(read_number(1)));
      case 0x8B:  // LONG4
        return push_long(read_bytes(read_number(4)));
      default:
        return false;
    }
  }

  bool push_text(unsigned char op) {
    switch (op) {
      case 'X':  // BINUNICODE
        return push_str(read_bytes(read_number(4)));
      case 0x8C:  // SHORT_BINUNICODE
        return push_str(read_bytes(read_number(1)));
      case 0x8D:  // BINUNICODE8
        return push_str(read_bytes(read_number(8)));
      case 'U':  // SHORT_BINSTRING, which torch takes for UTF-8
        push_str(read_bytes(read_number(1)));
        has_failed_ |= !has_failed_ && stack_.back().has_surrogates;
        return true;
      case 'C':  // SHORT_BINBYTES
        return push(place(Kind::kBytes, read_bytes(read_number(1))));
      case 'B':  // BINBYTES
        return push(place(Kind::kBytes, read_bytes(read_number(4))));
      case 0x8E:  // BINBYTES8
        return push(place(Kind::kBytes, read_bytes(read_number(8))));
      case 0x96: {  // BYTEARRAY8
        const Value bytes = place(Kind::kBytes, read_bytes(read_number(8)));
        return push({Kind::kByteArray, false, 0, 0, graph_.add_container(&bytes, 1)});
      }
      default:
        return false;
    }
  }

  bool push_container(unsigned char op) {
    switch (op) {
      case '(':
        marks_.push_back(stack_.size());
        return true;
      case ')':
        return push_new(Kind::kTuple, stack_.size());
      case ']':
        return push_new(Kind::kList, stack_.size());
      case '}':
        return push_new(Kind::kDict, stack_.size());
      case 0x8F:  // EMPTY_SET
        return push_new(Kind::kSet, stack_.size());
      case 0x91:  // FROZENSET
        return push_new(Kind::kFrozenSet, take_mark());
      case 't':
        return push_new(Kind::kTuple, take_mark());
      case 0x85:  // TUPLE1
      case 0x86:
      case 0x87:
        return push_new(Kind::kTuple, above(op - 0x84U));
      default:
        return false;
    }
  }

  bool use_memo(unsigned char op) {
    switch (op) {
      case 'q':
        return put(read_number(1));
      case 'r':
        return put(read_number(4));
      case 0x94:  // MEMOIZE
        return put(memo_count_);
      case 'h':
        return get(read_number(1));
      case 'j':
        return get(read_number(4));
      default:
        return false;
    }
  }

  bool fill_container(unsigned char op) {
    switch (op) {
      case 'a':
        return append(Kind::kList, Kind::kList, above(1));
      case 'e':
        return append(Kind::kList, Kind::kList, take_mark());
      case 's':
        return append(Kind::kDict, Kind::kOrderedDict, above(2));
      case 'u':
        return append(Kind::kDict, Kind::kOrderedDict, take_mark());
      case 0x90:  // ADDITEMS
        return append(Kind::kSet, Kind::kSet, take_mark());
      default:
        return false;
    }
  }

  bool make_object(unsigned char op) {
    switch (op) {
      case 'c': {  // GLOBAL
        const std::string_view module = read_line();
        const std::string_view name = read_line();
        has_failed_ |= !is_utf8(module) || !is_utf8(name);
        return push_global(module, name);
      }
      case 0x93: {  // STACK_GLOBAL
        const Value name = pop();
        const Value module = pop();
        has_failed_ |= module.kind != Kind::kStr || name.kind != Kind::kStr ||
                       module.has_surrogates || name.has_surrogates;
        return has_failed_ || push_global(graph_.text(module), graph_.text(name));
      }
      case 'R': {
        const Value arguments = pop();
        return push(calls_.call(pop(), arguments));
      }
      case 0x92:  // NEWOBJ_EX
        pop();
        [[fallthrough]];
      case 0x81:  // NEWOBJ
        pop();
        pop();
        return push(graph_.opaque());
      case 'b': {
        const Value state = pop();
        const Value object = pop();
        calls_.set_state(object, state);
        return push(object);
      }
      case 'Q':  // BINPERSID
        return push(calls_.find_storage(pop()));
      default:
        return false;
    }
  }

  // What is left, or unknown.
  void use_frame(unsigned char op) {
    switch (op) {
      case 0x80:  // PROTO
        has_failed_ |= read_number(1) > kProtocolMax;
        break;
      case 0x95:  // FRAME
        read_bytes(8);
        break;
      case '0':  // POP
        pop();
        break;
      case '1':  // POP_MARK
        stack_.resize(take_mark());
        break;
      default:
        has_failed_ = true;
    }
  }

  // ---- The stream. Where it is cut short, the walk has failed and what is read is empty ----

  std::string_view read_bytes(std::uint64_t count) {
    if (count > stream_.size() - at_) {
      has_failed_ = true;
      return stream_.substr(at_, 0);
    }
    at_ += count;
    return stream_.substr(at_ - count, count);
  }

  std::uint64_t read_number(std::size_t bytes) {
    std::uint64_t number = 0;
    const std::string_view text = read_bytes(bytes);
    std::memcpy(&number, text.data(), text.size());
    return number;
  }

  std::string_view read_line() {
    const std::size_t end = stream_.find('\n', at_);
    has_failed_ |= end == std::string_view::npos;
    const std::string_view line = read_bytes(has_failed_ ? 0 : end - at_);
    at_ += has_failed_ ? 0 : 1;
    return line;
  }

  // ---- Values ----

  bool push(const Value& value) {
    stack_.push_back(value);
    return true;
  }

  bool push_int(std::uint64_t number) { return push({Kind::kInt, false, 0, 0, number}); }

  Value place(Kind kind, std::string_view text) const {
    return {kind, false, 0, static_cast<std::uint32_t>(text.size()),
            static_cast<std::uint64_t>(text.data() - stream_.data())};
  }

  bool push_long(std::string_view bytes) {
    // Bytes that only repeat the sign say nothing.
    const auto is_sign = [](char last, char before) {
      const bool is_negative = (static_cast<unsigned char>(before) & 0x80U) != 0;
      return last == (is_negative ? '\xFF' : '\0');
    };
    while (bytes.size() > 1 && is_sign(bytes[bytes.size() - 1], bytes[bytes.size() - 2]))
      bytes.remove_suffix(1);
    if (bytes.size() > sizeof(std::uint64_t)) return push(place(Kind::kBigInt, bytes));
    const bool is_negative =
        !bytes.empty() && (static_cast<unsigned char>(bytes.back()) & 0x80U) != 0;
    std::uint64_t number = is_negative ? UINT64_MAX : 0;
    std::memcpy(&number, bytes.data(), bytes.size());
    return push_int(number);
  }

  bool push_str(std::string_view text) {
    Value value = place(Kind::kStr, text);
    std::size_t surrogate = find_surrogate(text);
    value.has_surrogates = surrogate != std::string_view::npos;
    while (surrogate != std::string_view::npos) {
      has_failed_ |= !is_utf8(text.substr(0, surrogate));
      text.remove_prefix(surrogate + kSurrogateBytes);
      surrogate = find_surrogate(text);
    }
    has_failed_ |= !is_utf8(text);
    return push(value);
  }

  bool push_global(std::string_view module, std::string_view name) {
    return push(has_failed_ ? Value{} : calls_.find_global(module, name));
  }

  // ---- The stack. Where there is less than is asked for, the walk has failed ----

  std::size_t base() const { return marks_.empty() ? 0 : marks_.back(); }

  Value pop() {
    if (stack_.size() == base()) {
      has_failed_ = true;
      return {};
    }
    const Value value = stack_.back();
    stack_.pop_back();
    return value;
  }

  // Where the values above the last mark begin; the mark is gone then.
  std::size_t take_mark() {
    const std::size_t first = base();
    has_failed_ |= marks_.empty();
    if (!marks_.empty()) marks_.pop_back();
    return first;
  }

  // Where the topmost values begin.
  std::size_t above(std::size_t count) {
    if (stack_.size() - base() >= count) return stack_.size() - count;
    has_failed_ = true;
    return stack_.size();
  }

  // Puts a container of what is on the stack from `first` on in the place of that.
  bool push_new(Kind kind, std::size_t first) {
    const std::uint32_t number = graph_.add_container(stack_.data() + first, stack_.size() - first);
    stack_.resize(first);
    return push({kind, false, 0, 0, number});
  }

  // Moves what is on the stack from `first` on into the container of one of two kinds below.
  bool append(Kind kind, Kind other, std::size_t first) {
    if (has_failed_ || first == base()) {
      has_failed_ = true;
      return true;
    }
    const Value& target = stack_[first - 1];
    const std::size_t count = stack_.size() - first;
    has_failed_ |= kind == Kind::kDict && count % 2 != 0;
    if (target.kind == kind || target.kind == other) {
      Container& container = graph_.containers[target.number];
      if (container.is_used_up) graph_.is_plain = graph_.has_tree = false;
      graph_.append(container, stack_.data() + first, count);
    } else {
      has_failed_ |= target.kind != Kind::kOpaque;
    }
    stack_.resize(first);
    return true;
  }

  // ---- The memo. Its keys count up, so that none is larger than the stream ----

  bool put(std::uint64_t key) {
    has_failed_ |= stack_.size() == base() || key > stream_.size();
    if (has_failed_) return true;
    if (key >= memo_.size()) memo_.resize(key + 1);
    if (memo_[key].kind == Kind::kNothing) ++memo_count_;
    memo_[key] = stack_.back();
    return true;
  }

  bool get(std::uint64_t key) {
    if (key < memo_.size() && memo_[key].kind != Kind::kNothing) return push(memo_[key]);
    has_failed_ = true;
    return true;
  }

  Graph graph_;
  Calls calls_;
  std::string_view stream_;
  std::size_t at_ = 0;
  bool has_failed_ = false;
  std::vector<Value> stack_;
  std::vector<std::size_t> marks_;
  std::vector<Value> memo_;
  std::uint64_t memo_count_ = 0;
};

}  // namespace

std::optional<Graph> read_pickle(std::string_view stream, const Index& by_key) {
  if (stream.size() > kStreamBytesMax) return std::nullopt;
  return Machine(stream, by_key).run();
}

}  // namespace fastsd
