// The integer vocabulary of the matmul kernels, spelled in plain C++: what each word means, and what runs anywhere.
// Every ISA header defines the same words; kernels/matmul_body.h is written in them once.
#pragma once
#include <cstdint>

#include "kernels/matmul.h"

namespace elute {
namespace {

constexpr int kBytes = 16;                // width of a vector
constexpr bool kFixedSegments = false;  // more code of this level takes GCC 12 minutes
constexpr int kLanes = kBytes / 4;        // 32-bit lanes
constexpr int kGemmRows = 1;              // rows that lut_gemm multiplies at once
struct Bytes { uint8_t v[kBytes]; };
struct Ints { int32_t v[kLanes]; };
struct Floats { float v[kLanes]; };

inline Bytes load_bytes(const uint8_t* p) {
  Bytes r;
  __builtin_memcpy(r.v, p, kBytes);
  return r;
}
// Inlined by force: GCC 12 drops calls of a function that does nothing else.
ELUTE_INLINE void prefetch(const uint8_t* p) { __builtin_prefetch(p); }
inline Bytes low_nibbles(Bytes a) {
  for (uint8_t& x : a.v) x &= 15;
  return a;
}
inline Bytes high_nibbles(Bytes a) {
  for (uint8_t& x : a.v) x = x >> 4;
  return a;
}
// Within each 16-byte lane: result[i] = table[index[i]].
inline Bytes lookup(Bytes table, Bytes index) {
  for (uint8_t& x : index.v) x = table.v[x];
  return index;
}
// The tables of the quads that one vector of a Planes-plane section covers, each repeated over the quad's lanes.
template <int Planes>
inline Bytes tables(const uint8_t* p) { return load_bytes(p); }

// Sums looked-up bytes of a section over quads. total() takes all the vectors of one half panel and gives its 16
// outputs, planes weighed by 1, 2, 4, 8 within the section.
template <int Planes>
struct Sum {
  int32_t s[kBytes] = {};
  void add(const Bytes& a) {
    for (int i = 0; i < kBytes; ++i) s[i] += a.v[i];
  }
  static void total(const Sum* sums, Ints* out) {
    for (int output = 0; output < 16; ++output) {
      int32_t t = 0;
      for (int plane = 0; plane < Planes; ++plane) {
        const int at = output * Planes + plane;
        t += sums[at / kBytes].s[at % kBytes] << plane;
      }
      out[output / kLanes].v[output % kLanes] = t;
    }
  }
};

inline Ints set_ints(int32_t x) { return {{x, x, x, x}}; }
inline Ints add_ints(Ints a, Ints b) {
  for (int i = 0; i < kLanes; ++i) a.v[i] += b.v[i];
  return a;
}
template <int Shift>
inline Ints shift_left(Ints a) {
  for (int32_t& x : a.v) x *= 1 << Shift;
  return a;
}

inline Floats set_floats(float x) { return {{x, x, x, x}}; }
inline Floats zero_floats() { return set_floats(0); }
inline Floats to_floats(Ints a) {
  Floats r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = static_cast<float>(a.v[i]);
  return r;
}
inline Floats add(Floats a, Floats b) {
  for (int i = 0; i < kLanes; ++i) a.v[i] += b.v[i];
  return a;
}
inline Floats sub(Floats a, Floats b) {
  for (int i = 0; i < kLanes; ++i) a.v[i] -= b.v[i];
  return a;
}
inline Floats mul(Floats a, Floats b) {
  for (int i = 0; i < kLanes; ++i) a.v[i] *= b.v[i];
  return a;
}
inline Floats load_floats(const float* p) {
  Floats r;
  __builtin_memcpy(r.v, p, sizeof r.v);
  return r;
}
inline void store_floats(float* p, Floats a) { __builtin_memcpy(p, a.v, sizeof a); }
inline float half_to_float(uint16_t h) {
  // Shift exponent and mantissa into place and rescale by 2^112, which also makes subnormals right; then inf and nan.
  uint32_t bits = static_cast<uint32_t>(h & 0x7fff) << 13;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  x *= 0x1p112f;
  __builtin_memcpy(&bits, &x, 4);
  if ((h & 0x7c00) == 0x7c00) bits = 0x7f800000u | static_cast<uint32_t>(h & 0x3ff) << 13;
  bits |= static_cast<uint32_t>(h & 0x8000) << 16;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
inline Floats load_halves(const uint16_t* p) {
  Floats r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = half_to_float(p[i]);
  return r;
}

// Integer products of codes u8 [kLanes outputs][4 channels] with one quad of activations, broadcast to every lane.
// A Partial may take kRun quads before total() must be taken, and counts codes as code - centre: centre(bits, zero) is
// `zero` wherever the level can, and start() makes it so, given the PairSums word of the quads to come.
struct Product {
  static constexpr int kRun = 16;
  using Partial = Ints;
  static int centre(int, int zero) { return zero; }
  static Partial start(uint32_t pair_sums, int centre) { return set_ints(-centre * both_pairs(pair_sums)); }
  static void add(Partial& p, const Bytes& codes, const Bytes& q) {
    for (int i = 0; i < kBytes; ++i) p.v[i / 4] += codes.v[i] * static_cast<int8_t>(q.v[i]);
  }
  static Ints total(Partial p) { return p; }
};
template <int Bits>
using Dot = Product;
// Keeps a Partial that a loop carries in its register; see integer_avx2.h.
inline void keep_in_register(Ints&) {}
inline void keep_in_register(Bytes&) {}
inline Bytes broadcast_quad(const int8_t* q) {
  Bytes r;
  for (int i = 0; i < kBytes; ++i) r.v[i] = static_cast<uint8_t>(q[i % 4]);
  return r;
}

// Two-level lookup, level 1: a vector of nibbles -> 4 / Planes vectors of codes (4 channels a 32-bit lane), the 16
// outputs of a half panel quad by quad.
template <int Planes>
inline void spread(const Bytes& nibbles, Bytes* out) {
  for (int output = 0; output < kBytes / Planes; ++output) {
    uint32_t word = 0;
    for (int plane = 0; plane < Planes; ++plane) {
      const uint32_t n = nibbles.v[output * Planes + plane];
      // the repack table's entry: bit i of the nibble to byte i
      word |= ((n & 1) | (n & 2) << 7 | (n & 4) << 14 | (n & 8) << 21) << plane;
    }
    __builtin_memcpy(out[output / kLanes].v + output % kLanes * 4, &word, 4);
  }
}
template <int Shift>
inline Bytes shift_bytes_left(Bytes a) {
  for (uint8_t& x : a.v) x = static_cast<uint8_t>(x << Shift);
  return a;
}
inline Bytes or_bytes(Bytes a, Bytes b) {
  for (int i = 0; i < kBytes; ++i) a.v[i] |= b.v[i];
  return a;
}
inline void store_bytes(uint8_t* p, Bytes a) { __builtin_memcpy(p, a.v, kBytes); }

// Channel order: positions 64h + 16L + 4i + m of a section of a channel. A vector holds a part of them: of both halves h,
// the lanes L = part * kBytes / 16 and on, in lanes of 16 bytes; where a section's bytes hold several L, more than once.
template <int Planes>
inline Bytes load_positions(const uint8_t* section, int part) { return load_bytes(section + 16 * (part % Planes)); }
// The bytes of four channels side by side: out[i] holds those of i, [kLanes outputs: L, m][4 channels].
inline void interleave_channels(const Bytes (&channels)[4], Bytes (&out)[4]) {
  for (int i = 0; i < 4; ++i)
    for (int at = 0; at < kBytes; ++at) out[i].v[at] = channels[at % 4].v[4 * i + at / 4];
}
// The codes of a half in them: fields of Planes bits.
template <int Planes, int Half>
inline Bytes position_codes(Bytes a, int part) {
  const int shift = (4 * Half + part) / Planes * Planes;
  for (uint8_t& x : a.v) x = x >> shift & ((1 << Planes) - 1);
  return a;
}
// Products of a section: operand() gives the codes of a half, weighed as suits the level, and total() what Product's does.
template <int Planes>
struct SectionDot : Product {
  template <int Half>
  static Bytes operand(const Bytes& positions, int part) { return position_codes<Planes, Half>(positions, part); }
  template <int Half>
  static Ints total(Partial p) { return p; }
};

}  // namespace
}  // namespace elute
