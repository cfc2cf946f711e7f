#include "kernels/matmul.h"
#include "simd/integer_scalar.h"

namespace elute {

void dequant_row(const MatrixView& w, int row, float* out) {
  const int panel = row / kPanel, in_panel = row % kPanel;
  const int half = in_panel / kHalfPanel, j = in_panel % kHalfPanel;
  const uint8_t* section = w.planes + panel * w.panel_bytes();
  const int n_quads = w.k / kLutWidth;
  for (int block = 0; block < n_quads; block += kBlockQuads) {
    const int quads = n_quads - block < kBlockQuads ? n_quads - block : kBlockQuads;
    uint32_t codes[kBlockQuads] = {};  // 4 codes of a quad, a byte each
    for (int first = 0; first < w.bits;) {
      const int planes = w.bits - first >= 4 ? 4 : w.bits - first >= 2 ? 2 : 1;
      for (int quad = 0; quad < quads; ++quad) {
        const uint8_t* bytes = section + quad * kHalfPanel * planes + j * planes;
        for (int plane = 0; plane < planes; ++plane) {
          const uint32_t n = bytes[plane] >> (4 * half) & 15u;
          codes[quad] |= ((n & 1) | (n & 2) << 7 | (n & 4) << 14 | (n & 8) << 21) << (first + plane);
        }
      }
      section += quads * kHalfPanel * planes;
      first += planes;
    }
    for (int i = 0; i < quads * kLutWidth; ++i) {
      const int column = block * kLutWidth + i;
      const int64_t group = (int64_t{panel} * w.n_groups() + column / w.group_size) * kPanel + in_panel;
      const float code = static_cast<float>(codes[i / kLutWidth] >> (8 * (i % kLutWidth)) & 255u);
      const float scale = half_to_float(w.scales[group]);
      out[column] = w.affine == Affine::symmetric ? scale * (code - static_cast<float>(w.zero))
                    : w.affine == Affine::zero    ? scale * (code - half_to_float(w.offsets[group]))
                                                  : scale * code + half_to_float(w.offsets[group]);
    }
  }
}

}  // namespace elute
