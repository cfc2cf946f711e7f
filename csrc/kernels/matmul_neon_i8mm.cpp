#include "simd/integer_neon.h"
// The vocabulary must come first.
#include "kernels/matmul_body.h"
#include "kernels/quantize_neon.h"

namespace elute {
const MatmulKernels matmul_kernels_neon_i8mm = {quantize, lut_matmul, lut_gemm, lut_dequant};
}
