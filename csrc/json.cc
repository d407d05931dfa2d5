#include "json.h"

#include <array>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "json_text.h"
#include "pyobject.h"
#include "utf8.h"

namespace fastsd {
namespace {

// Deeper than save() goes, and far from the end of any thread's stack: also of what later hashes,
// compares or frees the value.
constexpr int kDepthMax = 2000;

// The default of sys.set_int_max_str_digits: converting takes time quadratic in the digits.
constexpr std::size_t kDigitsMax = 4300;

// Of so many digits every integer fits into 64 bits.
constexpr std::size_t kShortDigitsMax = 18;

PyObject* make_ascii(std::string_view text) {
  PyObject* string = PyUnicode_New(static_cast<Py_ssize_t>(text.size()), 0x7F);
  if (string != nullptr && !text.empty())
    std::memcpy(PyUnicode_1BYTE_DATA(string), text.data(), text.size());
  return string;
}

// The names met last: a checkpoint repeats a few of them thousands of times.
class NameCache {
 public:
  // A new reference. REQUIRES: plain bytes, which outlive the cache.
  PyObject* find_or_make(std::string_view text) {
    if (text.size() > kBytesMax) return make_ascii(text);
    Entry& entry = entries_[hash(text) % kEntries];
    if (!entry.name || entry.text != text) {
      entry.name.reset(make_ascii(text));
      entry.text = text;
    }
    Py_XINCREF(entry.name.get());
    return entry.name.get();
  }

 private:
  static constexpr std::size_t kBytesMax = 64;
  static constexpr std::size_t kEntries = 256;

  struct Entry {
    std::string_view text;
    Reference name;
  };

  static std::uint32_t hash(std::string_view text) {
    std::uint32_t value = 0;
    for (const char c : text) value = 31 * value + static_cast<unsigned char>(c);
    return value ^ value >> 8U;
  }

  std::array<Entry, kEntries> entries_;
};

// Reads without looking for the end: `bytes` objects end with a zero byte, which nothing but the
// end of the text accepts.
class Parser {
 public:
  Parser(PyObject* text, PyObject* tensors, PyObject* decode)
      : begin_(PyBytes_AS_STRING(text)),
        end_(begin_ + PyBytes_GET_SIZE(text)),
        at_(begin_),
        tensors_(tensors),
        decode_(decode) {}
  Parser(const Parser&) = delete;
  Parser& operator=(const Parser&) = delete;
  ~Parser() {
    for (PyObject* value : values_) Py_DECREF(value);
  }

  PyObject* parse() {
    Reference value(parse_value());
    if (!value) return nullptr;
    at_ = skip_space(at_);
    return at_ == end_ ? value.release() : fail("expected nothing more");
  }

 private:
  PyObject* fail(const char* what, PyObject* type = PyExc_ValueError) const {
    PyErr_Format(type, "%s at byte %zd", what, static_cast<Py_ssize_t>(at_ - begin_));
    return nullptr;
  }

  bool skip(char wanted) {
    at_ = skip_space(at_);
    if (*at_ != wanted) return false;
    ++at_;
    return true;
  }

  // ---- Values ----

  PyObject* parse_value() {
    at_ = skip_space(at_);
    switch (*at_) {
      case '"':
        return parse_string();
      case '{':
      case '[':
        return parse_container();
      case 'n':
        return parse_word("null", Py_None);
      case 't':
        return parse_word("true", Py_True);
      case 'f':
        return parse_word("false", Py_False);
      default:
        return parse_number();
    }
  }

  PyObject* parse_word(std::string_view word, PyObject* value) {
    if (std::string_view(at_, static_cast<std::size_t>(end_ - at_)).substr(0, word.size()) != word)
      return fail("expected a value");
    at_ += word.size();
    Py_INCREF(value);
    return value;
  }

  PyObject* parse_container() {
    if (depth_ == kDepthMax) return fail("nested too deeply", PyExc_RecursionError);
    ++depth_;
    PyObject* value = *at_++ == '[' ? parse_array() : parse_object();
    --depth_;
    return value;
  }

  PyObject* parse_array() {
    if (skip(']')) return PyList_New(0);
    const std::size_t first = values_.size();
    do {
      Reference value(parse_value());
      if (!value) return nullptr;
      values_.push_back(value.get());
      value.release();
    } while (skip(','));
    return skip(']') ? take_list(first) : fail("expected a comma or the end of the array");
  }

  PyObject* take_list(std::size_t first) {
    const std::size_t count = values_.size() - first;
    PyObject* list = PyList_New(static_cast<Py_ssize_t>(count));
    if (list == nullptr) return nullptr;
    for (std::size_t i = 0; i < count; ++i)
      PyList_SET_ITEM(list, static_cast<Py_ssize_t>(i), values_[first + i]);
    values_.resize(first);
    return list;
  }

  PyObject* parse_object() {
    if (skip('}')) return PyDict_New();
    Reference name;
    Reference value;
    if (!parse_member(&name, &value)) return nullptr;
    if (is_node(name.get()) && skip('}')) return decode_node(name.get(), value.get());
    Reference object(PyDict_New());
    for (Py_ssize_t count = 1;; ++count) {
      if (!object || PyDict_SetItem(object.get(), name.get(), value.get()) != 0) return nullptr;
      if (PyDict_Size(object.get()) != count) return fail("a name occurs twice in the object");
      if (!skip(',')) break;
      if (!parse_member(&name, &value)) return nullptr;
    }
    return skip('}') ? object.release() : fail("expected a comma or the end of the object");
  }

  bool parse_member(Reference* name, Reference* value) {
    at_ = skip_space(at_);
    name->reset(*at_ == '"' ? parse_name() : fail("expected a name in quotes"));
    if (!*name) return false;
    if (!skip(':')) return fail("expected a colon") != nullptr;
    value->reset(parse_value());
    return static_cast<bool>(*value);
  }

  // ---- Nodes ----

  bool is_node(PyObject* name) const {
    return decode_ != Py_None && PyUnicode_GET_LENGTH(name) > 0 &&
           PyUnicode_READ_CHAR(name, 0) == '$';
  }

  PyObject* decode_node(PyObject* name, PyObject* value) const {
    if (PyUnicode_CompareWithASCIIString(name, "$tensor") == 0) return find_tensor(value);
    PyObject* arguments[] = {name, value};
    return PyObject_Vectorcall(decode_, arguments, 2, nullptr);
  }

  PyObject* find_tensor(PyObject* number) const {
    const Py_ssize_t i = PyLong_CheckExact(number) ? PyLong_AsSsize_t(number) : -1;
    if (i < 0 || i >= PyList_GET_SIZE(tensors_)) {
      PyErr_Clear();
      return fail("expected the number of a tensor before the end of the node");
    }
    PyObject* tensor = PyList_GET_ITEM(tensors_, i);
    Py_INCREF(tensor);
    return tensor;
  }

  // ---- Strings ----

  // The plain bytes after a quote.
  std::string_view peek_plain() const {
    const char* first = at_ + 1;
    return {first, static_cast<std::size_t>(skip_plain(first) - first)};
  }

  PyObject* parse_name() {
    const std::string_view plain = peek_plain();
    if (plain.data()[plain.size()] != '"') return parse_string();
    at_ += plain.size() + 2;
    return names_.find_or_make(plain);
  }

  PyObject* parse_string() {
    const std::string_view plain = peek_plain();
    if (plain.data()[plain.size()] != '"') return parse_other_string();
    at_ += plain.size() + 2;
    return make_ascii(plain);
  }

  // A string that is not all plain.
  PyObject* parse_other_string() {
    const char* quote = at_;
    const char* copied = ++at_;  // what precedes it is in the buffer
    bool has_surrogates = false;
    buffer_.clear();
    while (*at_ != '"') {
      if (static_cast<unsigned char>(*at_) < 0x20) return fail("expected the end of the string");
      if (*at_ != '\\') {
        ++at_;
        continue;
      }
      buffer_.append(copied, at_);
      std::uint32_t code = 0;
      if (const char* problem = parse_escape(at_, code)) return fail(problem);
      has_surrogates |= is_high_surrogate(code) || is_low_surrogate(code);
      append_utf8(buffer_, code);
      copied = at_;
    }
    const std::string_view raw(quote + 1, static_cast<std::size_t>(at_ - quote - 1));
    const bool has_escapes = copied != quote + 1;
    if (has_escapes) buffer_.append(copied, at_);
    // Surrogates may come from escapes only.
    if (has_surrogates && !Reference(decode_utf8(raw, "strict"))) return refuse_utf8(quote);
    PyObject* string =
        decode_utf8(has_escapes ? buffer_ : raw, has_surrogates ? "surrogatepass" : "strict");
    if (string == nullptr) return refuse_utf8(quote);
    ++at_;
    return string;
  }

  static PyObject* decode_utf8(std::string_view text, const char* errors) {
    return PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), errors);
  }

  PyObject* refuse_utf8(const char* quote) {
    if (PyErr_ExceptionMatches(PyExc_UnicodeDecodeError) == 0) return nullptr;
    PyErr_Clear();
    at_ = quote;
    return fail("not UTF-8: the string");
  }

  // ---- Numbers ----

  PyObject* parse_number() {
    const char* first = at_;
    bool is_whole = false;
    if (const char* problem = skip_number(at_, is_whole)) return fail(problem);
    const std::string_view text(first, static_cast<std::size_t>(at_ - first));
    return is_whole ? make_int(text) : make_float(text);
  }

  PyObject* make_int(std::string_view text) const {
    const bool is_negative = text[0] == '-';
    const std::string_view digits = text.substr(is_negative ? 1 : 0);
    if (digits.size() > kDigitsMax) return fail("an integer of too many digits ends");
    if (digits.size() > kShortDigitsMax)
      return PyLong_FromString(std::string(text).c_str(), nullptr, 10);
    long long value = 0;
    for (const char digit : digits) value = 10 * value + (digit - '0');
    return PyLong_FromLongLong(is_negative ? -value : value);
  }

  static PyObject* make_float(std::string_view text) {
#ifdef __cpp_lib_to_chars
    double value = 0;
    if (std::from_chars(text.data(), text.data() + text.size(), value).ec == std::errc())
      return PyFloat_FromDouble(value);
#endif
    // Also what is out of range: it becomes infinite, or zero.
    const double slow = PyOS_string_to_double(std::string(text).c_str(), nullptr, nullptr);
    return PyErr_Occurred() == nullptr ? PyFloat_FromDouble(slow) : nullptr;
  }

  const char* begin_;
  const char* end_;
  const char* at_;
  PyObject* tensors_;
  PyObject* decode_;
  int depth_ = 0;
  std::vector<PyObject*> values_;  // owned: those of the arrays that are still open
  std::string buffer_;             // a string without its escapes
  NameCache names_;
};

}  // namespace

PyObject* parse_json(PyObject* text, PyObject* tensors, PyObject* decode) {
  const CollectionPause pause;
  return Parser(text, tensors, decode).parse();
}

}  // namespace fastsd
