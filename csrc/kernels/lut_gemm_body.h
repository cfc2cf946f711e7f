// Prefill: two-level dequantization of a panel, then an integer multiply for many rows. Included by matmul_body.h.
#pragma once
#include "kernels/groups_body.h"

namespace elute {
namespace {

template <int Bits>
void lut_dequant_bits(const MatrixView& w, int panel, uint8_t* codes) {
  const uint8_t* block_planes = w.planes + panel * w.panel_bytes();
  const int n_quads = w.k / kLutWidth;
  constexpr int kQuadCodes = kPanel * kLutWidth;  // bytes
  for (int block_quad = 0; block_quad < n_quads; block_quad += kBlockQuads) {
    const int block_quads = smaller(kBlockQuads, n_quads - block_quad);
    for_each_section<Bits>([&]<int FirstPlane, int Planes>() __attribute__((always_inline)) {
      constexpr int kQuadBytes = kHalfPanel * Planes;
      constexpr int kPerVector = 4 / Planes;  // code vectors from one vector of nibbles
      const uint8_t* section = block_planes + kHalfPanel * block_quads * FirstPlane;
      for (int at = 0; at < block_quads * kQuadBytes; at += kBytes) {
        const Bytes nibbles = load_bytes(section + at);
        Bytes parts[2][kPerVector];
        spread<Planes>(low_nibbles(nibbles), parts[0]);
        spread<Planes>(high_nibbles(nibbles), parts[1]);
        for (int half = 0; half < 2; ++half) {
          for (int i = 0; i < kPerVector; ++i) {
            const int output = at / Planes + i * kLanes;  // counted over quads of 16 outputs
            if (output / kHalfPanel >= block_quads) continue;  // read past the section's last quad
            uint8_t* to = codes + (block_quad + output / kHalfPanel) * int64_t{kQuadCodes} +
                          (half * kHalfPanel + output % kHalfPanel) * kLutWidth;
            const Bytes shifted = shift_bytes_left<FirstPlane>(parts[half][i]);
            store_bytes(to, FirstPlane == 0 ? shifted : or_bytes(load_bytes(to), shifted));
          }
        }
      }
    });
    block_planes += block_quads * kHalfPanel * Bits;
  }
}

// dot[r][v] += codes * q over `quads` quads. The unrolling keeps every sum in a register.
template <int Bits, int Rows>
ELUTE_INLINE void multiply_quads(const uint8_t* codes, const int8_t* q, int64_t q_stride, int quads,
                                 Ints (&dot)[Rows][kVectors]) {
  using D = Dot<Bits>;
  while (quads > 0) {
    const int run = smaller(quads, D::kRun);
    quads -= run;
    typename D::Partial partial[Rows][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) partial[r][v] = D::zero();
    for (int i = 0; i < run; ++i) {
      Bytes activations[Rows];
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) activations[r] = broadcast_quad(q + r * q_stride);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const Bytes c = load_bytes(codes + v * kBytes);
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) D::add(partial[r][v], c, activations[r]);
      }
      codes += kPanel * kLutWidth;
      q += kLutWidth;
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) keep_in_register(partial[r][v]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) dot[r][v] = add_ints(dot[r][v], D::total(partial[r][v]));
  }
}

template <int Bits, int Rows>
void gemm_rows(const MatrixView& w, const ActivationsView& x, int panel, const uint8_t* codes, const float* bias,
               float* y, int64_t ldy) {
  const Segments segments(w);
  const int n_quads = w.k / kLutWidth;
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
    for (int first = 0; first < block_quads; first += segments.quads) {
      const int quads = smaller(segments.quads, block_quads - first);
      const int64_t quad = int64_t{block} * kBlockQuads + first;
      Ints dot[Rows][kVectors];
      int32_t q_sum[Rows];
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        q_sum[r] = sum_runs(rows[r], block, first, quads).q;
        const int32_t zero = w.affine == Affine::symmetric ? w.zero : 0;
        const Ints constant = set_ints((Dot<Bits>::kCodeBias - zero) * q_sum[r]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) dot[r][v] = constant;
      }
      multiply_quads<Bits, Rows>(codes + quad * kPanel * kLutWidth, x.q + quad * kLutWidth, q_stride, quads, dot);
      left_in_group -= quads;
      const bool first_of_group = left_in_group + quads == w.group_size / kLutWidth;
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        const float act_scale = rows[r].scales[block];
        const Floats act = set_floats(act_scale);
        Floats part[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          part[v] = mul(act, to_floats(dot[r][v]));
          if (!first_of_group) part[v] = add(group[r][v], part[v]);
        }
        x_sum[r] += act_scale * static_cast<float>(q_sum[r]);
        if (left_in_group == 0) {
          add_group(w, scales, offsets, part, x_sum[r], sums[r]);
          x_sum[r] = 0;
        } else {
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) group[r][v] = part[v];
        }
      }
      if (left_in_group == 0) {
        left_in_group = w.group_size / kLutWidth;
        scales += kPanel;
        if (offsets) offsets += kPanel;
      }
    }
  }
  for (int r = 0; r < Rows; ++r) store_panel(w, panel, sums[r], bias, y + r * ldy);
}

template <int Bits>
void lut_gemm_bits(const MatrixView& w, const ActivationsView& x, int n_rows, int panel_begin, int panel_end,
                   const float* bias, float* y, int64_t ldy, uint8_t* scratch) {
  for (int panel = panel_begin; panel < panel_end; ++panel) {
    lut_dequant_bits<Bits>(w, panel, scratch);
    int row = 0;
    for (; row + kGemmRows <= n_rows; row += kGemmRows)
      gemm_rows<Bits, kGemmRows>(w, x.from_row(row), panel, scratch, bias, y + row * ldy, ldy);
    for (; row < n_rows; ++row) gemm_rows<Bits, 1>(w, x.from_row(row), panel, scratch, bias, y + row * ldy, ldy);
  }
}

void lut_gemm(const MatrixView& w, const ActivationsView& x, int n_rows, int panel_begin, int panel_end,
              const float* bias, float* y, int64_t ldy, uint8_t* scratch) {
  with_bits(w.bits,
            [&]<int Bits>() { lut_gemm_bits<Bits>(w, x, n_rows, panel_begin, panel_end, bias, y, ldy, scratch); });
}
void lut_dequant(const MatrixView& w, int panel, uint8_t* codes) {
  with_bits(w.bits, [&]<int Bits>() { lut_dequant_bits<Bits>(w, panel, codes); });
}

}  // namespace
}  // namespace elute
