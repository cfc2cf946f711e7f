#include "simd/integer_neon.h"
// The vocabulary must come first.
#include "kernels/ceilings_body.h"

namespace elute {
const CeilingKernels ceiling_kernels_neon = {read, multiply, kMultipliesPerStep};
}
