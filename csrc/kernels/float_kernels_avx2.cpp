#include "kernels/float_kernels_body.h"
#include "simd/float_avx2.h"

namespace elute {

constexpr FloatKernels float_kernels_avx2 = float_kernels<FloatAvx2>();

}  // namespace elute
