#include "simd/integer_avx2.h"
// The vocabulary must come first.
#include "kernels/matmul_body.h"
#include "kernels/quantize_avx2.h"

namespace elute {
const MatmulKernels matmul_kernels_avx2 = {quantize, lut_matmul, lut_gemm, lut_dequant, channel_matmul, channel_gemm};
}
