// Tiles of an f16 cache (attention.h), over any float vocabulary S: scores against the keys, sums of the values.
//
// Both are the same operation, sums of rows under weights: scores of a tile are its key channels weighted by the query,
// the output is the value rows weighted by the probabilities. So one register tile, `weighted_rows`, does both, for R
// queries that share each loaded row. Every sum takes its terms one by one in ascending order, whatever R is.
#pragma once
#include "kernels/attention_rows.h"
#include "kernels/vectors.h"

namespace elute {
namespace {

// R queries that go through a tile together. `keep` scales what is in `sums` first.
template <int R>
struct RowGroup {
  const float* weights[R];
  float* sums[R];
  float keep[R];
};

// Zen 3, 4096 positions out of cache, against the plain read: 0.65 without and 0.79 with it for 3 rows of width 64, 0.46
// and 0.62 for 4 of width 128; one row's 128 bytes an iteration the hardware foresees, 0.83 and 0.70.
template <int R, class T>
constexpr bool kAsksAhead = R > 1 && sizeof(T) == 2;

// sums[r][0, V * kLanes) = sums * keep (0 if kFresh) + the rows [begin, end) weighted by weights[r][row]; rows lie `step`
// apart. Asks for one of the cache lines from `ahead` on with each row, unless that is null.
template <class S, int R, int V, bool kFresh, class T>
[[gnu::noinline]] void weighted_rows(const RowGroup<R>& group, int column, const T* rows, int step, int begin,
                                     int end, const uint8_t* ahead) {
  using Float = typename S::Float;
  Float sums[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const Float keep = S::set1(kFresh ? 0.0f : group.keep[r]);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v)
      sums[r][v] = kFresh ? S::zero() : S::mul(S::load(group.sums[r] + column + v * S::kLanes), keep);
  }
  const float* weights[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) weights[r] = group.weights[r];
  const T* row = rows + int64_t{begin} * step;
  for (int i = begin; i < end; ++i, row += step) {
    if constexpr (kAsksAhead<R, T>) __builtin_prefetch(ahead + (i - begin) * kLineBytes, 0, 2);
    // The shorter side stays in registers, the longer passes through one.
    if constexpr (R < V) {
      Float weight[R];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) weight[r] = S::set1(weights[r][i]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        const Float value = S::load(row + v * S::kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) sums[r][v] = S::fma(weight[r], value, sums[r][v]);
      }
    } else {
      Float value[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) value[v] = S::load(row + v * S::kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Float weight = S::set1(weights[r][i]);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) sums[r][v] = S::fma(weight, value[v], sums[r][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) S::store(group.sums[r] + column + v * S::kLanes, sums[r][v]);
  }
}

// Keys or values of a tile as they lie in the cache: f16 [n_rows][width], width a multiple of kLanes. What is read next
// follows them.
struct CachedTile {
  const uint16_t* rows;
  int width;
  int64_t n_bytes;

  const uint8_t* bytes() const { return reinterpret_cast<const uint8_t*>(rows); }
};

// A tile widened to f32, in blocks of kBlock vectors (then of fewer at the end): [block][n_rows][block width], so
// that a register tile reads one stream. Columns beyond the width are 0.
struct WideTile {
  const float* rows;
  int n_rows;
  int width;
};

template <class S, int R, bool kFresh, int V = S::direct_vectors(R)>
void weigh(const RowGroup<R>& group, const CachedTile& tile, int begin, int end, int column = 0) {
  constexpr int kWidth = V * S::kLanes;
  for (; column + kWidth <= tile.width; column += kWidth) {
    const int64_t asked = int64_t{column / kWidth} * (end - begin) * kLineBytes;
    const uint8_t* ahead = asked < tile.n_bytes ? tile.bytes() + tile.n_bytes + asked : tile.bytes();
    weighted_rows<S, R, V, kFresh>(group, column, tile.rows + column, tile.width, begin, end, ahead);
  }
  if constexpr (V > 1) {
    if (column < tile.width) weigh<S, R, kFresh, V / 2>(group, tile, begin, end, column);
  }
}

template <class S, int R, bool kFresh, int V = S::kBlock>
void weigh(const RowGroup<R>& group, const WideTile& tile, int begin, int end, int column = 0) {
  constexpr int kWidth = V * S::kLanes;
  for (; column + kWidth <= tile.width; column += kWidth)
    weighted_rows<S, R, V, kFresh>(group, column, tile.rows + int64_t{column} * tile.n_rows, kWidth, begin, end, nullptr);
  if constexpr (V > 1) {
    if (column < tile.width) weigh<S, R, kFresh, V / 2>(group, tile, begin, end, column);
  }
}

// Fills a WideTile from f16 [n_rows][width], and asks for as many bytes behind them: they are next, once the rows of the
// block are through (Zen 3, 4096 positions: 4 to 8 % of all).
template <class S, int V = S::kBlock>
void widen(const uint16_t* rows, int n_rows, int width, float* wide, int column = 0) {
  constexpr int kWidth = V * S::kLanes;
  const int padded = (width + S::kLanes - 1) / S::kLanes * S::kLanes;
  for (; column + kWidth <= padded; column += kWidth) {
    float* out = wide + int64_t{column} * n_rows;
    const int tail = width - (column + kWidth - S::kLanes);  // of the block's last vector
    const uint16_t* ahead = rows + int64_t{n_rows} * (width + column);
    for (int row = 0; row < n_rows; ++row, out += kWidth) {
      const uint16_t* in = rows + int64_t{row} * width + column;
      __builtin_prefetch(ahead + row * kWidth, 0, 2);
      for (int v = 0; v < V - 1; ++v) S::store(out + v * S::kLanes, S::load(in + v * S::kLanes));
      const uint16_t* last = in + (V - 1) * S::kLanes;
      S::store(out + (V - 1) * S::kLanes, tail >= S::kLanes ? S::load(last) : S::load_n(last, tail));
    }
  }
  if constexpr (V > 1) {
    if (column < padded) widen<S, V / 2>(rows, n_rows, width, wide, column);
  }
}

// Adds a tile of values to R rows from `first`: the keys that all of them see together, the rest row by row, in
// order. A key that a row does not see is not even multiplied by 0: its value may be infinite.
template <class S, int R, class Tile>
void value_rows(int first, const Tile& values, const Scratch<S>& scratch, const TileRows& rows) {
  RowGroup<R> group;
  int begin = 0;
  int end = kCacheTile;
  for (int r = 0; r < R; ++r) {
    const int row = first + r;
    group.weights[r] = scratch.scores + row * kCacheTile;
    group.sums[r] = scratch.span.sums(row);
    group.keep[r] = rows.keep[row];
    begin = rows.begin[row] > begin ? rows.begin[row] : begin;
    end = rows.end[row] < end ? rows.end[row] : end;
  }
  const auto alone = [&](int r, float keep, int from, int to) {
    weigh<S, 1, false>(RowGroup<1>{{group.weights[r]}, {group.sums[r]}, {keep}}, values, from, to);
  };
  const bool shared = begin < end;
  for (int r = 0; r < R; ++r) {
    const int to = shared ? begin : rows.end[first + r];
    if (rows.begin[first + r] >= to) continue;
    alone(r, group.keep[r], rows.begin[first + r], to);
    group.keep[r] = 1;
  }
  if (!shared) return;
  weigh<S, R, false>(group, values, begin, end);
  for (int r = 0; r < R; ++r)
    if (end < rows.end[first + r]) alone(r, 1, end, rows.end[first + r]);
}

// The tiles of one cache for one block, one after the other.
template <class S>
class TilesF16 {
 public:
  TilesF16(const CacheView& cache, const AttentionBlock& block, const Scratch<S>& scratch)
      : cache_(cache),
        block_(block),
        scratch_(scratch),
        wide_(static_cast<float*>(scratch.tile)),
        direct_(block.n_rows <= S::kDirectRows && cache.head_width % S::kLanes == 0) {
    for (int r = 0; r < block.n_rows; ++r) scratch.scales[r] = block.scale;
  }

  void open_keys(int tile) {
    keys_ = reinterpret_cast<const uint16_t*>(cache_.tiles + tile * 2 * half_bytes());
    if (!direct_) widen<S>(keys_, cache_.head_width, kCacheTile, wide_);
  }

  // Scores of R rows from `first` against all keys of the tile, seen or not.
  template <int R>
  void score(int first) const {
    RowGroup<R> group;
    for (int r = 0; r < R; ++r) {
      group.weights[r] = block_.query + block_.query_offsets[first + r];
      group.sums[r] = scratch_.scores + (first + r) * kCacheTile;
    }
    const int width = cache_.head_width;
    if (direct_) weigh<S, R, true>(group, CachedTile{keys_, kCacheTile, half_bytes()}, 0, width);
    else weigh<S, R, true>(group, WideTile{wide_, width, kCacheTile}, 0, width);
  }

  // n: how many values have been written.
  void open_values(int n) {
    n_values_ = n;
    if (!direct_) widen<S>(values(), n, cache_.head_width, wide_);
  }

  template <int R>
  void add_values(int first, const TileRows& rows) const {
    if (direct_) value_rows<S, R>(first, CachedTile{values(), cache_.head_width, half_bytes()}, scratch_, rows);
    else value_rows<S, R>(first, WideTile{wide_, n_values_, scratch_.padded}, scratch_, rows);
  }

 private:
  int64_t half_bytes() const { return cache_tile_bytes(CacheType::f16, cache_.head_width) / 2; }
  const uint16_t* values() const { return keys_ + kCacheTile * cache_.head_width; }

  const CacheView& cache_;
  const AttentionBlock& block_;
  const Scratch<S>& scratch_;
  float* const wide_;
  const bool direct_;
  const uint16_t* keys_ = nullptr;
  int n_values_ = 0;
};

template <class S>
void cache_write_f16(const CacheView& cache, const float* key, const float* value, int position) {
  const int width = cache.head_width;
  uint16_t* tile = reinterpret_cast<uint16_t*>(cache.tiles + position / kCacheTile * cache_tile_bytes(cache.type, width));
  uint16_t* channels = tile + position % kCacheTile;
  uint16_t* values = tile + (kCacheTile + position % kCacheTile) * width;
  for_vectors<S>(width, [=](int64_t channel, auto memory) {
    memory.store(values + channel, memory.load(value + channel));
    uint16_t halves[S::kLanes];
    S::store(halves, memory.load(key + channel));
    const int left = width - static_cast<int>(channel);
    for (int i = 0; i < (left < S::kLanes ? left : S::kLanes); ++i) channels[(channel + i) * kCacheTile] = halves[i];
  });
}

}  // namespace
}  // namespace elute
