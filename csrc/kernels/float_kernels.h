// Float kernels round the matmuls: norms, rotary embedding, gated activations, attention over the cache.
// All pointers may be unaligned unless said. No kernel allocates, throws or knows of threads; callers split rows.
// Per row the order of float operations depends on nothing but that row: not on the chunk, the split or its neighbours,
// so a token's result is the same alone and in a prompt.
#pragma once
#include <cstdint>

#include "kernels/attention.h"

namespace elute {

enum class Activation : int { silu = 0, gelu_tanh = 1, relu2 = 2 };

constexpr int kPeakBlock = 128;  // logits that share a peak and a sum: 150k of them have 1.2k, which are quick to select from

struct FloatKernels {
  // A norm in two parts, so that threads can share a row: 1 / sqrt(mean(x^2) + eps) over all of x, then y = x * factor *
  // w for n values of it. y may equal x.
  float (*rms_factor)(const float* x, int width, float eps);
  void (*rms_scale)(const float* x, const float* w, float factor, float* y, int64_t n);
  // The sum of x * w over n values.
  float (*dot)(const float* x, const float* w, int64_t n);
  // In place on n_heads heads of `width`: channel i turns with i + width/2. cos, sin: [width/2].
  void (*rope)(float* x, const float* cos, const float* sin, int width, int n_heads);
  // y = activation(gate) * up, n values. y may equal gate or up.
  void (*gate)(const float* gate, const float* up, float* y, int64_t n, Activation activation);
  // y += x
  void (*add)(const float* x, float* y, int64_t n);
  // x *= s ; and logits: x = cap * tanh(x / cap)
  void (*scale)(float* x, float s, int64_t n);
  void (*softcap)(float* x, float cap, int64_t n);
  // f32 <-> f16, round to nearest even.
  void (*to_f16)(const float* x, uint16_t* y, int64_t n);
  void (*from_f16)(const uint16_t* x, float* y, int64_t n);
  // Writes one position's key [D] and value [D] into the cache.
  void (*cache_write)(const CacheView& cache, const float* key, const float* value, int position);
  // Sampling. Blocks are kPeakBlock logits, the last one what is left.
  // peaks: the largest of each block. -> whether all of x is finite; if not, peaks mean nothing.
  bool (*block_peaks)(const float* x, int64_t n, float* peaks);
  // Unnormalized probabilities exp((x - peak) * inverse_temperature) of finite x <= peak, rounded to whole multiples of
  // 2^-34: the same bits on every instruction set, and sums of them in f64 are exact in any order
  // (sampling_body.h). inverse_temperature is positive.
  void (*masses)(const float* x, int64_t n, float peak, float inverse_temperature, float* y);
  // The sum of the masses of each block.
  void (*block_masses)(const float* x, int64_t n, float peak, float inverse_temperature, double* sums);
  // output + output_offsets[r] (in floats) gets row r's softmax(scale * q.k) v [D]: online over the tiles of each span
  // of kAttentionSpan keys, then over the spans, both in ascending order and aligned to multiples of their length.
  void (*attention)(const CacheView& cache, const AttentionBlock& block, float* output, const int64_t* output_offsets,
                    void* scratch);
  // The same in two steps, for threads that share a long cache: each span that a row sees, row r's result at
  // partials + r * stride (in floats); then one row's spans, ascending, `stride` apart, which are used up. The same bits
  // as `attention`.
  void (*attention_span)(const CacheView& cache, const AttentionBlock& block, int span, float* partials, int64_t stride,
                         void* scratch);
  void (*attention_merge)(float* partials, int64_t stride, int n_spans, int head_width, float* output);
};

extern const FloatKernels float_kernels_scalar;
#if defined(__x86_64__)
extern const FloatKernels float_kernels_avx2;
extern const FloatKernels float_kernels_avx512;
#elif defined(__aarch64__)
extern const FloatKernels float_kernels_neon;
#endif

}  // namespace elute
