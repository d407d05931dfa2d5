// What tests tell the stub driver, and ask it; everything else in it is the driver's own interface.
// "Device memory" is host memory, of which the stub need not be told.
#pragma once

#include <cstdint>

// An address with this bit stands for the one without it, and no processor can use it: as with a
// GPU's memory, whoever does not go through the driver is found out.
constexpr std::uint64_t kStubDeviceBit = std::uint64_t{1} << 62U;

extern "C" {

// Back to how it starts, with nothing pinned. REQUIRES: no stream or event is left.
void stub_reset();

// Settings, all 0 at first except devices (2) and version (13000):
//   devices, version      what the driver says it has and is
//   init_error            what cuInit() returns
//   copy_delay_us         before a copy out of, or into, pinned memory is carried out
//   fail_copy             the copy, counted from 1, that fails as it is carried out; then
//                         everything does
//   fail_pin              whether memory cannot be pinned
//   is_gone               whether no context can be used any more, as when a process ends
void stub_set(const char* setting, long value);

// Settings, and counts:
//   copies, bytes         that have been carried out
//   unpinned_copies       of these, from or to memory that is not pinned
//   pinned, pinned_peak   bytes now, and at most
//   streams, events, contexts, files    that are alive
//   direct_reads          from files straight to GPUs
//   misuses               calls without a context, or with handles that are none
long stub_get(const char* count);

// Has a stream do nothing for a while.
void stub_sleep(void* stream, long microseconds);
}
