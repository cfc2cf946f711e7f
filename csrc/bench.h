// Times kernels and what bounds them, on the threads of a pool that starts before the clock does. Python is not in it.
#pragma once
#include <cstdint>
#include <vector>

#include "activations.h"
#include "dispatch.h"

namespace elute {

struct Read {
  double gb_s;    // bytes a nanosecond, the median over spans of some MiB
  uint64_t seen;  // the or of all words
};

// All threads together read n_bytes once, span by span, each thread its own part of a span as n_streams streams (see
// CeilingKernels::read). n_bytes is at least n_threads * kReadRun; what does not fill a run is left out.
Read read(const KernelTable& kernels, int n_threads, const uint8_t* data, int64_t n_bytes, int n_streams);

// Int8 multiplies and adds a nanosecond of all threads together, operands in registers and the L1 cache.
double multiply_gops(const KernelTable& kernels, int n_threads);
// The same of f32.
double fma_gflops(const KernelTable& kernels, int n_threads);

// Seconds of each of `repeats` products y[M, N] = x @ w.T, the i-th with copies[i % size], all of one shape: by lookup
// where x has tables, else by multiply, cut into chunks as the executor cuts them. x is quantized before the clock
// starts. y f32 [M, N]: the last product.
std::vector<double> matmul_seconds(const KernelTable& kernels, int n_threads, const std::vector<MatrixView>& copies,
                                   const Activations& x, int repeats, float* y);

}  // namespace elute
