// The zip files that torch.save writes.
#pragma once

#include "file.h"
#include "format.h"

namespace fastsd {

// Each record `data/KEY` is a storage, whose checksum is its CRC-32, and a tensor of uint8 over all
// of it, named KEY, in the order of the file. Sections: kPickle, the record data.pkl; kByteOrder,
// unless the file has no such record, which old releases and others do not write: then it is
// little-endian.
//
// A TorchScript archive gives the section kTorchScript and nothing else: torch.jit reads it.
//
// Throws what read_zip_directory() does; kFormat: a zip file that torch.save does not write;
// kUnsupported: records that are compressed; kVersion: a newer format; kLimit: a data.pkl of more
// than kHeaderBytesMax.
Tables read_torch_zip(const File& file);

}  // namespace fastsd
