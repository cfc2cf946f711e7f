// The float vocabulary on 8 lanes: AVX2, FMA and F16C. See float_kernels_body.h for what each word promises.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace elute {
namespace {

struct FloatAvx2 {
  using Float = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kRows = 6;        // register tile: 6 rows x 2 sums + 2 values + 1 weight = 15 of 16 registers
  static constexpr int kBlock = 2;       // vectors side by side in a widened tile
  static constexpr int kDirectRows = 6;  // up to here a tile is read once, so it is widened in registers
  // Sums per row when f16 is widened on load: at least 8 in flight (latency 4 x 2 a cycle), at most 12 in registers.
  static constexpr int direct_vectors(int rows) { return rows == 1 ? 8 : rows <= 3 ? 4 : 2; }

  static Float zero() { return _mm256_setzero_ps(); }
  static Float set1(float x) { return _mm256_set1_ps(x); }
  static Float load(const float* p) { return _mm256_loadu_ps(p); }
  static Float load_n(const float* p, int n) { return _mm256_maskload_ps(p, mask(n)); }
  static void store(float* p, Float a) { _mm256_storeu_ps(p, a); }
  static void store_n(float* p, Float a, int n) { _mm256_maskstore_ps(p, mask(n), a); }

  static Float load(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Float load_n(const uint16_t* p, int n) {
    uint16_t whole[kLanes] = {};
    for (int i = 0; i < n; ++i) whole[i] = p[i];
    return load(whole);
  }
  static void store(uint16_t* p, Float a) {
    const __m128i halves = _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
  }
  static void store_n(uint16_t* p, Float a, int n) {
    uint16_t whole[kLanes];
    store(whole, a);
    for (int i = 0; i < n; ++i) p[i] = whole[i];
  }

  using Pairs = __m256i;
  using Ints = __m256i;
  static Pairs load_pairs(const int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Pairs set1_pair(const int16_t* p) {
    int32_t both;
    __builtin_memcpy(&both, p, 4);
    return _mm256_set1_epi32(both);
  }
  static Ints zero_ints() { return _mm256_setzero_si256(); }
  static Ints add_products(Pairs a, Pairs b, Ints c) { return _mm256_add_epi32(c, _mm256_madd_epi16(a, b)); }
  static Float to_float(Ints a) { return _mm256_cvtepi32_ps(a); }
  static void keep_in_register(Ints& a) { asm("" : "+x"(a)); }
  static void store(int16_t* p, Float a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_int16(a)); }
  static void store(int8_t* p, Float a) {
    const __m128i words = to_int16(a);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
  }

  static constexpr int kShadowVectors = 4;  // 8 sums, 4 values, the residuals: 13 of 16 registers
  static Ints round_to_ints(Float a) { return _mm256_cvtps_epi32(a); }
  static uint32_t beyond(Float a, Float limit) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(abs(a), limit, _CMP_NLE_UQ)));
  }
  static uint32_t outside_int8(Ints a) {
    const __m256i above = _mm256_cmpgt_epi32(a, _mm256_set1_epi32(127));
    const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(-128), a);
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_or_si256(above, below))));
  }
  static void store_ints(int32_t* p, Ints a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
  static void store_saturated(int8_t* p, Ints a) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
  }
  static void add_rows(const int8_t* a, const int8_t* b, Pairs by, Ints& first, Ints& second) {
    const __m128i of_a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a));
    const __m128i of_b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b));
    first = add_products(_mm256_cvtepi8_epi16(_mm_unpacklo_epi8(of_a, of_b)), by, first);
    second = add_products(_mm256_cvtepi8_epi16(_mm_unpackhi_epi8(of_a, of_b)), by, second);
  }
  static void store_rows(int32_t* p, Ints first, Ints second) {
    store_ints(p, first);
    store_ints(p + kLanes, second);
  }

  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float div(Float a, Float b) { return _mm256_div_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
  static Float abs(Float a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static Float select_less(Float a, Float b, Float then, Float otherwise) {
    return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
  }
  static Float shift_to_exponent(Float a) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(a), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(127 << 23)));
  }
  static float first(Float a) { return _mm256_cvtss_f32(a); }
  static float sum(Float a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static float largest(Float a) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  }

  struct Wide {
    __m256d low, high;
  };
  static Wide wide_zero() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
  static Wide add_wide(Wide w, Float a) {
    return {_mm256_add_pd(w.low, _mm256_cvtps_pd(_mm256_castps256_ps128(a))),
            _mm256_add_pd(w.high, _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)))};
  }
  static double sum_wide(Wide w) {
    const __m256d four = _mm256_add_pd(w.low, w.high);
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }

 private:
  static __m128i to_int16(Float a) {
    const __m256i rounded = _mm256_cvtps_epi32(a);
    return _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  }
  static __m256i mask(int n) {
    alignas(32) static constexpr int32_t window[2 * kLanes] = {-1, -1, -1, -1, -1, -1, -1, -1};
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(window + kLanes - n));
  }
};

}  // namespace
}  // namespace elute
