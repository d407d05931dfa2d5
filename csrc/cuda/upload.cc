#include "cuda/upload.h"

#include <algorithm>
#include <cerrno>
#include <map>
#include <memory>
#include <optional>

#include "cuda/direct_storage.h"
#include "cuda/ring.h"
#include "error.h"

namespace fastsd::cuda {
namespace {

// Below this a step is not worth a thread's while.
constexpr std::uint64_t kStepBytesMin = std::uint64_t{1} << 20U;

// What lies between two transfers is read, too, and left where it is, up to this.
constexpr std::uint64_t kGapBytesMax = 64U << 10U;

// Devices want many requests at once, and a thread waits for each; processors have little to do.
constexpr std::size_t kDirectThreads = 16;

// A part of a transfer.
struct Piece {
  std::size_t transfer;
  std::uint64_t offset;  // in the file
  std::uint64_t bytes;
  Address target;
};

// Pieces that are read at once, for one GPU.
struct Step {
  std::uint64_t begin;  // in the file
  std::uint64_t end;
  std::uint64_t wanted;  // bytes of pieces
  int gpu;
  std::size_t first_piece;
  std::size_t piece_count;
};

class Upload {
 public:
  Upload(const File& file, const std::vector<Transfer>& transfers, const UploadOptions& options)
      : file_(file), direct_(file), options_(options) {
    for (const Transfer& transfer : transfers) total_ += transfer.bytes;
    split(transfers);
    crcs_.resize(options.checksum != nullptr ? pieces_.size() : 0);
    const std::shared_ptr<const Driver> driver = Driver::open();
    for (const auto& [ordinal, stream] : options.streams) {
      const auto gpu = std::make_shared<Gpu>(driver, ordinal);
      gpus_.emplace(ordinal, gpu);
      streams_.emplace(ordinal, std::make_unique<Stream>(gpu)).first->second->follow(stream);
    }
  }

  std::vector<std::uint32_t> run(const Interrupt& interrupt) {
    Ring& ring = Ring::shared();
    try {
      if (options_.direct_storage) open_direct_storage();
      run_parallel(steps_.size(), thread_count(), interrupt,
                   [&](std::size_t, std::size_t i) { do_step(ring, steps_[i]); });
      for (const auto& stream : streams_) stream.second->synchronize();
    } catch (...) {
      streams_.clear();  // waits: the targets may go as soon as this has been thrown
      ring.collect();
      throw;
    }
    ring.collect();
    return join_checksums();
  }

 private:
  // Steps are small enough for a slab and, where there is little to do, for all threads to have
  // some of it. They end where blocks do, so that direct reads meet no block twice.
  void split(const std::vector<Transfer>& transfers) {
    const std::uint64_t share = total_ / (2 * processor_count());
    const std::uint64_t room =
        std::clamp(share - share % kDirectAlignBytes, kStepBytesMin, kSlabBytes);
    const auto block_of = [&](std::uint64_t offset) {
      const std::uint64_t place = file_.begin() + offset;
      return place - place % kDirectAlignBytes;
    };
    for (std::size_t i = 0; i < transfers.size(); ++i) {
      const Transfer& transfer = transfers[i];
      for (std::uint64_t done = 0; done < transfer.bytes;) {
        const std::uint64_t at = transfer.offset + done;
        const bool is_near = !steps_.empty() && steps_.back().gpu == transfer.gpu &&
                             at >= steps_.back().end && at - steps_.back().end <= kGapBytesMax;
        std::uint64_t end_max = is_near ? block_of(steps_.back().begin) + room - file_.begin() : 0;
        if (end_max <= at) {
          steps_.push_back({at, at, 0, transfer.gpu, pieces_.size(), 0});
          end_max = block_of(at) + room - file_.begin();
        }
        const std::uint64_t bytes = std::min(transfer.bytes - done, end_max - at);
        pieces_.push_back({i, at, bytes, transfer.target + done});
        steps_.back().end = at + bytes;
        steps_.back().wanted += bytes;
        ++steps_.back().piece_count;
        done += bytes;
      }
    }
  }

  // It waits for no stream, and its bytes are never seen here.
  void open_direct_storage() {
    if (!direct_ || options_.checksum != nullptr) return;
    try {
      direct_storage_.emplace(DirectStorage::open(), direct_);
    } catch (const Error&) {
      return;  // not real, or not for this file
    }
    for (const auto& stream : streams_) stream.second->synchronize();
  }

  std::size_t thread_count() {
    if (steps_.empty()) return 1;
    const std::uint64_t begin = steps_.front().begin;
    is_cached_ = file_.is_cached(begin, steps_.back().end - begin);
    const bool is_direct = !is_cached_ && direct_;
    return is_direct ? std::max(processor_count(), kDirectThreads) : processor_count();
  }

  void do_step(Ring& ring, const Step& step) {
    if (direct_storage_ && is_cold(step)) {
      for (std::size_t i = step.first_piece; i < step.first_piece + step.piece_count; ++i) {
        const Piece& piece = pieces_[i];
        direct_storage_->read_at(*gpus_.at(step.gpu), piece.target, piece.bytes, piece.offset);
      }
    } else {
      do_step_through_ring(ring, step);
    }
    if (options_.done != nullptr) *options_.done += step.wanted;
  }

  void do_step_through_ring(Ring& ring, const Step& step) {
    Slab slab = ring.take();
    std::size_t skipped = 0;
    try {
      skipped = read(step, slab.data());
      if (total_ > kPinBytesMin) slab.pin(gpus_.at(step.gpu));
      for (std::size_t i = step.first_piece; i < step.first_piece + step.piece_count; ++i) {
        const Piece& piece = pieces_[i];
        if (options_.checksum == nullptr) break;
        crcs_[i] = options_.checksum->update(0, slab.data() + skipped + (piece.offset - step.begin),
                                             piece.bytes);
      }
    } catch (...) {
      ring.give_back(std::move(slab));
      throw;
    }
    copy(ring, step, std::move(slab), skipped);
  }

  void copy(Ring& ring, const Step& step, Slab slab, std::size_t skipped) {
    Stream& stream = *streams_.at(step.gpu);
    std::optional<Event> event;
    try {
      for (std::size_t i = step.first_piece; i < step.first_piece + step.piece_count; ++i) {
        const Piece& piece = pieces_[i];
        stream.copy_to_device(piece.target, slab.data() + skipped + (piece.offset - step.begin),
                              piece.bytes);
      }
      event.emplace(stream.record());
    } catch (...) {
      give_back_unfinished(ring, stream, std::move(slab));
      throw;
    }
    ring.give_back(std::move(slab), *std::move(event));
  }

  // Some of it may be on its way.
  static void give_back_unfinished(Ring& ring, Stream& stream, Slab slab) {
    try {
      stream.synchronize();
      ring.give_back(std::move(slab));
    } catch (const Error&) {
      ring.abandon(std::move(slab));
    }
  }

  bool is_cold(const Step& step) const {
    return !is_cached_ && !file_.is_cached(step.begin, step.end - step.begin);
  }

  // Returns where in the slab the step begins.
  std::size_t read(const Step& step, std::byte* target) {
    const std::uint64_t bytes = step.end - step.begin;
    if (direct_ && !is_refused_ && is_cold(step)) {
      try {
        return direct_.read_at(target, bytes, step.begin);
      } catch (const Error& error) {
        if (error.system_errno != EINVAL) throw;
        is_refused_ = true;  // a device with larger blocks
      }
    }
    file_.read_at(target, bytes, step.begin);
    return 0;
  }

  std::vector<std::uint32_t> join_checksums() const {
    std::vector<std::uint32_t> joined;
    for (std::size_t i = 0; i < crcs_.size(); ++i) {
      const bool is_first = i == 0 || pieces_[i - 1].transfer != pieces_[i].transfer;
      joined.resize(pieces_[i].transfer + 1);
      std::uint32_t& crc = joined.back();
      crc = is_first ? crcs_[i] : options_.checksum->combine(crc, crcs_[i], pieces_[i].bytes);
    }
    return joined;
  }

  const File& file_;
  DirectFile direct_;
  std::optional<DirectStorageFile> direct_storage_;
  const UploadOptions& options_;
  std::uint64_t total_ = 0;
  std::vector<Piece> pieces_;
  std::vector<Step> steps_;
  std::vector<std::uint32_t> crcs_;  // of pieces
  bool is_cached_ = false;           // all of it
  std::atomic<bool> is_refused_{false};
  std::map<int, std::shared_ptr<const Gpu>> gpus_;
  std::map<int, std::unique_ptr<Stream>> streams_;
};

}  // namespace

std::vector<std::uint32_t> upload(const File& file, const std::vector<Transfer>& transfers,
                                  const UploadOptions& options, const Interrupt& interrupt) {
  try {
    std::vector<std::uint32_t> checksums = Upload(file, transfers, options).run(interrupt);
    if (options.checksum != nullptr) checksums.resize(transfers.size());  // of none: 0
    return checksums;
  } catch (Error& error) {
    if (error.path.empty()) error.path = file.name();
    throw;
  }
}

}  // namespace fastsd::cuda
