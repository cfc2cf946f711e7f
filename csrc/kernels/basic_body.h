// Norm, rotary embedding, gates and conversions over any float vocabulary S. Contracts: float_kernels.h.
#pragma once
#include "kernels/float_kernels.h"
#include "kernels/transcendental.h"
#include "kernels/vectors.h"

namespace elute {
namespace {

// 8 sums hide the latency of fma (4 cycles, 2 a cycle) and, on one lane, keep the rounding error small.
constexpr int kNormSums = 8;

// Wrong by at most (n / (8 * kLanes) + 6) * 2^-24 of the sum of |x[i] * w[i]|.
template <class S>
float dot(const float* x, const float* w, int64_t n) {
  using Float = typename S::Float;
  Float sums[kNormSums];
  for (int v = 0; v < kNormSums; ++v) sums[v] = S::zero();
  int64_t i = 0;
  for (; i + kNormSums * S::kLanes <= n; i += kNormSums * S::kLanes) {
#pragma GCC unroll 8
    for (int v = 0; v < kNormSums; ++v)
      sums[v] = S::fma(S::load(x + i + v * S::kLanes), S::load(w + i + v * S::kLanes), sums[v]);
  }
  for_vectors<S>(n - i, [&](int64_t j, auto memory) {
    Float& sum = sums[j / S::kLanes];
    sum = S::fma(memory.load(x + i + j), memory.load(w + i + j), sum);
  });
  for (int half = kNormSums / 2; half > 0; half /= 2)
    for (int v = 0; v < half; ++v) sums[v] = S::add(sums[v], sums[v + half]);
  return S::sum(sums[0]);
}

template <class S>
float rms_factor(const float* x, int width, float eps) {
  const float mean = dot<S>(x, x, width) / static_cast<float>(width);
  return 1.0f / __builtin_sqrtf(mean + eps);
}

template <class S>
void rms_scale(const float* x, const float* w, float factor, float* y, int64_t n) {
  const auto by = S::set1(factor);
  for_vectors<S>(n, [=](int64_t i, auto memory) {
    memory.store(y + i, S::mul(S::mul(memory.load(x + i), by), memory.load(w + i)));
  });
}

// Two products and a sum, each rounded: the same bits on every instruction set.
template <class S>
void rope(float* x, const float* cos, const float* sin, int width, int n_heads) {
  const int half = width / 2;
  for (int head = 0; head < n_heads; ++head, x += width) {
    for_vectors<S>(half, [=](int64_t i, auto memory) {
      const auto a = memory.load(x + i);
      const auto b = memory.load(x + half + i);
      const auto c = memory.load(cos + i);
      const auto s = memory.load(sin + i);
      memory.store(x + i, S::sub(S::mul(a, c), S::mul(b, s)));
      memory.store(x + half + i, S::add(S::mul(b, c), S::mul(a, s)));
    });
  }
}

template <class S>
void gate(const float* gate, const float* up, float* y, int64_t n, Activation activation) {
  switch (activation) {
    case Activation::silu:
      return for_vectors<S>(n, [=](int64_t i, auto memory) {
        memory.store(y + i, S::mul(silu<S>(memory.load(gate + i)), memory.load(up + i)));
      });
    case Activation::gelu_tanh:
      return for_vectors<S>(n, [=](int64_t i, auto memory) {
        memory.store(y + i, S::mul(gelu_tanh<S>(memory.load(gate + i)), memory.load(up + i)));
      });
    case Activation::relu2:
      return for_vectors<S>(n, [=](int64_t i, auto memory) {
        const auto a = S::max(S::zero(), memory.load(gate + i));
        memory.store(y + i, S::mul(S::mul(a, a), memory.load(up + i)));
      });
  }
}

template <class S>
void add(const float* x, float* y, int64_t n) {
  for_vectors<S>(n, [=](int64_t i, auto memory) {
    memory.store(y + i, S::add(memory.load(y + i), memory.load(x + i)));
  });
}

template <class S>
void scale(float* x, float s, int64_t n) {
  const auto factor = S::set1(s);
  for_vectors<S>(n, [=](int64_t i, auto memory) { memory.store(x + i, S::mul(memory.load(x + i), factor)); });
}

template <class S>
void softcap(float* x, float cap, int64_t n) {
  for_vectors<S>(n, [=](int64_t i, auto memory) { memory.store(x + i, soft_cap<S>(memory.load(x + i), cap)); });
}

template <class S>
void to_f16(const float* x, uint16_t* y, int64_t n) {
  for_vectors<S>(n, [=](int64_t i, auto memory) { memory.store(y + i, memory.load(x + i)); });
}

template <class S>
void from_f16(const uint16_t* x, float* y, int64_t n) {
  for_vectors<S>(n, [=](int64_t i, auto memory) { memory.store(y + i, memory.load(x + i)); });
}

}  // namespace
}  // namespace elute
