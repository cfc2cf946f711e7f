// Attention over any float vocabulary S: tiles of a span, then spans. Contracts: float_kernels.h and attention.h.
// A query's result does not depend on which queries share its block: rows meet only in loads.
#pragma once
#include "kernels/attention_f16.h"
#include "kernels/attention_q8.h"
#include "kernels/attention_rows.h"

namespace elute {
namespace {

constexpr int kSpanTiles = kAttentionSpan / kCacheTile;

// What each row sees of a span, into scratch.span. Rows that see none of it keep a total of 0.
template <class S, class Tiles>
void attend_span(Tiles& tiles, const AttentionBlock& block, int span, const Scratch<S>& scratch) {
  scratch.span.reset(block.n_rows, scratch.padded);
  int first_key = block.first_key(0), last_key = 0;
  for (int r = 0; r < block.n_rows; ++r) {
    first_key = block.first_key(r) < first_key ? block.first_key(r) : first_key;
    last_key = block.positions[r] > last_key ? block.positions[r] : last_key;
  }
  for (int tile = span * kSpanTiles; tile < (span + 1) * kSpanTiles; ++tile) {
    const int n_written = last_key + 1 - tile * kCacheTile;
    if (n_written <= 0) break;
    if ((tile + 1) * kCacheTile <= first_key) continue;
    TileRows rows(block, tile);
    tiles.open_keys(tile);
    for_row_groups<S>(block.n_rows, [&](int first, auto count) {
      constexpr int R = decltype(count)::value;
      tiles.template score<R>(first);
      soften<S, R>(first, block, scratch, rows);
    });
    tiles.open_values(n_written < kCacheTile ? n_written : kCacheTile);
    for_row_groups<S>(block.n_rows, [&](int first, auto count) {
      tiles.template add_values<decltype(count)::value>(first, rows);
    });
  }
}

inline void copy_partial(const float* from, float* to, int width) {
  to[0] = from[0];
  to[1] = from[1];
  for (int i = kPartialSums; i < kPartialSums + width; ++i) to[i] = from[i];
}

// Adds the partial result `from` of a row to its `into`; width is a multiple of kLanes.
template <class S>
void merge(const float* from, float* into, int width) {
  const float now = from[0] > into[0] ? from[0] : into[0];
  float gaps[16] = {into[0] - now, from[0] - now};
  exp_each<S>(gaps, 2);
  into[0] = now;
  into[1] = into[1] * gaps[0] + from[1] * gaps[1];
  const auto old_keep = S::set1(gaps[0]), new_keep = S::set1(gaps[1]);
  for (int i = kPartialSums; i < kPartialSums + width; i += S::kLanes)
    S::store(into + i, S::fma(S::load(from + i), new_keep, S::mul(S::load(into + i), old_keep)));
}

template <class S>
void divide(const float* partial, int head_width, float* output) {
  const auto factor = S::set1(1.0f / partial[1]);
  for_vectors<S>(head_width, [=](int64_t i, auto memory) {
    memory.store(output + i, S::mul(S::load(partial + kPartialSums + i), factor));
  });
}

// body(the tiles of the cache, as its type has them)
template <class S, class Body>
void with_tiles(const CacheView& cache, const AttentionBlock& block, const Scratch<S>& scratch, Body body) {
  switch (cache.type) {
    case CacheType::f16: return body(TilesF16<S>(cache, block, scratch));
    case CacheType::q8: return body(TilesQ8<S>(cache, block, scratch));
  }
}

template <class S, class Tiles>
void attend(Tiles& tiles, const AttentionBlock& block, const Scratch<S>& scratch) {
  int first_span = block.first_key(0) / kAttentionSpan, last_span = 0;
  for (int r = 0; r < block.n_rows; ++r) {
    const int first = block.first_key(r) / kAttentionSpan, last = block.positions[r] / kAttentionSpan;
    first_span = first < first_span ? first : first_span;
    last_span = last > last_span ? last : last_span;
  }
  for (int span = first_span; span <= last_span; ++span) {
    attend_span<S>(tiles, block, span, scratch);
    for (int r = 0; r < block.n_rows; ++r) {
      const int first = block.first_key(r) / kAttentionSpan;
      if (span < first || span > block.positions[r] / kAttentionSpan) continue;
      if (span == first) copy_partial(scratch.span.row(r), scratch.all.row(r), scratch.padded);
      else merge<S>(scratch.span.row(r), scratch.all.row(r), scratch.padded);
    }
  }
}

template <class S>
void attention(const CacheView& cache, const AttentionBlock& block, float* output, const int64_t* output_offsets,
               void* memory) {
  const Scratch<S> scratch(memory, cache.head_width);
  with_tiles<S>(cache, block, scratch, [&](auto tiles) { attend<S>(tiles, block, scratch); });
  for (int r = 0; r < block.n_rows; ++r)
    divide<S>(scratch.all.row(r), cache.head_width, output + output_offsets[r]);
}

template <class S>
void attention_span(const CacheView& cache, const AttentionBlock& block, int span, float* partials, int64_t stride,
                    void* memory) {
  const Scratch<S> scratch(memory, cache.head_width);
  with_tiles<S>(cache, block, scratch, [&](auto tiles) { attend_span<S>(tiles, block, span, scratch); });
  for (int r = 0; r < block.n_rows; ++r) copy_partial(scratch.span.row(r), partials + r * stride, scratch.padded);
}

template <class S>
void attention_merge(float* partials, int64_t stride, int n_spans, int head_width, float* output) {
  const int padded = (head_width + S::kLanes - 1) / S::kLanes * S::kLanes;
  for (int span = 1; span < n_spans; ++span) merge<S>(partials + span * stride, partials, padded);
  divide<S>(partials, head_width, output);
}

template <class S>
void cache_write(const CacheView& cache, const float* key, const float* value, int position) {
  switch (cache.type) {
    case CacheType::f16: return cache_write_f16<S>(cache, key, value, position);
    case CacheType::q8: return cache_write_q8<S>(cache, key, value, position);
  }
}

}  // namespace
}  // namespace elute
