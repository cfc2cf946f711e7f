// Tiles of a q8 cache (attention.h), over any float vocabulary S: scores against the keys, sums of the values.
//
// Both are sums of rows under weights, as in attention_f16.h, but of int8 codes under int16 weights, two rows at a time,
// exact in 32 bits. The weights are the query, and the probabilities times the scales of the values, each rounded to
// 15 bits of the largest of its row: against the 7 bits of a code that is as good as exact. Values that a row does not
// see have weight 0, and an integer times 0 is 0.
#pragma once
#include "kernels/attention_rows.h"
#include "kernels/vectors.h"

namespace elute {
namespace {

constexpr float kMostCode = 127, kMostWeight = 32767;  // 32767 * 127 * kMostQ8Width (64 keys are fewer) < 2^31
// Rows whose largest value is below this count as 0, so that dividing by it gives no infinity. 2^-100
constexpr float kLeastPeak = 0x1p-100f;

// The largest |x| of [n], NaN where one is NaN or infinite.
template <class S>
float finite_peak(const float* x, int n) {
  auto peak = S::zero(), none = S::zero();
  for_vectors<S>(n, [&](int64_t i, auto memory) {
    const auto a = memory.load(x + i);
    peak = S::max(peak, S::abs(a));
    none = S::fma(a, S::zero(), none);
  });
  return S::largest(peak) + S::sum(none);
}

// codes [n up to whole vectors] = x * most / peak, rounded. -> what a step of the code is worth
template <class S, class Code>
float quantize_row(const float* x, int n, float peak, float most, Code* codes) {
  const auto factor = S::set1(peak > kLeastPeak ? most / peak : 0.0f);
  for_vectors<S>(n, [=](int64_t i, auto memory) { S::store(codes + i, S::mul(memory.load(x + i), factor)); });
  return (peak > kLeastPeak || peak != peak) ? peak / most : 0.0f;
}

// finish(row, vector, sum) for R rows and V vectors of sums: the pairs of rows [n_pairs][2], `step` bytes apart, under
// weights[r][2 * n_pairs]. Asks for one of the cache lines from `ahead` on with each pair.
template <class S, int R, int V, class Finish>
[[gnu::noinline]] void weighted_pairs(const int16_t* const* row_weights, const int8_t* pairs, int step, int n_pairs,
                                      const uint8_t* ahead, Finish finish) {
  typename S::Ints sums[R][V];
  const int16_t* weights[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    weights[r] = row_weights[r];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sums[r][v] = S::zero_ints();
  }
  for (int i = 0; i < n_pairs; ++i, pairs += step) {
    if constexpr (R > 1) __builtin_prefetch(ahead + i * kLineBytes, 0, 2);  // as in attention_f16.h
    if constexpr (R < V) {
      typename S::Pairs weight[R];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) weight[r] = S::set1_pair(weights[r] + 2 * i);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        const auto value = S::load_pairs(pairs + v * 2 * S::kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) sums[r][v] = S::add_products(weight[r], value, sums[r][v]);
      }
    } else {
      typename S::Pairs value[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) value[v] = S::load_pairs(pairs + v * 2 * S::kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const auto weight = S::set1_pair(weights[r] + 2 * i);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) sums[r][v] = S::add_products(weight, value[v], sums[r][v]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) S::keep_in_register(sums[r][v]);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) finish(r, v, S::to_float(sums[r][v]));
}

// Keys or values of a tile: i8 [n_pairs][width][2], width a multiple of kLanes.
struct PairTile {
  const int8_t* pairs;
  int n_pairs, width;
};

// finish(row, column, sum) for all columns, in register tiles of R rows.
template <class S, int R, int V = S::direct_vectors(R), class Finish>
void weigh_pairs(const int16_t* const* weights, const PairTile& tile, Finish finish, int column = 0) {
  constexpr int kWidth = V * S::kLanes;
  const int n_bytes = 2 * tile.n_pairs * tile.width;
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(tile.pairs);
  for (; column + kWidth <= tile.width; column += kWidth) {
    const int asked = column / kWidth * tile.n_pairs * kLineBytes;
    weighted_pairs<S, R, V>(weights, tile.pairs + 2 * column, 2 * tile.width, tile.n_pairs,
                            asked < n_bytes ? bytes + n_bytes + asked : bytes,
                            [&](int r, int v, typename S::Float sum) { finish(r, column + v * S::kLanes, sum); });
  }
  if constexpr (V > 1) {
    if (column < tile.width) weigh_pairs<S, R, V / 2>(weights, tile, finish, column);
  }
}

// Where the parts of a tile lie.
struct TileQ8 {
  int8_t* keys;  // [D / 2][kCacheTile][2]
  float* key_scales;
  int8_t* values;  // [kCacheTile / 2][padded D][2]
  float* value_scales;

  TileQ8(const CacheView& cache, int tile) {
    uint8_t* at = cache.tiles + tile * cache_tile_bytes(cache.type, cache.head_width);
    keys = reinterpret_cast<int8_t*>(at);
    key_scales = reinterpret_cast<float*>(at + kCacheTile * cache.head_width);
    values = reinterpret_cast<int8_t*>(key_scales + kCacheTile);
    value_scales = reinterpret_cast<float*>(values + kCacheTile * padded_width(cache.head_width));
  }
};

// The tiles of one cache for one block, one after the other.
template <class S>
class TilesQ8 {
 public:
  TilesQ8(const CacheView& cache, const AttentionBlock& block, const Scratch<S>& scratch)
      : cache_(cache),
        scratch_(scratch),
        padded_(padded_width(cache.head_width)),
        queries_(static_cast<int16_t*>(scratch.tile)),
        weights_(queries_ + kAttentionRows * padded_) {
    for (int r = 0; r < block.n_rows; ++r) {
      const float* query = block.query + block.query_offsets[r];
      const float peak = finite_peak<S>(query, cache.head_width);
      scratch.scales[r] =
          block.scale * quantize_row<S>(query, cache.head_width, peak, kMostWeight, queries_ + r * padded_);
    }
  }

  void open_keys(int tile) { tile_ = tile; }

  template <int R>
  void score(int first) const {
    const TileQ8 tile(cache_, tile_);
    const int16_t* queries[R];
    for (int r = 0; r < R; ++r) queries[r] = queries_ + (first + r) * padded_;
    float* scores = scratch_.scores + first * kCacheTile;
    weigh_pairs<S, R>(queries, PairTile{tile.keys, cache_.head_width / 2, kCacheTile},
                      [&](int r, int column, typename S::Float sum) {
                        S::store(scores + r * kCacheTile + column, S::mul(sum, S::load(tile.key_scales + column)));
                      });
  }

  void open_values(int) {}

  template <int R>
  void add_values(int first, const TileRows& rows) const {
    const TileQ8 tile(cache_, tile_);
    const int16_t* weights[R];
    float steps[R], keep[R];
    for (int r = 0; r < R; ++r) {
      int16_t* codes = weights_ + (first + r) * kCacheTile;
      weights[r] = codes;
      keep[r] = rows.end[first + r] > 0 ? rows.keep[first + r] : 1.0f;
      float* probabilities = scratch_.scores + (first + r) * kCacheTile;
      for (int i = 0; i < kCacheTile; i += S::kLanes)
        S::store(probabilities + i, S::mul(S::load(probabilities + i), S::load(tile.value_scales + i)));
      // Scales that the row does not see may be anything, those of positions never written too.
      for (int i = 0; i < rows.begin[first + r]; ++i) probabilities[i] = 0;
      for (int i = rows.end[first + r]; i < kCacheTile; ++i) probabilities[i] = 0;
      const float peak = finite_peak<S>(probabilities, kCacheTile);
      steps[r] = quantize_row<S>(probabilities, kCacheTile, peak, kMostWeight, codes);
    }
    weigh_pairs<S, R>(weights, PairTile{tile.values, kCacheTile / 2, padded_},
                      [&](int r, int column, typename S::Float sum) {
                        float* at = scratch_.span.sums(first + r) + column;
                        const auto before = S::mul(S::load(at), S::set1(keep[r]));
                        S::store(at, S::fma(sum, S::set1(steps[r]), before));
                      });
  }

 private:
  const CacheView& cache_;
  const Scratch<S>& scratch_;
  const int padded_;
  int16_t* const queries_;  // [rows][padded D]
  int16_t* const weights_;  // [rows][kCacheTile]
  int tile_ = 0;
};

template <class S>
void cache_write_q8(const CacheView& cache, const float* key, const float* value, int position) {
  const int width = cache.head_width;
  const TileQ8 tile(cache, position / kCacheTile);
  const int at = position % kCacheTile;
  // In parts of whole vectors; the codes of a part are spread over its tile.
  constexpr int kPart = 64;
  int8_t codes[kPart];
  const auto write = [&](const float* x, float* scale, auto place) {
    const float peak = finite_peak<S>(x, width);
    for (int begin = 0; begin < width; begin += kPart) {
      const int n = width - begin < kPart ? width - begin : kPart;
      *scale = quantize_row<S>(x + begin, n, peak, kMostCode, codes);
      for (int i = 0; i < n; ++i) *place(begin + i) = codes[i];
    }
  };
  write(key, tile.key_scales + at, [&](int channel) {
    return tile.keys + (channel / 2 * kCacheTile + at) * 2 + channel % 2;
  });
  const int padded = padded_width(width);
  write(value, tile.value_scales + at, [&](int channel) {
    return tile.values + (at / 2 * padded + channel) * 2 + at % 2;
  });
}

}  // namespace
}  // namespace elute
