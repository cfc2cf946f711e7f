#include "matmul_rows.h"

#include <algorithm>

namespace elute {
namespace {

// lut_multiply unpacks a quad of 4-bit codes in 5 instructions, again for every 4 rows, lut_gemm in 21 and by way of
// memory but once: with 8 rows the former still needs half as many.
constexpr int kMostDirectRows = 8;

}  // namespace

MatrixView part_of(const MatrixView& w, Range panels) {
  MatrixView part = w;
  part.n = std::min(w.n, panels.end * kPanel) - panels.begin * kPanel;
  part.planes += panels.begin * w.panel_bytes();
  const int64_t halves = int64_t{panels.begin} * w.n_groups() * kPanel;
  part.scales += halves;
  if (w.offsets) part.offsets += halves;
  return part;
}

void matmul_by_lookup(const MatmulKernels& kernels, const MatrixView& w, const ActivationsView& x, int n_rows,
                      Range panels, const float* bias, float* y, int64_t ldy) {
  if (panels.begin >= panels.end) return;
  // One row streams all its panels; several share each panel while it is in the cache.
  const int step = n_rows == 1 ? panels.end - panels.begin : 1;
  for (int panel = panels.begin; panel < panels.end; panel += step)
    for (int r = 0; r < n_rows; ++r)
      kernels.lut_matmul(w, x.from_row(r), panel, panel + step, bias, y + r * ldy);
}

bool multiplies_directly(const MatmulKernels& kernels, int n_rows) {
  return kernels.lut_multiply && n_rows <= kMostDirectRows;
}

void matmul_by_multiply(const MatmulKernels& kernels, const MatrixView& w, const ActivationsView& x, int n_rows,
                        Range panels, const float* bias, float* y, int64_t ldy, uint8_t* scratch) {
  if (panels.begin >= panels.end) return;
  if (multiplies_directly(kernels, n_rows))
    return kernels.lut_multiply(w, x, n_rows, panels.begin, panels.end, bias, y, ldy);
  kernels.lut_gemm(w, x, n_rows, panels.begin, panels.end, bias, y, ldy, scratch);
}

}  // namespace elute
