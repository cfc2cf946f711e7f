#include "dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace elute {
namespace {

std::vector<KernelTable> detect() {
  std::vector<KernelTable> found = {
      {"scalar", &matmul_kernels_scalar, &float_kernels_scalar, &ceiling_kernels_scalar, &shadow_kernels_scalar}};
#if defined(__x86_64__)
  // These also say whether the operating system keeps the wide registers. Clang before 18 does not know "f16c".
  __builtin_cpu_init();
  unsigned eax, ebx, ecx, edx;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c)
    found.push_back({"avx2", &matmul_kernels_avx2, &float_kernels_avx2, &ceiling_kernels_avx2, &shadow_kernels_avx2});
#if defined(ELUTE_EMULATE_AVX512)
  const bool avx512 = found.size() == 2, gfni = true;
#else
  const bool avx512 = found.size() == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  const bool gfni = __builtin_cpu_supports("gfni");
#endif
  if (avx512) {
    static MatmulKernels matmul = matmul_kernels_avx512;
    if (gfni) matmul.lut_multiply = lut_multiply_gfni;
    found.push_back({"avx512", &matmul, &float_kernels_avx512, &ceiling_kernels_avx512, &shadow_kernels_avx512});
  }
#elif defined(__aarch64__)
  // Half-precision conversions are part of every ARMv8, dot products of ARMv8.2 are not.
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) {
    found.push_back({"neon", &matmul_kernels_neon, &float_kernels_neon, &ceiling_kernels_neon, &shadow_kernels_neon});
    if (getauxval(AT_HWCAP2) & HWCAP2_I8MM)
      found.push_back({"neon_i8mm", &matmul_kernels_neon_i8mm, &float_kernels_neon, &ceiling_kernels_neon_i8mm,
                       &shadow_kernels_neon});
  }
#endif
  return found;
}

}  // namespace

const std::vector<KernelTable>& available_kernels() {
  static const std::vector<KernelTable> kernels = detect();
  return kernels;
}

const KernelTable* find_kernels(std::string_view isa) {
  for (const KernelTable& table : available_kernels())
    if (table.isa == isa) return &table;
  return nullptr;
}

const KernelTable& best_kernels() {
#if defined(ELUTE_EMULATE_AVX512)
  if (const KernelTable* avx2 = find_kernels("avx2")) return *avx2;
#endif
  return available_kernels().back();
}

}  // namespace elute
