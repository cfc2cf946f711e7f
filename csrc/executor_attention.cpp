// How the executor splits attention into chunks. Every split gives the same bits (kernels/attention.h).
#include <algorithm>
#include <cstring>

#include "executor.h"

namespace elute {
namespace {

int64_t n_spans(int positions) { return (positions + kAttentionSpan - 1) / kAttentionSpan; }

// Most spans of one kv head that a chunk has.
int64_t most_spans(int64_t n_items, int n_threads) {
  const int n_chunks = chunks(static_cast<int>(n_items), n_threads);
  return (n_items + n_chunks - 1) / n_chunks;
}

}  // namespace

// The rows of a block: some query heads of some tokens, all of one kv head.
struct Executor::QueryRows {
  int64_t query_offsets[kAttentionRows], output_offsets[kAttentionRows];
  int32_t positions[kAttentionRows];
  int n = 0;

  void add(int64_t query_offset, int64_t output_offset, int position) {
    query_offsets[n] = query_offset;
    output_offsets[n] = output_offset;
    positions[n++] = position;
  }
  AttentionBlock block(const AttentionOp& op, const float* query) const {
    return {query, query_offsets, positions, n, op.scale, op.window, op.softcap};
  }
};

void Executor::allocate_cache() {
  cache_ = Pages(int64_t{n_layers_} * n_kv_heads_ * (context_ / kCacheTile) * cache_tile_bytes(cache_type_, head_width_));
  partials_ = Pages(4 * n_heads() * n_spans(context_) * attention_partial_floats(head_width_));
}

int Executor::n_heads() const {
  int most = 0;
  for (const Op& op : ops_)
    if (const auto* attention = std::get_if<AttentionOp>(&op)) most = std::max(most, attention->n_heads);
  return most;
}

int64_t Executor::attention_result_floats() const {
  const int64_t spans = most_spans(n_kv_heads_ * n_spans(context_), n_threads());
  return std::max(int64_t{kAttentionRows} * head_width_,
                  spans * (n_heads() / n_kv_heads_) * attention_partial_floats(head_width_));
}

CacheView Executor::cache(int layer, int kv_head) const {
  const int64_t n_bytes = context_ / kCacheTile * cache_tile_bytes(cache_type_, head_width_);
  return {cache_.as<uint8_t>() + (int64_t{layer} * n_kv_heads_ + kv_head) * n_bytes, head_width_, cache_type_};
}

void Executor::run_rows(const AttentionOp& op, const Call& call, const Slice& slice, int) {
  const Range heads = slice.of(op.n_kv_heads);
  for (int r = slice.rows.begin; r < slice.rows.end; ++r)
    for (int h = heads.begin; h < heads.end; ++h)
      kernels_.floats->cache_write(cache(op.layer, h), row(op.key, r) + h * op.width, row(op.value, r) + h * op.width,
                                   call.position + r);
}

// Queries that share a kv head read and widen its keys and values once. Threads share a lone token's keys too, span by
// span; while there is but one span, they take a query head each.
void Executor::run_all(const AttentionOp& op, const Call& call, Walk& walk) {
  const int per_kv = op.n_heads / op.n_kv_heads;
  const bool lone = call.n == 1 && !walk.alone();
  if (lone && call.position >= kAttentionSpan && per_kv <= kAttentionRows) attend_spans(op, call, walk);
  else attend_blocks(op, call, lone ? 1 : std::min(per_kv, kAttentionRows), walk);
}

// Blocks of `heads` query heads of a kv head, for as many tokens as fit, but at least 4 blocks a thread.
void Executor::attend_blocks(const AttentionOp& op, const Call& call, int heads, Walk& walk) {
  const int per_kv = op.n_heads / op.n_kv_heads;
  const int head_blocks = (per_kv + heads - 1) / heads;
  int tokens = std::max(1, kAttentionRows / heads);
  if (!walk.alone()) {
    const int least_blocks = 4 * n_threads();
    tokens = std::min(tokens, (call.n * op.n_kv_heads * head_blocks + least_blocks - 1) / least_blocks);
  }
  const int token_blocks = (call.n + tokens - 1) / tokens;
  float* const results = results_[walk.thread()].as<float>();
  // The output may be the query: a block publishes over its own rows alone, and whoever still reads them comes too late.
  // body(token, offset of the head in a register) for the rows of the block -> kv head
  const auto for_each = [&](int item, const auto& body) {
    const int kv_head = item % op.n_kv_heads;
    const int head_block = item / op.n_kv_heads % head_blocks;
    const int token_block = item / op.n_kv_heads / head_blocks;
    for (int t = token_block * tokens; t < std::min(call.n, (token_block + 1) * tokens); ++t)
      for (int h = head_block * heads; h < std::min(per_kv, (head_block + 1) * heads); ++h)
        body(t, (int64_t{kv_head} * per_kv + h) * op.width);
    return kv_head;
  };
  const auto compute = [&](int item) {
    QueryRows rows;
    const int kv_head = for_each(item, [&](int t, int64_t head) {
      rows.add(int64_t{t} * widths_[op.query] + head, int64_t{rows.n} * op.width, call.position + t);
    });
    kernels_.floats->attention(cache(op.layer, kv_head), rows.block(op, row(op.query, 0)), results,
                               rows.output_offsets, attention_scratch_[walk.thread()].as<void>());
  };
  walk.share(op.n_kv_heads * head_blocks * token_blocks, compute, [&](int item) {
    const float* result = results;
    for_each(item, [&](int t, int64_t head) {
      std::memcpy(row(op.output, t) + head, result, op.width * sizeof(float));
      result += op.width;
    });
  });
}

// All query heads of one token: what each has of each span, then the sum over its spans. A chunk is a run of spans,
// through the kv heads in order, so that it reads the cache in order.
void Executor::attend_spans(const AttentionOp& op, const Call& call, Walk& walk) {
  const int per_kv = op.n_heads / op.n_kv_heads;
  const int first_key = op.window > 0 ? std::max(0, call.position - op.window + 1) : 0;
  const int first_span = first_key / kAttentionSpan;
  const int spans = call.position / kAttentionSpan - first_span + 1;
  const int64_t stride = attention_partial_floats(op.width);
  const int items = op.n_kv_heads * spans, n_chunks = chunks(items, n_threads());
  float* const results = results_[walk.thread()].as<float>();  // [item of the chunk][query head of the kv head]
  float* const partials = partials_.as<float>();               // [query head][span]
  const auto compute = [&](int chunk) {
    const Range mine = share(items, chunk, n_chunks);
    for (int item = mine.begin; item < mine.end; ++item) {
      const int kv_head = item / spans;
      QueryRows rows;
      for (int h = 0; h < per_kv; ++h) rows.add((int64_t{kv_head} * per_kv + h) * op.width, 0, call.position);
      kernels_.floats->attention_span(cache(op.layer, kv_head), rows.block(op, row(op.query, 0)),
                                      first_span + item % spans, results + (item - mine.begin) * per_kv * stride,
                                      stride, attention_scratch_[walk.thread()].as<void>());
    }
  };
  walk.share(n_chunks, compute, [&](int chunk) {
    const Range mine = share(items, chunk, n_chunks);
    const float* result = results;
    for (int item = mine.begin; item < mine.end; ++item)
      for (int h = 0; h < per_kv; ++h, result += stride)
        std::memcpy(partials + ((int64_t{item / spans} * per_kv + h) * spans + item % spans) * stride, result,
                    stride * sizeof(float));
  });
  const int merge_chunks = std::min(op.n_heads, n_threads());
  walk.share(merge_chunks, [&](int chunk) {
    const Range heads = share(op.n_heads, chunk, merge_chunks);
    for (int h = heads.begin; h < heads.end; ++h)
      kernels_.floats->attention_merge(partials + int64_t{h} * spans * stride, stride, spans, op.width,
                                       row(op.output, 0) + int64_t{h} * op.width);
  });
}

}  // namespace elute
