#include "kernels/float_kernels_body.h"
#include "simd/float_neon.h"

namespace elute {

constexpr FloatKernels float_kernels_neon = float_kernels<FloatNeon>();

}  // namespace elute
