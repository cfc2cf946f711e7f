#include "simd/integer_avx2.h"
// The vocabulary must come first.
#include "kernels/ceilings_body.h"

namespace elute {
const CeilingKernels ceiling_kernels_avx2 = {read, multiply, kMultipliesPerStep};
}
