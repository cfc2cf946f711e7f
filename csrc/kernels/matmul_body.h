// lut_matmul, lut_gemm and lut_dequant in the words of a vocabulary (simd/integer_*.h), which is included first.
// Included by one file per ISA; everything stays in that file's anonymous namespace.
#pragma once
#include "kernels/matmul.h"

namespace elute {
namespace {

constexpr int kVectors = kPanel / kLanes;  // vectors of 32-bit lanes that hold a panel
constexpr int kHalfVectors = kVectors / 2;

constexpr int kCacheLine = 64;
// How far ahead of its lookups a panel is fetched: beyond the page that the hardware's own prefetch stops at. Zen 3, out
// of cache, 1 thread, share of the read bandwidth with and without: 4 bits 0.92 and 0.74, 8 bits 0.76 and 0.43.
constexpr int kPrefetchBytes = 2048;

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
inline RunSums sum_runs(const ActivationsView& x, int block, int first_quad, int quads) {
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

// ---- decode: lookup -------------------------------------------------------------------------------------------------

template <int Planes, int Shift>
ELUTE_INLINE void lookup_section(const uint8_t* quads, const uint8_t* quad_tables, int n_quads,
                                                          Ints* dot) {
  constexpr int kQuadBytes = kHalfPanel * Planes;
  constexpr int kPerQuad = at_least_one(kQuadBytes / kBytes);  // vectors a quad
  constexpr int kStep = at_least_one(kBytes / kQuadBytes);     // quads a vector
  Sum<Planes> low[kPerQuad], high[kPerQuad];
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

template <int Bits>
void lut_matmul_bits(const MatrixView& w, const ActivationsView& x, int panel_begin, int panel_end, const float* bias,
                     float* y) {
  const Segments segments(w);
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
      const int block_quads = smaller(kBlockQuads, n_quads - block * kBlockQuads);
      for (int at = 0; at < block_quads * kHalfPanel * Bits; at += kCacheLine)
        prefetch(block_planes + kPrefetchBytes + at);
      const uint8_t* block_tables = x.tables + int64_t{block} * kBlockQuads * kTableBytes;
      const float act_scale = x.scales[block];
      for (int first = 0; first < block_quads; first += segments.quads) {
        const int quads = smaller(segments.quads, block_quads - first);
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

// ---- prefill: two-level dequantization, then multiply ---------------------------------------------------------------

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

// ---- bits at run time -> template ------------------------------------------------------------------------------------

template <int Bits = 1, typename F>
inline void with_bits(int bits, F&& f) {
  if (bits == Bits) return f.template operator()<Bits>();
  if constexpr (Bits < 8) with_bits<Bits + 1>(bits, f);
}

void lut_matmul(const MatrixView& w, const ActivationsView& x, int panel_begin, int panel_end, const float* bias,
                float* y) {
  with_bits(w.bits, [&]<int Bits>() { lut_matmul_bits<Bits>(w, x, panel_begin, panel_end, bias, y); });
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
