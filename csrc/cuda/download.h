// From the memory of GPUs to that of the host, for whoever writes it on: each thread has streams of
// its own, so that one thread's bytes arrive while another writes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "cuda/driver.h"
#include "cuda/ring.h"

namespace fastsd::cuda {

// Of each GPU, by its ordinal, the stream that memory belongs to.
using Streams = std::vector<std::pair<int, StreamHandle>>;

// One thread's copies. Throws kDevice, and kUnsupported where there is no driver.
class Download {
 public:
  // What has been put into the streams until now is done before anything is copied. `bytes`: how
  // much there is to do in all; for little it is not worth pinning memory.
  Download(const Streams& streams, std::uint64_t bytes);

  // Copies, later on if the target is pinned. REQUIRES: the GPU is one of those with a stream.
  void copy(std::byte* target, const std::byte* source, std::uint64_t bytes, int gpu);

  // Until all of it has arrived.
  void wait();

 private:
  friend class Landing;

  std::map<int, std::shared_ptr<const Gpu>> gpus_;
  std::map<int, std::unique_ptr<Stream>> streams_;
  bool is_pinning_;
};

// A slab of the ring to copy into, for as long as this lives. Whoever has one takes no other, and
// waits for nobody who might: the ring may have no more.
class Landing {
 public:
  explicit Landing(Download* download);
  Landing(const Landing&) = delete;
  Landing& operator=(const Landing&) = delete;
  ~Landing();  // once nothing is on its way any more

  std::byte* data() const { return slab_.data(); }

 private:
  Download* download_;
  Ring& ring_;
  Slab slab_;
};

}  // namespace fastsd::cuda
