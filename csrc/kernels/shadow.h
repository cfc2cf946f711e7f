// Shadow outlier execution: what the NPU clips, and its product. Source: llm.npu (arXiv 2407.05858), section 3.3; the
// arithmetic, operation by operation: src/elute/npu/reference.py, whose results these kernels equal bit for bit.
// No kernel allocates, throws or knows of threads.
#pragma once
#include <cstdint>

#include "kernels/matmul.h"

namespace elute {

constexpr float kMostSteps = 0x1p24f;  // |round(x / scale)| beyond is refused: f32 holds whole numbers up to here
constexpr int kMostWeight = 127;       // |weight| of an int8 matrix

// Two outliers of one row: rows of w.T and residuals. A lone one has a second residual of 0.
struct ShadowPair {
  int32_t first, second;
  int16_t residuals[2];
};

// What a device returned.
enum class DeviceOutput : int { int32 = 0, int8 = 1, float32 = 2 };

// One row of y = result + shadow, n outputs.
struct FinishedRow {
  DeviceOutput type;
  const void* result;           // [n] of that type
  float output_scale;           // of int8 results
  const int32_t* shadow;        // [n]; null: none, or in wide_shadow
  const int64_t* wide_shadow;
  const float* scales;          // [n] input scale * weight scale
  const float* bias;            // [n] or null
  float* y;
  int64_t n;
};

struct ShadowKernels {
  // q = clip(round(x / scale)) i8 [k]; where that clips, the channels, ascending, and what was clipped. Both have room for k.
  // -> how many, or -1 - i where x[i] is the first that is not finite or beyond kMostSteps.
  int64_t (*split_outliers)(const float* x, int64_t k, float scale, int8_t* q, int32_t* channels, int32_t* residuals);
  // out i32 [n_rows][n] = the sums over the pairs starts[r] to starts[r + 1] of row r; every sum fits, in any order of adding.
  void (*shadow_product)(const ShadowPair* pairs, const int32_t* starts, int64_t n_rows, const int8_t* rows, int64_t n,
                         int32_t* out);
  // The same of one row, of any residuals, in i64.
  void (*shadow_row)(const int32_t* slots, const int32_t* residuals, int64_t count, const int8_t* rows, int64_t n,
                     int64_t* out);
  // The product of q and w, k channels, and of the residuals of the same row of x with w.
  int64_t (*full_product)(const int8_t* q, const int8_t* w, int64_t k, const int32_t* channels, const int32_t* residuals,
                          int64_t count);
  // Row `column` of Wq.T, i8 [n], Wq = clip(round(w / weight_scale)) within +-kMostWeight; a scale for each output or,
  // with scale_step 0, one for all. -> whether all of it is finite. Only the quads of the column are read.
  bool (*weight_column)(const MatrixView& w, int column, const float* weight_scales, int scale_step, int8_t* out);
  // The same, from the codes of the channel in channel order: w.row_bytes() from `codes` on.
  bool (*weight_column_of_row)(const ChannelMatrix& w, int channel, const uint8_t* codes, const float* weight_scales,
                               int scale_step, int8_t* out);
  // clip(round(w / weight_scale)) of n weights. -> whether all are finite.
  bool (*quantize_weights)(const float* w, int64_t n, float weight_scale, int8_t* out);
  void (*finish)(const FinishedRow& row);
};

extern const ShadowKernels shadow_kernels_scalar;
#if defined(__x86_64__)
extern const ShadowKernels shadow_kernels_avx2;
extern const ShadowKernels shadow_kernels_avx512;
#elif defined(__aarch64__)
extern const ShadowKernels shadow_kernels_neon;
#endif

}  // namespace elute
