#include <algorithm>
#include <cstring>

#include "kernels/matmul.h"
#include "simd/integer_scalar.h"

namespace elute {
namespace {

// The bits of a nibble, a byte each.
constexpr uint32_t spread(uint32_t n) { return (n & 1) | (n & 2) << 7 | (n & 4) << 14 | (n & 8) << 21; }
constexpr uint32_t kSpread[16] = {spread(0), spread(1), spread(2),  spread(3),  spread(4),  spread(5),
                                  spread(6), spread(7), spread(8),  spread(9),  spread(10), spread(11),
                                  spread(12), spread(13), spread(14), spread(15)};

template <int Planes>
void add_codes(const uint8_t* bytes, int shift, int first, int n_quads, uint32_t* codes) {
  for (int quad = 0; quad < n_quads; ++quad, bytes += kHalfPanel * Planes)
    for (int plane = 0; plane < Planes; ++plane) codes[quad] |= kSpread[bytes[plane] >> shift & 15u] << (first + plane);
}

}  // namespace

void dequant_row(const MatrixView& w, int row, float* out) {
  const int panel = row / kPanel, in_panel = row % kPanel;
  const int shift = 4 * (in_panel / kHalfPanel), j = in_panel % kHalfPanel;
  const uint8_t* section = w.planes + panel * w.panel_bytes();
  const int n_quads = w.k / kLutWidth;
  for (int block = 0; block < n_quads; block += kBlockQuads) {
    const int quads = std::min(n_quads - block, int{kBlockQuads});
    uint32_t codes[kBlockQuads] = {};  // 4 codes of a quad, a byte each
    for (int first = 0; first < w.bits;) {
      const int planes = w.bits - first >= 4 ? 4 : w.bits - first >= 2 ? 2 : 1;
      const uint8_t* bytes = section + j * planes;
      if (planes == 4) add_codes<4>(bytes, shift, first, quads, codes);
      else if (planes == 2) add_codes<2>(bytes, shift, first, quads, codes);
      else add_codes<1>(bytes, shift, first, quads, codes);
      section += quads * kHalfPanel * planes;
      first += planes;
    }
    uint8_t each[kBlockQuads * kLutWidth];
    for (int quad = 0; quad < quads; ++quad)
      for (int c = 0; c < kLutWidth; ++c) each[quad * kLutWidth + c] = static_cast<uint8_t>(codes[quad] >> 8 * c);
    const int begin = block * kLutWidth, end = begin + quads * kLutWidth;
    for (int at = begin; at < end;) {
      const int group_end = std::min(end, (at / w.group_size + 1) * w.group_size);
      const int64_t group = (int64_t{panel} * w.n_groups() + at / w.group_size) * kPanel + in_panel;
      const float scale = half_to_float(w.scales[group]);
      const float offset = w.affine == Affine::symmetric ? static_cast<float>(w.zero) : half_to_float(w.offsets[group]);
      if (w.affine == Affine::min)
        for (int i = at; i < group_end; ++i) out[i] = scale * static_cast<float>(each[i - begin]) + offset;
      else
        for (int i = at; i < group_end; ++i) out[i] = scale * (static_cast<float>(each[i - begin]) - offset);
      at = group_end;
    }
  }
}

}  // namespace elute
