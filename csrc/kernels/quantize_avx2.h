// quantize in AVX2, for the avx2 and avx512 levels. Bit for bit quantize_scalar.h.
#pragma once
#include <immintrin.h>

#include "kernels/matmul.h"

namespace elute {
namespace {

// Of the bits of floats without sign, which order as integers do, and NaN above all: it must not get lost.
inline float largest_of(__m256i v) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  m = _mm_max_epi32(m, _mm_unpackhi_epi64(m, m));
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(m, _mm_shuffle_epi32(m, 1))));
}
inline __m256i larger(__m256i bits, __m256 magnitudes) {
  return _mm256_max_epi32(bits, _mm256_castps_si256(magnitudes));
}

// q: 8 quads. Lower halves of 4 tables fit a vector; the upper halves mirror them: entry 15-i = span - entry i.
inline void build_tables8(__m256i q, uint8_t* tables) {
  const __m256i none = _mm256_setzero_si256();
  const __m256i magnitudes = _mm256_abs_epi8(q);
  const __m256i negative = _mm256_cmpgt_epi8(none, q);
  const __m256i below = _mm256_and_si256(magnitudes, negative);  // what bit 3 = 0 leaves of channel 3
  const __m256i spans =
      _mm256_madd_epi16(_mm256_maddubs_epi16(magnitudes, _mm256_set1_epi8(1)), _mm256_set1_epi16(1));
  // bit j of entry i, as a byte mask for i = 0..7, twice a lane
  const __m256i bit0 = _mm256_set1_epi16(static_cast<int16_t>(0xff00));
  const __m256i bit1 = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000));
  const __m256i bit2 = _mm256_set1_epi64x(static_cast<int64_t>(0xffffffff00000000ull));
  const __m256i mirror = _mm256_broadcastsi128_si256(_mm_setr_epi8(7, 6, 5, 4, 3, 2, 1, 0, 15, 14, 13, 12, 11, 10, 9, 8));
  for (int pair = 0; pair < 2; ++pair) {  // quads (0, 1) or (2, 3) of each lane
    const auto channel = [&](__m256i v, int j) {
      const char a = static_cast<char>(8 * pair + j), b = static_cast<char>(8 * pair + 4 + j);
      return _mm256_shuffle_epi8(
          v, _mm256_broadcastsi128_si256(_mm_setr_epi8(a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b)));
    };
    const auto term = [&](int j, __m256i bit) {  // |q_j| where the bit agrees with the sign
      return _mm256_and_si256(channel(magnitudes, j), _mm256_xor_si256(channel(negative, j), bit));
    };
    const __m256i lower = _mm256_add_epi8(_mm256_add_epi8(term(0, bit0), term(1, bit1)),
                                          _mm256_add_epi8(term(2, bit2), channel(below, 3)));
    const __m256i upper = _mm256_sub_epi8(channel(spans, 0), _mm256_shuffle_epi8(lower, mirror));
    const __m256i first = _mm256_unpacklo_epi64(lower, upper), second = _mm256_unpackhi_epi64(lower, upper);
    // lane 0 holds quads 0-3, lane 1 quads 4-7
    uint8_t* low_lane = tables + pair * 2 * kTableBytes;
    uint8_t* high_lane = low_lane + 4 * kTableBytes;
    _mm_store_si128(reinterpret_cast<__m128i*>(low_lane), _mm256_castsi256_si128(first));
    _mm_store_si128(reinterpret_cast<__m128i*>(low_lane + kTableBytes), _mm256_castsi256_si128(second));
    _mm_store_si128(reinterpret_cast<__m128i*>(high_lane), _mm256_extracti128_si256(first, 1));
    _mm_store_si128(reinterpret_cast<__m128i*>(high_lane + kTableBytes), _mm256_extracti128_si256(second, 1));
  }
}

inline __m128i quarter_words(__m256i v) { return _mm_unpacklo_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)); }

// q: the two halves of a block.
inline void sum_pairs(const __m256i (&q)[2], PairSums& sums) {
  __m128i quarters[2];
  for (int half = 0; half < 2; ++half) {
    __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), q[half]);  // a quad a 32-bit lane, 16 channels a half
    pairs = _mm256_add_epi16(pairs, _mm256_shuffle_epi32(pairs, 0b01'00'11'10));
    pairs = _mm256_add_epi16(pairs, _mm256_shuffle_epi32(pairs, 0b10'11'00'01));
    quarters[half] = quarter_words(pairs);
  }
  const __m128i all = _mm_unpacklo_epi64(quarters[0], quarters[1]);
  const __m128i halves = _mm_add_epi16(all, _mm_shuffle_epi32(all, 0b10'11'00'01));  // 0, 0, 1, 1
  const __m128i whole = _mm_add_epi16(halves, _mm_shuffle_epi32(halves, 0b01'00'11'10));
  sums.whole = static_cast<uint32_t>(_mm_cvtsi128_si32(whole));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(sums.halves), _mm_shuffle_epi32(halves, 0b00'00'10'00));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(sums.quarters), all);
}

void quantize(const float* x, int k, const ActivationsView& out) {
  const __m256 sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  for (int block = 0; block < out.n_blocks; ++block) {
    alignas(32) float padded[kActBlock];
    const float* p = x + block * kActBlock;
    const int count = k - block * kActBlock;
    if (count < kActBlock) {
      for (int i = 0; i < kActBlock; ++i) padded[i] = i < count ? p[i] : 0.0f;
      p = padded;
    }
    __m256i largest = _mm256_setzero_si256(), widest = largest;
    for (int i = 0; i < kActBlock; i += 16) {
      const __m256 a = _mm256_and_ps(_mm256_loadu_ps(p + i), sign);
      const __m256 b = _mm256_and_ps(_mm256_loadu_ps(p + i + 8), sign);
      largest = larger(larger(largest, a), b);
      const __m256 pairs = _mm256_hadd_ps(a, b);
      widest = larger(widest, _mm256_hadd_ps(pairs, pairs));
    }
    const float by_code = largest_of(largest) * (1.0f / 127.0f);
    const float by_span = largest_of(widest) * (1.0f / 253.0f);
    const float scale = by_code > by_span ? by_code : by_span;
    const __m256 inverse = _mm256_set1_ps(scale > 1.17549435e-38f ? 1.0f / scale : 0.0f);
    out.scales[block] = scale;
    __m256i halves[2];
    for (int half = 0; half < 2; ++half) {
      __m256i ints[4];
      for (int i = 0; i < 4; ++i)
        ints[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(p + half * 32 + i * 8), inverse));
      const __m256i packed =
          _mm256_packs_epi16(_mm256_packs_epi32(ints[0], ints[1]), _mm256_packs_epi32(ints[2], ints[3]));
      const __m256i q = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
      halves[half] = q;
      const int64_t at = int64_t{block} * kActBlock + half * 32;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out.q + at), q);
      // sums of 8 bytes as unsigned, so shifted by 128 each
      const __m256i none = _mm256_setzero_si256();
      const __m256i sums = _mm256_sad_epu8(_mm256_xor_si256(q, _mm256_set1_epi8(-128)), none);
      alignas(32) int64_t of8[4];
      _mm256_store_si256(reinterpret_cast<__m256i*>(of8), sums);
      out.sums[at / kSumRun] = static_cast<int32_t>(of8[0] + of8[1]) - 16 * 128;
      out.sums[at / kSumRun + 1] = static_cast<int32_t>(of8[2] + of8[3]) - 16 * 128;
      if (!out.tables) continue;
      const __m256i lows = _mm256_sad_epu8(_mm256_sub_epi8(none, _mm256_min_epi8(q, none)), none);
      _mm256_store_si256(reinterpret_cast<__m256i*>(of8), lows);
      out.lows[at / kSumRun] = -static_cast<int32_t>(of8[0] + of8[1]);
      out.lows[at / kSumRun + 1] = -static_cast<int32_t>(of8[2] + of8[3]);
      build_tables8(q, out.tables + at / kLutWidth * kTableBytes);
    }
    sum_pairs(halves, out.pairs[block]);
  }
}

}  // namespace
}  // namespace elute
