#include "simd/float_neon.h"
#include "simd/integer_neon.h"
// The vocabularies must come first.
#include "kernels/ceilings_body.h"

namespace elute {
const CeilingKernels ceiling_kernels_neon_i8mm = {
    read, multiply, kMultipliesPerStep, fma<FloatNeon>, kFmasPerStep<FloatNeon>};
}
