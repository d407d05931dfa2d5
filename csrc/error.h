// Kinds of failure, and the one exception that native code throws.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace fastsd {

enum class Failure {
  kSystem,       // the operating system refused; `system_errno` says why
  kFormat,       // the bytes break a rule of docs/FORMAT.md
  kVersion,      // written by a newer major version, or needs a feature unknown here
  kTruncated,    // the file ends before what its header promises
  kLimit,        // larger than a named limit of the format
  kUnsupported,  // the input cannot be represented in the container
  kDevice,       // a GPU, or what drives it, failed
  kInterrupted,  // the caller asked to stop (Ctrl-C)
};

// `detail` names the place and the numbers that disagree. Code that knows no file leaves `path`
// empty; the first caller that does fills it in.
class Error : public std::runtime_error {
 public:
  Error(Failure failure, const std::string& detail, std::string file_path = {}, int errno_value = 0)
      : std::runtime_error(detail),
        kind(failure),
        path(std::move(file_path)),
        system_errno(errno_value) {}

  Failure kind;
  std::string path;
  int system_errno;
};

}  // namespace fastsd
