// The integer vocabulary in AVX-512 (F, BW, DQ, VL, VNNI). See integer_scalar.h for what each word means.
#pragma once
#ifdef ELUTE_EMULATE_AVX512
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#endif
#include <immintrin.h>

#include <cstdint>

#include "kernels/matmul.h"

namespace elute {
namespace {

// SIMDe 0.7.4 lacks these 512-bit operations, so emulation makes them of two halves.
#ifdef ELUTE_EMULATE_AVX512
inline __m512i join_halves(__m256i low, __m256i high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
inline __m512i widen16(__m256i v) {
  return join_halves(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(v)),
                     _mm256_cvtepi16_epi32(_mm256_extracti128_si256(v, 1)));
}
inline __m512i widen8(__m128i v) {
  return join_halves(_mm256_cvtepi8_epi32(v), _mm256_cvtepi8_epi32(_mm_srli_si128(v, 8)));
}
inline __m512 widen_halves(__m256i v) {
  return _mm512_castsi512_ps(join_halves(_mm256_castps_si256(_mm256_cvtph_ps(_mm256_castsi256_si128(v))),
                                         _mm256_castps_si256(_mm256_cvtph_ps(_mm256_extracti128_si256(v, 1)))));
}
inline __m512i shift_right(__m512i v, __m512i counts) {
  return join_halves(_mm256_srav_epi32(_mm512_castsi512_si256(v), _mm512_castsi512_si256(counts)),
                     _mm256_srav_epi32(_mm512_extracti64x4_epi64(v, 1), _mm512_extracti64x4_epi64(counts, 1)));
}
inline __m512 convert(__m512i v) {
  const __m256 low = _mm256_cvtepi32_ps(_mm512_castsi512_si256(v));
  const __m256 high = _mm256_cvtepi32_ps(_mm512_extracti64x4_epi64(v, 1));
  return _mm512_castsi512_ps(join_halves(_mm256_castps_si256(low), _mm256_castps_si256(high)));
}
#else
inline __m512i shift_right(__m512i v, __m512i counts) { return _mm512_srav_epi32(v, counts); }  // keeps the sign
inline __m512 convert(__m512i v) { return _mm512_cvtepi32_ps(v); }
inline __m512i widen16(__m256i v) { return _mm512_cvtepi16_epi32(v); }
inline __m512i widen8(__m128i v) { return _mm512_cvtepi8_epi32(v); }
inline __m512 widen_halves(__m256i v) { return _mm512_cvtph_ps(v); }
#endif

constexpr int kBytes = 64;
constexpr bool kFixedSegments = true;  // lut_matmul for segments of 8 and 16 quads by themselves: Zen 5, 1 bit, 1.2 times as fast
using Bytes = __m512i;
using Ints = __m512i;
using Floats = __m512;
constexpr int kLanes = kBytes / 4;
constexpr int kGemmRows = 8;  // 8 rows * 2 vectors of sums = 16 registers; + 2 of codes; activations broadcast from memory

inline Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
ELUTE_INLINE void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
inline Bytes low_nibbles(Bytes v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes v) { return low_nibbles(_mm512_srli_epi16(v, 4)); }
inline Bytes lookup(Bytes table, Bytes index) { return _mm512_shuffle_epi8(table, index); }

template <int Planes>
inline Bytes tables(const uint8_t* p) {
  if constexpr (Planes == 4) {
    return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
  } else if constexpr (Planes == 2) {  // two quads, two lanes each
    const __m512i both = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_shuffle_i32x4(both, both, 0b01'01'00'00);
  } else {
    return load_bytes(p);  // four quads, a lane each
  }
}

template <int Planes>
struct Sum;

template <>
struct Sum<4> {
  __m512i s = _mm512_setzero_si512();
  void add(Bytes v) { s = _mm512_dpbusd_epi32(s, v, _mm512_set1_epi32(0x08040201)); }
  static void total(const Sum* sum, Ints* out) { out[0] = sum->s; }
};

template <>
struct Sum<2> {
  __m512i s = _mm512_setzero_si512();  // 16 bits: 16 outputs of two quads
  void add(Bytes v) { s = _mm512_add_epi16(s, _mm512_maddubs_epi16(v, _mm512_set1_epi16(0x0201))); }
  static void total(const Sum* sum, Ints* out) {
    out[0] = widen16(
        _mm256_add_epi16(_mm512_castsi512_si256(sum->s), _mm512_extracti64x4_epi64(sum->s, 1)));
  }
};

template <>
struct Sum<1> {
  // A 16-bit lane of v is odd*256 + even. `words` wraps, but even = words - 256*odds mod 2^16 is exact.
  __m512i words = _mm512_setzero_si512(), odds = _mm512_setzero_si512();
  void add(Bytes v) {
    words = _mm512_add_epi16(words, v);
    odds = _mm512_add_epi16(odds, _mm512_srli_epi16(v, 8));
  }
  static __m128i over_quads(__m512i v) {
    const __m256i two = _mm256_add_epi16(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
    return _mm_add_epi16(_mm256_castsi256_si128(two), _mm256_extracti128_si256(two, 1));
  }
  static void total(const Sum* sum, Ints* out) {
    const __m128i e = over_quads(_mm512_sub_epi16(sum->words, _mm512_slli_epi16(sum->odds, 8)));
    const __m128i o = over_quads(sum->odds);
    const __m256i both = _mm256_set_m128i(_mm_unpackhi_epi16(e, o), _mm_unpacklo_epi16(e, o));
    out[0] = widen16(both);  // at most 16 * 255, so the sign bit is clear
  }
};

inline Ints set_ints(int32_t x) { return _mm512_set1_epi32(x); }
inline Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
template <int Shift>
inline Ints shift_left(Ints a) { return _mm512_slli_epi32(a, Shift); }

inline Floats zero_floats() { return _mm512_setzero_ps(); }
inline Floats set_floats(float x) { return _mm512_set1_ps(x); }
inline Floats to_floats(Ints a) { return convert(a); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
inline void store_floats(float* p, Floats a) { _mm512_storeu_ps(p, a); }
inline Floats load_halves(const uint16_t* p) {
  return widen_halves(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

struct Product {
  static constexpr int kRun = 16;
  using Partial = __m512i;
  static int centre(int, int zero) { return zero; }
  static Partial start(uint32_t pair_sums, int centre) { return _mm512_set1_epi32(-centre * both_pairs(pair_sums)); }
  // centre times the sums of 8 rows, as floats.
  static void centre_sums(const uint32_t* pair_sums, int centre, float* out) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pair_sums));
    const __m256i sums = _mm256_madd_epi16(words, _mm256_set1_epi16(static_cast<int16_t>(centre)));
    _mm256_store_ps(out, _mm256_cvtepi32_ps(sums));
  }
  static void add(Partial& p, Bytes codes, Bytes q) { p = _mm512_dpbusd_epi32(p, codes, q); }
  static Ints total(Partial p) { return p; }
};
template <int Bits>
using Dot = Product;
#ifdef ELUTE_EMULATE_AVX512
inline void keep_in_register(__m512i&) {}
#else
inline void keep_in_register(__m512i& v) { asm("" : "+v"(v)); }
#endif
inline Bytes broadcast_quad(const int8_t* q) {
  int32_t word;
  __builtin_memcpy(&word, q, 4);
  return _mm512_set1_epi32(word);
}

inline Bytes spread_nibbles(__m512i w) {  // w: c0 | c1<<4 | c2<<16 | c3<<20 -> a byte a code
  return _mm512_and_si512(_mm512_or_si512(w, _mm512_slli_epi32(w, 4)), _mm512_set1_epi8(15));
}
template <int Planes>
inline void spread(Bytes nibbles, Bytes* out) {
  const __m512i low_pairs =  // nibble b3b2b1b0 -> b0 | b1<<4
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 16, 17, 0, 1, 16, 17, 0, 1, 16, 17, 0, 1, 16, 17));
  const __m512i high_pairs =  // nibble b3b2b1b0 -> b2 | b3<<4
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 16, 16, 16, 16, 17, 17, 17, 17));
  const __m512i low = lookup(low_pairs, nibbles), high = lookup(high_pairs, nibbles);
  if constexpr (Planes == 4) {
    const __m512i weigh = _mm512_set1_epi32(0x08040201);
    const __m512i low32 = _mm512_dpbusd_epi32(_mm512_setzero_si512(), low, weigh);
    const __m512i high32 = _mm512_dpbusd_epi32(_mm512_setzero_si512(), high, weigh);
    out[0] = spread_nibbles(_mm512_or_si512(low32, _mm512_slli_epi32(high32, 16)));
  } else if constexpr (Planes == 2) {
    const __m512i weigh = _mm512_set1_epi16(0x0201);
    const __m512i low16 = _mm512_maddubs_epi16(low, weigh), high16 = _mm512_maddubs_epi16(high, weigh);
    const auto join = [](__m256i l, __m256i h) {
      return spread_nibbles(_mm512_or_si512(widen16(l), _mm512_slli_epi32(widen16(h), 16)));
    };
    out[0] = join(_mm512_castsi512_si256(low16), _mm512_castsi512_si256(high16));
    out[1] = join(_mm512_extracti64x4_epi64(low16, 1), _mm512_extracti64x4_epi64(high16, 1));
  } else {
    const auto join = [](__m128i l, __m128i h) {  // bytes are at most 17, so sign extension is zero extension
      return spread_nibbles(_mm512_or_si512(widen8(l), _mm512_slli_epi32(widen8(h), 16)));
    };
    const __m256i low_a = _mm512_castsi512_si256(low), low_b = _mm512_extracti64x4_epi64(low, 1);
    const __m256i high_a = _mm512_castsi512_si256(high), high_b = _mm512_extracti64x4_epi64(high, 1);
    out[0] = join(_mm256_castsi256_si128(low_a), _mm256_castsi256_si128(high_a));
    out[1] = join(_mm256_extracti128_si256(low_a, 1), _mm256_extracti128_si256(high_a, 1));
    out[2] = join(_mm256_castsi256_si128(low_b), _mm256_castsi256_si128(high_b));
    out[3] = join(_mm256_extracti128_si256(low_b, 1), _mm256_extracti128_si256(high_b, 1));
  }
}
template <int Shift>
inline Bytes shift_bytes_left(Bytes codes) { return _mm512_slli_epi32(codes, Shift); }
inline Bytes or_bytes(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
inline void store_bytes(uint8_t* p, Bytes v) { _mm512_storeu_si512(p, v); }

template <int Planes>
inline Bytes load_positions(const uint8_t* section, int) {
  if constexpr (Planes == 4) return load_bytes(section);
  if constexpr (Planes == 2) return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(section)));
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(section)));
}
inline void interleave_channels(const Bytes (&channels)[4], Bytes (&out)[4]) {
  const __m512i first_a = _mm512_unpacklo_epi8(channels[0], channels[1]);
  const __m512i first_b = _mm512_unpacklo_epi8(channels[2], channels[3]);
  const __m512i last_a = _mm512_unpackhi_epi8(channels[0], channels[1]);
  const __m512i last_b = _mm512_unpackhi_epi8(channels[2], channels[3]);
  out[0] = _mm512_unpacklo_epi16(first_a, first_b);
  out[1] = _mm512_unpackhi_epi16(first_a, first_b);
  out[2] = _mm512_unpacklo_epi16(last_a, last_b);
  out[3] = _mm512_unpackhi_epi16(last_a, last_b);
}
// Where in a byte field (4 * Half + L) / Planes of lane L begins.
template <int Planes, int Half>
inline __m512i field_shifts() {
  constexpr int h = 4 * Half, b = Planes == 1 ? h + 1 : h, c = Planes == 4 ? h : h + 2, d = Planes == 1 ? h + 3 : c;
  return _mm512_setr_epi32(h, h, h, h, b, b, b, b, c, c, c, c, d, d, d, d);
}
template <int Planes, int Half>
inline Bytes position_codes(Bytes v, int) {
  return _mm512_and_si512(_mm512_srlv_epi32(v, (field_shifts<Planes, Half>())), _mm512_set1_epi8((1 << Planes) - 1));
}
// Codes stay where they are in their bytes, which multiplies their products by a power of two.
template <int Planes>
struct FieldDot : Product {
  template <int Half>
  static Bytes operand(Bytes positions, int) {
    constexpr int kMask = (1 << Planes) - 1;
    return _mm512_and_si512(positions, _mm512_sllv_epi32(_mm512_set1_epi32(kMask * 0x01010101), (field_shifts<Planes, Half>())));
  }
  template <int Half>
  static Ints total(Partial p) { return shift_right(p, (field_shifts<Planes, Half>())); }
};
// Of 2 planes a tile has half a vector: two tiles of a matrix of 2 bits, the first in lanes 0 and 1.
struct PairOfTiles {
  __m512i sums[4][4];  // [field][i]
  PairOfTiles() {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) sums[i / 4][i % 4] = _mm512_setzero_si512();
  }
  void add(const Bytes (&positions)[4], Bytes q) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      __m512i& sum = sums[i / 4][i % 4];
      const __m512i mask = _mm512_set1_epi8(static_cast<char>(3 << i / 4 * 2));
      sum = _mm512_dpbusd_epi32(sum, _mm512_and_si512(positions[i % 4], mask), q);
      keep_in_register(sum);
    }
  }
  // dot[tile] = start + the products, outputs in order: fields 2h and 2h + 1 hold 8 each of a half h.
  void total(Ints start, Ints (&dot)[2][8]) const {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const int h = i / 4;
      const __m512i first = shift_right(sums[2 * h][i % 4], _mm512_set1_epi32(4 * h));
      const __m512i second = shift_right(sums[2 * h + 1][i % 4], _mm512_set1_epi32(4 * h + 2));
      dot[0][i] = _mm512_add_epi32(start, _mm512_shuffle_i32x4(first, second, 0x44));
      dot[1][i] = _mm512_add_epi32(start, _mm512_shuffle_i32x4(first, second, 0xee));
    }
  }
};
template <int Planes>
struct SectionDot : FieldDot<Planes> {};
template <>
struct SectionDot<2> : FieldDot<2> {
  using Pair = PairOfTiles;
};

}  // namespace
}  // namespace elute
