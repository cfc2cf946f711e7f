#include "simd/integer_avx512.h"
// The vocabulary must come first.
#include "kernels/matmul_body.h"
#include "kernels/quantize_avx2.h"
#include "kernels/quantize_tiles.h"

namespace elute {
const MatmulKernels matmul_kernels_avx512 = {quantize_tiled, lut_matmul, lut_gemm, lut_dequant, channel_matmul,
                                              channel_gemm, nullptr, true};
}
