#include "simd/float_avx2.h"
#include "simd/integer_avx2.h"
// The vocabularies must come first.
#include "kernels/ceilings_body.h"

namespace elute {
const CeilingKernels ceiling_kernels_avx2 = {
    read, multiply, kMultipliesPerStep, fma<FloatAvx2>, kFmasPerStep<FloatAvx2>};
}
