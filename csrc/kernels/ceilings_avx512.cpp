#include "simd/integer_avx512.h"
// The vocabulary must come first.
#include "kernels/ceilings_body.h"

namespace elute {
const CeilingKernels ceiling_kernels_avx512 = {read, multiply, kMultipliesPerStep};
}
