#include "kernels/shadow_body.h"
#include "simd/float_avx2.h"

namespace elute {

constexpr ShadowKernels shadow_kernels_avx2 = shadow_kernels<FloatAvx2>();

}  // namespace elute
