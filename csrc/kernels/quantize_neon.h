// quantize in NEON, for both ARM levels. Bit for bit quantize_scalar.h.
#pragma once
#include <arm_neon.h>

#include "kernels/matmul.h"

namespace elute {
namespace {

// Of the bits of floats without sign, which order as integers do, and NaN above all: it must not get lost.
inline float largest_of(uint32x4_t magnitudes) {
  const uint32_t bits = vmaxvq_u32(magnitudes);
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
inline uint32x4_t larger(uint32x4_t bits, float32x4_t magnitudes) {
  return vmaxq_u32(bits, vreinterpretq_u32_f32(magnitudes));
}

// The tables of 4 quads. A table of 16 sums is made of two of 4, over channels 0-1 and 2-3:
//   entry i = pairs[i % 4] + pairs[i / 4],  pairs = 0, q0, q1, q0 + q1  and  0, q2, q3, q2 + q3
// Bytes wrap, which is right: a whole entry less the smallest lies in 0..255.
//   minus_lows: u32 [4 quads], what brings the smallest entry to 0
inline void build_tables4(int8x16_t q, uint32x4_t minus_lows, uint8_t* tables) {
  constexpr uint8_t o = 255;  // an index beyond the vector looks up 0
  static constexpr uint8_t kEven[16] = {o, 0, o, 0, o, 4, o, 4, o, 8, o, 8, o, 12, o, 12};
  static constexpr uint8_t kOdd[16] = {o, o, 1, 1, o, o, 5, 5, o, o, 9, 9, o, o, 13, 13};
  static constexpr uint8_t kFourfold[16] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
  const uint8x16_t channels = vreinterpretq_u8_s8(q);
  const uint8x16_t even = vld1q_u8(kEven), odd = vld1q_u8(kOdd), two = vdupq_n_u8(2);
  const uint8x16_t lower = vaddq_u8(vqtbl1q_u8(channels, even), vqtbl1q_u8(channels, odd));
  // 255 + 2 wraps to a valid index, so saturate.
  const uint8x16_t upper = vaddq_u8(vqtbl1q_u8(channels, vqaddq_u8(even, two)), vqtbl1q_u8(channels, vqaddq_u8(odd, two)));
  const uint8x16_t every_low = vreinterpretq_u8_u32(vmulq_n_u32(minus_lows, 0x01010101u));
  const uint8x16_t shifted = vaddq_u8(upper, every_low);
  for (int quad = 0; quad < 4; ++quad) {
    const uint8x16_t from_lower = vqtbl1q_u8(lower, vreinterpretq_u8_u32(vdupq_n_u32(0x03020100u + quad * 0x04040404u)));
    const uint8x16_t from_upper = vqtbl1q_u8(shifted, vaddq_u8(vld1q_u8(kFourfold), vdupq_n_u8(4 * quad)));
    vst1q_u8(tables + quad * kTableBytes, vaddq_u8(from_lower, from_upper));
  }
}

// Of 4 quads, as PairSums has them: low and high word.
inline uint16x4_t pair_sums(int8x16_t q) {
  const int16x8_t pairs = vpaddlq_s8(q);  // of quad 0, 0, 1, 1, ...
  const int16x8_t two = vpaddq_s16(vuzp1q_s16(pairs, pairs), vuzp2q_s16(pairs, pairs));
  return vreinterpret_u16_s16(vzip1_s16(vpadd_s16(vget_low_s16(two), vget_low_s16(two)),
                                        vpadd_s16(vget_high_s16(two), vget_high_s16(two))));
}

void quantize(const float* x, int k, const ActivationsView& out) {
  for (int block = 0; block < out.n_blocks; ++block) {
    float padded[kActBlock];
    const float* p = x + block * kActBlock;
    const int count = k - block * kActBlock;
    if (count < kActBlock) {
      for (int i = 0; i < kActBlock; ++i) padded[i] = i < count ? p[i] : 0.0f;
      p = padded;
    }
    uint32x4_t largest = vdupq_n_u32(0), widest = largest;
    for (int i = 0; i < kActBlock; i += 16) {
      float32x4_t magnitudes[4];
      for (int v = 0; v < 4; ++v) {
        magnitudes[v] = vabsq_f32(vld1q_f32(p + i + v * 4));
        largest = larger(largest, magnitudes[v]);
      }
      widest = larger(widest, vpaddq_f32(vpaddq_f32(magnitudes[0], magnitudes[1]),
                                         vpaddq_f32(magnitudes[2], magnitudes[3])));
    }
    const float by_code = largest_of(largest) * (1.0f / 127.0f);
    const float by_span = largest_of(widest) * (1.0f / 253.0f);
    const float scale = by_code > by_span ? by_code : by_span;
    const float inverse = scale > 1.17549435e-38f ? 1.0f / scale : 0.0f;
    out.scales[block] = scale;
    uint16x4_t quarters[kActBlock / kSumRun];
    for (int i = 0; i < kActBlock; i += kSumRun) {
      int16x4_t words[4];
      for (int v = 0; v < 4; ++v)
        words[v] = vqmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(p + i + v * 4), inverse)));
      const int8x16_t q = vcombine_s8(vqmovn_s16(vcombine_s16(words[0], words[1])),
                                      vqmovn_s16(vcombine_s16(words[2], words[3])));
      const int64_t at = int64_t{block} * kActBlock + i;
      vst1q_s8(out.q + at, q);
      out.sums[at / kSumRun] = vaddlvq_s8(q);
      quarters[i / kSumRun] = pair_sums(q);
      if (!out.tables) continue;
      const uint8x16_t below = vreinterpretq_u8_s8(vnegq_s8(vminq_s8(q, vdupq_n_s8(0))));
      const uint32x4_t minus_lows = vdotq_u32(vdupq_n_u32(0), below, vdupq_n_u8(1));
      out.lows[at / kSumRun] = -static_cast<int32_t>(vaddvq_u32(minus_lows));
      build_tables4(q, minus_lows, out.tables + at / kLutWidth * kTableBytes);
    }
    const auto word = [](uint16x4_t pairs) { return vget_lane_u32(vreinterpret_u32_u16(pairs), 0); };
    PairSums& sums = out.pairs[block];
    for (int i = 0; i < 4; ++i) sums.quarters[i] = word(quarters[i]);
    const uint16x4_t first = vadd_u16(quarters[0], quarters[1]), second = vadd_u16(quarters[2], quarters[3]);
    sums.halves[0] = word(first);
    sums.halves[1] = word(second);
    sums.whole = word(vadd_u16(first, second));
  }
}

}  // namespace
}  // namespace elute
