// Attention over the key-value cache: contracts of attention_body.h. Rules for all kernels: float_kernels.h.
#pragma once
#include <cstdint>

namespace elute {

constexpr int kCacheTile = 64;       // positions whose keys lie channel-major side by side: 8 AVX2 sums of 8 scores
constexpr int kAttentionSpan = 256;  // positions whose softmax is computed on its own, then merged: work for a thread
constexpr int kAttentionRows = 96;   // most queries of a block: 16 AVX2 register tiles; 64 spend 4 to 8 % more on widening

// The cache of one kv head of one layer: tiles of kCacheTile positions behind one another, 64-byte aligned. A tile is
//   keys    f16 [D][kCacheTile]   channel-major: scores of a tile are D broadcasts
//   values  f16 [kCacheTile][D]
// head_width D is a multiple of 2.
struct CacheView {
  uint8_t* tiles;
  int head_width;
};
constexpr int64_t cache_tile_bytes(int head_width) { return int64_t{2} * 2 * kCacheTile * head_width; }

// One block of queries against one kv head. Row r is a query at positions[r], which sees the keys 0..positions[r].
struct AttentionBlock {
  const float* query;
  const int64_t* query_offsets;  // [n_rows] of the rows' vectors [D], in floats from `query`
  const int32_t* positions;      // [n_rows]
  int n_rows;                    // 1 to kAttentionRows
  float scale;                   // positive
  int window;                    // 0: none; else a row sees the keys at position-window+1 .. position
  float softcap;                 // 0: none

  int first_key(int row) const {
    return window > 0 && positions[row] >= window ? positions[row] - window + 1 : 0;
  }
};

// What one row has of some keys: the largest score, the sum of the probabilities relative to it, 14 floats of padding,
// then the values [D] weighted by those probabilities, padded to whole 16-lane vectors. 64-byte aligned.
constexpr int kPartialSums = 16;
constexpr int64_t attention_partial_floats(int head_width) { return kPartialSums + (head_width + 15) / 16 * 16; }

// Bytes of scratch (64-byte aligned) for any block: a tile in f32, then per row a score for each of its keys and two
// partial results.
constexpr int64_t attention_scratch_bytes(int head_width) {
  const int64_t padded = (head_width + 15) / 16 * 16;
  return 4 * (kCacheTile * padded + kAttentionRows * (kCacheTile + 2 * attention_partial_floats(head_width)));
}

}  // namespace elute
