// Whatever call of a save fails, and wherever the process dies: the old file or the new one is
// there, whole, and the next save leaves nothing but its own.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "check.h"
#include "faults.h"
#include "layouts.h"
#include "reader.h"
#include "support.h"

namespace fastsd::test {
namespace {

namespace fs = std::filesystem;
using End = Outcome::End;
using Save = std::function<void(const std::string& path)>;

// Where a save goes, and how.
struct Place {
  bool has_old;
  bool is_link;
  bool has_unnamed_files;
  bool is_durable;
};

// Whether to try everything, which takes minutes.
bool is_thorough() { return std::getenv("FASTSD_SLOW") != nullptr; }

// In memory, if not: ext4 writes a file that replaces another to its device at once.
std::string parent_folder() {
  const bool has_memory = ::access("/dev/shm", W_OK) == 0;
  return has_memory && !is_thorough() ? "/dev/shm" : Folder::default_parent();
}

std::vector<Place> some_places() {
  if (!is_thorough()) {
    return {{true, false, true, true},
            {true, true, false, true},
            {false, true, true, false},
            {false, false, false, false}};
  }
  std::vector<Place> places;
  places.reserve(16);
  for (unsigned bits = 0; bits < 16; ++bits)
    places.push_back({(bits & 1U) != 0, (bits & 2U) != 0, (bits & 4U) != 0, (bits & 8U) != 0});
  return places;
}

// A folder with the target of a save.
class Target {
 public:
  Target(const Place& place, const std::string& parent) : place_(place), folder_(parent) {
    if (place.is_link) {
      fs::create_directory(folder_.path("real"));
      fs::create_symlink("real/x", path());
    }
    if (place.has_old) {
      write_whole(file(), kOld);
      ::chmod(file().c_str(), 0640);
    }
  }

  std::string path() const { return folder_.path("x"); }
  bool is_old() const { return place_.has_old ? read_whole(file()) == kOld : !fs::exists(file()); }
  bool is_new(const std::string& content) const {
    return read_whole(file()) == content && (!place_.is_link || fs::is_symlink(path()));
  }
  bool has_litter() const {
    const fs::directory_iterator files(fs::path(file()).parent_path());
    return std::any_of(begin(files), end(files), [](const fs::directory_entry& entry) {
      return entry.path().filename() != "x";
    });
  }

 private:
  static constexpr const char* kOld = "what was there before";

  std::string file() const { return place_.is_link ? folder_.path("real/x") : path(); }

  Place place_;
  Folder folder_;
};

bool is_right(const Injection& injection, const Place& place, const Target& target,
              const Outcome& outcome, const std::string& content) {
  const bool must_die = injection.fault == Fault::kDieBefore || injection.fault == Fault::kDieAfter;
  if (must_die) return outcome.end == End::kDied && (target.is_old() || target.is_new(content));
  if (target.has_litter()) return false;
  if (outcome.end == End::kReturned) return target.is_new(content);
  // An interrupted call is made again, and the rest of a short one.
  if (injection.fault == Fault::kShort || injection.error == EINTR) return false;
  // Once the file has its name, only its folder can fail to get to the device.
  const bool is_late = place.is_durable && target.is_new(content);
  return outcome.end == End::kThrew && (target.is_old() || is_late);
}

// Makes each call of a save go wrong in each way.
void check_every_fault(const Place& place, const Save& save, const std::string& content,
                       const std::string& parent = parent_folder()) {
  std::size_t fault_count = 0;
  const Injection faults[] = {
      {Fault::kError, EIO},   {Fault::kError, ENOSPC}, {Fault::kError, EDQUOT},
      {Fault::kError, EINTR}, {Fault::kShort},         {Fault::kDieBefore},
      {Fault::kDieAfter},
  };
  for (Injection injection : faults) {
    injection.has_unnamed_files = place.has_unnamed_files;
    for (;; ++injection.call) {
      const Target target(place, parent);
      const std::string path = target.path();
      const Outcome outcome = run_with(injection, path.c_str(), [&] { save(path); });
      if (!outcome.is_injected) {
        CHECK(outcome.end == End::kReturned && injection.call > 5);
        break;
      }
      bool passes = is_right(injection, place, target, outcome, content);
      if (passes) {
        Injection none;
        none.has_unnamed_files = place.has_unnamed_files;
        run_with(none, path.c_str(), [&] { save(path); });
        passes = target.is_new(content) && !target.has_litter();
      }
      if (!CHECK(passes)) {
        std::printf(
            "  call %zu, %s; fault %d, errno %d; end %d; old %d, link %d, unnamed %d, durable %d\n",
            injection.call, outcome.call, int(injection.fault), injection.error, int(outcome.end),
            place.has_old, place.is_link, place.has_unnamed_files, place.is_durable);
      }
    }
    fault_count += injection.call;
  }
  if (is_thorough()) std::printf("%zu faults\n", fault_count);
}

std::vector<Tensor> make_tensors(const std::vector<std::byte>& memory) {
  const Dims columns = {std::int64_t(memory.size() / 2 / 40), 5};
  const std::byte* half = memory.data() + memory.size() / 2;
  return {{"data/0", DType::kUInt8, memory.data(), {std::int64_t(memory.size() / 2)}},
          {"data/1", DType::kFloat32, half, columns, {5, 1}}};
}

void check_saves(const LayOut lay_out_tensors, const Place& place, std::size_t bytes) {
  const std::vector<std::byte> memory = Random(61).bytes(bytes);
  const std::vector<Tensor> tensors = make_tensors(memory);
  const auto save = [&](const std::string& path) {
    WriteOptions options;
    options.durable = place.is_durable;
    write_file(path, *lay_out_tensors(tensors), options, nullptr);
  };
  const std::unique_ptr<Layout> layout = lay_out_tensors(tensors);
  checksum_storages(*layout, {}, nullptr);
  check_every_fault(place, save, whole_file(*layout));
}

TEST(crash_at_any_call_of_a_save) {
  for (const Place& place : some_places()) check_saves(lay_out_fsd, place, 100'000);
}

TEST(crash_at_any_call_of_a_save_in_other_formats) {
  for (const LayOut lay_out_tensors : {lay_out_zip, lay_out_safetensors})
    for (const bool has_unnamed_files : {false, true})
      check_saves(lay_out_tensors, {true, false, has_unnamed_files, true}, 100'000);
}

// The calls of a large save, made of a small file.
TEST(crash_at_any_call_that_bypasses_the_cache) {
  const std::shared_ptr<Memory> memory = Memory::allocate(std::uint64_t{4} << 20U);
  constexpr std::size_t bytes = 3 * kDirectAlignBytes;
  std::fill_n(memory->data(), bytes, std::byte{'d'});
  const auto save = [&](const std::string& path) {
    AtomicFile file(path);
    file.reserve(bytes);
    static_cast<void>(file.bypass_cache());
    file.write_at(memory->data(), bytes, 0);
    file.truncate(bytes - 100);
    file.complete(true);
    file.commit(true);
  };
  for (const bool has_unnamed_files : {false, true})
    check_every_fault({true, false, has_unnamed_files, true}, save, std::string(bytes - 100, 'd'),
                      Folder::default_parent());
}

// Files of several windows and threads.
TEST(crash_at_any_call_of_a_large_save) {
  if (!is_thorough()) return;
  for (const LayOut lay_out_tensors : kLayOuts)
    check_saves(lay_out_tensors, {true, false, true, true}, (33U << 20U) + 777);
}

std::string load(const std::string& path, Access access) {
  const Reader reader(path, access);
  const std::vector<Bytes> all = reader.bytes_of({true, true}, nullptr);
  if (!reader.find_damage(nullptr).empty()) throw Error(Failure::kFormat, "damage", path);
  std::string content;
  for (std::size_t i = 0; i < all.size(); ++i)
    content.append(reinterpret_cast<const char*>(all[i].data), reader.index().storages[i].bytes);
  return content;
}

// What is read is right, or an error names the file.
void check_every_fault(const std::string& path, Access access, Injection injection) {
  const std::string content = load(path, access);
  CHECK(content.size() == 75'000);
  for (;; ++injection.call) {
    const Outcome outcome = run_with(injection, path.c_str(), [&] {
      if (load(path, access) != content) throw Error(Failure::kFormat, "wrong bytes", path);
    });
    // The system never interrupts mmap().
    const bool may_fail = injection.error == EIO || std::string(outcome.call) == "mmap";
    const bool is_error = may_fail && outcome.end == End::kThrew;
    if (!CHECK(outcome.end == End::kReturned || is_error)) {
      std::printf("  call %zu, %s; fault %d, errno %d, end %d\n", injection.call, outcome.call,
                  int(injection.fault), injection.error, int(outcome.end));
    }
    if (!outcome.is_injected) return;
  }
}

TEST(any_call_of_a_load_may_fail) {
  const Folder folder;
  const std::string path = folder.path("x");
  const std::vector<std::byte> memory = Random(62).bytes(100'000);
  for (const LayOut lay_out_tensors : {lay_out_fsd, lay_out_safetensors}) {
    write_file(path, *lay_out_tensors(make_tensors(memory)), {}, nullptr);
    for (const Access access : {Access::kAuto, Access::kMap, Access::kRead}) {
      for (const bool is_repeated : {false, true}) {
        check_every_fault(path, access, {Fault::kError, EIO, 0, is_repeated});
        check_every_fault(path, access, {Fault::kShort, 0, 0, is_repeated});
      }
      check_every_fault(path, access, {Fault::kError, EINTR});
    }
  }
}

}  // namespace
}  // namespace fastsd::test
