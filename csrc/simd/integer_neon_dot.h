// The integer vocabulary of the level neon: products by SDOT, of one sign. See integer_scalar.h.
#pragma once
#include "simd/integer_neon.h"

namespace elute {
namespace {

constexpr int kGemmRows = 2;  // 2 rows * 8 vectors of sums = 16 registers; 3 rows leave too few to finish groups in

// Codes i8 [4 outputs][4 channels] by one quad of activations. Narrower codes than 8 bits are the same with a sign, those
// of 8 bits are taken as code - 128 (kernels/tile_neon_dot.h).
struct Product {
  using Partial = int32x4_t;
  static Partial zero() { return vdupq_n_s32(0); }
  static void add(Partial& p, Bytes codes, Bytes q) {
    p = vdotq_s32(p, vreinterpretq_s8_u8(codes), vreinterpretq_s8_u8(q));
  }
  static Ints total(Partial p) { return p; }
};
template <int Bits>
using Dot = Product;

}  // namespace
}  // namespace elute
