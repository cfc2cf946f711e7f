// The words of bench/layouts.cpp for AVX2 and for AVX-512 with VNNI, as csrc/simd has them for the kernels.
#pragma once
#include <immintrin.h>

#include <cstdint>

#define INLINE inline __attribute__((always_inline))
namespace {

#ifdef __AVX512VNNI__
constexpr int kBytes = 64;
using Bytes = __m512i;
using Floats = __m512;
INLINE Bytes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
INLINE void store(uint8_t* p, Bytes v) { _mm512_storeu_si512(p, v); }
INLINE Bytes join(const uint8_t* a, const uint8_t* b) {  // 32 bytes of each
  const __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)a));
  return _mm512_inserti64x4(low, _mm256_loadu_si256((const __m256i*)b), 1);
}
INLINE Bytes table(const uint8_t* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p)); }
INLINE Bytes two_tables(const uint8_t* p) {
  const __m512i both = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_shuffle_i32x4(both, both, 0b01'01'00'00);
}
INLINE Bytes low(Bytes v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
INLINE Bytes high(Bytes v) { return low(_mm512_srli_epi16(v, 4)); }
INLINE Bytes lookup(Bytes table, Bytes index) { return _mm512_shuffle_epi8(table, index); }
template <int Bits>
INLINE Bytes weigh(Bytes sum, Bytes v) {  // 4 bits: a 32-bit sum an output; 2 bits: a 16-bit one
  if constexpr (Bits == 4) return _mm512_dpbusd_epi32(sum, v, _mm512_set1_epi32(0x08040201));
  return _mm512_add_epi16(sum, _mm512_maddubs_epi16(v, _mm512_set1_epi16(0x0201)));
}
template <int Bits, bool TwoQuads>
INLINE void widen(Bytes sum, Bytes* ints) {
  const __m256i a = _mm512_castsi512_si256(sum), b = _mm512_extracti64x4_epi64(sum, 1);
  if constexpr (Bits == 4) ints[0] = sum;
  else if constexpr (TwoQuads) ints[0] = _mm512_cvtepi16_epi32(_mm256_add_epi16(a, b));
  else ints[0] = _mm512_cvtepi16_epi32(a), ints[1] = _mm512_cvtepi16_epi32(b);
}
INLINE Floats floats(Bytes ints, int32_t constant) { return _mm512_cvtepi32_ps(_mm512_add_epi32(ints, _mm512_set1_epi32(constant))); }
INLINE Floats zero() { return _mm512_setzero_ps(); }
INLINE Floats load(const float* p) { return _mm512_loadu_ps(p); }
INLINE Floats halves(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
INLINE void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
INLINE Floats add_product(Floats y, Floats scale, float act, Floats x) {
  return _mm512_add_ps(y, _mm512_mul_ps(scale, _mm512_mul_ps(_mm512_set1_ps(act), x)));
}
#else
constexpr int kBytes = 32;
using Bytes = __m256i;
using Floats = __m256;
INLINE Bytes load(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
INLINE void store(uint8_t* p, Bytes v) { _mm256_storeu_si256((__m256i*)p, v); }
INLINE Bytes join(const uint8_t* a, const uint8_t*) { return load(a); }  // never two quads a vector
INLINE Bytes table(const uint8_t* p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p)); }
INLINE Bytes two_tables(const uint8_t* p) { return table(p); }
INLINE Bytes low(Bytes v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
INLINE Bytes high(Bytes v) { return low(_mm256_srli_epi16(v, 4)); }
INLINE Bytes lookup(Bytes table, Bytes index) { return _mm256_shuffle_epi8(table, index); }
template <int Bits>
INLINE Bytes weigh(Bytes sum, Bytes v) {  // 4 bits: 16-bit sums [p0 + 2 p1, p2 + 2 p3]
  return _mm256_add_epi16(sum, _mm256_maddubs_epi16(v, _mm256_set1_epi16(0x0201)));
}
template <int Bits, bool TwoQuads>
INLINE void widen(Bytes sum, Bytes* ints) {
  if constexpr (Bits == 4) ints[0] = _mm256_madd_epi16(sum, _mm256_set1_epi32(0x00040001));
  else ints[0] = _mm256_cvtepi16_epi32(_mm256_castsi256_si128(sum)), ints[1] = _mm256_cvtepi16_epi32(_mm256_extracti128_si256(sum, 1));
}
INLINE Floats floats(Bytes ints, int32_t constant) { return _mm256_cvtepi32_ps(_mm256_add_epi32(ints, _mm256_set1_epi32(constant))); }
INLINE Floats zero() { return _mm256_setzero_ps(); }
INLINE Floats load(const float* p) { return _mm256_loadu_ps(p); }
INLINE Floats halves(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
INLINE void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
INLINE Floats add_product(Floats y, Floats scale, float act, Floats x) {
  return _mm256_add_ps(y, _mm256_mul_ps(scale, _mm256_mul_ps(_mm256_set1_ps(act), x)));
}
#endif
constexpr int kLanes = kBytes / 4;
INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

}  // namespace
