// Bit planes to codes within registers, in AVX-512 with GFNI: the words of kernels/lut_multiply_body.h beyond those of
// integer_avx512.h.
#pragma once
#include "simd/integer_avx512.h"
#ifdef ELUTE_EMULATE_AVX512
#include <simde/x86/gfni.h>
#endif

namespace elute {
namespace {

constexpr int kMultiplyRows = 4;  // rows that share the codes of a vector
constexpr int kMostSums = 16;     // vectors of sums of a loop; + activations, codes and masks: of 32 registers

inline __m512i by_lane(__m128i a, __m128i b, __m128i c, __m128i d) {
  return _mm512_inserti32x4(_mm512_inserti32x4(_mm512_inserti32x4(_mm512_castsi128_si512(a), b, 1), c, 2), d, 3);
}
inline __m128i four(int a, int b, int c, int d) { return _mm_setr_epi32(a, b, c, d); }

// 64 bits are an 8x8 matrix whose rows are bytes; byte i of the result is column i: gf2p8affine multiplies the matrix by
// the unit vector i, counting its rows from the last byte. A nibble's bits are the channels of a quad, so bytes 0-3 get
// those of outputs j, bytes 4-7 those of outputs j + 16, and the planes of an output lie side by side in each:
//   4 planes, rows 2m.0 2m.1 2m.2 2m.3 2m+1.0 ... (output.plane): low nibbles are codes of 2m, high ones of 2m + 1
inline __m512i transpose_bits(__m512i v) {
  const __m512i reversed = _mm512_broadcast_i32x4(_mm_setr_epi8(7, 6, 5, 4, 3, 2, 1, 0, 15, 14, 13, 12, 11, 10, 9, 8));
  const __m512i units = _mm512_set1_epi64(static_cast<int64_t>(0x8040201008040201ull));
  return _mm512_gf2p8affine_epi64_epi8(units, _mm512_shuffle_epi8(v, reversed), 0);
}

// The codes in a vector of a Planes-plane section: kFields vectors u8 [16 outputs][4 channels] of several quads.
template <int Planes>
struct Codes {
  static constexpr int kFields = 8 / Planes;
  __m512i bits;
  Codes(const uint8_t* section, int64_t) : bits(transpose_bits(load_bytes(section))) {}
  void fields(Bytes* out) const {
#pragma GCC unroll 8
    for (int f = 0; f < kFields; ++f)
      out[f] = _mm512_and_si512(_mm512_srli_epi16(bits, f * Planes), _mm512_set1_epi8((1 << Planes) - 1));
  }
};
// Of two 4-plane sections, `to_high` bytes apart.
template <>
struct Codes<8> {
  static constexpr int kFields = 2;
  __m512i low, high;
  Codes(const uint8_t* section, int64_t to_high)
      : low(transpose_bits(load_bytes(section))), high(transpose_bits(load_bytes(section + to_high))) {}
  void fields(Bytes* out) const {
    const __m512i low_nibbles = _mm512_set1_epi8(15);
    constexpr int kSecondWhere = 0xd8, kFirstWhere = 0xe4;  // c ? b : a, c ? a : b
    out[0] = _mm512_ternarylogic_epi32(_mm512_slli_epi16(high, 4), low, low_nibbles, kSecondWhere);
    out[1] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(low, 4), high, low_nibbles, kFirstWhere);
  }
};

// The activations of the quads that a vector covers, each repeated over its quad's lanes.
template <int Planes>
inline Bytes quad_activations(const int8_t* q) {
  if constexpr (Planes >= 4) {
    return broadcast_quad(q);
  } else {
    constexpr int k0 = 0x03020100, k1 = 0x07060504, k2 = 0x0b0a0908, k3 = 0x0f0e0d0c;  // bytes of a quad
    const __m128i q0 = _mm_set1_epi32(k0), q1 = _mm_set1_epi32(k1);
    const __m512i each =
        Planes == 2 ? by_lane(q0, q0, q1, q1) : by_lane(q0, q1, _mm_set1_epi32(k2), _mm_set1_epi32(k3));
    return _mm512_shuffle_epi8(
        _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q))), each);
  }
}
inline void add_products(Ints& sum, Bytes codes, Bytes q) { sum = _mm512_dpbusd_epi32(sum, codes, q); }

// Adds the quads of a vector: two quads of 8 sums leave 8 of each argument, four quads of 4 leave 4.
inline __m512i add_quads(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xee));
}
inline __m512i add_quads(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = add_quads(a, b), cd = add_quads(c, d);
  return _mm512_add_epi32(_mm512_shuffle_i32x4(ab, cd, 0x88), _mm512_shuffle_i32x4(ab, cd, 0xdd));
}
// sums by field -> the panel's outputs in order.
template <int Planes>
inline void gather_outputs(const Ints* sums, Ints* out) {
  __m512i a, b, first;  // where in a and b outputs 0-15 are; 16-31 follow them lane by lane
  if constexpr (Planes >= 4) {  // lane 2m of field t: output 2m + t
    a = sums[0], b = sums[1];
    first = by_lane(four(0, 16, 2, 18), four(4, 20, 6, 22), four(8, 24, 10, 26), four(12, 28, 14, 30));
  } else if constexpr (Planes == 2) {  // 4m + t
    a = add_quads(sums[0], sums[1]), b = add_quads(sums[2], sums[3]);
    first = by_lane(four(0, 8, 16, 24), four(2, 10, 18, 26), four(4, 12, 20, 28), four(6, 14, 22, 30));
  } else {  // 8m + t
    a = add_quads(sums[0], sums[1], sums[2], sums[3]), b = add_quads(sums[4], sums[5], sums[6], sums[7]);
    first = by_lane(four(0, 4, 8, 12), four(16, 20, 24, 28), four(2, 6, 10, 14), four(18, 22, 26, 30));
  }
  out[0] = _mm512_permutex2var_epi32(a, first, b);
  out[1] = _mm512_permutex2var_epi32(a, _mm512_add_epi32(first, _mm512_set1_epi32(1)), b);
}

}  // namespace
}  // namespace elute
