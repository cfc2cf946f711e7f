// Attention over tiles of kCacheTile keys, over any float vocabulary S. Contract: float_kernels.h.
//
// Scores and values are the same operation, sums of rows under weights: scores of a tile are its key channels
// weighted by the query, the output is the value rows weighted by the probabilities. So one register tile,
// `weighted_rows`, does both, for R queries that share each loaded row. Every sum takes its terms one by one in
// ascending order, whatever R is, so a query's result does not depend on which queries share its block.
#pragma once
#include "kernels/float_kernels.h"
#include "kernels/transcendental.h"

namespace elute {
namespace {

template <int N>
struct Count {
  static constexpr int value = N;
};

// body(Count<n>) for n in 1..kMost, so that n is a constant inside.
template <int kMost, class Body>
void with_count(int n, Body body) {
  if constexpr (kMost > 1) {
    if (n < kMost) return with_count<kMost - 1>(n, body);
  }
  body(Count<kMost>{});
}

// R queries that go through a tile together. `keep` scales what is in `sums` first; 0 before the first tile.
template <int R>
struct RowGroup {
  const float* weights[R];
  float* sums[R];
  float keep[R];
};

// sums[r][0, V * kLanes) = sums * keep + the rows [begin, end) weighted by weights[r][row]; rows lie `step` apart.
template <class S, int R, int V, class T>
[[gnu::noinline]] void weighted_rows(const RowGroup<R>& group, int column, const T* rows, int step, int begin,
                                     int end) {
  using Float = typename S::Float;
  Float sums[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const Float keep = S::set1(group.keep[r]);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sums[r][v] = S::mul(S::load(group.sums[r] + column + v * S::kLanes), keep);
  }
  const float* weights[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) weights[r] = group.weights[r];
  const T* row = rows + int64_t{begin} * step;
  for (int i = begin; i < end; ++i, row += step) {
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

// A tile as it lies in the cache: f16 [n_rows][width], width a multiple of kLanes.
struct CachedTile {
  const uint16_t* rows;
  int width;
};

// A tile widened to f32, in blocks of kBlock vectors (then of fewer at the end): [block][n_rows][block width], so
// that a register tile reads one stream. Columns beyond the width are 0.
struct WideTile {
  const float* rows;
  int n_rows;
  int width;
};

template <class S, int R, int V = S::direct_vectors(R)>
void weigh(const RowGroup<R>& group, const CachedTile& tile, int begin, int end, int column = 0) {
  constexpr int kWidth = V * S::kLanes;
  for (; column + kWidth <= tile.width; column += kWidth)
    weighted_rows<S, R, V>(group, column, tile.rows + column, tile.width, begin, end);
  if constexpr (V > 1) {
    if (column < tile.width) weigh<S, R, V / 2>(group, tile, begin, end, column);
  }
}

template <class S, int R, int V = S::kBlock>
void weigh(const RowGroup<R>& group, const WideTile& tile, int begin, int end, int column = 0) {
  constexpr int kWidth = V * S::kLanes;
  for (; column + kWidth <= tile.width; column += kWidth)
    weighted_rows<S, R, V>(group, column, tile.rows + int64_t{column} * tile.n_rows, kWidth, begin, end);
  if constexpr (V > 1) {
    if (column < tile.width) weigh<S, R, V / 2>(group, tile, begin, end, column);
  }
}

// Fills a WideTile from f16 [n_rows][width].
template <class S, int V = S::kBlock>
void widen(const uint16_t* rows, int n_rows, int width, float* wide, int column = 0) {
  constexpr int kWidth = V * S::kLanes;
  const int padded = (width + S::kLanes - 1) / S::kLanes * S::kLanes;
  for (; column + kWidth <= padded; column += kWidth) {
    float* out = wide + int64_t{column} * n_rows;
    const int tail = width - (column + kWidth - S::kLanes);  // of the block's last vector
    for (int row = 0; row < n_rows; ++row, out += kWidth) {
      const uint16_t* in = rows + int64_t{row} * width + column;
      for (int v = 0; v < V - 1; ++v) S::store(out + v * S::kLanes, S::load(in + v * S::kLanes));
      const uint16_t* last = in + (V - 1) * S::kLanes;
      S::store(out + (V - 1) * S::kLanes, tail >= S::kLanes ? S::load(last) : S::load_n(last, tail));
    }
  }
  if constexpr (V > 1) {
    if (column < padded) widen<S, V / 2>(rows, n_rows, width, wide, column);
  }
}

// What is kept of each row between tiles, and where in `memory` (attention_scratch_bytes) it lies.
template <class S>
struct AttentionState {
  float* largest;  // [rows] score so far
  float* totals;   // [rows] of the probabilities, relative to `largest`
  float* scores;   // [rows][kCacheTile], then the probabilities
  float* sums;     // [rows][padded head width]
  float* wide;     // a WideTile of keys, then of values
  int padded;      // head width up to whole vectors

  AttentionState(void* memory, int head_width)
      : largest(static_cast<float*>(memory)),
        totals(largest + kAttentionRows),
        scores(totals + kAttentionRows),
        sums(scores + kAttentionRows * kCacheTile),
        padded((head_width + S::kLanes - 1) / S::kLanes * S::kLanes) {
    wide = sums + kAttentionRows * padded;
  }
};

// The keys of one tile that each row of the block sees, [begin, end); both 0 where it sees none. `keep` as in RowGroup.
struct TileRows {
  int begin[kAttentionRows];
  int end[kAttentionRows];
  float keep[kAttentionRows];

  TileRows(const AttentionBlock& block, int tile) {
    for (int r = 0; r < block.n_rows; ++r) {
      const int position = block.positions[r];
      const int first = block.window > 0 && position >= block.window ? position - block.window + 1 : 0;
      const int from = first - tile * kCacheTile;
      const int to = position + 1 - tile * kCacheTile;
      begin[r] = from > 0 ? from : 0;
      end[r] = to < kCacheTile ? to : kCacheTile;
      if (begin[r] >= end[r]) begin[r] = end[r] = 0;
    }
  }
};

// Turns one row's products q.k of a tile into probabilities relative to the largest score so far, updates that and
// the total, and returns the factor that brings earlier sums to the new largest score.
template <class S>
float soften(float* scores, int begin, int end, const AttentionBlock& block, float* largest, float* total) {
  using Float = typename S::Float;
  const Float factor = S::set1(block.scale);
  for (int i = 0; i < kCacheTile; i += S::kLanes) {
    Float score = S::mul(S::load(scores + i), factor);
    if (block.softcap > 0) score = soft_cap<S>(score, block.softcap);
    S::store(scores + i, score);
  }
  for (int i = 0; i < begin; ++i) scores[i] = -__builtin_inff();
  for (int i = end; i < kCacheTile; ++i) scores[i] = -__builtin_inff();
  Float most = S::load(scores);
  for (int i = S::kLanes; i < kCacheTile; i += S::kLanes) most = S::max(most, S::load(scores + i));
  const float tile_largest = S::largest(most);
  const float now = tile_largest > *largest ? tile_largest : *largest;
  const float keep = S::first(exp_nonpositive<S>(S::set1(*largest - now)));
  const Float shift = S::set1(now);
  Float sum = S::zero();
  for (int i = 0; i < kCacheTile; i += S::kLanes) {
    const Float probability = exp_nonpositive<S>(S::sub(S::load(scores + i), shift));
    S::store(scores + i, probability);
    sum = S::add(sum, probability);
  }
  *largest = now;
  *total = *total * keep + S::sum(sum);
  return keep;
}

// scores of R rows from `first` against a tile of keys, then softened.
template <class S, int R, class Tile>
void score_rows(const AttentionBlock& block, int first, const Tile& keys, int head_width, AttentionState<S>& state,
                TileRows& rows) {
  bool any = false;
  for (int r = 0; r < R; ++r) any |= rows.end[first + r] > 0;
  if (!any) return;
  RowGroup<R> group;
  for (int r = 0; r < R; ++r) {
    group.weights[r] = block.query + block.query_offsets[first + r];
    group.sums[r] = state.scores + (first + r) * kCacheTile;
    group.keep[r] = 0;
    for (int i = 0; i < kCacheTile; ++i) group.sums[r][i] = 0;  // 0 * what was there could be NaN
  }
  weigh<S, R>(group, keys, 0, head_width);
  for (int r = first; r < first + R; ++r) {
    if (rows.end[r] == 0) continue;
    rows.keep[r] = soften<S>(state.scores + r * kCacheTile, rows.begin[r], rows.end[r], block, state.largest + r,
                             state.totals + r);
  }
}

// Adds a tile of values to R rows from `first`: the keys that all of them see together, the rest row by row, in
// order. A key that a row does not see is not even multiplied by 0: its value may be infinite.
template <class S, int R, class Tile>
void value_rows(int first, const Tile& values, AttentionState<S>& state, const TileRows& rows) {
  RowGroup<R> group;
  int begin = 0;
  int end = kCacheTile;
  for (int r = 0; r < R; ++r) {
    const int row = first + r;
    group.weights[r] = state.scores + row * kCacheTile;
    group.sums[r] = state.sums + row * state.padded;
    group.keep[r] = rows.keep[row];
    begin = rows.begin[row] > begin ? rows.begin[row] : begin;
    end = rows.end[row] < end ? rows.end[row] : end;
  }
  const bool shared = begin < end;
  for (int r = 0; r < R; ++r) {
    const int to = shared ? begin : rows.end[first + r];
    if (rows.begin[first + r] >= to) continue;
    weigh<S, 1>(RowGroup<1>{{group.weights[r]}, {group.sums[r]}, {group.keep[r]}}, values, rows.begin[first + r], to);
    group.keep[r] = 1;
  }
  if (!shared) return;
  weigh<S, R>(group, values, begin, end);
  for (int r = 0; r < R; ++r) {
    if (end >= rows.end[first + r]) continue;
    weigh<S, 1>(RowGroup<1>{{group.weights[r]}, {group.sums[r]}, {1.0f}}, values, end, rows.end[first + r]);
  }
}

// body(first row, Count<R>) for the block's rows in groups of at most kRows, as even as they come: a last group of
// one or two rows would leave most of the register tile idle.
template <class S, class Body>
void for_row_groups(int n_rows, Body body) {
  const int n_groups = (n_rows + S::kRows - 1) / S::kRows;
  for (int group = 0; group < n_groups; ++group) {
    const int first = n_rows * group / n_groups;
    const int n = n_rows * (group + 1) / n_groups - first;
    with_count<S::kRows>(n, [&](auto count) { body(first, count); });
  }
}

template <class S>
void attention(const CacheView& cache, const AttentionBlock& block, void* scratch) {
  const int width = cache.head_width;
  AttentionState<S> state(scratch, width);
  int first_key = block.positions[0];
  int last_key = 0;
  for (int r = 0; r < block.n_rows; ++r) {
    state.largest[r] = -__builtin_inff();
    state.totals[r] = 0;
    for (int i = 0; i < state.padded; ++i) state.sums[r * state.padded + i] = 0;
    const int position = block.positions[r];
    const int first = block.window > 0 && position >= block.window ? position - block.window + 1 : 0;
    first_key = first < first_key ? first : first_key;
    last_key = position > last_key ? position : last_key;
  }

  const bool direct = block.n_rows <= S::kDirectRows && width % S::kLanes == 0;
  for (int tile = first_key / kCacheTile; tile <= last_key / kCacheTile; ++tile) {
    const uint16_t* keys = cache.keys + int64_t{tile} * width * kCacheTile;
    const uint16_t* values = cache.values + int64_t{tile} * kCacheTile * width;
    TileRows rows(block, tile);
    if (direct) {
      for_row_groups<S>(block.n_rows, [&](int first, auto count) {
        constexpr int R = decltype(count)::value;
        score_rows<S, R>(block, first, CachedTile{keys, kCacheTile}, width, state, rows);
        value_rows<S, R>(first, CachedTile{values, width}, state, rows);
      });
      continue;
    }
    widen<S>(keys, width, kCacheTile, state.wide);
    for_row_groups<S>(block.n_rows, [&](int first, auto count) {
      score_rows<S, decltype(count)::value>(block, first, WideTile{state.wide, width, kCacheTile}, width, state, rows);
    });
    // Values behind the last visible key may never have been written.
    const int left = last_key + 1 - tile * kCacheTile;
    const int n_values = left < kCacheTile ? left : kCacheTile;
    widen<S>(values, n_values, width, state.wide);
    for_row_groups<S>(block.n_rows, [&](int first, auto count) {
      value_rows<S, decltype(count)::value>(first, WideTile{state.wide, n_values, state.padded}, state, rows);
    });
  }

  for (int r = 0; r < block.n_rows; ++r) {
    const auto factor = S::set1(1.0f / state.totals[r]);
    const float* sums = state.sums + r * state.padded;
    float* out = block.output + block.output_offsets[r];
    int i = 0;
    for (; i + S::kLanes <= width; i += S::kLanes) S::store(out + i, S::mul(S::load(sums + i), factor));
    if (i < width) S::store_n(out + i, S::mul(S::load(sums + i), factor), width - i);
  }
}

}  // namespace
}  // namespace elute
