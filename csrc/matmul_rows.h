// The two ways to multiply a few or many rows by a matrix: look each one up, or turn codes into bytes and multiply.
// They give the same bits, so which one a caller takes is a matter of speed (src/elute/kernels/registry.py).
#pragma once
#include "kernels/matmul.h"
#include "thread_pool.h"

namespace elute {

constexpr int kResultRows = 256;  // rows of a panel that a chunk of products holds: 32 KiB

// The panels of w as a matrix of their own.
MatrixView part_of(const MatrixView& w, Range panels);

// y[r, n] = x @ w.T for panels.begin <= n / kPanel < panels.end and every row; y has ldy floats a row and, like bias
// (null: none), points at output 0. Wants x.tables.
void matmul_by_lookup(const MatmulKernels& kernels, const MatrixView& w, const ActivationsView& x, int n_rows,
                      Range panels, const float* bias, float* y, int64_t ldy);

// The same without tables, few rows directly where the level has lut_multiply; scratch: gemm_scratch_bytes(n_rows),
// 64-byte aligned, this thread's alone.
void matmul_by_multiply(const MatmulKernels& kernels, const MatrixView& w, const ActivationsView& x, int n_rows,
                        Range panels, const float* bias, float* y, int64_t ldy, uint8_t* scratch);

// Whether that takes lut_multiply, which wants no scratch; else it is lut_gemm.
bool multiplies_directly(const MatmulKernels& kernels, int n_rows);

}  // namespace elute
