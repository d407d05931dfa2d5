// A whole file, in whatever format its bytes say: from a stream, read from a file, and mapped,
// which must all say the same.
#include "reader.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "checksum.h"
#include "error.h"
#include "fuzz.h"
#include "utf8.h"

namespace fastsd::fuzz {
namespace {

// What becomes of a file.
struct Outcome {
  std::optional<Failure> failure;
  bool is_plain = false;
  std::vector<std::string> names;
  std::vector<std::uint32_t> checksums;
  std::vector<std::size_t> damaged;

  bool operator==(const Outcome& other) const {
    return failure == other.failure && is_plain == other.is_plain && names == other.names &&
           checksums == other.checksums && damaged == other.damaged;
  }
};

const Interrupt kNever = [] { return false; };

void require_sound_reader(const Reader& reader) {
  const std::uint64_t bytes = reader.header().preamble().file_bytes;
  require(bytes <= reader.file().bytes(), "an archive lies within its file");
  require_sound(reader.header().index(), bytes, reader.header().devices().size());
  require_sound(reader.index(), bytes, reader.object().devices().size());
  require(reader.header().index().storages.size() <= reader.index().storages.size(),
          "an object has the storages of its container");
}

// Reads all there is to read.
Outcome walk(const Reader& reader) {
  require_sound_reader(reader);
  Outcome outcome;
  outcome.is_plain = reader.is_plain();
  for (const TensorRecord& tensor : reader.index().tensors)
    outcome.names.emplace_back(reader.index().name(tensor));
  const Span<StorageRecord>& storages = reader.index().storages;
  for (std::size_t i = 0; i < storages.size(); ++i) {
    const std::uint64_t bytes = stored_bytes(storages[i]);
    if (bytes == 0) continue;
    outcome.checksums.push_back(crc32c(0, reader.bytes(i, 0, bytes, kNever).data, bytes));
  }
  outcome.damaged = reader.find_damage(kNever);
  for (const std::size_t storage : outcome.damaged)
    require(storage < storages.size(), "a damaged storage is in the list");
  const auto all = reader.bytes_of(std::vector<bool>(storages.size(), true), kNever);
  for (std::size_t i = 0, part = 0; i < storages.size(); ++i) {
    const std::uint64_t bytes = stored_bytes(storages[i]);
    if (bytes == 0) continue;
    require(crc32c(0, all[i].data, bytes) == outcome.checksums[part++],
            "bytes are the same in whatever way they are read");
  }
  return outcome;
}

template <class Open>
Outcome try_to(const Open& open) {
  try {
    return open();
  } catch (const Error& error) {
    require(*error.what() != '\0' && error.kind != Failure::kSystem && error.path == "name",
            "an error says what is wrong, and where");
    Outcome outcome;
    outcome.failure = error.kind;
    return outcome;
  }
}

Outcome read_stream(std::string_view file) {
  const ReadSome read_some = [rest = file](const Bytes& target, std::size_t room) mutable {
    // In pieces, as a connection gives them.
    const std::size_t bytes = std::min({rest.size(), room, std::size_t{1000}});
    if (bytes > 0) std::memcpy(target.data, rest.data(), bytes);
    rest.remove_prefix(bytes);
    return bytes;
  };
  return walk(Reader(read_some, "name", 0, file.size()));
}

// Of a file in memory that the system sees as one.
class NamelessFile {
 public:
  explicit NamelessFile(std::string_view content) : descriptor_(::memfd_create("fuzz", 0)) {
    const ssize_t written = ::write(descriptor_.get(), content.data(), content.size());
    require(written == static_cast<ssize_t>(content.size()), "there is memory for the file");
  }
  Outcome read(Access access) const { return walk(Reader(descriptor_.get(), "name", 0, access)); }

 private:
  Descriptor descriptor_;
};

void read(std::string_view content) {
  const Outcome streamed = try_to([&] { return read_stream(content); });
  const NamelessFile file(content);
  for (const Access access : {Access::kRead, Access::kMap})
    require(try_to([&] { return file.read(access); }) == streamed,
            "a file is the same in whatever way it is read");
}

}  // namespace

FUZZ_TARGET(reader) {
  read(input);
  std::string sealed(input);
  seal(sealed);
  if (sealed != input) read(sealed);
}

}  // namespace fastsd::fuzz
