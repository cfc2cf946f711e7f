// GCC 12's own AVX-512 header trips this: https://gcc.gnu.org/bugzilla/show_bug.cgi?id=105593
#pragma GCC diagnostic ignored "-Wuninitialized"
#include "kernels/shadow_body.h"
#include "simd/float_avx512.h"

namespace elute {

constexpr ShadowKernels shadow_kernels_avx512 = shadow_kernels<FloatAvx512>();

}  // namespace elute
