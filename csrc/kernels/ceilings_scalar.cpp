#include "simd/integer_scalar.h"
// The vocabulary must come first.
#include "kernels/ceilings_body.h"

namespace elute {
const CeilingKernels ceiling_kernels_scalar = {read, multiply, kMultipliesPerStep};
}
