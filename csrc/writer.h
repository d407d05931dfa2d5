// From a plan to bytes: in a file that appears all at once, or piece by piece for a stream.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "plan.h"
#include "workers.h"

namespace fastsd {

struct WriteOptions {
  bool durable = false;  // on the device, under its name, before returning
  bool checksum = true;  // record a CRC32C for each storage
};

// Writes the plan to `path` (see AtomicFile for what happens to a file that is there). Needs at
// most kWriteMemoryBytes of memory beyond the plan.
void write_file(const std::string& path, Plan& plan, const WriteOptions& options,
                const Interrupt& interrupt);
constexpr std::uint64_t kWriteMemoryBytes = std::uint64_t{40} << 20U;

// For streams, which want the header first: fills in the checksums, reading all bytes once...
void checksum_storages(Plan& plan, const Interrupt& interrupt);

// ...and then gives the bytes [begin, end) of the data section, the padding included, any number of
// times. REQUIRES: plan.header_bytes() <= begin <= end <= plan.file_bytes().
void gather(const Plan& plan, std::uint64_t begin, std::uint64_t end, std::byte* target);

}  // namespace fastsd
