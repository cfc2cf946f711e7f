// What bounds the kernels on this CPU, to measure their speed against: reading memory in order, int8 multiply-adds for
// matmuls, f32 ones for attention.
// No kernel allocates, throws or knows of threads.
#pragma once
#include <cstdint>

namespace elute {

constexpr int kReadRun = 128;   // bytes: two cache lines
constexpr int kMostStreams = 3;  // a fourth reads no more: Zen 5, 1 and 2 threads, out of cache

struct CeilingKernels {
  // Reads n_bytes (a positive multiple of kReadRun) once and returns the or of all words: n_streams (1 to kMostStreams)
  // contiguous pieces, each in order, a run of each in turn.
  uint64_t (*read)(const uint8_t* data, int64_t n_bytes, int n_streams);
  // n_steps times the multiply-adds of lut_gemm's register tile, every operand in a register or the L1 cache. Returns
  // the sum of all products, which is 0.
  float (*multiply)(int64_t n_steps);
  int multiplies_per_step;  // multiply-adds, of two operations each
  // The same of f32, in the shape of attention's register tile. Returns a sum that only keeps the work from being left out.
  float (*fma)(int64_t n_steps);
  int fmas_per_step;
};

extern const CeilingKernels ceiling_kernels_scalar;
#if defined(__x86_64__)
extern const CeilingKernels ceiling_kernels_avx2;
extern const CeilingKernels ceiling_kernels_avx512;
#elif defined(__aarch64__)
extern const CeilingKernels ceiling_kernels_neon;
extern const CeilingKernels ceiling_kernels_neon_i8mm;
#endif

}  // namespace elute
