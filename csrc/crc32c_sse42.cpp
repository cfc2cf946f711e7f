#include <nmmintrin.h>

#include "crc32c_body.h"

namespace elute {
namespace {

struct Step {
  static uint32_t word(uint32_t sum, uint64_t word) { return static_cast<uint32_t>(_mm_crc32_u64(sum, word)); }
  static uint32_t byte(uint32_t sum, uint8_t byte) { return _mm_crc32_u8(sum, byte); }
};

}  // namespace

uint32_t crc32c_sse42(const uint8_t* data, int64_t n_bytes) { return sum_of<Step>(data, n_bytes); }
void crc32c_pages_sse42(const uint8_t* data, int64_t n_pages, uint32_t* sums) { sum_pages<Step>(data, n_pages, sums); }

}  // namespace elute
