// The ceilings in the words of a vocabulary (simd/integer_*.h), which is included first, and of a float one, S.
// Included by one file per ISA; everything stays in that file's anonymous namespace.
#pragma once
#include "kernels/ceilings.h"
#include "kernels/matmul.h"

namespace elute {
namespace {

constexpr int kVectors = kPanel / kLanes;
constexpr int kMultipliesPerStep = kGemmRows * kVectors * kBytes;

// GCC's and Clang's own vectors, not the vocabulary's: the portable level's loads of single bytes are slower than memory.
typedef uint64_t Words __attribute__((vector_size(kBytes)));

constexpr int kReadSums = kReadRun / kBytes;  // Zen 3, 1 thread, out of cache: 4 sums read 1.1 times as fast as one

ELUTE_INLINE void read_run(const uint8_t* data, Words* seen) {
#pragma GCC unroll 16
  for (int v = 0; v < kReadSums; ++v) {
    Words words;
    __builtin_memcpy(&words, data + v * kBytes, kBytes);
    seen[v] |= words;
  }
}

template <int kStreams>
uint64_t read_streams(const uint8_t* data, int64_t n_bytes) {
  Words seen[kReadSums] = {};
  const int64_t piece = n_bytes / kReadRun / kStreams * kReadRun;
  for (int64_t at = 0; at < piece; at += kReadRun) {
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; ++s) read_run(data + s * piece + at, seen);
  }
  for (int64_t at = kStreams * piece; at < n_bytes; at += kReadRun) read_run(data + at, seen);  // fewer than kStreams
  uint64_t result = 0;
  for (const Words& words : seen)
    for (int i = 0; i < kBytes / 8; ++i) result |= words[i];
  return result;
}

uint64_t read(const uint8_t* data, int64_t n_bytes, int n_streams) {
  static_assert(kMostStreams == 3);
  if (n_streams == 1) return read_streams<1>(data, n_bytes);
  if (n_streams == 2) return read_streams<2>(data, n_bytes);
  return read_streams<3>(data, n_bytes);
}

// Makes the compiler forget what it knows of a value in memory, so that it cannot reuse or leave out what depends on it.
template <typename T>
ELUTE_INLINE void forget(T& value) { asm volatile("" : "+m"(value)); }

// Zen 3, one thread: codes in registers and activations forgotten each step give 1.2 times what loading codes does.
float multiply(int64_t n_steps) {
  using D = Dot<2>;
  Bytes codes[kVectors], activations[kGemmRows];
  typename D::Partial sums[kGemmRows][kVectors];
  uint8_t threes[kBytes];
  for (uint8_t& code : threes) code = 3;
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    forget(threes);
    codes[v] = load_bytes(threes);
  }
#pragma GCC unroll 16
  for (int r = 0; r < kGemmRows; ++r) {
    // Equal codes times +q, -q: no sum grows, however many steps.
    const int8_t q = static_cast<int8_t>(100 + r), minus = static_cast<int8_t>(-q);
    const int8_t quad[kLutWidth] = {q, minus, q, minus};
    activations[r] = broadcast_quad(quad);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[r][v] = typename D::Partial{};
  }
  for (int64_t step = 0; step < n_steps; ++step) {
#pragma GCC unroll 16
    for (int r = 0; r < kGemmRows; ++r) forget(activations[r]);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 16
      for (int r = 0; r < kGemmRows; ++r) D::add(sums[r][v], codes[v], activations[r]);
#pragma GCC unroll 16
    for (int r = 0; r < kGemmRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) keep_in_register(sums[r][v]);
  }
  Floats total = zero_floats();
#pragma GCC unroll 16
  for (int r = 0; r < kGemmRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) total = add(total, to_floats(D::total(sums[r][v])));
  float lanes[kLanes], result = 0;
  store_floats(lanes, total);
  for (float lane : lanes) result += lane;
  return result;
}

template <class S>
constexpr int kFmasPerStep = S::kRows * S::kBlock * S::kLanes;

template <class S>
float fma(int64_t n_steps) {
  using Float = typename S::Float;
  Float sums[S::kRows][S::kBlock], values[S::kBlock];
  float weights[S::kRows];
#pragma GCC unroll 8
  for (int v = 0; v < S::kBlock; ++v) {
    values[v] = S::set1(1.0f);
    forget(values[v]);  // equal ones would be multiplied once
  }
#pragma GCC unroll 16
  for (int r = 0; r < S::kRows; ++r) {
    weights[r] = 1.0f;
#pragma GCC unroll 8
    for (int v = 0; v < S::kBlock; ++v) sums[r][v] = S::zero();
  }
  for (int64_t step = 0; step < n_steps; ++step) {
#pragma GCC unroll 16
    for (int r = 0; r < S::kRows; ++r) {
      forget(weights[r]);
      const Float weight = S::set1(weights[r]);
#pragma GCC unroll 8
      for (int v = 0; v < S::kBlock; ++v) sums[r][v] = S::fma(weight, values[v], sums[r][v]);
    }
  }
  float result = 0;
#pragma GCC unroll 16
  for (int r = 0; r < S::kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < S::kBlock; ++v) result += S::sum(sums[r][v]);
  return result;
}

}  // namespace
}  // namespace elute
