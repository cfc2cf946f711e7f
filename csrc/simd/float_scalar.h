// The float vocabulary on one lane, for any CPU: the plainest spelling, which every other level is tested against.
// See float_kernels_body.h for what each word promises. No hardware fma is assumed, so fma is a product and a sum.
#pragma once
#include <cstdint>

namespace elute {
namespace {

struct FloatScalar {
  using Float = float;
  static constexpr int kLanes = 1;
  static constexpr int kRows = 2;        // rows of a register tile: 2 x 4 sums + 4 weights of 16 SSE registers
  static constexpr int kBlock = 4;       // vectors side by side in a widened tile; 4 lets the compiler use SSE
  static constexpr int kDirectRows = 0;  // widening f16 in software is never worth doing twice
  static constexpr int direct_vectors(int) { return kBlock; }

  static Float zero() { return 0.0f; }
  static Float set1(float x) { return x; }
  static Float load(const float* p) { return *p; }
  static Float load_n(const float* p, int) { return *p; }
  static void store(float* p, Float a) { *p = a; }
  static void store_n(float* p, Float a, int) { *p = a; }

  struct Pairs {
    int32_t first, second;
  };
  using Ints = int32_t;
  static Pairs load_pairs(const int8_t* p) { return {p[0], p[1]}; }
  static Pairs set1_pair(const int16_t* p) { return {p[0], p[1]}; }
  static Ints zero_ints() { return 0; }
  static Ints add_products(Pairs a, Pairs b, Ints c) { return c + a.first * b.first + a.second * b.second; }
  static Float to_float(Ints a) { return static_cast<float>(a); }
  static void keep_in_register(Ints&) {}
  static void store(int8_t* p, Float a) { *p = static_cast<int8_t>(round(a)); }
  static void store(int16_t* p, Float a) { *p = static_cast<int16_t>(round(a)); }

  static constexpr int kShadowVectors = 8;  // 16 sums
  static Ints round_to_ints(Float a) { return static_cast<int32_t>(__builtin_lrintf(a)); }
  static uint32_t beyond(Float a, Float limit) { return !(abs(a) <= limit); }
  static uint32_t outside_int8(Ints a) { return a != clipped(a); }
  static void store_ints(int32_t* p, Ints a) { *p = a; }
  static void store_saturated(int8_t* p, Ints a) { *p = static_cast<int8_t>(clipped(a)); }
  static void add_rows(const int8_t* a, const int8_t* b, Pairs by, Ints& first, Ints& second) {
    first += a[0] * by.first + b[0] * by.second;
    second += a[1] * by.first + b[1] * by.second;
  }
  static void store_rows(int32_t* p, Ints first, Ints second) {
    p[0] = first;
    p[1] = second;
  }

  // Exponent and fraction move up by 13 bits; one product by 2^112 rebiases them and normalises subnormals alike.
  static Float load(const uint16_t* p) {
    const uint32_t half = *p;
    const uint32_t magnitude = (half & 0x7fffu) << 13;
    uint32_t bits = to_bits(from_bits(magnitude) * 0x1p112f);
    if (magnitude >= 0x7c00u << 13) bits = magnitude | 0x7f800000u;         // infinities and NaNs
    if (magnitude > 0x7c00u << 13) bits |= 0x00400000u;                      // NaNs come out quiet, as in hardware
    return from_bits(bits | (half & 0x8000u) << 16);
  }
  static Float load_n(const uint16_t* p, int) { return load(p); }

  //   |x|                 half
  //   NaN                 quiet, the top of its payload kept
  //   >= 65520            infinity (65520 is the tie between 65504 and the next step)
  //   >= 2^-14            fraction cut to 10 bits, ties to even by adding 0xfff and the last kept bit
  //   below               |x| + 0.5 leaves round(|x| * 2^24) in the low bits: one step of 0.5 is 2^-24
  static void store(uint16_t* p, Float a) {
    const uint32_t bits = to_bits(a);
    const uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) half = 0x7e00u | (magnitude >> 13 & 0x1ffu);
    else if (magnitude >= 0x477ff000u) half = 0x7c00u;
    else if (magnitude >= 0x38800000u) half = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    else half = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
    *p = static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
  }
  static void store_n(uint16_t* p, Float a, int) { store(p, a); }

  static Float add(Float a, Float b) { return a + b; }
  static Float sub(Float a, Float b) { return a - b; }
  static Float mul(Float a, Float b) { return a * b; }
  static Float div(Float a, Float b) { return a / b; }
  static Float fma(Float a, Float b, Float c) { return a * b + c; }
  static Float max(Float a, Float b) { return a > b ? a : b; }
  static Float abs(Float a) { return __builtin_fabsf(a); }
  static Float select_less(Float a, Float b, Float then, Float otherwise) { return a < b ? then : otherwise; }
  static Float shift_to_exponent(Float a) { return from_bits((to_bits(a) << 23) + (127u << 23)); }
  static float first(Float a) { return a; }
  static float sum(Float a) { return a; }
  static float largest(Float a) { return a; }

  using Wide = double;
  static Wide wide_zero() { return 0.0; }
  static Wide add_wide(Wide w, Float a) { return w + a; }
  static double sum_wide(Wide w) { return w; }

 private:
  static int32_t clipped(int32_t a) { return a < -128 ? -128 : a > 127 ? 127 : a; }
  // Ties to even: adding 1.5 * 2^23 leaves the whole number in the low bits.
  static int32_t round(float x) { return static_cast<int32_t>(to_bits(x + 0x1.8p23f) - to_bits(0x1.8p23f)); }
  static uint32_t to_bits(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
  }
  static float from_bits(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
  }
};

}  // namespace
}  // namespace elute
