// The words of the integer vocabulary that both ARM levels spell alike: NEON with dot products (ARMv8.2-A FEAT_DotProd).
// See integer_scalar.h for what each word means; integer_neon_dot.h and integer_neon_i8mm.h add the products.
#pragma once
#include <arm_neon.h>

#include <cstdint>

#include "kernels/matmul.h"

namespace elute {
namespace {

constexpr int kBytes = 16;
constexpr bool kFixedSegments = false;  // not measured
using Bytes = uint8x16_t;
using Ints = int32x4_t;
using Floats = float32x4_t;
constexpr int kLanes = kBytes / 4;

inline Bytes load_bytes(const uint8_t* p) { return vld1q_u8(p); }
ELUTE_INLINE void prefetch(const uint8_t* p) { __builtin_prefetch(p); }
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

template <int Planes>
inline Bytes load_positions(const uint8_t* section, int part) { return load_bytes(section + 16 * (part % Planes)); }
inline void interleave_channels(const Bytes (&channels)[4], Bytes (&out)[4]) {
  const uint16x8_t first_a = vreinterpretq_u16_u8(vzip1q_u8(channels[0], channels[1]));
  const uint16x8_t first_b = vreinterpretq_u16_u8(vzip1q_u8(channels[2], channels[3]));
  const uint16x8_t last_a = vreinterpretq_u16_u8(vzip2q_u8(channels[0], channels[1]));
  const uint16x8_t last_b = vreinterpretq_u16_u8(vzip2q_u8(channels[2], channels[3]));
  out[0] = vreinterpretq_u8_u16(vzip1q_u16(first_a, first_b));
  out[1] = vreinterpretq_u8_u16(vzip2q_u16(first_a, first_b));
  out[2] = vreinterpretq_u8_u16(vzip1q_u16(last_a, last_b));
  out[3] = vreinterpretq_u8_u16(vzip2q_u16(last_a, last_b));
}
template <int Planes, int Half>
inline Bytes position_codes(Bytes v, int part) {
  const int8x16_t shift = vdupq_n_s8(static_cast<int8_t>(-((4 * Half + part) / Planes * Planes)));
  return vandq_u8(vshlq_u8(v, shift), vdupq_n_u8((1 << Planes) - 1));
}
// Codes below 16 are the same with a sign.
template <int Planes>
struct SectionDot {
  static constexpr int kRun = 16;
  using Partial = int32x4_t;
  static int centre(int, int) { return 0; }
  static Partial start(uint32_t, int) { return vdupq_n_s32(0); }
  static void add(Partial& p, Bytes codes, Bytes q) {
    p = vdotq_s32(p, vreinterpretq_s8_u8(codes), vreinterpretq_s8_u8(q));
  }
  template <int Half>
  static Bytes operand(Bytes positions, int part) { return position_codes<Planes, Half>(positions, part); }
  template <int Half>
  static Ints total(Partial p) { return p; }
};

template <int Shift>
inline Bytes shift_bytes_left(Bytes codes) { return vshlq_n_u8(codes, Shift); }
inline Bytes or_bytes(Bytes a, Bytes b) { return vorrq_u8(a, b); }
inline void store_bytes(uint8_t* p, Bytes v) { vst1q_u8(p, v); }

inline void keep_in_register(int32x4_t& v) { asm("" : "+w"(v)); }
inline Bytes broadcast_quad(const int8_t* q) {
  uint32_t word;
  __builtin_memcpy(&word, q, 4);
  return vreinterpretq_u8_u32(vdupq_n_u32(word));
}

}  // namespace
}  // namespace elute
