// The passes of sampling over all logits, on any float vocabulary S. Contracts: float_kernels.h; twin in numpy:
// src/elute/kernels/sampling/reference.py.
#pragma once
#include "kernels/float_kernels.h"

namespace elute {
namespace {

template <class S>
bool block_peaks(const float* x, int64_t n, float* peaks) {
  using Float = typename S::Float;
  const Float zero = S::zero();
  Float broken = zero;  // 0 * x is 0, or NaN where x is not finite, and a NaN stays in a sum
  for (int64_t begin = 0; begin < n; begin += kPeakBlock) {
    const int64_t end = begin + kPeakBlock < n ? begin + kPeakBlock : n;
    Float peak = S::set1(x[begin]);
    int64_t i = begin;
    for (; i + S::kLanes <= end; i += S::kLanes) {
      const Float a = S::load(x + i);
      peak = S::max(a, peak);
      broken = S::add(broken, S::mul(a, zero));
    }
    float largest = S::largest(peak);
    for (; i < end; ++i) {
      if (x[i] > largest) largest = x[i];
      broken = S::add(broken, S::mul(S::set1(x[i]), zero));
    }
    peaks[begin / kPeakBlock] = largest;
  }
  return S::sum(broken) == 0.0f;
}

// (x - peak) * inverse_temperature, at most 0.
template <class S>
struct Scaled {
  typename S::Float peak, inverse_temperature;
  typename S::Float operator()(typename S::Float x) const { return S::mul(S::sub(x, peak), inverse_temperature); }
};

// In place e^y of V vectors y <= 0, as multiples of 2^-34 in [0, 1]. Products and sums are rounded each: no fma, so that
// all levels and numpy agree. Relative error of e^y below 1.5e-7 before it is rounded.
//
//   e in           spacing of f32
//   [2^-11, 1]     at least 2^-34: already a multiple of it
//   [0, 2^-11)     finer; e + 2^-11 is in [2^-11, 2^-10), where the spacing is 2^-34, so the sum rounds e to it
//
// Sums of n masses are at most n * 2^34 units, which f64 holds exactly up to 2^53: 524288 tokens of the best one's
// probability. Larger vocabularies are exact as long as the sum is below 2^19, as it is of all but level logits.
template <class S, int V>
[[gnu::always_inline]] inline void mass(typename S::Float (&y)[V]) {
  using Float = typename S::Float;
  const auto each = [](auto step) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) step(v);
  };
  const Float magic = S::set1(0x1.8p23f), edge = S::set1(0x1p-11f);
  Float shifted[V], n[V], r[V], q[V];
  // e^-25 = 0.24 * 2^-34 rounds to 0, as all below.
  each([&](int v) { y[v] = S::max(y[v], S::set1(-25.0f)); });
  // Adding 1.5 * 2^23 leaves n = round(y / ln2) in the low bits of the sum, two's complement.
  each([&](int v) { shifted[v] = S::add(S::mul(y[v], S::set1(0x1.715476p0f)), magic); });
  each([&](int v) { n[v] = S::sub(shifted[v], magic); });
  // ln2 = 355/512 - 2.12e-4: the first product is exact (9 + 6 bits), and so is the difference.
  each([&](int v) { r[v] = S::sub(y[v], S::mul(n[v], S::set1(0x1.63p-1f))); });
  each([&](int v) { r[v] = S::add(r[v], S::mul(n[v], S::set1(0x1.bd0106p-13f))); });
  // The polynomial of transcendental.h: (e^r - 1 - r) / r^2.
  each([&](int v) { q[v] = S::add(S::mul(S::set1(0x1.6a23d0p-10f), r[v]), S::set1(0x1.123a20p-7f)); });
  each([&](int v) { q[v] = S::add(S::mul(q[v], r[v]), S::set1(0x1.5558f2p-5f)); });
  each([&](int v) { q[v] = S::add(S::mul(q[v], r[v]), S::set1(0x1.555492p-3f)); });
  each([&](int v) { q[v] = S::add(S::mul(q[v], r[v]), S::set1(0x1.fffffcp-2f)); });
  each([&](int v) { q[v] = S::add(S::mul(S::mul(r[v], r[v]), q[v]), r[v]); });
  each([&](int v) { y[v] = S::mul(S::add(S::set1(1.0f), q[v]), S::shift_to_exponent(shifted[v])); });
  each([&](int v) { y[v] = S::select_less(y[v], edge, S::sub(S::add(y[v], edge), edge), y[v]); });
}

template <class S>
void masses(const float* x, int64_t n, float peak, float inverse_temperature, float* y) {
  const Scaled<S> scaled{S::set1(peak), S::set1(inverse_temperature)};
  for_vectors<S>(n, [=](int64_t i, auto memory) {
    typename S::Float one[] = {scaled(memory.load(x + i))};
    mass<S>(one);
    memory.store(y + i, one[0]);
  });
}

// Vectors side by side: one alone is 20 operations of 3 to 4 cycles in a row, too long for the schedulers to overlap
// enough of them. Time of 2 and of 4 over that of 1, avx2 on Zen 3: 0.88 and 0.78.
constexpr int kMassVectors = 4;

template <class S>
void block_masses(const float* x, int64_t n, float peak, float inverse_temperature, double* sums) {
  using Float = typename S::Float;
  constexpr int64_t kStep = kMassVectors * S::kLanes;
  const Scaled<S> scaled{S::set1(peak), S::set1(inverse_temperature)};
  for (int64_t begin = 0; begin < n; begin += kPeakBlock) {
    const int64_t end = begin + kPeakBlock < n ? begin + kPeakBlock : n;
    typename S::Wide sum = S::wide_zero();
    int64_t i = begin;
    for (; i + kStep <= end; i += kStep) {
      Float y[kMassVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kMassVectors; ++v) y[v] = scaled(S::load(x + i + v * S::kLanes));
      mass<S>(y);
#pragma GCC unroll 4
      for (int v = 0; v < kMassVectors; ++v) sum = S::add_wide(sum, y[v]);
    }
    double total = S::sum_wide(sum);
    for (; i < end; ++i) {
      Float y[] = {scaled(S::set1(x[i]))};
      mass<S>(y);
      total += S::first(y[0]);
    }
    sums[begin / kPeakBlock] = total;
  }
}

}  // namespace
}  // namespace elute
