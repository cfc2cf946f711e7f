// What lookup and multiply share: widths and sections of a code, segments of a row, the float end of a group.
#pragma once
#include "kernels/matmul.h"

namespace elute {
namespace {

constexpr int kVectors = kPanel / kLanes;  // vectors of 32-bit lanes that hold a panel
constexpr int kHalfVectors = kVectors / 2;
constexpr int kTileParts = kChannelTile / 2 / kBytes;  // vectors of a channel's positions, see load_positions

constexpr int kCacheLine = 64;
constexpr int at_least_one(int x) { return x < 1 ? 1 : x; }
constexpr int smaller(int a, int b) { return a < b ? a : b; }

// Calls f.template operator()<FirstPlane, Planes>() for each section of a code: runs of 4, 2 and 1 planes.
template <int Bits, int First = 0, typename F>
ELUTE_INLINE void for_each_section(F&& f) {
  if constexpr (First < Bits) {
    constexpr int planes = Bits - First >= 4 ? 4 : Bits - First >= 2 ? 2 : 1;
    f.template operator()<First, planes>();
    for_each_section<Bits, First + planes>(f);
  }
}

// Calls f.template operator()<Bits>() for the bits of a matrix.
template <int Bits = 1, typename F>
inline void with_bits(int bits, F&& f) {
  if (bits == Bits) return f.template operator()<Bits>();
  if constexpr (Bits < 8) with_bits<Bits + 1>(bits, f);
}

// The columns that share a weight group and an activation block.
struct Segments {
  int quads;   // of a whole segment
  int groups;  // columns per weight group
  explicit Segments(const MatrixView& w)
      : quads((w.group_size < kActBlock ? (kActBlock % w.group_size ? kActBlock : w.group_size) : kActBlock) /
              kLutWidth),
        groups(w.group_size) {}
};

struct RunSums {
  int32_t q = 0, lows = 0;
};
ELUTE_INLINE RunSums sum_runs(const ActivationsView& x, int block, int first_quad, int quads) {
  constexpr int kRunQuads = kSumRun / kLutWidth;
  const int begin = block * (kActBlock / kSumRun) + first_quad / kRunQuads;
  const int end = begin + (quads + kRunQuads - 1) / kRunQuads;
  RunSums s;
  for (int i = begin; i < end; ++i) {
    s.q += x.sums[i];
    if (x.lows) s.lows += x.lows[i];
  }
  return s;
}

// Adds a finished group to y in the order that reference.py fixes.
ELUTE_INLINE void add_group(const MatrixView& w, const uint16_t* scales,
                                                     const uint16_t* offsets, const Floats* group, float x_sum,
                                                     Floats* y) {
  for (int v = 0; v < kVectors; ++v) {
    const Floats scale = load_halves(scales + v * kLanes);
    if (w.affine == Affine::symmetric) {
      y[v] = add(y[v], mul(scale, group[v]));
    } else {
      const Floats shift = mul(load_halves(offsets + v * kLanes), set_floats(x_sum));
      y[v] = w.affine == Affine::zero ? add(y[v], mul(scale, sub(group[v], shift)))
                                      : add(add(y[v], mul(scale, group[v])), shift);
    }
  }
}

inline void store_panel(const MatrixView& w, int panel, const Floats* sums, const float* bias, float* y) {
  const int first = panel * kPanel, count = smaller(kPanel, w.n - first);
  if (count == kPanel && !bias) {
    for (int v = 0; v < kVectors; ++v) store_floats(y + first + v * kLanes, sums[v]);
    return;
  }
  float buffer[kPanel];
  for (int v = 0; v < kVectors; ++v) store_floats(buffer + v * kLanes, sums[v]);
  for (int i = 0; i < count; ++i) y[first + i] = bias ? buffer[i] + bias[first + i] : buffer[i];
}

}  // namespace
}  // namespace elute
