#include "file.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <new>
#include <random>
#include <vector>

#include "error.h"

namespace fastsd {
namespace {

constexpr std::size_t kHugePageBytes = std::size_t{2} << 20U;
constexpr std::size_t kMemoryAlignBytes = 64;

[[noreturn]] void fail(const std::string& path, int error = errno) {
  throw Error(Failure::kSystem, std::strerror(error), path, error);
}

[[noreturn]] void fail_at_end(const std::string& path, std::uint64_t bytes) {
  throw Error(Failure::kTruncated,
              "the file ended at byte " + std::to_string(bytes) + ", while it was being read",
              path);
}

// Calls again what a signal has interrupted.
template <class Call>
auto retry(Call call) {
  auto result = call();
  while (result < 0 && errno == EINTR) result = call();
  return result;
}

FileSystem file_system_of(int fd, const std::string& path) {
  struct statfs status{};
  if (retry([&] { return ::fstatfs(fd, &status); }) != 0) fail(path);
  return find_file_system(static_cast<std::uint64_t>(status.f_type) & 0xFFFFFFFFU);
}

std::string resolve_link(const std::string& path) {
  char target[PATH_MAX];
  std::string current = path;
  for (int depth = 0; depth < 40; ++depth) {
    const ssize_t bytes = retry([&] { return ::readlink(current.c_str(), target, sizeof target); });
    if (bytes < 0 && errno != EINVAL && errno != ENOENT) fail(path);
    if (bytes < 0) return current;  // no link, or nothing there yet
    const std::size_t slash = current.rfind('/');
    const bool is_relative = bytes == 0 || target[0] != '/';
    current.resize(is_relative && slash != std::string::npos ? slash + 1 : 0);
    current.append(target, static_cast<std::size_t>(bytes));
  }
  fail(path, ELOOP);
}

constexpr char kHiddenNameEnd[] = ".tmp";

// How the names of hidden files start that were made on this host: there their locks can be asked
// for, while some file systems keep locks to the host that took them.
const std::string& hidden_name_begin() {
  static const std::string begin = [] {
    char host[HOST_NAME_MAX + 1] = {};
    ::gethostname(host, sizeof host - 1);
    char name[40];
    std::snprintf(name, sizeof name, ".fastsd-%016zx-", std::hash<std::string>()(host));
    return std::string(name);
  }();
  return begin;
}

std::string make_hidden_name() {
  std::random_device random;
  char name[40];
  std::snprintf(name, sizeof name, "%08x%08x%s", random(), random(), kHiddenNameEnd);
  return hidden_name_begin() + name;
}

bool is_hidden_name(const std::string& name) {
  const std::string& begin = hidden_name_begin();
  const std::string end = kHiddenNameEnd;
  return name.size() > begin.size() + end.size() && name.compare(0, begin.size(), begin) == 0 &&
         name.compare(name.size() - end.size(), end.size(), end) == 0;
}

// One name for each target, however long that is.
std::string make_linked_name(const std::string& target) {
  char name[40];
  std::snprintf(name, sizeof name, ".fastsd-%016zx.tmp", std::hash<std::string>()(target));
  return name;
}

bool try_lock(int fd) {
  return retry([&] { return ::flock(fd, LOCK_EX | LOCK_NB); }) == 0;
}

// Waits a second at most for others who replace a file in the directory, as a stranger may hold the
// lock for reasons of its own. Returns what holds the lock, or nothing.
Descriptor lock_directory(int directory) {
  constexpr int attempts_max = 1000;
  Descriptor lock(
      retry([&] { return ::openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC); }));
  for (int i = 0; lock.get() >= 0 && i < attempts_max; ++i) {
    if (try_lock(lock.get())) return lock;
    if (errno != EWOULDBLOCK) break;
    ::usleep(1000);
  }
  return Descriptor();
}

// Removes a hidden file if whoever made it has died: the living hold its lock.
void remove_abandoned(int directory, const char* name) {
  // To be locked a file must be open for writing where locks go over the network.
  const Descriptor file(retry(
      [&] { return ::openat(directory, name, O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC); }));
  if (file.get() >= 0 && try_lock(file.get())) ::unlinkat(directory, name, 0);
}

// Removes the hidden files in a directory that processes of this host left when they were killed.
void remove_all_abandoned(int directory) {
  Descriptor list(
      retry([&] { return ::openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC); }));
  const std::unique_ptr<DIR, int (*)(DIR*)> entries(::fdopendir(list.get()), ::closedir);
  if (!entries) return;
  list.release();
  while (const dirent* entry = ::readdir(entries.get())) {
    if (is_hidden_name(entry->d_name)) remove_abandoned(directory, entry->d_name);
  }
}

int batch_of(std::size_t pieces) {
  return static_cast<int>(std::min<std::size_t>(pieces, IOV_MAX));
}

// Drops the first `bytes` bytes of the pieces, and pieces that are empty then.
void skip_bytes(struct iovec*& pieces, std::size_t& count, std::size_t bytes) {
  for (; count > 0 && bytes >= pieces->iov_len; ++pieces, --count) bytes -= pieces->iov_len;
  if (count == 0) return;
  pieces->iov_base = static_cast<char*>(pieces->iov_base) + bytes;
  pieces->iov_len -= bytes;
}

std::uint64_t page_bytes() {
  static const auto bytes = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  return bytes;
}

// How far behind the start of its page an address is.
std::uint64_t page_offset(const std::byte* address) {
  return reinterpret_cast<std::uintptr_t>(address) % page_bytes();
}

// The blocks that so many bytes take from the start of one.
std::uint64_t align_up(std::uint64_t bytes) {
  return (bytes + kDirectAlignBytes - 1) / kDirectAlignBytes * kDirectAlignBytes;
}

// What a read of one piece from memory gives.
ssize_t copy_bytes(const struct iovec& piece, const std::byte* source, std::uint64_t source_bytes,
                   std::uint64_t offset) {
  const std::uint64_t begin = std::min(offset, source_bytes);
  const std::uint64_t bytes = std::min<std::uint64_t>(piece.iov_len, source_bytes - begin);
  std::memcpy(piece.iov_base, source + begin, bytes);
  return static_cast<ssize_t>(bytes);
}

// Whether pages of a file are in the page cache, as far as mincore(2) tells: those who may not
// write to a file are told of all that they are.
bool are_resident(int fd, std::uint64_t first_page, std::uint64_t count) {
  const std::size_t bytes = count * page_bytes();
  void* address = ::mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fd,
                         static_cast<off_t>(first_page * page_bytes()));
  if (address == MAP_FAILED) return false;
  std::vector<unsigned char> pages(count);
  const bool is_known = ::mincore(address, bytes, pages.data()) == 0;
  ::munmap(address, bytes);
  return is_known && std::all_of(pages.begin(), pages.end(),
                                 [](unsigned char page) { return (page & 1U) != 0; });
}

void sync(int fd, const std::string& path) {
  if (retry([&] { return ::fsync(fd); }) != 0) fail(path);
}

// Network file systems tell only when a file is closed that there is no room for what was written.
void flush(int fd, const std::string& path) {
  const auto close_copy = [&] {
    const int copy = ::fcntl(fd, F_DUPFD_CLOEXEC, 0);
    return copy < 0 ? copy : ::close(copy);
  };
  if (retry(close_copy) != 0) fail(path);
}

}  // namespace

FileSystem find_file_system(std::uint64_t type) {
  struct Entry {
    std::uint64_t type;
    FileSystem file_system;
  };
  // linux/magic.h, and the file systems' own sources for those that are not in the kernel.
  static constexpr Entry entries[] = {
      {0xEF53, {"ext", true, true}},
      {0x58465342, {"xfs", true, true}},
      {0x01021994, {"tmpfs", true, false, true}},
      {0x9123683E, {"btrfs", true, false}},
      {0x794C7630, {"overlayfs", true, false}},
      {0x2FC12FC1, {"zfs", true, false}},
      {0x6969, {"nfs", false, false}},
      {0x517B, {"smb", false, false}},
      {0xFF534D42, {"cifs", false, false}},
      {0xFE534D42, {"smb2", false, false}},
      {0x0BD00BD0, {"lustre", false, false}},
      {0x65735546, {"fuse", false, false}},
      {0x01021997, {"9p", false, false}},
      {0x00C36400, {"ceph", false, false}},
      {0x47504653, {"gpfs", false, false}},
      {0x19830326, {"beegfs", false, false}},
      {0x5346414F, {"openafs", false, false}},
      {0x6B414653, {"afs", false, false}},
      {0x73757245, {"coda", false, false}},
      {0x7461636F, {"ocfs2", false, false}},
      {0x01161970, {"gfs2", false, false}},
      {0x20030528, {"orangefs", false, false}},
      {0x564C, {"ncp", false, false}},
  };
  for (const Entry& entry : entries) {
    if (entry.type == type) return entry.file_system;
  }
  return {"local", true, false};
}

// ---- Descriptor ----

Descriptor& Descriptor::operator=(Descriptor&& other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}

Descriptor::~Descriptor() {
  if (fd_ >= 0) ::close(fd_);
}

int Descriptor::release() {
  const int fd = fd_;
  fd_ = -1;
  return fd;
}

// ---- File ----

File::File(const std::string& path, const std::string& name) : name_(name) {
  // O_NONBLOCK: a FIFO is refused below rather than waited for.
  descriptor_ =
      Descriptor(retry([&] { return ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK); }));
  if (descriptor_.get() < 0) fail(name);
  measure();
}

File::File(int descriptor, const std::string& name, std::uint64_t begin)
    : name_(name), begin_(begin) {
  descriptor_ = Descriptor(retry([&] { return ::fcntl(descriptor, F_DUPFD_CLOEXEC, 0); }));
  if (descriptor_.get() < 0) fail(name);
  measure();
}

File::File(std::shared_ptr<Memory> memory, std::uint64_t bytes, const std::string& name,
           std::uint64_t begin)
    : name_(name), memory_(std::move(memory)), begin_(begin), bytes_(bytes) {}

void File::measure() {
  struct stat status{};
  if (retry([&] { return ::fstat(descriptor_.get(), &status); }) != 0) fail(name_);
  if (S_ISDIR(status.st_mode)) fail(name_, EISDIR);
  if (!S_ISREG(status.st_mode)) {
    throw Error(Failure::kUnsupported,
                "not a regular file: it can be neither mapped nor read at "
                "offsets; open it in Python and pass the file object",
                name_);
  }
  const auto bytes = static_cast<std::uint64_t>(status.st_size);
  bytes_ = bytes - std::min(begin_, bytes);
}

FileSystem File::file_system() const { return file_system_of(descriptor_.get(), name_); }

void File::read_at(void* target, std::size_t bytes, std::uint64_t offset) const {
  struct iovec piece{target, bytes};
  read_pieces(&piece, 1, offset);
}

void File::read_run(const Piece* pieces, std::size_t count) const {
  char gap[kGapBytesMax];  // written by several pieces, read by nobody
  std::vector<struct iovec> run;
  std::uint64_t begin = pieces->offset;
  std::uint64_t end = begin;
  for (const Piece* next = pieces; next != pieces + count; ++next) {
    const Piece& piece = *next;
    const std::uint64_t skipped = piece.offset - end;
    if (skipped > kGapBytesMax) {
      read_pieces(run.data(), run.size(), begin);
      run.clear();
      begin = piece.offset;
    } else if (skipped > 0) {
      run.push_back({gap, skipped});
    }
    run.push_back({piece.target, piece.bytes});
    end = piece.offset + piece.bytes;
  }
  read_pieces(run.data(), run.size(), begin);
}

void File::read_pieces(struct iovec* pieces, std::size_t count, std::uint64_t offset) const {
  skip_bytes(pieces, count, 0);
  while (count > 0) {
    const ssize_t got = memory_ ? copy_bytes(*pieces, memory_->data(), bytes_, offset) : retry([&] {
      return ::preadv(descriptor_.get(), pieces, batch_of(count),
                      static_cast<off_t>(begin_ + offset));
    });
    if (got < 0) fail(name_);
    if (got == 0) fail_at_end(name_, begin_ + offset);
    offset += static_cast<std::uint64_t>(got);
    skip_bytes(pieces, count, static_cast<std::size_t>(got));
  }
}

bool File::is_cached(std::uint64_t begin, std::uint64_t bytes) const {
  if (memory_ || file_system().is_memory) return true;
  // cachestat(2), since Linux 6.5; declared here as C libraries do not have it yet.
  struct {
    std::uint64_t begin, bytes;
  } range{begin_ + begin, bytes};
  struct {
    std::uint64_t cached, dirty, writeback, evicted, recently_evicted;
  } pages{};
  constexpr long cachestat_number = 451;
  const std::uint64_t first_page = range.begin / page_bytes();
  const std::uint64_t page_count = (range.begin + bytes - 1) / page_bytes() - first_page + 1;
  if (::syscall(cachestat_number, descriptor_.get(), &range, &pages, 0) == 0)
    return pages.cached >= page_count;
  return are_resident(descriptor_.get(), first_page, page_count);
}

void File::read_ahead(std::uint64_t begin, std::uint64_t bytes) const {
  ::posix_fadvise(descriptor_.get(), static_cast<off_t>(begin_ + begin), static_cast<off_t>(bytes),
                  POSIX_FADV_WILLNEED);
}

// ---- DirectFile ----

DirectFile::DirectFile(const File& file) : name_(file.name()), begin_(file.begin()) {
#ifdef O_DIRECT
  if (file.memory()) return;
  const FileSystem system = file.file_system();
  if (system.is_memory || !system.maps_well) return;
  // Opened anew: the flag would otherwise count for the descriptor's other users, too.
  char path[40];
  std::snprintf(path, sizeof path, "/proc/self/fd/%d", file.descriptor());
  descriptor_ = Descriptor(retry([&] { return ::open(path, O_RDONLY | O_CLOEXEC | O_DIRECT); }));
#endif
}

std::size_t DirectFile::read_at(std::byte* target, std::uint64_t bytes,
                                std::uint64_t offset) const {
  const std::uint64_t begin = begin_ + offset;
  const std::uint64_t first = begin - begin % kDirectAlignBytes;
  const std::uint64_t end = begin + bytes;
  for (std::uint64_t at = first; at < end;) {
    struct iovec piece{target + (at - first), align_up(end - at)};
    const ssize_t got =
        retry([&] { return ::preadv(descriptor_.get(), &piece, 1, static_cast<off_t>(at)); });
    if (got < 0) fail(name_);
    const std::uint64_t reached = at + static_cast<std::uint64_t>(got);
    if (reached >= end) break;
    // Less than a block is all that is left of the file.
    if (reached - at < kDirectAlignBytes) fail_at_end(name_, reached);
    at = reached - reached % kDirectAlignBytes;
  }
  return begin - first;
}

// ---- Memory ----

namespace {

// The mappings that are there, by their addresses.
struct MappedRange {
  std::uint64_t offset;
  std::uint64_t bytes;
  dev_t device;
  ino_t inode;
};
std::mutex mapped_mutex;

std::map<const std::byte*, MappedRange>& mapped_files() {
  static auto* files = new std::map<const std::byte*, MappedRange>;  // tensors may outlive statics
  return *files;
}

}  // namespace

std::vector<Mapped> find_mappings(int descriptor, std::uint64_t offset) {
  std::vector<Mapped> found;
  struct stat status{};
  if (::fstat(descriptor, &status) != 0) return found;
  const std::lock_guard<std::mutex> lock(mapped_mutex);
  for (const auto& [begin, file] : mapped_files()) {
    const std::uint64_t skipped = offset - std::min(offset, file.offset);
    if (file.device == status.st_dev && file.inode == status.st_ino && skipped < file.bytes)
      found.push_back({begin + skipped, begin + file.bytes});
  }
  return found;
}

std::shared_ptr<Memory> Memory::map(const File& file, std::uint64_t bytes) {
  // Private and writable: tensors are edited in place, and the file never changes. MAP_NORESERVE: a
  // mapping larger than memory is fine, as only pages that are written take any.
  const std::uint64_t skipped = file.begin() % page_bytes();
  void* address =
      ::mmap(nullptr, skipped + bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE,
             file.descriptor(), static_cast<off_t>(file.begin() - skipped));
  if (address == MAP_FAILED) fail(file.name());
  auto* data = static_cast<std::byte*>(address) + skipped;
  std::shared_ptr<Memory> memory(new Memory(data, bytes, true));
  struct stat status{};
  if (::fstat(file.descriptor(), &status) == 0) {
    const std::lock_guard<std::mutex> lock(mapped_mutex);
    mapped_files()[data] = {file.begin(), bytes, status.st_dev, status.st_ino};
  }
  return memory;
}

std::shared_ptr<Memory> Memory::allocate(std::uint64_t bytes) {
  const bool is_large = bytes >= kHugePageBytes;
  void* address = nullptr;
  const int error = ::posix_memalign(&address, is_large ? kHugePageBytes : kMemoryAlignBytes,
                                     std::max<std::size_t>(bytes, kMemoryAlignBytes));
  if (error != 0) throw std::bad_alloc();
  if (is_large) ::madvise(address, bytes, MADV_HUGEPAGE);
  return std::shared_ptr<Memory>(new Memory(static_cast<std::byte*>(address), bytes, false));
}

std::shared_ptr<Memory> Memory::allocate_pages(std::uint64_t bytes) {
  void* address = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (address == MAP_FAILED) throw std::bad_alloc();
  ::madvise(address, bytes, MADV_HUGEPAGE);
  ::madvise(address, bytes, MADV_DONTFORK);
  return std::shared_ptr<Memory>(new Memory(static_cast<std::byte*>(address), bytes, true));
}

Memory::~Memory() {
  if (is_mapped_) {
    {
      const std::lock_guard<std::mutex> lock(mapped_mutex);  // before others can be mapped there
      mapped_files().erase(data_);
    }
    const std::uint64_t skipped = page_offset(data_);
    ::munmap(data_ - skipped, skipped + bytes_);
  } else {
    std::free(data_);
  }
}

std::shared_ptr<const void> Memory::own_part(const std::shared_ptr<Memory>& memory,
                                             std::uint64_t begin, std::uint64_t bytes) {
  // Less is not worth a call to the system.
  constexpr std::uint64_t part_bytes_min = std::uint64_t{64} << 10U;
  if (bytes < part_bytes_min) return memory;
  return std::shared_ptr<const void>(
      memory->data(), [memory, begin, bytes](const void*) { memory->discard(begin, bytes); });
}

void Memory::discard(std::uint64_t begin, std::uint64_t bytes) {
  std::byte* first = data_ + begin;
  std::byte* last = first + bytes;
  last -= page_offset(last);
  first += (page_bytes() - page_offset(first)) % page_bytes();
  if (first < last) ::madvise(first, static_cast<std::size_t>(last - first), MADV_DONTNEED);
}

void drop_pages(const std::byte* begin, std::uint64_t bytes) {
  const std::uint64_t skipped = page_offset(begin);
  ::madvise(const_cast<std::byte*>(begin) - skipped, skipped + bytes, MADV_DONTNEED);
}

// ---- AtomicFile ----

// Delegates, so that the destructor tidies up after an exception.
AtomicFile::AtomicFile(const std::string& path) : AtomicFile() {
  path_ = path;
  const std::string target = resolve_link(path);
  const std::size_t slash = target.rfind('/');
  const std::string directory = slash == std::string::npos ? "." : target.substr(0, slash + 1);
  name_ = slash == std::string::npos ? target : target.substr(slash + 1);
  if (name_.empty()) fail(path, target.empty() ? ENOENT : EISDIR);
  directory_ = Descriptor(
      retry([&] { return ::open(directory.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC); }));
  if (directory_.get() < 0) fail(path);
  file_system_ = file_system_of(directory_.get(), path);
  struct stat status{};
  const bool exists =
      retry([&] { return ::fstatat(directory_.get(), name_.c_str(), &status, 0); }) == 0;
  if (!exists && errno != ENOENT) fail(path);
  if (exists && S_ISDIR(status.st_mode)) fail(path, EISDIR);
  if (exists && !S_ISREG(status.st_mode)) fail(path, EINVAL);
  // Renaming would replace a file that may not be written to.
  if (exists &&
      retry([&] { return ::faccessat(directory_.get(), name_.c_str(), W_OK, AT_EACCESS); }) != 0)
    fail(path);
  if (!open_unnamed()) open_hidden();
  if (exists) keep_owner_and_mode(status);
}

void AtomicFile::keep_owner_and_mode(const struct stat& old) {
  // Only a privileged process can give a file away; others become the owner. If even the group
  // cannot be kept, what it was allowed must not go to another one.
  const auto change_owner = [&](uid_t owner) {
    return retry([&] { return ::fchown(descriptor_.get(), owner, old.st_gid); }) == 0;
  };
  mode_t mode = old.st_mode & 07777U;
  if (!change_owner(old.st_uid) && !change_owner(static_cast<uid_t>(-1))) {
    const mode_t others = (mode & S_IRWXO) << 3U;
    mode &= ~static_cast<mode_t>(S_IRWXG | S_ISGID) | others;
  }
  if (retry([&] { return ::fchmod(descriptor_.get(), mode); }) != 0) fail(path_);
}

bool AtomicFile::open_unnamed() {
#ifdef O_TMPFILE
  descriptor_ = Descriptor(
      retry([&] { return ::openat(directory_.get(), ".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0666); }));
  // Some file systems cannot, and without /proc such a file cannot be named.
  return descriptor_.get() >= 0 && retry([] { return ::access("/proc/self/fd", X_OK); }) == 0;
#else
  return false;
#endif
}

// The file is locked as long as it is open, which tells others that its maker lives. One of them
// may have found it before it was locked, and removed it: another name, then.
void AtomicFile::open_hidden() {
  remove_all_abandoned(directory_.get());
  struct stat status{};
  for (bool is_ours = false; !is_ours; is_ours = status.st_nlink > 0) {
    hidden_name_ = make_hidden_name();
    descriptor_ = Descriptor(retry([&] {
      return ::openat(directory_.get(), hidden_name_.c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC,
                      0666);
    }));
    if (descriptor_.get() < 0) fail(path_);
    retry([&] { return ::flock(descriptor_.get(), LOCK_EX); });  // if there are locks at all
    if (retry([&] { return ::fstat(descriptor_.get(), &status); }) != 0) fail(path_);
  }
}

AtomicFile::~AtomicFile() {
  if (!hidden_name_.empty()) ::unlinkat(directory_.get(), hidden_name_.c_str(), 0);
}

void AtomicFile::reserve(std::uint64_t bytes) {
  if (!file_system_.preallocates || bytes == 0) return;
  const int result =
      retry([&] { return ::fallocate(descriptor_.get(), 0, 0, static_cast<off_t>(bytes)); });
  if (result != 0 && errno != EOPNOTSUPP && errno != ENOSYS) fail(path_);
}

bool AtomicFile::bypass_cache() {
#ifdef O_DIRECT
  if (!file_system_.preallocates) return false;
  const int flags = ::fcntl(descriptor_.get(), F_GETFL);
  return flags >= 0 && ::fcntl(descriptor_.get(), F_SETFL, flags | O_DIRECT) == 0;
#else
  return false;
#endif
}

void AtomicFile::write_at(struct iovec* pieces, std::size_t count, std::uint64_t offset) {
  skip_bytes(pieces, count, 0);
  while (count > 0) {
    const ssize_t written = retry([&] {
      return ::pwritev(descriptor_.get(), pieces, batch_of(count), static_cast<off_t>(offset));
    });
    if (written <= 0) fail(path_, written < 0 ? errno : EIO);
    offset += static_cast<std::uint64_t>(written);
    skip_bytes(pieces, count, static_cast<std::size_t>(written));
  }
}

void AtomicFile::write_at(const void* source, std::size_t bytes, std::uint64_t offset) {
  struct iovec piece{const_cast<void*>(source), bytes};
  write_at(&piece, 1, offset);
}

void AtomicFile::truncate(std::uint64_t bytes) {
  if (retry([&] { return ::ftruncate(descriptor_.get(), static_cast<off_t>(bytes)); }) != 0)
    fail(path_);
}

// A link never replaces a file and a rename does, so the unnamed file is linked beside the target
// and then renamed. The name in between is the target's own and used under a lock, which ends with
// the process: what is found there was left by one that was killed between the two calls, and goes.
// Without the lock nothing that is found may be touched, and chance makes the name.
Descriptor AtomicFile::link_hidden() {
  char source[40];
  std::snprintf(source, sizeof source, "/proc/self/fd/%d", descriptor_.get());
  const int directory = directory_.get();
  Descriptor lock = lock_directory(directory);
  const std::string linked_name =
      lock.get() >= 0 ? make_linked_name(name_) : make_linked_name(make_hidden_name());
  const auto link = [&] {
    return retry([&] {
      return ::linkat(AT_FDCWD, source, directory, linked_name.c_str(), AT_SYMLINK_FOLLOW);
    });
  };
  if (link() != 0) {
    if (errno != EEXIST || lock.get() < 0) fail(path_);
    ::unlinkat(directory, linked_name.c_str(), 0);
    if (link() != 0) fail(path_);
  }
  hidden_name_ = linked_name;
  return lock;
}

void AtomicFile::complete(bool durable) {
  if (durable) sync(descriptor_.get(), path_);
  flush(descriptor_.get(), path_);
}

void AtomicFile::commit(bool durable) {
  const Descriptor lock = hidden_name_.empty() ? link_hidden() : Descriptor();
  const auto rename = [&] {
    return ::renameat(directory_.get(), hidden_name_.c_str(), directory_.get(), name_.c_str());
  };
  if (retry(rename) != 0) fail(path_);
  hidden_name_.clear();
  // Not left to the descriptor: a process forked meanwhile has it too, and would keep the lock.
  if (lock.get() >= 0) ::flock(lock.get(), LOCK_UN);
  if (!durable) return;
  const Descriptor directory(
      retry([&] { return ::openat(directory_.get(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC); }));
  if (directory.get() < 0) fail(path_);
  sync(directory.get(), path_);
}

}  // namespace fastsd
