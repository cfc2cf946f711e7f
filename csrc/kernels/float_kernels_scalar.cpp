#include "kernels/float_kernels_body.h"
#include "simd/float_scalar.h"

namespace elute {

constexpr FloatKernels float_kernels_scalar = float_kernels<FloatScalar>();

}  // namespace elute
