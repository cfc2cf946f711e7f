#include "kernels/shadow_body.h"
#include "simd/float_neon.h"

namespace elute {

constexpr ShadowKernels shadow_kernels_neon = shadow_kernels<FloatNeon>();

}  // namespace elute
