// The integer vocabulary in NEON with dot products (ARMv8.2-A FEAT_DotProd), and with mixed-sign dot products where
// the file that includes it is compiled for FEAT_I8MM. See integer_scalar.h for what each word means.
#pragma once
#include <arm_neon.h>

#include <cstdint>

namespace elute {
namespace {

constexpr int kBytes = 16;
using Bytes = uint8x16_t;
using Ints = int32x4_t;
using Floats = float32x4_t;
constexpr int kLanes = kBytes / 4;
constexpr int kGemmRows = 3;  // 3 rows * 8 vectors of sums = 24 registers; + 3 of activations + codes passing through

inline Bytes load_bytes(const uint8_t* p) { return vld1q_u8(p); }
inline void prefetch(const uint8_t* p) { __builtin_prefetch(p); }
inline Bytes low_nibbles(Bytes v) { return vandq_u8(v, vdupq_n_u8(15)); }
inline Bytes high_nibbles(Bytes v) { return vshrq_n_u8(v, 4); }
inline Bytes lookup(Bytes table, Bytes index) { return vqtbl1q_u8(table, index); }
template <int Planes>
inline Bytes tables(const uint8_t* p) { return load_bytes(p); }

// Sums of looked-up bytes. A 4-plane vector holds [p0 p1 p2 p3] of 4 outputs, a 2-plane one [p0 p1] of 8, a 1-plane
// one 16 outputs.
template <int Planes>
struct Sum {
  uint16x8_t low = vdupq_n_u16(0), high = vdupq_n_u16(0);  // 16 quads * 255 fit
  void add(Bytes v) {
    low = vaddw_u8(low, vget_low_u8(v));
    high = vaddw_high_u8(high, v);
  }
  static void total(const Sum* sums, Ints* out) {
    for (int v = 0; v < Planes; ++v) {
      weighed(sums[v].low, out + 4 / Planes * v);
      weighed(sums[v].high, out + 4 / Planes * v + 2 / Planes);
    }
  }

 private:
  static void weighed(uint16x8_t sums, Ints* out) {
    if constexpr (Planes == 2) {
      // p0 + p1 as 32 bits, and p1 once more.
      const uint32x4_t both = vpaddlq_u16(sums);
      out[0] = vreinterpretq_s32_u32(vsraq_n_u32(both, vreinterpretq_u32_u16(sums), 16));
    } else {
      out[0] = vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(sums)));
      out[1] = vreinterpretq_s32_u32(vmovl_high_u16(sums));
    }
  }
};

template <>
struct Sum<4> {
  uint32x4_t s = vdupq_n_u32(0);
  void add(Bytes v) { s = vdotq_u32(s, v, vreinterpretq_u8_u32(vdupq_n_u32(0x08040201))); }
  static void total(const Sum* sums, Ints* out) {
    for (int v = 0; v < 4; ++v) out[v] = vreinterpretq_s32_u32(sums[v].s);
  }
};

inline Ints set_ints(int32_t x) { return vdupq_n_s32(x); }
inline Ints add_ints(Ints a, Ints b) { return vaddq_s32(a, b); }
template <int Shift>
inline Ints shift_left(Ints a) { return vshlq_n_s32(a, Shift); }

inline Floats zero_floats() { return vdupq_n_f32(0); }
inline Floats set_floats(float x) { return vdupq_n_f32(x); }
inline Floats to_floats(Ints a) { return vcvtq_f32_s32(a); }
inline Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
inline Floats sub(Floats a, Floats b) { return vsubq_f32(a, b); }
inline Floats mul(Floats a, Floats b) { return vmulq_f32(a, b); }
inline Floats load_floats(const float* p) { return vld1q_f32(p); }
inline void store_floats(float* p, Floats a) { vst1q_f32(p, a); }
inline Floats load_halves(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }

// Multiply: codes u8 [4 outputs][4 channels] by one quad of activations.
template <int Bits>
struct Dot {
  static constexpr int kRun = 16;
  using Partial = int32x4_t;
  static Partial zero() { return vdupq_n_s32(0); }
  static Ints total(Partial p) { return p; }
#if defined(__ARM_FEATURE_MATMUL_INT8)
  static constexpr int kCodeBias = 0;
  static void add(Partial& p, Bytes codes, Bytes q) { p = vusdotq_s32(p, codes, vreinterpretq_s8_u8(q)); }
#else
  // Without mixed signs, 8-bit codes are multiplied as code - 128; narrower ones are the same with a sign.
  static constexpr int kCodeBias = Bits == 8 ? 128 : 0;
  static void add(Partial& p, Bytes codes, Bytes q) {
    if constexpr (Bits == 8) codes = veorq_u8(codes, vdupq_n_u8(128));
    p = vdotq_s32(p, vreinterpretq_s8_u8(codes), vreinterpretq_s8_u8(q));
  }
#endif
};
inline void keep_in_register(int32x4_t& v) { asm("" : "+w"(v)); }
inline void keep_in_register(uint8x16_t& v) { asm("" : "+w"(v)); }
inline Bytes broadcast_quad(const int8_t* q) {
  uint32_t word;
  __builtin_memcpy(&word, q, 4);
  return vreinterpretq_u8_u32(vdupq_n_u32(word));
}

// Two-level lookup, level 1, as in integer_avx2.h: tables give the bits of channels (0, 1) and (2, 3) as one byte each.
template <int Planes>
inline void spread(Bytes nibbles, Bytes* out) {
  constexpr uint8_t low_pairs[16] = {0, 1, 16, 17, 0, 1, 16, 17, 0, 1, 16, 17, 0, 1, 16, 17};
  constexpr uint8_t high_pairs[16] = {0, 0, 0, 0, 1, 1, 1, 1, 16, 16, 16, 16, 17, 17, 17, 17};
  const Bytes low = lookup(vld1q_u8(low_pairs), nibbles), high = lookup(vld1q_u8(high_pairs), nibbles);
  // w: 16-bit lanes c | d<<4, above it anything -> a byte a code
  const auto codes = [](uint16x8_t w) {
    return vandq_u8(vreinterpretq_u8_u16(vsliq_n_u16(w, w, 4)), vdupq_n_u8(15));
  };
  if constexpr (Planes == 4) {
    const uint8x16_t weigh = vreinterpretq_u8_u32(vdupq_n_u32(0x08040201));
    const uint32x4_t none = vdupq_n_u32(0);
    out[0] = codes(vreinterpretq_u16_u32(vsliq_n_u32(vdotq_u32(none, low, weigh), vdotq_u32(none, high, weigh), 16)));
  } else {
    const Bytes pairs[2] = {low, high};
    uint16x8_t first[2], second[2];  // of the vector's first and second half: a 16-bit lane an output
    for (int i = 0; i < 2; ++i) {
      if constexpr (Planes == 2) {
        const uint16x8_t words = vreinterpretq_u16_u8(pairs[i]);
        first[i] = vsraq_n_u16(words, words, 7);  // p0 + 2 p1 in the low byte
      } else {
        first[i] = vmovl_u8(vget_low_u8(pairs[i]));
        second[i] = vmovl_high_u8(pairs[i]);
      }
    }
    out[0] = codes(vzip1q_u16(first[0], first[1]));
    out[1] = codes(vzip2q_u16(first[0], first[1]));
    if constexpr (Planes == 1) {
      out[2] = codes(vzip1q_u16(second[0], second[1]));
      out[3] = codes(vzip2q_u16(second[0], second[1]));
    }
  }
}
template <int Shift>
inline Bytes shift_bytes_left(Bytes a) { return vshlq_n_u8(a, Shift); }
inline Bytes or_bytes(Bytes a, Bytes b) { return vorrq_u8(a, b); }
inline void store_bytes(uint8_t* p, Bytes a) { vst1q_u8(p, a); }

}  // namespace
}  // namespace elute
