#include "simd/float_neon.h"
#include "simd/integer_neon_i8mm.h"
// The vocabularies must come first.
#include "kernels/ceilings_body.h"

namespace elute {
// A matrix product multiplies twice as many bytes as a vector holds.
const CeilingKernels ceiling_kernels_neon_i8mm = {
    read, multiply, 2 * kMultipliesPerStep, fma<FloatNeon>, kFmasPerStep<FloatNeon>};
}
