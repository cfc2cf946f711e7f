// The float vocabulary on 4 lanes: NEON of any ARMv8. See float_kernels_body.h for what each word promises.
#pragma once
#include <arm_neon.h>

#include <cstdint>

namespace elute {
namespace {

struct FloatNeon {
  using Float = float32x4_t;
  static constexpr int kLanes = 4;
  static constexpr int kRows = 6;        // register tile: 6 rows x 4 sums + 4 values + 1 weight = 29 of 32 registers
  static constexpr int kBlock = 4;       // vectors side by side in a widened tile
  static constexpr int kDirectRows = 6;  // up to here a tile is read once, so it is widened in registers
  // Sums per row when f16 is widened on load: at least 8 in flight (latency 4 x 2 a cycle), at most 24 in registers.
  static constexpr int direct_vectors(int rows) { return rows <= 3 ? 8 : 4; }

  static Float zero() { return vdupq_n_f32(0); }
  static Float set1(float x) { return vdupq_n_f32(x); }
  static Float load(const float* p) { return vld1q_f32(p); }
  static Float load_n(const float* p, int n) {
    float whole[kLanes] = {};
    for (int i = 0; i < n; ++i) whole[i] = p[i];
    return load(whole);
  }
  static void store(float* p, Float a) { vst1q_f32(p, a); }
  static void store_n(float* p, Float a, int n) {
    float whole[kLanes];
    store(whole, a);
    for (int i = 0; i < n; ++i) p[i] = whole[i];
  }

  static Float load(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  static Float load_n(const uint16_t* p, int n) {
    uint16_t whole[kLanes] = {};
    for (int i = 0; i < n; ++i) whole[i] = p[i];
    return load(whole);
  }
  static void store(uint16_t* p, Float a) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a))); }
  static void store_n(uint16_t* p, Float a, int n) {
    uint16_t whole[kLanes];
    store(whole, a);
    for (int i = 0; i < n; ++i) p[i] = whole[i];
  }

  using Pairs = int16x8_t;
  using Ints = int32x4_t;
  static Pairs load_pairs(const int8_t* p) { return vmovl_s8(vld1_s8(p)); }
  static Pairs set1_pair(const int16_t* p) {
    int32_t both;
    __builtin_memcpy(&both, p, 4);
    return vreinterpretq_s16_s32(vdupq_n_s32(both));
  }
  static Ints zero_ints() { return vdupq_n_s32(0); }
  static Ints add_products(Pairs a, Pairs b, Ints c) {
    const int32x4_t low = vmull_s16(vget_low_s16(a), vget_low_s16(b));
    return vaddq_s32(c, vpaddq_s32(low, vmull_high_s16(a, b)));
  }
  static Float to_float(Ints a) { return vcvtq_f32_s32(a); }
  static void keep_in_register(Ints&) {}
  static void store(int16_t* p, Float a) { vst1_s16(p, vqmovn_s32(vcvtnq_s32_f32(a))); }
  static void store(int8_t* p, Float a) {
    const int16x4_t words = vqmovn_s32(vcvtnq_s32_f32(a));
    const int8x8_t bytes = vqmovn_s16(vcombine_s16(words, words));
    __builtin_memcpy(p, &bytes, kLanes);
  }

  static constexpr int kShadowVectors = 8;  // 16 sums, 4 values, the residuals: 21 of 32 registers
  static Ints round_to_ints(Float a) { return vcvtnq_s32_f32(a); }
  static uint32_t beyond(Float a, Float limit) { return ~lanes(vcaleq_f32(a, limit)) & 15u; }
  static uint32_t outside_int8(Ints a) {
    const uint32x4_t from_least = vreinterpretq_u32_s32(vaddq_s32(a, vdupq_n_s32(128)));
    return lanes(vcgtq_u32(from_least, vdupq_n_u32(255)));
  }
  static void store_ints(int32_t* p, Ints a) { vst1q_s32(p, a); }
  static void store_saturated(int8_t* p, Ints a) {
    const int16x4_t words = vqmovn_s32(a);
    const int8x8_t bytes = vqmovn_s16(vcombine_s16(words, words));
    __builtin_memcpy(p, &bytes, kLanes);
  }
  // Products by a lane need no pairs.
  static void add_rows(const int8_t* a, const int8_t* b, Pairs by, Ints& first, Ints& second) {
    const int16x8_t of_a = vmovl_s8(vld1_s8(a)), of_b = vmovl_s8(vld1_s8(b));
    first = vmlal_laneq_s16(vmlal_laneq_s16(first, vget_low_s16(of_a), by, 0), vget_low_s16(of_b), by, 1);
    second = vmlal_high_laneq_s16(vmlal_high_laneq_s16(second, of_a, by, 0), of_b, by, 1);
  }
  static void store_rows(int32_t* p, Ints first, Ints second) {
    vst1q_s32(p, first);
    vst1q_s32(p + kLanes, second);
  }

  static Float add(Float a, Float b) { return vaddq_f32(a, b); }
  static Float sub(Float a, Float b) { return vsubq_f32(a, b); }
  static Float mul(Float a, Float b) { return vmulq_f32(a, b); }
  static Float div(Float a, Float b) { return vdivq_f32(a, b); }
  static Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
  // FMAX gives NaN where either is NaN, wanted is b.
  static Float max(Float a, Float b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static Float abs(Float a) { return vabsq_f32(a); }
  static Float select_less(Float a, Float b, Float then, Float otherwise) {
    return vbslq_f32(vcltq_f32(a, b), then, otherwise);
  }
  static Float shift_to_exponent(Float a) {
    const int32x4_t exponent = vshlq_n_s32(vreinterpretq_s32_f32(a), 23);
    return vreinterpretq_f32_s32(vaddq_s32(exponent, vdupq_n_s32(127 << 23)));
  }
  static float first(Float a) { return vgetq_lane_f32(a, 0); }
  static float sum(Float a) { return vaddvq_f32(a); }
  static float largest(Float a) { return vmaxvq_f32(a); }

  struct Wide {
    float64x2_t low, high;
  };
  static Wide wide_zero() { return {vdupq_n_f64(0), vdupq_n_f64(0)}; }
  static Wide add_wide(Wide w, Float a) {
    return {vaddq_f64(w.low, vcvt_f64_f32(vget_low_f32(a))), vaddq_f64(w.high, vcvt_high_f64_f32(a))};
  }
  static double sum_wide(Wide w) { return vaddvq_f64(vaddq_f64(w.low, w.high)); }

 private:
  static uint32_t lanes(uint32x4_t mask) {
    static constexpr uint32_t bits[kLanes] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(mask, vld1q_u32(bits)));
  }
};

}  // namespace
}  // namespace elute
