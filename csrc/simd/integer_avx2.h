// The integer vocabulary in AVX2. See integer_scalar.h for what each word means.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "kernels/matmul.h"

namespace elute {
namespace {

constexpr int kBytes = 32;
constexpr bool kFixedSegments = true;  // lut_matmul for segments of 8 and 16 quads by themselves: Zen 5, 1 bit, 1.2 times as fast
using Bytes = __m256i;
using Ints = __m256i;
using Floats = __m256;
constexpr int kLanes = kBytes / 4;
constexpr int kGemmRows = 2;  // 2 rows * 4 vectors of sums = 8 registers; + 4 of codes + 1 of activations

inline Bytes load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
ELUTE_INLINE void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
inline Bytes low_nibbles(Bytes v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }
inline Bytes lookup(Bytes table, Bytes index) { return _mm256_shuffle_epi8(table, index); }
inline Bytes broadcast_table(const uint8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
}

template <int Planes>
inline Bytes tables(const uint8_t* p) {
  if constexpr (Planes == 1) return load_bytes(p);  // two quads, a lane each
  return broadcast_table(p);
}

// Sums of looked-up bytes. A 4-plane vector holds [p0 p1 p2 p3] of 8 outputs, a 2-plane one [p0 p1] of 16, a 1-plane
// one 16 outputs of two quads.
template <int Planes>
struct Sum;

template <>
struct Sum<4> {
  __m256i s = _mm256_setzero_si256();  // 16 bits: [p0 + 2 p1, p2 + 2 p3]; 16 quads * 3 * 255 = 12240 fits
  void add(Bytes v) { s = _mm256_add_epi16(s, _mm256_maddubs_epi16(v, _mm256_set1_epi16(0x0201))); }
  static void total(const Sum* sums, Ints* out) {
    for (int v = 0; v < 2; ++v) out[v] = _mm256_madd_epi16(sums[v].s, _mm256_set1_epi32(0x00040001));
  }
};

template <>
struct Sum<2> {
  __m256i s = _mm256_setzero_si256();
  void add(Bytes v) { s = _mm256_add_epi16(s, _mm256_maddubs_epi16(v, _mm256_set1_epi16(0x0201))); }
  static void total(const Sum* sum, Ints* out) {
    out[0] = _mm256_cvtepi16_epi32(_mm256_castsi256_si128(sum->s));
    out[1] = _mm256_cvtepi16_epi32(_mm256_extracti128_si256(sum->s, 1));
  }
};

template <>
struct Sum<1> {
  // A 16-bit lane of v is odd*256 + even. `words` wraps, but even = words - 256*odds mod 2^16 is exact.
  __m256i words = _mm256_setzero_si256(), odds = _mm256_setzero_si256();
  void add(Bytes v) {
    words = _mm256_add_epi16(words, v);
    odds = _mm256_add_epi16(odds, _mm256_srli_epi16(v, 8));
  }
  static void total(const Sum* sum, Ints* out) {
    const __m256i even = _mm256_sub_epi16(sum->words, _mm256_slli_epi16(sum->odds, 8));
    const __m128i e = _mm_add_epi16(_mm256_castsi256_si128(even), _mm256_extracti128_si256(even, 1));
    const __m128i o = _mm_add_epi16(_mm256_castsi256_si128(sum->odds), _mm256_extracti128_si256(sum->odds, 1));
    out[0] = _mm256_cvtepu16_epi32(_mm_unpacklo_epi16(e, o));
    out[1] = _mm256_cvtepu16_epi32(_mm_unpackhi_epi16(e, o));
  }
};

inline Ints set_ints(int32_t x) { return _mm256_set1_epi32(x); }
inline Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
template <int Shift>
inline Ints shift_left(Ints a) { return _mm256_slli_epi32(a, Shift); }

inline Floats zero_floats() { return _mm256_setzero_ps(); }
inline Floats set_floats(float x) { return _mm256_set1_ps(x); }
inline Floats to_floats(Ints a) { return _mm256_cvtepi32_ps(a); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
inline void store_floats(float* p, Floats a) { _mm256_storeu_ps(p, a); }
inline Floats load_halves(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// Multiply: codes u8 [8 outputs][4 channels] by one quad of activations, summed in 16 bits, channels 0 and 1 of a quad in
// even lanes, 2 and 3 in odd ones.
//   Run = 16, up to 4 bits: sums wrap on their way, but start at -centre * (sum of their q), and so end at
//   |sum of (code - centre) * q| <= 32 channels * 8 * 127 = 32512
//   Run < 16: what fits without wrapping, 2 channels * code * 127 * Run <= 32767; nothing is subtracted
//   Wide, 8 bits: 255 * 127 * 2 saturates vpmaddubsw, so |code - 128| is multiplied by q with the sign of code - 128
template <int Run, bool Wide>
struct Product {
  static constexpr int kRun = Run;
  using Partial = __m256i;
  static int centre(int bits, int zero) {
    if (Wide) return 128;
    if (Run < 16) return 0;
    const int half = 1 << (bits - 1);
    return zero <= half && (1 << bits) - 1 - zero <= 8 ? zero : half;
  }
  static Partial start(uint32_t pair_sums, int centre) {
    if (Wide || Run < 16) return _mm256_setzero_si256();
    return _mm256_mullo_epi16(_mm256_set1_epi32(static_cast<int>(pair_sums)),
                              _mm256_set1_epi16(static_cast<int16_t>(-centre)));
  }
  static void add(Partial& p, Bytes codes, Bytes q) {
    if constexpr (Wide) {
      const __m256i c = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
      const __m256i products = _mm256_maddubs_epi16(_mm256_abs_epi8(c), _mm256_sign_epi8(q, c));
      p = _mm256_add_epi32(p, _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
    } else {
      p = _mm256_add_epi16(p, _mm256_maddubs_epi16(codes, q));
    }
  }
  // One quad of 32 outputs for 2 rows. Written out, since GCC 12 loads codes twice and copies or spills the sums: that
  // costs half the speed of lut_gemm on a Zen 3. This runs at the rate of the multiply and add instructions.
  static void add_tile(Partial (&p)[2][4], const uint8_t* codes, const int8_t* q, int64_t q_stride) requires(!Wide) {
    __m256i q0, q1, c, t0, t1;
#define ELUTE_TWO_ROWS(at, a, b)                                     \
  "vmovdqu " #at "(%[codes]), %[c]\n\t"                             \
  "vpmaddubsw %[q0], %[c], %[t0]\n\tvpmaddubsw %[q1], %[c], %[t1]\n\t" \
  "vpaddw %[t0], %[" #a "], %[" #a "]\n\tvpaddw %[t1], %[" #b "], %[" #b "]\n\t"
    asm("vpbroadcastd (%[q]), %[q0]\n\tvpbroadcastd (%[q],%[stride]), %[q1]\n\t"  //
        ELUTE_TWO_ROWS(0, a0, b0) ELUTE_TWO_ROWS(32, a1, b1) ELUTE_TWO_ROWS(64, a2, b2) ELUTE_TWO_ROWS(96, a3, b3)
        : [a0] "+x"(p[0][0]), [a1] "+x"(p[0][1]), [a2] "+x"(p[0][2]), [a3] "+x"(p[0][3]), [b0] "+x"(p[1][0]),
          [b1] "+x"(p[1][1]), [b2] "+x"(p[1][2]), [b3] "+x"(p[1][3]), [q0] "=&x"(q0), [q1] "=&x"(q1), [c] "=&x"(c),
          [t0] "=&x"(t0), [t1] "=&x"(t1)
        : [codes] "r"(codes), [q] "r"(q), [stride] "r"(q_stride),
          "m"(*reinterpret_cast<const uint8_t(*)[128]>(codes)), "m"(*q), "m"(q[q_stride]));
#undef ELUTE_TWO_ROWS
  }
  static Ints total(Partial p) {
    if constexpr (Wide) return p;
    return _mm256_madd_epi16(p, _mm256_set1_epi16(1));
  }
};
template <int Bits>
using Dot = Product<Bits <= 4 || Bits == 8 ? 16 : Bits == 5 ? 4 : Bits == 6 ? 2 : 1, Bits == 8>;
// GCC 12 gives a loop's sums a second set of registers for their values after it and spills; this ties the two. Zen 3,
// lut_gemm at 2 bits: 1.4 times as fast.
inline void keep_in_register(__m256i& v) { asm("" : "+x"(v)); }
inline Bytes broadcast_quad(const int8_t* q) {
  int32_t word;
  __builtin_memcpy(&word, q, 4);
  return _mm256_set1_epi32(word);
}

// Two-level lookup, level 1. Tables give bits of channels (0, 1) and (2, 3) as one byte each: bit -> nibble.
// Returns, for kLanes outputs, a 32-bit lane with the 4 codes as bytes.
inline Bytes spread_nibbles(__m256i w) {  // w: c0 | c1<<4 | c2<<16 | c3<<20
  return _mm256_and_si256(_mm256_or_si256(w, _mm256_slli_epi32(w, 4)), _mm256_set1_epi8(15));
}
inline Bytes low_pair_table() {  // nibble b3b2b1b0 -> b0 | b1<<4
  return _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 16, 17, 0, 1, 16, 17, 0, 1, 16, 17, 0, 1, 16, 17));
}
inline Bytes high_pair_table() {  // nibble b3b2b1b0 -> b2 | b3<<4
  return _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 16, 16, 16, 16, 17, 17, 17, 17));
}
// A vector of nibbles -> 4 / Planes vectors of codes, quad by quad, 16 outputs a quad.
template <int Planes>
inline void spread(Bytes nibbles, Bytes* out) {
  const __m256i weigh = _mm256_set1_epi16(0x0201);
  const __m256i low = lookup(low_pair_table(), nibbles), high = lookup(high_pair_table(), nibbles);
  if constexpr (Planes == 4) {
    const __m256i join = _mm256_set1_epi32(0x00040001);
    const __m256i low32 = _mm256_madd_epi16(_mm256_maddubs_epi16(low, weigh), join);
    const __m256i high32 = _mm256_madd_epi16(_mm256_maddubs_epi16(high, weigh), join);
    out[0] = spread_nibbles(_mm256_or_si256(low32, _mm256_slli_epi32(high32, 16)));
  } else if constexpr (Planes == 2) {
    const __m256i low16 = _mm256_maddubs_epi16(low, weigh), high16 = _mm256_maddubs_epi16(high, weigh);
    const __m256i first = _mm256_unpacklo_epi16(low16, high16), second = _mm256_unpackhi_epi16(low16, high16);
    out[0] = spread_nibbles(_mm256_permute2x128_si256(first, second, 0x20));
    out[1] = spread_nibbles(_mm256_permute2x128_si256(first, second, 0x31));
  } else {
    const __m256i none = _mm256_setzero_si256();
    const __m256i low_a = _mm256_unpacklo_epi8(low, none), low_b = _mm256_unpackhi_epi8(low, none);
    const __m256i high_a = _mm256_unpacklo_epi8(high, none), high_b = _mm256_unpackhi_epi8(high, none);
    const __m256i o0 = _mm256_unpacklo_epi16(low_a, high_a), o4 = _mm256_unpackhi_epi16(low_a, high_a);
    const __m256i o8 = _mm256_unpacklo_epi16(low_b, high_b), o12 = _mm256_unpackhi_epi16(low_b, high_b);
    out[0] = spread_nibbles(_mm256_permute2x128_si256(o0, o4, 0x20));
    out[1] = spread_nibbles(_mm256_permute2x128_si256(o8, o12, 0x20));
    out[2] = spread_nibbles(_mm256_permute2x128_si256(o0, o4, 0x31));
    out[3] = spread_nibbles(_mm256_permute2x128_si256(o8, o12, 0x31));
  }
}
template <int Shift>
inline Bytes shift_bytes_left(Bytes codes) {  // codes stay below 256, so no bit crosses into the next byte
  return _mm256_slli_epi32(codes, Shift);
}
inline Bytes or_bytes(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
inline void store_bytes(uint8_t* p, Bytes v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }

template <int Planes>
inline Bytes load_positions(const uint8_t* section, int part) {
  if constexpr (Planes == 1) return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(section)));
  return load_bytes(Planes == 4 ? section + part * kBytes : section);
}
inline void interleave_channels(const Bytes (&channels)[4], Bytes (&out)[4]) {
  const __m256i first_a = _mm256_unpacklo_epi8(channels[0], channels[1]);
  const __m256i first_b = _mm256_unpacklo_epi8(channels[2], channels[3]);
  const __m256i last_a = _mm256_unpackhi_epi8(channels[0], channels[1]);
  const __m256i last_b = _mm256_unpackhi_epi8(channels[2], channels[3]);
  out[0] = _mm256_unpacklo_epi16(first_a, first_b);
  out[1] = _mm256_unpackhi_epi16(first_a, first_b);
  out[2] = _mm256_unpacklo_epi16(last_a, last_b);
  out[3] = _mm256_unpackhi_epi16(last_a, last_b);
}
template <int Planes, int Half>
inline Bytes position_codes(Bytes v, int part) {  // field (4 * Half + L) / Planes, L of 2 * part and 2 * part + 1
  const __m256i mask = _mm256_set1_epi8((1 << Planes) - 1);
  if constexpr (Planes == 4) return _mm256_and_si256(_mm256_srli_epi16(v, 4 * Half), mask);
  if constexpr (Planes == 2) return _mm256_and_si256(_mm256_srl_epi16(v, _mm_cvtsi32_si128(4 * Half + 2 * part)), mask);
  const __m256i by_lane = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  return _mm256_and_si256(_mm256_srlv_epi32(v, _mm256_add_epi32(by_lane, _mm256_set1_epi32(4 * Half + 2 * part))), mask);
}
template <int Planes>
struct SectionDot : Dot<Planes> {
  template <int Half>
  static Bytes operand(Bytes positions, int part) { return position_codes<Planes, Half>(positions, part); }
  template <int Half>
  static Ints total(__m256i p) { return Dot<Planes>::total(p); }
};

}  // namespace
}  // namespace elute
