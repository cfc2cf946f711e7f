// quantize in plain C++: int8 activations, their sums and their tables. The arithmetic is kernels/activations.py's.
#pragma once
#include "kernels/matmul.h"

namespace elute {
namespace {

constexpr float kInvMaxCode = 1.0f / 127.0f;
constexpr float kInvMaxSpan = 1.0f / 253.0f;  // |q0|+..+|q3| <= span/scale + 4 * 0.5 must fit a byte
constexpr float kSmallestNormal = 1.17549435e-38f;

inline float magnitude(float x) { return __builtin_fabsf(x); }
inline uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
// Of two magnitudes. Their bits order as integers do, and NaN above all: it must not get lost.
inline float larger(float a, float b) { return bits_of(a) > bits_of(b) ? a : b; }

// Mirror-consolidated: entry i and entry 15-i add up to the span, so eight are summed and eight subtracted.
inline int32_t build_table(const int8_t* q, uint8_t* table) {
  int32_t low = 0, span = 0;
  for (int i = 0; i < kLutWidth; ++i) {
    low += q[i] < 0 ? q[i] : 0;
    span += q[i] < 0 ? -q[i] : q[i];
  }
  for (int i = 0; i < 8; ++i) {
    const int32_t entry = (i & 1 ? q[0] : 0) + (i & 2 ? q[1] : 0) + (i & 4 ? q[2] : 0) - low;
    table[i] = static_cast<uint8_t>(entry);
    table[15 - i] = static_cast<uint8_t>(span - entry);
  }
  return low;
}

inline uint32_t packed(int low, int high) { return (static_cast<uint32_t>(low) & 0xffff) | static_cast<uint32_t>(high) << 16; }

inline void sum_pairs(const int8_t* q, PairSums& sums) {
  int low[4] = {}, high[4] = {};
  for (int i = 0; i < kActBlock; i += kLutWidth) {
    low[i / kSumRun] += q[i] + q[i + 1];
    high[i / kSumRun] += q[i + 2] + q[i + 3];
  }
  for (int i = 0; i < 4; ++i) sums.quarters[i] = packed(low[i], high[i]);
  for (int i = 0; i < 2; ++i) sums.halves[i] = packed(low[2 * i] + low[2 * i + 1], high[2 * i] + high[2 * i + 1]);
  sums.whole = packed(low[0] + low[1] + low[2] + low[3], high[0] + high[1] + high[2] + high[3]);
}

void quantize(const float* x, int k, const ActivationsView& out) {
  for (int block = 0; block < out.n_blocks; ++block) {
    float padded[kActBlock] = {};
    const int count = k - block * kActBlock < kActBlock ? k - block * kActBlock : kActBlock;
    for (int i = 0; i < count; ++i) padded[i] = x[block * kActBlock + i];
    float largest = 0, widest = 0;
    for (int i = 0; i < kActBlock; i += kLutWidth) {
      const float a = magnitude(padded[i]), b = magnitude(padded[i + 1]);
      const float c = magnitude(padded[i + 2]), d = magnitude(padded[i + 3]);
      largest = larger(larger(larger(a, b), larger(c, d)), largest);
      widest = larger((a + b) + (c + d), widest);
    }
    const float scale = larger(largest * kInvMaxCode, widest * kInvMaxSpan);
    const float inverse = scale > kSmallestNormal ? 1.0f / scale : 0.0f;
    out.scales[block] = scale;
    int8_t* q = out.q + block * kActBlock;
    for (int i = 0; i < kActBlock; ++i) {
      // Adding 1.5 * 2^23 rounds |x| < 2^22 to the nearest even integer and leaves that in the low bits.
      q[i] = static_cast<int8_t>(bits_of(padded[i] * inverse + 0x1.8p23f));
    }
    sum_pairs(q, out.pairs[block]);
    for (int run = 0; run < kActBlock / kSumRun; ++run) {
      int32_t sum = 0, lows = 0;
      for (int i = run * kSumRun; i < (run + 1) * kSumRun; ++i) sum += q[i];
      const int64_t at = block * (kActBlock / kSumRun) + run;
      out.sums[at] = sum;
      if (!out.tables) continue;
      for (int i = run * kSumRun; i < (run + 1) * kSumRun; i += kLutWidth)
        lows += build_table(q + i, out.tables + (int64_t{block} * kActBlock + i) / kLutWidth * kTableBytes);
      out.lows[at] = lows;
    }
  }
}

}  // namespace
}  // namespace elute
