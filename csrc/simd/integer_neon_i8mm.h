// The integer vocabulary of the level neon_i8mm (ARMv8.2-A FEAT_I8MM): matrix products by USMMLA. See integer_scalar.h.
#pragma once
#include "simd/integer_neon.h"

namespace elute {
namespace {

constexpr int kGemmRows = 2;  // pairs of rows: 2 * 8 pairs of outputs = 16 registers of sums

// Codes u8 [2 outputs][8 channels] by activations i8 [2 rows][8 channels]: i32 [2 outputs][2 rows].
struct Product {
  using Partial = int32x4_t;
  static Partial zero() { return vdupq_n_s32(0); }
  static void add(Partial& p, Bytes codes, Bytes q) { p = vusmmlaq_s32(p, codes, vreinterpretq_s8_u8(q)); }
  static Ints total(Partial p) { return p; }
};
template <int Bits>
using Dot = Product;

}  // namespace
}  // namespace elute
