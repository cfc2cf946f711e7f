// One call of attention with memory of its own, for callers outside the executor, which keeps its own and splits work.
#pragma once
#include <cstdint>
#include <cstring>

#include "activations.h"
#include "dispatch.h"

namespace elute {

// NaNs: a kernel that reads what it did not write is seen. Throws std::bad_alloc.
inline AlignedArray<float> poisoned(int64_t n_floats) {
  auto memory = aligned<float>(n_floats);
  std::memset(memory.get(), 0xff, n_floats * sizeof(float));
  return memory;
}

// output f32 [n_rows, D]. by_spans: in two steps, which wants all rows at one position.
inline void attend(const FloatKernels& kernels, const CacheView& cache, const AttentionBlock& block, bool by_spans,
                   float* output) {
  const int width = cache.head_width;
  const auto scratch = poisoned(attention_scratch_bytes(width) / 4);
  if (!by_spans) {
    int64_t offsets[kAttentionRows];
    for (int r = 0; r < block.n_rows; ++r) offsets[r] = int64_t{r} * width;
    return kernels.attention(cache, block, output, offsets, scratch.get());
  }
  const int first_span = block.first_key(0) / kAttentionSpan;
  const int n_spans = block.positions[0] / kAttentionSpan - first_span + 1;
  const int64_t stride = attention_partial_floats(width);
  const auto partials = poisoned(block.n_rows * n_spans * stride);  // [n_rows][n_spans]
  for (int span = 0; span < n_spans; ++span)
    kernels.attention_span(cache, block, first_span + span, partials.get() + span * stride, n_spans * stride,
                           scratch.get());
  for (int r = 0; r < block.n_rows; ++r)
    kernels.attention_merge(partials.get() + r * n_spans * stride, stride, n_spans, width, output + int64_t{r} * width);
}

}  // namespace elute
