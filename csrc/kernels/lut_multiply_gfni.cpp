#include "simd/bits_gfni.h"
// The vocabulary must come first.
#include "kernels/lut_multiply_body.h"

namespace elute {
void lut_multiply_gfni(const MatrixView& w, const ActivationsView& x, int n_rows, int panel_begin, int panel_end,
                       const float* bias, float* y, int64_t ldy) {
  with_bits(w.bits, [&]<int Bits>() { lut_multiply_bits<Bits>(w, x, n_rows, panel_begin, panel_end, bias, y, ldy); });
}
}  // namespace elute
