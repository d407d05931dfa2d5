#include "writer.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "checksum.h"
#include "file.h"

namespace fastsd {
namespace {

// The file is written in windows that start at multiples of their size: the page cache then holds
// it in huge folios, which later maps with a page-table entry for each 2 MiB rather than each 4
// KiB. A window stays in the processor's cache between being checksummed and being written.
constexpr std::uint64_t kBufferedWindowBytes = std::uint64_t{2} << 20U;
constexpr std::uint64_t kDirectWindowBytes = std::uint64_t{8} << 20U;

// Writers of one inode wait for each other, so a second thread is there to checksum the next window
// while the first is written. Direct writes do not wait, and a device likes several.
constexpr std::size_t kBufferedThreads = 2;
constexpr std::size_t kDirectThreads = 4;
static_assert(kDirectThreads * kDirectWindowBytes < kWriteMemoryBytes);
static_assert(kBufferedThreads * kBufferedWindowBytes < kWriteMemoryBytes);
static_assert(kDirectWindowBytes <= cuda::kSlabBytes);

// Smaller files are written by the calling thread alone. Writers that wait for each other, and for
// the journal, let their processors go to sleep; on a virtual machine waking one takes
// milliseconds.
constexpr std::uint64_t kParallelBytesMin = std::uint64_t{64} << 20U;
constexpr std::uint64_t kParallelBytesMinInMemory = std::uint64_t{8} << 20U;

// One thread alone would wait for each window to come from a GPU before it writes it.
constexpr std::uint64_t kParallelBytesMinFromGpus = std::uint64_t{8} << 20U;

// Strided bytes of a GPU are gathered from host copies of so much.
constexpr std::uint64_t kStridedStepBytes = std::uint64_t{1} << 20U;

// Below this a copy into the window's own memory costs less than a piece of its own in the system
// call.
constexpr std::uint64_t kInPlaceBytesMin = std::uint64_t{64} << 10U;

// Smaller files gain nothing from waiting for the device without the cache.
constexpr std::uint64_t kDirectBytesMin = std::uint64_t{32} << 20U;

// A part of a storage that lies in a window.
struct Piece {
  std::size_t storage;
  std::uint64_t begin;  // within the storage
  std::uint64_t end;
  std::uint64_t file_offset;
};

// Calls visit_piece(piece) for the storages' bytes among [begin, end) of the data, and
// visit_gap(storage, begin, end) for the places before them, in order.
template <class VisitPiece, class VisitGap>
void for_each_piece(const Layout& layout, std::uint64_t begin, std::uint64_t end,
                    VisitPiece visit_piece, VisitGap visit_gap) {
  const std::vector<StorageRecord>& storages = layout.plan().storages();
  auto storage = std::partition_point(
      storages.begin(), storages.end(),
      [&](const StorageRecord& s) { return s.offset + stored_bytes(s) <= begin; });
  for (std::uint64_t done = begin; storage != storages.end() && done < end; ++storage) {
    if (stored_bytes(*storage) == 0) continue;
    const auto number = static_cast<std::size_t>(storage - storages.begin());
    const std::uint64_t from = std::min(end, std::max(done, storage->offset));
    if (from > done) visit_gap(number, done, from);
    const std::uint64_t to = std::min(end, storage->offset + storage->bytes);
    if (from < to) visit_piece(Piece{number, from - storage->offset, to - storage->offset, from});
    done = std::max(from, to);
  }
}

// Before the threads start, as all of them read the flags.
void mark_checksummed(std::vector<StorageRecord>& storages) {
  for (StorageRecord& storage : storages) {
    if (stored_bytes(storage) > 0) storage.flags |= kStorageHasChecksum;
  }
}

// The checksums of storages, from those of their pieces in whatever order they come. One per
// thread: a storage that is a single piece is only touched by the thread that has the piece.
class Checksums {
 public:
  void add(const Checksum& checksum, std::vector<StorageRecord>& storages, const Piece& piece,
           const std::byte* bytes) {
    StorageRecord& storage = storages[piece.storage];
    const std::uint32_t crc = checksum.update(0, bytes, piece.end - piece.begin);
    if (piece.end - piece.begin < storage.bytes) {
      parts_.push_back({piece, crc});
      return;
    }
    storage.crc32c = crc;
  }

  // Joins the pieces of storages that have several.
  static void join(const Checksum& checksum, const std::vector<const Checksums*>& all,
                   std::vector<StorageRecord>& storages) {
    std::vector<Part> parts;
    for (const Checksums* some : all)
      parts.insert(parts.end(), some->parts_.begin(), some->parts_.end());
    std::sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) {
      return a.piece.file_offset < b.piece.file_offset;
    });
    for (const Part& part : parts) {
      StorageRecord& storage = storages[part.piece.storage];
      const std::uint64_t bytes = part.piece.end - part.piece.begin;
      storage.crc32c =
          part.piece.begin == 0 ? part.crc : checksum.combine(storage.crc32c, part.crc, bytes);
    }
  }

 private:
  struct Part {
    Piece piece;
    std::uint32_t crc;
  };
  std::vector<Part> parts_;
};

// The mapping that [begin, begin + bytes) lies in, nullptr if it is in none.
const Mapping* find_mapping(const Mappings& mappings, const std::byte* begin, std::uint64_t bytes) {
  const auto behind = std::upper_bound(
      mappings.begin(), mappings.end(), begin,
      [](const std::byte* address, const Mapping& m) { return address < m.memory.begin(); });
  if (behind == mappings.begin()) return nullptr;
  const Mapping& mapping = *std::prev(behind);
  const auto offset = static_cast<std::uint64_t>(begin - mapping.memory.begin());
  const std::uint64_t size = mapping.memory.size();
  return offset <= size && bytes <= size - offset ? &mapping : nullptr;
}

// Drops what of a piece's source lies in mappings.
void drop_source(const Plan& plan, const Piece& piece, const Mappings& mappings) {
  const Span<std::byte> source = plan.source(piece.storage, piece.begin, piece.end);
  for (const Mapping& mapping : mappings) {
    const std::byte* first = std::max(source.begin(), mapping.memory.begin());
    const std::byte* last = std::min(source.end(), mapping.memory.end());
    if (first < last) drop_pages(first, static_cast<std::uint64_t>(last - first));
  }
}

// Puts the bytes of a piece into `target`: from the file that they are mapped from, or from memory.
void fetch(const Plan& plan, const Piece& piece, const Mappings& mappings, std::byte* target) {
  const std::uint64_t bytes = piece.end - piece.begin;
  const std::byte* source = plan.bytes_in_place(piece.storage, piece.begin);
  const Mapping* mapping = source == nullptr ? nullptr : find_mapping(mappings, source, bytes);
  if (mapping != nullptr) {
    mapping->file->read_at(target, bytes,
                           static_cast<std::uint64_t>(source - mapping->memory.begin()));
    return;
  }
  plan.fill(piece.storage, piece.begin, piece.end, target);
  if (source == nullptr) drop_source(plan, piece, mappings);
}

bool is_on_gpu(const Plan& plan, const Piece& piece) { return plan.gpu(piece.storage) != kHost; }

// Where the bytes of a piece may be taken from without fetching them; nullptr: nowhere.
const std::byte* find_in_memory(const Plan& plan, const Piece& piece, const Mappings& mappings) {
  const std::byte* source = plan.bytes_in_place(piece.storage, piece.begin);
  if (source == nullptr || is_on_gpu(plan, piece) ||
      find_mapping(mappings, source, piece.end - piece.begin) != nullptr)
    return nullptr;
  return source;
}

}  // namespace

// One thread's way to what lies on GPUs.
class GpuReader {
 public:
  GpuReader(const Layout& layout, const cuda::Streams& streams)
      : layout_(layout), download_(streams, layout.file_bytes()) {}

  // Nothing where nothing lies on any.
  static std::unique_ptr<GpuReader> open(const Layout& layout, const cuda::Streams& streams) {
    return streams.empty() ? nullptr : std::make_unique<GpuReader>(layout, streams);
  }

  // Brings what of [begin, end) of the data lies on GPUs into a slab, which stands for `begin` on.
  // No slab: none of it does. REQUIRES: end - begin <= cuda::kSlabBytes.
  void fetch(std::uint64_t begin, std::uint64_t end, std::optional<cuda::Landing>* landing) {
    const auto add_piece = [&](const Piece& piece) {
      if (!is_on_gpu(layout_.plan(), piece)) return;
      if (!*landing) landing->emplace(&download_);
      copy(piece, (*landing)->data() + (piece.file_offset - begin));
    };
    for_each_piece(layout_, std::max(begin, layout_.data_begin()), end, add_piece,
                   [](std::size_t, std::uint64_t, std::uint64_t) {});
    if (*landing) download_.wait();
  }

 private:
  void copy(const Piece& piece, std::byte* target) {
    const Plan& plan = layout_.plan();
    const int gpu = plan.gpu(piece.storage);
    const std::byte* source = plan.bytes_in_place(piece.storage, piece.begin);
    if (source != nullptr) {
      download_.copy(target, source, piece.end - piece.begin, gpu);
      return;
    }
    for (std::uint64_t at = piece.begin; at < piece.end; at += kStridedStepBytes) {
      const std::uint64_t to = std::min(piece.end, at + kStridedStepBytes);
      stage(plan.source(piece.storage, at, to), gpu);
      plan.fill(piece.storage, at, to, target + (at - piece.begin), staged_->data());
    }
  }

  // Makes the host copy that strided bytes are picked from. Of a tensor that is put into row-major
  // order that is all of it, each time again.
  void stage(const Span<std::byte>& source, int gpu) {
    if (source.begin() == source_.begin() && source.size() == source_.size()) return;
    if (!staged_ || source.size() > staged_bytes_) {
      staged_.reset();
      staged_bytes_ = std::max<std::uint64_t>(source.size(), kStridedStepBytes);
      staged_ = Memory::allocate(staged_bytes_);
    }
    source_ = {};
    download_.copy(staged_->data(), source.begin(), source.size(), gpu);
    download_.wait();
    source_ = source;
  }

  const Layout& layout_;
  cuda::Download download_;
  Span<std::byte> source_ = {};  // what the copy is of
  std::shared_ptr<Memory> staged_;
  std::uint64_t staged_bytes_ = 0;
};

namespace {

// Memory for one window. Empty until it is needed.
class Slab {
 public:
  explicit Slab(std::uint64_t bytes) : bytes_(bytes) {}

  std::byte* data() {
    if (!memory_) memory_ = Memory::allocate(bytes_);
    return memory_->data();
  }

 private:
  std::uint64_t bytes_;
  std::shared_ptr<Memory> memory_;
};

struct Worker {
  Worker(const Layout& layout, const Sources& sources, std::uint64_t slab_bytes)
      : slab(slab_bytes), gpus(GpuReader::open(layout, sources.streams)) {}

  Slab slab;
  std::unique_ptr<GpuReader> gpus;
  Checksums checksums;
  std::vector<iovec> pieces;
  std::string gap;
};

std::vector<Worker> make_workers(std::size_t count, const Layout& layout, const Sources& sources,
                                 std::uint64_t slab_bytes) {
  std::vector<Worker> workers;
  workers.reserve(count);
  for (std::size_t i = 0; i < count; ++i) workers.emplace_back(layout, sources, slab_bytes);
  return workers;
}

void join_checksums(const Checksum& checksum, const std::vector<Worker>& workers,
                    std::vector<StorageRecord>& storages) {
  std::vector<const Checksums*> all;
  all.reserve(workers.size());
  for (const Worker& worker : workers) all.push_back(&worker.checksums);
  Checksums::join(checksum, all, storages);
}

// The bytes [begin, end) of the file, which lie in the gap before a storage. `crc`: of the storage
// before the gap. `scratch` is memory to use again.
void fill_gap(const Layout& layout, std::size_t storage, std::uint32_t crc, std::uint64_t begin,
              std::uint64_t end, std::byte* target, std::string* scratch) {
  if (!layout.has_gaps()) {
    std::memset(target, 0, end - begin);
    return;
  }
  scratch->clear();
  layout.encode_gap(storage, crc, scratch);
  const std::uint64_t gap_begin = layout.plan().storages()[storage].offset - scratch->size();
  std::memcpy(target, scratch->data() + (begin - gap_begin), end - begin);
}

// Of the storage before one that is not the first; both have bytes.
std::uint32_t checksum_before(const Plan& plan, std::size_t storage) {
  while (stored_bytes(plan.storages()[--storage]) == 0) continue;
  return plan.storages()[storage].crc32c;
}

class FileWriter {
 public:
  FileWriter(const std::string& path, Layout& layout, const WriteOptions& options)
      : layout_(layout),
        plan_(layout.plan()),
        options_(options),
        checksum_(layout.checksum(options.checksum)),
        owned_file_(std::make_unique<AtomicFile>(path)),
        file_(*owned_file_) {
    file_.reserve(layout.file_bytes());
    is_direct_ = options.durable && layout.file_bytes() >= kDirectBytesMin && file_.bypass_cache();
    if (is_direct_) window_bytes_ = kDirectWindowBytes;
  }

  // The data comes first, then what depends on its checksums. Called once.
  std::unique_ptr<AtomicFile> write(const Interrupt& interrupt) {
    const std::uint64_t data_begin = align_down(layout_.data_begin());
    const std::uint64_t first = data_begin / window_bytes_;
    const std::uint64_t count = (layout_.data_end() + window_bytes_ - 1) / window_bytes_ - first;
    const std::size_t threads = thread_count();
    std::vector<Worker> workers = make_workers(threads, layout_, options_.sources, window_bytes_);
    if (checksum_ != nullptr) mark_checksummed(plan_.storages());
    run_parallel(count, threads, interrupt, [&](std::size_t worker, std::size_t i) {
      const std::uint64_t begin = (first + i) * window_bytes_;
      write_window(workers[worker], std::max(begin, data_begin),
                   std::min(begin + window_bytes_, layout_.data_end()));
    });
    if (checksum_ != nullptr) join_checksums(*checksum_, workers, plan_.storages());
    Content content(layout_, options_.sources);
    write_gaps(content, workers[0].slab);
    write_range(content, 0, layout_.data_begin(), workers[0].slab);
    write_range(content, layout_.data_end(), layout_.file_bytes(), workers[0].slab);
    if (is_direct_) file_.truncate(layout_.file_bytes());
    file_.complete(options_.durable);
    return std::move(owned_file_);
  }

 private:
  std::size_t thread_count() const {
    if (is_direct_) return kDirectThreads;
    const std::uint64_t bytes_min = !options_.sources.streams.empty() ? kParallelBytesMinFromGpus
                                    : file_.is_in_memory()            ? kParallelBytesMinInMemory
                                                                      : kParallelBytesMin;
    return layout_.file_bytes() < bytes_min ? 1 : std::min(kBufferedThreads, processor_count());
  }

  std::uint64_t align_down(std::uint64_t offset) const {
    return is_direct_ ? offset - offset % kDirectAlignBytes : offset;
  }

  // Takes large pieces from where they are and copies the others, so that the window goes out in
  // one call.
  void write_window(Worker& worker, std::uint64_t begin, std::uint64_t end) {
    if (begin == end) return;
    worker.pieces.clear();
    std::uint64_t written = begin;  // what precedes it is among the pieces
    std::uint64_t copied = begin;   // what lies between the two is in the slab
    std::uint32_t crc = 0;          // of the last storage, if all of it is in the window
    std::optional<cuda::Landing> landing;
    if (worker.gpus) worker.gpus->fetch(begin, end, &landing);
    const auto slab = [&] { return landing ? landing->data() : worker.slab.data(); };
    const auto flush = [&] {
      if (copied > written) worker.pieces.push_back({slab() + (written - begin), copied - written});
      written = copied;
    };
    const auto add_piece = [&](const Piece& piece) {
      const std::uint64_t bytes = piece.end - piece.begin;
      const std::byte* source = find_in_memory(plan_, piece, options_.sources.mappings);
      if (source == nullptr || bytes < kInPlaceBytesMin || is_direct_) {
        std::byte* target = slab() + (copied - begin);
        if (!is_on_gpu(plan_, piece)) fetch(plan_, piece, options_.sources.mappings, target);
        source = target;
        copied += bytes;
      } else {
        flush();
        worker.pieces.push_back({const_cast<std::byte*>(source), bytes});
        written = copied = copied + bytes;
      }
      if (checksum_ == nullptr) return;
      worker.checksums.add(*checksum_, plan_.storages(), piece, source);
      const StorageRecord& storage = plan_.storages()[piece.storage];
      crc = bytes == storage.bytes ? storage.crc32c : 0;
    };
    const auto add_gap = [&](std::size_t storage, std::uint64_t from, std::uint64_t to) {
      fill_gap(layout_, storage, crc, from, to, slab() + (from - begin), &worker.gap);
      copied = to;
    };
    if (begin < layout_.data_begin()) {  // the end of the head, which comes later
      copied = layout_.data_begin();
      std::memset(slab(), 0, copied - begin);
    }
    for_each_piece(layout_, copied, end, add_piece, add_gap);
    if (is_direct_) {
      const std::uint64_t aligned = align_up(copied, kDirectAlignBytes);
      std::memset(slab() + (copied - begin), 0, aligned - copied);
      copied = aligned;
    }
    flush();
    file_.write_at(worker.pieces.data(), worker.pieces.size(), begin);
    if (options_.written != nullptr) *options_.written += end - begin;
  }

  // Writes those gaps again that were written without the checksum of the storage before them:
  // the two did not lie in one window.
  void write_gaps(Content& content, Slab& slab) {
    if (!layout_.has_gaps()) return;
    const StorageRecord* before = nullptr;
    for (const StorageRecord& storage : plan_.storages()) {
      if (stored_bytes(storage) == 0) continue;
      if (before != nullptr &&
          before->offset / window_bytes_ != (storage.offset - 1) / window_bytes_)
        write_range(content, before->offset + before->bytes, storage.offset, slab);
      before = &storage;
    }
  }

  // Writes [begin, end) of the file, from the block that holds the first byte to that of the last
  // one if the cache is bypassed.
  void write_range(Content& content, std::uint64_t begin, std::uint64_t end, Slab& slab) {
    if (begin == end) return;
    for (std::uint64_t at = align_down(begin); at < end; at += window_bytes_) {
      std::uint64_t to = std::min(at + window_bytes_, end);
      if (is_direct_) to = std::min(align_up(to, kDirectAlignBytes), layout_.file_bytes());
      content.gather(at, to, slab.data());
      std::uint64_t bytes = to - at;
      if (is_direct_) {
        bytes = align_up(bytes, kDirectAlignBytes);
        std::memset(slab.data() + (to - at), 0, bytes - (to - at));
      }
      file_.write_at(slab.data(), bytes, at);
    }
  }

  Layout& layout_;
  Plan& plan_;
  const WriteOptions& options_;
  const Checksum* checksum_;
  std::unique_ptr<AtomicFile> owned_file_;
  AtomicFile& file_;
  bool is_direct_ = false;
  std::uint64_t window_bytes_ = kBufferedWindowBytes;
};

}  // namespace

std::unique_ptr<AtomicFile> prepare_file(const std::string& path, Layout& layout,
                                         const WriteOptions& options, const Interrupt& interrupt) {
  return FileWriter(path, layout, options).write(interrupt);
}

void write_file(const std::string& path, Layout& layout, const WriteOptions& options,
                const Interrupt& interrupt) {
  prepare_file(path, layout, options, interrupt)->commit(options.durable);
}

void checksum_storages(Layout& layout, const WriteOptions& options, const Interrupt& interrupt) {
  const Checksum* checksum = layout.checksum(options.checksum);
  if (checksum == nullptr) return;
  Plan& plan = layout.plan();
  constexpr std::uint64_t step_bytes = std::uint64_t{1} << 20U;
  const std::uint64_t count =
      (layout.data_end() - layout.data_begin() + step_bytes - 1) / step_bytes;
  const std::size_t threads_max =
      options.sources.streams.empty() ? processor_count() : kDirectThreads;
  std::vector<Worker> workers =
      make_workers(std::min(processor_count(), threads_max), layout, options.sources, step_bytes);
  mark_checksummed(plan.storages());
  run_parallel(count, workers.size(), interrupt, [&](std::size_t number, std::size_t i) {
    Worker& worker = workers[number];
    const std::uint64_t begin = layout.data_begin() + i * step_bytes;
    std::optional<cuda::Landing> landing;
    if (worker.gpus) worker.gpus->fetch(begin, begin + step_bytes, &landing);
    const auto add_piece = [&](const Piece& piece) {
      const std::byte* source = find_in_memory(plan, piece, options.sources.mappings);
      if (is_on_gpu(plan, piece)) {
        source = landing->data() + (piece.file_offset - begin);
      } else if (source == nullptr) {
        fetch(plan, piece, options.sources.mappings, worker.slab.data());
        source = worker.slab.data();
      }
      worker.checksums.add(*checksum, plan.storages(), piece, source);
    };
    for_each_piece(layout, begin, begin + step_bytes, add_piece,
                   [](std::size_t, std::uint64_t, std::uint64_t) {});
  });
  join_checksums(*checksum, workers, plan.storages());
}

Content::Content(const Layout& layout, Sources sources)
    : layout_(layout),
      sources_(std::move(sources)),
      head_(layout.encode_head()),
      tail_(layout.encode_tail()) {}

Content::~Content() = default;

void Content::gather(std::uint64_t begin, std::uint64_t end, std::byte* target) {
  // What of `part`, which starts at `offset` of the file, lies among the bytes.
  const auto copy = [&](const std::string& part, std::uint64_t offset) {
    const std::uint64_t from = std::max(begin, offset);
    const std::uint64_t to = std::min(end, offset + part.size());
    if (from < to) std::memcpy(target + (from - begin), part.data() + (from - offset), to - from);
  };
  copy(head_, 0);
  copy(tail_, layout_.data_end());
  const std::uint64_t data_end = std::min(end, layout_.data_end());
  for (std::uint64_t at = std::max(begin, layout_.data_begin()); at < data_end;
       at += cuda::kSlabBytes)
    gather_data(at, std::min(data_end, at + cuda::kSlabBytes), target + (at - begin));
}

void Content::gather_data(std::uint64_t begin, std::uint64_t end, std::byte* target) {
  const Plan& plan = layout_.plan();
  if (!gpus_) gpus_ = GpuReader::open(layout_, sources_.streams);
  std::optional<cuda::Landing> landing;
  if (gpus_) gpus_->fetch(begin, end, &landing);
  std::string gap;
  const auto add_piece = [&](const Piece& piece) {
    const std::uint64_t place = piece.file_offset - begin;
    if (is_on_gpu(plan, piece)) {
      std::memcpy(target + place, landing->data() + place, piece.end - piece.begin);
    } else {
      fetch(plan, piece, sources_.mappings, target + place);
    }
  };
  const auto add_gap = [&](std::size_t storage, std::uint64_t from, std::uint64_t to) {
    fill_gap(layout_, storage, checksum_before(plan, storage), from, to, target + (from - begin),
             &gap);
  };
  for_each_piece(layout_, begin, end, add_piece, add_gap);
}

}  // namespace fastsd
