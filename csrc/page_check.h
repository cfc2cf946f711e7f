// Reads pages of a file and compares their checksums, in bounded memory.
#pragma once
#include <cstdint>
#include <vector>

#include "flash_reader.h"

namespace elute {

struct BadPage {
  int64_t page;
  int error;       // as of FlashDone; 0: it can be read, and sums to
  uint32_t found;  // this
};

// Those of pages first .. first + n_pages that cannot be read or do not sum to wanted[page - first], in order. What is read
// takes reader.depth() * request_bytes, a multiple of kFlashAlignment. forget: leave nothing of it in the page cache, also
// where the file system reads through it.
std::vector<BadPage> bad_pages(const FlashFile& file, FlashReader& reader, int64_t first, int64_t n_pages,
                               const uint32_t* wanted, int64_t request_bytes, bool forget);

}  // namespace elute
