#include "cuda/download.h"

#include "error.h"

namespace fastsd::cuda {

Download::Download(const Streams& streams, std::uint64_t bytes)
    : is_pinning_(bytes > kPinBytesMin) {
  const std::shared_ptr<const Driver> driver = Driver::open();
  for (const auto& [ordinal, stream] : streams) {
    const auto gpu = std::make_shared<Gpu>(driver, ordinal);
    gpus_.emplace(ordinal, gpu);
    streams_.emplace(ordinal, std::make_unique<Stream>(gpu)).first->second->follow(stream);
  }
}

void Download::copy(std::byte* target, const std::byte* source, std::uint64_t bytes, int gpu) {
  if (bytes == 0) return;
  streams_.at(gpu)->copy_to_host(target, reinterpret_cast<std::uintptr_t>(source), bytes);
}

void Download::wait() {
  for (const auto& stream : streams_) stream.second->synchronize();
}

Landing::Landing(Download* download)
    : download_(download), ring_(Ring::shared()), slab_(ring_.take()) {
  if (!download->is_pinning_) return;
  try {
    slab_.pin(download->gpus_.begin()->second);
  } catch (...) {
    ring_.give_back(std::move(slab_));
    throw;
  }
}

Landing::~Landing() {
  try {
    download_->wait();
    ring_.give_back(std::move(slab_));
  } catch (const Error&) {
    ring_.abandon(std::move(slab_));
  }
}

}  // namespace fastsd::cuda
