// Faults in calls to the operating system. The linker puts faults.cc between csrc/file and the C
// library (see CMakeLists.txt), so that the library itself has no seam, and no call is left out
// because its author did not use one.
#pragma once

#include <cstddef>
#include <functional>

namespace fastsd::test {

enum class Fault {
  kNone,
  kError,      // the call does nothing and fails with `error`
  kShort,      // a read or write stops halfway; other calls do all they do
  kDieBefore,  // the process ends in place of the call...
  kDieAfter,   // ...or once it has been made
  kMeanwhile,  // `meanwhile` happens before it is made
};

struct Injection {
  Fault fault = Fault::kNone;
  int error = 0;
  std::size_t call = 0;           // the first that fails, counted from 0
  bool is_repeated = false;       // and so do all behind it
  const char* only = nullptr;     // the name of the calls that count and fail; nullptr: all
  bool has_unnamed_files = true;  // whether there is O_TMPFILE
  std::function<void()> meanwhile = {};
};

// Injects while in scope. One at a time; the injection outlives it.
class InjectionScope {
 public:
  explicit InjectionScope(const Injection& injection);
  InjectionScope(const InjectionScope&) = delete;
  InjectionScope& operator=(const InjectionScope&) = delete;
  ~InjectionScope();
};

// How a process ended in which an injection was at work.
struct Outcome {
  enum class End { kReturned, kThrew, kThrewSomethingElse, kDied, kCrashed };
  End end;
  char call[16];     // the name of the first call that failed, or was the last
  bool is_injected;  // false: there were fewer calls
};

// Runs `body` with the injection in a process of its own, which a fork makes. kThrew stands for an
// Error of the system that names `path` and, where the fault is an error, has that errno.
Outcome run_with(const Injection& injection, const char* path, const std::function<void()>& body);

}  // namespace fastsd::test
