// Few rows: bit planes become codes in registers and are multiplied there; no panel of codes goes through memory.
// Included after simd/bits_gfni.h, in whose words it is written.
#pragma once
#include "kernels/groups_body.h"

namespace elute {
namespace {

constexpr int kMultiplyPrefetchBytes = 8192;  // ahead of their use, as in lut_matmul

// Calls f.template operator()<I>() for I of 0 to Count - 1.
template <int Count, int I = 0, typename F>
ELUTE_INLINE void for_each_index(F&& f) {
  if constexpr (I < Count) {
    f.template operator()<I>();
    for_each_index<Count, I + 1>(f);
  }
}

// dot[r] += (codes << Shift) * q of Rows rows of activations, q_stride bytes apart. Planes == 8: of the section and the
// one that lies to_high bytes after it.
template <int Planes, int Shift, int Rows>
ELUTE_INLINE void multiply_section(const uint8_t* section, int64_t to_high, const int8_t* q, int64_t q_stride,
                                   int n_quads, Ints (*dot)[kVectors]) {
  constexpr int kFields = Codes<Planes>::kFields;
  constexpr int kTile = smaller(Rows, kMostSums / kFields);
  if constexpr (kTile < Rows) {
    multiply_section<Planes, Shift, kTile>(section, to_high, q, q_stride, n_quads, dot);
    multiply_section<Planes, Shift, Rows - kTile>(section, to_high, q + kTile * q_stride, q_stride, n_quads,
                                                  dot + kTile);
  } else {
    constexpr int kQuadBytes = kHalfPanel * smaller(Planes, 4);
    constexpr int kStep = kBytes / kQuadBytes;  // quads a vector
    Ints sums[Rows][kFields];
    for (int r = 0; r < Rows; ++r)
      for (int f = 0; f < kFields; ++f) sums[r][f] = set_ints(0);
    for (int quad = 0; quad < n_quads; quad += kStep) {
      const Codes<Planes> codes(section + quad * kQuadBytes, to_high);
      Bytes activations[Rows];
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) activations[r] = quad_activations<Planes>(q + r * q_stride + quad * kLutWidth);
      Bytes fields[kFields];
      codes.fields(fields);
#pragma GCC unroll 8
      for (int f = 0; f < kFields; ++f)
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) add_products(sums[r][f], fields[f], activations[r]);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (int f = 0; f < kFields; ++f) keep_in_register(sums[r][f]);
    }
    for (int r = 0; r < Rows; ++r) {
      Ints part[kVectors];
      gather_outputs<Planes>(sums[r], part);
      for (int v = 0; v < kVectors; ++v) dot[r][v] = add_ints(dot[r][v], shift_left<Shift>(part[v]));
    }
  }
}

template <int Bits, int Rows>
void multiply_rows(const MatrixView& w, const ActivationsView& x, int panel, const float* bias, float* y, int64_t ldy) {
  const Segments segments(w);
  const int n_quads = w.k / kLutWidth;
  const uint8_t* block_planes = w.planes + panel * w.panel_bytes();
  const int64_t first_group = int64_t{panel} * w.n_groups();
  const uint16_t* scales = w.scales + first_group * kPanel;
  const uint16_t* offsets = w.offsets ? w.offsets + first_group * kPanel : nullptr;
  const int64_t q_stride = int64_t{x.n_blocks} * kActBlock;
  ActivationsView rows[Rows];
  Floats sums[Rows][kVectors], group[Rows][kVectors];
  float x_sum[Rows] = {};
  for (int r = 0; r < Rows; ++r) {
    rows[r] = x.from_row(r);
    rows[r].lows = nullptr;
    for (int v = 0; v < kVectors; ++v) sums[r][v] = group[r][v] = zero_floats();
  }
  int left_in_group = w.group_size / kLutWidth;
  for (int block = 0; block < x.n_blocks; ++block) {
    const int block_quads = smaller(kBlockQuads, n_quads - block * kBlockQuads);
    for (int at = 0; at < block_quads * kHalfPanel * Bits; at += 64) prefetch(block_planes + kMultiplyPrefetchBytes + at);
    for (int first = 0; first < block_quads; first += segments.quads) {
      const int quads = smaller(segments.quads, block_quads - first);
      const int8_t* q = x.q + (int64_t{block} * kBlockQuads + first) * kLutWidth;
      Ints dot[Rows][kVectors];
      int32_t q_sum[Rows];
      for (int r = 0; r < Rows; ++r) {
        q_sum[r] = sum_runs(rows[r], block, first, quads).q;
        const Ints constant = set_ints(w.affine == Affine::symmetric ? -w.zero * q_sum[r] : 0);
        for (int v = 0; v < kVectors; ++v) dot[r][v] = constant;
      }
      if constexpr (Bits == 8) {
        const uint8_t* section = block_planes + kHalfPanel * first * 4;
        multiply_section<8, 0, Rows>(section, kHalfPanel * block_quads * 4, q, q_stride, quads, dot);
      } else {
        for_each_section<Bits>([&]<int FirstPlane, int Planes>() __attribute__((always_inline)) {
          const uint8_t* section = block_planes + kHalfPanel * (block_quads * FirstPlane + first * Planes);
          multiply_section<Planes, FirstPlane, Rows>(section, 0, q, q_stride, quads, dot);
        });
      }
      const bool first_of_group = left_in_group == w.group_size / kLutWidth;
      left_in_group -= quads;
      for (int r = 0; r < Rows; ++r) {
        const float act_scale = rows[r].scales[block];
        Floats part[kVectors];
        for (int v = 0; v < kVectors; ++v) {
          part[v] = mul(set_floats(act_scale), to_floats(dot[r][v]));
          if (!first_of_group) part[v] = add(group[r][v], part[v]);
        }
        x_sum[r] += act_scale * static_cast<float>(q_sum[r]);
        if (left_in_group == 0) {
          add_group(w, scales, offsets, part, x_sum[r], sums[r]);
          x_sum[r] = 0;
        } else {
          for (int v = 0; v < kVectors; ++v) group[r][v] = part[v];
        }
      }
      if (left_in_group == 0) {
        left_in_group = w.group_size / kLutWidth;
        scales += kPanel;
        if (offsets) offsets += kPanel;
      }
    }
    block_planes += block_quads * kHalfPanel * Bits;
  }
  for (int r = 0; r < Rows; ++r) store_panel(w, panel, sums[r], bias, y + r * ldy);
}

template <int Bits>
void lut_multiply_bits(const MatrixView& w, const ActivationsView& x, int n_rows, int panel_begin, int panel_end,
                       const float* bias, float* y, int64_t ldy) {
  const int n_tiles = (n_rows + kMultiplyRows - 1) / kMultiplyRows;
  for (int panel = panel_begin; panel < panel_end; ++panel) {
    for (int tile = 0; tile < n_tiles; ++tile) {  // of nearly the same number of rows
      const int row = n_rows * tile / n_tiles, rows = n_rows * (tile + 1) / n_tiles - row;
      for_each_index<kMultiplyRows>([&]<int I>() {
        if (rows == I + 1) multiply_rows<Bits, I + 1>(w, x.from_row(row), panel, bias, y + row * ldy, ldy);
      });
    }
  }
}

}  // namespace
}  // namespace elute
