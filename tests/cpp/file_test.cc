#include "file.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <filesystem>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "check.h"
#include "faults.h"
#include "support.h"
#include "writer.h"

namespace fastsd::test {
namespace {

namespace fs = std::filesystem;

// Files cannot be named through /proc: AtomicFile asks whether it is there, and takes a hidden file
// where it is not.
const Injection kWithoutProc = {Fault::kError, ENOENT, 0, true, "access"};

void write_atomically(const std::string& path, const std::string& bytes, bool durable = false) {
  AtomicFile file(path);
  file.reserve(bytes.size());
  file.write_at(bytes.data(), bytes.size(), 0);
  file.complete(durable);
  file.commit(durable);
}

// The errno with which `call` fails; 0 if it does not.
template <class Call>
int errno_of(const std::string& path, Call call) {
  try {
    call();
  } catch (const Error& error) {
    return error.kind == Failure::kSystem && error.path == path ? error.system_errno : -1;
  }
  return 0;
}

int errno_of_atomic_file(const std::string& path) {
  return errno_of(path, [&] { const AtomicFile file(path); });
}

mode_t mode_of(const std::string& path) {
  struct stat status{};
  return ::stat(path.c_str(), &status) == 0 ? status.st_mode & 07777U : 0;
}

// ---- File ----

TEST(file_refuses_what_is_not_a_regular_file) {
  const Folder folder;
  const auto errno_of_file = [](const std::string& path) {
    return errno_of(path, [&] { const File file(path); });
  };
  CHECK(errno_of_file(folder.path("missing")) == ENOENT);
  CHECK(errno_of_file(folder.path(".")) == EISDIR);
  CHECK(errno_of_file("") == ENOENT);
  CHECK(::mkfifo(folder.path("fifo").c_str(), 0600) == 0);
  CHECK_THROWS(File(folder.path("fifo")), Failure::kUnsupported);
}

TEST(file_reads_at_offsets) {
  const Folder folder;
  write_whole(folder.path("f"), "0123456789");
  const File file(folder.path("f"));
  CHECK(file.bytes() == 10 && file.name() == folder.path("f"));
  std::string target(4, '-');
  file.read_at(target.data(), 4, 6);
  CHECK(target == "6789");
  file.read_at(nullptr, 0, 100);
  CHECK_THROWS(file.read_at(target.data(), 4, 7), Failure::kTruncated);
  CHECK_THROWS(file.read_at(target.data(), 1, 10), Failure::kTruncated);
}

// Pieces of random sizes and distances: more than the system takes at a time, with gaps on both
// sides of what is read over, and empty ones.
TEST(file_reads_runs_of_pieces) {
  const Folder folder;
  Random random(40);
  const std::vector<std::byte> content = random.bytes(4 << 20U);
  const std::string path = folder.path("f");
  write_whole(path, {reinterpret_cast<const char*>(content.data()), content.size()});
  const File file(path);
  for (const std::size_t count : {std::size_t{1}, std::size_t{2}, std::size_t{IOV_MAX},
                                  std::size_t{IOV_MAX} + 1, std::size_t{3000}}) {
    std::vector<File::Piece> pieces;
    std::vector<std::vector<std::byte>> targets(count);
    std::uint64_t at = random.below(100);
    for (std::vector<std::byte>& target : targets) {
      const std::uint64_t gaps[] = {
          0, 0, 0, 1 + random.below(300), File::kGapBytesMax, File::kGapBytesMax + 1};
      at += gaps[random.below(count > 2000 ? 4 : std::size(gaps))];
      target.resize(random.below(10) == 0 ? 0 : random.below(800));
      pieces.push_back({target.data(), target.size(), at});
      at += target.size();
    }
    if (!CHECK(at <= content.size())) return;
    file.read_run(pieces.data(), pieces.size());
    bool is_right = true;
    for (const File::Piece& piece : pieces) {
      const auto* expected = content.data() + piece.offset;
      is_right = is_right && std::equal(piece.target, piece.target + piece.bytes, expected);
    }
    CHECK(is_right);
  }
}

// Hints, which change nothing that can be read.
TEST(file_may_be_read_ahead) {
  const Folder folder;
  const std::string path = folder.path("f");
  write_atomically(path, std::string(100000, 'x'), true);
  const File file(path);
  CHECK(::posix_fadvise(file.descriptor(), 0, 0, POSIX_FADV_DONTNEED) == 0);
  file.read_ahead(0, 50000);
  file.read_ahead(50000, 100000);  // more than there is
  file.read_ahead(200000, 1);
  std::string target(100000, '-');
  file.read_at(target.data(), target.size(), 0);
  CHECK(target == std::string(100000, 'x'));
  static_cast<void>(file.is_cached(0, 50000));
  static_cast<void>(file.is_cached(99999, 1));
}

TEST(file_tells_when_it_ended_early) {
  const Folder folder;
  const std::string path = folder.path("f");
  write_whole(path, std::string(10000, 'x'));
  const File file(path);
  std::vector<std::byte> target(9000);
  const File::Piece pieces[] = {{target.data(), 100, 0}, {target.data() + 100, 8900, 200}};
  file.read_run(pieces, 2);
  CHECK(::truncate(path.c_str(), 5000) == 0);
  CHECK(file.bytes() == 10000);
  CHECK_THROWS(file.read_run(pieces, 2), Failure::kTruncated);
  CHECK_THROWS(file.read_at(target.data(), 5001, 0), Failure::kTruncated);
  file.read_at(target.data(), 5000, 0);
  // A gap that is read over must be there as well, or the piece after it is not.
  const File::Piece beyond[] = {{target.data(), 10, 4000}, {target.data() + 10, 10, 5500}};
  CHECK_THROWS(file.read_run(beyond, 2), Failure::kTruncated);
}

TEST(file_systems_are_known_by_their_numbers) {
  struct Known {
    std::uint64_t type;
    bool maps_well;
    bool preallocates;
  };
  const Known known[] = {
      {EXT4_SUPER_MAGIC, true, true},
      {XFS_SUPER_MAGIC, true, true},
      {TMPFS_MAGIC, true, false},
      {BTRFS_SUPER_MAGIC, true, false},
      {OVERLAYFS_SUPER_MAGIC, true, false},
      {NFS_SUPER_MAGIC, false, false},
      {SMB_SUPER_MAGIC, false, false},
      {0xFF534D42, false, false},  // CIFS_SUPER_MAGIC
      {0xFE534D42, false, false},  // SMB2_SUPER_MAGIC
      {0x65735546, false, false},  // FUSE_SUPER_MAGIC
      {0x00C36400, false, false},  // CEPH_SUPER_MAGIC
      {V9FS_MAGIC, false, false},
      {CODA_SUPER_MAGIC, false, false},
      {AFS_SUPER_MAGIC, false, false},
      {AFS_FS_MAGIC, false, false},
      {OCFS2_SUPER_MAGIC, false, false},
      {NCP_SUPER_MAGIC, false, false},
      {0x01161970, false, false},  // GFS2_MAGIC, linux/gfs2_ondisk.h
      {0x0BD00BD0, false, false},  // LUSTRE_SUPER_MAGIC
      {RAMFS_MAGIC, true, false},  // not in the table: local
      {0, true, false},
  };
  for (const Known& entry : known) {
    const FileSystem found = find_file_system(entry.type);
    if (!CHECK(found.maps_well == entry.maps_well && found.preallocates == entry.preallocates))
      std::printf("  type %llx, %s\n", static_cast<unsigned long long>(entry.type), found.name);
  }
  CHECK(std::string(find_file_system(XFS_SUPER_MAGIC).name) == "xfs");
  CHECK(std::string(find_file_system(0).name) == "local");
  const Folder folder;
  write_whole(folder.path("f"), "x");
  CHECK(File(folder.path("f")).file_system().name != nullptr);
}

// Bytes that tell where they are.
std::string numbered_bytes(std::size_t count) {
  std::string content(count, '-');
  for (std::size_t i = 0; i < count; ++i) content[i] = static_cast<char>(i % 251);
  return content;
}

// As seen by a file that starts later, and by memory that stands for one.
TEST(file_may_start_anywhere) {
  const Folder folder;
  const std::string path = folder.path("f");
  const std::string content = numbered_bytes(20000);
  write_whole(path, content);
  const File whole(path);
  const std::shared_ptr<Memory> memory = Memory::allocate(content.size());
  for (const std::uint64_t begin : {0U, 1U, 64U, 4095U, 4096U, 5000U, 19999U, 20000U, 30000U}) {
    const std::string expected = content.substr(std::min<std::size_t>(begin, content.size()));
    const File file(whole.descriptor(), "name", begin);
    expected.copy(reinterpret_cast<char*>(memory->data()), expected.size());
    const File copy(memory, expected.size(), "name", begin);
    for (const File* each : {&file, &copy}) {
      CHECK(each->name() == "name" && each->begin() == begin);
      if (!CHECK(each->bytes() == expected.size())) return;
      std::string all(expected.size(), '?');
      each->read_at(all.data(), all.size(), 0);
      CHECK(all == expected);
      char byte = 0;
      CHECK_THROWS((each->read_at(&byte, 1, expected.size()), 0), Failure::kTruncated);
      if (expected.size() < 3) continue;
      each->read_at(&byte, 1, 2);
      CHECK(byte == expected[2]);
      std::byte targets[2];
      const File::Piece pieces[] = {{targets, 1, 0}, {targets + 1, 1, expected.size() - 1}};
      each->read_run(pieces, 2);
      CHECK(char(targets[0]) == expected.front() && char(targets[1]) == expected.back());
    }
  }
}

TEST(file_has_a_descriptor_of_its_own) {
  const Folder folder;
  const std::string path = folder.path("f");
  write_whole(path, "content");
  std::optional<File> first(path);
  const File second(first->descriptor(), "second", 3);
  first.reset();
  char byte = 0;
  second.read_at(&byte, 1, 0);
  CHECK(byte == 't');
  CHECK_THROWS(File(-1, "none", 0), Failure::kSystem);
  const int folder_descriptor = ::open(folder.path(".").c_str(), O_RDONLY | O_DIRECTORY);
  CHECK_THROWS(File(folder_descriptor, "folder", 0), Failure::kSystem);
  ::close(folder_descriptor);
  int pipe[2];
  CHECK(::pipe(pipe) == 0);
  CHECK_THROWS(File(pipe[0], "pipe", 0), Failure::kUnsupported);
  ::close(pipe[0]);
  ::close(pipe[1]);
}

// ---- Memory ----

TEST(memory_is_aligned) {
  for (const std::uint64_t bytes : {0U, 1U, 100U, 4U << 20U, (4U << 20U) + 1}) {
    const std::shared_ptr<Memory> memory = Memory::allocate(bytes);
    const std::uintptr_t alignment = bytes >= (4U << 20U) ? 2U << 20U : 64U;
    CHECK(reinterpret_cast<std::uintptr_t>(memory->data()) % alignment == 0);
    std::fill_n(memory->data(), bytes, std::byte{1});
  }
// Sanitizers take such a request for a mistake.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  bool is_refused = false;
  try {
    Memory::allocate(std::uint64_t{1} << 60U);
  } catch (const std::bad_alloc&) {
    is_refused = true;
  }
  CHECK(is_refused);
#endif
}

TEST(memory_mapped_is_private_and_outlives_its_file) {
  const Folder folder;
  const std::string path = folder.path("f");
  write_whole(path, std::string(10000, 'x'));
  std::shared_ptr<Memory> memory;
  std::shared_ptr<Memory> other;
  {
    const File file(path);
    memory = Memory::map(file, file.bytes());
    other = Memory::map(file, file.bytes());
  }
  memory->data()[9999] = std::byte{'y'};
  CHECK(memory->data()[9999] == std::byte{'y'} && memory->data()[0] == std::byte{'x'});
  CHECK(other->data()[9999] == std::byte{'x'});
  CHECK(read_whole(path) == std::string(10000, 'x'));
}

TEST(memory_may_be_mapped_from_any_byte) {
  const Folder folder;
  const std::string path = folder.path("f");
  const std::string content = numbered_bytes(20000);
  write_whole(path, content);
  const File whole(path);
  for (const std::uint64_t begin : {0U, 1U, 64U, 4095U, 4096U, 4160U, 19999U}) {
    const File file(whole.descriptor(), path, begin);
    const std::shared_ptr<Memory> memory = Memory::map(file, file.bytes());
    CHECK(reinterpret_cast<std::uintptr_t>(memory->data()) % 4096 == begin % 4096);
    memory->data()[0] ^= std::byte{1};
    memory->data()[0] ^= std::byte{1};
    CHECK(std::string(reinterpret_cast<char*>(memory->data()), file.bytes()) ==
          content.substr(begin));
  }
}

// What is given back reads as zeros while the rest is there.
TEST(memory_is_given_back_in_parts) {
  const std::uint64_t bytes = 4U << 20U;
  std::shared_ptr<Memory> memory = Memory::allocate(bytes);
  const std::byte* data = memory->data();
  std::fill_n(memory->data(), bytes, std::byte{1});
  std::shared_ptr<const void> first = Memory::own_part(memory, 100, 1U << 20U);
  std::shared_ptr<const void> small = Memory::own_part(memory, 3U << 20U, 4096);
  const std::shared_ptr<const void> last = Memory::own_part(memory, 2U << 20U, 1U << 20U);
  memory.reset();
  small.reset();
  first.reset();
  const std::byte* end = data + (1U << 20U) + 100;
  CHECK(std::all_of(data, data + 4096, [](std::byte b) { return b == std::byte{1}; }));
  CHECK(
      std::all_of(data + 4096, data + (1U << 20U), [](std::byte b) { return b == std::byte{0}; }));
  CHECK(std::all_of(end - 100, data + bytes, [](std::byte b) { return b == std::byte{1}; }));
}

// ---- AtomicFile ----

TEST(atomic_file_appears_when_committed) {
  const Folder folder;
  const std::string path = folder.path("f");
  for (const bool durable : {false, true}) {
    const std::string bytes = durable ? "second, longer" : "first";
    const std::string before = read_whole(path);
    AtomicFile file(path);
    file.write_at(bytes.data(), bytes.size(), 0);
    CHECK(read_whole(path) == before);
    file.complete(durable);
    file.commit(durable);
    CHECK(read_whole(path) == bytes);
    CHECK(folder.file_count() == 1);
  }
}

TEST(atomic_file_leaves_nothing_without_commit) {
  const Folder folder;
  const std::string path = folder.path("f");
  {
    AtomicFile(path).write_at("x", 1, 0);
  }
  CHECK(folder.file_count() == 0);
  write_whole(path, "old");
  {
    AtomicFile(path).write_at("new", 3, 0);
  }
  CHECK(folder.file_count() == 1 && read_whole(path) == "old");
}

TEST(atomic_file_falls_back_to_a_hidden_file) {
  const InjectionScope scope(kWithoutProc);
  const Folder folder;
  const std::string path = folder.path("f");
  {
    AtomicFile file(path);
    file.write_at("new", 3, 0);
    CHECK(folder.file_count() == 1);
    const std::string hidden = fs::directory_iterator(folder.path("."))->path().filename();
    CHECK(hidden.rfind(".fastsd-", 0) == 0);
  }
  CHECK(folder.file_count() == 0);
  write_whole(path, "old");
  CHECK(::chmod(path.c_str(), 0640) == 0);
  write_atomically(path, "new", true);
  CHECK(folder.file_count() == 1 && read_whole(path) == "new" && mode_of(path) == 0640);
}

// What was left by the dead goes; what the living write, and what another host may be writing,
// stays.
TEST(atomic_file_removes_hidden_files_of_the_dead_only) {
  const InjectionScope scope(kWithoutProc);
  const Folder folder;
  const std::string other = folder.path(".fastsd-0123456789abcdef-0123456789abcdef.tmp");
  write_whole(other, "of another host");
  AtomicFile living(folder.path("a"));
  living.write_at("alive", 5, 0);
  const pid_t child = ::fork();
  if (child == 0) {
    AtomicFile dying(folder.path("b"));
    ::_exit(0);
  }
  ::waitpid(child, nullptr, 0);
  CHECK(folder.file_count() == 3);
  write_atomically(folder.path("c"), "new");
  CHECK(folder.file_count() == 3 && read_whole(folder.path("c")) == "new");
  living.complete(false);
  living.commit(false);
  CHECK(read_whole(folder.path("a")) == "alive" && fs::exists(other));
}

// A name that another process removes before its maker could lock the file is not used.
TEST(atomic_file_notices_when_its_hidden_name_goes) {
  const Folder folder;
  const std::string path = folder.path("f");
  Injection injection = {Fault::kMeanwhile, 0, 0, false, "flock", false};
  injection.meanwhile = [&] { fs::remove(*fs::directory_iterator(folder.path("."))); };
  const Outcome outcome = run_with(injection, path.c_str(), [&] { write_atomically(path, "new"); });
  CHECK(outcome.is_injected && outcome.end == Outcome::End::kReturned);
  CHECK(read_whole(path) == "new" && folder.file_count() == 1);
}

// An error, wherever the file is then.
TEST(atomic_file_whose_folder_vanishes_is_an_error) {
  for (const bool has_unnamed_files : {false, true}) {
    for (const char* call : {"fstatfs", "pwritev", "renameat"}) {
      const Folder folder;
      fs::create_directory(folder.path("deep"));
      const std::string path = folder.path("deep/f");
      Injection injection = {Fault::kMeanwhile, 0, 0, false, call, has_unnamed_files};
      injection.meanwhile = [&] { fs::remove_all(folder.path("deep")); };
      const Outcome outcome =
          run_with(injection, path.c_str(), [&] { write_atomically(path, "new"); });
      CHECK(outcome.is_injected && outcome.end == Outcome::End::kThrew);
      CHECK(folder.file_count() == 0);
    }
  }
}

TEST(atomic_file_that_cannot_be_named_leaves_nothing) {
  for (const bool is_hidden : {false, true}) {
    const Folder folder;
    const std::string path = folder.path("f");
    {
      std::optional<InjectionScope> scope;
      if (is_hidden) scope.emplace(kWithoutProc);
      AtomicFile file(path);
      scope.reset();
      file.write_at("x", 1, 0);
      fs::create_directory(path);  // which a rename does not replace
      CHECK(errno_of(path, [&] { file.commit(false); }) == EISDIR);
    }
    CHECK(folder.file_count() == 1);
  }
}

TEST(atomic_file_keeps_the_mode) {
  const Folder folder;
  const std::string path = folder.path("f");
  const mode_t mask = ::umask(027);
  write_atomically(path, "new");
  ::umask(mask);
  CHECK(mode_of(path) == 0640);
  for (const mode_t mode : {0600U, 0666U, 0755U}) {
    CHECK(::chmod(path.c_str(), mode) == 0);
    write_atomically(path, "again");
    CHECK(mode_of(path) == mode);
  }
}

TEST(atomic_file_replaces_what_a_link_points_to) {
  const Folder folder;
  fs::create_directory(folder.path("deep"));
  const std::string path = folder.path("deep/f");
  fs::create_symlink("f", folder.path("deep/near"));            // beside the target
  fs::create_symlink("deep/near", folder.path("far"));          // relative, to a link
  fs::create_symlink(folder.path("far"), folder.path("abs"));   // absolute
  for (const std::string name : {"abs", "far", "deep/near"}) {  // at first the target is missing
    write_atomically(folder.path(name), name);
    CHECK(fs::is_symlink(folder.path(name)));
    CHECK(fs::is_regular_file(fs::symlink_status(path)) && read_whole(path) == name);
  }
  fs::create_symlink("loop", folder.path("loop"));
  CHECK(errno_of_atomic_file(folder.path("loop")) == ELOOP);
}

TEST(atomic_file_refuses_what_it_cannot_replace) {
  const Folder folder;
  CHECK(errno_of_atomic_file("") == ENOENT);
  CHECK(errno_of_atomic_file("/") == EISDIR);
  CHECK(errno_of_atomic_file(folder.path("")) == EISDIR);
  CHECK(errno_of_atomic_file(folder.path(".")) == EISDIR);
  CHECK(errno_of_atomic_file(folder.path("missing/f")) == ENOENT);
  CHECK(errno_of_atomic_file(folder.path(std::string(300, 'n'))) == ENAMETOOLONG);
  CHECK(::mkfifo(folder.path("fifo").c_str(), 0600) == 0);
  CHECK(errno_of_atomic_file(folder.path("fifo")) == EINVAL);
  write_whole(folder.path("f"), "old");
  CHECK(errno_of_atomic_file(folder.path("f/g")) == ENOTDIR);
  CHECK(::chmod(folder.path("f").c_str(), 0400) == 0);
  CHECK(errno_of_atomic_file(folder.path("f")) == (::geteuid() == 0 ? 0 : EACCES));
  CHECK(folder.file_count() == 2 && read_whole(folder.path("f")) == "old");
}

TEST(atomic_file_is_written_in_pieces_of_any_number) {
  const Folder folder;
  const std::string path = folder.path("f");
  std::string expected;
  std::vector<std::string> parts;
  parts.reserve(3000);  // the pieces point into it
  std::vector<iovec> pieces;
  for (int i = 0; i < 3000; ++i) {
    std::string& part = parts.emplace_back(i % 7 == 0 ? "" : std::to_string(i) + ",");
    expected += part;
    pieces.push_back({part.data(), part.size()});
  }
  AtomicFile file(path);
  file.reserve(expected.size() + 100);
  file.write_at(pieces.data(), pieces.size(), 3);
  file.write_at("abc", 3, 0);
  file.write_at("", 0, 0);
  file.truncate(expected.size() + 3);
  file.complete(false);
  file.commit(false);
  CHECK(read_whole(path) == "abc" + expected);
}

TEST(atomic_file_bypasses_the_cache_in_whole_blocks) {
  const Folder folder;
  const std::string path = folder.path("f");
  const std::shared_ptr<Memory> block = Memory::allocate(std::uint64_t{8} << 20U);
  const std::size_t bytes = 3 * kDirectAlignBytes;
  std::fill_n(block->data(), bytes, std::byte{'d'});
  AtomicFile file(path);
  file.reserve(bytes);
  static_cast<void>(file.bypass_cache());  // where it cannot, the same calls work all the same
  file.write_at(block->data(), bytes, 0);
  file.truncate(bytes - 100);
  file.complete(true);
  file.commit(true);
  CHECK(read_whole(path) == std::string(bytes - 100, 'd'));
}

// ---- Whole files: durable ones of more than 32 MiB are written in whole blocks, bypassing the
// cache ----

// Storages that end anywhere, small and large ones, one with gaps; and names that make the header
// as large as `header_bytes`.
FsdLayout make_large_layout(const std::vector<std::byte>& memory, std::uint64_t header_bytes) {
  constexpr std::uint64_t count = 150;
  Random random(41);
  std::vector<Tensor> tensors;
  std::uint64_t at = 0;
  for (std::uint64_t i = 0; i < count; ++i) {
    const std::uint64_t wanted = i % 12 == 0 ? random.below(3 << 20U) : random.below(150000);
    const std::uint64_t bytes = std::min(wanted, memory.size() - at);
    const std::string name = "t" + std::to_string(i) + std::string(header_bytes / count, 'n');
    const Dims stride = {i == 12 ? 3 : 1};
    const Dims shape = {std::int64_t(bytes) / stride[0]};
    tensors.emplace_back(name, DType::kUInt8, memory.data() + at, shape, stride);
    at += bytes;
  }
  const Dims rest = {std::int64_t(memory.size() - at)};
  tensors.emplace_back("last", DType::kUInt8, memory.data() + at, rest);
  return lay_out(tensors);
}

void check_that_durable_files_are_the_same(std::uint64_t header_bytes) {
  const Folder folder;
  const std::vector<std::byte> memory = Random(42).bytes((33 << 20U) + 12345);
  FsdLayout layout = make_large_layout(memory, header_bytes);
  CHECK(layout.data_begin() >= header_bytes && layout.file_bytes() > (33 << 20U));
  const auto write = [&](const char* name, bool durable) {
    WriteOptions options;
    options.durable = durable;
    write_file(folder.path(name), layout, options, nullptr);
    return read_whole(folder.path(name));
  };
  const std::string buffered = write("buffered", false);
  const std::string direct = write("direct", true);
  CHECK(buffered.size() == layout.file_bytes());
  CHECK(buffered == direct);
  CHECK(buffered == whole_file(layout));
}

TEST(durable_file_is_the_same_as_any_other) { check_that_durable_files_are_the_same(0); }

// Of several windows, the last of which is shared with the first storages.
TEST(durable_file_with_a_large_header_is_the_same) {
  check_that_durable_files_are_the_same((9 << 20U) + 1);
}

}  // namespace
}  // namespace fastsd::test
