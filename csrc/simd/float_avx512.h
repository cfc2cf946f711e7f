// The float vocabulary on 16 lanes: AVX-512 F, BW, DQ, VL. See float_kernels_body.h for what each word promises.
// Only the 512-bit words that SIMDe 0.7.4 spells are used, so ELUTE_EMULATE_AVX512 tests the code that ships;
// tails and horizontal sums go through the two AVX2 halves on both.
#pragma once
#include "simd/float_avx2.h"

#if defined(ELUTE_EMULATE_AVX512)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#endif

namespace elute {
namespace {

struct FloatAvx512 {
  using Float = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kRows = 8;        // register tile: 8 rows x 2 sums + 2 values of 32 registers; 16 sums in flight
  static constexpr int kBlock = 2;       // vectors side by side in a widened tile
  static constexpr int kDirectRows = 8;  // up to here a tile is read once, so it is widened in registers
  // Sums per row when f16 is widened on load: at least 8 in flight where the tile has them, at most 24 in registers.
  static constexpr int direct_vectors(int rows) { return rows <= 2 ? 8 : rows <= 6 ? 4 : 2; }

  static Float zero() { return _mm512_setzero_ps(); }
  static Float set1(float x) { return _mm512_set1_ps(x); }
  static Float load(const float* p) { return _mm512_loadu_ps(p); }
  static Float load_n(const float* p, int n) {
    if (n <= Half::kLanes) return join(Half::load_n(p, n), Half::zero());
    return join(Half::load(p), Half::load_n(p + Half::kLanes, n - Half::kLanes));
  }
  static void store(float* p, Float a) { _mm512_storeu_ps(p, a); }
  static void store_n(float* p, Float a, int n) {
    if (n <= Half::kLanes) return Half::store_n(p, low(a), n);
    Half::store(p, low(a));
    Half::store_n(p + Half::kLanes, high(a), n - Half::kLanes);
  }

#if defined(ELUTE_EMULATE_AVX512)  // SIMDe 0.7.4 has no 512-bit f16 conversions
  static Float load(const uint16_t* p) { return join(Half::load(p), Half::load(p + Half::kLanes)); }
  static void store(uint16_t* p, Float a) {
    Half::store(p, low(a));
    Half::store(p + Half::kLanes, high(a));
  }
#else
  static Float load(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store(uint16_t* p, Float a) {
    const __m256i halves = _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
  }
#endif
  static Float load_n(const uint16_t* p, int n) {
    uint16_t whole[kLanes] = {};
    for (int i = 0; i < n; ++i) whole[i] = p[i];
    return load(whole);
  }
  static void store_n(uint16_t* p, Float a, int n) {
    uint16_t whole[kLanes];
    store(whole, a);
    for (int i = 0; i < n; ++i) p[i] = whole[i];
  }

  using Pairs = __m512i;
  using Ints = __m512i;
  static Pairs load_pairs(const int8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Pairs set1_pair(const int16_t* p) {
    int32_t both;
    __builtin_memcpy(&both, p, 4);
    return _mm512_set1_epi32(both);
  }
  static Ints zero_ints() { return _mm512_setzero_si512(); }
#if defined(ELUTE_EMULATE_AVX512)  // SIMDe 0.7.4 lacks these, and its alias of madd has the arguments of another
  static Ints add_products(Pairs a, Pairs b, Ints c) { return _mm512_add_epi32(c, simde_mm512_madd_epi16(a, b)); }
  static Float to_float(Ints a) {
    return join(_mm256_cvtepi32_ps(_mm512_castsi512_si256(a)), _mm256_cvtepi32_ps(_mm512_extracti64x4_epi64(a, 1)));
  }
  static void keep_in_register(Ints&) {}
#else
  static Ints add_products(Pairs a, Pairs b, Ints c) { return _mm512_dpwssd_epi32(c, a, b); }
  static Float to_float(Ints a) { return _mm512_cvtepi32_ps(a); }
  static void keep_in_register(Ints& a) { asm("" : "+v"(a)); }
#endif
  static void store(int16_t* p, Float a) { store_codes(p, a); }
  static void store(int8_t* p, Float a) { store_codes(p, a); }

  static constexpr int kShadowVectors = 8;  // 16 sums, 4 values, the residuals: 21 of 32 registers
#if defined(ELUTE_EMULATE_AVX512)
  static Ints round_to_ints(Float a) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(Half::round_to_ints(low(a))), Half::round_to_ints(high(a)), 1);
  }
  static uint32_t beyond(Float a, Float limit) {
    return Half::beyond(low(a), low(limit)) | Half::beyond(high(a), low(limit)) << Half::kLanes;
  }
  static uint32_t outside_int8(Ints a) {
    return Half::outside_int8(low(a)) | Half::outside_int8(high(a)) << Half::kLanes;
  }
  static void store_saturated(int8_t* p, Ints a) {
    Half::store_saturated(p, low(a));
    Half::store_saturated(p + Half::kLanes, high(a));
  }
#else
  static Ints round_to_ints(Float a) { return _mm512_cvtps_epi32(a); }
  static uint32_t beyond(Float a, Float limit) { return _mm512_cmp_ps_mask(abs(a), limit, _CMP_NLE_UQ); }
  static uint32_t outside_int8(Ints a) {
    return _mm512_cmpgt_epu32_mask(_mm512_add_epi32(a, _mm512_set1_epi32(128)), _mm512_set1_epi32(255));
  }
  static void store_saturated(int8_t* p, Ints a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(a));
  }
#endif
  static void store_ints(int32_t* p, Ints a) {
    Half::store_ints(p, low(a));
    Half::store_ints(p + Half::kLanes, high(a));
  }
  // `first` has outputs 0-7 and 16-23, `second` the others: bytes interleave within lanes of 16.
  static void add_rows(const int8_t* a, const int8_t* b, Pairs by, Ints& first, Ints& second) {
    const __m256i of_a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a));
    const __m256i of_b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
    first = add_products(_mm512_cvtepi8_epi16(_mm256_unpacklo_epi8(of_a, of_b)), by, first);
    second = add_products(_mm512_cvtepi8_epi16(_mm256_unpackhi_epi8(of_a, of_b)), by, second);
  }
  static void store_rows(int32_t* p, Ints first, Ints second) {
    Half::store_ints(p, low(first));
    Half::store_ints(p + 8, low(second));
    Half::store_ints(p + 16, high(first));
    Half::store_ints(p + 24, high(second));
  }

  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float div(Float a, Float b) { return _mm512_div_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
  static Float abs(Float a) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), a); }
  static Float select_less(Float a, Float b, Float then, Float otherwise) {
    return _mm512_mask_mov_ps(otherwise, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), then);
  }
  static Float shift_to_exponent(Float a) {
    const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(a), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(127 << 23)));
  }
  static float first(Float a) { return Half::first(low(a)); }
  static float sum(Float a) { return Half::sum(Half::add(low(a), high(a))); }
  static float largest(Float a) { return Half::largest(Half::max(low(a), high(a))); }

  struct Wide {
    FloatAvx2::Wide low, high;
  };
  static Wide wide_zero() { return {Half::wide_zero(), Half::wide_zero()}; }
  static Wide add_wide(Wide w, Float a) { return {Half::add_wide(w.low, low(a)), Half::add_wide(w.high, high(a))}; }
  static double sum_wide(Wide w) { return Half::sum_wide(w.low) + Half::sum_wide(w.high); }

 private:
  using Half = FloatAvx2;
  template <class Code>
  static void store_codes(Code* p, Float a) {
    Half::store(p, low(a));
    Half::store(p + Half::kLanes, high(a));
  }
  static __m256i low(Ints a) { return _mm512_castsi512_si256(a); }
  static __m256i high(Ints a) { return _mm512_extracti64x4_epi64(a, 1); }
  static __m256 low(Float a) { return _mm512_castps512_ps256(a); }
  static __m256 high(Float a) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1)); }
  static Float join(__m256 a, __m256 b) {
    return _mm512_castpd_ps(
        _mm512_insertf64x4(_mm512_castps_pd(_mm512_castps256_ps512(a)), _mm256_castps_pd(b), 1));
  }
};

}  // namespace
}  // namespace elute
