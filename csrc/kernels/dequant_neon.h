// Level 1 of the two-level lookup in NEON: where other levels look nibbles up, shifts and selections transpose the bits
// of 32 outputs at once.
#pragma once
#include <arm_neon.h>

#include "kernels/groups_body.h"

namespace elute {
namespace {

// Fields of Width bits of a and b side by side: `even` has fields 0, 2, .. of a, each followed by b's, `odd` the others.
// Without b its fields are 0.
template <int Width, bool HasB>
inline void interleave(uint8x16_t a, uint8x16_t b, uint8x16_t& even, uint8x16_t& odd) {
  const uint8x16_t fields_of_a = vdupq_n_u8(Width == 1 ? 0x55 : 0x33);
  if constexpr (HasB) {
    even = vbslq_u8(fields_of_a, a, vshlq_n_u8(b, Width));
    odd = vbslq_u8(fields_of_a, vshrq_n_u8(a, Width), b);
  } else {
    even = vandq_u8(fields_of_a, a);
    odd = vandq_u8(fields_of_a, vshrq_n_u8(a, Width));
  }
}

// 1 to 4 planes of a quad to its 4 channels. Bits of a byte, highest first: 0p to 3p those of plane p at channels 0 to 3 of
// the output in the low nibble, ap to dp of the one in the high nibble.
//   plane p              dp cp bp ap 3p 2p 1p 0p
//   planes 0, 1, even    c1 c0 a1 a0 21 20 01 00     and of planes 2, 3
//   planes 0, 1, odd     d1 d0 b1 b0 31 30 11 10
//   channel 0            a3 a2 a1 a0 03 02 01 00     channel 2 from the fields between; 1 and 3 from odd
template <int Planes>
inline void transpose(const uint8x16_t* planes, uint8x16_t* channels) {
  uint8x16_t even[2], odd[2];
  interleave<1, (Planes > 1)>(planes[0], planes[Planes > 1], even[0], odd[0]);
  if constexpr (Planes > 2) interleave<1, (Planes > 3)>(planes[2], planes[Planes - 1], even[1], odd[1]);
  interleave<2, (Planes > 2)>(even[0], even[Planes > 2], channels[0], channels[2]);
  interleave<2, (Planes > 2)>(odd[0], odd[Planes > 2], channels[1], channels[3]);
}

// The planes of one quad, byte j of each: output j in the low nibble, j + 16 in the high one.
template <int Bits>
struct Planes {
  uint8x16_t of[Bits];

  Planes(const uint8_t* block_planes, int block_quads, int quad) {
    for_each_section<Bits>([&]<int First, int Count>() __attribute__((always_inline)) {
      const uint8_t* at = block_planes + kHalfPanel * (block_quads * First + quad * Count);
      if constexpr (Count == 4) {
        const uint8x16x4_t four = vld4q_u8(at);
        for (int i = 0; i < 4; ++i) of[First + i] = four.val[i];
      } else if constexpr (Count == 2) {
        const uint8x16x2_t two = vld2q_u8(at);
        for (int i = 0; i < 2; ++i) of[First + i] = two.val[i];
      } else {
        of[First] = vld1q_u8(at);
      }
    });
  }
};

// Codes of the outputs in low and in high nibbles: byte j of val[c], at channel c, of the outputs of byte j of the planes.
struct Codes {
  uint8x16x4_t low, high;
};
template <int Bits>
inline Codes codes_of(const uint8x16_t* planes) {
  uint8x16_t channels[4], upper[4];
  transpose<smaller(Bits, 4)>(planes, channels);
  if constexpr (Bits > 4) transpose<Bits - 4>(planes + 4, upper);
  Codes codes;
  for (int c = 0; c < 4; ++c) {
    codes.low.val[c] = Bits > 4 ? vsliq_n_u8(channels[c], upper[c], 4) : vandq_u8(channels[c], vdupq_n_u8(15));
    codes.high.val[c] = Bits > 4 ? vsriq_n_u8(upper[c], channels[c], 4) : vshrq_n_u8(channels[c], 4);
  }
  return codes;
}

// store(quad, its codes) for each quad of whole blocks; the row's last block may be shorter.
template <int Bits, typename F>
ELUTE_INLINE void for_each_quad(const uint8_t* planes, int n_quads, F&& store) {
  for (int first = 0; first < n_quads; first += kBlockQuads) {
    const int block_quads = smaller(kBlockQuads, n_quads - first);
    for (int quad = 0; quad < block_quads; ++quad)
      store(first + quad, codes_of<Bits>(Planes<Bits>(planes, block_quads, quad).of));
    planes += block_quads * kHalfPanel * Bits;
  }
}

// Codes u8 [kPanel][kLutWidth] of a quad.
constexpr int kQuadCodes = kPanel * kLutWidth;
inline void store_codes(const Codes& codes, uint8_t* to) {
  vst4q_u8(to, codes.low);
  vst4q_u8(to + kQuadCodes / 2, codes.high);
}

// Codes u8 [quad][kPanel][kLutWidth].
template <int Bits>
void dequant_quads(const uint8_t* planes, int n_quads, uint8_t* codes) {
  for_each_quad<Bits>(planes, n_quads, [&](int quad, const Codes& of_quad) __attribute__((always_inline)) {
    store_codes(of_quad, codes + int64_t{quad} * kQuadCodes);
  });
}

}  // namespace
}  // namespace elute
