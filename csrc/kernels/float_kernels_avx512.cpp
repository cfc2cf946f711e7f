// GCC 12's own AVX-512 header trips this: https://gcc.gnu.org/bugzilla/show_bug.cgi?id=105593
#pragma GCC diagnostic ignored "-Wuninitialized"
#include "kernels/float_kernels_body.h"
#include "simd/float_avx512.h"

namespace elute {

constexpr FloatKernels float_kernels_avx512 = float_kernels<FloatAvx512>();

}  // namespace elute
