// lut_matmul, lut_gemm and lut_dequant in the words of a vocabulary (simd/integer_*.h), which is included first.
// Included by one file per ISA; everything stays in that file's anonymous namespace.
#pragma once
#include "kernels/lut_gemm_body.h"
#include "kernels/lut_matmul_body.h"

namespace elute {
namespace {

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
