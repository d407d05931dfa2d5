#include "writer.h"

#include <algorithm>
#include <cstring>
#include <memory>
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

// Smaller files are written by the calling thread alone. Writers that wait for each other, and for
// the journal, let their processors go to sleep; on a virtual machine waking one takes
// milliseconds.
constexpr std::uint64_t kParallelBytesMin = std::uint64_t{64} << 20U;
constexpr std::uint64_t kParallelBytesMinInMemory = std::uint64_t{8} << 20U;

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

// Calls visit(piece) for the storages' bytes among [begin, end) of the file, in order.
template <class Visit>
void for_each_piece(const Plan& plan, std::uint64_t begin, std::uint64_t end, Visit visit) {
  const std::vector<StorageRecord>& storages = plan.storages();
  auto storage = std::partition_point(
      storages.begin(), storages.end(),
      [&](const StorageRecord& s) { return s.offset + stored_bytes(s) <= begin; });
  for (; storage != storages.end() && storage->offset < end; ++storage) {
    const std::uint64_t from = std::max(begin, storage->offset);
    const std::uint64_t to = std::min(end, storage->offset + stored_bytes(*storage));
    if (from >= to) continue;
    visit(Piece{static_cast<std::size_t>(storage - storages.begin()), from - storage->offset,
                to - storage->offset, from});
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
  void add(std::vector<StorageRecord>& storages, const Piece& piece, const std::byte* bytes) {
    StorageRecord& storage = storages[piece.storage];
    const std::uint32_t crc = crc32c(0, bytes, piece.end - piece.begin);
    if (piece.end - piece.begin < storage.bytes) {
      parts_.push_back({piece, crc});
      return;
    }
    storage.crc32c = crc;
  }

  // Joins the pieces of storages that have several.
  static void join(const std::vector<const Checksums*>& all, std::vector<StorageRecord>& storages) {
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
          part.piece.begin == 0 ? part.crc : crc32c_combine(storage.crc32c, part.crc, bytes);
    }
  }

 private:
  struct Part {
    Piece piece;
    std::uint32_t crc;
  };
  std::vector<Part> parts_;
};

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
  explicit Worker(std::uint64_t slab_bytes) : slab(slab_bytes) {}

  Slab slab;
  Checksums checksums;
  std::vector<iovec> pieces;
};

void join_checksums(const std::vector<Worker>& workers, std::vector<StorageRecord>& storages) {
  std::vector<const Checksums*> all;
  all.reserve(workers.size());
  for (const Worker& worker : workers) all.push_back(&worker.checksums);
  Checksums::join(all, storages);
}

class FileWriter {
 public:
  FileWriter(const std::string& path, Plan& plan, const WriteOptions& options)
      : plan_(plan), options_(options), file_(path) {
    file_.reserve(plan.file_bytes());
    is_direct_ = options.durable && plan.file_bytes() >= kDirectBytesMin && file_.bypass_cache();
    if (is_direct_) window_bytes_ = kDirectWindowBytes;
  }

  void write(const Interrupt& interrupt) {
    const std::uint64_t first = plan_.header_bytes() / window_bytes_;
    const std::uint64_t count = (plan_.file_bytes() + window_bytes_ - 1) / window_bytes_ - first;
    const std::size_t threads = thread_count();
    std::vector<Worker> workers(threads, Worker(window_bytes_));
    if (options_.checksum) mark_checksummed(plan_.storages());
    run_parallel(count, threads, interrupt, [&](std::size_t worker, std::size_t i) {
      const std::uint64_t begin = (first + i) * window_bytes_;
      write_window(workers[worker], std::max(begin, plan_.header_bytes()),
                   std::min(begin + window_bytes_, plan_.file_bytes()));
    });
    if (options_.checksum) join_checksums(workers, plan_.storages());
    write_header(workers[0].slab);
    if (is_direct_) file_.truncate(plan_.file_bytes());
    file_.commit(options_.durable);
  }

 private:
  std::size_t thread_count() const {
    if (is_direct_) return kDirectThreads;
    const std::uint64_t bytes_min =
        file_.is_in_memory() ? kParallelBytesMinInMemory : kParallelBytesMin;
    return plan_.file_bytes() < bytes_min ? 1 : std::min(kBufferedThreads, processor_count());
  }

  // Takes large pieces from where they are and copies the others, so that the window goes out in
  // one call.
  void write_window(Worker& worker, std::uint64_t begin, std::uint64_t end) {
    if (begin == end) return;
    worker.pieces.clear();
    std::uint64_t written = begin;  // what precedes it is among the pieces
    std::uint64_t copied = begin;   // what lies between the two is in the slab
    const auto flush = [&] {
      if (copied > written)
        worker.pieces.push_back({worker.slab.data() + (written - begin), copied - written});
      written = copied;
    };
    for_each_piece(plan_, begin, end, [&](const Piece& piece) {
      const std::uint64_t bytes = piece.end - piece.begin;
      if (piece.file_offset > copied) {
        std::memset(worker.slab.data() + (copied - begin), 0, piece.file_offset - copied);
        copied = piece.file_offset;
      }
      const std::byte* source = plan_.bytes_in_place(piece.storage, piece.begin);
      if (source == nullptr || bytes < kInPlaceBytesMin || is_direct_) {
        std::byte* target = worker.slab.data() + (copied - begin);
        plan_.fill(piece.storage, piece.begin, piece.end, target);
        source = target;
        copied += bytes;
      } else {
        flush();
        worker.pieces.push_back({const_cast<std::byte*>(source), bytes});
        written = copied = copied + bytes;
      }
      if (options_.checksum) worker.checksums.add(plan_.storages(), piece, source);
    });
    if (is_direct_) {
      const std::uint64_t aligned = align_up(copied, AtomicFile::kDirectAlignBytes);
      std::memset(worker.slab.data() + (copied - begin), 0, aligned - copied);
      copied = aligned;
    }
    flush();
    file_.write_at(worker.pieces.data(), worker.pieces.size(), begin);
  }

  void write_header(Slab& slab) {
    const std::string header = plan_.encode_header();
    if (!is_direct_) {
      file_.write_at(header.data(), header.size(), 0);
      return;
    }
    for (std::uint64_t begin = 0; begin < header.size(); begin += window_bytes_) {
      const std::uint64_t bytes = std::min(window_bytes_, header.size() - begin);
      header.copy(reinterpret_cast<char*>(slab.data()), bytes, begin);
      file_.write_at(slab.data(), bytes, begin);
    }
  }

  Plan& plan_;
  const WriteOptions& options_;
  AtomicFile file_;
  bool is_direct_ = false;
  std::uint64_t window_bytes_ = kBufferedWindowBytes;
};

}  // namespace

void write_file(const std::string& path, Plan& plan, const WriteOptions& options,
                const Interrupt& interrupt) {
  FileWriter(path, plan, options).write(interrupt);
}

void checksum_storages(Plan& plan, const Interrupt& interrupt) {
  constexpr std::uint64_t step_bytes = std::uint64_t{1} << 20U;
  const std::uint64_t count =
      (plan.file_bytes() - plan.header_bytes() + step_bytes - 1) / step_bytes;
  std::vector<Worker> workers(processor_count(), Worker(step_bytes));
  mark_checksummed(plan.storages());
  run_parallel(count, workers.size(), interrupt, [&](std::size_t worker, std::size_t i) {
    const std::uint64_t begin = plan.header_bytes() + i * step_bytes;
    for_each_piece(plan, begin, begin + step_bytes, [&](const Piece& piece) {
      const std::byte* source = plan.bytes_in_place(piece.storage, piece.begin);
      if (source == nullptr) {
        plan.fill(piece.storage, piece.begin, piece.end, workers[worker].slab.data());
        source = workers[worker].slab.data();
      }
      workers[worker].checksums.add(plan.storages(), piece, source);
    });
  });
  join_checksums(workers, plan.storages());
}

void gather(const Plan& plan, std::uint64_t begin, std::uint64_t end, std::byte* target) {
  std::uint64_t done = begin;
  for_each_piece(plan, begin, end, [&](const Piece& piece) {
    std::memset(target + (done - begin), 0, piece.file_offset - done);
    plan.fill(piece.storage, piece.begin, piece.end, target + (piece.file_offset - begin));
    done = piece.file_offset + (piece.end - piece.begin);
  });
  std::memset(target + (done - begin), 0, end - done);
}

}  // namespace fastsd
