#include "simd/integer_scalar.h"
// The vocabulary must come first.
#include "kernels/matmul_body.h"
#include "kernels/quantize_scalar.h"

namespace elute {
const MatmulKernels matmul_kernels_scalar = {quantize, lut_matmul, lut_gemm, lut_dequant, channel_matmul, channel_gemm};
}
