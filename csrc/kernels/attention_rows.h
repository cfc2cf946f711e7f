// What attention keeps of each row of a block, and its softmax, over any float vocabulary S. Contracts: attention.h.
#pragma once
#include "kernels/attention.h"
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

// Partial results of rows, `stride` floats apart (attention_partial_floats).
struct Partials {
  float* at;
  int64_t stride;

  float* row(int r) const { return at + r * stride; }
  float& largest(int r) const { return row(r)[0]; }
  float& total(int r) const { return row(r)[1]; }
  float* sums(int r) const { return row(r) + kPartialSums; }
  void reset(int n_rows, int width) const {
    for (int r = 0; r < n_rows; ++r) {
      largest(r) = -__builtin_inff();
      total(r) = 0;
      for (int i = 0; i < width; ++i) sums(r)[i] = 0;
    }
  }
};

// Where in the scratch (attention_scratch_bytes) everything lies.
template <class S>
struct Scratch {
  void* tile;     // attention_tile_floats
  float* scales;  // [rows] of the products q.k
  float* scores;  // [rows][kCacheTile], then the probabilities
  Partials span;  // of the keys of one span so far
  Partials all;   // of the spans done
  int padded;     // head width up to whole vectors

  Scratch(void* memory, int head_width) : tile(memory), padded((head_width + S::kLanes - 1) / S::kLanes * S::kLanes) {
    const int64_t stride = attention_partial_floats(head_width);
    scales = static_cast<float*>(memory) + attention_tile_floats(head_width);
    scores = scales + kAttentionRows;
    span = {scores + kAttentionRows * kCacheTile, stride};
    all = {span.at + kAttentionRows * stride, stride};
  }
};

constexpr int kLineBytes = 64;

// The keys of one tile that each row of the block sees, [begin, end); both 0 where it sees none. `keep` scales what
// the row had before this tile.
struct TileRows {
  int begin[kAttentionRows];
  int end[kAttentionRows];
  float keep[kAttentionRows];

  TileRows(const AttentionBlock& block, int tile) {
    for (int r = 0; r < block.n_rows; ++r) {
      const int from = block.first_key(r) - tile * kCacheTile;
      const int to = block.positions[r] + 1 - tile * kCacheTile;
      begin[r] = from > 0 ? from : 0;
      end[r] = to < kCacheTile ? to : kCacheTile;
      if (begin[r] >= end[r]) begin[r] = end[r] = 0;
    }
  }
};

// e^x of n <= 16 numbers, x <= 0.
template <class S>
void exp_each(float* x, int n) {
  for (int i = 0; i < n; i += S::kLanes) S::store(x + i, exp_nonpositive<S>(S::load(x + i)));
}

// Turns the products q.k of R rows from `first` into probabilities relative to the largest score so far, updates that
// and the total, and sets `keep` to the factor that brings earlier sums to the new largest score. The rows go through
// each step side by side, so that one hides the latency of another.
template <class S, int R>
void soften(int first, const AttentionBlock& block, const Scratch<S>& scratch, TileRows& rows) {
  using Float = typename S::Float;
  float* scores = scratch.scores + first * kCacheTile;
  float scales[R];
  for (int r = 0; r < R; ++r) {
    scales[r] = scratch.scales[first + r];
    if (block.softcap > 0) {
      float* row = scores + r * kCacheTile;
      for (int i = 0; i < kCacheTile; i += S::kLanes)
        S::store(row + i, soft_cap<S>(S::mul(S::load(row + i), S::set1(scales[r])), block.softcap));
      scales[r] = 1;
    }
    for (int i = 0; i < rows.begin[first + r]; ++i) scores[r * kCacheTile + i] = -__builtin_inff();
    for (int i = rows.end[first + r]; i < kCacheTile; ++i) scores[r * kCacheTile + i] = -__builtin_inff();
  }
  Float most[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    most[r] = S::load(scores + r * kCacheTile);
#pragma GCC unroll 16
    for (int i = S::kLanes; i < kCacheTile; i += S::kLanes) most[r] = S::max(most[r], S::load(scores + r * kCacheTile + i));
  }
  float now[R];
  float gaps[16] = {};
  for (int r = 0; r < R; ++r) {
    const float before = scratch.span.largest(first + r);
    const float tile_largest = S::largest(most[r]) * scales[r];
    now[r] = tile_largest > before ? tile_largest : before;
    gaps[r] = before - now[r];
  }
  exp_each<S>(gaps, R);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    if (rows.end[first + r] == 0) continue;
    const Float factor = S::set1(scales[r]), shift = S::set1(-now[r]);
    Float sum = S::zero();
    for (int i = 0; i < kCacheTile; i += S::kLanes) {
      float* at = scores + r * kCacheTile + i;
      // A product rounded up into `now` leaves at most one rounding of it above 0.
      const Float probability = exp_nonpositive<S>(S::fma(S::load(at), factor, shift));
      S::store(at, probability);
      sum = S::add(sum, probability);
    }
    scratch.span.largest(first + r) = now[r];
    scratch.span.total(first + r) = scratch.span.total(first + r) * gaps[r] + S::sum(sum);
    rows.keep[first + r] = gaps[r];
  }
}

}  // namespace
}  // namespace elute
