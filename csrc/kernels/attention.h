// Attention over the key-value cache: contracts of attention_body.h. Rules for all kernels: float_kernels.h.
#pragma once
#include <cstdint>

namespace elute {

constexpr int kCacheTile = 64;       // positions whose keys lie channel-major side by side: 8 AVX2 sums of 8 scores
constexpr int kAttentionSpan = 256;  // positions whose softmax is computed on its own, then merged: work for a thread
constexpr int kAttentionRows = 96;   // most queries of a block: 16 AVX2 register tiles; 64 spend 4 to 8 % more on widening

// Channels up to whole 16-lane vectors.
constexpr int padded_width(int head_width) { return (head_width + 15) / 16 * 16; }

enum class CacheType : int { f16 = 0, q8 = 1 };
constexpr int kMostQ8Width = 512;  // head width: 512 products of 15 and 7 bits add up in 32

// The cache of one kv head of one layer: tiles of kCacheTile positions behind one another, 64-byte aligned. A tile of
// f16 is
//   keys    f16 [D][kCacheTile]   channel-major: scores of a tile are D broadcasts
//   values  f16 [kCacheTile][D]
// A tile of q8 has codes in [-127, 127], two that are multiplied together side by side, and a scale for each position's
// key and for its value: x = code * scale. Scales are the largest |x| / 127, NaN if one is not finite.
//   keys         i8 [D / 2][kCacheTile][2 channels]
//   key scales   f32 [kCacheTile]
//   values       i8 [kCacheTile / 2][padded D][2 positions]
//   value scales f32 [kCacheTile]
// head_width D is a multiple of 2.
struct CacheView {
  uint8_t* tiles;
  int head_width;
  CacheType type;
};
constexpr int64_t cache_tile_bytes(CacheType type, int head_width) {
  return type == CacheType::f16 ? int64_t{2} * 2 * kCacheTile * head_width
                                : int64_t{kCacheTile} * (head_width + padded_width(head_width) + 2 * 4);
}

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
constexpr int64_t attention_partial_floats(int head_width) { return kPartialSums + padded_width(head_width); }

// Bytes of scratch (64-byte aligned) for any block: a tile in f32, or of a q8 cache the queries and probabilities of all
// rows as 16 bits; then for each row a scale, a score for each key of a tile and two partial results.
constexpr int64_t attention_tile_floats(int head_width) {
  const int64_t f16 = kCacheTile * padded_width(head_width);
  const int64_t q8 = kAttentionRows * (padded_width(head_width) + kCacheTile) / 2;
  return f16 > q8 ? f16 : q8;
}
constexpr int64_t attention_scratch_bytes(int head_width) {
  return 4 * (attention_tile_floats(head_width) +
              kAttentionRows * (1 + kCacheTile + 2 * attention_partial_floats(head_width)));
}

}  // namespace elute
