#include "simd/float_avx512.h"
#include "simd/integer_avx512.h"
// The vocabularies must come first.
#include "kernels/ceilings_body.h"

namespace elute {
const CeilingKernels ceiling_kernels_avx512 = {
    read, multiply, kMultipliesPerStep, fma<FloatAvx512>, kFmasPerStep<FloatAvx512>};
}
