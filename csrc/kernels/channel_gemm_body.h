// Prefill in channel order: the codes of some columns of a tile, then the multiply of lut_gemm, panel by panel.
// Included by matmul_body.h.
#pragma once
#include "kernels/channel_codes.h"
#include "kernels/lut_gemm_body.h"

namespace elute {
namespace {

template <int Bits>
void channel_gemm_bits(const ChannelMatrix& w, const ActivationsView& x, int n_rows, int tile_begin, int tile_end,
                       const float* bias, float* y, int64_t ldy, uint8_t* scratch_bytes) {
  const MatrixView shared = w.without_planes();
  const int64_t panel_bytes = panel_scratch_bytes(n_rows);
  Gemm g(Dot<Bits>{}, Bits, shared, x, n_rows, scratch_bytes);
  for (int tile = tile_begin; tile < tile_end; ++tile) {
    const int first_panel = tile * kTilePanels;
    const int n_panels = smaller(kTilePanels, shared.n_panels() - first_panel);
    const auto for_each_panel = [&](const auto& work) {
      for (int i = 0; i < n_panels; ++i) {
        g.scratch = GemmScratch(scratch_bytes + i * panel_bytes, n_rows);
        work(first_panel + i);
      }
    };
    for_each_panel([&](int) { begin_panel(g); });
    for (int block = 0; block < x.n_blocks; block += kGemmColumns / kActBlock) {
      const int n_quads = smaller(kGemmColumns, w.k - block * kActBlock) / kLutWidth;
      for (int quad = 0; quad < n_quads; ++quad) {
        const uint8_t* const* rows = w.rows + int64_t{block} * kActBlock + quad * kLutWidth;
        store_channel_codes<Bits, 0, kTilePanels>(rows, w.offset + tile * w.tile_bytes(),
                                                  scratch_bytes + quad * (kPanel * kLutWidth), panel_bytes);
      }
      for_each_panel([&](int panel) { multiply_columns<Bits>(g, panel, block, n_quads); });
    }
    for_each_panel([&](int panel) { end_panel(g, panel, bias, y, ldy); });
  }
}

void channel_gemm(const ChannelMatrix& w, const ActivationsView& x, int n_rows, int tile_begin, int tile_end,
                  const float* bias, float* y, int64_t ldy, uint8_t* scratch) {
  with_bits(w.bits,
            [&]<int Bits>() { channel_gemm_bits<Bits>(w, x, n_rows, tile_begin, tile_end, bias, y, ldy, scratch); });
}

}  // namespace
}  // namespace elute
