#include "reader.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <system_error>
#include <utility>

#include "checksum.h"
#include "error.h"
#include "safetensors.h"
#include "torch_zip.h"

namespace fastsd {
namespace {

// What one thread reads or verifies at a time.
constexpr std::uint64_t kStepBytes = std::uint64_t{4} << 20U;

// Less work than this is done by the calling thread alone: starting others would take longer.
constexpr std::uint64_t kParallelBytesMin = std::uint64_t{2} << 20U;

std::size_t threads_for(std::uint64_t bytes) {
  return bytes < kParallelBytesMin ? 1 : processor_count();
}

// What an error of the format says, with the file's name and, if that is not where it starts, where
// in the file the archive does.
Error locate(const Error& error, const std::string& name, std::uint64_t begin) {
  std::string detail = error.what();
  if (begin > 0 && error.kind != Failure::kSystem)
    detail += " (in the archive that starts at byte " + std::to_string(begin) + ")";
  return {error.kind, detail, name, error.system_errno};
}

// Reads [begin, end) of `memory` from a stream; returns where that ended, which is before `end` if
// the stream did.
std::uint64_t fill(const std::shared_ptr<Memory>& memory, std::uint64_t begin, std::uint64_t end,
                   const ReadSome& read_some) {
  while (begin < end) {
    const std::size_t got =
        read_some({memory->data() + begin, memory}, std::min(kStepBytes, end - begin));
    if (got == 0) break;
    begin += got;
  }
  return begin;
}

// All that a stream has, of which the first `count` bytes have been read; and how much that is.
// `bytes`: of it, if that is known, or UINT64_MAX.
std::pair<std::shared_ptr<Memory>, std::uint64_t> fill_all(const std::shared_ptr<Memory>& first,
                                                           std::uint64_t count, std::uint64_t bytes,
                                                           const ReadSome& read_some) {
  std::uint64_t room = bytes == UINT64_MAX ? 2 * kStepBytes : std::max(bytes, count) + 1;
  std::shared_ptr<Memory> memory = Memory::allocate(room);
  std::memcpy(memory->data(), first->data(), count);
  while ((count = fill(memory, count, room, read_some)) == room) {
    room *= 2;
    const std::shared_ptr<Memory> larger = Memory::allocate(room);
    std::memcpy(larger->data(), memory->data(), count);
    memory = larger;
  }
  return {memory, count};
}

// Not value-initialized: each byte is overwritten at once.
std::unique_ptr<std::uint64_t[]> allocate_header(const Preamble& preamble) {
  return std::unique_ptr<std::uint64_t[]>(new std::uint64_t[preamble.header_bytes / 8]);
}

struct Extent {
  std::uint64_t begin;
  std::uint64_t end;
};

// Where the wanted storages lie in the file; neighbours, with the padding between them, are one.
std::vector<Extent> find_extents(const Span<StorageRecord>& storages,
                                 const std::vector<bool>& is_wanted) {
  std::vector<Extent> extents;
  for (std::size_t i = 0; i < storages.size(); ++i) {
    const std::uint64_t bytes = stored_bytes(storages[i]);
    if (!is_wanted[i] || bytes == 0) continue;
    const std::uint64_t begin = storages[i].offset;
    if (!extents.empty() && begin - extents.back().end < kStorageAlignBytes)
      extents.back().end = begin + bytes;
    else
      extents.push_back({begin, begin + bytes});
  }
  return extents;
}

}  // namespace

Reader::Reader(const std::string& path, const std::string& name, Access access)
    : file_(path, name) {
  try {
    read_header(true);
    map(access);
  } catch (const Error& error) {
    throw locate(error, name, 0);
  }
}

Reader::Reader(int descriptor, const std::string& name, std::uint64_t begin, Access access)
    : file_(descriptor, name, begin) {
  try {
    read_header(false);
    map(access);
  } catch (const Error& error) {
    throw locate(error, name, begin);
  }
}

Reader::Reader(const ReadSome& read_some, const std::string& name, std::uint64_t begin,
               std::uint64_t bytes)
    : file_(nullptr, 0, name, begin) {
  try {
    read_stream(read_some, begin, bytes);
  } catch (const Error& error) {
    throw locate(error, name, begin);
  }
}

Container find_container(const void* bytes, std::size_t count) {
  const auto* first = static_cast<const unsigned char*>(bytes);
  if (count >= 4 && std::memcmp(first, "PK\x03\x04", 4) == 0) return Container::kTorch;
  // The size of the JSON that follows, which nobody gives in more than six bytes; text would.
  const bool has_size = count >= 9 && first[6] == 0 && first[7] == 0;
  return has_size && first[8] == '{' ? Container::kSafetensors : Container::kFsd;
}

void Reader::read_header(bool is_whole_file) {
  // The header is read, not mapped: what has been validated must not change afterwards. That of a
  // small file comes with the first read.
  constexpr std::size_t first_bytes_max = 4096;
  alignas(8) unsigned char first[first_bytes_max];
  const auto first_bytes =
      static_cast<std::size_t>(std::min<std::uint64_t>(first_bytes_max, file_.bytes()));
  file_.read_at(first, first_bytes, 0);
  container_ = find_container(first, first_bytes);
  switch (container_) {
    case Container::kFsd:
      read_fsd(first, first_bytes, is_whole_file);
      break;
    case Container::kSafetensors:
      header_ = Header(read_safetensors(file_));
      break;
    case Container::kTorch:
      header_ = Header(read_torch_zip(file_));
      break;
  }
  find_object();
}

void Reader::read_fsd(const unsigned char* first, std::size_t first_bytes, bool is_whole_file) {
  const Preamble preamble = decode_preamble(first, first_bytes, file_.bytes());
  if (is_whole_file && file_.bytes() > preamble.file_bytes) {
    throw Error(Failure::kFormat, "the file has " + std::to_string(file_.bytes()) +
                                      " bytes; its header accounts for " +
                                      std::to_string(preamble.file_bytes));
  }
  std::unique_ptr<std::uint64_t[]> bytes = allocate_header(preamble);
  auto* target = reinterpret_cast<unsigned char*>(bytes.get());
  const std::size_t copied = std::min<std::size_t>(first_bytes, preamble.header_bytes);
  std::memcpy(target, first, copied);
  file_.read_at(target + copied, preamble.header_bytes - copied, copied);
  header_ = Header::decode(std::move(bytes), preamble);
}

void Reader::find_object() {
  const std::string_view stream = header_.section(Section::kPickle);
  if (stream.data() == nullptr) return;
  // Storages in the other byte order are turned while torch unpickles; until then they are bytes.
  is_plain_ = header_.section(kByteOrder) != "big";
  if (!is_plain_) return;
  PickledObject found = read_torch_pickle(stream, header_.index());
  is_plain_ = found.is_plain;
  globals_ = std::move(found.globals);
  if (found.is_plain || !found.tables.tensors.empty()) object_.emplace(std::move(found.tables));
}

// Nothing is asked for before what came until then has been validated: a stream may be a connection
// that stays open, and a damaged size must not make anybody wait for what never comes.
void Reader::read_stream(const ReadSome& read_some, std::uint64_t begin, std::uint64_t bytes) {
  const std::shared_ptr<Memory> first = Memory::allocate(sizeof(Preamble));
  const std::uint64_t first_bytes = fill(first, 0, sizeof(Preamble), read_some);
  if (find_container(first->data(), first_bytes) != Container::kFsd) {
    const auto [memory, whole_bytes] = fill_all(first, first_bytes, bytes, read_some);
    file_ = File(memory, whole_bytes, file_.name(), begin);
    read_header(true);
    return;
  }
  const Preamble preamble = decode_preamble(first->data(), first_bytes,
                                            first_bytes < sizeof(Preamble) ? first_bytes : bytes);
  const auto read_part = [&](const std::shared_ptr<Memory>& memory, std::uint64_t from,
                             std::uint64_t to) {
    const std::uint64_t end = fill(memory, from, to, read_some);
    if (end < to)
      decode_preamble(first->data(), first_bytes, end);  // throws: the file is too short
  };
  const std::shared_ptr<Memory> head = Memory::allocate(preamble.header_bytes);
  std::memcpy(head->data(), first->data(), first_bytes);
  read_part(head, first_bytes, preamble.header_bytes);
  std::unique_ptr<std::uint64_t[]> words = allocate_header(preamble);
  std::memcpy(words.get(), head->data(), preamble.header_bytes);
  header_ = Header::decode(std::move(words), preamble);
  find_object();

  const std::shared_ptr<Memory> memory = Memory::allocate(preamble.file_bytes);
  read_part(memory, preamble.header_bytes, preamble.file_bytes);
  file_ = File(memory, preamble.file_bytes, file_.name(), begin);
}

void Reader::map(Access access) {
  if (access == Access::kRead || file_.begin() % kMapAlignBytes != 0) return;
  if (access == Access::kMap || file_.file_system().maps_well)
    mapping_ = Memory::map(file_, header_.preamble().file_bytes);
}

Bytes Reader::bytes(std::size_t storage, std::uint64_t begin, std::uint64_t end,
                    const Interrupt& interrupt) const {
  const StorageRecord& record = index().storages[storage];
  if (mapping_) return {mapping_->data() + record.offset + begin, mapping_};
  const std::shared_ptr<Memory> memory = Memory::allocate(end - begin);
  read({{memory->data(), end - begin, record.offset + begin}}, interrupt);
  return {memory->data(), memory};
}

std::vector<Bytes> Reader::bytes_of(const std::vector<bool>& is_wanted, const Interrupt& interrupt,
                                    std::atomic<std::uint64_t>* done) const {
  if (file_.memory() && is_handed_out_.exchange(true))
    throw Error(Failure::kUnsupported, "what came from a stream is handed out once", file_.name());
  std::vector<Bytes> all(index().storages.size());
  std::vector<File::Piece> extents;
  for (std::size_t i = 0; i < all.size(); ++i) {
    const StorageRecord& storage = index().storages[i];
    const std::uint64_t bytes = stored_bytes(storage);
    const std::uint64_t offset = bytes > 0 ? storage.offset : 0;
    if (const std::shared_ptr<Memory>& whole = file_.memory()) {
      // The part of one that is not wanted is given back at once.
      const Bytes part{whole->data() + offset, Memory::own_part(whole, offset, bytes)};
      if (is_wanted[i]) all[i] = part;
      continue;
    }
    if (!is_wanted[i]) continue;
    if (mapping_) {
      all[i] = {mapping_->data() + offset, mapping_};
      continue;
    }
    const std::shared_ptr<Memory> memory = Memory::allocate(bytes);
    all[i] = {memory->data(), memory};
    extents.push_back({memory->data(), bytes, offset});
  }
  read(extents, interrupt, done);
  return all;
}

// Reads extents, which ascend in the file: large ones in steps, small ones many to a step.
void Reader::read(const std::vector<File::Piece>& extents, const Interrupt& interrupt,
                  std::atomic<std::uint64_t>* done) const {
  std::vector<File::Piece> pieces;
  pieces.reserve(extents.size());
  std::uint64_t total = 0;
  for (const File::Piece& extent : extents) {
    total += extent.bytes;
    for (std::uint64_t begin = 0; begin < extent.bytes; begin += kStepBytes) {
      pieces.push_back({extent.target + begin, std::min(kStepBytes, extent.bytes - begin),
                        extent.offset + begin});
    }
  }
  std::vector<std::size_t> steps;  // the first piece of each
  std::uint64_t step_bytes = kStepBytes;
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    if (step_bytes + pieces[i].bytes > kStepBytes) {
      steps.push_back(i);
      step_bytes = 0;
    }
    step_bytes += pieces[i].bytes;
  }
  steps.push_back(pieces.size());
  run_parallel(steps.size() - 1, threads_for(total), interrupt, [&](std::size_t, std::size_t i) {
    file_.read_run(&pieces[steps[i]], steps[i + 1] - steps[i]);
    for (std::size_t k = steps[i]; done != nullptr && k < steps[i + 1]; ++k)
      *done += pieces[k].bytes;
  });
}

std::vector<std::size_t> Reader::find_damage(const std::vector<bool>& is_checked,
                                             const Interrupt& interrupt) const {
  const Index& tables = index();
  struct Step {
    std::size_t storage;
    std::uint64_t begin;
    std::uint64_t end;
  };
  std::vector<Step> steps;
  std::uint64_t total = 0;
  for (std::size_t i = 0; i < tables.storages.size(); ++i) {
    const StorageRecord& storage = tables.storages[i];
    if ((storage.flags & kStorageHasChecksum) == 0) continue;
    if (!is_checked.empty() && is_checked[i]) continue;
    const std::uint64_t bytes = stored_bytes(storage);
    total += bytes;
    for (std::uint64_t begin = 0; begin < bytes; begin += kStepBytes)
      steps.push_back({i, begin, std::min(begin + kStepBytes, bytes)});
  }
  std::vector<std::uint32_t> parts(steps.size());
  std::vector<std::unique_ptr<std::byte[]>> slabs(threads_for(total));
  run_parallel(steps.size(), slabs.size(), interrupt, [&](std::size_t worker, std::size_t i) {
    const Step& step = steps[i];
    const std::uint64_t offset = tables.storages[step.storage].offset + step.begin;
    const std::uint64_t bytes = step.end - step.begin;
    // Read even where the file is mapped: what is verified is the file, not pages edited in memory,
    // and a file that shrinks meanwhile is an error rather than a signal.
    if (!slabs[worker]) slabs[worker].reset(new std::byte[kStepBytes]);
    file_.read_at(slabs[worker].get(), bytes, offset);
    parts[i] = checksum().update(0, slabs[worker].get(), bytes);
  });
  std::vector<std::size_t> damaged;
  for (std::size_t i = 0; i < steps.size();) {
    const std::size_t storage = steps[i].storage;
    std::uint32_t crc = parts[i];
    for (++i; i < steps.size() && steps[i].storage == storage; ++i)
      crc = checksum().combine(crc, parts[i], steps[i].end - steps[i].begin);
    if (crc != tables.storages[storage].crc32c) damaged.push_back(storage);
  }
  if (container_ == Container::kFsd && damaged.empty()) check_padding();
  return damaged;
}

void Reader::check_padding() const {
  std::byte padding[kStorageAlignBytes];
  std::uint64_t end = header_.preamble().header_bytes;
  for (const StorageRecord& storage : index().storages) {
    if (stored_bytes(storage) == 0) continue;
    const std::uint64_t bytes = storage.offset - end;
    if (bytes > 0) file_.read_at(padding, bytes, end);
    if (std::any_of(padding, padding + bytes, [](std::byte b) { return b != std::byte{0}; })) {
      throw Error(Failure::kFormat,
                  "the padding before byte " + std::to_string(file_.begin() + storage.offset) +
                      " is not zero",
                  file_.name());
    }
    end = storage.offset + storage.bytes;
  }
}

// ---- Prefetch ----

Prefetch::Prefetch(const Reader& reader, const std::vector<bool>& is_wanted) {
  if (!reader.mapping()) return;
  std::vector<Extent> extents = find_extents(reader.index().storages, is_wanted);
  std::uint64_t total = 0;
  for (const Extent& extent : extents) total += extent.end - extent.begin;
  const File& file = reader.file();
  if (total < kParallelBytesMin) return;
  const std::uint64_t first = extents.front().begin;
  if (file.is_cached(first, extents.back().end - first)) return;
  try {
    thread_ = std::thread([this, &file, extents = std::move(extents)] {
      for (const Extent& extent : extents) {
        for (std::uint64_t at = extent.begin; at < extent.end && !is_stopped_; at += kStepBytes)
          file.read_ahead(at, std::min(kStepBytes, extent.end - at));
      }
    });
  } catch (const std::system_error&) {
    // No thread to be had: pages come when they are touched.
  }
}

void Prefetch::stop() {
  if (!thread_.joinable()) return;
  is_stopped_ = true;
  thread_.join();
}

Prefetch::~Prefetch() { stop(); }

}  // namespace fastsd
