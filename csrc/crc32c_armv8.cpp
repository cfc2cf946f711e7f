#include <arm_acle.h>

#include "crc32c_body.h"

namespace elute {
namespace {

struct Step {
  static uint32_t word(uint32_t sum, uint64_t word) { return __crc32cd(sum, word); }
  static uint32_t byte(uint32_t sum, uint8_t byte) { return __crc32cb(sum, byte); }
};

}  // namespace

uint32_t crc32c_armv8(const uint8_t* data, int64_t n_bytes) { return sum_of<Step>(data, n_bytes); }
void crc32c_pages_armv8(const uint8_t* data, int64_t n_pages, uint32_t* sums) { sum_pages<Step>(data, n_pages, sums); }

}  // namespace elute
