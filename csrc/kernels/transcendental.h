// exp, tanh and the activations made of them, over any float vocabulary S (the words: float_kernels_body.h).
// Everything is reduced to e^x for x <= 0, so nothing overflows and no argument but NaN gives NaN.
#pragma once
#include "kernels/float_kernels.h"

namespace elute {
namespace {

// e^x = 2^n (1 + p), 2^n and p = e^r - 1 apart, so that exp and expm1 each add one rounding.
template <class S>
struct Exponential {
  typename S::Float power;  // 2^n
  typename S::Float rest;   // e^r - 1, |r| <= ln2 / 2
};

constexpr float kExpLeast = -87.0f;  // e^-87 = 1.6e-38 is still a normal float; below it exp is 0

template <class S>
Exponential<S> exponential(typename S::Float x) {
  using Float = typename S::Float;
  // Adding 1.5 * 2^23 leaves round(x / ln2) in the low bits of the sum, two's complement.
  const Float magic = S::set1(0x1.8p23f);
  const Float shifted = S::fma(x, S::set1(0x1.715476p0f), magic);
  const Float n = S::sub(shifted, magic);
  // ln2 = 355/512 - 2.12e-4: the first product is exact (9 + 7 bits), also without fma.
  Float r = S::fma(n, S::set1(-0x1.63p-1f), x);
  r = S::fma(n, S::set1(0x1.bd0106p-13f), r);
  // Minimax for (e^r - 1 - r) / r^2, weighted by e^-r: 3.7e-9 of e^r in exact arithmetic.
  Float q = S::fma(S::set1(0x1.6a23d0p-10f), r, S::set1(0x1.123a20p-7f));
  q = S::fma(q, r, S::set1(0x1.5558f2p-5f));
  q = S::fma(q, r, S::set1(0x1.555492p-3f));
  q = S::fma(q, r, S::set1(0x1.fffffcp-2f));
  return {S::shift_to_exponent(shifted), S::fma(S::mul(r, r), q, r)};
}

// e^x for x <= 0, -inf included: relative error below 1e-7 (8.8e-8 over every third float), and exactly 0
// below kExpLeast. NaN stays NaN.
template <class S>
typename S::Float exp_nonpositive(typename S::Float x) {
  const auto least = S::set1(kExpLeast);
  const Exponential<S> e = exponential<S>(S::max(least, x));
  return S::select_less(x, least, S::zero(), S::fma(e.power, e.rest, e.power));
}

// x * sigmoid(z), where x and z have one sign: e = exp(-|z|), sigmoid = 1/(1+e) or e/(1+e).
template <class S>
typename S::Float times_sigmoid(typename S::Float x, typename S::Float z) {
  const auto one = S::set1(1.0f);
  const auto e = exp_nonpositive<S>(S::sub(S::zero(), S::abs(z)));
  const auto numerator = S::select_less(z, S::zero(), e, one);
  return S::div(S::mul(x, numerator), S::add(one, e));
}

// Below this both activations are 0 in f32; holding x there keeps -inf * 0 out.
constexpr float kActivationLeast = -200.0f;

template <class S>
typename S::Float silu(typename S::Float x) {
  x = S::max(S::set1(kActivationLeast), x);
  return times_sigmoid<S>(x, x);
}

// x/2 (1 + tanh(u)) = x * sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
template <class S>
typename S::Float gelu_tanh(typename S::Float x) {
  x = S::max(S::set1(kActivationLeast), x);
  constexpr float kTwice = 2 * 0.7978845608f;  // 2 sqrt(2/pi)
  const auto cubic = S::fma(S::mul(x, x), S::set1(kTwice * 0.044715f), S::set1(kTwice));
  return times_sigmoid<S>(x, S::mul(x, cubic));
}

// cap * tanh(x / cap), relative error below 4 * 2^-24: tanh(y) = -m / (2 + m) with m = e^(-2|y|) - 1, which keeps
// small arguments accurate.
template <class S>
typename S::Float soft_cap(typename S::Float x, float cap) {
  const auto y = S::div(x, S::set1(cap));
  const auto doubled = S::max(S::set1(kExpLeast), S::mul(S::set1(-2.0f), S::abs(y)));
  const Exponential<S> e = exponential<S>(doubled);
  const auto m = S::fma(e.power, e.rest, S::sub(e.power, S::set1(1.0f)));
  const auto magnitude = S::div(S::mul(S::set1(cap), S::sub(S::zero(), m)), S::add(S::set1(2.0f), m));
  return S::select_less(y, S::zero(), S::sub(S::zero(), magnitude), magnitude);
}

}  // namespace
}  // namespace elute
