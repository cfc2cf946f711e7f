// Prefill on ARM: dequantization of some columns of a panel into the first-level cache, then an integer multiply for a
// batch of rows, by the register tile of tile_neon_*.h, which is included first. Included by matmul_neon*.cpp.
// lut_gemm_body.h does the same where a product takes one quad; here it takes 4 quads, or pairs of them and of rows.
#pragma once
#include "kernels/groups_body.h"

namespace elute {
namespace {

constexpr int kTileOutputs = kTileVectors * kLanes;
constexpr int kRunColumns = 512;  // dequantized at a time: their codes are 16 KiB, half a first-level cache
constexpr int kBatchRows = 128;   // that share a dequantization, which then is 5 % of the instructions or less
constexpr int kRunGroups = kRunColumns / kSumRun + 1;

// What a batch of rows keeps while it goes through a panel.
struct Batch {
  alignas(64) uint8_t codes[kRunColumns * kPanel];  // of the columns in work, in the tile's order
  float scales[kRunGroups * kPanel];                // [group that those columns touch][kPanel]
  float offsets[kRunGroups * kPanel];
  float sums[kBatchRows * kPanel];                  // [row][kPanel], of finished groups
  float group[kBatchRows * kPanel];                 // of the one that is not
  float x_sums[kBatchRows];                         // of its activations
};

struct Gemm {
  const MatrixView& w;
  ActivationsView x;  // from the batch's first row
  int n_rows;
  int segment_quads, group_quads;
  int minus;  // times the sum of q: what a product of codes starts from
  Batch& batch;

  Gemm(const MatrixView& matrix, const ActivationsView& activations, int rows, int code_bias, Batch& memory)
      : w(matrix),
        x(activations),
        n_rows(rows),
        segment_quads(Segments(matrix).quads),
        group_quads(matrix.group_size / kLutWidth),
        minus(code_bias - (matrix.affine == Affine::symmetric ? matrix.zero : 0)),
        batch(memory) {}
};

// Of `quads` quads of a row from quad `first` of a block.
ELUTE_INLINE int32_t sum_of_q(const ActivationsView& x, int row, int block, int first, int quads) {
  constexpr int kRunQuads = kSumRun / kLutWidth;
  const int32_t* sums = x.sums + (int64_t{row} * x.n_blocks + block) * (kActBlock / kSumRun) + first / kRunQuads;
  int32_t sum = 0;
  for (int i = 0; i < quads; i += kRunQuads) sum += *sums++;
  return sum;
}

inline void widen_scales(const uint16_t* halves, int n_groups, float* out) {
  for (int i = 0; i < n_groups * kPanel; i += kLanes) store_floats(out + i, load_halves(halves + i));
}

// Adds a finished group to the sums of Rows rows, in the order that reference.py fixes.
template <Affine kind, int Rows>
ELUTE_INLINE void add_groups(const float* scale, const float* offset, const Floats (&group)[Rows][kTileVectors],
                             const float* x_sums, float* sums) {
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) {
      float* to = sums + r * kPanel + v * kLanes;
      const Floats y = load_floats(to), factor = load_floats(scale + v * kLanes);
      if constexpr (kind == Affine::symmetric) {
        store_floats(to, add(y, mul(factor, group[r][v])));
      } else {
        const Floats shift = mul(load_floats(offset + v * kLanes), set_floats(x_sums[r]));
        store_floats(to, kind == Affine::zero ? add(y, mul(factor, sub(group[r][v], shift)))
                                              : add(add(y, mul(factor, group[r][v])), shift));
      }
    }
  }
}

// Where gemm_rows is: columns that share a group and an activation block.
struct Segment {
  int block, quads;
  int group;          // of Batch::scales
  bool begins, ends;  // the group
  const uint8_t* codes;
  const int8_t* q;    // of the first row
};

// Rows from `row` times a segment, kTileOutputs outputs from `output`. starts: what their products start from.
template <int Rows>
ELUTE_INLINE void multiply_tile(const Gemm& g, int row, int output, const Segment& at, const int32_t (&starts)[Rows]) {
  Ints dot[Rows][kTileVectors];
  multiply_quads<Rows>(at.codes + output * kOperandChannels, at.q, int64_t{g.x.n_blocks} * kActBlock, at.quads, starts,
                       dot);
  Floats part[Rows][kTileVectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    const Floats act = set_floats(g.x.scales[int64_t{row + r} * g.x.n_blocks + at.block]);
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) part[r][v] = mul(act, to_floats(dot[r][v]));
  }
  const int64_t first = int64_t{row} * kPanel + output;
  if (!at.begins) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v)
        part[r][v] = add(load_floats(g.batch.group + first + r * kPanel + v * kLanes), part[r][v]);
  }
  if (!at.ends) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) store_floats(g.batch.group + first + r * kPanel + v * kLanes, part[r][v]);
    return;
  }
  const float* scale = g.batch.scales + at.group * kPanel + output;
  const float* offset = g.batch.offsets + at.group * kPanel + output;
  float* sums = g.batch.sums + first;
  switch (g.w.affine) {
    case Affine::symmetric: return add_groups<Affine::symmetric>(scale, offset, part, g.batch.x_sums + row, sums);
    case Affine::zero: return add_groups<Affine::zero>(scale, offset, part, g.batch.x_sums + row, sums);
    case Affine::min: return add_groups<Affine::min>(scale, offset, part, g.batch.x_sums + row, sums);
  }
}

// Rows from `row` times the columns from `block` whose codes and scales are in the batch.
template <int Rows>
[[gnu::noinline]] void gemm_rows(const Gemm& g, int row, int block, int n_quads) {
  int of_group = block * kBlockQuads % g.group_quads;  // quads of the unfinished group
  Segment at{};
  for (int quad = 0; quad < n_quads; quad += at.quads) {
    const int first = quad % kBlockQuads;
    at.block = block + quad / kBlockQuads;
    at.quads = smaller(smaller(g.segment_quads, kBlockQuads - first), n_quads - quad);
    at.begins = of_group == 0;
    of_group += at.quads;
    at.ends = of_group == g.group_quads;
    at.codes = g.batch.codes + quad * kQuadCodes;
    at.q = g.x.q + int64_t{row} * g.x.n_blocks * kActBlock + int64_t{block} * kActBlock + quad * kLutWidth;
    int32_t starts[Rows];
    for (int r = 0; r < Rows; ++r) {
      const int32_t q_sum = sum_of_q(g.x, row + r, at.block, first, at.quads);
      starts[r] = g.minus * q_sum;
      if (g.w.affine == Affine::symmetric) continue;
      const float term = g.x.scales[int64_t{row + r} * g.x.n_blocks + at.block] * static_cast<float>(q_sum);
      g.batch.x_sums[row + r] = at.begins ? term : g.batch.x_sums[row + r] + term;
    }
    for (int output = 0; output < kPanel; output += kTileOutputs) multiply_tile<Rows>(g, row, output, at, starts);
    if (at.ends) {
      of_group = 0;
      ++at.group;
    }
  }
}

template <int Rows>
ELUTE_INLINE void gemm_all_rows(const Gemm& g, int row, int block, int n_quads) {
  for (; row + Rows <= g.n_rows; row += Rows) gemm_rows<Rows>(g, row, block, n_quads);
  if constexpr (Rows > 1) gemm_all_rows<Rows / 2>(g, row, block, n_quads);
}

// fill(block, n_quads): puts the operands of these columns into the batch.
template <typename Fill>
ELUTE_INLINE void multiply_panel(const Gemm& g, int panel, const float* bias, float* y, int64_t ldy, const Fill& fill) {
  const MatrixView& w = g.w;
  for (int i = 0; i < g.n_rows * kPanel; i += kLanes) store_floats(g.batch.sums + i, zero_floats());
  for (int block = 0; block < g.x.n_blocks; block += kRunColumns / kActBlock) {
    const int first_quad = block * kBlockQuads;
    const int n_quads = smaller(kRunColumns, w.k - block * kActBlock) / kLutWidth;
    fill(block, n_quads);
    const int first_group = first_quad / g.group_quads;
    const int n_groups = (first_quad + n_quads + g.group_quads - 1) / g.group_quads - first_group;
    const int64_t scales_at = (int64_t{panel} * w.n_groups() + first_group) * kPanel;
    widen_scales(w.scales + scales_at, n_groups, g.batch.scales);
    if (w.offsets) widen_scales(w.offsets + scales_at, n_groups, g.batch.offsets);
    gemm_all_rows<kTileRows>(g, 0, block, n_quads);
  }
  for (int r = 0; r < g.n_rows; ++r) {
    Floats sums[kVectors];
    for (int v = 0; v < kVectors; ++v) sums[v] = load_floats(g.batch.sums + r * kPanel + v * kLanes);
    store_panel(w, panel, sums, bias, y + r * ldy);
  }
}

// multiply.template operator()<Bits>(product of the rows from `row`, row) for each batch of rows.
template <typename F>
void for_each_batch(const MatrixView& w, const ActivationsView& x, int n_rows, const F& multiply) {
  Batch batch;
  for (int row = 0; row < n_rows; row += kBatchRows) {
    with_bits(w.bits, [&]<int Bits>() {
      multiply.template operator()<Bits>(
          Gemm(w, x.from_row(row), smaller(kBatchRows, n_rows - row), kCodeBias<Bits>, batch), row);
    });
  }
}

void lut_gemm(const MatrixView& w, const ActivationsView& x, int n_rows, int panel_begin, int panel_end,
              const float* bias, float* y, int64_t ldy, uint8_t*) {
  for_each_batch(w, x, n_rows, [&]<int Bits>(const Gemm& g, int row) {
    for (int panel = panel_begin; panel < panel_end; ++panel) {
      multiply_panel(g, panel, bias, y + row * ldy, ldy, [&](int block, int n_quads) {
        const int64_t at = int64_t{block} * kBlockQuads * (kHalfPanel * Bits);
        dequant_operands<Bits>(w.planes + panel * w.panel_bytes() + at, n_quads, g.batch.codes);
      });
    }
  });
}

// Panel by panel of a tile: of each channel's piece the panel's part alone.
void channel_gemm(const ChannelMatrix& w, const ActivationsView& x, int n_rows, int tile_begin, int tile_end,
                  const float* bias, float* y, int64_t ldy, uint8_t*) {
  const MatrixView shared = w.without_planes();
  const int panel_end = smaller(tile_end * kTilePanels, shared.n_panels());
  for_each_batch(shared, x, n_rows, [&]<int Bits>(const Gemm& g, int row) {
    for (int panel = tile_begin * kTilePanels; panel < panel_end; ++panel) {
      multiply_panel(g, panel, bias, y + row * ldy, ldy, [&](int block, int n_quads) {
        const uint8_t* const* rows = w.rows + int64_t{block} * kActBlock;
        const int64_t at = w.offset + panel / kTilePanels * w.tile_bytes();
        switch (panel % kTilePanels) {
          case 0: return channel_operands<Bits, 0>(rows, at, n_quads, g.batch.codes);
          case 1: return channel_operands<Bits, 1>(rows, at, n_quads, g.batch.codes);
          case 2: return channel_operands<Bits, 2>(rows, at, n_quads, g.batch.codes);
          case 3: return channel_operands<Bits, 3>(rows, at, n_quads, g.batch.codes);
        }
      });
    }
  });
}

void lut_dequant(const MatrixView& w, int panel, uint8_t* codes) {
  with_bits(w.bits, [&]<int Bits>() {
    dequant_quads<Bits>(w.planes + panel * w.panel_bytes(), w.k / kLutWidth, codes);
  });
}

}  // namespace
}  // namespace elute
