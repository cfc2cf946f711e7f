#include "simd/float_neon.h"
#include "simd/integer_neon_dot.h"
// The vocabularies must come first.
#include "kernels/ceilings_body.h"

namespace elute {
const CeilingKernels ceiling_kernels_neon = {
    read, multiply, kMultipliesPerStep, fma<FloatNeon>, kFmasPerStep<FloatNeon>};
}
