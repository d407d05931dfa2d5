// Every target over its seeds, and over every input that ever failed.
#include <cstdio>
#include <exception>
#include <filesystem>
#include <string>

#include "check.h"
#include "fuzz.h"
#include "support.h"

namespace fastsd::test {
namespace {

bool passes(const fuzz::Target& target, const std::string& path) try {
  target.body(read_whole(path));
  return true;
} catch (const std::exception& error) {
  std::printf("%s: %s\n", path.c_str(), error.what());
  return false;
}

std::size_t run_all(const fuzz::Target& target, const char* kind) {
  std::size_t count = 0;
  const auto folder = std::filesystem::path(FASTSD_FUZZ_FOLDER) / kind / target.name;
  if (!std::filesystem::exists(folder)) return 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    CHECK(passes(target, entry.path().string()));
    ++count;
  }
  return count;
}

TEST(fuzz_targets_stand_their_corpus) {
  std::size_t targets = 0;
  for (const auto* target = fuzz::Target::first; target != nullptr; target = target->next) {
    ++targets;
    const bool has_seeds = run_all(*target, "corpus") > 0;
    CHECK(has_seeds);
    run_all(*target, "regressions");
  }
  CHECK(targets >= 7);
}

TEST(fuzz_targets_stand_nothing) {
  for (const auto* target = fuzz::Target::first; target != nullptr; target = target->next)
    target->body({});
}

}  // namespace
}  // namespace fastsd::test
