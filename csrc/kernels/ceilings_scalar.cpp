#include "simd/float_scalar.h"
#include "simd/integer_scalar.h"
// The vocabularies must come first.
#include "kernels/ceilings_body.h"

namespace elute {
const CeilingKernels ceiling_kernels_scalar = {
    read, multiply, kMultipliesPerStep, fma<FloatScalar>, kFmasPerStep<FloatScalar>};
}
