// Shadow outlier execution over whole arrays: outliers in compressed rows, and the kernel that each row's product takes.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/shadow.h"

namespace elute {

// Row r has residuals[i] at channels[i] (or slots[i]) for i from starts[r] to starts[r + 1].
struct SplitRows {
  std::unique_ptr<int8_t[]> q;        // [rows, k]
  std::unique_ptr<int32_t[]> starts;  // [rows + 1]
  std::unique_ptr<int32_t[]> channels, residuals;
  int64_t count;
};

// Of x f32 [rows, k]. Throws std::invalid_argument where x is not finite or too many steps from 0.
SplitRows split_rows(const ShadowKernels& kernels, const float* x, int64_t n_rows, int64_t k, float scale);

struct OutlierRows {
  const int32_t* starts;
  const int32_t* at;  // channels, or slots: rows of the weights
  const int32_t* residuals;
  int64_t n_rows;
};

// Whether every sum of a product with int8 weights fits an i32 by the bound sum |residual| * 128.
bool product_fits_int32(const OutlierRows& outliers);
// out [rows, n], weights i8 [slots, n]. The narrow one only if product_fits_int32.
void shadow_product(const ShadowKernels& kernels, const OutlierRows& outliers, const int8_t* weights, int64_t n,
                    int32_t* out);
void shadow_product(const ShadowKernels& kernels, const OutlierRows& outliers, const int8_t* weights, int64_t n,
                    int64_t* out);

}  // namespace elute
