// The float kernels of one instruction set, made from its vocabulary S (simd/float_ISA.h):
//
//   Float, kLanes           a vector and its length
//   load, store             f32, or f16 widened and rounded to nearest even; unaligned
//   load_n, store_n         the first n < kLanes lanes; missing lanes load as 0, memory behind them is not touched
//   fma(a, b, c)            a * b + c, rounded once where the hardware can
//   max(a, b)               b where either is NaN
//   select_less(a, b, t, o) t where a < b, else (also for NaN) o
//   shift_to_exponent(a)    2^n, n the low bits of a as an integer in [-126, 127]
//   first, sum, largest     lane 0; over the lanes
//   Wide, wide_zero, add_wide(w, a), sum_wide(w)   sums of lanes in f64, lane by lane, then over the lanes
//   Pairs, load_pairs, set1_pair   kLanes pairs of neighbours, of 8 bits widened to 16; one pair of 16 bits in all lanes
//   Ints, zero_ints         kLanes 32-bit integers
//   add_products(a, b, c)   c + both products of each lane's pairs, exact
//   to_float(c)             rounded to nearest even
//   store to int8, int16    rounded to nearest even; |a| is at most 127, 32767; anything for NaN
//   keep_in_register(c)     nothing: stops GCC 12 from keeping a loop's sums twice, see integer_avx2.h
//   round_to_ints(a)        to nearest even, of |a| <= 2^24; anything else for others
//   beyond(a, limit)        a bit for each lane where |a| <= limit does not hold, also for NaN
//   outside_int8(c)         a bit for each lane outside [-128, 127]
//   store_ints, store_saturated(int8)
//   add_rows(a, b, by, f, s)   of 2 * kLanes outputs, bytes at a and at b: the sums f and s grow by a[i] * the first of `by`
//                              + b[i] * the second; store_rows(p, f, s) stores them in order
//   kShadowVectors          of 2 * kLanes outputs, whose sums are kept in registers
//   kRows, kBlock, kDirectRows, direct_vectors(rows)   shape of attention's register tiles
//
// Everything is in unnamed namespaces, and no std:: template is used: an inline function compiled here with AVX flags
// must not be the copy that the linker keeps for code that runs on every CPU.
#pragma once
#include "kernels/attention_body.h"
#include "kernels/basic_body.h"
#include "kernels/sampling_body.h"

namespace elute {
namespace {

template <class S>
constexpr FloatKernels float_kernels() {
  return {rms_factor<S>,   rms_scale<S>,      dot<S>,        rope<S>,     gate<S>,        add<S>,
          scale<S>,        softcap<S>,        to_f16<S>,     from_f16<S>, cache_write<S>, block_peaks<S>,
          masses<S>,       block_masses<S>,   attention<S>,  attention_span<S>,
          attention_merge<S>};
}

}  // namespace
}  // namespace elute
