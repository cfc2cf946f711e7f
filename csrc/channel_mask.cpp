#include "channel_mask.h"

#include "simd/integer_scalar.h"

namespace elute {

void column_squares(const MatmulKernels& kernels, const MatrixView& w, uint8_t* codes, double* squares) {
  for (int k = 0; k < w.k; ++k) squares[k] = 0;
  for (int panel = 0; panel < w.n_panels(); ++panel) {
    kernels.lut_dequant(w, panel, codes);
    for (int group = 0; group < w.n_groups(); ++group) {
      float scales[kPanel], offsets[kPanel];
      for (int j = 0; j < kPanel; ++j) {
        const int64_t at = (int64_t{panel} * w.n_groups() + group) * kPanel + j;
        scales[j] = half_to_float(w.scales[at]);
        // As scale * code + offset; the outputs beyond N have scale and offset 0.
        offsets[j] = w.affine == Affine::symmetric ? -scales[j] * static_cast<float>(w.zero)
                     : w.affine == Affine::zero    ? -scales[j] * half_to_float(w.offsets[at])
                                                   : half_to_float(w.offsets[at]);
      }
      const int first = group * w.group_size;
      for (int k = first; k < first + w.group_size; ++k) {
        const uint8_t* column = codes + int64_t{k / kLutWidth} * kPanel * kLutWidth + k % kLutWidth;
        float sum = 0;
        for (int j = 0; j < kPanel; ++j) {
          const float weight = scales[j] * static_cast<float>(column[j * kLutWidth]) + offsets[j];
          sum += weight * weight;
        }
        squares[k] += sum;
      }
    }
  }
}

}  // namespace elute
