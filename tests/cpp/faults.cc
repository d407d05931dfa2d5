#include "faults.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <type_traits>

#include "error.h"

namespace fastsd::test {
namespace {

constexpr int kDiedStatus = 77;

// In memory that the process under test shares with the one that judges it.
struct Record {
  std::atomic<bool> is_injected;
  char call[16];
};

const Injection* active = nullptr;
Record* record = nullptr;
std::atomic<std::size_t> calls{0};

// What is to happen to the call that is being made.
Fault next_fault(const char* name) {
  if (active == nullptr) return Fault::kNone;
  if (active->only != nullptr && std::strcmp(active->only, name) != 0) return Fault::kNone;
  const std::size_t number = calls++;
  const bool is_hit = active->is_repeated ? number >= active->call : number == active->call;
  if (!is_hit) return Fault::kNone;
  if (record != nullptr && !record->is_injected.exchange(true))
    std::snprintf(record->call, sizeof record->call, "%s", name);
  return active->fault;
}

template <class Result>
Result failure() {
  if constexpr (std::is_same_v<Result, void*>) {
    return MAP_FAILED;
  } else if constexpr (std::is_pointer_v<Result>) {
    return nullptr;
  } else {
    return Result{-1};
  }
}

// The call, or what is to happen in its place.
template <class Call>
auto call_with_fault(const char* name, Call call) -> decltype(call(false)) {
  const Fault fault = next_fault(name);
  if (fault == Fault::kDieBefore) ::_exit(kDiedStatus);
  if (fault == Fault::kError) {
    if (std::strcmp(name, "close") == 0) call(false);  // which closes even if it fails
    errno = active->error;
    return failure<decltype(call(false))>();
  }
  if (fault == Fault::kMeanwhile) active->meanwhile();
  const auto result = call(fault == Fault::kShort);
  if (fault == Fault::kDieAfter) ::_exit(kDiedStatus);
  return result;
}

// Half of the first piece that is not empty; of many blocks whole ones, which direct I/O needs.
struct iovec halve(const struct iovec* pieces, int count) {
  while (count > 1 && pieces->iov_len == 0) ++pieces, --count;
  constexpr std::size_t block_bytes = 4096;
  const std::size_t half = (pieces->iov_len + 1) / 2;
  const std::size_t whole = half > block_bytes ? half - half % block_bytes : half;
  const bool is_block = pieces->iov_len == block_bytes;
  return {pieces->iov_base, is_block ? block_bytes : whole};
}

}  // namespace

InjectionScope::InjectionScope(const Injection& injection) {
  calls = 0;
  active = &injection;
}

InjectionScope::~InjectionScope() { active = nullptr; }

Outcome run_with(const Injection& injection, const char* path, const std::function<void()>& body) {
  using End = Outcome::End;
  void* shared =
      ::mmap(nullptr, sizeof(Record), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (shared == MAP_FAILED) throw Error(Failure::kSystem, "mmap", path, errno);
  record = new (shared) Record{};
  std::fflush(nullptr);
  const pid_t child = ::fork();
  if (child < 0) throw Error(Failure::kSystem, "fork", path, errno);
  if (child == 0) {
    End end = End::kReturned;
    const InjectionScope scope(injection);
    try {
      body();
    } catch (const Error& error) {
      const bool is_ours =
          injection.fault != Fault::kError || error.system_errno == injection.error;
      const bool is_right = error.kind == Failure::kSystem && error.path == path && is_ours;
      end = is_right ? End::kThrew : End::kThrewSomethingElse;
    } catch (...) {
      end = End::kThrewSomethingElse;
    }
    ::_exit(static_cast<int>(end));
  }
  int status = 0;
  while (::waitpid(child, &status, 0) < 0 && errno == EINTR) continue;
  Outcome outcome{End::kCrashed, {}, record->is_injected};
  std::memcpy(outcome.call, record->call, sizeof outcome.call);
  ::munmap(shared, sizeof(Record));
  record = nullptr;
  if (!WIFEXITED(status)) return outcome;
  const int code = WEXITSTATUS(status);
  if (code == kDiedStatus) outcome.end = End::kDied;
  if (code <= static_cast<int>(End::kThrewSomethingElse)) outcome.end = static_cast<End>(code);
  return outcome;
}

// ---- The calls ----

// The linker makes NAME, wherever it is called, __wrap_NAME, and what it was __real_NAME.
#define DECLARE(result, name, parameters)                 \
  result real_##name parameters __asm__("__real_" #name); \
  result wrapped_##name parameters __asm__("__wrap_" #name)
#define WRAP(result, name, parameters, arguments)                               \
  DECLARE(result, name, parameters);                                            \
  result wrapped_##name parameters {                                            \
    return call_with_fault(#name, [&](bool) { return real_##name arguments; }); \
  }
#define WRAP_TRANSFER(name)                                                              \
  DECLARE(ssize_t, name, (int fd, const struct iovec* pieces, int count, off_t offset)); \
  ssize_t wrapped_##name(int fd, const struct iovec* pieces, int count, off_t offset) {  \
    return call_with_fault(#name, [&](bool is_short) {                                   \
      if (!is_short) return real_##name(fd, pieces, count, offset);                      \
      const struct iovec half = halve(pieces, count);                                    \
      return real_##name(fd, &half, 1, offset);                                          \
    });                                                                                  \
  }

extern "C" {
WRAP(int, access, (const char* path, int mode), (path, mode))
WRAP(int, close, (int fd), (fd))
WRAP(int, faccessat, (int fd, const char* path, int mode, int flags), (fd, path, mode, flags))
WRAP(int, fallocate, (int fd, int mode, off_t at, off_t bytes), (fd, mode, at, bytes))
WRAP(int, fchmod, (int fd, mode_t mode), (fd, mode))
WRAP(int, fchown, (int fd, uid_t user, gid_t group), (fd, user, group))
WRAP(int, fcntl, (int fd, int command, long argument), (fd, command, argument))
WRAP(DIR*, fdopendir, (int fd), (fd))
WRAP(int, flock, (int fd, int operation), (fd, operation))
WRAP(int, fstat, (int fd, struct stat* status), (fd, status))
WRAP(int, fstatat, (int fd, const char* path, struct stat* status, int flags),
     (fd, path, status, flags))
WRAP(int, fstatfs, (int fd, struct statfs* status), (fd, status))
WRAP(int, ftruncate, (int fd, off_t bytes), (fd, bytes))
WRAP(int, linkat, (int fd, const char* path, int other, const char* name, int flags),
     (fd, path, other, name, flags))
WRAP(void*, mmap, (void* at, std::size_t bytes, int mode, int flags, int fd, off_t offset),
     (at, bytes, mode, flags, fd, offset))
WRAP(int, open, (const char* path, int flags, mode_t mode), (path, flags, mode))
WRAP(struct dirent*, readdir, (DIR * folder), (folder))
WRAP(ssize_t, readlink, (const char* path, char* target, std::size_t bytes), (path, target, bytes))
WRAP(int, renameat, (int fd, const char* path, int other, const char* name),
     (fd, path, other, name))
WRAP(int, unlinkat, (int fd, const char* path, int flags), (fd, path, flags))
WRAP_TRANSFER(preadv)
WRAP_TRANSFER(pwritev)

// Only pretends to while faults are injected: what dies then is the process and not the machine.
DECLARE(int, fsync, (int fd));
int wrapped_fsync(int fd) {
  return call_with_fault("fsync", [&](bool) { return active != nullptr ? 0 : real_fsync(fd); });
}

DECLARE(int, openat, (int fd, const char* path, int flags, mode_t mode));
int wrapped_openat(int fd, const char* path, int flags, mode_t mode) {
  return call_with_fault("openat", [&](bool) {
    if (active != nullptr && !active->has_unnamed_files && (flags & O_TMPFILE) == O_TMPFILE) {
      errno = EOPNOTSUPP;
      return -1;
    }
    return real_openat(fd, path, flags, mode);
  });
}
}

}  // namespace fastsd::test
