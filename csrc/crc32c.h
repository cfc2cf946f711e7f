// CRC-32C (Castagnoli; RFC 3720): the checksum of every page of a weight file. Every level gives the same sums. Pure.
#pragma once
#include <cstdint>
#include <string_view>
#include <vector>

namespace elute {

constexpr int64_t kSummedPage = 4096;  // bytes of a weight file that have a sum of their own

struct Crc32c {
  std::string_view name;  // table, sse42, armv8
  uint32_t (*of)(const uint8_t* data, int64_t n_bytes);
  // sums [n_pages], one of every kSummedPage bytes of data
  void (*of_pages)(const uint8_t* data, int64_t n_pages, uint32_t* sums);
};

// Those that this CPU runs, slowest first.
const std::vector<Crc32c>& crc32c_levels();
inline const Crc32c& best_crc32c() { return crc32c_levels().back(); }

// The first page of data whose sum is not wanted[page], n_pages if there is none. found: its sum.
int64_t first_wrong_page(const uint8_t* data, int64_t n_pages, const uint32_t* wanted, uint32_t* found);

}  // namespace elute
