#include "kernels/shadow_body.h"
#include "simd/float_scalar.h"

namespace elute {

constexpr ShadowKernels shadow_kernels_scalar = shadow_kernels<FloatScalar>();

}  // namespace elute
