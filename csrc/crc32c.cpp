#include "crc32c.h"

#include <algorithm>
#include <array>

#include "crc32c_body.h"

#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace elute {
namespace {

static_assert(kSummedPage == kPage);
constexpr uint32_t kPolynomial = 0x82f63b78;  // 0x1edc6f41, lowest bit first

// tables[i][b]: what byte b adds to the sum when i more bytes follow it ("slicing by 8").
constexpr std::array<std::array<uint32_t, 256>, kWord> make_tables() {
  std::array<std::array<uint32_t, 256>, kWord> tables{};
  for (uint32_t b = 0; b < 256; ++b) {
    uint32_t sum = b;
    for (int bit = 0; bit < 8; ++bit) sum = sum >> 1 ^ (sum & 1 ? kPolynomial : 0);
    tables[0][b] = sum;
  }
  for (size_t i = 1; i < tables.size(); ++i)
    for (uint32_t b = 0; b < 256; ++b) tables[i][b] = tables[i - 1][b] >> 8 ^ tables[0][tables[i - 1][b] & 0xff];
  return tables;
}
constexpr auto kTables = make_tables();

struct Step {
  static uint32_t word(uint32_t sum, uint64_t word) {
    word ^= sum;
    uint32_t all = 0;
    for (int i = 0; i < kWord; ++i) all ^= kTables[kWord - 1 - i][word >> 8 * i & 0xff];
    return all;
  }
  static uint32_t byte(uint32_t sum, uint8_t byte) { return sum >> 8 ^ kTables[0][(sum ^ byte) & 0xff]; }
};

std::vector<Crc32c> detect() {
  std::vector<Crc32c> found = {{"table", &sum_of<Step>, &sum_pages<Step>}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("sse4.2")) found.push_back({"sse42", &crc32c_sse42, &crc32c_pages_sse42});
#elif defined(__aarch64__)
  if (getauxval(AT_HWCAP) & HWCAP_CRC32) found.push_back({"armv8", &crc32c_armv8, &crc32c_pages_armv8});
#endif
  return found;
}

}  // namespace

const std::vector<Crc32c>& crc32c_levels() {
  static const std::vector<Crc32c> levels = detect();
  return levels;
}

int64_t first_wrong_page(const uint8_t* data, int64_t n_pages, const uint32_t* wanted, uint32_t* found) {
  constexpr int64_t kAtOnce = 64;
  uint32_t sums[kAtOnce];
  for (int64_t first = 0; first < n_pages; first += kAtOnce) {
    const int64_t n = std::min(kAtOnce, n_pages - first);
    best_crc32c().of_pages(data + first * kSummedPage, n, sums);
    const int64_t at = std::mismatch(sums, sums + n, wanted + first).first - sums;
    if (at == n) continue;
    *found = sums[at];
    return first + at;
  }
  return n_pages;
}

}  // namespace elute
