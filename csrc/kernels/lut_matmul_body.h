// Decode: a row times a matrix by lookup. Included by matmul_body.h.
#pragma once
#include "kernels/groups_body.h"

namespace elute {
namespace {

// How far ahead of its lookups a panel is fetched: beyond the page that the hardware's own prefetch stops at. Share of the
// read bandwidth out of cache, 1 thread, huge pages, 4 bits: Zen 3 without 0.74, from 1 to 8 KiB 0.92; Zen 5 2 KiB 0.77,
// 4 KiB 0.84, 8 KiB 0.90, 16 KiB 0.82.
constexpr int kPrefetchBytes = 8192;

template <int Planes, int Shift>
ELUTE_INLINE void lookup_section(const uint8_t* quads, const uint8_t* quad_tables, int n_quads,
                                                          Ints* dot) {
  constexpr int kQuadBytes = kHalfPanel * Planes;
  constexpr int kPerQuad = at_least_one(kQuadBytes / kBytes);  // vectors a quad
  constexpr int kStep = at_least_one(kBytes / kQuadBytes);     // quads a vector
  Sum<Planes> low[kPerQuad], high[kPerQuad];
#pragma GCC unroll 16
  for (int quad = 0; quad < n_quads; quad += kStep) {
    const Bytes table = tables<Planes>(quad_tables + quad * kTableBytes);
    for (int v = 0; v < kPerQuad; ++v) {
      const Bytes nibbles = load_bytes(quads + quad * kQuadBytes + v * kBytes);
      low[v].add(lookup(table, low_nibbles(nibbles)));
      high[v].add(lookup(table, high_nibbles(nibbles)));
    }
  }
  Ints part[kVectors];
  Sum<Planes>::total(low, part);
  Sum<Planes>::total(high, part + kHalfVectors);
  for (int v = 0; v < kVectors; ++v) dot[v] = add_ints(dot[v], shift_left<Shift>(part[v]));
}

// SegmentQuads: 0: any number, and the last segment may be shorter.
template <int Bits, int SegmentQuads>
void lut_matmul_bits(const MatrixView& w, const ActivationsView& x, int panel_begin, int panel_end, const float* bias,
                     float* y) {
  const int segment_quads = SegmentQuads ? SegmentQuads : Segments(w).quads;
  const int n_quads = w.k / kLutWidth;
  for (int panel = panel_begin; panel < panel_end; ++panel) {
    const uint8_t* block_planes = w.planes + panel * w.panel_bytes();
    const int64_t first_group = int64_t{panel} * w.n_groups();
    const uint16_t* scales = w.scales + first_group * kPanel;
    const uint16_t* offsets = w.offsets ? w.offsets + first_group * kPanel : nullptr;
    Floats sums[kVectors], group[kVectors];
    for (int v = 0; v < kVectors; ++v) sums[v] = group[v] = zero_floats();
    float x_sum = 0;
    int left_in_group = w.group_size / kLutWidth;
    for (int block = 0; block < x.n_blocks; ++block) {
      const int block_quads = SegmentQuads ? kBlockQuads : smaller(kBlockQuads, n_quads - block * kBlockQuads);
      for (int at = 0; at < block_quads * kHalfPanel * Bits; at += kCacheLine)
        prefetch(block_planes + kPrefetchBytes + at);
      const uint8_t* block_tables = x.tables + int64_t{block} * kBlockQuads * kTableBytes;
      const float act_scale = x.scales[block];
      for (int first = 0; first < block_quads; first += segment_quads) {
        const int quads = SegmentQuads ? SegmentQuads : smaller(segment_quads, block_quads - first);
        Ints dot[kVectors];
        const RunSums runs = sum_runs(x, block, first, quads);
        const int32_t constant =
            ((1 << Bits) - 1) * runs.lows - (w.affine == Affine::symmetric ? w.zero * runs.q : 0);
        for (int v = 0; v < kVectors; ++v) dot[v] = set_ints(constant);
        for_each_section<Bits>([&]<int FirstPlane, int Planes>() __attribute__((always_inline)) {
          const uint8_t* section = block_planes + kHalfPanel * (block_quads * FirstPlane + first * Planes);
          lookup_section<Planes, FirstPlane>(section, block_tables + first * kTableBytes, quads, dot);
        });
        const Floats act = set_floats(act_scale);
        for (int v = 0; v < kVectors; ++v) group[v] = add(group[v], mul(act, to_floats(dot[v])));
        x_sum += act_scale * static_cast<float>(runs.q);
        left_in_group -= quads;
        if (left_in_group == 0) {
          add_group(w, scales, offsets, group, x_sum, sums);
          for (int v = 0; v < kVectors; ++v) group[v] = zero_floats();
          x_sum = 0;
          left_in_group = w.group_size / kLutWidth;
          scales += kPanel;
          if (offsets) offsets += kPanel;
        }
      }
      block_planes += block_quads * kHalfPanel * Bits;
    }
    store_panel(w, panel, sums, bias, y);
  }
}

void lut_matmul(const MatrixView& w, const ActivationsView& x, int panel_begin, int panel_end, const float* bias,
                float* y) {
  const int quads = w.k % kActBlock == 0 ? Segments(w).quads : 0;
  with_bits(w.bits, [&]<int Bits>() {
    if (kFixedSegments && quads == kBlockQuads)
      return lut_matmul_bits<Bits, kFixedSegments ? kBlockQuads : 0>(w, x, panel_begin, panel_end, bias, y);
    if (kFixedSegments && quads == kBlockQuads / 2)
      return lut_matmul_bits<Bits, kFixedSegments ? kBlockQuads / 2 : 0>(w, x, panel_begin, panel_end, bias, y);
    lut_matmul_bits<Bits, 0>(w, x, panel_begin, panel_end, bias, y);
  });
}

}  // namespace
}  // namespace elute
