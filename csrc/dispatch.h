// Which kernels this CPU can run: looked up once, by name or best first.
#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "kernels/ceilings.h"
#include "kernels/float_kernels.h"
#include "kernels/matmul.h"
#include "kernels/shadow.h"

namespace elute {

struct KernelTable {
  std::string_view isa;  // scalar, avx2, avx512; neon, neon_i8mm
  const MatmulKernels* matmul;
  const FloatKernels* floats;
  const CeilingKernels* ceilings;
  const ShadowKernels* shadows;
};

// Levels that this CPU supports, slowest first. With ELUTE_EMULATE_AVX512 avx512 is always among them, but never best.
const std::vector<KernelTable>& available_kernels();

// The fastest level, or the named one; null when the name is unknown or this CPU lacks it.
const KernelTable* find_kernels(std::string_view isa);
const KernelTable& best_kernels();

}  // namespace elute
