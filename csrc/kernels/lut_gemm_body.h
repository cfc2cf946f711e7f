// Prefill: two-level dequantization of some columns of a panel into the first-level cache, then an integer multiply for
// all rows. Included by matmul_body.h.
#pragma once
#include "kernels/groups_body.h"

namespace elute {
namespace {

// Codes u8 [quad][kPanel][kLutWidth] of whole blocks; the row's last block may be shorter. `planes` is where the first
// block's lie.
template <int Bits>
void dequant_quads(const uint8_t* planes, int n_quads, uint8_t* codes) {
  constexpr int kQuadCodes = kPanel * kLutWidth;  // bytes
  for (int block_quad = 0; block_quad < n_quads; block_quad += kBlockQuads) {
    const int block_quads = smaller(kBlockQuads, n_quads - block_quad);
    for_each_section<Bits>([&]<int FirstPlane, int Planes>() __attribute__((always_inline)) {
      constexpr int kQuadBytes = kHalfPanel * Planes;
      constexpr int kPerVector = 4 / Planes;  // code vectors from one vector of nibbles
      const uint8_t* section = planes + kHalfPanel * block_quads * FirstPlane;
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
    planes += block_quads * kHalfPanel * Bits;
  }
}

// What lut_gemm keeps in its scratch.
struct GemmScratch {
  uint8_t* codes;           // [kGemmColumns / kLutWidth][kPanel][kLutWidth], of the columns in work
  float *scales, *offsets;  // [groups that those columns touch][kPanel]
  float *sums, *group;      // [n_rows][kPanel], of finished groups and of the one that is not
  float* x_sums;            // [n_rows], of the unfinished group's activations

  GemmScratch(uint8_t* scratch, int n_rows)
      : codes(scratch),
        scales(reinterpret_cast<float*>(codes + kGemmColumns * kPanel)),
        offsets(scales + kGemmGroups * kPanel),
        sums(offsets + kGemmGroups * kPanel),
        group(sums + int64_t{n_rows} * kPanel),
        x_sums(group + int64_t{n_rows} * kPanel) {}
};

inline void widen_scales(const uint16_t* halves, int n_groups, float* out) {
  for (int i = 0; i < n_groups * kPanel; i += kLanes) store_floats(out + i, load_halves(halves + i));
}

// A product in work.
struct Gemm {
  const MatrixView& w;
  const ActivationsView& x;
  int n_rows;
  int64_t q_stride;  // from row to row of x.q
  int segment_quads, group_quads;
  int centre;  // codes are multiplied as code - centre
  int rest;    // and rest * (sum of q) is added; 0 as a rule
  const uint8_t* ahead = nullptr;  // the planes that will be dequantized next
  int64_t ahead_bytes = 0;
  GemmScratch scratch;

  template <class D>
  Gemm(D, int bits, const MatrixView& matrix, const ActivationsView& activations, int rows, uint8_t* bytes)
      : w(matrix),
        x(activations),
        n_rows(rows),
        q_stride(int64_t{x.n_blocks} * kActBlock),
        segment_quads(Segments(matrix).quads),
        group_quads(matrix.group_size / kLutWidth),
        scratch(bytes, rows) {
    const int zero = matrix.affine == Affine::symmetric ? matrix.zero : 0;
    centre = D::centre(bits, zero);
    rest = centre - zero;
  }
};

// partial[r][v] += codes * q of one quad.
template <class D, int Rows>
ELUTE_INLINE void add_quad(typename D::Partial (&partial)[Rows][kVectors], const uint8_t* codes, const int8_t* q,
                           int64_t q_stride) {
  if constexpr (requires { D::add_tile(partial, codes, q, q_stride); }) {
    D::add_tile(partial, codes, q, q_stride);
  } else {
    Bytes activations[Rows];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) activations[r] = broadcast_quad(q + r * q_stride);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const Bytes c = load_bytes(codes + v * kBytes);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) D::add(partial[r][v], c, activations[r]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) keep_in_register(partial[r][v]);
  }
}

// dot[r][v] = (codes - centre) * q over `quads` quads, quad_stride bytes apart in q; word(r): their PairSums word in row r.
template <class D, int Rows, typename Words>
ELUTE_INLINE void multiply_quads(const uint8_t* codes, const int8_t* q, int64_t q_stride, int64_t quad_stride, int quads,
                                 const Words& word, int centre, Ints (&dot)[Rows][kVectors]) {
  for (int done = 0; done < quads;) {
    const int run = smaller(quads - done, D::kRun);
    typename D::Partial partial[Rows][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const auto start = D::start(done == 0 ? word(r) : 0, centre);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) partial[r][v] = start;
    }
    const uint8_t* end = codes + run * (kPanel * kLutWidth);
#pragma GCC unroll 1
    for (; codes != end; codes += kPanel * kLutWidth, q += quad_stride) add_quad<D>(partial, codes, q, q_stride);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        dot[r][v] = done == 0 ? D::total(partial[r][v]) : add_ints(dot[r][v], D::total(partial[r][v]));
    done += run;
  }
}

// Adds a vector of a finished group to its sums, in the order that reference.py fixes.
template <Affine Kind>
ELUTE_INLINE void add_group_vector(float* sums, Floats scale, const float* offset, float x_sum, Floats group) {
  if constexpr (Kind == Affine::symmetric) {
    store_floats(sums, add(load_floats(sums), mul(scale, group)));
  } else {
    const Floats shift = mul(load_floats(offset), set_floats(x_sum));
    store_floats(sums, Kind == Affine::zero ? add(load_floats(sums), mul(scale, sub(group, shift)))
                                            : add(add(load_floats(sums), mul(scale, group)), shift));
  }
}

// The same for all of Rows rows.
template <Affine Kind, int Rows>
ELUTE_INLINE void add_groups(const float* scale, const float* offset, const Floats (&group)[Rows][kVectors],
                             const float* x_sums, float* sums) {
  Floats factors[kVectors];  // loaded before the stores, which could be to the same place for all that the compiler knows
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) factors[v] = load_floats(scale + v * kLanes);
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      add_group_vector<Kind>(sums + r * kPanel + v * kLanes, factors[v], offset + v * kLanes, x_sums[r], group[r][v]);
}

// f.template operator()<Kind>() for the kind of a matrix, so that the compiler takes the choice out of the loops.
template <typename F>
ELUTE_INLINE void with_affine(Affine affine, F&& f) {
  if (affine == Affine::symmetric) f.template operator()<Affine::symmetric>();
  else if (affine == Affine::zero) f.template operator()<Affine::zero>();
  else f.template operator()<Affine::min>();
}

// Rows from `row` times the columns from `block` whose codes and scales are in the scratch.
//   SegmentQuads  0: any number, the last segment may be shorter
//   Whole         a segment is a group
template <class D, int Rows, int SegmentQuads, bool Whole>
[[gnu::noinline]] void gemm_rows(const Gemm& g, int row, int block, int n_quads) {
  const int segment_quads = SegmentQuads ? SegmentQuads : g.segment_quads;
  const int group_quads = g.group_quads;
  const int64_t q_stride = g.q_stride;
  const int64_t n_blocks = g.x.n_blocks;
  const Affine affine = g.w.affine;
  const int centre = g.centre, rest = g.rest;
  const uint8_t* codes = g.scratch.codes;
  const int8_t* q = g.x.q + row * q_stride + int64_t{block} * kActBlock;
  const float* act_scales = g.x.scales + row * n_blocks + block;
  const PairSums* pairs = g.x.pairs + row * n_blocks + block;
  const float *scale = g.scratch.scales, *offset = g.scratch.offsets;
  float* sums = g.scratch.sums + int64_t{row} * kPanel;
  float* group = g.scratch.group + int64_t{row} * kPanel;
  float* x_sums = g.scratch.x_sums + row;
  int of_group = block * kBlockQuads % group_quads;  // quads of the unfinished group
  for (int quad = 0; quad < n_quads; quad += segment_quads) {
    const int quads = SegmentQuads ? SegmentQuads : smaller(segment_quads, n_quads - quad);
    const int of_block = SegmentQuads == kBlockQuads ? 0 : quad % kBlockQuads;
    const auto word = [&](int r) { return pairs[r * n_blocks].of(of_block, quads); };
    Ints dot[Rows][kVectors];
    multiply_quads<D, Rows>(codes, q, q_stride, kLutWidth, quads, word, centre, dot);
    if (rest != 0) {
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) dot[r][v] = add_ints(dot[r][v], set_ints(rest * both_pairs(word(r))));
    }
    Floats part[Rows][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Floats act = set_floats(act_scales[r * n_blocks]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) part[r][v] = mul(act, to_floats(dot[r][v]));
    }
    const bool begins = Whole || of_group == 0, ends = Whole || of_group + quads == group_quads;
    if (affine != Affine::symmetric) {
      for (int r = 0; r < Rows; ++r) {
        const float term = act_scales[r * n_blocks] * static_cast<float>(both_pairs(word(r)));
        x_sums[r] = begins ? term : x_sums[r] + term;
      }
    }
    if (!begins) {
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) part[r][v] = add(load_floats(group + r * kPanel + v * kLanes), part[r][v]);
    }
    if (!ends) {
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) store_floats(group + r * kPanel + v * kLanes, part[r][v]);
      of_group += quads;
    } else {
      with_affine(affine, [&]<Affine Kind>() __attribute__((always_inline)) {
        add_groups<Kind>(scale, offset, part, x_sums, sums);
      });
      of_group = 0;
      scale += kPanel;
      offset += kPanel;
    }
    codes += quads * (kPanel * kLutWidth);
    q += quads * kLutWidth;
    if (SegmentQuads == kBlockQuads || (quad + quads) % kBlockQuads == 0) {
      ++act_scales;
      ++pairs;
    }
  }
}

}  // namespace
}  // namespace elute
#include "kernels/gemm_overlapped.h"
namespace elute {
namespace {

template <class D, int Rows>
ELUTE_INLINE void gemm_all_rows(const Gemm& g, int row, int block, int n_quads) {
  const bool even = n_quads % g.segment_quads == 0;
  const bool whole = even && g.segment_quads == g.group_quads;
  for (; row + Rows <= g.n_rows; row += Rows) {
    if (whole && g.segment_quads == kBlockQuads) gemm_rows<D, Rows, kBlockQuads, true>(g, row, block, n_quads);
    else if (whole && g.segment_quads == kBlockQuads / 2) gemm_rows<D, Rows, kBlockQuads / 2, true>(g, row, block, n_quads);
    else if (even && g.segment_quads == kBlockQuads) gemm_rows<D, Rows, kBlockQuads, false>(g, row, block, n_quads);
    else gemm_rows<D, Rows, 0, false>(g, row, block, n_quads);
  }
  if constexpr (Rows > 1) gemm_all_rows<D, Rows / 2>(g, row, block, n_quads);
}

inline void begin_panel(const Gemm& g) {
  const int64_t n_sums = int64_t{g.n_rows} * kPanel;
  for (int64_t i = 0; i < n_sums; i += kLanes) store_floats(g.scratch.sums + i, zero_floats());
  if (g.segment_quads != g.group_quads)
    for (int64_t i = 0; i < n_sums; i += kLanes) store_floats(g.scratch.group + i, zero_floats());
}
// Adds the columns from `block` whose codes are in the scratch.
template <int Bits>
void multiply_columns(const Gemm& g, int panel, int block, int n_quads) {
  const MatrixView& w = g.w;
  const GemmScratch& scratch = g.scratch;
  const int first_quad = block * kBlockQuads;
  const int first_group = first_quad / g.group_quads;
  const int n_groups = (first_quad + n_quads + g.group_quads - 1) / g.group_quads - first_group;
  const int64_t scales_at = (int64_t{panel} * w.n_groups() + first_group) * kPanel;
  widen_scales(w.scales + scales_at, n_groups, scratch.scales);
  if (w.offsets) widen_scales(w.offsets + scales_at, n_groups, scratch.offsets);
  int row = 0;
  if constexpr (requires { &Dot<Bits>::centre_sums; }) row = gemm_overlapped_rows<Dot<Bits>>(g, block, n_quads);
  gemm_all_rows<Dot<Bits>, kGemmRows>(g, row, block, n_quads);
}
inline void end_panel(const Gemm& g, int panel, const float* bias, float* y, int64_t ldy) {
  for (int r = 0; r < g.n_rows; ++r) {
    Floats sums[kVectors];
    for (int v = 0; v < kVectors; ++v) sums[v] = load_floats(g.scratch.sums + int64_t{r} * kPanel + v * kLanes);
    store_panel(g.w, panel, sums, bias, y + r * ldy);
  }
}

template <int Bits>
void lut_gemm_bits(const MatrixView& w, const ActivationsView& x, int n_rows, int panel_begin, int panel_end,
                   const float* bias, float* y, int64_t ldy, uint8_t* scratch_bytes) {
  Gemm g(Dot<Bits>{}, Bits, w, x, n_rows, scratch_bytes);
  for (int panel = panel_begin; panel < panel_end; ++panel) {
    begin_panel(g);
    for (int block = 0; block < x.n_blocks; block += kGemmColumns / kActBlock) {
      const int n_quads = smaller(kGemmColumns, w.k - block * kActBlock) / kLutWidth;
      const uint8_t* planes = w.planes + panel * w.panel_bytes() + int64_t{block} * (kBlockQuads * kHalfPanel * Bits);
      dequant_quads<Bits>(planes, n_quads, g.scratch.codes);
      const bool last = panel + 1 == panel_end && block + kGemmColumns / kActBlock >= x.n_blocks;
      g.ahead = planes + n_quads * (kHalfPanel * Bits);
      g.ahead_bytes = last ? 0 : kGemmColumns / kLutWidth * (kHalfPanel * Bits);
      multiply_columns<Bits>(g, panel, block, n_quads);
    }
    end_panel(g, panel, bias, y, ldy);
  }
}

void lut_gemm(const MatrixView& w, const ActivationsView& x, int n_rows, int panel_begin, int panel_end,
              const float* bias, float* y, int64_t ldy, uint8_t* scratch) {
  with_bits(w.bits,
            [&]<int Bits>() { lut_gemm_bits<Bits>(w, x, n_rows, panel_begin, panel_end, bias, y, ldy, scratch); });
}
void lut_dequant(const MatrixView& w, int panel, uint8_t* codes) {
  with_bits(w.bits, [&]<int Bits>() {
    dequant_quads<Bits>(w.planes + panel * w.panel_bytes(), w.k / kLutWidth, codes);
  });
}

}  // namespace
}  // namespace elute
