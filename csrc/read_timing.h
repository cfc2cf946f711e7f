// Times reads as weights are read: what a disk gives at a size of requests and a number in flight.
#pragma once
#include <cstdint>
#include <vector>

#include "flash_reader.h"

namespace elute {

struct ReadTimes {
  int64_t n_reads = 0;
  double seconds = 0;  // from the first request to the last answer
  int error = 0;       // of the read at `offset`, as of FlashDone: nothing after it was asked for
  int64_t offset = 0;
};

// Reads n_bytes at the offsets, one after another and from the first again, reader.depth() of them in flight, until
// budget_s is over. memory: kFlashAlignment-aligned, of depth * n_bytes; what it holds afterwards means nothing.
ReadTimes time_reads(const FlashFile& file, FlashReader& reader, const std::vector<int64_t>& offsets, int64_t n_bytes,
                     uint8_t* memory, double budget_s);

}  // namespace elute
