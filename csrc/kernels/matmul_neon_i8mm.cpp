#include "simd/integer_neon_i8mm.h"
// The vocabulary must come first, then the tile.
#include "kernels/tile_neon_i8mm.h"
#include "kernels/lut_gemm_neon.h"
#include "kernels/channel_matmul_body.h"
#include "kernels/lut_matmul_body.h"
#include "kernels/quantize_neon.h"

namespace elute {
const MatmulKernels matmul_kernels_neon_i8mm = {quantize, lut_matmul, lut_gemm, lut_dequant, channel_matmul, channel_gemm};
}
