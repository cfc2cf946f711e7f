// The one body of all levels. A Step appends to the sum of a stream: `word` 8 bytes, `byte` one.
#pragma once
#include <cstdint>
#include <cstring>

namespace elute {

uint32_t crc32c_sse42(const uint8_t* data, int64_t n_bytes);
void crc32c_pages_sse42(const uint8_t* data, int64_t n_pages, uint32_t* sums);
uint32_t crc32c_armv8(const uint8_t* data, int64_t n_bytes);
void crc32c_pages_armv8(const uint8_t* data, int64_t n_pages, uint32_t* sums);

namespace {

constexpr int64_t kPage = 4096, kWord = 8;
constexpr int kStreams = 4;  // an instruction takes 3 cycles and one starts in each: 3 streams, and one to spare

inline uint64_t word_at(const uint8_t* data) {
  uint64_t word;
  std::memcpy(&word, data, sizeof word);  // bits of byte 0 lowest: all CPUs that elute runs on are little-endian
  return word;
}

template <class Step>
uint32_t sum_of(const uint8_t* data, int64_t n_bytes) {
  uint32_t sum = ~0u;
  for (; n_bytes >= kWord; n_bytes -= kWord, data += kWord) sum = Step::word(sum, word_at(data));
  for (; n_bytes > 0; --n_bytes, ++data) sum = Step::byte(sum, *data);
  return ~sum;
}

// Pages have sums of their own, so neighbours are summed side by side and nothing is to be combined.
template <class Step>
void sum_pages(const uint8_t* data, int64_t n_pages, uint32_t* sums) {
  for (; n_pages >= kStreams; n_pages -= kStreams, data += kStreams * kPage, sums += kStreams) {
    uint32_t sum[kStreams];
    for (int s = 0; s < kStreams; ++s) sum[s] = ~0u;
    for (int64_t at = 0; at < kPage; at += kWord)
      for (int s = 0; s < kStreams; ++s) sum[s] = Step::word(sum[s], word_at(data + s * kPage + at));
    for (int s = 0; s < kStreams; ++s) sums[s] = ~sum[s];
  }
  for (; n_pages > 0; --n_pages, data += kPage) *sums++ = sum_of<Step>(data, kPage);
}

}  // namespace
}  // namespace elute
